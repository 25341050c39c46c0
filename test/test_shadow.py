"""Shadow mode: where a policy would have gone, beside what the arm did under somebody else; and nothing commanded."""

from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from geometry_msgs.msg import PoseStamped
from rclpy.lifecycle import LifecycleNode
from ros_harness import node_process
from scipy.spatial.transform import Rotation
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64, Float64MultiArray
from test_policy_node import PERIOD_NS, ROBOT, FakeRobot
from untrained import save_untrained_policy

from decoupled_policy_ros.nodes.common import COMMAND, SENSOR, floats, time_message, time_ns
from decoupled_policy_ros.nodes.shadow_output import ShadowOutput
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime import steering as steering_module
from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.divergence import Divergence
from decoupled_policy_ros.runtime.guard.guard import Guard
from decoupled_policy_ros.runtime.guard.settings import GuardSettings
from decoupled_policy_ros.runtime.shadow import FromArm, Shadowing, arm_state

KINEMATICS = Kinematics(ROBOT)
NOW_NS = 10**12
SPEED_RAD_S = np.array([0.1, -0.05, 0.02, 0.1, -0.1, 0.05, 0.2])
OPEN, CLOSED = np.array([0.04, -0.04]), np.array([0.02, -0.02])


def joints_at(stamp_ns: int) -> np.ndarray:
    """An arm on its way."""
    return ROBOT.home_rad + SPEED_RAD_S * (stamp_ns - NOW_NS) * 1e-9


class MovingArm:
    """Joint states at 30 Hz, the last one at most 33 ms old."""

    seen_since_ns = 0

    def at(self, now_ns: int):
        stamp_ns = now_ns - now_ns % 33_333_333
        return (stamp_ns, joints_at(stamp_ns)) if stamp_ns >= self.seen_since_ns else None

    def positions(self, now_ns: int):
        latest = self.at(now_ns)
        return None if latest is None else latest[1]

    def why_not(self, now_ns: int) -> str:
        return 'it has not been seen'


def chunk_along(shift_m: float, turn_rad: float, gripper: float, stamp_ns: int = NOW_NS) -> Chunk:
    """What the arm does, shifted upwards and turned."""
    actions = []
    for i in range(16):
        pose = KINEMATICS.forward(joints_at(stamp_ns + (i - 1) * PERIOD_NS))
        pose[2, 3] += shift_m
        pose[:3, :3] = pose[:3, :3] @ Rotation.from_rotvec([turn_rad, 0, 0]).as_matrix()
        actions.append(poses.action_from_pose(pose, gripper))
    return Chunk(np.stack(actions), stamp_ns, 20.0)


def test_a_known_divergence_is_found_at_every_step():
    divergence = Divergence(ROBOT)
    divergence.predicted(chunk_along(0.03, 0.1, 0.9))
    compared = []
    for k in range(40):  # at 30 Hz, between which the waypoints lie
        stamp_ns = NOW_NS - 50_000_000 + k * 33_333_333
        assert not compared
        compared = divergence.measured(stamp_ns, joints_at(stamp_ns), OPEN if k < 15 else CLOSED)
        if compared:
            break
    (result,) = compared
    assert stamp_ns >= NOW_NS + 14 * PERIOD_NS > stamp_ns - 33_333_333  # as soon as it can be
    assert result.stamps_ns == [NOW_NS + i * PERIOD_NS for i in range(15)]
    np.testing.assert_allclose(result.position_m, 0.03, atol=1e-5)
    np.testing.assert_allclose(result.rotation_rad, 0.1, atol=1e-5)
    np.testing.assert_array_equal(result.gripper_agrees, [0.0] * 9 + [1.0] * 6)
    values = divergence.values()
    assert values['divergence_chunks'] == '1'
    assert values['divergence_position_m_mean'] == values['divergence_position_m_max'] == '0.0300'
    assert values['divergence_rotation_rad_mean'] == '0.1000'
    assert values['divergence_gripper_agrees_mean'] == '0.40'
    assert values['divergence_position_m_by_step'].split() == ['0.0300'] * 15


def test_where_the_arm_was_not_seen_nothing_is_said():
    divergence = Divergence(ROBOT)
    divergence.predicted(chunk_along(0.0, 0.0, 0.0))
    for stamp_ns in range(NOW_NS + 2 * PERIOD_NS, NOW_NS + 20 * PERIOD_NS, PERIOD_NS):
        if not NOW_NS + 4 * PERIOD_NS < stamp_ns < NOW_NS + 8 * PERIOD_NS:
            compared = divergence.measured(stamp_ns, joints_at(stamp_ns))
        if compared:
            break
    known = np.isfinite(compared[0].position_m)
    np.testing.assert_array_equal(known, [i >= 2 and not 4 < i < 8 for i in range(15)])
    assert np.isnan(compared[0].gripper_agrees).all()
    divergence.predicted(chunk_along(0.0, 0.0, 0.0))
    divergence.clear()
    assert not divergence.measured(NOW_NS, joints_at(NOW_NS))  # the clock went back


def test_a_joint_state_from_the_future_does_not_end_the_comparison(rclpy_context):
    node = LifecycleNode('shadow', context=rclpy_context)
    shadow = ShadowOutput(node, ROBOT, SENSOR)
    home = poses.action_from_pose(KINEMATICS.forward(ROBOT.home_rad), 0.9)
    try:
        start_ns = node.get_clock().now().nanoseconds - 1_000_000_000
        shadow.divergence.predicted(Chunk(np.tile(home, (16, 1)), start_ns, 20.0))
        for since_ns in (3600 * 10**9, *range(0, 1_000_000_000, 20_000_000)):
            message = JointState(name=list(ROBOT.joint_names), position=floats(ROBOT.home_rad))
            message.header.stamp = time_message(start_ns + since_ns)
            shadow._take(message)
        values = shadow.divergence.values()
        assert values['divergence_chunks'] == '1' and values['divergence_position_m_max'] == '0.0000'
    finally:
        shadow.close()
        node.destroy_node()


def test_the_state_of_a_moving_arm_is_where_it_will_be():
    now_ns = NOW_NS + 20_000_000
    state = arm_state(MovingArm(), KINEMATICS, now_ns, now_ns + 30_000_000)
    np.testing.assert_allclose(state.pose, KINEMATICS.forward(joints_at(now_ns + 30_000_000)), atol=1e-9)
    before, after = (KINEMATICS.forward(joints_at(now_ns + t)) for t in (29_500_000, 30_500_000))
    np.testing.assert_allclose(state.linear_m_s, (after - before)[:3, 3] / 1e-3, atol=1e-3)
    turn = Rotation.from_matrix(after[:3, :3] @ before[:3, :3].T).as_rotvec() / 1e-3
    np.testing.assert_allclose(state.angular_rad_s, turn, atol=1e-3)


def test_an_arm_that_was_seen_once_rests_and_one_never_seen_has_no_state():
    arm = MovingArm()
    arm.seen_since_ns = NOW_NS - 20_000_000
    assert not arm_state(arm, KINEMATICS, NOW_NS, NOW_NS).linear_m_s.any()
    arm.seen_since_ns = NOW_NS + 1
    with pytest.raises(ValueError, match='it has not been seen'):
        arm_state(arm, KINEMATICS, NOW_NS, NOW_NS)


def test_each_chunk_begins_at_the_arm_and_as_fast(monkeypatch):
    # A path begins later by as much as a check takes, and an arm is known for 0.1 s ahead.
    ticks = count(0.0, 0.01)
    monkeypatch.setattr(steering_module, 'time', SimpleNamespace(perf_counter=lambda: next(ticks)))
    predicted: list[Chunk] = []
    guarded = FromArm(Guard(ROBOT, GuardSettings()), KINEMATICS, MovingArm(), period_ns=PERIOD_NS)
    steering = Shadowing(guarded, predicted.append)
    for k in range(3):  # each leads away from the arm, which follows none
        now_ns = NOW_NS + k * 8 * PERIOD_NS
        chunk = chunk_along(0.02, 0.0, 0.5, now_ns)
        plan = steering.plan(chunk, now_ns)
        assert steering.adopt(plan)
        start = plan.path.state(plan.path.start_ns)
        np.testing.assert_allclose(start.pose, KINEMATICS.forward(joints_at(plan.path.start_ns)), atol=1e-6)
        assert 0.01 < np.linalg.norm(start.linear_m_s) < 0.5
        assert predicted[-1] is chunk
        then_ns = now_ns + 7 * PERIOD_NS
        shown, gripper = steering.follow(then_ns)
        np.testing.assert_allclose(shown, chunk.sample(then_ns)[0], atol=1e-3)  # the guard rounds corners
        assert gripper == pytest.approx(0.5)
    assert len(predicted) == 3


@pytest.mark.process
def test_nothing_is_commanded_and_the_divergence_is_that_of_the_motion(tmp_path):
    """The arm moves as the test likes; without a guard the trajectory is what was predicted."""
    parameters = {
        'use_sim_time': True, 'lockstep': True, 'task': str(save_untrained_policy(tmp_path / 'models')),
        'denoising_steps': 2, 'autostart': True, 'guard': False, 'shadow': True, 'output': 'both',
    }  # fmt: skip
    robot = FakeRobot()
    try:
        robot.record(PoseStamped, 'policy_node/shadow/target_pose', COMMAND)
        robot.record(Float64, 'policy_node/shadow/gripper_command', COMMAND)
        robot.record(Float64MultiArray, 'policy_node/divergence')
        with node_process('policy_node', tmp_path / 'policy.log', parameters) as node:
            robot.wait_for_subscribers(robot.joints, robot.clock, *robot.images.values())
            robot.begin()
            stamps_ns = []
            for _ in range(40):
                stamps_ns.append(robot.tick())
                robot.stamped('policy_node/shadow/target_pose', stamps_ns[-1])
            robot.wait_for(lambda: len(robot.received('policy_node/divergence')) >= 3, 'divergence')
            values = robot.diagnostics('policy', after=2)
            for topic in ('target_pose', 'gripper_command', 'joint_trajectory'):
                assert robot.count_publishers(topic) == 0
            chunks, rows = (robot.received(f'policy_node/{name}') for name in ('trajectory', 'divergence'))
            assert robot.status('following') == 'following'
            assert robot.received('policy_node/shadow/gripper_command')
            assert 'Traceback' not in node.output()
    finally:
        robot.close()
    means = []
    for chunk, message in zip(chunks[:3], rows[:3], strict=True):
        assert [d.size for d in message.layout.dim] == [15, 4]
        table = np.reshape(message.data, (15, 4))
        start_ns = time_ns(chunk.header.stamp)
        for i, point in enumerate(chunk.points):
            stamp_ns = start_ns + time_ns(point.time_from_start)
            arm = KINEMATICS.forward(robot.joint_positions(stamp_ns)[:7])
            t, q = point.transforms[0].translation, point.transforms[0].rotation
            assert table[i, 0] == pytest.approx(stamp_ns * 1e-9, abs=1e-6)
            assert table[i, 1] == pytest.approx(np.linalg.norm([t.x, t.y, t.z] - arm[:3, 3]), abs=1e-9)
            turn = Rotation.from_matrix(arm[:3, :3]).inv() * Rotation.from_quat([q.x, q.y, q.z, q.w])
            assert table[i, 2] == pytest.approx(turn.magnitude(), abs=1e-7)
        means.append(table[:, 1].mean())
    assert values['shadow'] == 'true'
    assert float(values['divergence_position_m_mean']) > 0.01
    assert min(means) > 0.01
