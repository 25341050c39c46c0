"""Chunk after chunk through the guard: never a jump, whatever they disagree about, and a stop when one is refused."""

import gc
from contextlib import suppress
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits_checker import LimitsChecker
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.inverse import InverseKinematics
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime import steering as steering_module
from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.direct import Direct
from decoupled_policy_ros.runtime.follower import Follower
from decoupled_policy_ros.runtime.guard.guard import Guard
from decoupled_policy_ros.runtime.guard.settings import IGNORED, GuardSettings
from decoupled_policy_ros.runtime.steering import ChunkRejected, Guarded
from decoupled_policy_ros.runtime.stopping import Stop

ROBOT = load_robot('panda_sim')
KINEMATICS = Kinematics(ROBOT)
HOME = KINEMATICS.forward(ROBOT.home_rad)
SECOND, TICK_NS, PERIOD_NS = 1_000_000_000, 20_000_000, 50_000_000
BEGIN_NS = 100 * SECOND


class Arm:
    """Joints that follow what is commanded."""

    def __init__(self) -> None:
        self.joints_rad = ROBOT.home_rad.copy()
        self.known = True
        self._kinematics = InverseKinematics(ROBOT)

    def positions(self, now_ns: int):
        return self.joints_rad if self.known else None

    def why_not(self, now_ns: int) -> str:
        return 'the arm is silent'

    def move(self, pose) -> None:
        self.joints_rad = self._kinematics.solve(pose, self.joints_rad).joints_rad


def chunk(rng, at: np.ndarray, stamp_ns: int, jump_m=0.0, step_m=0.01, step_rad=0.02) -> Chunk:
    """A chunk that begins near a pose, with a jump, and wanders."""
    way = np.tile(at, (16, 1, 1))
    way[:, :3, 3] += rng.normal(size=3) * jump_m + np.cumsum(rng.normal(size=(16, 3)) * step_m, axis=0)
    for i in range(1, 16):
        way[i, :3, :3] = way[i - 1, :3, :3] @ Rotation.from_rotvec(rng.normal(size=3) * step_rad).as_matrix()
    return Chunk(poses.action_from_pose(way, -1.0), stamp_ns, 20.0)


def drive(steering, arm: Arm, rng, seconds: float, lockstep: bool, **noise) -> LimitsChecker:
    """Chunks every 0.4 s, commands every tick, as the loop does it; every command is looked at."""
    checker = LimitsChecker.of(ROBOT.limits)
    tick_ns = PERIOD_NS if lockstep else TICK_NS
    at, now_ns, due_ns = HOME, BEGIN_NS, BEGIN_NS
    following = False
    while now_ns < BEGIN_NS + seconds * SECOND:
        if now_ns >= due_ns:
            try:
                plan = steering.plan(chunk(rng, at, now_ns, **noise), now_ns)
                following = steering.adopt(plan)
                assert following
            except ChunkRejected:
                following = False
            due_ns = now_ns + 8 * PERIOD_NS
        pose = steering.follow(now_ns)[0] if following else steering.hold(now_ns)
        if pose is not None:
            checker.add(now_ns, pose)
            arm.move(pose)
            at = pose
        now_ns += tick_ns
    return checker


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 0.02), st.floats(0.0, 0.015), st.booleans())
def test_chunks_that_disagree_never_make_a_jump(seed, jump_m, step_m, lockstep):
    arm = Arm()
    steering = guarded(arm, lockstep)
    checker = drive(
        steering, arm, np.random.default_rng(seed), 1.6, lockstep, jump_m=jump_m, step_m=step_m, step_rad=0.03
    )
    checker.require_none()
    assert int(steering.values()['guard_checked']) >= 4


def test_without_a_guard_the_same_chunks_do():
    """The checker and the test above can fail."""
    checker = drive(Direct(), Arm(), np.random.default_rng(0), 1.6, False, jump_m=0.02)
    with pytest.raises(AssertionError, match='linear_m_s'):
        checker.require_none()


def guarded(arm: Arm, lockstep=False, **values) -> Guarded:
    period_ns = None if lockstep else TICK_NS
    return Guarded(Guard(ROBOT, GuardSettings(**values)), KINEMATICS, arm, period_ns)


def straight(stamp_ns: int, at=HOME, speed_m_s=0.1, first_m=0.0) -> Chunk:
    """A chunk along x: where the arm is at the observation's stamp, with a step before the second waypoint."""
    way = np.tile(at, (16, 1, 1))
    way[:, 0, 3] += np.arange(-1, 15) * speed_m_s * 0.05 + first_m
    return Chunk(poses.action_from_pose(way, -1.0), stamp_ns, 20.0)


def run(steering: Guarded, from_ns: int, ticks: int, hold: bool = False) -> list[np.ndarray]:
    """Poses of ticks."""
    step = steering.hold if hold else (lambda now_ns: steering.follow(now_ns)[0])
    return [step(from_ns + i * TICK_NS) for i in range(ticks)]


def test_a_hold_comes_to_rest_ahead_of_where_it_begins_and_stays():
    arm = Arm()
    steering = guarded(arm)
    steering.adopt(steering.plan(straight(BEGIN_NS, speed_m_s=0.4), BEGIN_NS))
    before = run(steering, BEGIN_NS, 15)
    held = run(steering, BEGIN_NS + 15 * TICK_NS, 40, hold=True)
    checker = LimitsChecker.of(ROBOT.limits)
    for i, pose in enumerate(before + held):
        checker.add(BEGIN_NS + i * TICK_NS, pose)
    checker.require_none()
    assert held[0][0, 3] > before[-1][0, 3]  # it was moving, and is not stopped dead
    assert np.ptp([pose[0, 3] for pose in held[-20:]]) == 0.0
    assert np.abs(held[-1][1:3, 3] - HOME[1:3, 3]).max() < 1e-9


def test_a_floor_is_a_floor_for_a_stop_as_well():
    """Down to the floor and a little farther, as fast as it goes, and ended at any moment of it."""
    floor_m = float(ROBOT.limits.workspace_m[0, 2])
    begin = HOME.copy()
    begin[2, 3] = floor_m + 0.15
    arm = Arm()
    arm.move(begin)
    way = np.tile(begin, (16, 1, 1))
    way[:, 2, 3] -= 0.03 * np.arange(16)
    lowest_m, moving = np.inf, 0
    for ended_ns in range(0, SECOND, TICK_NS):
        steering = guarded(arm)
        assert steering.adopt(
            steering.plan(Chunk(poses.action_from_pose(way, -1.0), BEGIN_NS, 20.0), BEGIN_NS)
        )
        checker = LimitsChecker.of(ROBOT.limits)
        for now_ns in range(BEGIN_NS, BEGIN_NS + ended_ns, TICK_NS):
            checker.add(now_ns, steering.follow(now_ns)[0])
        before = HOME
        for now_ns in range(BEGIN_NS + ended_ns, BEGIN_NS + ended_ns + SECOND, TICK_NS):
            pose = steering.hold(now_ns)
            checker.add(now_ns, pose)
            moving += not np.array_equal(pose, before)
            before = pose
            lowest_m = min(lowest_m, pose[2, 3])
        checker.require_none()
    assert floor_m - 1e-9 <= lowest_m < floor_m + 1e-3 and moving > 80


def test_after_a_hold_the_next_chunk_is_followed_from_there():
    arm = Arm()
    steering = guarded(arm)
    steering.adopt(steering.plan(straight(BEGIN_NS, speed_m_s=0.3), BEGIN_NS))
    run(steering, BEGIN_NS, 10)
    rest = run(steering, BEGIN_NS + 10 * TICK_NS, 30, hold=True)[-1]
    again_ns = BEGIN_NS + 40 * TICK_NS
    arm.move(rest)
    steering.adopt(steering.plan(straight(again_ns, rest), again_ns))
    first, *others = run(steering, again_ns, 20)
    np.testing.assert_allclose(first, rest, atol=1e-9)
    assert others[-1][0, 3] > rest[0, 3] + 0.01


@pytest.mark.parametrize(('gap_ns', 'breaches'), [(TICK_NS, 1), (4 * TICK_NS, 1), (6 * TICK_NS, 0)])
def test_the_checker_lets_an_arm_rest_where_it_heard_nothing_for_long_and_nowhere_else(gap_ns, breaches):
    checker, pose = LimitsChecker.of(ROBOT.limits), HOME.copy()
    for i in range(4):
        pose = pose.copy()
        pose[0, 3] += 0.03  # 1.5 m/s
        checker.add(BEGIN_NS + i * TICK_NS, pose)
    for i in range(3):
        checker.add(BEGIN_NS + 3 * TICK_NS + gap_ns + i * TICK_NS, pose)
    assert len(checker.breaches) == breaches


@pytest.mark.parametrize('holding', [False, True])
def test_where_commands_were_missing_the_arm_is_held_where_it_was_told_to_be_last(holding):
    """A machine that stood still, a clock that was set forward: it is not on the way any more."""
    arm = Arm()
    steering = guarded(arm)
    steering.adopt(steering.plan(straight(BEGIN_NS, speed_m_s=0.4), BEGIN_NS))
    last = run(steering, BEGIN_NS, 15)[-1]
    last_ns = BEGIN_NS + 14 * TICK_NS
    if holding:  # and still braking
        last, last_ns = steering.hold(last_ns + TICK_NS), last_ns + TICK_NS
    assert steering.missed_s(last_ns + 100_000_000) == 0.0
    again_ns = last_ns + 300_000_000
    assert steering.missed_s(again_ns) == pytest.approx(0.3)
    for pose in run(steering, again_ns, 5, hold=True):
        np.testing.assert_allclose(pose, last, atol=1e-12)
    assert steering.missed_s(again_ns + 5 * TICK_NS) == 0.0
    now_ns = again_ns + 5 * TICK_NS
    arm.move(last)
    assert steering.adopt(steering.plan(straight(now_ns, last), now_ns))
    checker = LimitsChecker.of(ROBOT.limits)
    for i, pose in enumerate([last, last, *run(steering, now_ns, 20)]):
        checker.add(now_ns + (i - 2) * TICK_NS, pose)
    checker.require_none()
    assert pose[0, 3] > last[0, 3] + 0.01


def test_the_first_command_is_where_the_arm_is_even_where_it_comes_late():
    steering = guarded(Arm())
    plan = steering.plan(straight(BEGIN_NS, speed_m_s=0.4), BEGIN_NS)
    steering.adopt(plan)
    assert steering.missed_s(plan.begins_ns + 2 * TICK_NS) == 0.0
    late_ns = plan.begins_ns + 3 * TICK_NS
    assert steering.missed_s(late_ns) == pytest.approx(0.06)
    for pose in run(steering, late_ns, 3, hold=True):
        np.testing.assert_allclose(pose, HOME, atol=1e-9)


def test_in_lockstep_nothing_is_missed():
    steering = guarded(Arm(), lockstep=True)
    steering.adopt(steering.plan(straight(BEGIN_NS), BEGIN_NS))
    steering.follow(BEGIN_NS)
    assert steering.missed_s(BEGIN_NS + SECOND) == 0.0


@pytest.mark.parametrize('begun', [False, True])
def test_holds_and_chunks_in_turn_do_not_pile_up(begun):
    """A chunk that is adopted while the arm brakes, and refused again before it begins or after."""
    arm = Arm()
    steering = guarded(arm)
    now_ns, checker = BEGIN_NS, LimitsChecker.of(ROBOT.limits)
    steering.adopt(steering.plan(straight(now_ns, speed_m_s=0.4), now_ns))
    gc.collect()
    there = sum(type(thing) is Stop for thing in gc.get_objects())
    for pose in run(steering, now_ns, 10):
        checker.add(now_ns, pose)
        now_ns += TICK_NS
    for _ in range(12):
        for pose in run(steering, now_ns, 2, hold=True):  # not at rest yet
            checker.add(now_ns, pose)
            now_ns += TICK_NS
        assert steering.adopt(steering.plan(straight(now_ns, pose, 0.2), now_ns))
        for pose in run(steering, now_ns, 5 * begun):
            checker.add(now_ns, pose)
            now_ns += TICK_NS
        arm.move(pose)
    checker.require_none()
    gc.collect()
    assert sum(type(thing) is Stop for thing in gc.get_objects()) <= there + 2


@pytest.mark.parametrize(('change', 'reason'), [
    ({'known': False}, 'joint_state: the arm is silent'),
    ({'joints_rad': ROBOT.home_rad + 1.2}, 'continuity of joint'),
])  # fmt: skip
def test_what_is_refused_is_said(change, reason):
    arm = Arm()
    steering = guarded(arm)
    steering.adopt(steering.plan(straight(BEGIN_NS), BEGIN_NS))
    run(steering, BEGIN_NS, 3)
    for name, value in change.items():
        setattr(arm, name, value)
    with pytest.raises(ChunkRejected, match=reason):
        steering.plan(straight(BEGIN_NS + 3 * TICK_NS), BEGIN_NS + 3 * TICK_NS)
    assert reason.partition(':')[0].split()[0] in steering.values()['guard_last_reject']


def test_a_first_chunk_far_from_the_arm_is_refused():
    steering = guarded(Arm())
    with pytest.raises(ChunkRejected, match='join at waypoint'):
        steering.plan(straight(BEGIN_NS, first_m=0.3), BEGIN_NS)
    assert steering.hold(BEGIN_NS) is None


def test_a_chunk_that_is_over_is_refused():
    steering = guarded(Arm())
    with pytest.raises(ChunkRejected, match='passed'):
        steering.plan(straight(BEGIN_NS), BEGIN_NS + SECOND)


def test_a_plan_that_comes_too_late_is_made_anew():
    steering = guarded(Arm())
    steering.adopt(steering.plan(straight(BEGIN_NS), BEGIN_NS))
    late = steering.plan(straight(BEGIN_NS), BEGIN_NS)
    run(steering, BEGIN_NS, 40)
    assert steering.adopt(late) is False
    assert steering.adopt(steering.plan(straight(BEGIN_NS + 39 * TICK_NS), BEGIN_NS + 39 * TICK_NS)) is True


def test_a_plan_from_a_motion_that_has_ended_meanwhile_is_made_anew():
    """The loop holds while the worker plans: what was planned begins elsewhere."""
    steering = guarded(Arm())
    steering.adopt(steering.plan(straight(BEGIN_NS, speed_m_s=0.4), BEGIN_NS))
    run(steering, BEGIN_NS, 10)
    now_ns = BEGIN_NS + 10 * TICK_NS
    planned = steering.plan(straight(now_ns), now_ns)
    steering.hold(now_ns)
    assert steering.adopt(planned) is False
    steering.reset()
    assert steering.adopt(planned) is False


def test_until_a_chunk_begins_what_it_replaces_goes_on_though_a_third_is_there_already():
    """Chunks asked for ahead begin later than now, and the next one may come before the last has begun."""
    arm = Arm()
    steering = guarded(arm)
    checker = LimitsChecker.of(ROBOT.limits)
    for number in range(12):
        now_ns = BEGIN_NS + number * TICK_NS
        if number in (0, 2, 4):
            asked = straight(now_ns)
            asked.begins_ns = now_ns + number * 40_000_000
            assert steering.adopt(steering.plan(asked, now_ns))
        checker.add(now_ns, steering.follow(now_ns)[0])
    checker.require_none()


def test_in_lockstep_a_chunk_within_its_limits_is_followed_waypoint_by_waypoint():
    steering = guarded(Arm(), lockstep=True)
    wanted = straight(BEGIN_NS, speed_m_s=0.02)
    plan = steering.plan(wanted, BEGIN_NS)
    assert plan.time_scale == 1.0
    steering.adopt(plan)
    for i in range(1, 9):
        stamp_ns = wanted.stamp_ns(i)
        assert plan.chunk.stamps_ns[i - 1] == stamp_ns
        np.testing.assert_allclose(steering.follow(stamp_ns)[0], wanted.poses_base_ee[i], atol=1e-5)


def test_what_is_published_are_the_waypoints_and_stamps_that_are_followed():
    steering = guarded(Arm(), limit_scale=0.1)
    wanted = straight(BEGIN_NS, speed_m_s=0.3)
    plan = steering.plan(wanted, BEGIN_NS)
    assert plan.time_scale > 1.2
    assert plan.chunk.stamps_ns == plan.path.stamps_ns[1:]
    assert plan.chunk.replan_stamp_ns == wanted.replan_stamp_ns
    pose, _ = plan.chunk.sample(plan.chunk.stamps_ns[3])
    np.testing.assert_array_equal(pose, plan.chunk.poses_base_ee[3])


@pytest.mark.parametrize(('turn_rad', 'side_m'), [(0.0, 0.03), (0.3, 0.0), (0.6, 0.0)])
@pytest.mark.parametrize('drop_m', [0.21, 0.22, 0.235, 0.25])
@pytest.mark.parametrize('check_s', [0.005, 0.038, 0.059])
def test_who_turns_above_the_floor_stays_above_it(turn_rad, side_m, drop_m, check_s, monkeypatch):
    """On the way down at 0.5 m/s the next chunk also turns about, which takes longer than to brake."""
    ticks = count(0.0, check_s)  # later by as much as a check takes, a path begins to turn elsewhere
    monkeypatch.setattr(steering_module, 'time', SimpleNamespace(perf_counter=lambda: next(ticks)))
    arm, checker = Arm(), LimitsChecker.of(ROBOT.limits)
    floor_m = ROBOT.limits.workspace_m[0, 2]
    high, low = HOME.copy(), HOME.copy()
    high[2, 3], low[2, 3] = floor_m + drop_m, floor_m
    arm.move(high)
    steering = guarded(arm)
    down = np.tile(high, (16, 1, 1))
    down[1:, 2, 3] = np.maximum(high[2, 3] - 0.025 * np.arange(15), floor_m)
    aside = np.tile(low, (16, 1, 1))
    aside[:, 1, 3] += side_m
    aside[:, :3, :3] = low[:3, :3] @ Rotation.from_rotvec([0.0, 0.0, turn_rad]).as_matrix()
    for now_ns in range(BEGIN_NS, BEGIN_NS + SECOND, 10_000_000):
        for way, at_ns in ((down, BEGIN_NS), (aside, BEGIN_NS + 400_000_000)):
            if now_ns == at_ns:
                with suppress(ChunkRejected):
                    steering.adopt(
                        steering.plan(Chunk(poses.action_from_pose(way, -1.0), now_ns, 20.0), now_ns)
                    )
        pose, _ = steering.follow(now_ns)
        checker.add(now_ns, pose)
        arm.move(pose)
    checker.require_none()
    assert pose[2, 3] == pytest.approx(floor_m, abs=1e-4)


@pytest.mark.parametrize('n_execute', [1, 2, 4, 8])
def test_slow_limits_and_chunks_that_are_soon_replaced_still_go_where_they_say(n_execute, monkeypatch):
    """A chunk that turns is slowed down a lot at first; replaced before it has turned it never would have."""
    # Each check takes 10 ms: a chunk begins as much later as the longest one took, which on a busy machine is long.
    ticks = count(0.0, 0.01)
    monkeypatch.setattr(steering_module, 'time', SimpleNamespace(perf_counter=lambda: next(ticks)))
    arm, checker = Arm(), LimitsChecker.of(ROBOT.limits)
    steering = guarded(arm, overrides={'ee_linear_velocity_m_s': 0.1})
    checker.linear_m_s, at, due_ns, seen = 0.1, HOME, BEGIN_NS, []
    for now_ns in range(BEGIN_NS, BEGIN_NS + 2 * SECOND, 10_000_000):
        if now_ns >= due_ns:
            back = now_ns - BEGIN_NS >= 400_000_000
            wanted = straight(now_ns, at, speed_m_s=-0.2 if back else 0.1)
            with suppress(ChunkRejected):
                steering.adopt(steering.plan(wanted, now_ns))
            due_ns = now_ns + n_execute * PERIOD_NS
        at, _ = steering.follow(now_ns)
        checker.add(now_ns, at)
        arm.move(at)
        seen.append(at[0, 3] - HOME[0, 3])
    checker.require_none()
    assert max(seen) < 0.06  # it had 0.4 s, and one chunk more to turn
    assert seen[-1] < -0.03


# --- a stream of targets ---------------------------------------------------------------------------


def follower(arm: Arm, **values) -> Follower:
    return Follower(Guard(ROBOT, GuardSettings(**values)), KINEMATICS, arm, 0.05, 0.2, 0.02)


def stream(
    follow: Follower, arm: Arm, targets, checker: LimitsChecker, from_ns=BEGIN_NS, tick_ns=TICK_NS
) -> int:
    """A target at each tick, None for none; returns the time after the last."""
    now_ns = from_ns
    for target in targets:
        if target is not None:
            follow.target(target, now_ns)
        pose = follow.command(now_ns)
        if pose is not None:
            checker.add(now_ns, pose)
            arm.move(pose)
        now_ns += tick_ns
    return now_ns


def ahead(*offsets_m: float) -> list[np.ndarray]:
    targets = []
    for offset_m in offsets_m:
        pose = HOME.copy()
        pose[0, 3] += offset_m
        targets.append(pose)
    return targets


def test_a_stream_is_followed_with_a_small_lag():
    arm, checker = Arm(), LimitsChecker.of(ROBOT.limits)
    follow = follower(arm)
    stream(follow, arm, ahead(*np.arange(60) * 0.003), checker)
    checker.require_none()
    lag_m = HOME[0, 3] + 59 * 0.003 - follow.command(BEGIN_NS + 60 * TICK_NS)[0, 3]
    assert 0.0 < lag_m < 0.15 * 0.05 + 0.005  # 0.15 m/s for the horizon, and a tick or two
    assert not follow.holding


@pytest.mark.parametrize('late_s', [0.0, 0.02, 0.15])
def test_the_first_command_is_where_the_arm_is_however_late_it_is(late_s):
    follow = follower(Arm())
    assert follow.target(ahead(0.03)[0], BEGIN_NS) is None
    now_ns = BEGIN_NS + round(late_s * SECOND)
    np.testing.assert_allclose(follow.command(now_ns), HOME, atol=1e-9)
    assert follow.command(now_ns + TICK_NS)[0, 3] > HOME[0, 3] + 1e-4


@pytest.mark.parametrize('trouble', ['stale', 'joint_state', 'disabled'])
def test_what_speaks_against_a_target_before_the_first_command_leaves_it_out(trouble):
    arm = Arm()
    follow = follower(arm)
    follow.target(ahead(0.03)[0], BEGIN_NS)
    now_ns = BEGIN_NS + (SECOND if trouble == 'stale' else TICK_NS)
    arm.known = trouble != 'joint_state'
    if trouble == 'disabled':
        follow.hold(now_ns, trouble)
    assert follow.command(now_ns) is None
    assert trouble in follow.reason and follow.command(now_ns + TICK_NS) is None


def test_a_stream_that_ends_comes_to_rest_and_is_picked_up_again():
    arm, checker = Arm(), LimitsChecker.of(ROBOT.limits)
    follow = follower(arm)
    now_ns = stream(follow, arm, ahead(*np.arange(30) * 0.004), checker)
    now_ns = stream(follow, arm, [None] * 30, checker, now_ns)
    assert follow.holding and 'stale' in follow.reason
    assert not np.ptp([follow.command(now_ns + i * TICK_NS)[0, 3] for i in range(5)])
    now_ns = stream(follow, arm, ahead(*[0.1] * 20), checker, now_ns + 5 * TICK_NS)
    checker.require_none()
    assert not follow.holding
    assert follow.statistics.values()['guard_reject_stale'] == '1'


@pytest.mark.parametrize('gap_s', [0.15, 0.5])  # shorter and longer than targets are waited for
@pytest.mark.parametrize('with_target', [False, True])
def test_where_ticks_were_missing_a_person_is_followed_from_the_last_command_on(gap_s, with_target):
    arm, checker = Arm(), LimitsChecker.of(ROBOT.limits)
    follow = follower(arm)
    now_ns = stream(follow, arm, ahead(*np.arange(25) * 0.008), checker)
    last, before = KINEMATICS.forward(arm.joints_rad), checker.breaches.copy()
    now_ns += round(gap_s * SECOND)
    if with_target:
        assert follow.target(ahead(0.2)[0], now_ns) is None
    first = follow.command(now_ns)
    assert np.linalg.norm((first - last)[:3, 3]) < 1e-3  # joints are found to a tenth of a millimetre
    assert before == []
    again = LimitsChecker.of(ROBOT.limits)
    for i in range(2):
        again.add(now_ns + (i - 2) * TICK_NS, first)
    stream(follow, arm, ahead(*[0.2] * 30), again, now_ns)
    again.require_none()
    assert KINEMATICS.forward(arm.joints_rad)[0, 3] == pytest.approx(HOME[0, 3] + 0.2, abs=1e-3)


@pytest.mark.parametrize('scale', [0.2, 0.05])
def test_a_far_target_is_reached_however_slow_the_limits(scale):
    arm, checker = Arm(), LimitsChecker.of(ROBOT.limits)
    follow = follower(arm, limit_scale=scale)
    now_ns = stream(follow, arm, ahead(*[0.1] * 200), checker)
    checker.require_none()
    assert follow.command(now_ns)[0, 3] == pytest.approx(HOME[0, 3] + 0.1, abs=1e-3)


@pytest.mark.parametrize('rate_hz', [20, 100, 400])
def test_a_far_target_is_reached_and_not_passed_at_any_rate(rate_hz):
    arm, checker = Arm(), LimitsChecker.of(ROBOT.limits)
    checker.workspace_m = np.array([HOME[:3, 3] - 1.0, HOME[:3, 3] + [0.1, 1.0, 1.0]])
    tick_ns = SECOND // rate_hz
    follow = follower(arm)
    now_ns = stream(follow, arm, ahead(*[0.1] * rate_hz), checker, BEGIN_NS, tick_ns)
    checker.require_none()
    assert follow.command(now_ns)[0, 3] == pytest.approx(HOME[0, 3] + 0.1, abs=1e-3)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([5_000_000, TICK_NS]))
def test_whatever_is_asked_for_the_limits_are_kept(seed, tick_ns):
    """Targets that jump about, point nowhere, are not finite, or do not come at all."""
    rng = np.random.default_rng(seed)
    arm, checker = Arm(), LimitsChecker.of(ROBOT.limits)
    targets = []
    for _ in range(80):
        pose = HOME.copy()
        pose[:3, 3] += rng.normal(size=3) * rng.choice([0.005, 0.05, 0.5])
        kind = rng.integers(0, 12)
        if kind == 0:
            pose[0, 3] = np.nan
        if kind == 1:
            pose[:3, :3] *= 2
        targets.append(None if kind == 2 else pose)
    follow = follower(arm)
    stream(follow, arm, targets, checker, tick_ns=tick_ns)
    checker.require_none()


def test_an_arm_that_falls_silent_is_brought_to_rest():
    arm, checker = Arm(), LimitsChecker.of(ROBOT.limits)
    follow = follower(arm)
    now_ns = stream(follow, arm, ahead(*np.arange(20) * 0.004), checker)
    arm.known = False
    stream(follow, arm, ahead(*(0.08 + np.arange(20) * 0.004)), checker, now_ns)
    checker.require_none()
    assert follow.holding and follow.reason == 'joint_state: the arm is silent (reject)'


def test_before_the_first_target_nothing_is_commanded():
    arm = Arm()
    follow = follower(arm)
    assert follow.command(BEGIN_NS) is None and not follow.started
    follow.target(ahead(0.4)[0], BEGIN_NS)  # too far to begin with
    assert follow.command(BEGIN_NS) is None and 'join' in follow.reason


def test_targets_that_come_faster_than_ticks_begin_where_the_arm_is():
    arm, checker = Arm(), LimitsChecker.of(ROBOT.limits)
    follow = follower(arm)
    for k in range(5):
        follow.target(ahead(0.1)[0], BEGIN_NS + k * TICK_NS // 10)
    assert not follow.started
    begin_ns = BEGIN_NS + TICK_NS // 2
    checker.add(begin_ns - TICK_NS, HOME)
    stream(follow, arm, ahead(*[0.1] * 40), checker, begin_ns)
    checker.require_none()
    assert follow.command(begin_ns + 40 * TICK_NS)[0, 3] == pytest.approx(HOME[0, 3] + 0.1, abs=1e-3)


def test_a_target_that_is_refused_before_the_first_tick_leaves_nothing_commanded():
    follow = follower(Arm())
    assert follow.target(ahead(0.05)[0], BEGIN_NS) is None
    assert follow.target(ahead(0.4)[0], BEGIN_NS + 1) is not None
    assert follow.command(BEGIN_NS + TICK_NS) is None and not follow.started and 'join' in follow.reason


def taken(pose: np.ndarray, y_m: float, turn_rad: float = 0.0) -> np.ndarray:
    """A pose to the side of another, and turned."""
    pose = pose.copy()
    pose[1, 3] += y_m
    pose[:3, :3] = pose[:3, :3] @ Rotation.from_rotvec([0.0, 0.0, turn_rad]).as_matrix()
    return pose


@pytest.mark.parametrize(('y_m', 'turn_rad', 'value'), [(0.2, 0.0, '0.2 m'), (0.0, 1.1, '1.1 rad')])
def test_an_arm_that_was_taken_elsewhere_is_not_pulled_back(y_m, turn_rad, value):
    arm, checker = Arm(), LimitsChecker.of(ROBOT.limits)
    follow = follower(arm)
    now_ns = stream(follow, arm, ahead(*[0.05] * 30), checker)
    told = follow.command(now_ns)
    arm.move(taken(told, y_m, turn_rad))
    follow.target(told, now_ns)
    commands = [follow.command(now_ns + i * TICK_NS) for i in range(1, 4)]
    checker.require_none()
    assert commands[-1] is None and not follow.started
    assert f'join of the way from the arm to the last command: {value}, limit' in follow.reason
    now_ns += 4 * TICK_NS
    assert follow.target(told, now_ns).rule == 'join'  # as the first one it is too far from the arm, too
    assert follow.command(now_ns) is None
    here = KINEMATICS.forward(arm.joints_rad)
    assert follow.target(taken(here, -0.02), now_ns) is None
    np.testing.assert_allclose(follow.command(now_ns), here, atol=1e-9)


def test_an_arm_that_lags_by_centimetres_is_followed_on():
    arm, checker = Arm(), LimitsChecker.of(ROBOT.limits)
    follow = follower(arm)
    now_ns = BEGIN_NS
    for target in ahead(*np.linspace(0.0, 0.1, 30)):
        assert follow.target(target, now_ns) is None
        pose = follow.command(now_ns)
        checker.add(now_ns, pose)
        arm.move(taken(pose, 0.1, 0.3))
        now_ns += TICK_NS
    checker.require_none()
    assert not follow.holding


def test_an_arm_that_comes_back_before_the_stop_is_over_is_led_on_from_there():
    arm, checker = Arm(), LimitsChecker.of(ROBOT.limits)
    follow = follower(arm)
    offsets = np.arange(40) * 0.01
    now_ns = stream(follow, arm, ahead(*offsets[:20]), checker)
    arm.move(taken(KINEMATICS.forward(arm.joints_rad), 0.2))
    follow.target(ahead(offsets[20])[0], now_ns)
    now_ns = stream(follow, arm, [None], checker, now_ns)  # it is where it is told to be again
    assert follow.holding and not follow.at_rest
    stream(follow, arm, ahead(*offsets[20:]), checker, now_ns)
    checker.require_none()
    assert not follow.holding


def test_an_arm_that_is_held_and_then_taken_elsewhere_is_left_there():
    arm, checker = Arm(), LimitsChecker.of(ROBOT.limits)
    follow = follower(arm)
    now_ns = stream(follow, arm, [*ahead(*[0.05] * 20), *[None] * 30], checker)
    assert follow.at_rest and 'stale' in follow.reason
    arm.move(taken(follow.command(now_ns), 0.2))
    assert follow.command(now_ns + TICK_NS) is None
    assert not follow.at_rest and follow.reason.startswith('join of the way from the arm')


def test_where_an_arm_may_be_anywhere_it_is_not_looked_at():
    arm, checker = Arm(), LimitsChecker.of(ROBOT.limits)
    follow = follower(arm, ignored_rules=IGNORED | {'join'})
    now_ns = stream(follow, arm, ahead(*[0.05] * 20), checker)
    arm.move(taken(follow.command(now_ns), 0.2))
    assert follow.target(ahead(0.05)[0], now_ns) is None
    assert follow.command(now_ns + TICK_NS) is not None and not follow.holding


def test_a_stop_says_nothing_about_the_gripper():
    steering = guarded(Arm())
    assert steering.hold(BEGIN_NS, begin=True) is not None
    assert steering.follow(BEGIN_NS + TICK_NS)[1] is None


def test_joints_that_are_forgotten_while_the_first_path_is_planned_are_no_failure():
    """As when somebody disables the policy in that moment: the path begins where they were."""

    class Once(Arm):
        def positions(self, now_ns: int):
            found, self.known = super().positions(now_ns), False
            return found

    arm = Once()
    guarded = Guarded(Guard(ROBOT, GuardSettings()), KINEMATICS, arm, TICK_NS)
    plan = guarded.plan(chunk(np.random.default_rng(0), HOME, BEGIN_NS), BEGIN_NS)
    np.testing.assert_allclose(plan.path.state(plan.path.start_ns).pose, HOME, atol=1e-9)
