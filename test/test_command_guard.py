"""The guard over DDS: an operator and the shipped policy, and every command looked at."""

import signal
from collections.abc import Iterator

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from limits_checker import LimitsChecker
from rclpy.clock_type import ClockType
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from ros_harness import NodeProcess, Peer, PolicyPeer, node_process
from sensor_msgs.msg import JointState
from std_srvs.srv import SetBool, Trigger

from decoupled_policy_ros.nodes.command_guard_node import CommandGuardNode
from decoupled_policy_ros.nodes.common import (
    LATCHED,
    SENSOR,
    STATE,
    floats,
    pose_stamped,
    time_message,
    time_ns,
)
from decoupled_policy_ros.nodes.joint_states import JointStates
from decoupled_policy_ros.nodes.policy_node import PolicyNode
from decoupled_policy_ros.observation.messages import pose_from_message
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.inverse import InverseKinematics
from decoupled_policy_ros.robot.kinematics import Kinematics

pytestmark = pytest.mark.process

ROBOT = load_robot('panda_sim')
HOME = Kinematics(ROBOT).forward(ROBOT.home_rad)
NODE = 'command_guard_node'
START_NS = 1_000_000_000_000


class Cell(Peer):
    """An arm that follows what it is told, and somebody who wants it elsewhere."""

    def __init__(self, namespace: str) -> None:
        super().__init__(namespace)
        self.record(PoseStamped, 'target_pose')
        self.record(DiagnosticStatus, f'{NODE}/status', LATCHED)
        self._inverse = InverseKinematics(ROBOT)
        self._joints_rad = ROBOT.home_rad.copy()
        self._states = self.create_publisher(JointState, 'joint_states', STATE)
        # By best effort, as a headset's driver may; that is heard by whoever subscribes in the same way only.
        self._targets = self.create_publisher(PoseStamped, 'target_pose_in', SENSOR)
        self.alive, self.offset_m, self.step_m = False, 0.0, 0.0
        self.frame, self.bad, self.asking = ROBOT.base_frame, False, False
        self.timer = self.create_timer(0.02, self._turn)

    def _turn(self) -> None:
        now = self.get_clock().now().nanoseconds
        if self.alive:
            told = self.received('target_pose')[-1:]
            if told:
                pose = pose_from_message(told[0], ROBOT.base_frame)
                self._joints_rad = self._inverse.solve(pose, self._joints_rad).joints_rad
            message = JointState(name=list(ROBOT.joint_names), position=floats(self._joints_rad))
            message.header.stamp = time_message(now)
            self._states.publish(message)
        if self.asking:
            self.offset_m += self.step_m
            pose = HOME.copy()
            pose[0, 3] += self.offset_m
            target = pose_stamped(pose, self.frame, now)
            if self.bad:
                target.pose.position.y = float('nan')
            self._targets.publish(target)

    def status(self, state: str, text: str = '') -> DiagnosticStatus:
        """Wait until the node's status begins with a state and contains a text."""

        def found() -> DiagnosticStatus | None:
            last = self.received(f'{NODE}/status')[-1:]
            return last[0] if last and last[0].message.startswith(state) and text in last[0].message else None

        return self.wait_for(found, f'status {state!r} with {text!r}')

    def values(self, key: str) -> str:
        """Wait for a value of the status."""

        def found() -> str:
            last = self.received(f'{NODE}/status')[-1:]
            return next((pair.value for pair in last[0].values if pair.key == key), '') if last else ''

        return str(self.wait_for(found, f'{key} in the status'))

    def enable(self, enabled: bool) -> None:
        assert self.call(SetBool, f'{NODE}/enable', SetBool.Request(data=enabled)).success


def last_step_m(cell: Cell) -> float:
    """Between the last two commands, 20 ms apart."""
    before, last = (pose_from_message(m)[:3, 3] for m in cell.received('target_pose')[-2:])
    return float(np.linalg.norm(last - before))


@pytest.fixture
def node(tmp_path) -> Iterator[NodeProcess]:
    parameters = {'target_timeout_s': 0.5}
    with node_process(NODE, tmp_path / 'node.log', parameters, 'cell') as process:
        yield process
    assert 'Traceback' not in process.output()


@pytest.fixture
def cell() -> Iterator[Cell]:
    cell = Cell('cell')
    yield cell
    cell.timer.cancel()
    cell.alive = cell.asking = False
    cell.close()


def test_joint_states_of_a_clock_that_is_ahead_are_known_when_their_time_has_come():
    joints = JointStates(ROBOT, max_age_s=0.2)
    message = JointState(name=list(ROBOT.joint_names), position=floats(ROBOT.home_rad))
    for now_ns in range(START_NS, START_NS + 500_000_000, 1_000_000):  # at 1 kHz
        message.header.stamp = time_message(now_ns + 150_000_000)
        joints.take(message)
    assert joints.at(now_ns)[0] == now_ns
    np.testing.assert_array_equal(joints.positions(now_ns), ROBOT.home_rad)


def test_a_person_is_followed_inside_the_limits_and_held_on_each_fault(node, cell):
    cell.status('waiting', 'no target yet')
    cell.step_m, cell.asking = 0.002, True
    cell.status('waiting', 'joint_state: no joint state on joint_states')
    assert not cell.received('target_pose')
    cell.offset_m, cell.alive = 0.0, True
    cell.status('following')
    cell.wait_for(lambda: len(cell.received('target_pose')) > 20, 'commands')
    cell.step_m, cell.frame = 0.0, 'kitchen'
    cell.status('holding', f"frame 'kitchen', expected '{ROBOT.base_frame}'")
    cell.frame = ROBOT.base_frame
    cell.status('following')
    cell.bad = True
    cell.status('holding', 'it must be finite')
    cell.bad = False
    cell.status('following')
    cell.offset_m += 5.0  # clamped to the workspace, and still a jump
    cell.status('holding', 'join at waypoint 0')
    cell.offset_m -= 5.0
    cell.status('following')
    for _ in range(5):  # where the machine stands still, the joint state may be too old before the target is
        cell.asking = False
        if 'stale' in cell.status('holding').message:
            break
        cell.asking = True
        cell.status('following')
    held = [pose_from_message(m) for m in cell.received('target_pose')[-3:]]
    np.testing.assert_allclose(held[0], held[-1], atol=1e-3)
    cell.asking = True
    cell.status('following')
    cell.alive = False
    cell.status('holding', 'joint_state: the joint state is')
    cell.alive = True
    cell.status('following')
    cell.enable(False)
    cell.status('disabled')
    cell.enable(True)
    cell.step_m = -0.002
    cell.status('following')
    cell.wait_for(lambda: last_step_m(cell) > 0.001, 'motion')
    for _ in range(2):  # as Ctrl-C comes under ros2 launch
        node.process.send_signal(signal.SIGINT)
    assert node.stop() == 0
    cell.wait_for(lambda: last_step_m(cell) < 1e-4, 'the way to rest')
    for rule in ('frame', 'finite', 'join', 'stale', 'joint_state'):
        assert int(cell.values(f'guard_reject_{rule}')) >= 1
    assert int(cell.values('guard_clamp_workspace')) >= 1
    checker = LimitsChecker.of(ROBOT.limits)
    for command in cell.received('target_pose'):
        checker.add(time_ns(command.header.stamp), pose_from_message(command, ROBOT.base_frame))
    checker.require_none()
    assert checker.largest['linear_m_s'] > 0.01  # it has moved


def test_settings_that_make_no_sense_end_it_with_one_line(tmp_path):
    file = tmp_path / 'guard.yaml'
    file.write_text('limit_scale: 2.0\n')
    process = NodeProcess(NODE, tmp_path / 'node.log', {'guard_file': str(file)}, '')
    assert process.process.wait(60) == 1
    assert 'guard: limit_scale must be in (0, 1], got 2.0' in process.output()
    assert 'Traceback' not in process.output()


def test_policy_node_reads_the_same_file_and_refuses_the_same(rclpy_context, tmp_path):
    file = tmp_path / 'guard.yaml'
    file.write_text('limit_scale: fast\n')
    values = {'task': 'lift', 'denoising_steps': 2, 'guard_file': str(file)}
    overrides = [Parameter(name, value=value) for name, value in values.items()]
    node = PolicyNode(context=rclpy_context, parameter_overrides=overrides)
    try:
        assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
        file.write_text('limit_scale: 0.5\n')
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    finally:
        node.destroy_node()


@pytest.mark.sim
def test_the_shipped_policy_keeps_the_limits_in_the_node(tmp_path):
    """Simulator and policy_node with its guard, in lockstep: a simulated second of Lift."""
    peer = PolicyPeer()
    policy = {
        'task': 'lift', 'use_sim_time': True, 'lockstep': True, 'enabled': False, 'autostart': True,
        'denoising_steps': 4,
    }  # fmt: skip
    simulator = {'real_time_factor': 0.0, 'lockstep_timeout_s': 120.0}
    try:
        with (
            node_process('sim_robot_node', tmp_path / 'sim.log', simulator),
            node_process('policy_node', tmp_path / 'policy.log', policy) as node,
        ):
            peer.status('disabled', 'no commands')
            assert peer.call(Trigger, 'sim_robot_node/reset', Trigger.Request()).success
            assert peer.call(SetBool, 'policy_node/enable', SetBool.Request(data=True)).success
            peer.wait_for(lambda: len(peer.received('target_pose')) >= 24, 'commands')
            values = peer.diagnostics('policy')
            assert 'Traceback' not in node.output()
    finally:
        peer.close()
    assert int(values['guard_checked']) >= 3
    assert float(values['latency_guard_p50_ms']) > 0.0
    checker = LimitsChecker.of(ROBOT.limits)
    for command in peer.received('target_pose'):
        checker.add(time_ns(command.header.stamp), pose_from_message(command, ROBOT.base_frame))
    checker.require_none()
    assert checker.largest['linear_m_s'] > 0.02


@pytest.mark.parametrize('sim_time', [False, True])
def test_a_wall_clock_that_is_set_back_does_not_silence_it(rclpy_context, sim_time):
    """A timer of the node's own clock would wait until that has caught up."""
    overrides = [Parameter('use_sim_time', value=sim_time)]
    node = CommandGuardNode(context=rclpy_context, parameter_overrides=overrides)
    try:
        kinds = {timer.clock.clock_type for timer in node.timers}
        assert kinds == ({ClockType.STEADY_TIME, ClockType.ROS_TIME} if sim_time else {ClockType.STEADY_TIME})
    finally:
        node.destroy_node()


def test_a_target_in_another_name_of_the_base_frame_is_accepted(rclpy_context):
    node = CommandGuardNode(context=rclpy_context, parameter_overrides=[Parameter('robot', value='fr3')])
    try:
        now_ns = node.get_clock().now().nanoseconds
        for frame in ('fr3_link0', 'base'):
            assert node._unusable(pose_stamped(HOME, frame, now_ns), now_ns) is None
        found = node._unusable(pose_stamped(HOME, 'fr3_hand_tcp', now_ns), now_ns)
        assert str(found) == "frame: frame 'fr3_hand_tcp', expected 'fr3_link0' or 'base' (reject)"
    finally:
        node.destroy_node()


def test_disabled_it_comes_to_rest_and_forgets_where_that_was(rclpy_context, monkeypatch):
    """Whoever moves the arm by hand meanwhile finds it where they left it."""
    node = CommandGuardNode(context=rclpy_context)
    said, now_ns = [], [START_NS]
    monkeypatch.setattr(node, '_now_ns', lambda: now_ns[0])
    monkeypatch.setattr(node._commands, 'publish_pose', lambda pose, stamp_ns: said.append(pose))
    inverse, joints_rad = InverseKinematics(ROBOT), ROBOT.home_rad

    def turn(target: np.ndarray | None) -> None:
        now_ns[0] += 20_000_000
        message = JointState(name=list(ROBOT.joint_names), position=floats(joints_rad))
        message.header.stamp = time_message(now_ns[0])
        node._joints.take(message)
        if target is not None:
            node._on_target(pose_stamped(target, ROBOT.base_frame, now_ns[0]))
        node._tick()

    def enable(enabled: bool) -> None:
        node._on_enable(SetBool.Request(data=enabled), SetBool.Response())

    try:
        target, elsewhere = HOME.copy(), HOME.copy()
        for _ in range(20):
            target[0, 3] += 0.005
            turn(target)
            joints_rad = inverse.solve(said[-1], joints_rad).joints_rad
        assert node._state == 'following'
        enable(False)
        moving = len(said)
        for _ in range(20):
            turn(target)
        stop = said[moving:]
        assert 1 < len(stop) < 10  # the way to rest, and nothing after it
        assert np.linalg.norm(stop[-1][:3, 3] - stop[-2][:3, 3]) < 1e-3 and not node.follower.started
        elsewhere[1, 3] += 0.2
        joints_rad = inverse.solve(elsewhere, joints_rad).joints_rad
        enable(True)
        turn(None)
        turn(target)
        assert node._message().message.startswith('waiting: join at waypoint 0: 0.2')
        assert said[moving:] == stop
        turn(elsewhere)
        assert node._state == 'following'
        np.testing.assert_allclose(said[-1], elsewhere, atol=1e-3)
    finally:
        node.destroy_node()
