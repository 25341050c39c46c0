"""Each rule of the guard: what is just inside passes, what is just outside is slowed, clamped, cut off or rejected."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path as FilePath

import numpy as np
import pytest
import yaml
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.data.datasets.dataset import Dataset
from decoupled_policy_ros.errors import ConfigError, RobotDescriptionError
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.inverse import InverseKinematics
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.robot.shapes import Box
from decoupled_policy_ros.runtime.assembly import JOINT_SHARE, default_guard
from decoupled_policy_ros.runtime.guard.collision import CollisionChecks
from decoupled_policy_ros.runtime.guard.guard import Guard, Request
from decoupled_policy_ros.runtime.guard.joints import MAX_PARTS, SPACING_M, JointChecks, JointPath, between
from decoupled_policy_ros.runtime.guard.settings import (
    IGNORED,
    RULES,
    GuardSettings,
    guard_settings,
    read_guard_settings,
)
from decoupled_policy_ros.runtime.guard.verdict import GuardStatistics, Outcome, Verdict
from decoupled_policy_ros.runtime.motion import MotionState

ROBOT = load_robot('panda_sim')
KINEMATICS = Kinematics(ROBOT)
HOME = KINEMATICS.forward(ROBOT.home_rad)
START_NS = 7_000_000_000
PERIOD_NS = 50_000_000
EVERYTHING_ELSE = frozenset(RULES)


def only(*rules: str, **values) -> GuardSettings:
    """Settings with these rules alone."""
    return GuardSettings(ignored_rules=EVERYTHING_ELSE - set(rules), **values)


def along(*offsets_m, rotation=None) -> np.ndarray:
    """Waypoints (n, 4, 4) at offsets (3,) from home."""
    way = np.tile(HOME, (len(offsets_m), 1, 1))
    way[:, :3, 3] += np.array(offsets_m)
    if rotation is not None:
        way[:, :3, :3] = rotation
    return way


def straight(step_m: float, n: int = 16) -> np.ndarray:
    """Waypoints from home in steps along x."""
    return along(*[(step_m * (i + 1), 0.0, 0.0) for i in range(n)])


def request(waypoints, start=None, joints=ROBOT.home_rad, needed=8) -> Request:
    stamps = [START_NS + (i + 1) * PERIOD_NS for i in range(len(waypoints))]
    return Request(
        start or MotionState.at_rest(HOME),
        START_NS,
        waypoints,
        stamps,
        np.linspace(-1, 1, len(waypoints) + 1),
        joints,
        needed,
        first=1,
    )


def check(waypoints, settings=None, robot=ROBOT, **options) -> Verdict:
    return Guard(robot, settings or GuardSettings()).check(request(waypoints, **options))


def outcomes(verdict: Verdict) -> dict[str, Outcome]:
    return {finding.rule: finding.outcome for finding in verdict.findings}


def moving(speed_m_s: float) -> MotionState:
    return MotionState(HOME, np.array([speed_m_s, 0.0, 0.0]), np.zeros(3))


def test_an_ordinary_motion_passes_unchanged():
    verdict = check(straight(0.005), start=moving(0.1))
    assert verdict.findings == () and verdict.rejection is None and verdict.time_scale == 1.0
    assert verdict.path.stamps_ns[:15] == [START_NS + i * PERIOD_NS for i in range(15)]
    np.testing.assert_array_equal(verdict.path.poses_base_ee, straight(0.005))
    for q, wanted in zip(verdict.joints_rad, straight(0.005), strict=True):
        np.testing.assert_allclose(KINEMATICS.forward(q), wanted, atol=2e-4)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_rejected_whatever_is_off(value):
    waypoints = straight(0.005)
    waypoints[3, 1, 3] = value
    verdict = check(waypoints, only())
    assert verdict.path is None
    assert (verdict.rejection.rule, verdict.rejection.waypoint) == ('finite', 4)


@pytest.mark.parametrize(
    ('matrix', 'good'),
    [
        (np.eye(3) * (1 + 1e-8), True),
        (np.eye(3) * (1 + 1e-5), False),
        (np.diag([1.0, 1.0, -1.0]), False),
        (np.zeros((3, 3)), False),
    ],
)
def test_what_is_no_rotation_is_rejected_whatever_is_off(matrix, good):
    verdict = check(along((0.001, 0, 0), rotation=matrix), only())
    assert (verdict.path is not None) == good
    assert good or verdict.rejection.rule == 'rotation'


def test_the_last_row_of_a_pose_belongs_to_it():
    waypoints = straight(0.001, 2)
    waypoints[1, 3, 0] = 0.1
    assert check(waypoints, only()).rejection.rule == 'rotation'


def floor_at(z_m: float) -> GuardSettings:
    return only('workspace', workspace_m=np.array([[-2.0, -2.0, z_m], [2.0, 2.0, 2.0]]))


@pytest.mark.parametrize('floor_m', [0.0, -0.05, 0.05])
def test_a_floor_is_a_floor_even_at_zero(floor_m):
    above, below = HOME.copy(), HOME.copy()
    above[2, 3], below[2, 3] = floor_m, floor_m - 1e-6
    assert check(above[None], floor_at(floor_m)).findings == ()
    verdict = check(below[None], floor_at(floor_m))
    assert outcomes(verdict) == {'workspace': Outcome.CLAMP}
    assert verdict.path.poses_base_ee[0, 2, 3] == floor_m
    (found,) = verdict.findings
    assert (found.limit, found.waypoint, found.detail) == (floor_m, 1, 'z')
    assert check(below[None], only()).path.poses_base_ee[0, 2, 3] == floor_m - 1e-6


def test_the_robots_own_workspace_holds_on_every_side():
    lower, upper = ROBOT.limits.workspace_m
    for axis in range(3):
        for bound, side in ((lower[axis], -1), (upper[axis], 1)):
            pose = HOME.copy()
            pose[axis, 3] = bound + side * 0.01
            verdict = check(pose[None], only('workspace'))
            assert verdict.path.poses_base_ee[0, axis, 3] == bound
            assert verdict.findings[0].detail == 'xyz'[axis]


@pytest.mark.parametrize(('settings', 'inside', 'outside', 'unit'), [
    (only('join', join_m=0.1), along((0.0999, 0, 0)), along((0.1001, 0, 0)), 'm'),
    (
        only('join', join_rad=0.5),
        along((0, 0, 0), rotation=HOME[:3, :3] @ Rotation.from_rotvec([0, 0, 0.499]).as_matrix()),
        along((0, 0, 0), rotation=HOME[:3, :3] @ Rotation.from_rotvec([0, 0, 0.501]).as_matrix()),
        'rad',
    ),
])  # fmt: skip
def test_a_first_waypoint_that_is_far_away_is_rejected(settings, inside, outside, unit):
    assert check(inside, settings).findings == ()
    verdict = check(outside, settings)
    assert outcomes(verdict) == {'join': Outcome.REJECT} and verdict.path is None
    assert verdict.rejection.unit == unit


@pytest.mark.parametrize(('rule', 'limit', 'inside', 'outside'), [
    # steps of a motion that is under way already: speed = step / 50 ms
    ('linear_velocity', {'ee_linear_velocity_m_s': 0.2}, 0.0099, 0.0101),
])  # fmt: skip
def test_too_fast_is_slowed_down_by_as_much_as_it_is_too_fast(rule, limit, inside, outside):
    settings = only(rule, overrides=limit)
    start = moving(0.2)
    assert check(straight(inside), settings, start=start).findings == ()
    verdict = check(straight(outside), settings, start=start)
    assert outcomes(verdict) == {rule: Outcome.TIME_SCALE}
    assert 1.0 < verdict.time_scale < 1.06
    np.testing.assert_array_equal(verdict.path.poses_base_ee, straight(outside))
    assert verdict.path.stamps_ns[-2] > START_NS + 15 * PERIOD_NS


def turning(rate_rad_s: float, n: int = 6) -> np.ndarray:
    way = np.tile(HOME, (n, 1, 1))
    for i in range(n):
        turn = Rotation.from_rotvec([0, 0, rate_rad_s * 0.05 * (i + 1)]).as_matrix()
        way[i, :3, :3] = HOME[:3, :3] @ turn
    return way


@pytest.mark.parametrize(('rule', 'limit', 'waypoints', 'start', 'breaks'), [
    ('linear_acceleration', {'ee_linear_acceleration_m_s2': 4.1}, straight(0.01, 6), moving(0.0), True),
    ('linear_acceleration', {'ee_linear_acceleration_m_s2': 40.0}, straight(0.01, 6), moving(0.0), False),
    ('linear_jerk', {'ee_linear_jerk_m_s3': 50.0}, straight(0.01, 6), moving(0.0), True),
    ('linear_jerk', {'ee_linear_jerk_m_s3': 5000.0}, straight(0.01, 6), moving(0.0), False),
    ('angular_velocity', {'ee_angular_velocity_rad_s': 0.9}, turning(1.0), moving(0.0), True),
    ('angular_velocity', {'ee_angular_velocity_rad_s': 1.5}, turning(1.0), moving(0.0), False),
    ('angular_acceleration', {'ee_angular_acceleration_rad_s2': 20.0}, turning(1.0), moving(0.0), True),
    ('angular_acceleration', {'ee_angular_acceleration_rad_s2': 200.0}, turning(1.0), moving(0.0), False),
    ('angular_jerk', {'ee_angular_jerk_rad_s3': 500.0}, turning(1.0), moving(0.0), True),
    ('angular_jerk', {'ee_angular_jerk_rad_s3': 50000.0}, turning(1.0), moving(0.0), False),
    # braking from the motion under way counts: the join is part of the path
    ('linear_acceleration', {'ee_linear_acceleration_m_s2': 8.0}, straight(0.0, 6), moving(0.3), True),
    ('linear_acceleration', {'ee_linear_acceleration_m_s2': 20.0}, straight(0.0, 6), moving(0.3), False),
])  # fmt: skip
def test_speed_acceleration_and_jerk_are_time_scaled(rule, limit, waypoints, start, breaks):
    verdict = check(waypoints, only(rule, overrides=limit), start=start)
    assert outcomes(verdict) == ({rule: Outcome.TIME_SCALE} if breaks else {})
    assert (verdict.time_scale > 1.0) == breaks
    np.testing.assert_array_equal(verdict.path.poses_base_ee, waypoints)


def test_what_would_have_to_be_slower_than_allowed_is_rejected():
    settings = only('linear_velocity', overrides={'ee_linear_velocity_m_s': 0.02}, max_time_scale=2.0)
    verdict = check(straight(0.01), settings)
    assert verdict.path is None and verdict.rejection.rule == 'linear_velocity'
    assert '2 times slower' in str(verdict.rejection)


def test_a_share_of_the_limits_can_be_asked_for():
    full, half = GuardSettings().limits(ROBOT), GuardSettings(limit_scale=0.5).limits(ROBOT)
    assert half.ee_linear_velocity_m_s == 0.5 * full.ee_linear_velocity_m_s
    np.testing.assert_array_equal(half.acceleration_rad_s2, 0.5 * full.acceleration_rad_s2)
    np.testing.assert_array_equal(half.upper_rad, full.upper_rad)


def test_the_speeds_near_an_end_of_a_range_are_scaled_like_all_others():
    robot = load_robot('fr3')
    full, third = GuardSettings().limits(robot), GuardSettings(limit_scale=0.3).limits(robot)
    for share in np.linspace(0.0, 1.0, 21):
        at = full.lower_rad + share * (full.upper_rad - full.lower_rad)
        for direction in (np.ones(7), -np.ones(7)):
            np.testing.assert_allclose(
                third.velocity_towards(at, direction), 0.3 * full.velocity_towards(at, direction), atol=1e-12
            )
    assert (full.velocity_towards(full.upper_rad - 0.05, np.ones(7)) < full.velocity_rad_s).all()


# --- joints ----------------------------------------------------------------------------------------


def test_without_a_joint_state_nothing_is_let_through_unless_no_rule_needs_one():
    assert check(straight(0.005), joints=None).rejection.rule == 'joint_state'
    assert check(straight(0.005), only('workspace'), joints=None).path is not None


def test_a_pose_out_of_reach_is_rejected():
    far = HOME.copy()
    far[:3, 3] = [1.3, 0.0, 0.2]
    verdict = check(far[None], only('reach'))
    assert outcomes(verdict) == {'reach': Outcome.REJECT}
    assert check(far[None], only('workspace', 'reach')).path is not None  # clamped first


def test_what_lies_beyond_the_executed_part_is_cut_off_where_it_is_out_of_reach():
    waypoints = straight(0.005)
    waypoints[12:, 0, 3] = 1.3
    verdict = check(waypoints, only('reach'))
    assert outcomes(verdict) == {'reach': Outcome.TRUNCATE} and verdict.findings[0].waypoint == 13
    np.testing.assert_array_equal(verdict.path.poses_base_ee, waypoints[:12])
    end = verdict.path.state(verdict.path.end_ns)
    assert not end.linear_m_s.any()
    waypoints[5:, 0, 3] = 1.3  # among those that are needed
    assert outcomes(check(waypoints, only('reach'))) == {'reach': Outcome.REJECT}


def test_what_lies_beyond_the_executed_part_is_cut_off_where_no_slowing_down_helps():
    settings = only('angular_acceleration', max_time_scale=3.0)
    waypoints = straight(0.005)
    waypoints[10, :3, :3] = waypoints[10, :3, :3] @ Rotation.from_euler('z', 2.5).as_matrix()
    verdict = check(waypoints, settings)
    assert (Outcome.TRUNCATE, 'angular_acceleration') in {(f.outcome, f.rule) for f in verdict.findings}
    np.testing.assert_array_equal(verdict.path.poses_base_ee, waypoints[: len(verdict.path.poses_base_ee)])
    assert 8 <= len(verdict.path.poses_base_ee) <= 10 and verdict.time_scale == 1.0
    assert not verdict.path.state(verdict.path.end_ns).angular_rad_s.any()
    waypoints[5] = waypoints[10]  # among those that are needed
    verdict = check(waypoints, settings)
    assert verdict.path is None and verdict.rejection.waypoint in (5, 6)


def turned_to(joint: int, angle_rad: float) -> np.ndarray:
    q = ROBOT.home_rad.copy()
    q[joint] = angle_rad
    return KINEMATICS.forward(q)


def test_a_joint_beyond_its_limit_is_rejected_and_named():
    """The pose that takes joint 7 beyond its limit, where the rest of the arm can't make up for it."""
    limits = ROBOT.limits
    lower, upper = np.array(limits.lower_rad), np.array(limits.upper_rad)
    lower[:6], upper[:6] = ROBOT.home_rad[:6] - 1e-4, ROBOT.home_rad[:6] + 1e-4
    stiff = replace(ROBOT, limits=replace(limits, lower_rad=lower, upper_rad=upper))
    start = ROBOT.home_rad.copy()
    start[6] = upper[6] - 0.1
    begin = MotionState.at_rest(KINEMATICS.forward(start))
    inside, outside = turned_to(6, upper[6] - 0.01), turned_to(6, upper[6] + 0.01)
    settings = only('joint_position')
    assert check(inside[None], settings, robot=stiff, start=begin, joints=start).findings == ()
    verdict = check(outside[None], settings, robot=stiff, start=begin, joints=start)
    assert outcomes(verdict) == {'joint_position': Outcome.REJECT}
    assert 'joint' in str(verdict.rejection) and 'beyond' in str(verdict.rejection)


def test_a_joint_goes_as_far_as_its_limit_lets_it():
    """Also where all others are held: what is left of the pose is what the limit does not allow."""
    upper = np.array(ROBOT.limits.upper_rad)
    held = replace(
        ROBOT,
        limits=replace(
            ROBOT.limits,
            lower_rad=ROBOT.home_rad - 1e-4,
            upper_rad=np.append(ROBOT.home_rad[:6] + 1e-4, upper[6]),
        ),
    )
    for below_rad in (0.1, 0.05, 0.02):
        begin = ROBOT.home_rad.copy()
        begin[6] = upper[6] - below_rad
        solution = InverseKinematics(held).solve(turned_to(6, upper[6] + 0.01), begin)
        assert solution.joints_rad[6] == upper[6] and solution.at_limit[6]
        assert not (
            solution.at_limit
            & (held.limits.lower_rad < solution.joints_rad)
            & (solution.joints_rad < held.limits.upper_rad)
        ).any()
        np.testing.assert_allclose(solution.error, 0.01, atol=5e-4)


def test_joints_too_fast_slow_the_motion_down():
    slow = replace(ROBOT, limits=replace(ROBOT.limits, velocity_rad_s=np.full(7, 0.05)))
    settings = only('joint_velocity')
    assert check(straight(0.005), settings).findings == ()
    verdict = check(straight(0.005), settings, robot=slow)
    assert outcomes(verdict) == {'joint_velocity': Outcome.TIME_SCALE} and verdict.time_scale > 1.5
    way = np.vstack([InverseKinematics(ROBOT).solve(HOME, ROBOT.home_rad).joints_rad, verdict.joints_rad])
    durations = np.diff(verdict.path.stamps_ns)[:, None] * 1e-9
    assert (np.abs(np.diff(way, axis=0)) / durations)[1:].max() <= 0.05 * 1.001


def test_accelerations_of_joints_are_looked_at_when_asked_for():
    assert {'joint_acceleration', 'joint_jerk'} == IGNORED
    slow = replace(ROBOT, limits=replace(ROBOT.limits, acceleration_rad_s2=np.full(7, 0.5)))
    verdict = check(straight(0.005), only('joint_acceleration'), robot=slow)
    assert outcomes(verdict) == {'joint_acceleration': Outcome.TIME_SCALE}


def test_a_jump_of_the_joints_is_rejected():
    settings = only('continuity', continuity_rad=0.05)
    near, far = turned_to(6, ROBOT.home_rad[6] + 0.04), turned_to(6, ROBOT.home_rad[6] + 0.06)
    assert check(near[None], settings).findings == ()
    assert outcomes(check(far[None], settings)) == {'continuity': Outcome.REJECT}


def test_an_arm_that_is_elsewhere_than_the_last_command_is_rejected():
    settings = only('continuity', continuity_rad=0.2)
    elsewhere = ROBOT.home_rad.copy()
    elsewhere[6] += 0.3
    assert check(straight(0.005), settings).findings == ()
    verdict = check(straight(0.005), settings, joints=elsewhere)
    assert verdict.rejection.rule == 'continuity' and 'from where it is' in str(verdict.rejection)


def stretched_out(angle_rad: float) -> np.ndarray:
    """Joints (7,) near the largest extension, which is at -0.467 of joint 4."""
    return np.array([0.0, 0.6, 0.0, angle_rad, 0.0, 1.2, 0.78])


def test_near_a_singularity_it_is_slower_and_below_the_floor_rejected():
    joints = stretched_out(-0.6)
    start = MotionState.at_rest(KINEMATICS.forward(joints))
    waypoints = KINEMATICS.forward_many(np.stack([stretched_out(a) for a in (-0.58, -0.56, -0.54)]))
    jacobian = InverseKinematics(ROBOT).jacobian
    sigma = np.linalg.svd(jacobian(stretched_out(-0.54)), compute_uv=False)[-1]
    settings = {'start': start, 'joints': joints}
    far = only('singularity', singularity_slow=0.9 * sigma, singularity_floor=0.5 * sigma)
    assert check(waypoints, far, **settings).findings == ()
    near = only('singularity', singularity_slow=2 * sigma, singularity_floor=0.5 * sigma)
    verdict = check(waypoints, near, **settings)
    assert outcomes(verdict) == {'singularity': Outcome.TIME_SCALE}
    np.testing.assert_allclose(verdict.time_scale, 2.0, rtol=0.05)
    there = only('singularity', singularity_slow=4 * sigma, singularity_floor=1.1 * sigma)
    assert outcomes(check(waypoints, there, **settings)) == {'singularity': Outcome.REJECT}
    # The way back is open.
    back = {'start': MotionState.at_rest(waypoints[-1]), 'joints': stretched_out(-0.54)}
    assert check(waypoints[1::-1], there, **back).path is not None


# --- collisions ------------------------------------------------------------------------------------


FOLDED = np.array([0.0, -1.2, 0.0, -3.05, 0.0, 0.4, 0.78])


def test_home_and_the_arm_folded_onto_itself():
    checks = CollisionChecks(ROBOT)
    assert checks.pairs > 20 and checks.touching(ROBOT.home_rad) is None
    one, other, is_box, distance_m = checks.touching(FOLDED)
    assert {one, other} <= {capsule.link for capsule in ROBOT.collision.capsules}
    assert not is_box and distance_m < 0


def test_a_motion_into_itself_is_rejected():
    q = np.linspace(FOLDED + np.array([0, 0, 0, 0.25, 0, 0.6, 0]), FOLDED, 12)
    checks = CollisionChecks(ROBOT, margin_m=0.005)
    assert checks.touching(q[0]) is None
    waypoints = KINEMATICS.forward_many(q[1:])
    settings = only('self_collision')
    verdict = check(
        waypoints, settings, start=MotionState.at_rest(KINEMATICS.forward(q[0])), joints=q[0], needed=11
    )
    assert outcomes(verdict) == {'self_collision': Outcome.REJECT}
    assert ' and ' in verdict.rejection.detail


def test_a_box_is_not_entered_and_is_named():
    tip = HOME[:3, 3]
    box = Box('post', tip + np.array([0.07, -0.1, -0.1]), tip + np.array([0.25, 0.1, 0.1]))
    waypoints = straight(0.01)
    assert outcomes(check(waypoints, only('boxes', boxes=(box,)))) == {'boxes': Outcome.REJECT}
    verdict = check(waypoints, only('boxes', boxes=(box,)))
    assert 'right_hand and post' in str(verdict.rejection)
    assert check(waypoints, only('self_collision', boxes=(box,))).path is not None
    assert check(straight(-0.005, 8), only('boxes', boxes=(box,))).path is not None


@pytest.mark.parametrize('thick_m', [0.01, 0.0])
@pytest.mark.parametrize('far_m', [0.12, 0.145])
def test_a_single_target_beyond_a_thin_wall_is_rejected(thick_m, far_m):
    """Neither where the arm is nor where it is to go touches the wall; the way there does."""
    tip = HOME[:3, 3]
    lower = tip + np.array([0.06 - thick_m / 2, -0.4, -0.1])
    upper = tip + np.array([0.06 + thick_m / 2 + 1e-4, 0.4, 0.08])
    wall = Box('wall', lower, upper)
    target = along((far_m, 0.0, 0.0))
    there = InverseKinematics(ROBOT).solve(target[0], ROBOT.home_rad).joints_rad
    checks = CollisionChecks(ROBOT, (wall,), GuardSettings().collision_margin_m)
    assert checks.touching(ROBOT.home_rad) is None and checks.touching(there) is None
    verdict = check(target, only('boxes', boxes=(wall,)), needed=1)
    assert outcomes(verdict) == {'boxes': Outcome.REJECT} and verdict.rejection.waypoint == 1
    low = Box('low wall', lower - [0.0, 0.0, 0.1], upper - [0.0, 0.0, 0.14])
    assert check(target, only('boxes', boxes=(low,)), needed=1).path is not None


def test_what_turns_into_a_wall_is_rejected():
    """From the start to the waypoint there is room, but not for the turn that the speed asks for."""
    tip = HOME[:3, 3]
    wall = Box('wall', tip + np.array([0.05, -0.4, -0.1]), tip + np.array([0.25, 0.4, 0.08]))
    stay = along(*[(0.0, 0.001 * i, 0.0) for i in range(8)])
    for speed_m_s, passes in ((0.0, True), (0.8, False)):
        verdict = check(stay, only('boxes', 'linear_acceleration', boxes=(wall,)), start=moving(speed_m_s))
        assert (verdict.path is not None) == passes
    assert verdict.rejection.rule == 'boxes'


def test_the_fastest_part_of_a_way_counts_for_the_joints():
    """A target that leads past the largest extension: joint 4 moves there and back, its sum says little."""
    points = np.array([[0.0], [0.3], [0.5], [0.4], [0.5], [0.6]])
    path = JointPath(points, np.array([0, 3, 5]), np.zeros(1), np.array([6.0, 5, 1, 4, 3, 2]))
    np.testing.assert_allclose(path.steps_rad, [[0.9], [0.2]])
    np.testing.assert_allclose(path.at_waypoints_rad, [[0.4], [0.6]])
    assert [path.leads_to(point) for point in range(1, 6)] == [0, 0, 0, 1, 1]
    short = path.up_to(1)
    np.testing.assert_allclose(short.joints_rad, points[:4])
    np.testing.assert_allclose(short.least(np.minimum(short.singular[:-1], short.singular[1:])), [1.0])
    np.testing.assert_allclose(short.steps_rad, [[0.9]])


def test_from_a_start_that_the_arm_does_not_quite_reach_the_way_is_looked_at_all_the_same():
    """Stretched out, and told to be 3 mm farther: back from there is a way like any other."""
    at = KINEMATICS.forward(stretched_out(-0.467))
    outwards = np.array([0.755, 0.0, 0.656])
    joints, told, target = stretched_out(-0.55), at.copy(), at.copy()
    told[:3, 3] += 0.003 * outwards
    target[:3, 3] -= 0.08 * outwards
    assert not InverseKinematics(ROBOT).solve(told, joints).reached
    checks = JointChecks(ROBOT, GuardSettings())
    path, found = checks.follow(MotionState.at_rest(told), target[None], joints, 0)
    assert found is None and path.waypoints.tolist() == [0, 4]


def test_points_between_are_near_each_other_and_not_without_end():
    for far_m, turn_rad, count in (
        (0.02, 0.05, 0),
        (0.12, 0.0, 4),
        (0.0, 0.35, 3),
        (9.0, 3.0, MAX_PARTS - 1),
    ):
        end = along((far_m, 0.0, 0.0))[0]
        end[:3, :3] = end[:3, :3] @ Rotation.from_rotvec([0.0, turn_rad, 0.0]).as_matrix()
        points = [HOME, *between(HOME, end), end]
        assert len(points) == count + 2
        apart = [np.linalg.norm((b - a)[:3, 3]) for a, b in pairwise(points)]
        np.testing.assert_allclose(apart, far_m / (count + 1), atol=1e-12)
        assert count == MAX_PARTS - 1 or max(apart) <= SPACING_M


def test_the_margin_is_kept():
    hand = KINEMATICS.link_forward(ROBOT.home_rad)[:3, 3]
    lowest = hand[2] - 0.12  # the fingers' capsule ends at 0.10 + 0.02 m
    box = Box('table', np.array([-1.0, -1.0, -0.5]), np.array([1.0, 1.0, lowest - 0.003]))
    assert CollisionChecks(ROBOT, (box,), 0.002).touching(ROBOT.home_rad) is None
    assert CollisionChecks(ROBOT, (box,), 0.004).touching(ROBOT.home_rad)[1:3] == ('table', True)


def test_a_capsule_on_a_link_that_is_not_there_is_refused():
    capsule = replace(ROBOT.collision.capsules[0], link='tail')
    robot = replace(ROBOT, collision=replace(ROBOT.collision, capsules=(capsule,)))
    with pytest.raises(RobotDescriptionError, match=r"'tail' is not in the model; its links: .*link0"):
        CollisionChecks(robot)


@pytest.mark.parametrize('name', ['ur5e_sim', 'iiwa_sim', 'kinova3_sim'])
def test_boxes_are_refused_for_an_arm_without_capsules(name):
    robot, box = load_robot(name), Box('post', np.zeros(3), np.ones(3))
    with pytest.raises(ConfigError, match=f"boxes post keep nothing out: '{robot.name}' has no capsules"):
        Guard(robot, GuardSettings(boxes=(box,)))
    assert Guard(robot, GuardSettings(IGNORED | {'boxes'}, boxes=(box,))).boxes == ()
    assert Guard(robot).boxes == ()


def test_capsules_that_do_not_move_keep_nothing_out_of_boxes():
    fixed = tuple(c for c in ROBOT.collision.capsules if c.link.endswith(('link0', 'link1')))
    robot = replace(ROBOT, collision=replace(ROBOT.collision, capsules=fixed))
    assert fixed and CollisionChecks(robot).boxes == ()
    with pytest.raises(ConfigError, match='no capsules on its moving links'):
        CollisionChecks(robot, (Box('post', np.zeros(3), np.ones(3)),))


@pytest.mark.parametrize('name', ['panda_sim', 'fr3'])
def test_franka_arms_at_home_and_around_touch_nothing(name):
    robot = load_robot(name)
    checks = CollisionChecks(robot, margin_m=0.005)
    for q in np.random.default_rng(0).normal(robot.home_rad, 0.15, (50, 7)):
        assert checks.touching(q) is None


@pytest.mark.parametrize('folder', ['stack', 'lift_images'])
def test_no_demonstration_touches_anything(folder, repository):
    root = FilePath(repository / 'out' / 'demos' / folder)
    checks = CollisionChecks(ROBOT, margin_m=0.005)
    joints = demonstrated(root) if root.is_dir() else np.stack([ROBOT.home_rad])
    assert [q for q in joints if checks.touching(q) is not None] == []


def demonstrated(root: FilePath) -> np.ndarray:
    dataset = Dataset.open(root)
    episodes = [dataset.episode(i).arrays['observation.joint_positions'] for i in range(dataset.n_episodes)]
    return np.concatenate(episodes)[:, :7].astype(float)


# --- settings and limits ---------------------------------------------------------------------------


def test_the_file_that_is_shipped_holds_the_defaults(repository):
    settings, defaults = (
        read_guard_settings(repository / 'config' / 'guard' / 'default.yaml'),
        GuardSettings(),
    )
    names = set(GuardSettings.__dataclass_fields__)
    assert {name: getattr(settings, name) for name in names} == {
        name: getattr(defaults, name) for name in names
    }
    values = yaml.safe_load((repository / 'config' / 'guard' / 'default.yaml').read_text())
    assert names - set(values) == {'workspace_m', 'overrides', 'ignored_rules'}


@pytest.mark.parametrize(('values', 'message'), [
    ({'of': []}, 'unknown key of; valid keys: .*ignored_rules'),
    ({'ignored_rules': ['gravity']}, 'no rule gravity to leave out; rules: workspace'),
    ({'limit_scale': 0.0}, r'limit_scale must be in \(0, 1\], got 0.0'),
    ({'limit_scale': 1.1}, r'limit_scale must be in \(0, 1\], got 1.1'),
    ({'limit_scale': float('nan')}, 'must be a finite number'),
    ({'max_time_scale': 0.5}, 'max_time_scale must be at least 1, got 0.5'),
    ({'join_m': 0.0}, 'join_m must be positive, got 0.0'),
    ({'singularity_floor': 0.5}, r'singularity_floor must be in \[0, singularity_slow = 0.03\], got 0.5'),
    ({'collision_margin_m': -0.1}, 'collision_margin_m must be in'),
    ({'workspace_m': {'lower': [0, 0, 0], 'upper': [1, 1, 0]}}, 'lower must lie below upper'),
    ({'boxes': [{'name': 'b', 'lower_m': [0, 0, 0], 'upper_m': [1, 1, 0]}]}, 'lower_m must lie below upper_m'),
    ([], 'expected a mapping'),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(tmp_path, values, message):
    file = tmp_path / 'guard.yaml'
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=message):
        read_guard_settings(file)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='guard settings'):
        read_guard_settings(tmp_path / 'none.yaml')


def test_every_value_of_a_file_arrives(tmp_path):
    settings = guard_settings({
        'ignored_rules': [], 'limit_scale': 0.5, 'boxes': [{'name': 'b', 'lower_m': [0, 0, 0], 'upper_m': [1, 1, 1]}],
        'workspace_m': {'lower': [0.1, -0.2, 0.0], 'upper': [1, 1, 1]}, 'limits': {'ee_linear_velocity_m_s': 0.25},
    }, 'here')  # fmt: skip
    assert settings.ignored_rules == frozenset() and settings.boxes[0].name == 'b'
    limits = settings.limits(ROBOT)
    assert limits.ee_linear_velocity_m_s == 0.125
    np.testing.assert_array_equal(limits.workspace_m[0], [0.1, -0.2, 0.0])


def test_a_file_takes_nothing_from_what_joint_trajectories_need(repository, tmp_path):
    """Whoever only slows the arm down keeps the rules of the joints, and their share of the acceleration."""
    needed, file = default_guard(ROBOT, True), tmp_path / 'slow.yaml'
    for values in ({'limit_scale': 0.2}, {'limits': None}, {'limits': {'ee_linear_velocity_m_s': 0.25}}):
        file.write_text(yaml.safe_dump(values))
        settings = read_guard_settings(file, needed)
        assert settings.ignored_rules == frozenset()
        scale = values.get('limit_scale', 1.0)
        np.testing.assert_allclose(
            settings.limits(ROBOT).acceleration_rad_s2,
            JOINT_SHARE * scale * ROBOT.limits.acceleration_rad_s2,
        )
    assert settings.limits(ROBOT).ee_linear_velocity_m_s == 0.25
    shipped = read_guard_settings(repository / 'config' / 'guard' / 'default.yaml', needed)
    assert shipped.ignored_rules == frozenset()
    chosen = guard_settings(
        {'ignored_rules': ['boxes'], 'limits': {'acceleration_rad_s2': [1.0] * 7}}, '', needed
    )
    assert chosen.ignored_rules == {'boxes'}
    np.testing.assert_array_equal(chosen.limits(ROBOT).acceleration_rad_s2, np.ones(7))


@pytest.mark.parametrize(
    'overrides',
    [{'ee_linear_velocity_m_s': 0}, {'velocity_rad_s': [1.0]}, {'speed': 1.0}, {'jerk_rad_s3': 'x'}],
)
def test_limits_that_make_no_sense_are_refused(overrides):
    with pytest.raises(ConfigError, match='guard: limits'):
        Guard(ROBOT, GuardSettings(overrides=overrides))


def test_frankas_limits_are_those_that_are_published():
    """frankarobotics.github.io/docs: the FR3's Cartesian and joint limits, and its speed at the end of a range."""
    limits = load_robot('fr3').limits
    assert (
        limits.ee_linear_velocity_m_s,
        limits.ee_linear_acceleration_m_s2,
        limits.ee_linear_jerk_m_s3,
    ) == (3, 9, 4500)
    assert (limits.ee_angular_velocity_rad_s, limits.ee_angular_acceleration_rad_s2) == (2.5, 17)
    assert set(limits.acceleration_rad_s2) == {10.0} and set(limits.jerk_rad_s3) == {5000.0}
    middle = np.array([0.0, 0.0, 0.0, -1.5, 0.0, 2.5, 0.0])
    np.testing.assert_array_equal(limits.velocity_towards(middle, np.ones(7)), limits.velocity_rad_s)
    end = limits.upper_rad - 0.05
    fastest = limits.velocity_towards(end, np.ones(7))
    np.testing.assert_allclose(fastest[0], np.sqrt(12.0 * (2.7501 - 2.6937)) - 0.3)
    np.testing.assert_array_equal(limits.velocity_towards(end, -np.ones(7))[0], 2.62)
    assert (fastest < limits.velocity_rad_s).all()


def test_statistics_count_each_rule_and_keep_the_last_reason():
    statistics = GuardStatistics()
    statistics.add(check(straight(0.005), start=moving(0.1)))
    statistics.add(check(straight(0.005), joints=None))
    below = along((0, 0, -1.0))
    statistics.add(check(below, only('workspace')))
    values = statistics.values()
    assert values['guard_checked'] == '3'
    assert values['guard_reject_joint_state'] == values['guard_clamp_workspace'] == '1'
    assert values['guard_last_reject'] == 'joint_state: no joint state (reject)'
    assert 'workspace of z at waypoint 1' in values['guard_last_clamp']
    assert statistics.count(Outcome.REJECT) == 1


def test_poses_of_the_action_form_are_rigid_enough():
    rng = np.random.default_rng(1)
    actions = np.concatenate([rng.uniform(0.3, 0.6, (50, 3)), rng.normal(size=(50, 6)), np.zeros((50, 1))], 1)
    waypoints, _ = poses.pose_from_action(actions)
    assert all(check(pose[None], only()).path is not None for pose in waypoints)
