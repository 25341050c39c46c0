"""Paths and stops: continuous, inside their limits whatever they begin with, and at rest in the end."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits_checker import LimitsChecker
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.robot.poses import pose_from_position_rotation
from decoupled_policy_ros.runtime.guard.guard import BESIDE_M
from decoupled_policy_ros.runtime.guard.timing import Moving, ratios, rounding, stretch
from decoupled_policy_ros.runtime.motion import NS_PER_S, MotionState, Path, rotation_steps
from decoupled_policy_ros.runtime.stopping import Stop, StoppingLimits, StraightOn

START_NS = 5_000_000_000
PERIOD_NS = 50_000_000
LIMITS = {
    'linear_velocity': 1.7, 'linear_acceleration': 13.0, 'linear_jerk': 6500.0,
    'angular_velocity': 2.5, 'angular_acceleration': 25.0, 'angular_jerk': 12500.0,
}  # fmt: skip
seeds = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=25, deadline=None)


def pose(position, turn) -> np.ndarray:
    return pose_from_position_rotation(position, Rotation.from_rotvec(turn).as_matrix())


def moving_state(rng, linear=0.5, angular=1.0) -> MotionState:
    def within(largest):
        vector = rng.normal(size=3)
        return vector / np.linalg.norm(vector) * rng.uniform(0, largest)

    return MotionState(pose(rng.normal(size=3), rng.normal(size=3)), within(linear), within(angular))


def checked(motion, until_ns: int, checker: LimitsChecker, seed: int = 0) -> LimitsChecker:
    """Commands of a motion at 250 Hz, now and then one less."""
    stamps = np.arange(motion.start_ns, until_ns, 4_000_000)
    for stamp in stamps[np.random.default_rng(seed).random(len(stamps)) < 0.9]:
        checker.add(int(stamp), motion.state(int(stamp)).pose)
    return checker


@FEW
@given(seeds, st.floats(0.2, 20.0), st.floats(0.5, 40.0), st.booleans())
def test_a_stop_keeps_its_limits_begins_as_it_is_told_and_ends_at_rest(seed, linear, angular, jerk):
    rng = np.random.default_rng(seed)
    state = moving_state(rng, 2.0, 3.0)
    limits = StoppingLimits(linear, angular, *((50 * linear, 50 * angular) if jerk else ()))
    stop = Stop(StraightOn(state, START_NS), START_NS, limits)
    begin = stop.state(START_NS)
    assert begin is state
    end_ns = START_NS + round(stop.duration_s * NS_PER_S) + 1
    just = stop.state(START_NS + 1000)  # a microsecond later: as fast as before, and where that leads
    np.testing.assert_allclose(just.linear_m_s, state.linear_m_s, atol=1e-3)
    np.testing.assert_allclose(just.pose[:3, 3], state.pose[:3, 3] + 1e-6 * state.linear_m_s, atol=1e-9)
    at_rest = stop.state(end_ns)
    assert np.abs(at_rest.linear_m_s).max() < 1e-9 and np.abs(at_rest.angular_rad_s).max() < 1e-9
    np.testing.assert_array_equal(stop.state(end_ns + NS_PER_S).pose, at_rest.pose)
    way = np.linalg.norm(at_rest.pose[:3, 3] - state.pose[:3, 3])
    np.testing.assert_allclose(way, np.linalg.norm(state.linear_m_s) * stop.duration_s / 2, atol=2e-9)
    speeds = [np.linalg.norm(state.linear_m_s), linear, np.linalg.norm(state.angular_rad_s), angular]
    checker = checked(stop, end_ns + PERIOD_NS, LimitsChecker(*(max(s, 1e-6) for s in speeds)))
    checker.require_none()


@FEW
@given(seeds)
def test_a_stop_is_no_longer_than_its_limits_ask_for(seed):
    state = moving_state(np.random.default_rng(seed))
    stop = Stop(StraightOn(state, 0), 0, StoppingLimits(4.0, 8.0))
    need = max(np.linalg.norm(state.linear_m_s) / 4.0, np.linalg.norm(state.angular_rad_s) / 8.0)
    np.testing.assert_allclose(stop.duration_s, 1.5 * need)


@pytest.mark.parametrize('jerk', [20.0, 200.0])
def test_a_stop_keeps_its_limit_of_jerk(jerk):
    state = MotionState(pose([0.5, 0, 0.2], [0.0] * 3), np.array([0.4, 0, 0]), np.array([0, 0, 0.8]))
    stop = Stop(StraightOn(state, 0), 0, StoppingLimits(100.0, 100.0, jerk, 2 * jerk))
    step_s = 1e-4
    times = np.arange(0, stop.duration_s, step_s)
    speeds = np.array([stop.state(round(time * NS_PER_S)).linear_m_s[0] for time in times])
    largest = np.abs(np.diff(speeds, 2)).max() / step_s**2
    assert 0.95 * jerk < largest < 1.01 * jerk


def test_a_stop_from_rest_stays_where_it_is():
    state = MotionState.at_rest(pose([0.5, 0.1, 0.2], [0.3, 0.0, 0.0]))
    stop = Stop(StraightOn(state, START_NS), START_NS, StoppingLimits(1.0, 1.0, 1.0, 1.0))
    np.testing.assert_array_equal(stop.state(START_NS + NS_PER_S).pose, state.pose)


def waypoints(rng, start: MotionState, n: int, step_m: float, step_rad: float) -> np.ndarray:
    poses, current = [], start.pose
    for _ in range(n):
        turn = Rotation.from_rotvec(rng.normal(size=3) * step_rad).as_matrix()
        current = pose_from_position_rotation(
            current[:3, 3] + rng.normal(size=3) * step_m, current[:3, :3] @ turn
        )
        poses.append(current)
    return np.stack(poses)


def timed(start: MotionState, poses: np.ndarray) -> tuple[Path, np.ndarray]:
    """The path along waypoints 50 ms apart, stretched as the limits ask for, and the factors."""
    way = np.concatenate([start.pose[None], poses])
    steps = np.hstack([np.diff(way[:, :3, 3], axis=0), rotation_steps(way)])
    moving = Moving(steps, start.body_twist, LIMITS)
    durations = np.full(len(poses), PERIOD_NS / NS_PER_S)
    factors = stretch(moving, durations, False, np.ones(len(poses)), np.inf)
    assert factors is not None
    rest = stretch(moving, durations, True, factors, np.inf)
    assert rest is not None
    stamps = [START_NS, *(START_NS + np.round(np.cumsum(rest * durations) * NS_PER_S).astype(int)).tolist()]
    rounded, turn_s = rounding(moving, rest * durations)
    return Path(
        start, poses, np.zeros(len(poses) + 1), stamps, rounded, float(factors.max()), turn_s
    ), factors


@FEW
@given(seeds, st.integers(1, 16), st.floats(0.0, 0.05), st.floats(0.0, 0.15))
def test_a_stretched_path_never_breaks_a_limit_and_ends_at_rest(seed, n, step_m, step_rad):
    rng = np.random.default_rng(seed)
    start = moving_state(rng)
    path, _ = timed(start, waypoints(rng, start, n, step_m, step_rad))
    limits = [
        LIMITS[f'{what}_{order}'] for what in ('linear', 'angular') for order in ('velocity', 'acceleration')
    ]
    checker = checked(path, path.end_ns + PERIOD_NS, LimitsChecker(*limits))
    checker.require_none()
    end = path.state(path.end_ns - 1)
    assert np.linalg.norm(end.linear_m_s) < 1e-3 and np.linalg.norm(end.angular_rad_s) < 1e-2
    np.testing.assert_array_equal(path.state(path.end_ns).pose, path.poses_base_ee[-1])


@FEW
@given(seeds, st.integers(1, 16), st.floats(0.0, 0.05), st.floats(0.0, 0.15), st.floats(0.0, 1.0))
def test_a_stop_goes_the_way_of_the_path_that_it_ends(seed, n, step_m, step_rad, share):
    rng = np.random.default_rng(seed)
    start = moving_state(rng)
    path, _ = timed(start, waypoints(rng, start, n, step_m, step_rad))
    limits = StoppingLimits(*(LIMITS[f'{what}_acceleration'] for what in ('linear', 'angular')))
    since_ns = START_NS + round(share * (path.end_ns - START_NS))
    stop = Stop(path, since_ns, limits, path.end_ns)
    assert stop.duration_s <= (path.end_ns - since_ns) / NS_PER_S + 1e-9
    end_ns = since_ns + round(stop.duration_s * NS_PER_S) + 1
    way = np.stack([path.state(t).pose[:3, 3] for t in range(since_ns, path.end_ns + 1_000_000, 1_000_000)])
    checker = LimitsChecker(
        *(
            LIMITS[f'{what}_{order}']
            for what in ('linear', 'angular')
            for order in ('velocity', 'acceleration')
        )
    )
    for stamp in range(START_NS, since_ns, 10_000_000):
        checker.add(stamp, path.state(stamp).pose)
    for stamp in range(
        max(since_ns, checker._last[0] + 10_000_000 if checker._last else 0), end_ns + PERIOD_NS, 10_000_000
    ):
        state = stop.state(stamp)
        checker.add(stamp, state.pose)
        assert np.linalg.norm(way - state.pose[:3, 3], axis=1).min() < 1e-3
    checker.require_none()
    assert np.linalg.norm(stop.state(end_ns).linear_m_s) < 1e-9


@FEW
@given(seeds, st.floats(0.001, 0.05))
def test_a_stretched_path_leads_along_the_same_waypoints(seed, step_m):
    """Each is passed at a distance of its corner's rounding, which is what turning within the acceleration takes."""
    rng = np.random.default_rng(seed)
    start = moving_state(rng)
    poses = waypoints(rng, start, 8, step_m, 0.05)
    path, _ = timed(start, poses)
    np.testing.assert_array_equal(path.poses_base_ee, poses)
    for stamp, wanted in zip(path.stamps_ns[1:], poses, strict=True):
        before, after = (path.state(stamp + side * PERIOD_NS // 1000) for side in (-1, 1))
        apart_m = np.linalg.norm(path.state(stamp).pose[:3, 3] - wanted[:3, 3])
        # |dv| b / 4 with |dv| = 2 a b and b at most half a segment
        longest_s = np.diff(path.stamps_ns).max() / NS_PER_S / 2
        assert apart_m <= LIMITS['linear_acceleration'] * longest_s**2 / 2 + 1e-9
        assert np.linalg.norm(before.linear_m_s - after.linear_m_s) < 0.01  # no corner that is not rounded


@FEW
@given(seeds)
def test_the_velocity_of_a_path_is_that_of_its_positions(seed):
    rng = np.random.default_rng(seed)
    start = moving_state(rng)
    path, _ = timed(start, waypoints(rng, start, 6, 0.02, 0.08))
    for stamp in rng.integers(path.start_ns + 1000, path.end_ns - 1000, 20).tolist():
        a, b = path.state(stamp - 500), path.state(stamp + 500)
        state = path.state(stamp)
        np.testing.assert_allclose((b.pose - a.pose)[:3, 3] / 1e-6, state.linear_m_s, atol=2e-4)
        turn = Rotation.from_matrix(b.pose[:3, :3] @ a.pose[:3, :3].T).as_rotvec() / 1e-6
        np.testing.assert_allclose(turn, state.angular_rad_s, atol=5e-3)


def test_a_path_turns_at_its_beginning():
    """And not after a quarter of its first segment, when another one may have replaced it."""
    start = MotionState.at_rest(pose([0.5, 0.0, 0.2], [0.0] * 3))
    path, _ = timed(start, pose([0.505, 0.0, 0.2], [0.0] * 3)[None])
    assert path.state(START_NS + 2_000_000).linear_m_s[0] > 0.5 * LIMITS['linear_acceleration'] * 2e-3


@FEW
@given(seeds, st.integers(1, 4), st.floats(0.0, 0.05), st.floats(0.0, 0.15))
def test_no_position_of_a_path_is_beyond_its_waypoints_but_for_the_first_turn(seed, n, step_m, step_rad):
    rng = np.random.default_rng(seed)
    start = moving_state(rng)
    path, _ = timed(start, waypoints(rng, start, n, step_m, step_rad))
    turn = np.stack([path.state(stamp).pose[:3, 3] for stamp in path.turn_ns])
    known = np.concatenate([turn, path.poses_base_ee[:, :3, 3]])
    way = np.stack([path.state(t).pose[:3, 3] for t in range(START_NS, path.end_ns, 1_000_000)])
    assert (way > known.min(0) - BESIDE_M).all() and (way < known.max(0) + BESIDE_M).all()


def test_nothing_is_stretched_that_keeps_its_limits():
    start = MotionState(pose([0.5, 0.0, 0.2], [0.0] * 3), np.array([0.2, 0.0, 0.0]), np.zeros(3))
    poses = np.stack([pose([0.5 + 0.01 * (i + 1), 0.0, 0.2], [0.0] * 3) for i in range(8)])
    path, factors = timed(start, poses)
    np.testing.assert_array_equal(factors, 1.0)
    assert path.time_scale == 1.0
    assert path.stamps_ns[:7] == [START_NS + i * PERIOD_NS for i in range(7)]
    for i in range(6):  # all that is on a line is met exactly, at its own stamp
        np.testing.assert_allclose(path.state(START_NS + (i + 1) * PERIOD_NS).pose, poses[i], atol=1e-12)


@pytest.mark.parametrize(('speed', 'factor'), [(1.69, 1.0), (1.7, 1.0), (3.4, 2.0)])
def test_a_path_of_one_speed_is_slowed_down_by_what_it_is_too_fast(speed, factor):
    n, period = 10, PERIOD_NS / NS_PER_S
    moving = Moving(
        np.tile([speed * period, 0, 0, 0, 0, 0], (n, 1)),
        np.array([min(speed, 1.7), 0, 0, 0, 0, 0]),
        {'linear_velocity': 1.7},
    )
    factors = stretch(moving, np.full(n, period), False, np.ones(n), 10.0)
    np.testing.assert_allclose(factors, factor, rtol=6e-3)


def test_what_can_not_be_slow_enough_is_refused():
    moving = Moving(np.array([[1.0, 0, 0, 0, 0, 0]]), np.zeros(6), {'linear_velocity': 1.0})
    assert stretch(moving, np.array([0.05]), False, np.ones(1), 10.0) is None
    assert stretch(moving, np.array([0.05]), False, np.ones(1), 30.0) is not None


def test_acceleration_and_jerk_are_the_differences_of_the_waypoints():
    steps, h = np.zeros((6, 6)), 0.05
    steps[:, 0] = [0.01, 0.01, 0.03, 0.03, 0.03, 0.03]
    moving = Moving(steps, np.array([0.2, 0, 0, 0, 0, 0]), {'linear_acceleration': 1.0, 'linear_jerk': 1.0})
    share = ratios(moving, np.full(6, h), False)
    np.testing.assert_allclose(share['linear_acceleration'], [0, 8, 8, 0, 0, 0], atol=1e-9)  # 0.02 / h^2
    np.testing.assert_allclose(share['linear_jerk'], [0, 320, 320, 0, 0, 0], atol=1e-6)


def test_the_checker_finds_what_is_too_fast_too_sudden_and_outside():
    checker = LimitsChecker(1.0, 10.0, 1.0, 10.0, 0.05, np.array([[0.0] * 3, [1.0] * 3]))
    for i, x in enumerate([0.5, 0.501, 0.502, 0.6, 1.2]):
        checker.add(START_NS + i * 20_000_000, pose([x, 0.5, 0.5], [0.0, 0.0, 0.05 * (i > 3)]))
    found = ' '.join(checker.breaches)
    for name in ('linear_m_s ', 'linear_m_s2', 'step_m', 'outside_m', 'angular_rad_s ', 'angular_rad_s2'):
        assert name in found
    with pytest.raises(AssertionError, match='breaches'):
        checker.require_none()
    with pytest.raises(AssertionError, match='no command'):
        LimitsChecker().require_none()
