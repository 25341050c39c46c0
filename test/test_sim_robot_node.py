"""sim_robot_node as a process: the topics of a real arm, a clock that waits, episodes that can be repeated."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from geometry_msgs.msg import PoseArray, PoseStamped
from numpy.typing import NDArray
from ros_harness import TIMEOUT_S, NodeProcess, Peer, PolicyPeer, node_process
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, Float64
from std_srvs.srv import Trigger
from trajectory_msgs.msg import MultiDOFJointTrajectory

from decoupled_policy_ros.nodes.common import COMMAND, LATCHED, SENSOR, pose_stamped, time_message, time_ns
from decoupled_policy_ros.nodes.policy_outputs import trajectory_message
from decoupled_policy_ros.nodes.sim_robot_node import SimSettings
from decoupled_policy_ros.observation.messages import (
    image_to_array,
    joint_positions_from_message,
    pose_from_message,
)
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.robot.poses import action_from_pose
from decoupled_policy_ros.runtime.chunks import Chunk

pytestmark = [pytest.mark.process, pytest.mark.sim]

PERIOD_NS = 50_000_000
ROBOT = load_robot('panda_sim')
SEED = 40


class Commander(PolicyPeer):
    """The test as the one who commands the arm."""

    def __init__(self, namespace: str = '') -> None:
        Peer.__init__(self, namespace)
        for kind, topic in (
            (JointState, 'joint_states'),
            (PoseStamped, 'current_pose'),
            (PoseArray, 'sim_robot_node/objects'),
            (Image, 'agentview/image_raw'),
            (Image, 'wrist/image_raw'),
            (Clock, '/clock'),
        ):
            self.record(kind, topic)
        self.record(Bool, 'sim_robot_node/success', LATCHED)
        self.target = self.create_publisher(PoseStamped, 'target_pose', COMMAND)
        self.trajectory = self.create_publisher(MultiDOFJointTrajectory, 'trajectory', COMMAND)
        self.gripper = self.create_publisher(Float64, 'gripper_command', COMMAND)

    def clock_ns(self) -> int:
        """The newest value of /clock."""
        return time_ns(self.last('/clock').clock)

    def pose(self, stamp_ns: int) -> NDArray[np.float64]:
        """Where the arm was at a stamp."""
        return pose_from_message(self.stamped('current_pose', stamp_ns), ROBOT.base_frame)

    def reset(self) -> int:
        """Begin an episode; returns the stamp at which the first command is waited for."""
        self.last('joint_states')
        mark = len(self.stamps_ns('joint_states')) - 1
        response = self.call(Trigger, 'sim_robot_node/reset', Trigger.Request())
        assert response.success
        self.seed = int(response.message.removeprefix('seed '))

        def begun() -> int:
            stamps = self._stamps('joint_states')[mark:]
            return next((b for a, b in pairwise(stamps) if b - a > 2 * PERIOD_NS), 0)  # settling takes time

        start_ns = self.wait_for(begun, 'the first state of the episode')
        with self._condition:
            for topic in ('joint_states', 'current_pose', 'agentview/image_raw', 'wrist/image_raw'):
                messages = self._received[topic]
                messages[:] = [m for m in messages if time_ns(m.header.stamp) >= start_ns]
        self.stamped('joint_states', start_ns + PERIOD_NS)
        return start_ns + PERIOD_NS

    def send(self, pose: NDArray[np.float64], stamp_ns: int, frame: str = ROBOT.base_frame) -> None:
        """Command a pose for a stamp."""
        self.target.publish(pose_stamped(pose, frame, stamp_ns))

    def follow(
        self, start: NDArray[np.float64], direction_m: tuple[float, float, float], stamp_ns: int, steps: int
    ):
        """Command a straight line, one command for each step; returns the last pose reached and its stamp."""
        for step in range(1, steps + 1):
            goal = start.copy()
            goal[:3, 3] += np.array(direction_m) * step
            self.send(goal, stamp_ns)
            stamp_ns += PERIOD_NS
            self.stamped('joint_states', stamp_ns)
        return self.pose(stamp_ns), stamp_ns


@pytest.fixture(scope='module')
def node(tmp_path_factory) -> Iterator[NodeProcess]:
    parameters = {'seed': SEED, 'real_time_factor': 0.0, 'lockstep_timeout_s': 7.0}
    log = tmp_path_factory.mktemp('sim_robot_node') / 'sim_robot_node.log'
    with node_process('sim_robot_node', log, parameters) as process:
        yield process
    assert 'Traceback' not in process.output()


@pytest.fixture(scope='module')
def commander() -> Iterator[Commander]:
    commander = Commander()
    yield commander
    commander.close()


@pytest.fixture
def arm(node, commander) -> Commander:
    commander.wait_for_subscribers(commander.target, commander.trajectory, commander.gripper)
    return commander


def test_everything_of_one_moment_has_one_stamp(arm):
    stamp_ns = arm.reset()
    joints = joint_positions_from_message(arm.stamped('joint_states', stamp_ns), ROBOT.all_joint_names)
    pose = arm.pose(stamp_ns)
    np.testing.assert_allclose(Kinematics(ROBOT).forward(joints[:7]), pose, atol=1e-9)
    objects = arm.stamped('sim_robot_node/objects', stamp_ns)
    assert objects.header.frame_id == ROBOT.base_frame
    (cube,) = objects.poses  # half of its four centimetres above the table
    assert cube.position.z == pytest.approx(ROBOT.limits.workspace_m[0][2] + 0.02, abs=0.01)
    assert abs(cube.position.y) < 0.05
    for camera in ROBOT.cameras:
        image = arm.stamped(f'{camera}/image_raw', stamp_ns)
        assert image.header.frame_id == ROBOT.cameras[camera].frame
        pixels = image_to_array(image)
        assert pixels.shape == (84, 84, 3)
        assert pixels.std() > 10  # a scene, not a blank
    arm.wait_for(lambda: arm.clock_ns() == stamp_ns, 'the clock')


def test_time_waits_for_the_commander(arm):
    stamp_ns = arm.reset()
    start = arm.pose(stamp_ns)
    _, stamp_ns = arm.follow(start, (0.0, 0.0, 0.005), stamp_ns, 3)
    # No command for this stamp: the clock is repeated, and nothing else happens.
    clocks = len(arm.received('/clock'))
    arm.wait_for(lambda: len(arm.received('/clock')) > clocks + 5, 'the repeated clock')
    assert arm.clock_ns() == stamp_ns
    assert arm.stamps_ns('joint_states')[-1] == stamp_ns
    reached, end_ns = arm.follow(start, (0.0, 0.0, 0.01), stamp_ns, 10)
    assert end_ns == stamp_ns + 10 * PERIOD_NS
    assert arm.stamps_ns('joint_states') == list(range(end_ns - 14 * PERIOD_NS, end_ns + 1, PERIOD_NS))
    assert 0.05 < reached[2, 3] - start[2, 3] < 0.12  # it follows, some centimetres behind


def test_without_a_command_it_runs_on_after_the_timeout_and_holds(arm, node):
    stamp_ns = arm.reset()
    start = arm.pose(stamp_ns)
    _, stamp_ns = arm.follow(start, (0.0, 0.01, 0.0), stamp_ns, 5)
    held = arm.pose(stamp_ns)
    arm.stamped('joint_states', stamp_ns + 40 * PERIOD_NS)
    settled = arm.pose(stamp_ns + 40 * PERIOD_NS)
    np.testing.assert_allclose(settled[:3, 3], start[:3, 3] + [0.0, 0.05, 0.0], atol=0.01)
    assert np.linalg.norm(settled[:3, 3] - held[:3, 3]) < 0.06
    assert 'within 7.0 s: running on, holding the last one' in node.output()


def test_a_trajectory_is_followed_by_its_stamps(arm):
    stamp_ns = arm.reset()
    start = arm.pose(stamp_ns)
    poses = np.tile(start, (16, 1, 1))
    poses[:, 1, 3] -= 0.006 * np.arange(16)
    chunk = Chunk(action_from_pose(poses, -1.0), stamp_ns, 20.0)
    arm.trajectory.publish(trajectory_message(chunk, ROBOT))
    # It covers 14 periods: so many steps are taken without another word.
    arm.stamped('joint_states', chunk.end_stamp_ns + PERIOD_NS)
    assert arm.stamps_ns('joint_states')[-1] == chunk.end_stamp_ns + PERIOD_NS
    reached = arm.pose(chunk.end_stamp_ns + PERIOD_NS)
    assert -0.10 < reached[1, 3] - start[1, 3] < -0.05


def test_a_trajectory_without_a_stamp_starts_when_it_arrives(arm):
    stamp_ns = arm.reset()
    start = arm.pose(stamp_ns)
    poses = np.tile(start, (16, 1, 1))
    poses[:, 1, 3] -= 0.006 * np.arange(16)
    message = trajectory_message(Chunk(action_from_pose(poses, -1.0), stamp_ns, 20.0), ROBOT)
    message.header.stamp = time_message(0)
    arm.trajectory.publish(message)
    arm.stamped('joint_states', stamp_ns + 15 * PERIOD_NS)
    moved_m = [start[1, 3] - arm.pose(stamp_ns + i * PERIOD_NS)[1, 3] for i in (3, 8, 15)]
    # Along the waypoints, not straight to the last of them.
    assert moved_m[0] < 0.02
    assert moved_m[1] < 0.055
    assert 0.05 < moved_m[2] < 0.10


def test_the_gripper_takes_a_width_in_metres(arm):
    stamp_ns = arm.reset()
    start = arm.pose(stamp_ns)

    def width(stamp_ns: int) -> float:
        joints = joint_positions_from_message(
            arm.stamped('joint_states', stamp_ns), ROBOT.gripper.joint_names
        )
        return float(ROBOT.gripper.width(joints))

    assert width(stamp_ns) > 0.07
    arm.gripper.publish(Float64(data=0.0))
    _, stamp_ns = arm.follow(start, (0.0, 0.0, 0.0), stamp_ns, 12)
    assert width(stamp_ns) < 0.01
    arm.gripper.publish(Float64(data=0.08))
    _, stamp_ns = arm.follow(start, (0.0, 0.0, 0.0), stamp_ns, 12)
    assert width(stamp_ns) > 0.07


@pytest.mark.parametrize(
    ('spoil', 'reason'),
    [
        (lambda pose, stamp_ns: pose_stamped(pose, 'world', stamp_ns), "command in frame 'world', valid: 'panda_base'"),
        (lambda pose, stamp_ns: pose_stamped(pose, 'panda_base', stamp_ns - 30 * PERIOD_NS), 'before the reset at'),
        (lambda pose, stamp_ns: _with_x(pose_stamped(pose, 'panda_base', stamp_ns), float('nan')), 'must be finite'),
        (lambda pose, stamp_ns: _with_x(pose_stamped(pose, 'panda_base', stamp_ns), float('inf')), 'must be finite'),
    ],
)  # fmt: skip
def test_a_bad_command_is_refused_and_said(arm, node, spoil, reason):
    stamp_ns = arm.reset()
    start = arm.pose(stamp_ns)
    length = len(node.output())

    def said() -> bool:
        arm.target.publish(spoil(start, stamp_ns))  # again and again: the warning comes once a second at most
        return reason in node.output()[length:]

    arm.wait_for(said, f'a warning with {reason!r}')
    arm.wait_for(lambda: arm.clock_ns() == stamp_ns, 'the clock')
    assert arm.clock_ns() == stamp_ns  # it counts for nothing: the clock still waits


def _with_x(message: PoseStamped, x: float) -> PoseStamped:
    message.pose.position.x = x
    return message


def test_each_reset_is_the_next_seed_and_time_never_runs_back(arm):
    first_ns = arm.reset()
    seed = arm.seed
    image = image_to_array(arm.stamped('agentview/image_raw', first_ns))
    second_ns = arm.reset()
    assert arm.seed == seed + 1
    assert second_ns > first_ns
    assert not np.array_equal(image_to_array(arm.stamped('agentview/image_raw', second_ns)), image)
    stamps_ns = arm.stamps_ns('joint_states')
    assert stamps_ns == sorted(stamps_ns)


def test_every_documented_topic_parameter_and_service_is_there(arm):
    published = dict(arm.get_publisher_names_and_types_by_node('sim_robot_node', '/'))
    subscribed = dict(arm.get_subscriber_names_and_types_by_node('sim_robot_node', '/'))
    services = dict(arm.get_service_names_and_types_by_node('sim_robot_node', '/'))
    assert {
        '/joint_states': ['sensor_msgs/msg/JointState'],
        '/current_pose': ['geometry_msgs/msg/PoseStamped'],
        '/agentview/image_raw': ['sensor_msgs/msg/Image'],
        '/wrist/image_raw': ['sensor_msgs/msg/Image'],
        '/overview/image': ['sensor_msgs/msg/Image'],
        '/clock': ['rosgraph_msgs/msg/Clock'],
        '/sim_robot_node/success': ['std_msgs/msg/Bool'],
    }.items() <= published.items()
    assert {
        '/target_pose': ['geometry_msgs/msg/PoseStamped'],
        '/trajectory': ['trajectory_msgs/msg/MultiDOFJointTrajectory'],
        '/gripper_command': ['std_msgs/msg/Float64'],
    }.items() <= subscribed.items()
    assert services['/sim_robot_node/reset'] == ['std_srvs/srv/Trigger']
    described = arm.described_parameters('sim_robot_node')
    assert set(SimSettings.__dataclass_fields__) <= set(described)
    for name in SimSettings.__dataclass_fields__:
        assert described[name].description, name
        assert described[name].read_only, name


def test_the_expert_moves_the_arm_and_success_is_published(tmp_path):
    """Nobody commands here: the arm moves by itself, watched by a best-effort subscriber as a recorder is."""
    parameters = {'motion': 'lift_expert', 'real_time_factor': 0.0, 'publish_images': False}
    peer = Peer('alone')
    try:
        peer.record(JointState, 'joint_states', SENSOR)
        peer.record(Bool, 'sim_robot_node/success', LATCHED)
        with node_process('sim_robot_node', tmp_path / 'sim.log', parameters, 'alone') as process:
            peer.wait_for(lambda: any(m.data for m in peer.received('sim_robot_node/success')), 'success')
            peer.wait_for(lambda: not peer.received('sim_robot_node/success')[-1].data, 'the next episode')
            assert 'Traceback' not in process.output()
    finally:
        peer.close()
    joints = [joint_positions_from_message(m, ROBOT.all_joint_names) for m in peer.received('joint_states')]
    assert np.ptp(joints, axis=0)[:7].max() > 0.2


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['motion:=stack_expert'], "motion 'stack_expert' needs task 'stack', the simulated task is 'lift'"),
        (['task:=juggle'], "parameter task: 'juggle' is not one of 'can', 'detour', 'lift'"),
        (['robot:=pandora'], "no robot 'pandora'"),
    ],
)
def test_a_wrong_parameter_ends_it_with_one_clear_line(arguments, message):
    command = [sys.executable, '-m', 'decoupled_policy_ros.nodes.sim_robot_node', '--ros-args']
    result = subprocess.run(
        [*command, *(a for pair in arguments for a in ('-p', pair))],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 1
    assert message in result.stderr
    assert 'Traceback' not in result.stderr
