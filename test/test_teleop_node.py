"""teleop_node as a process, over real DDS: gamepad, SpaceMouse, leader pose and keyboard, arms real and simulated."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped, Twist
from rclpy.node import Node
from ros_harness import TIMEOUT_S, NodeProcess, Peer, node_process
from sensor_msgs.msg import JointState, Joy
from std_msgs.msg import Float64
from std_srvs.srv import SetBool

from decoupled_policy_ros.nodes.common import COMMAND, LATCHED, STATE, pose_stamped, time_message
from decoupled_policy_ros.nodes.teleop_inputs import ArmInput
from decoupled_policy_ros.observation.messages import pose_from_message
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics

pytestmark = pytest.mark.process

ROBOT = load_robot('panda_sim')
HOME = Kinematics(ROBOT).forward(ROBOT.home_rad)
DEADMAN, GRIP, START = 5, 0, 7
#: A busy machine may keep the arm of these tests silent for longer than the node allows; this long it doesn't.
STATE_TIMEOUT_S = 5.0


class BlockedArm(Peer):
    """An arm that says where it is and never moves, and an operator's device beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.record(PoseStamped, 'target_pose', COMMAND)
        self.record(Float64, 'gripper_command', COMMAND)
        self.record(DiagnosticStatus, 'teleop_node/status', LATCHED)
        self.record(DiagnosticArray, '/diagnostics')
        self.joints = self.create_publisher(JointState, 'joint_states', STATE)
        self.joy = self.create_publisher(Joy, 'joy', STATE)
        self.talks = self.is_there = False
        self.say: Callable[[], None] = lambda: None
        self.create_timer(0.02, self._talk)

    def _talk(self) -> None:
        if self.is_there:
            fingers = 0.04 * np.array(ROBOT.gripper.joint_signs)
            message = JointState(name=list(ROBOT.all_joint_names), position=[*ROBOT.home_rad, *fingers])
            message.header.stamp = self.get_clock().now().to_msg()
            self.joints.publish(message)
        if self.talks:
            self.say()

    def hold(self, axes: dict[int, float], *buttons: int, count: int = 11) -> None:
        """Say these axes and buttons from now on."""
        values = [axes.get(i, 1.0 if i in (2, 5) else 0.0) for i in range(8)]
        message = Joy(axes=values, buttons=[int(i in buttons) for i in range(count)])
        self.say = lambda: self.joy.publish(message)
        self.talks = True

    def state(self) -> str:
        """The newest status line."""
        return (
            self._received['teleop_node/status'][-1].message if self._received['teleop_node/status'] else ''
        )

    def wait_state(self, state: str, text: str = '') -> None:
        """Wait for a status that begins with a state and contains a text."""
        self.wait_for(lambda: self.state().startswith(state) and text in self.state(), f'{state} {text}')

    def engage(self, axes: dict[int, float]) -> None:
        """Press the deadman, after it was seen released, and hold the sticks."""
        self.is_there = True
        self.hold({})
        self.wait_state('ready', 'deadman released')
        self.hold(axes, DEADMAN)
        self.wait_state('moving')

    def targets(self) -> np.ndarray:
        """Positions (n, 3) of the target so far."""
        return np.array([pose_from_message(message)[:3, 3] for message in self.received('target_pose')])

    def wait_targets(self, more: int) -> np.ndarray:
        """Wait for so many more targets; returns their positions."""
        before = len(self.received('target_pose'))
        self.wait_for(lambda: len(self._received['target_pose']) >= before + more, 'targets')
        return self.targets()[before:]

    def values(self) -> dict[str, str]:
        """Values of the newest diagnostics."""
        arrays = self.received('/diagnostics')
        statuses = [s for array in arrays for s in array.status if s.name.startswith('teleop_node')]
        return {pair.key: pair.value for pair in statuses[-1].values} if statuses else {}


@pytest.fixture
def arm():
    with contextlib.closing(BlockedArm()) as arm:
        time.sleep(1.0)  # until what is there has been discovered
        # Nodes of earlier tests that were killed are in the graph for a while, and count as others who command.
        arm.wait_for(lambda: arm.count_publishers('target_pose') == 0, 'the end of earlier nodes')
        yield arm


@pytest.fixture
def teleop(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(**parameters) -> NodeProcess:
            parameters = {'state_timeout_s': STATE_TIMEOUT_S, **parameters}
            return stack.enter_context(node_process('teleop_node', tmp_path / 'teleop.log', parameters))

        yield start


def test_a_gamepad_moves_the_target_and_its_silence_stops_it(arm, teleop):
    node = teleop(recorder='nobody')
    arm.hold({1: 1.0}, DEADMAN)
    arm.wait_state('waiting', 'nothing on joint_states or current_pose')
    assert arm.received('target_pose') == []
    arm.engage({1: 1.0})
    first = arm.last('target_pose')
    assert first.header.frame_id == ROBOT.base_frame
    np.testing.assert_allclose(arm.targets()[0], HOME[:3, 3], atol=1e-9)  # by forward kinematics
    # The arm is blocked: the target goes ahead of it so far and no further.
    arm.wait_for(lambda: 'the arm does not keep up' in arm.state(), 'a target that waits for the arm')
    arm.wait_for(lambda: arm.targets()[-1, 0] - HOME[0, 3] > 0.099, 'the lead')
    assert arm.targets()[:, 0].max() - HOME[0, 3] <= 0.1 + 1e-9
    # The device falls silent in the middle of a movement: commands go on, the target stands.
    arm.hold({1: -0.5}, DEADMAN)
    arm.wait_for(lambda: arm.targets()[-1, 0] - HOME[0, 3] < 0.08, 'the way back')
    arm.talks = False
    arm.wait_state('holding', 'joy is silent for')
    arm.wait_targets(20)
    held = arm.wait_targets(20)
    np.testing.assert_array_equal(held, np.tile(held[0], (len(held), 1)))
    stamps = arm.stamps_ns('target_pose')
    assert np.all(np.diff(stamps) > 0)
    # A gripper's button under the deadman, and a recorder that is not there.
    arm.hold({}, DEADMAN)
    arm.wait_state('moving')
    arm.hold({}, DEADMAN, GRIP, START)
    arm.wait_for(lambda: [m.data for m in arm._received['gripper_command']] == [0.08, 0.0], 'the gripper')
    arm.wait_for(lambda: 'start not done: no episode recorder at' in node.output(), 'the missing recorder')
    arm.wait_targets(5)
    # Messages of another device are refused, and count as silence.
    arm.hold({}, DEADMAN, count=4)
    arm.wait_state('holding', 'joy is silent for')
    arm.wait_for(lambda: int(arm.values().get('refused', 0)) > 0, 'refusals')
    assert arm.values()['last_refusal'] == 'joy: Joy message has 4 buttons, gamepad.yaml needs at least 11'


def test_a_stale_state_ends_the_commands_and_so_does_enable(arm, teleop):
    node = teleop()
    arm.engage({})
    arm.is_there = False
    arm.wait_state('waiting', "the arm's state is")
    commands = len(arm.received('target_pose'))
    arm.is_there = True
    arm.wait_state('ready', 'release the deadman first')
    assert len(arm.received('target_pose')) == commands
    assert "waiting: the arm's state is" in node.output()
    arm.engage({})
    response = arm.call(SetBool, 'teleop_node/enable', SetBool.Request(data=False))
    assert response.success and response.message == 'disabled'
    arm.wait_state('disabled')
    commands = len(arm.received('target_pose'))
    arm.wait_for(lambda: arm.values().get('state') == 'disabled', 'diagnostics')
    assert len(arm.received('target_pose')) == commands
    assert arm.call(SetBool, 'teleop_node/enable', SetBool.Request(data=True)).success
    arm.wait_state('ready')


@pytest.mark.parametrize('end', ['enable', 'signal'])
def test_commands_that_end_in_the_middle_of_a_motion_bring_the_target_to_rest(arm, teleop, end):
    node = teleop()
    arm.engage({1: 1.0})
    arm.wait_for(lambda: len(arm.targets()) and arm.targets()[-1, 0] > HOME[0, 3] + 0.03, 'a motion')
    if end == 'enable':
        assert arm.call(SetBool, 'teleop_node/enable', SetBool.Request(data=False)).message == 'holding'
        arm.wait_state('disabled')
    else:
        assert node.stop() == 0
        time.sleep(0.2)
    targets = arm.targets()
    times_s = np.array(arm.stamps_ns('target_pose')) * 1e-9
    speeds_m_s = np.diff(targets[:, 0]) / np.diff(times_s)
    changes_m_s2 = np.diff(speeds_m_s) / np.diff(times_s)[1:]
    assert speeds_m_s.max() > 0.1 and speeds_m_s[-1] < 0.05  # its last step is the last one of coming to rest
    assert np.abs(changes_m_s2[-10:]).max() < 2.0  # 1 m/s2, and a tick that is late


def test_a_spacemouse_by_its_twists(arm, teleop):
    teleop(device='twist')
    twists = arm.create_publisher(Twist, 'spacenav/twist', STATE)
    message = Twist()
    arm.say, arm.talks, arm.is_there = lambda: twists.publish(message), True, True
    arm.wait_state('ready', 'no deflection')
    message.linear.z = 1.0
    arm.wait_state('moving')
    arm.wait_for(lambda: len(arm.targets()) and arm.targets()[-1, 2] > HOME[2, 3] + 0.03, 'the way up')
    message.linear.z = 0.0
    arm.wait_state('holding', 'no deflection')


def test_a_leader_pose_with_its_clutch(arm, teleop):
    node = teleop(device='leader_pose')
    poses = arm.create_publisher(PoseStamped, 'leader_pose', STATE)
    leader = np.eye(4)
    leader[:3, 3] = [5.0, 5.0, 5.0]
    goal_m = np.array([0.0, 0.06, 0.0])
    clutch, moves, stamped = [False], [False], [True]

    def say():
        if moves[0]:
            leader[:3, 3] += np.clip(goal_m + 5.0 - leader[:3, 3], -0.005, 0.005)
        stamp_ns = arm.get_clock().now().nanoseconds if stamped[0] else 0
        poses.publish(pose_stamped(leader, 'vr', stamp_ns))
        arm.joy.publish(Joy(buttons=[int(clutch[0]), *[0] * 6]))

    arm.say, arm.talks, arm.is_there = say, True, True
    arm.wait_state('ready', 'clutch released')
    clutch[0] = True
    arm.wait_state('moving')
    np.testing.assert_allclose(arm.targets()[0], HOME[:3, 3], atol=1e-9)
    moves[0] = True
    arm.wait_for(
        lambda: np.linalg.norm(arm.targets()[-1] - HOME[:3, 3] - goal_m) < 0.002, "the leader's motion"
    )
    stamped[0] = False
    arm.wait_state('holding', 'leader_pose is silent')
    assert 'a zero stamp is no stamp' in node.output()


# --- keyboard -----------------------------------------------------------------------------------


class Typist:
    """teleop_node in a terminal, typed at."""

    def __init__(self, **parameters):
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        pairs = [argument for name, value in parameters.items() for argument in ('-p', f'{name}:={value}')]
        command = [sys.executable, '-m', 'decoupled_policy_ros.nodes.teleop_node', '--ros-args', *pairs]
        self.process = subprocess.Popen(command, stdin=self.slave, stdout=self.slave, stderr=self.slave)
        self.shown = b''
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        with contextlib.suppress(OSError):
            while data := os.read(self.master, 4096):
                self.shown += data

    def type(self, keys: str):
        os.write(self.master, keys.encode())

    def settings_are_back(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for fd in (self.master, self.slave):
            os.close(fd)


@pytest.fixture
def typist():
    typist = Typist(device='keyboard', recorder='nobody', state_timeout_s=STATE_TIMEOUT_S)
    yield typist
    typist.close()


def test_keys_move_the_arm_and_the_terminal_is_given_back(arm, typist):
    arm.is_there = True
    arm.wait_state('ready', 'no key')
    assert not typist.settings_are_back()  # keys come at once, without echo

    def typed(keys: str, moved: Callable[[], bool]) -> None:
        """Hold a key down until something has moved."""

        def repeated() -> bool:
            typist.type(keys)
            return moved()

        arm.wait_for(repeated, f'what {keys!r} does')

    typed('w', lambda: len(arm.targets()) and arm.targets()[-1, 0] > HOME[0, 3] + 0.02)
    typed('\x1b[5~', lambda: arm.targets()[-1, 2] > HOME[2, 3] + 0.02)  # page up
    arm.wait_state('holding', 'no key')
    arm.wait_targets(10)
    held = arm.wait_targets(10)
    np.testing.assert_array_equal(held, np.tile(held[0], (len(held), 1)))
    typist.type('g1h')
    arm.wait_for(lambda: [m.data for m in arm._received['gripper_command']] == [0.08, 0.0], 'the gripper')
    arm.wait_for(lambda: b'start not done: no episode recorder' in typist.shown, 'the missing recorder')
    arm.wait_for(lambda: b'gripper closed' in typist.shown, 'the status line')
    assert b"no episode recorder 'nobody'" in typist.shown
    assert b'hold a key to move, let go to stop' in typist.shown
    typist.type('\x1b')
    assert typist.process.wait(TIMEOUT_S) == 0
    assert typist.settings_are_back()


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_the_terminal_back_too(typist, how):
    deadline = time.monotonic() + TIMEOUT_S
    while b'no key' not in typist.shown and b'waiting' not in typist.shown:
        assert time.monotonic() < deadline and typist.process.poll() is None
        time.sleep(0.05)
    assert not typist.settings_are_back()
    typist.process.send_signal(how)
    assert typist.process.wait(TIMEOUT_S) == 0
    assert typist.settings_are_back()


@pytest.mark.parametrize(
    ('parameters', 'reason'),
    [
        ({'device': 'keyboard'}, 'device keyboard needs a terminal, and standard input is none'),
        ({'device': 'mouse'}, "'mouse' is not one of 'joy', 'twist'"),
        ({'lockstep': True}, 'lockstep is for simulated time: set use_sim_time too'),
    ],
)
def test_what_can_not_be_is_said_in_one_line(tmp_path, parameters, reason):
    node = NodeProcess('teleop_node', tmp_path / 'teleop.log', parameters)
    assert node.process.wait(TIMEOUT_S) == 1
    assert reason in node.output()
    assert 'Traceback' not in node.output()


def test_a_pose_that_falls_silent_is_replaced_by_kinematics_before_it_is_too_old(rclpy_context):
    node = Node('listener', context=rclpy_context)
    try:
        arm = ArmInput(node, ROBOT, True, 0.3)
        names, home_rad = list(ROBOT.joint_names), ROBOT.home_rad.tolist()
        pose = pose_stamped(HOME, ROBOT.base_frame, 1)
        for now_ms in range(5, 1000, 5):  # current_pose is heard once, joint states go on
            joints = JointState(name=names, position=home_rad)
            joints.header.stamp = time_message(now_ms * 10**6)
            if now_ms == 5:
                pose.header.stamp = joints.header.stamp
                arm._on_pose(pose)
            arm._on_joints(joints)
            assert now_ms * 10**6 - arm.state().stamp_ns <= 0.15e9
        np.testing.assert_allclose(arm.state().pose_base_ee, HOME, atol=1e-9)
    finally:
        node.destroy_node()
