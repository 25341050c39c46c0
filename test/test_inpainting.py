"""Known waypoints in the denoising loop, samples of one observation, and noise that a stamp decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_policy import random_observation

from decoupled_policy_ros.policy.sampling import Known, Sampler, make_schedule
from decoupled_policy_ros.policy.schedule import ScheduleConfig
from decoupled_policy_ros.runtime.engine import Engine, noise_seed
from decoupled_policy_ros.runtime.prefix import Prefix

WAYS = [
    (ScheduleConfig(), 'ddim'),
    (ScheduleConfig(), 'ddpm'),
    (ScheduleConfig(prediction='v'), 'ddim'),
    (ScheduleConfig(kind='rectified_flow'), 'euler'),
]
every_way = pytest.mark.parametrize(
    ('config', 'kind'), WAYS, ids=[f'{c.prediction}-{kind}' for c, kind in WAYS]
)


def sample(config, kind, predict, known, seed=0, batch=2, steps=10):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 16, 10, generator=generator)
    sampler = Sampler(make_schedule(config), steps, kind)
    return sampler.run(lambda i, x: predict(sampler, i, x), noise, generator, known)


def mixing(sampler, i, x):
    """A network in which every waypoint depends on every other one."""
    return torch.tanh(x.flip(1) + 0.5 * x.mean(1, keepdim=True) - 0.1 * i)


def random_known(seed: int, batch: int = 2) -> Known:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(batch, 16, generator=generator)
    weight[:, :3], weight[:, -4:] = 1.0, 0.0
    return Known(2 * torch.rand(batch, 16, 10, generator=generator) - 1, weight)


@every_way
@given(st.integers(0, 2**31), st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_pinned_waypoints_come_out_exactly_and_no_weight_changes_nothing(config, kind, seed, steps):
    known = random_known(seed)
    actions = sample(config, kind, mixing, known, seed, steps=steps)
    torch.testing.assert_close(actions[:, :3], known.actions[:, :3], rtol=0, atol=1e-6)
    free = Known(known.actions, torch.zeros(2, 16))
    plain = sample(config, kind, mixing, None, seed, steps=steps)
    torch.testing.assert_close(
        sample(config, kind, mixing, free, seed, steps=steps), plain, rtol=0, atol=1e-6
    )


@every_way
@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_between_pinned_and_free_a_waypoint_lies_between_the_known_one_and_what_the_network_says(
    config, kind, seed
):
    """With a network that says the same actions whatever it sees, the weights are those of a mean."""
    known = random_known(seed)
    wanted = (2 * torch.rand(2, 16, 10, generator=torch.Generator().manual_seed(seed + 1)) - 1) * 0.9

    def knowing(sampler, i, x):
        schedule, k = sampler.schedule, torch.full((2,), sampler.ks[i])
        eps = (x - schedule.clean[k][:, None, None] * wanted) / schedule.noise[k][:, None, None]
        return schedule.target(wanted, eps, k)

    actions = sample(config, kind, knowing, known, seed)
    torch.testing.assert_close(
        actions, torch.lerp(wanted, known.actions, known.weight[..., None]), rtol=0, atol=2e-4
    )


@every_way
def test_a_network_that_mixes_time_goes_on_from_what_is_pinned(config, kind):
    """The exact denoiser of actions that are alike over time: each waypoint 0.3 times one number, and a little more."""
    covariance = 0.09 * (torch.ones(16, 16) + 0.05 * torch.eye(16))

    def exact(sampler, i, x):
        schedule, k = sampler.schedule, torch.full((len(x),), sampler.ks[i])
        clean, noise = float(schedule.clean[k[0]]), float(schedule.noise[k[0]])
        gain = clean * covariance @ torch.linalg.inv(clean**2 * covariance + noise**2 * torch.eye(16))
        x_0 = gain @ x
        return schedule.target(x_0, (x - clean * x_0) / noise, k)

    weight = torch.zeros(16)
    weight[:4] = 1.0
    means = {}
    for value in (-0.4, 0.0, 0.4):
        known = Known(torch.full((16, 10), value), weight)
        actions = sample(config, kind, exact, known, batch=64, steps=20)
        assert (actions[:, :4] - value).abs().max() < 1e-6
        means[value] = float(actions[:, 4:].mean())
    free = sample(config, kind, exact, None, batch=64, steps=20)
    # The rest follows what is pinned nearly all of the way, though its own weight is zero, and is as sure of it.
    assert means[0.4] - means[-0.4] > 0.85 * 0.8
    assert abs(means[0.0]) < 0.03
    spread = (
        sample(config, kind, exact, Known(torch.zeros(16, 10), weight), batch=64, steps=20)[:, 4:]
        .mean(1)
        .std()
    )
    assert spread < 0.4 * free.mean(1).std()


def prefix_of(rng, horizon=16) -> Prefix:
    actions = np.array([0.5, 0, 0.1, 1, 0, 0, 0, 1, 0, 0]) + rng.uniform(-0.2, 0.2, (horizon, 10))
    return Prefix(actions, np.clip(1.5 - np.arange(horizon) / 6, 0, 1))


def test_the_engine_takes_known_waypoints_in_metres(small_policy):
    engine, known = Engine(small_policy, steps=4), prefix_of(np.random.default_rng(0))
    observation = random_observation(small_policy.contract)
    pinned = known.weight == 1
    assert pinned.sum() == 4
    chunk = engine(observation, known).actions
    np.testing.assert_allclose(chunk[pinned], known.actions[pinned], atol=1e-6)
    engine.reset(0)
    free = engine(observation).actions
    assert np.abs(chunk[~pinned] - free[~pinned]).max() > 1e-3
    np.testing.assert_allclose(
        chunk[known.weight == 0], free[known.weight == 0], atol=1e-6
    )  # DP-MLP does not mix


def test_samples_of_one_observation_are_those_of_each_alone(small_policy):
    engine, known = Engine(small_policy, steps=4), prefix_of(np.random.default_rng(1))
    observation = random_observation(small_policy.contract)
    for prefix in (None, known):
        engine.reset(3)
        together = engine(observation, prefix, samples=8).samples
        assert together.shape == (8, 16, 10)
        engine.reset(3)
        alone = [engine(observation, prefix).actions for _ in range(8)]
        np.testing.assert_allclose(together, alone, atol=2e-6)
        assert np.abs(together - together[0]).max() > 1e-3
    engine.reset(3)
    np.testing.assert_allclose(engine(observation, known).actions, together[0], atol=2e-6)


def test_several_observations_have_samples_and_prefixes_of_their_own(small_policy):
    engine = Engine(small_policy, steps=4)
    scenes = [random_observation(small_policy.contract, seed) for seed in range(3)]
    known = [None, prefix_of(np.random.default_rng(2)), prefix_of(np.random.default_rng(3))]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = engine.many(scenes, generators, known, samples=2)
    assert together.shape == (3, 2, 16, 10)
    for seed, (scene, prefix) in enumerate(zip(scenes, known, strict=True)):
        engine.reset(seed)
        np.testing.assert_allclose(together[seed], engine(scene, prefix, samples=2).samples, atol=2e-5)


def test_the_stamp_of_an_observation_decides_its_noise(small_policy):
    engine, observation = Engine(small_policy, steps=2), random_observation(small_policy.contract)

    def at(seed: int, stamp_ns: int) -> np.ndarray:
        engine.reset(seed, stamp_ns)
        return engine(observation).actions

    first = at(0, 1_700_000_000_000_000_000)
    others = [at(0, 1_700_000_000_050_000_000), at(1, 1_700_000_000_000_000_000), at(0, 0)]
    assert all(np.abs(first - other).max() > 1e-3 for other in others)
    np.testing.assert_array_equal(at(0, 1_700_000_000_000_000_000), first)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2**62), st.integers(1, 10**9))
def test_noise_seeds_differ(seed, stamp_ns, later_ns):
    assert 0 <= noise_seed(seed, stamp_ns) < 2**63
    assert noise_seed(seed, stamp_ns) != noise_seed(seed, stamp_ns + later_ns)
    assert noise_seed(seed, stamp_ns) != noise_seed(seed + 1, stamp_ns)
