"""The engine's fast ways: packed weights, the fused loop, pictures encoded once, bfloat16, memory, cores."""

from __future__ import annotations

import gc
import os
import threading
import tracemalloc

import numpy as np
import pytest
import torch

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.policy.backbones import BACKBONES, DPMixerSize, DPMLPSize
from decoupled_policy_ros.policy.encoders import ImageEncoder
from decoupled_policy_ros.policy.packed import PackedLinear, usable_precision, with_packed_convolutions
from decoupled_policy_ros.runtime.cores import pin_thread, read_cores
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.runtime.fused import FusedNetwork, PlainNetwork
from decoupled_policy_ros.runtime.ticks import Signal

CPU = torch.device('cpu')
SMALL = {'width': 48, 'hidden': 96, 'blocks': 3, 'time_width': 16}
SIZES = {'dp_mlp': DPMLPSize(**SMALL), 'dp_mixer': DPMixerSize(**SMALL, mixing=24)}


def frames_of(contract, seed: int = 0, writeable: bool = False) -> dict[str, tuple[np.ndarray, ...]]:
    """An observation as the sampler gives it: arrays of single frames that nobody can write to."""
    rng = np.random.default_rng(seed)
    observation = {}
    for s in contract.streams:
        shape = (contract.n_obs_steps, *s.shape)
        whole = rng.integers(0, 256, shape).astype(np.uint8) if s.kind == 'image' else rng.normal(size=shape)
        observation[s.name] = tuple(np.ascontiguousarray(frame) for frame in whole)
        for frame in observation[s.name]:
            frame.flags.writeable = writeable
    return observation


def has_bfloat16() -> bool:
    """Whether this processor has it; where not, it has to be refused."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return True
    with pytest.raises(ConfigError, match='not usable on this processor'):
        usable_precision('bfloat16', CPU)
    return False


def stacked(observation) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack(frames))[None] for name, frames in observation.items()}


def denoiser_and_modulation(kind: str, mechanism: str, observations: int, steps: int = 2):
    torch.manual_seed(0)
    denoiser = BACKBONES[kind](SIZES[kind], mechanism).eval().requires_grad_(False)
    return denoiser, torch.randn(steps, observations, denoiser.needs.size) * 0.5


@pytest.mark.parametrize('samples', [1, 3])
@pytest.mark.parametrize('observations', [1, 2])
@pytest.mark.parametrize('mechanism', ['film', 'adaln_zero'])
@pytest.mark.parametrize('kind', ['dp_mlp', 'dp_mixer'])
def test_the_fused_network_is_the_backbone(kind, mechanism, observations, samples):
    denoiser, modulation = denoiser_and_modulation(kind, mechanism, observations)
    x = torch.randn(observations * samples, 16, 10)
    with torch.inference_mode():
        fused = FusedNetwork(denoiser, 2, torch.float32)
        for cycle in range(2):  # the second one uses the memory of the first
            steps, plain = fused.begin(modulation + cycle), PlainNetwork(denoiser).begin(modulation + cycle)
            for i in (1, 0):
                expected = denoiser(x, (modulation[i] + cycle).repeat_interleave(samples, 0))
                torch.testing.assert_close(plain(i, x), expected, rtol=0, atol=0)
                torch.testing.assert_close(steps(i, x), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('mechanism', ['film', 'adaln_zero'])
@pytest.mark.parametrize('kind', ['dp_mlp', 'dp_mixer'])
def test_the_fused_network_in_bfloat16_is_near_the_backbone(kind, mechanism):
    if not has_bfloat16():
        return
    denoiser, modulation = denoiser_and_modulation(kind, mechanism, 1)
    x = torch.randn(4, 16, 10)
    with torch.inference_mode():
        output = FusedNetwork(denoiser, 2, torch.bfloat16).begin(modulation)(0, x)
        expected = denoiser(x, modulation[0].expand(4, -1))
    assert output.dtype == torch.float32
    assert 0 < (output - expected).abs().max() < 0.03 * expected.abs().max()


def test_packed_weights_give_the_same_products():
    torch.manual_seed(0)
    linear, x, residual = torch.nn.Linear(24, 40), torch.randn(2, 16, 24), torch.randn(2, 16, 40)
    with torch.inference_mode():
        packed = PackedLinear.of(linear, 16, torch.float32)
        y = linear(x)
        torch.testing.assert_close(packed(x), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed.gelu(x), torch.nn.functional.gelu(y), rtol=1e-5, atol=1e-5)
        before = residual.clone()
        torch.testing.assert_close(packed.plus(x, residual), y + residual, rtol=1e-5, atol=1e-5)
        assert torch.equal(residual, before)


def test_packed_convolutions_give_the_same_features_and_leave_the_encoder_as_it_was():
    torch.manual_seed(0)
    encoder = ImageEncoder(base_channels=16).eval()
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    images = torch.randint(256, (1, 1, 84, 84, 3), dtype=torch.uint8)
    with torch.inference_mode():
        packed = with_packed_convolutions(encoder, torch.zeros_like(images), torch.float32)
        torch.testing.assert_close(packed(images), encoder(images), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, torch.nn.Conv2d) for m in packed.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in encoder.state_dict().items())


def test_a_picture_that_was_encoded_ahead_is_not_encoded_again_and_changes_nothing(small_policy, monkeypatch):
    observation = frames_of(small_policy.contract)
    fresh = Engine(small_policy, steps=2, seed=3)
    expected = fresh(observation).actions
    engine, encoded = Engine(small_policy, steps=2, seed=3), []
    encode = engine.features._encode
    monkeypatch.setattr(
        engine.features,
        '_encode',
        lambda name, pictures, **how: (
            encoded.extend((name, id(p)) for p in pictures) or encode(name, pictures, **how)
        ),
    )
    newest = {name: frames[-1] for name, frames in observation.items()}
    assert engine.ahead(newest) and engine.ahead(newest) and not engine.ahead(newest)  # two cameras
    assert engine.ahead({'wrist': observation['wrist'][0]})
    actions = engine(observation).actions
    np.testing.assert_array_equal(actions, expected)
    pictures = {(name, id(p)) for name in ('agentview', 'wrist') for p in observation[name]}
    assert set(encoded) == pictures and len(encoded) == len(pictures) == 4
    engine.reset(3)
    np.testing.assert_array_equal(engine(observation).actions, expected)
    assert len(encoded) == 4
    # The same numbers in other arrays are other pictures: nothing is known of them.
    engine.reset(3)
    np.testing.assert_array_equal(engine(frames_of(small_policy.contract)).actions, expected)
    assert len(encoded) == 8


def test_an_array_that_can_be_written_to_is_encoded_each_time(small_policy):
    observation = frames_of(small_policy.contract, writeable=True)
    engine = Engine(small_policy, steps=2, seed=3)
    before = engine(observation).actions
    for picture in observation['wrist']:
        picture[:] = 255 - picture
    engine.reset(3)
    assert not np.array_equal(engine(observation).actions, before)


def test_bfloat16_gives_nearly_the_same_chunk(small_policy):
    if not has_bfloat16():
        return
    observation = frames_of(small_policy.contract)
    noise = torch.randn(1, 16, 10, generator=torch.Generator().manual_seed(5))
    naive = small_policy.predict_naive(stacked(observation), noise, 10)[0].numpy()
    actions = Engine(small_policy, steps=10, seed=5, precision='bfloat16')(observation).actions
    assert 0 < np.abs(actions - naive).max() < 0.02


def test_a_precision_that_can_not_be_is_refused(small_policy, monkeypatch):
    with pytest.raises(ConfigError, match=r"precision 'float16' does not exist; valid: float32, bfloat16"):
        Engine(small_policy, precision='float16')
    with pytest.raises(ConfigError, match="'bfloat16' is for device cpu, not meta"):
        usable_precision('bfloat16', torch.device('meta'))
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: False)
    with pytest.raises(ConfigError, match="'bfloat16' is not usable on this processor; valid: float32"):
        usable_precision('bfloat16', CPU)


def test_without_onednn_the_plain_network_gives_the_same_chunk(small_policy, monkeypatch):
    observation = frames_of(small_policy.contract)
    fast = Engine(small_policy, steps=5, seed=2)(observation).actions
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    plain = Engine(small_policy, steps=5, seed=2)
    assert isinstance(plain.network, PlainNetwork)
    np.testing.assert_allclose(plain(observation).actions, fast, atol=2e-5)


def test_memory_does_not_grow_with_cycles(small_policy):
    engine = Engine(small_policy, steps=2)
    observations = [frames_of(small_policy.contract, seed) for seed in range(8)]

    def cycles(count: int) -> None:
        for i in range(count):
            observation = observations[i % len(observations)]
            engine.ahead({name: frames[0] for name, frames in observation.items()})
            engine(observation)

    cycles(50)
    gc.collect()
    tracemalloc.start()
    try:
        cycles(20)
        held = []
        for _ in range(4):
            gc.collect()
            held.append((tracemalloc.get_traced_memory()[0], resident_kb()))
            cycles(100)
    finally:
        tracemalloc.stop()
    # A leak grows each time; what else the process keeps, and the allocator's own reserve, does not.
    traced, resident = np.diff(held, axis=0).min(axis=0)
    assert traced < 7_000
    assert resident < 1_400


def resident_kb() -> int:
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') // 1024


def test_cores_are_read_from_numbers_and_ranges():
    usable = sorted(os.sched_getaffinity(0))
    first, last = usable[0], usable[-1]
    assert read_cores('') == read_cores(' , ') == frozenset()
    assert read_cores(f'{first}') == {first}
    assert read_cores(f' {first} , {last}') == {first, last}
    assert read_cores(f'{first}-{first}') == {first}
    with pytest.raises(ConfigError, match=r"cores '0,x': 'x' is neither a number nor a range such as '4-7'"):
        read_cores('0,x')
    with pytest.raises(ConfigError, match=rf'may not run on 4096; valid: {first}'):
        read_cores('4096')
    with pytest.raises(ConfigError, match=r"cores '0, 3-1': '3-1' ends before it begins; valid: '1-3'"):
        read_cores('0, 3-1')
    with pytest.raises(ConfigError, match=rf'may not run on 99999999999; valid: {first}'):
        read_cores(f'{first}-99999999999')  # without a list of all of them


def test_a_pinned_thread_and_those_that_it_starts_stay_on_its_cores():
    usable = os.sched_getaffinity(0)
    core, seen = min(usable), []

    def child() -> None:
        seen.append(os.sched_getaffinity(0))

    def pinned() -> None:
        pin_thread(frozenset())
        seen.append(os.sched_getaffinity(0))
        pin_thread(frozenset({core}))
        run(child)

    def run(target) -> None:
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()

    run(pinned)
    assert seen == [usable, {core}]
    assert os.sched_getaffinity(0) == usable


def test_a_signal_between_a_look_and_a_wait_is_not_slept_through():
    signal = Signal(threading.Lock())
    with signal:
        seen = signal.count
        signal.notify_all()  # nobody waits yet
        signal.wait_after(seen, 60.0)  # returns at once
        signal.wait_after(signal.count, 0.01)  # nothing since: the time passes
