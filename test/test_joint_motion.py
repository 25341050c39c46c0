"""Motions of the joints: along what a policy is allowed to do, from one trajectory to the next, and to rest."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits_checker import JointChecker
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.robot.poses import action_from_pose
from decoupled_policy_ros.runtime.assembly import assembled_steering, default_guard
from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.guard.guard import BESIDE_M, Guard
from decoupled_policy_ros.runtime.guard.settings import RULES, GuardSettings
from decoupled_policy_ros.runtime.joint_motion import JointMotion, JointPlanner
from decoupled_policy_ros.runtime.joint_steering import InJoints, JointPlan
from decoupled_policy_ros.runtime.joint_stopping import slowed_to_rest
from decoupled_policy_ros.runtime.motion import MotionState
from decoupled_policy_ros.runtime.steering import ChunkRejected, Guarded
from decoupled_policy_ros.runtime.stopping import StraightOn

ROBOT = load_robot('fr3')
PANDA = load_robot('panda_sim')
KINEMATICS = Kinematics(ROBOT)
HOME = KINEMATICS.forward(ROBOT.home_rad)
MS = 1_000_000
EPOCH_NS = 1_000_000 * MS


class Arm:
    """An arm that is where it was told to be, a clock, and a controller that hears of motions of the joints."""

    def __init__(self, lockstep: bool = False, settings: GuardSettings | None = None):
        self.joints_rad: NDArray[np.float64] | None = ROBOT.home_rad
        self.now_ns = EPOCH_NS
        self.published: list[JointMotion] = []
        period_ns = None if lockstep else 25 * MS
        self.guarded = Guarded(Guard(ROBOT, settings), KINEMATICS, self, period_ns)
        self.steering = InJoints(
            self.guarded, ROBOT, self, self.published.append, lambda: self.now_ns, lockstep
        )

    def positions(self, _now_ns: int) -> NDArray[np.float64] | None:
        return self.joints_rad

    def why_not(self, _now_ns: int) -> str:
        return 'nobody said'

    def chunk(self, speed_m_s: float = 0.1, bend: float = 0.0, turns: float = 0.0) -> Chunk:
        """A circle in the y-z plane and around, from where a cycle of `turns` per second is now."""
        times_s = (self.now_ns - EPOCH_NS) * 1e-9 + 0.05 * np.arange(-1, 15)
        poses = np.tile(HOME, (16, 1, 1))
        if turns:
            angle = 2 * np.pi * turns * times_s
            poses[:, 1, 3] += 0.1 * np.sin(angle)
            poses[:, 2, 3] += 0.06 * (np.cos(angle) - 1)
        else:
            poses[:, 1, 3] += speed_m_s * times_s
            poses[:, 2, 3] += bend * times_s**2
        return Chunk(action_from_pose(poses, -1.0), self.now_ns, 20.0)

    def cycle(self, chunk: Chunk, late_ms: int = 30, follow: bool = True) -> JointPlan:
        """Plan a chunk some time after its observation, adopt it, and follow it until the next is due."""
        plan = self.steering.plan(chunk, self.now_ns + late_ms * MS)
        assert isinstance(plan, JointPlan) and self.steering.adopt(plan)
        if follow:
            for now_ns in range(self.now_ns + 50 * MS, self.now_ns + 401 * MS, 25 * MS):
                self.steering.follow(now_ns)
                self.now_ns = now_ns
            self.joints_rad = self.published[-1].at(self.now_ns)[0]
        return plan


@pytest.mark.parametrize('turns', [0.25, 2.0])  # as it is asked for, and slowed down
def test_the_joints_lead_the_end_effector_along_the_path(turns):
    arm = Arm(settings=GuardSettings(join_m=0.3))  # an arm that is slowed down falls behind
    for _ in range(3):
        plan = arm.cycle(arm.chunk(turns=turns))
        assert (plan.time_scale > 1.5) == (turns == 2.0)
        motion = plan.joints
        for stamp_ns in range(plan.path.start_ns, plan.path.end_ns, 7 * MS):
            joints_rad, _ = motion.at(stamp_ns)
            wanted = plan.path.state(stamp_ns).pose
            np.testing.assert_allclose(KINEMATICS.forward(joints_rad), wanted, atol=5e-4)
        assert not motion.velocities_rad_s[-1].any()  # a controller may insist on that
        assert np.all(np.diff(motion.stamps_ns) > 0)
    assert arm.published[-1] is motion


def test_velocities_are_those_of_the_positions():
    arm = Arm()
    motion = arm.cycle(arm.chunk(turns=0.25)).joints
    inside = np.arange(motion.stamps_ns[0] + 5 * MS, motion.stamps_ns[-1] - 5 * MS, 10 * MS)
    for stamp_ns in inside:
        ahead, behind = motion.at(int(stamp_ns) + MS)[0], motion.at(int(stamp_ns) - MS)[0]
        np.testing.assert_allclose(motion.at(int(stamp_ns))[1], (ahead - behind) / 2e-3, atol=0.02)


def test_on_the_way_between_points_joints_are_as_fast_as_at_their_ends():
    """Also with what moves the elbow alone: where points are near each other it would be a large acceleration."""
    turning = StraightOn(MotionState(HOME, np.array([0.0, 0.3, 0.0]), np.array([0.5, 0.0, 1.0])), 0)
    stamps_ns = [20 * MS * i for i in range(20)]
    planner = JointPlanner(ROBOT, ROBOT.limits)
    motion, _ = planner.motion([turning.state(stamp_ns) for stamp_ns in stamps_ns], stamps_ns, ROBOT.home_rad)
    average = np.diff(motion.positions_rad, axis=0) / motion.durations_s
    ends = (motion.velocities_rad_s[:-1] + motion.velocities_rad_s[1:]) / 2
    np.testing.assert_allclose(average, ends, atol=3e-4)


def test_a_trajectory_begins_now_and_on_the_one_before_it():
    arm = Arm()
    before = arm.cycle(arm.chunk(turns=0.25)).joints
    plan = arm.cycle(arm.chunk(turns=0.25), late_ms=30, follow=False)
    after, now_ns = plan.joints, arm.now_ns + 30 * MS
    assert after.stamps_ns[0] == now_ns < plan.path.start_ns  # no waypoint that is past, and no gap
    for stamp_ns in np.linspace(now_ns, plan.path.start_ns, 5).astype(int):
        for one, other in zip(before.at(int(stamp_ns)), after.at(int(stamp_ns)), strict=True):
            np.testing.assert_allclose(one, other, atol=0.03)
    np.testing.assert_allclose(before.at(now_ns)[0], after.at(now_ns)[0], atol=1e-9)


def test_an_elbow_does_not_wander_away():
    arm = Arm()
    for _ in range(80):  # 32 s, eight rounds
        arm.cycle(arm.chunk(turns=0.25))
    assert np.abs(arm.joints_rad - ROBOT.home_rad).max() < 0.25
    wanted = arm.guarded.motion.state(arm.now_ns).pose
    np.testing.assert_allclose(KINEMATICS.forward(arm.joints_rad), wanted, atol=1e-3)


def test_a_hold_comes_to_rest_where_the_steering_does_and_only_once():
    arm = Arm()
    arm.cycle(arm.chunk(0.2))
    before = arm.published[-1]
    for wait_ms in (20, 40, 400):
        pose = arm.steering.hold(arm.now_ns + wait_ms * MS)
    assert len(arm.published) == 2
    stop = arm.published[-1]
    positions, velocities = stop.at(stop.stamps_ns[0])
    np.testing.assert_allclose(positions, before.at(stop.stamps_ns[0])[0], atol=1e-3)
    np.testing.assert_allclose(velocities, before.at(stop.stamps_ns[0])[1], atol=0.03)
    assert np.abs(stop.velocities_rad_s[-1]).max() < 1e-12
    np.testing.assert_allclose(KINEMATICS.forward(stop.positions_rad[-1]), pose, atol=5e-4)
    arm.now_ns += 500 * MS
    arm.joints_rad = stop.positions_rad[-1]
    motion = arm.cycle(arm.chunk(0.2)).joints
    np.testing.assert_allclose(motion.positions_rad[0], stop.positions_rad[-1], atol=1e-6)


class Controller(Arm):
    """An arm on what a joint_trajectory_controller follows: it drops a trajectory that has ended when it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.followed: JointMotion | None = None
        self.steps_rad: list[float] = []
        self.dropped = 0
        self.steering = InJoints(self.guarded, ROBOT, self, self.hear, lambda: self.now_ns, lockstep=False)

    def hear(self, motion: JointMotion) -> None:
        if motion.stamps_ns[-1] < self.now_ns:
            self.dropped += 1
            return
        if self.followed is not None:
            begin_ns = max(self.now_ns, motion.stamps_ns[0])
            step_rad = motion.at(begin_ns)[0] - self.followed.at(begin_ns)[0]
            self.steps_rad.append(float(np.abs(step_rad).max()))
        self.followed = motion

    def positions(self, now_ns: int) -> NDArray[np.float64]:
        return ROBOT.home_rad if self.followed is None else self.followed.at(now_ns)[0]

    def go_on(self, ms: int, hold: bool = False) -> None:
        self.now_ns += ms * MS
        if hold:
            self.steering.hold(self.now_ns)
        else:
            self.steering.follow(self.now_ns)


@pytest.mark.parametrize('end', ['hold', 'reset'])
@pytest.mark.parametrize(('speed_m_s', 'late_ms'), [(0.02, 25), (0.1, 65), (0.2, 300), (0.2, 25)])
def test_a_stop_is_heard_however_short_it_is_and_however_late(speed_m_s, late_ms, end):
    """A controller goes on while the node stands still: what comes then begins where that has led."""
    arm = Controller()
    assert arm.steering.adopt(arm.steering.plan(arm.chunk(speed_m_s), arm.now_ns))
    for _ in range(12):
        arm.go_on(25)
    if end == 'hold':
        arm.go_on(late_ms, hold=True)
    else:
        arm.now_ns += late_ms * MS
        arm.steering.reset()
    assert arm.followed.stamps_ns[-1] >= arm.now_ns + 100 * MS  # time enough to hear of it
    for _ in range(30):
        arm.go_on(25, hold=True)
    assert not arm.followed.at(arm.now_ns)[1].any()
    resting = KINEMATICS.forward(arm.positions(arm.now_ns))
    poses = np.tile(resting, (16, 1, 1))
    poses[:, 1, 3] += speed_m_s * 0.05 * np.arange(-1, 15)
    assert arm.steering.adopt(
        arm.steering.plan(Chunk(action_from_pose(poses, -1.0), arm.now_ns, 20.0), arm.now_ns)
    )
    assert arm.dropped == 0 and len(arm.steps_rad) == 2
    assert max(arm.steps_rad) < 2e-3


@pytest.mark.parametrize('stall_ms', [0, 60, 150])
def test_a_path_that_should_have_begun_is_planned_anew(stall_ms):
    """The controller has gone on along what it was told before: there the next trajectory begins, without a step."""
    arm = Controller()
    assert arm.steering.adopt(arm.steering.plan(arm.chunk(0.3), arm.now_ns))
    for _ in range(12):
        arm.go_on(25)
    aside = np.tile(KINEMATICS.forward(arm.positions(arm.now_ns)), (16, 1, 1))
    aside[:, 0, 3] += 0.3 * 0.05 * np.arange(-1, 15)
    chunk = Chunk(action_from_pose(aside, -1.0), arm.now_ns, 20.0)
    plan = arm.steering.plan(chunk, arm.now_ns)
    if stall_ms:  # the worker wakes before the streamer; on a slow machine the path begins later
        arm.now_ns = max(arm.now_ns + stall_ms * MS, plan.begins_ns + MS)
    assert arm.steering.adopt(plan) == (stall_ms == 0)
    if stall_ms:
        assert arm.steering.adopt(arm.steering.plan(chunk, arm.now_ns))
    assert max(arm.steps_rad) < 2e-3


def test_a_trajectory_that_has_not_begun_yet_is_stopped_too():
    """Where the clock stands while commands end, the arm would be driven by what it was sent for later."""
    arm = Controller()
    plan = arm.steering.plan(arm.chunk(0.3), arm.now_ns)
    assert arm.steering.adopt(plan) and arm.now_ns < plan.begins_ns
    sent = arm.followed
    arm.steering.follow(arm.now_ns)
    arm.steering.reset()
    assert arm.followed is not sent and arm.dropped == 0
    assert np.abs(sent.positions_rad[-1] - sent.positions_rad[0]).max() > 0.1
    assert (arm.followed.positions_rad == sent.positions_rad[0]).all()


def test_a_plan_from_before_a_stop_is_not_adopted_after_it():
    """The worker planned from the path, the streamer held meanwhile: it would not go on from there."""
    arm = Controller()
    assert arm.steering.adopt(arm.steering.plan(arm.chunk(0.2), arm.now_ns))
    for _ in range(8):
        arm.go_on(25)
    planned_from, plan_of_poses = arm.steering._commanded, arm.guarded.plan

    def held_first(chunk: Chunk, now_ns: int):
        arm.go_on(25, hold=True)
        return plan_of_poses(chunk, now_ns)

    arm.guarded.plan = held_first
    plan = arm.steering.plan(arm.chunk(0.2), arm.now_ns)
    assert arm.steering._commanded is not planned_from
    assert not arm.steering.adopt(plan)
    arm.guarded.plan = plan_of_poses
    assert arm.steering.adopt(arm.steering.plan(arm.chunk(0.2), arm.now_ns))


def test_a_stop_goes_on_where_a_chunk_is_refused_before_it_begins():
    arm = Arm(settings=GuardSettings(ignored_rules=frozenset()))
    arm.cycle(arm.chunk(0.2))
    for _ in range(2):
        arm.now_ns += 10 * MS
        arm.steering.hold(arm.now_ns)
    arm.joints_rad = arm.published[-1].at(arm.now_ns)[0]
    arm.cycle(arm.chunk(0.2), late_ms=1, follow=False)
    for _ in range(20):
        arm.now_ns += 10 * MS
        pose = arm.steering.hold(arm.now_ns)
    checker = JointChecker(ROBOT)
    for motion in arm.published:
        checker.add(tuple(ROBOT.joint_names), motion)
    assert len(arm.published) == 4
    assert not [breach for breach in checker.breaches if 'join_' in breach], checker.breaches
    for stop in arm.published[1::2]:
        change = np.diff(stop.velocities_rad_s, axis=0) / (np.diff(stop.stamps_ns) * 1e-9)[:, None]
        assert (np.abs(change) <= ROBOT.limits.acceleration_rad_s2).all()
    np.testing.assert_allclose(KINEMATICS.forward(arm.published[-1].positions_rad[-1]), pose, atol=5e-4)


def test_the_end_of_all_commands_brakes_within_the_accelerations():
    arm = Arm()
    arm.cycle(arm.chunk(0.2))
    before = arm.published[-1]
    arm.steering.reset()
    stop = arm.published[-1]
    assert stop is not before and stop.stamps_ns[0] == arm.now_ns
    for one, other in zip(stop.at(arm.now_ns), before.at(arm.now_ns), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)
    assert not stop.velocities_rad_s[-1].any()
    arm.steering.reset()  # nothing is followed any more: nothing to be said
    assert len(arm.published) == 2


def test_time_that_was_set_back_brakes_from_the_last_command():
    arm = Arm()
    arm.cycle(arm.chunk(0.2))
    before, last_ns = arm.published[-1], arm.now_ns
    arm.now_ns = EPOCH_NS - 3600 * 1000 * MS
    arm.steering.reset()
    assert arm.published[-1].stamps_ns[0] == arm.now_ns
    np.testing.assert_allclose(arm.published[-1].positions_rad[0], before.at(last_ns)[0], atol=1e-9)


def test_in_lockstep_a_trajectory_ends_where_the_next_chunk_is_due():
    arm = Arm(lockstep=True)
    chunk = arm.chunk()
    plan = arm.cycle(chunk, late_ms=0)
    assert arm.published[-1].stamps_ns[-1] == chunk.replan_stamp_ns - 50 * MS < plan.joints.stamps_ns[-1]
    for _ in range(3):
        arm.now_ns += 50 * MS
        arm.steering.hold(arm.now_ns)
    assert arm.published[-1].stamps_ns[0] == arm.now_ns  # each step is waited for


@pytest.mark.parametrize('late_ms', [50, 500])  # while the arm is under way, and once it waits at the end
def test_in_lockstep_the_end_of_all_commands_comes_after_what_was_published(late_ms):
    arm = Arm(lockstep=True)
    arm.cycle(arm.chunk(0.2), late_ms=0, follow=False)
    under_way = arm.published[-1]
    arm.now_ns += late_ms * MS
    arm.steering.reset()
    stop = arm.published[-1]
    assert stop.stamps_ns[0] == under_way.stamps_ns[-1] and stop.stamps_ns[-1] > arm.now_ns
    np.testing.assert_allclose(stop.positions_rad[0], under_way.positions_rad[-1], atol=1e-9)
    np.testing.assert_allclose(stop.velocities_rad_s[0], under_way.velocities_rad_s[-1], atol=1e-9)
    assert not stop.velocities_rad_s[-1].any()


def test_a_hold_looks_at_the_joints_only_where_it_is_the_first_command():
    """Holds and plans are of two threads: a look of one would be written down as one of the other."""
    arm = Arm()
    arm.cycle(arm.chunk())
    looked, positions = [], arm.positions
    arm.positions = lambda now_ns: looked.append(now_ns) or positions(now_ns)
    for begin in (False, True):
        arm.now_ns += 50 * MS
        assert arm.steering.hold(arm.now_ns, begin) is not None
    assert not looked


def test_unreachable_joints_are_refused_with_the_reason():
    arm = Arm(settings=GuardSettings(frozenset(RULES) - {'finite', 'rotation'}))
    # A metre a second straight out of reach, which this guard was told to let through.
    poses = np.tile(HOME, (16, 1, 1))
    poses[:, 0, 3] += 0.05 * np.arange(16)
    chunk = Chunk(action_from_pose(poses, -1.0), arm.now_ns, 20.0)
    with pytest.raises(ChunkRejected, match='what is left at point') as refused:
        arm.steering.plan(chunk, arm.now_ns)
    assert 'reject' in str(refused.value)
    assert arm.steering.values()['guard_reject_reach'] == '1'
    assert arm.steering.hold(arm.now_ns) is None and not arm.published


def test_joints_that_nobody_knows_are_refused():
    arm = Arm()
    arm.joints_rad = None
    with pytest.raises(ChunkRejected, match='nobody said'):
        arm.steering.plan(arm.chunk(), arm.now_ns)


@pytest.mark.parametrize(('joint', 'position_rad'), [(3, -3.0421), (5, 0.55)])
def test_a_joint_may_rest_at_the_end_of_its_range(joint, position_rad):
    """Braking before the end leaves it no velocity there."""
    resting = ROBOT.home_rad.copy()
    resting[joint] = position_rad
    motion = JointMotion([0, 20 * MS, 40 * MS], np.tile(resting, (3, 1)), np.zeros((3, 7)))
    assert JointPlanner(ROBOT, ROBOT.limits)._too_fast(motion) is None


def test_too_fast_for_the_joints_is_found():
    planner = JointPlanner(ROBOT, ROBOT.limits)
    there = HOME.copy()
    there[1, 3] += 0.2
    states = [MotionState.at_rest(HOME), MotionState.at_rest(there)]
    found = planner.breach(planner.motion(states, [0, 50 * MS], ROBOT.home_rad)[0])
    assert found.rule == 'joint_velocity' and found.value > found.limit and 'fr3_joint' in found.detail


def test_a_joint_held_at_the_end_of_its_range_is_not_sent_on():
    """The others do without it; so the end effector still turns as it is asked to."""
    joints_rad, upper_rad = ROBOT.home_rad.copy(), ROBOT.limits.upper_rad[6]
    joints_rad[6] = upper_rad - 0.02
    pose = KINEMATICS.forward(joints_rad)
    turning = StraightOn(MotionState(pose, np.zeros(3), 0.1 * pose[:3, 2]), 0)
    stamps_ns = [50 * MS * i for i in range(16)]
    planner = JointPlanner(ROBOT, ROBOT.limits)
    states = [turning.state(stamp_ns) for stamp_ns in stamps_ns]
    motion, unreached = planner.motion(states, stamps_ns, joints_rad)
    assert unreached is None and planner.breach(motion) is None
    held = motion.positions_rad[:, 6] > upper_rad - 1e-4
    assert held.sum() > 8 and not motion.velocities_rad_s[held, 6].any()
    for stamp_ns in range(0, stamps_ns[-1], 5 * MS):
        positions_rad, _ = motion.at(stamp_ns)
        assert positions_rad[6] <= upper_rad + 1e-9
        wanted = turning.state(stamp_ns).pose
        np.testing.assert_allclose(KINEMATICS.forward(positions_rad), wanted, atol=1e-3)


def near_an_end(seed: int) -> tuple[NDArray[np.float64], Chunk]:
    """Joints of a Panda, one of them near an end of its range, and a chunk that leads it on to there."""
    rng, lower, upper = np.random.default_rng(seed), PANDA.limits.lower_rad, PANDA.limits.upper_rad
    joint, up, gap_rad = rng.integers(7), rng.integers(2), rng.uniform(0.005, 0.1)
    joints_rad = np.clip(PANDA.home_rad + rng.uniform(-0.4, 0.4, 7), lower + 0.05, upper - 0.05)
    joints_rad[joint] = upper[joint] - gap_rad if up else lower[joint] + gap_rad
    rates = rng.uniform(-0.1, 0.1, 7)
    rates[joint] = (1 if up else -1) * rng.uniform(0.02, 0.4)
    pose, after = (Kinematics(PANDA).forward(joints_rad + 1e-4 * rates * i) for i in range(2))
    turn = Rotation.from_matrix(after[:3, :3] @ pose[:3, :3].T).as_rotvec()
    way = StraightOn(MotionState(pose, (after - pose)[:3, 3] / 1e-4, turn / 1e-4), EPOCH_NS)
    poses = [way.state(EPOCH_NS + 50 * MS * i).pose for i in range(-1, 15)]
    return joints_rad, Chunk(action_from_pose(np.stack(poses), -1.0), EPOCH_NS, 20.0)


def test_no_joint_swings_out_of_its_range_or_above_its_speed_between_points():
    arm, checker, sent = Arm(), JointChecker(PANDA), []
    steering = assembled_steering(
        PANDA, default_guard(PANDA, True), arm, 25 * MS, sent.append, lambda: arm.now_ns
    )
    for seed in range(60):
        arm.joints_rad, chunk = near_an_end(seed)
        steering.reset(silently=True)
        with contextlib.suppress(ChunkRejected):
            assert steering.adopt(steering.plan(chunk, arm.now_ns))
    assert len(sent) > 5
    for motion in sent:
        checker.restart()
        checker.add(tuple(PANDA.joint_names), motion)
        assert (motion.most_sudden_rad_s2 < 1.41 * PANDA.limits.acceleration_rad_s2).all()
    assert not [breach for breach in checker.breaches if 'acceleration' not in breach]


@pytest.mark.parametrize(
    ('positions_rad', 'velocities_rad_s', 'rule'),
    [
        ([-1e-3, -1e-3], [0.2, -0.2], 'joint_position'),  # out of the range and back
        ([-0.51, -0.49], [0.0, 0.0], None),
        ([-0.6, -0.4], [0.0, 0.0], 'joint_velocity'),  # 2 rad/s over all of the way, 3 in the middle
        ([-0.5, -0.5], [0.2, -0.2], None),
        ([-0.5, -0.5], [0.4, 0.4], 'joint_acceleration'),  # there, back and there again
    ],
)
def test_what_a_controller_makes_of_points_is_looked_at(positions_rad, velocities_rad_s, rule):
    limits = replace(ROBOT.limits, braking=None)
    positions, velocities = np.tile(ROBOT.home_rad, (2, 1)), np.zeros((2, 7))
    positions[:, 0] = ROBOT.limits.upper_rad[0] + positions_rad
    velocities[:, 0] = velocities_rad_s
    found = JointPlanner(ROBOT, limits).breach(JointMotion([0, 100 * MS], positions, velocities))
    assert (found and found.rule) == rule


@given(st.lists(st.floats(-1.0, 1.0), min_size=4, max_size=4), st.integers(5, 200))
def test_extremes_between_points_are_those_of_the_cubic(numbers, duration_ms):
    positions, velocities = np.array(numbers).reshape(2, 2, 1)
    motion = JointMotion([0, duration_ms * MS], positions, velocities)
    passed, rates = zip(*(motion.at(duration_ms * MS * i // 200) for i in range(201)), strict=True)
    lowest, highest = motion.ranges_rad
    np.testing.assert_allclose([lowest[0, 0], highest[0, 0]], [np.min(passed), np.max(passed)], atol=1e-4)
    np.testing.assert_allclose(motion.fastest_rad_s[0, 0], np.abs(rates).max(), rtol=1e-3)
    change = np.abs(np.diff(rates, axis=0)).max() / (duration_ms / 200 * 1e-3)
    np.testing.assert_allclose(motion.most_sudden_rad_s2[0, 0], change, rtol=0.02, atol=0.1)


@given(st.lists(st.floats(-2.0, 2.0), min_size=8, max_size=8), st.integers(0, 199))
def test_slowing_down_leads_along_the_motion_and_keeps_its_accelerations(numbers, since_ms):
    limit = np.array([3.0, 10.0])
    rates = np.array([*numbers, 0.0, 0.0]).reshape(5, 2)
    positions = np.cumsum(rates, axis=0) * 0.05
    motion = JointMotion([50 * MS * i for i in range(5)], positions, rates)
    stop = slowed_to_rest(motion, since_ms * MS, 5, limit)
    assert stop.stamps_ns[0] == 5 and not stop.velocities_rad_s[-1].any()
    assert stop.stamps_ns[-1] <= 5 + max(1, 200 - since_ms) * MS
    for one, other in zip(stop.at(5), motion.at(since_ms * MS), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)
    way = np.stack([motion.at(stamp_ms * MS)[0] for stamp_ms in range(since_ms, 201)])
    for position in stop.positions_rad:
        assert np.abs(way - position).max(axis=1).min() < 3e-3
    own = np.max([motion.most_sudden_rad_s2.max(0), limit], axis=0)
    change = np.abs(np.diff(stop.velocities_rad_s, axis=0)) / stop.durations_s
    assert (change <= 1.01 * own).all()


@pytest.mark.parametrize('how', ['failed', 'set back', 'lockstep'])
def test_a_floor_is_one_for_the_end_of_all_commands_too(how):
    """A motion that was about to brake before the floor led into it, had it gone straight on."""
    floor_m = float(HOME[2, 3]) - 0.05
    workspace_m = ROBOT.limits.workspace_m.copy()
    workspace_m[0, 2] = floor_m
    lowest_m = np.inf
    for ticks in range(4, 24, 2):
        arm = Arm(how == 'lockstep', GuardSettings(frozenset(), workspace_m=workspace_m))
        poses = np.tile(HOME, (16, 1, 1))
        poses[:, 2, 3] -= 0.5 * 0.05 * np.maximum(0, np.arange(-1, 15))
        arm.cycle(Chunk(action_from_pose(poses, -1.0), arm.now_ns, 20.0), follow=False)
        for _ in range(ticks):
            arm.now_ns += 25 * MS
            arm.steering.follow(arm.now_ns)
        if how == 'set back':
            arm.now_ns -= 3600 * 1000 * MS
        arm.steering.reset()
        for stamp_ns in range(*(arm.published[-1].stamps_ns[i] for i in (0, -1)), 2 * MS):
            lowest_m = min(lowest_m, KINEMATICS.forward(arm.published[-1].at(stamp_ns)[0])[2, 3])
    assert floor_m - BESIDE_M - 1e-4 < lowest_m < floor_m + 5e-3


def test_between_points_cubic_with_velocities_and_straight_without():
    stamps_ns, positions = [0, 100 * MS], np.array([[0.0], [1.0]])
    assert JointMotion(stamps_ns, positions).at(25 * MS)[0] == pytest.approx(0.25)
    cubic = JointMotion(stamps_ns, positions, np.zeros((2, 1)))
    assert cubic.at(25 * MS)[0] == pytest.approx(3 * 0.25**2 - 2 * 0.25**3)
    assert cubic.at(-MS)[0] == 0.0 and cubic.at(200 * MS)[0] == 1.0
    part = cubic.until(50 * MS)
    assert part.stamps_ns[-1] == 50 * MS and part.at(25 * MS)[0] == pytest.approx(cubic.at(25 * MS)[0])
