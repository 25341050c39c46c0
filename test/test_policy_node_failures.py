"""What policy_node makes of a broken picture, a camera that stops, a middleware that fails, a missing library."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.srv import ChangeState
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.time import Time
from ros_harness import TIMEOUT_S, PolicyPeer, node_process
from sensor_msgs.msg import CompressedImage, JointState
from std_srvs.srv import SetBool
from test_messages import png_of_size
from untrained import save_untrained_policy

from decoupled_policy_ros.nodes.common import STATE, floats, time_message
from decoupled_policy_ros.nodes.policy_node import PolicyNode
from decoupled_policy_ros.robot.description import load_robot, robot_file
from decoupled_policy_ros.runtime.guard.settings import JOINT_RULES
from decoupled_policy_ros.runtime.states import DISABLED, FAILED, FOLLOWING, GAVE_WAY, NEEDS_HELP

pytestmark = [
    pytest.mark.process,
    pytest.mark.unguarded('an untrained policy, which a guard would refuse to follow'),
]

ROBOT = load_robot('panda_sim')
CAMERAS = ('agentview', 'wrist')
REST = np.append(ROBOT.home_rad, [0.04, -0.04])
SHUTDOWN_INACTIVE = 6


@pytest.fixture(scope='module')
def task_folder(tmp_path_factory) -> Path:
    return save_untrained_policy(tmp_path_factory.mktemp('models'))


class CompressedRobot(PolicyPeer):
    """A robot at rest with cameras that send PNG, at 20 Hz in real time; `silent` and `broken` name cameras."""

    def __init__(self) -> None:
        super().__init__()
        self.joints = self.create_publisher(JointState, 'joint_states', STATE)
        self.images = {n: self.create_publisher(CompressedImage, f'{n}/image_raw', STATE) for n in CAMERAS}
        pixels = np.random.default_rng(0).integers(0, 256, (84, 84, 3), dtype=np.uint8)
        self.png = cv2.imencode('.png', pixels)[1].tobytes()
        self.silent: set[str] = set()
        self.broken: set[str] = set()
        self.create_timer(0.05, self.show)

    def show(self) -> None:
        stamp = time_message(self.get_clock().now().nanoseconds)
        joints = JointState(name=list(ROBOT.all_joint_names), position=floats(REST))
        joints.header.stamp = stamp
        self.joints.publish(joints)
        for name in CAMERAS:
            if name not in self.silent:
                message = CompressedImage(format='png')
                message.data = png_of_size(100_000, 100_000) if name in self.broken else self.png
                message.header.stamp = stamp
                self.images[name].publish(message)
        self.broken.clear()

    def report(self, part: str) -> list[DiagnosticStatus]:
        """Every diagnostic status of 'policy' or 'streams' so far."""
        arrays: list[DiagnosticArray] = self.received('/diagnostics')
        return [s for array in arrays for s in array.status if s.name == f'policy_node: {part}']

    def wait_for_report(self, part: str, level: bytes, text: str) -> DiagnosticStatus:
        """Wait for a new diagnostic status of a level with a text."""
        self.forget()
        return self.wait_for(
            lambda: next((s for s in self.report(part) if s.level == level and text in s.message), None),
            f'{part} with {text!r}; the last were {[s.message for s in self.report(part)[-3:]]}',
        )


@pytest.fixture
def robot() -> Iterator[CompressedRobot]:
    robot = CompressedRobot()
    yield robot
    robot.close()


def test_compressed_pictures_broken_ones_and_none(robot, task_folder, tmp_path):
    description = yaml.safe_load(robot_file('panda_sim').read_text())
    for camera in description['cameras'].values():
        camera['compressed'] = True
    file = tmp_path / 'compressed.yaml'
    file.write_text(yaml.safe_dump(description))
    parameters = {
        'robot': str(file),
        'task': str(task_folder),
        'autostart': True,
        'denoising_steps': 2,
        'guard': False,
    }
    with node_process('policy_node', tmp_path / 'policy_node.log', parameters) as process:
        robot.wait_for(lambda: len(robot.received('target_pose')) > 20, 'commands from compressed pictures')
        robot.wait_for_report('streams', DiagnosticStatus.OK, 'receiving')

        robot.broken = {'agentview'}
        robot.wait_for(lambda: 'agentview/image_raw: refused: compressed' in process.output(), 'the refusal')
        values = robot.diagnostics('streams')
        assert int(values['agentview_refused']) == 1
        assert "can't be decoded" in values['agentview_last_refusal']
        robot.forget()
        robot.wait_for(lambda: len(robot.received('target_pose')) > 20, 'commands after a broken picture')

        robot.silent = {'wrist'}
        status = robot.wait_for_report('streams', DiagnosticStatus.WARN, 'wrist is ')
        assert status.message.endswith('s old, limit 0.2 s')
        assert robot.status('holding', "stream 'wrist' is")

        assert robot.change_state('deactivate')
        assert robot.status('disabled') == 'disabled: inactive'
        robot.wait_for_report('policy', DiagnosticStatus.OK, 'disabled: inactive')
        robot.forget()
        request = ChangeState.Request()
        request.transition.id = SHUTDOWN_INACTIVE
        assert robot.call(ChangeState, 'policy_node/change_state', request).success
        assert robot.status('disabled') == 'disabled: finalized'
        assert process.process.poll() is None
        assert 'Traceback' not in process.output()


def test_after_a_failure_enable_says_what_to_do(rclpy_context, task_folder):
    overrides = {'task': str(task_folder), 'denoising_steps': 2, 'guard': False}
    node = PolicyNode(
        context=rclpy_context, parameter_overrides=[Parameter(name, value=v) for name, v in overrides.items()]
    )
    try:
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        assert enable(node, True).success
        show_until(node, FOLLOWING)
        for publisher in node.outputs._publishers:
            publisher.handle.destroy_when_not_in_use()  # the middleware takes nothing any more
        show_until(node, FAILED)
        for wanted in (True, False):
            answer = enable(node, wanted)
            assert not answer.success
            assert answer.message.startswith('failed: InvalidHandle')
            assert answer.message.endswith('; deactivate and activate to start again')
        assert node.loop.report()[0] == FAILED
    finally:
        node.destroy_node()


class NodeInThePast(PolicyNode):
    """Its wall clock can be set back."""

    set_back_ns = 0

    def _now_ns(self) -> int:
        return super()._now_ns() - self.set_back_ns


def test_a_wall_clock_that_was_set_back_is_a_fresh_start_for_the_guard_too(
    rclpy_context, task_folder, tmp_path
):
    checks = tmp_path / 'guard.yaml'  # an untrained network points anywhere: what is left slows it down
    ignored = sorted(JOINT_RULES | {'join', 'workspace'})
    checks.write_text(yaml.safe_dump({'ignored_rules': ignored, 'max_time_scale': 1e3}))
    overrides = {'task': str(task_folder), 'denoising_steps': 2, 'guard_file': str(checks)}
    node = NodeInThePast(
        context=rclpy_context, parameter_overrides=[Parameter(name, value=v) for name, v in overrides.items()]
    )
    try:
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        show_until(node, FOLLOWING)
        node.set_back_ns = 3_600_000_000_000
        deadline = time.monotonic() + TIMEOUT_S
        while (chunk := node.loop._commander.chunk) is None or chunk.observation_stamp_ns > node._now_ns():
            assert time.monotonic() < deadline, node.loop.report()
            show(node)
        show_until(node, FOLLOWING)
    finally:
        node.destroy_node()


def test_a_configure_that_fails_leaves_no_subscription_behind(rclpy_context, task_folder):
    overrides = {
        'task': str(task_folder),
        'guard': False,
        'samples': 2,
        'spread_slow_m': 0.2,
        'spread_hold_m': 0.1,
    }
    node = PolicyNode(
        context=rclpy_context, parameter_overrides=[Parameter(name, value=v) for name, v in overrides.items()]
    )
    try:
        before = {subscription.topic_name for subscription in node.subscriptions}
        assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
        assert {subscription.topic_name for subscription in node.subscriptions} == before
        node.set_parameters([Parameter('spread_hold_m', value=0.3)])
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        assert len(list(node.subscriptions)) == len(before) + len(node.inputs.streams)
    finally:
        node.destroy_node()


def test_what_is_none_of_a_parameters_choices_is_refused_at_once(rclpy_context):
    node = PolicyNode(context=rclpy_context)
    try:
        (result,) = node.set_parameters([Parameter('output', value='pse')])
        assert not result.successful and "output: 'pse' is not one of pose, joint_trajectory" in result.reason
        assert node.set_parameters([Parameter('output', value='both')])[0].successful
    finally:
        node.destroy_node()


def test_all_threads_are_all_again_after_a_configuration_that_took_one(rclpy_context, task_folder):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    overrides = {'task': str(task_folder), 'guard': False, 'threads': 1}
    node = PolicyNode(
        context=rclpy_context, parameter_overrides=[Parameter(name, value=v) for name, v in overrides.items()]
    )
    try:
        for threads, expected in ((1, 1), (0, 2)):
            node.set_parameters([Parameter('threads', value=threads)])
            assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
            assert torch.get_num_threads() == expected
            assert node.trigger_cleanup() == TransitionCallbackReturn.SUCCESS
    finally:
        node.destroy_node()
        torch.set_num_threads(before)


@pytest.mark.parametrize('wrong', ['action', 'topic'])
def test_a_configure_that_fails_leaves_no_publisher_behind(
    rclpy_context, task_folder, tmp_path, monkeypatch, wrong
):
    monkeypatch.setitem(sys.modules, 'control_msgs', None)
    overrides = {'task': str(task_folder), 'output': 'both', 'gripper': wrong}
    if wrong == 'topic':  # there is none of that name, which is found after other publishers are made
        overrides['robot'] = robot_with(tmp_path, 'topics', {'target_pose': 'target pose'})
    node = PolicyNode(
        context=rclpy_context, parameter_overrides=[Parameter(name, value=v) for name, v in overrides.items()]
    )
    try:
        before = [publisher.topic_name for publisher in node.publishers]
        assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
        assert [publisher.topic_name for publisher in node.publishers] == before
    finally:
        node.destroy_node()


def robot_with(folder: Path, section: str, values: dict) -> str:
    """panda_sim's file with other values in a section."""
    description = yaml.safe_load(robot_file('panda_sim').read_text())
    description[section] |= values
    file = folder / 'robot.yaml'
    file.write_text(yaml.safe_dump(description))
    return str(file)


@pytest.mark.parametrize(
    ('parameter', 'reason'),
    [
        ('guard_file', 'guard settings /nowhere/guard.yaml: [Errno 2] No such file or directory'),
        ('robot', "topic 'wrist camera': topic name must not contain characters other than alphanumerics"),
    ],
)
def test_a_configure_that_cannot_be_says_so_in_one_line(
    rclpy_context, task_folder, tmp_path, capfd, parameter, reason
):
    value = {
        'guard_file': '/nowhere/guard.yaml',
        'robot': robot_with(
            tmp_path, 'cameras', {'wrist': {'topic': 'wrist camera', 'frame': 'wrist'}}
        ),
    }[parameter]  # fmt: skip
    overrides = {'task': str(task_folder), 'guard': parameter == 'guard_file', parameter: value}
    node = PolicyNode(
        context=rclpy_context, parameter_overrides=[Parameter(name, value=v) for name, v in overrides.items()]
    )
    try:
        assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
        logged = capfd.readouterr().err
        assert f'on_configure failed: {reason}' in logged and 'Traceback' not in logged
        said = []
        node._diagnostics = SimpleNamespace(publish=said.append)
        node._publish_diagnostics()  # the next second's, and those after it
        status = said[0].status[0]
        assert status.level == DiagnosticStatus.ERROR
        assert status.message.startswith(f'failed: on_configure failed: {reason}')
    finally:
        node.destroy_node()


def test_ctrl_c_while_it_loads_is_no_failure(task_folder, tmp_path):
    peer = PolicyPeer()
    try:
        with node_process(
            'policy_node', tmp_path / 'node.log', {'task': str(task_folder), 'autostart': True}
        ) as node:
            peer.wait_for(lambda: peer.received('policy_node/status'), 'its first word')
            assert node.stop() == 0
            said = node.output()
            assert 'Traceback' not in said and 'failed' not in said, said
    finally:
        peer.close()


@pytest.fixture
def in_simulated_time(rclpy_context, task_folder) -> Iterator[tuple[PolicyNode, list[str]]]:
    """An active policy_node whose clock the test sets, and what it says on /diagnostics."""
    overrides = {'task': str(task_folder), 'guard': False, 'use_sim_time': True}
    node = PolicyNode(
        context=rclpy_context, parameter_overrides=[Parameter(name, value=v) for name, v in overrides.items()]
    )
    try:
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        said: list[str] = []
        node._diagnostics.publish = lambda message: said.append(message.status[0].message)
        yield node, said
    finally:
        node.destroy_node()


def look_at_clock(node: PolicyNode, *times_s: float) -> None:
    """What the node does once a second of wall time, with these times on /clock."""
    for time_s in times_s:
        node.get_clock().set_ros_time_override(Time(seconds=time_s))
        node._look_around()
        node._publish_diagnostics()  # at once, for a task was swapped


def test_only_a_clock_that_stood_between_two_looks_is_said_to_stand(in_simulated_time):
    node, said = in_simulated_time
    assert enable(node, True).success
    look_at_clock(node, 1.0, 2.0, 2.0, 3.0)
    stood = [text == 'holding: /clock stands still' for text in said]
    assert stood == [False] * 4 + [True] * 2 + [False] * 2


@pytest.mark.parametrize('state', [GAVE_WAY, FAILED, NEEDS_HELP, DISABLED])
def test_a_clock_that_stands_hides_no_state_that_it_does_not_explain(in_simulated_time, state):
    node, said = in_simulated_time
    with node.loop._lock:
        node.loop._enabled = False  # its thread says no other state then
        node.loop._commander.set_state(state, 'for a reason')
    look_at_clock(node, 1.0, 1.0)
    assert said == [f'{state}: for a reason'] * 4


def enable(node: PolicyNode, enabled: bool) -> SetBool.Response:
    return node._on_enable(SetBool.Request(data=enabled), SetBool.Response())


def show_until(node: PolicyNode, state: str) -> None:
    """Fill the buffers at 20 Hz until the policy is in a state."""
    deadline = time.monotonic() + TIMEOUT_S
    while node.loop.report()[0] != state:
        assert time.monotonic() < deadline, node.loop.report()
        show(node)


def show(node: PolicyNode) -> None:
    """Give it joints and pictures of now, and 50 ms."""
    stamp_ns = node._now_ns()
    joints = JointState(name=list(ROBOT.all_joint_names), position=floats(REST))
    joints.header.stamp = time_message(stamp_ns)
    if node.inputs._joints is not None:
        node.inputs._joints.take(joints)
    for name, buffer in node.inputs.buffers.items():
        buffer.push(stamp_ns, np.zeros((84, 84, 3), np.uint8) if name in CAMERAS else REST)
    node.loop.notify_observed()
    time.sleep(0.05)


@pytest.mark.parametrize(
    ('executable', 'parameters', 'module'),
    [
        ('policy_node', {'autostart': True}, 'torch'),
        ('kinematics_recorder_node', {'output_dir': 'motions'}, 'pyarrow'),
    ],
)
def test_a_library_that_is_not_installed_is_named_in_one_line(
    monkeypatch, tmp_path, executable, parameters, module
):
    missing = tmp_path / 'without'
    missing.mkdir()
    (missing / f'{module}.py').write_text(
        f'raise ModuleNotFoundError("No module named {module!r}", name={module!r})'
    )
    monkeypatch.setenv('PYTHONPATH', str(missing), prepend=':')
    with node_process(executable, tmp_path / 'node.log', parameters) as process:
        deadline = time.monotonic() + TIMEOUT_S
        expected = f'Python module {module!r} is not installed: pip install {module}'
        while expected not in process.output():
            assert time.monotonic() < deadline, process.output()
            time.sleep(0.1)
        if module == 'pyarrow':
            assert process.process.wait(60) == 1
    assert 'Traceback' not in process.output()


@pytest.mark.parametrize('simulated', [True, False])
def test_another_clock_is_a_fresh_start(rclpy_context, simulated):
    """What was stamped by the one means nothing on the other, whichever of them is ahead."""
    overrides = [Parameter('use_sim_time', value=not simulated)]
    node = PolicyNode(context=rclpy_context, parameter_overrides=overrides)
    done = []
    try:
        node.loop = SimpleNamespace(
            restart=lambda: done.append('restart'), notify_ticked=lambda: None,
            enable=lambda *_: None, stop=lambda: None,
        )  # fmt: skip
        assert node.set_parameters([Parameter('use_sim_time', value=simulated)])[0].successful
        assert done == ['restart']
    finally:
        node.destroy_node()
