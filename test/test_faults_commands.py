"""Faults around the commands: two that command one arm, a policy that is killed, and one that is told to stop."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from fault_cell import Cell, policy_parameters, running_policy
from geometry_msgs.msg import PoseStamped
from live_robot import ROBOT
from ros_harness import WATCHED, NodeProcess, node_process
from sensor_msgs.msg import Joy
from std_srvs.srv import SetBool

from decoupled_policy_ros.nodes.common import COMMAND, LATCHED, STATE, pose_stamped, time_ns
from decoupled_policy_ros.observation.messages import pose_from_message

pytestmark = pytest.mark.process

DEADMAN = 5


@pytest.fixture(scope='module')
def node(tmp_path_factory) -> Iterator[NodeProcess]:
    with running_policy(tmp_path_factory.mktemp('faults')) as node:
        yield node


def last_speed_m_s(cell: Cell) -> float:
    """Of the last two commands."""
    before, last = cell.received('target_pose')[-2:]
    way = pose_from_message(last)[:3, 3] - pose_from_message(before)[:3, 3]
    return float(np.linalg.norm(way)) / (1e-9 * (time_ns(last.header.stamp) - time_ns(before.header.stamp)))


def enable(cell: Cell, node: str, enabled: bool) -> SetBool.Response:
    return cell.call(SetBool, f'{node}/enable', SetBool.Request(data=enabled))


@contextmanager
def commanded_by_somebody_else(cell: Cell, topic: str = 'target_pose') -> Iterator[None]:
    """The robot's own process says where it wants to be, ten times a second; what comes of it is not judged."""
    somebody = cell.create_publisher(PoseStamped, topic, COMMAND)
    pose = cell.body.kinematics.forward(cell.body.joints_rad)

    def command() -> None:
        somebody.publish(pose_stamped(pose, ROBOT.base_frame, cell.get_clock().now().nanoseconds))

    timer = cell.create_timer(0.1, command)
    yield
    timer.cancel()
    cell.destroy_publisher(somebody)
    WATCHED.forgive('somebody else commanded, too')


def test_deactivated_in_the_middle_of_a_chunk_it_comes_to_rest_first(node, cell):
    cell.is_moving()
    assert last_speed_m_s(cell) > 0.05
    assert cell.change_state('deactivate')
    assert last_speed_m_s(cell) < 0.01
    assert cell.status('disabled') == 'disabled: inactive'
    cell.is_silent()
    assert cell.change_state('activate')
    cell.is_moving()
    assert enable(cell, 'policy_node', False).success
    assert last_speed_m_s(cell) < 0.01
    cell.is_silent()
    assert enable(cell, 'policy_node', True).success
    cell.is_moving()


def test_a_policy_gives_way_to_an_operator(node, cell, tmp_path):
    cell.is_moving()
    cell.record(DiagnosticStatus, 'teleop_node/status', LATCHED)
    joy = cell.create_publisher(Joy, 'joy', STATE)
    pressed = [0]

    def hold() -> None:
        axes = [1.0 if i in (2, 5) else 0.0 for i in range(8)]
        joy.publish(Joy(axes=axes, buttons=[pressed[0] * (i == DEADMAN) for i in range(11)]))

    timer = cell.create_timer(0.05, hold)
    # The cell may be silent for a while on a busy machine, and the operator would let go of the arm.
    parameters = {'recorder': 'nobody', 'state_timeout_s': 5.0}
    with node_process('teleop_node', tmp_path / 'teleop.log', parameters):
        cell.says('teleop_node', 'deadman released')
        cell.is_moving()  # nobody else commands yet
        silent = '/teleop_node on /target_pose'
        cell.wait_for(lambda: cell.reported('policy', 'following')['other_commanders'] == silent, silent)
        pressed[0] = 1
        cell.status('gave_way', '/teleop_node commands /target_pose too')
        cell.reported('policy', 'gave_way', DiagnosticStatus.WARN)
        WATCHED.forgive('where the one begins the other has a few commands on the way')
        pressed[0] = 0
        cell.says('teleop_node', 'holding: deadman released')
        time.sleep(1.0)  # longer than it takes one who is silent to be none
        refusal = '/teleop_node commands /target_pose too; disable it first, for instance by its ~/enable'
        assert refusal in enable(cell, 'policy_node', True).message
        cell.is_at_rest()  # the operator has the arm, and holds it still
        with commanded_by_somebody_else(cell):
            cell.says('teleop_node', '/test_peer commands /target_pose too')
        assert enable(cell, 'teleop_node', False).success
        cell.wait_for(lambda: enable(cell, 'policy_node', True).success, 'it to be let go')
        cell.is_moving()
    timer.cancel()
    cell.wait_for(lambda: enable(cell, 'policy_node', True).success, 'it to be let go')
    cell.is_moving()


def test_a_second_policy_refuses_to_command_the_arm(node, cell, tmp_path):
    cell.is_moving()
    cell.record(DiagnosticStatus, 'second/status', LATCHED)
    parameters = policy_parameters(tmp_path)
    with node_process('policy_node', tmp_path / 'second.log', parameters, name='second') as second:
        cell.says('second', 'gave_way: /policy_node commands /target_pose too; ~/enable starts again')
        answer = enable(cell, 'second', True)
        assert not answer.success and answer.message.startswith('/policy_node commands /target_pose too; ')
        values = cell.reported('policy', 'following', DiagnosticStatus.OK)
        assert values['other_commanders'] == '/second on /target_pose'
        assert enable(cell, 'policy_node', False).success
        cell.wait_for(lambda: enable(cell, 'second', True).success, 'the second one to be let go')
        cell.says('second', 'following')
        assert not enable(cell, 'policy_node', True).success
        assert 'Traceback' not in second.output()
    cell.wait_for(lambda: enable(cell, 'policy_node', True).success, 'it to be let go')
    cell.is_moving()


def test_beside_another_commander_it_goes_on_if_it_was_told_to(node, cell, tmp_path):
    assert cell.change_state('deactivate') and cell.change_state('cleanup')
    assert cell.set_parameter('policy_node', 'other_commanders', 'go_on') == (True, '')
    assert cell.change_state('configure') and cell.change_state('activate')
    cell.is_moving()
    with commanded_by_somebody_else(cell):
        warning = '/test_peer commands /target_pose too'
        cell.wait_for(lambda: warning in node.output(), 'the warning')
        values = cell.reported('policy', 'following', after=2)
        assert values['other_commanders'] == '/test_peer on /target_pose'
    cell.is_moving()
    cell.record(DiagnosticStatus, 'command_guard_node/status', LATCHED)
    with node_process('command_guard_node', tmp_path / 'guard.log') as guard:
        with commanded_by_somebody_else(cell, 'target_pose_in'):
            cell.says('command_guard_node', '/policy_node commands /target_pose too')
        assert 'Traceback' not in guard.output()
    assert cell.change_state('deactivate')
    WATCHED.forgive('two commanded at once')


def test_ended_in_the_middle_of_a_motion_it_comes_to_rest_first(tmp_path):
    cell = Cell('ended')
    try:
        node = NodeProcess('policy_node', tmp_path / 'policy.log', policy_parameters(tmp_path), 'ended')
        cell.is_moving()
        assert last_speed_m_s(cell) > 0.05
        for _ in range(2):  # as Ctrl-C comes under ros2 launch
            node.process.send_signal(signal.SIGINT)
        assert node.stop() == 0 and 'Traceback' not in node.output()
        cell.wait_for(lambda: last_speed_m_s(cell) < 0.01, 'the way to rest')
    finally:
        cell.close()


def test_killed_in_the_middle_of_a_motion_and_started_again(tmp_path):
    """The arm stands where it was told to be last; the new one begins there, at rest."""
    cell = Cell('killed')
    parameters = policy_parameters(tmp_path)
    try:
        first = NodeProcess('policy_node', tmp_path / 'first.log', parameters, 'killed')
        cell.is_moving()
        first.process.kill()
        assert first.stop() != 0
        told = -1
        while told != (told := len(cell.received('target_pose'))):  # what was said may still be on its way
            time.sleep(0.5)
        cell.forget()
        stood = cell.body.kinematics.forward(cell.body.joints_rad)
        # It is let through once it is known, so that its first command is heard.
        waits = parameters | {'enabled': False}
        with node_process('policy_node', tmp_path / 'second.log', waits, 'killed') as second:
            cell.status('disabled')
            assert enable(cell, 'policy_node', True).success
            cell.status('following')
            begins = pose_from_message(cell.received('target_pose')[0])
            cell.is_moving()
            assert 'Traceback' not in first.output() + second.output()
    finally:
        cell.close()
    assert np.linalg.norm(begins[:3, 3] - stood[:3, 3]) < 0.005
