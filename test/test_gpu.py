"""The engine on a GPU; what is here runs where there is one."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from test_engine import SIZES, frames_of

from decoupled_policy_ros.policy.backbones import BACKBONES
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.runtime.fused import PlainNetwork
from decoupled_policy_ros.runtime.graphs import GraphNetwork
from decoupled_policy_ros.runtime.prefix import Prefix

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
#: Of the normalised range.
TOLERANCE = 1e-4


@pytest.mark.parametrize('samples', [1, 8])
@pytest.mark.parametrize('mechanism', ['film', 'adaln_zero'])
@pytest.mark.parametrize('kind', ['dp_mlp', 'dp_mixer'])
def test_the_recorded_network_gives_the_same_numbers_as_the_plain_one(kind, mechanism, samples):

    torch.manual_seed(0)
    denoiser = BACKBONES[kind](SIZES[kind], mechanism).eval().requires_grad_(False).cuda()
    with torch.inference_mode():
        recorded, plain = GraphNetwork(denoiser), PlainNetwork(denoiser)
        kept = []
        for cycle in range(3):
            modulation = torch.randn(4, 1, denoiser.needs.size, device='cuda') * 0.5
            x = torch.randn(samples, 16, 10, device='cuda')
            ours, theirs = recorded.begin(modulation), plain.begin(modulation)
            kept += [(ours(i, x + cycle), theirs(i, x + cycle)) for i in range(4)]
        for got, expected in kept:  # all at the end: an output must outlive the steps after it
            assert torch.equal(got, expected)


@pytest.mark.parametrize('kind', ['dp_c', 'dp_t', 'dp_mixer'])
def test_what_is_not_a_single_observation_runs_as_well(kind):

    denoiser = BACKBONES[kind]().eval().requires_grad_(False).cuda()
    with torch.inference_mode():
        for observations in (1, 2):
            modulation = torch.randn(2, observations, denoiser.needs.size, device='cuda') * 0.1
            x = torch.randn(2 * observations, 16, 10, device='cuda')
            got = GraphNetwork(denoiser).begin(modulation)(1, x)
            assert torch.equal(got, PlainNetwork(denoiser).begin(modulation)(1, x))


def test_a_chunk_of_the_gpu_is_that_of_the_processor(small_policy):
    observation = frames_of(small_policy.contract)
    known = Prefix(np.tile(small_policy.backbone.normaliser.inverse(torch.zeros(10)).numpy(), (16, 1)),
                   np.linspace(1.0, 0.0, 16))  # fmt: skip
    span = np.abs(small_policy.backbone.normaliser.inverse(torch.ones(10)).numpy()).max()
    expected = [
        Engine(small_policy, seed=3)(observation, samples=4).samples,
        Engine(small_policy, seed=3)(observation, known).samples,
    ]
    engine = Engine(small_policy, seed=3, device='cuda')
    engine.warm_up(samples=4)
    engine.reset(3)
    got = [engine(observation, samples=4).samples]
    engine.reset(3)
    got.append(engine(observation, known).samples)
    for one, other in zip(got, expected, strict=True):
        assert np.abs(one - other).max() < TOLERANCE * span


def test_memory_of_the_gpu_does_not_grow_with_cycles(small_policy):
    engine = Engine(small_policy, device='cuda')
    engine.warm_up()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for seed in range(50):
        engine(frames_of(small_policy.contract, seed))
    seen = [frames_of(small_policy.contract, seed) for seed in range(50, 54)]
    for observation in seen:
        engine(observation)
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert after[0] - before[0] < 100_000 and after[1] == before[1]


def test_a_task_is_recorded_beside_cycles_of_another(small_policy):
    """As a task that is loaded in the background: neither disturbs the other."""
    running = Engine(small_policy, seed=1, device='cuda')
    running.warm_up()
    observation = frames_of(small_policy.contract)
    running.reset(1)
    expected = running(observation).samples
    errors: list[BaseException] = []

    def load() -> None:
        try:
            for _ in range(5):
                Engine(small_policy, seed=1, device='cuda').warm_up(samples=2)
        except BaseException as error:
            errors.append(error)

    loader = threading.Thread(target=load)
    loader.start()
    cycles = 0
    while loader.is_alive() or cycles < 10:
        running.reset(1)
        assert np.array_equal(running(observation).samples, expected)
        cycles += 1
    loader.join()
    assert not errors
