"""Requests that overtake one another: PolicyTasks on a real node whose executor the test spins, and a real loop."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from rclpy.parameter import Parameter
from sensor_msgs.msg import JointState
from test_policy_loop import TIMEOUT_S, Stage, wait_for

from decoupled_policy_ros.nodes import policy_tasks
from decoupled_policy_ros.nodes.common import SENSOR, declare_settings
from decoupled_policy_ros.nodes.policy_inputs import Inputs
from decoupled_policy_ros.nodes.policy_settings import PolicySettings
from decoupled_policy_ros.nodes.policy_tasks import PolicyTasks
from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.policy import Policy, Task, save_task
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime.engine import Engine


class Cell:
    """A node with PolicyTasks that follows a policy; nothing is taken note of until `spin_until`."""

    def __init__(self, context: object, policy: Policy, folder: Path) -> None:
        self.policy, self.loads, self.may_load = policy, 0, threading.Event()
        self.may_load.set()
        self.stage = Stage(policy)
        self.node = LifecycleNode('policy_node', context=context, use_global_arguments=False)
        settings = declare_settings(self.node, PolicySettings)
        self.node.set_parameters([Parameter('task', value=str(folder))])
        self.settings = type(settings)(task=str(folder), instruction='')
        self.tasks = PolicyTasks(self.node, lambda: self.stage.now_ns, self._engine_of, lambda: None)
        self.executor = SingleThreadedExecutor(context=context)
        self.executor.add_node(self.node)
        self.follow()

    def follow(self) -> None:
        """As configure does."""
        inputs = Inputs(self.node, self.policy.robot, self.policy.contract, SENSOR, lambda: None)
        self.stage.buffers = inputs.buffers
        self.tasks.follow(self.stage.loop.engine, inputs, self.stage.loop, self.settings)

    def _engine_of(self, policy: Policy, instruction: str) -> Engine:
        self.loads += 1
        assert self.may_load.wait(TIMEOUT_S)
        return Engine(policy, 2, instruction=instruction)

    def ask(self, name: str, value: object) -> None:
        result = self.node.set_parameters([Parameter(name, value=str(value))])[0]
        assert result.successful, result.reason

    def spin_until(self, condition: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline_s, self.tasks.values()
            self.executor.spin_once(timeout_sec=0.05)

    @property
    def topics(self) -> list[str]:
        """What is subscribed to, besides parameters and instructions."""
        topics = [subscription.topic_name for subscription in self.node.subscriptions]
        return sorted(topic for topic in topics if topic.endswith(('image_raw', 'joint_states')))


@pytest.fixture
def other(small_policy, small_policy_folders) -> Path:
    """Another task on the same backbone."""
    folder = small_policy_folders[1].with_name('other')
    sizes = {'base_channels': 16, 'keypoints': 8}
    save_task(folder, Task(small_policy.contract, small_policy.backbone, sizes, 'other', 'go on'))
    return folder


@pytest.fixture
def cell(rclpy_context, small_policy, small_policy_folders) -> Iterator[Cell]:
    cell = Cell(rclpy_context, small_policy, small_policy_folders[1])
    yield cell
    cell.stage.loop.stop()
    cell.tasks.close()
    assert cell.topics == []
    cell.executor.shutdown()
    cell.node.destroy_node()


def test_what_is_dropped_while_its_change_waits_is_closed(cell, other):
    topics, loop = cell.topics, cell.stage.loop
    cell.stage.observe()
    cell.stage.tick()
    loop._cycling = True  # there is a worker, whose cycle ends when this test says so
    cell.ask('task', other)
    wait_for(lambda: loop._changes)
    cell.tasks._pending[0].drop()  # as a request does that comes while the change is being handed over
    cell.ask('task', other)
    wait_for(lambda: len(loop._changes) == 2)
    loop._end_cycles()
    cell.spin_until(lambda: cell.tasks.values()['task_swap'] == f'following task {str(other)!r}')
    assert cell.tasks.values()['task_swaps'] == '1'
    assert cell.tasks._candidates == []
    assert cell.topics == topics


def test_what_is_overtaken_before_it_begins_is_closed(cell, other):
    topics = cell.topics
    cell.may_load.clear()
    cell.ask('task', other)
    wait_for(lambda: cell.loads == 1)
    for _ in range(3):
        cell.ask('task', other)  # each but the last is overtaken while the first is still being loaded
    assert len(cell.tasks._candidates) == 2
    cell.may_load.set()
    cell.spin_until(lambda: cell.tasks.values()['task_swap'] == f'following task {str(other)!r}')
    assert cell.loads == 2 and cell.tasks.values()['task_swaps'] == '1'
    assert cell.tasks._candidates == []
    assert cell.topics == topics


def test_a_task_that_was_loaded_for_an_earlier_configuration_is_ignored(cell, other, monkeypatch):
    monkeypatch.setattr(policy_tasks, 'CLOSE_S', 0.05)
    first = cell.stage.loop.engine
    cell.may_load.clear()
    cell.ask('task', other)
    wait_for(lambda: cell.loads)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == 'policy_tasks']
    cell.tasks.close()  # it is still being loaded
    cell.follow()
    cell.may_load.set()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    cell.ask('task', other)  # the one after it is not
    cell.spin_until(lambda: cell.tasks.values()['task_swap'] == f'following task {str(other)!r}')
    assert cell.tasks.values()['task_swaps'] == '1'
    assert cell.stage.loop.engine is not first


def test_an_instruction_goes_to_the_task_that_has_just_been_exchanged(cell, other):
    first = cell.stage.loop.engine
    cell.ask('task', other)
    wait_for(lambda: cell.stage.loop.engine is not first)
    second = cell.stage.loop.engine
    wait_for(lambda: cell.tasks._outcomes)
    cell.ask('instruction', 'go on')  # before the executor has taken note of the exchange
    cell.spin_until(lambda: cell.tasks.values()['task_swaps'] == '2')
    assert cell.stage.loop.engine is cell.tasks._followed.engine is second
    assert cell.node.get_parameter('task').value == str(other)
    assert cell.tasks.values()['task'] == str(other)


def test_a_stream_goes_on_for_another_task_only_where_it_means_the_same(rclpy_context):
    """Joint states become one of two quaternions, as the task saw it: the other task may have seen the other one."""
    robot = load_robot('panda_sim')
    node = LifecycleNode('inputs', context=rclpy_context, use_global_arguments=False)

    def contract(near: tuple[float, ...] | None) -> ObservationContract:
        spec = StreamSpec('proprioception', 'proprioception', (9,), 0.2)
        return ObservationContract(20.0, 2, (spec,), 0.1, near)

    home = tuple(Proprioception(robot, Kinematics(robot)).near_quat_xyzw.tolist())
    message = JointState(
        name=list(robot.all_joint_names), position=[*map(float, robot.home_rad), 0.04, -0.04]
    )
    message.header.stamp.sec = 100
    before = Inputs(node, robot, contract(None), SENSOR, lambda: None)
    alike, other = before.succeeded_by(contract(home)), before.succeeded_by(contract(tuple(-x for x in home)))
    assert alike.streams == before.streams  # its samples go on
    assert other.streams['proprioception'] is not before.streams['proprioception']
    seen = []
    for inputs in (before, other):
        inputs._take(inputs.streams['proprioception'], message)
        seen.append(inputs.buffers['proprioception'].at_or_before(100 * 10**9)[1])
    np.testing.assert_allclose(seen[0][3:7], -seen[1][3:7], atol=1e-6)
    node.destroy_node()
