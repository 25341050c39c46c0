"""Faults around the node: no gripper server, instructions that are none, parameters out of range, a full disk."""

import resource
from collections.abc import Iterator

import pytest
from fault_cell import Cell, changed_robot, policy_parameters, running_policy
from ros_harness import TIMEOUT_S, NodeProcess, node_process
from std_msgs.msg import Float64, String
from told_policy import INSTRUCTION

pytestmark = pytest.mark.process


@pytest.fixture(scope='module')
def node(tmp_path_factory) -> Iterator[NodeProcess]:
    """The policy of an arm whose gripper is told by an action, where there is no such action."""
    folder = tmp_path_factory.mktemp('faults')
    action = {'name': 'grip', 'half_width': True, 'max_effort_n': 20.0}
    robot = changed_robot(folder, lambda description: description['gripper'].update(action=action))
    with running_policy(folder, robot=robot) as node:
        yield node


def test_a_gripper_without_its_action(node, cell):
    """Without control_msgs there is the topic; without its server see test_outputs, for no action is installed here."""
    cell.is_moving()
    assert 'the gripper is commanded on gripper_command instead' in node.output()
    cell.wait_for(lambda: cell.received('gripper_command'), 'the gripper by its topic')
    assert isinstance(cell.received('gripper_command')[0], Float64)


@pytest.mark.parametrize(
    'text', ['', ' ', 'x' * 2**20, 'juggle \u2603'], ids=['empty', 'blank', '1 MB', 'unknown']
)
def test_an_instruction_that_is_none(node, cell, text):
    """Refused, with few words about many, and the one that is followed goes on."""
    cell.is_moving()
    publisher = cell.create_publisher(String, 'policy_node/instruction', 10)
    cell.wait_for_subscribers(publisher)
    before, length = int(cell.diagnostics('policy')['refused_instructions']), len(node.output())
    publisher.publish(String(data=text))
    cell.wait_for(
        lambda: int(cell.diagnostics('policy')['refused_instructions']) == before + 1, 'the refusal'
    )
    assert cell.diagnostics('policy')['instruction'] == INSTRUCTION
    assert len(node.output()) - length < 5000
    cell.destroy_publisher(publisher)
    cell.is_moving()


@pytest.mark.parametrize(
    ('name', 'value', 'reason'),
    [
        ('denoising_steps', 0, 'out of range'),
        ('control_rate_hz', 1e9, 'out of range'),
        ('gripper_hysteresis', float('nan'), 'out of range'),
        ('device', 7, 'Wrong parameter type'),
        ('autostart', False, 'read-only'),
    ],
)
def test_a_parameter_out_of_range(node, cell, name, value, reason):
    cell.is_moving()
    success, why = cell.set_parameter('policy_node', name, value)
    assert not success
    assert reason in why or 'clean up first' in why
    cell.is_moving()


def test_a_parameter_out_of_range_at_start_ends_it_with_one_line(tmp_path):
    log = tmp_path / 'policy.log'
    process = NodeProcess('policy_node', log, {'denoising_steps': 0})
    assert process.process.wait(TIMEOUT_S) == 1
    assert 'denoising_steps' in process.output() and 'Traceback' not in process.output()


def test_a_disk_that_is_full_of_logs(cell, tmp_path, monkeypatch):
    """No file of the node may grow: writes fail as on a full disk. What it logs is lost, and the arm goes on."""
    monkeypatch.setenv('ROS_LOG_DIR', str(tmp_path / 'ros_log'))
    cell = Cell('full')
    try:
        parameters = policy_parameters(tmp_path)
        with node_process('policy_node', tmp_path / 'policy.log', parameters, 'full') as node:
            cell.is_moving()
            written = [file.stat().st_size for file in (tmp_path / 'ros_log').iterdir()]
            _, hard = resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, (max(written), hard))
            cell.stops_and_goes_on("stream 'wrist' is", silent={'wrist'})
            assert [file.stat().st_size for file in (tmp_path / 'ros_log').iterdir()] == written
            cell.is_moving()
    finally:
        cell.close()
