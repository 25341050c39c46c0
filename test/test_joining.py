"""How chunks join, without a network: prefixes, samples, ensembles, latency, and following as predicted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits_checker import LimitsChecker
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.direct import AsPredicted, Direct
from decoupled_policy_ros.runtime.ensembling import Ensemble
from decoupled_policy_ros.runtime.guard.settings import GuardSettings
from decoupled_policy_ros.runtime.joining import ChunkTiming, Joiner, JoinSettings
from decoupled_policy_ros.runtime.latency import Latency
from decoupled_policy_ros.runtime.motion import UnderWay
from decoupled_policy_ros.runtime.prefix import prefix_of
from decoupled_policy_ros.runtime.selection import (
    SLOWEST,
    SamplesDisagree,
    SpreadLimits,
    join_errors_m,
    most_typical,
    spread_m,
)
from decoupled_policy_ros.runtime.steering import ChunkRejected, Plan

ROBOT = load_robot('panda_sim')
MS = 1_000_000
PERIOD_NS, T0_NS = 50 * MS, 1_000_000 * MS
TIMING = ChunkTiming(20.0, 2, 8, 16)


def wandering(seed: int, step_m: float = 0.01, step_rad: float = 0.02) -> np.ndarray:
    """Actions (16, 10) of a hand that wanders."""
    rng = np.random.default_rng(seed)
    way = np.tile(np.eye(4), (16, 1, 1))
    way[:, :3, 3] = np.array([0.5, 0.0, 0.2]) + np.cumsum(rng.normal(size=(16, 3)) * step_m, 0)
    for i in range(1, 16):
        way[i, :3, :3] = way[i - 1, :3, :3] @ Rotation.from_rotvec(rng.normal(size=3) * step_rad).as_matrix()
    return poses.action_from_pose(way, rng.choice([-1.0, 1.0], 16))


def straight(speed_m_s: float = 0.2, at_m: float = 0.4, stamp_ns: int = T0_NS) -> Chunk:
    """A chunk along x, at `at_m` at the stamp of its observation."""
    way = np.tile(np.eye(4), (16, 1, 1))
    way[:, 0, 3] = at_m + speed_m_s * 0.05 * (np.arange(16) - 1)
    return Chunk(poses.action_from_pose(way, -1.0), stamp_ns, 20.0)


def under_way(chunk: Chunk) -> UnderWay:
    motion = AsPredicted(chunk)
    return UnderWay(motion, None, motion.end_ns)


# --- prefix -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(-2, 20), st.integers(0, 12), st.integers(0, 49))
def test_what_will_have_been_executed_is_pinned_and_the_rest_less_and_less(seed, late, blend, inside):
    before = Chunk(wandering(seed), T0_NS, 20.0)
    stamps_ns = TIMING.stamps_ns(before.replan_stamp_ns)
    takeover_ns = before.replan_stamp_ns + late * PERIOD_NS + inside * MS
    known = prefix_of(under_way(before), stamps_ns, takeover_ns, blend)
    stamps = np.array(stamps_ns)
    executed = stamps < takeover_ns
    assert (known.weight[executed & (stamps <= before.end_stamp_ns)] == 1).all()
    assert (known.weight[~executed] < 1).all() and (np.diff(known.weight) <= 0).all()
    assert np.count_nonzero((known.weight > 0) & (known.weight < 1)) <= blend
    assert (
        known.weight[(stamps > before.end_stamp_ns) & ~executed] == 0
    ).all()  # nobody knows what comes then
    for i in np.flatnonzero(known.weight):
        pose, gripper = before.sample(min(stamps_ns[i], before.end_stamp_ns))
        np.testing.assert_allclose(known.actions[i], poses.action_from_pose(pose, gripper), atol=1e-12)


def test_the_weight_falls_evenly():
    known = prefix_of(
        under_way(straight()), TIMING.stamps_ns(T0_NS + 8 * PERIOD_NS), T0_NS + 8 * PERIOD_NS, 4
    )
    np.testing.assert_allclose(known.weight, [1, 0.8, 0.6, 0.4, 0.2] + [0] * 11)


# --- as predicted, and a stop ---------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.floats(0, 0.7499))
def test_the_motion_of_a_chunk_is_the_chunk_and_its_velocity_is_that_of_its_lines(seed, later_s):
    chunk, stamp_ns = Chunk(wandering(seed), T0_NS, 20.0), T0_NS + round(later_s * 1e9) - PERIOD_NS
    motion = AsPredicted(chunk)
    pose, gripper = chunk.sample(stamp_ns)
    state = motion.state(stamp_ns)
    np.testing.assert_array_equal(state.pose, pose)
    assert motion.gripper(stamp_ns) == gripper
    before = motion.state(stamp_ns - 1000)
    if stamp_ns % PERIOD_NS > 1000:  # on one line
        np.testing.assert_allclose((pose - before.pose)[:3, 3] / 1e-6, state.linear_m_s, atol=1e-4)
        turned = Rotation.from_matrix(pose[:3, :3] @ before.pose[:3, :3].T).as_rotvec() / 1e-6
        np.testing.assert_allclose(turned, state.angular_rad_s, atol=1e-3)


def test_without_a_guard_a_late_chunk_ends_in_a_stop_inside_limits():
    limits = ROBOT.limits
    direct, checker = Direct(GuardSettings().stopping(ROBOT)), LimitsChecker.of(limits)
    chunk = straight()
    direct.adopt(Plan(chunk))
    now_ns, held = T0_NS, []
    while now_ns < chunk.end_stamp_ns + 40 * PERIOD_NS:
        late = now_ns > chunk.end_stamp_ns
        pose = direct.hold(now_ns) if late else direct.follow(now_ns)[0]
        checker.add(now_ns, pose)
        held += [pose] if late else []
        now_ns += 20 * MS
    checker.require_none()
    assert held[0][0, 3] > chunk.poses_base_ee[-1, 0, 3] + 0.001  # it does not stop at once
    np.testing.assert_array_equal(held[-1], held[-2])
    assert direct.under_way() is None  # what follows starts afresh


def test_a_chunk_begins_when_it_takes_over_and_not_before():
    direct, first = Direct(), straight()
    direct.adopt(Plan(first))
    second = Chunk(wandering(1), T0_NS + 8 * PERIOD_NS, 20.0, begins_ns=T0_NS + 9 * PERIOD_NS + 7 * MS)
    direct.adopt(Plan(second))
    for now_ns, chunk in ((second.begins_ns - 1, first), (second.begins_ns, second)):
        np.testing.assert_array_equal(direct.follow(now_ns)[0], chunk.sample(now_ns)[0])
    with pytest.raises(ChunkRejected, match=r'passed: the last waypoint .* 0\.050 s ago'):
        direct.plan(first, first.end_stamp_ns + PERIOD_NS)


def test_chunks_that_are_adopted_before_the_one_before_has_begun_come_in_turn():
    direct = Direct()
    chunks = [
        Chunk(wandering(i), T0_NS + i * PERIOD_NS, 20.0, begins_ns=T0_NS + i * 3 * PERIOD_NS)
        for i in range(4)
    ]
    direct.adopt(Plan(chunks[0]))
    direct.follow(T0_NS)
    for chunk in chunks[1:]:
        direct.adopt(Plan(chunk))
    for now_ns in range(T0_NS, T0_NS + 12 * PERIOD_NS, 20 * MS):
        chunk = [c for c in chunks if c.begins_ns <= now_ns][-1]
        np.testing.assert_array_equal(direct.under_way().state(now_ns).pose, chunk.sample(now_ns)[0])
    for now_ns in range(T0_NS, T0_NS + 12 * PERIOD_NS, 20 * MS):
        chunk = [c for c in chunks if c.begins_ns <= now_ns][-1]
        np.testing.assert_array_equal(direct.follow(now_ns)[0], chunk.sample(now_ns)[0])


def test_a_slowed_chunk_goes_the_same_way_later():
    chunk = Chunk(wandering(2), T0_NS, 20.0, begins_ns=T0_NS + 3 * PERIOD_NS)
    slow = chunk.slowed(2.0)
    for later in (-PERIOD_NS, 0, PERIOD_NS, 4 * PERIOD_NS + 3 * MS):
        stamp_ns = chunk.begins_ns + later
        np.testing.assert_allclose(
            slow.sample(chunk.begins_ns + 2 * later if later > 0 else stamp_ns)[0],
            chunk.sample(stamp_ns)[0],
            atol=1e-9,
        )
    assert slow.replan_stamp_ns == chunk.replan_stamp_ns


# --- samples ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(0, 0.1))
def test_the_spread_is_how_far_samples_lie_from_their_mean(seed, count, apart_m):
    positions = np.tile(wandering(seed)[None, :8, :3], (count, 1, 1))
    assert spread_m(positions) < 1e-12
    offsets = np.zeros((count, 3))
    offsets[: 2 * (count // 2), 1] = apart_m * np.array([1, -1] * (count // 2))
    shifted = positions + offsets[:, None]
    expected = np.sqrt((((offsets - offsets.mean(0)) ** 2).sum(-1)).mean())
    assert spread_m(shifted) == pytest.approx(expected, abs=1e-9)
    turned = shifted @ Rotation.random(rng=seed).as_matrix().T + 1.0
    assert spread_m(turned) == pytest.approx(spread_m(shifted), abs=1e-9)  # wherever the base is
    assert spread_m(shifted[np.random.default_rng(seed).permutation(count)]) == pytest.approx(
        expected, abs=1e-9
    )


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_the_sample_that_goes_on_as_the_arm_does_is_found(seed, count):
    before, takeover_ns = Chunk(wandering(seed), T0_NS, 20.0), T0_NS + 8 * PERIOD_NS + 20 * MS
    motion = under_way(before)
    stamps_ns = TIMING.stamps_ns(T0_NS + 8 * PERIOD_NS)
    rng = np.random.default_rng(seed)
    samples = np.stack([wandering(seed + 1 + k) for k in range(count)])
    samples[:, :, :3] += motion.state(takeover_ns).pose[:3, 3] - samples[:, 2:3, :3] + 0.02
    best = int(rng.integers(count))
    continued = [motion.state(stamp).pose for stamp in stamps_ns]
    samples[best] = poses.action_from_pose(np.stack(continued), -1.0)
    waypoints, _ = poses.pose_from_action(samples)
    errors = join_errors_m(waypoints, stamps_ns, motion, takeover_ns)
    assert errors[best] < 1e-6 and int(np.argmin(errors)) == best
    joiner = Joiner(TIMING, JoinSettings(samples=count))
    joined = joiner.join(samples, joiner.wish(T0_NS + 8 * PERIOD_NS, takeover_ns, motion))
    np.testing.assert_allclose(joined.chunk.poses_base_ee, waypoints[best], atol=1e-9)
    assert len(joined.others) == count - 1 and joined.chunk.begins_ns == takeover_ns


def test_velocity_counts_where_positions_are_the_same():
    motion, stamps_ns = under_way(straight(0.2)), TIMING.stamps_ns(T0_NS + 8 * PERIOD_NS)
    join_ns = T0_NS + 8 * PERIOD_NS
    ways = [straight(speed, 0.4 + 0.2 * 0.4, join_ns).poses_base_ee for speed in (0.0, 0.19, -0.2)]
    errors = join_errors_m(np.stack(ways), stamps_ns, motion, join_ns)
    np.testing.assert_allclose(errors, [0.2 * 0.05, 0.01 * 0.05, 0.4 * 0.05], atol=1e-9)


def test_from_rest_the_most_typical_sample_is_followed():
    samples = np.stack([wandering(0) for _ in range(3)])
    samples[0, :, 1] += 0.1
    samples[2, :, 1] += 0.01
    assert most_typical(samples[:, :, :3]) == 2
    joiner = Joiner(TIMING, JoinSettings(samples=3))
    joined = joiner.join(samples, joiner.wish(T0_NS, T0_NS, None))
    np.testing.assert_allclose(joined.chunk.poses_base_ee[:, :3, 3], samples[2, :, :3])


@settings(deadline=None, max_examples=50)
@given(st.floats(0.001, 1), st.floats(0, 5))
def test_slowing_is_in_proportion_and_bounded(slow_m, apart_m):
    factor = SpreadLimits(slow_m=slow_m).slowing(apart_m)
    assert 1.0 <= factor <= SLOWEST
    assert (factor == 1.0) == (apart_m <= slow_m)
    assert SpreadLimits().slowing(apart_m) == 1.0 and not SpreadLimits().holds(apart_m)


@pytest.mark.parametrize(
    'values', [{'slow_m': -1.0}, {'hold_m': float('nan')}, {'slow_m': 0.2, 'hold_m': 0.1}]
)
def test_limits_that_make_no_sense_are_refused(values):
    with pytest.raises(ConfigError, match='spread_'):
        SpreadLimits(**values)


def test_samples_that_disagree_slow_down_then_hold_then_ask_for_help():
    limits = SpreadLimits(slow_m=0.02, hold_m=0.05, help_s=1.0)
    joiner = Joiner(TIMING, JoinSettings(samples=2, spread=limits))

    def join(apart_m: float, later_s: float):
        stamp_ns = T0_NS + round(later_s * 1e9)
        samples = np.stack([wandering(0), wandering(0)])
        samples[0, :, 1] += 2 * apart_m
        return joiner.join(samples, joiner.wish(stamp_ns, stamp_ns, None))

    assert join(0.01, 0.0).slowed == 1.0
    slowed = join(0.03, 0.1)
    assert slowed.slowed == pytest.approx(1.5)
    assert slowed.chunk.end_stamp_ns - slowed.chunk.begins_ns == pytest.approx(1.5 * 14 * PERIOD_NS, abs=2)
    for later_s, needs_help in ((1.0, False), (1.9, False), (2.0, True), (3.0, True)):
        with pytest.raises(
            SamplesDisagree, match=r'the 2 samples lie 0\.060 m apart, limit 0\.05 m'
        ) as error:
            join(0.06, later_s)
        assert error.value.needs_help == needs_help
        assert ('please help' in str(error.value)) == needs_help
        assert joiner.spread_m == pytest.approx(0.06)
    join(0.01, 3.1)  # they agree again: what comes later has nothing to do with what was
    with pytest.raises(SamplesDisagree) as error:
        join(0.06, 3.2)
    assert not error.value.needs_help


@pytest.mark.parametrize('values', [{'samples': 0}, {'samples': 65}, {'blend': -1}])
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(ConfigError, match='must be'):
        JoinSettings(**values)


# --- ensembles and latency ------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.floats(0, 5))
def test_an_ensemble_is_the_weighted_mean_of_what_chunks_say_of_a_time(seed, decay):
    chunks = [(wandering(seed + k), TIMING.stamps_ns(T0_NS + 4 * k * PERIOD_NS)) for k in range(4)]
    ensemble = Ensemble(decay)
    for actions, stamps_ns in chunks[:3]:
        ensemble.add(actions, stamps_ns)
    actions, stamps_ns = chunks[3]
    mean = ensemble.mean(actions, stamps_ns)
    for i, stamp in enumerate(stamps_ns):
        said = [old[of.index(stamp)] for old, of in chunks if stamp in of]
        weights = np.exp(-decay * np.arange(len(said)))
        expected = np.average(said, axis=0, weights=weights)
        np.testing.assert_allclose(mean[i, :9], expected[:9], atol=1e-9)
    np.testing.assert_array_equal(mean[:, 9], actions[:, 9])
    ensemble.reset()
    np.testing.assert_allclose(ensemble.mean(actions, stamps_ns), actions)


def test_an_ensemble_takes_chunks_between_each_others_waypoints():
    ensemble = Ensemble(0.0)
    line = straight(0.2)
    ensemble.add(poses.action_from_pose(line.poses_base_ee, -1.0), line.stamps_ns)
    later = straight(0.2, 0.4 + 0.2 * 0.213, T0_NS + 213 * MS)
    actions = poses.action_from_pose(later.poses_base_ee, 1.0)
    np.testing.assert_allclose(ensemble.mean(actions, later.stamps_ns), actions, atol=1e-12)
    with pytest.raises(ConfigError, match='decay'):
        Ensemble(-0.1)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=300))
def test_the_latency_is_one_that_was_measured_and_that_few_of_late_exceed(durations_ns):
    latency = Latency()
    for duration_ns in durations_ns:
        latency.add(duration_ns)
    lately = durations_ns[-100:]
    assert latency.estimate_ns in lately
    assert sum(duration > latency.estimate_ns for duration in lately) <= 0.05 * len(lately)
    latency.add(-1)  # the clock was set
    assert latency.estimate_ns in lately
