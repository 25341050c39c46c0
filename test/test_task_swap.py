"""Another task and another instruction for a policy_node that is running, as a process; the test plays the robot."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from limits_checker import LimitsChecker
from ros_harness import NodeProcess, node_process
from std_msgs.msg import String
from test_policy_node import PERIOD_NS, ROBOT, FakeRobot
from tiny_sentences import save_sentence_model
from untrained import INSTRUCTION, STATE, camera, save_untrained_policy, save_untrained_task

from decoupled_policy_ros.observation.contract import ObservationContract
from decoupled_policy_ros.policy.checkpoint import load_backbone, load_task, save_task
from decoupled_policy_ros.policy.language import InstructionEncoder
from decoupled_policy_ros.runtime.guard.settings import JOINT_RULES

pytestmark = pytest.mark.process

RED, GREEN = 'lift the red cube', 'lift the green cube'
TICKS = 400
#: An untrained network points anywhere: what is left are the rules that slow it down.
LENIENT = {'ignored_rules': sorted(JOINT_RULES | {'join', 'workspace'}), 'max_time_scale': 1e3}


@pytest.fixture(scope='module')
def models(tmp_path_factory) -> Path:
    """A backbone, tasks that fit it, and tasks that don't."""
    folder = tmp_path_factory.mktemp('models')
    first = save_untrained_policy(folder)
    backbone, tasks = folder / 'backbones' / 'tiny', folder / 'tasks'
    save_untrained_task(tasks / 'second', backbone, instruction='go on')
    wrist = ObservationContract(20.0, 3, (camera('wrist', 42), STATE), 0.1)
    save_untrained_task(tasks / 'wrist_only', backbone, wrist)
    head = ObservationContract(20.0, 2, (camera('head'), STATE), 0.1)
    save_untrained_task(tasks / 'head', backbone, head)
    sentences = save_sentence_model(folder / 'sentences')
    language = InstructionEncoder.of([RED, GREEN], str(sentences), 8)
    save_untrained_task(tasks / 'words', backbone, language=language)
    shutil.copytree(save_untrained_policy(folder / 'other', seed=9), tasks / 'other_backbone')
    shutil.copytree(save_untrained_policy(folder / 'fr3', 'fr3'), tasks / 'other_arm')
    shutil.copytree(backbone, tasks / 'backbone')
    (tasks / 'foreign').mkdir()
    (tasks / 'foreign' / 'task.json').write_text(json.dumps({'model_type': 'diffusion', 'n_obs_steps': 2}))
    for name in ('truncated', 'corrupt', 'altered'):
        shutil.copytree(first, tasks / name)
    weights = (first / 'task.safetensors').read_bytes()
    (tasks / 'truncated' / 'task.safetensors').write_bytes(weights[:-1000])
    (tasks / 'corrupt' / 'task.safetensors').write_bytes(weights[:-9] + b'\0' + weights[-8:])
    nan = load_task(first, load_backbone(backbone))
    with torch.no_grad():
        next(nan.conditioning.parameters()).fill_(torch.nan)
    save_task(tasks / 'nan', nan)
    header = (first / 'task.json').read_text()
    (tasks / 'altered' / 'task.json').write_text(header.replace('"tiny"', '"tidy"', 1))
    return folder


@pytest.fixture(scope='module')
def node(tmp_path_factory, models) -> Iterator[NodeProcess]:
    guard = models / 'guard.yaml'
    guard.write_text(yaml.safe_dump(LENIENT))
    parameters = {
        'use_sim_time': True, 'lockstep': True, 'task': str(models / 'tasks' / 'tiny'), 'denoising_steps': 2,
        'autostart': True, 'task_timeout_s': 1.0, 'guard_file': str(guard),
    }  # fmt: skip
    log = tmp_path_factory.mktemp('policy_node') / 'policy_node.log'
    with node_process('policy_node', log, parameters) as process:
        yield process
    assert 'Traceback' not in process.output()


@pytest.fixture(scope='module')
def peer(node) -> Iterator[FakeRobot]:
    peer = FakeRobot()
    peer.wait_for_subscribers(peer.joints, peer.clock, *peer.images.values())
    peer.begin()
    yield peer
    peer.close()


@pytest.fixture
def robot(peer, models) -> FakeRobot:
    """The node, following the first task."""
    swap(peer, models / 'tasks' / 'tiny')
    peer.forget()
    return peer


def ask(robot: FakeRobot, **values: object) -> None:
    """Set parameters that are accepted at once."""
    for name, value in values.items():
        assert robot.set_parameter('policy_node', name, str(value)) == (True, '')


def run_until(robot: FakeRobot, text: str, **options: object) -> dict[str, str]:
    """Go on, each tick with its command, until the last request has come to something."""
    for _ in range(TICKS):
        robot.run(1, **options)
        said = [
            s for array in robot.received('/diagnostics') for s in array.status if s.name.endswith('policy')
        ]
        values = {pair.key: pair.value for pair in said[-1].values} if said else {}
        if values.get('task_swap', '').startswith(text):
            return values
    raise AssertionError(f'no {text!r}; the last was {values}')


def swap(robot: FakeRobot, task: Path) -> dict[str, str]:
    robot.forget()
    ask(robot, task=task)
    return run_until(robot, f'following task {str(task)!r}')


def test_tasks_change_between_two_cycles_and_the_motion_goes_on(robot, models):
    before = robot.diagnostics('policy')
    checker = LimitsChecker.of(ROBOT.limits)
    robot.forget()
    first_ns = robot.now_ns + PERIOD_NS
    for name in ('second', 'tiny', 'second'):
        ask(robot, task=models / 'tasks' / name)
        values = run_until(robot, f'following task {str(models / "tasks" / name)!r}')
        robot.run(10)
        assert values['task'] == str(models / 'tasks' / name)
        assert values['instruction'] == (INSTRUCTION if name == 'tiny' else 'go on')
        assert 0.0 <= float(values['task_swap_ms']) < 50.0
        assert robot.parameter('policy_node', 'task').string_value == str(models / 'tasks' / name)
    values = robot.diagnostics('policy')
    ticks = list(range(first_ns, robot.now_ns + 1, PERIOD_NS))
    assert robot.stamps_ns('target_pose') == ticks  # a command each, and no other
    chunks = np.diff(robot.stamps_ns('policy_node/trajectory'))
    assert set(chunks) == {8 * PERIOD_NS}
    for count in ('cycles_missed', 'holds', 'underruns', 'rejected_chunks'):
        assert values[count] == before[count], count
    assert int(values['task_swaps']) == int(before['task_swaps']) + 3
    for stamp_ns in ticks:
        checker.add(stamp_ns, robot.command(stamp_ns))
    checker.require_none()


AT_ONCE = {
    'no_such_task': "no_such_task' is neither a folder nor a model that is installed",
    'x' * 300: 'is neither a folder nor a model',
    'x' * 1_000_000: 'at most 1000 characters, got 1000',
    'foreign': 'format and version are (None, None)',
    'backbone': 'task.json is missing',
    'altered': 'the header of this task were changed or truncated',
    'other_backbone': 'trained on backbone',
    'other_arm': 'fr3_joint1',
    'head': "the task needs camera 'head', robot 'panda_sim' has agentview",
    'words': "task 'words' has several instructions, say which to follow: 'lift the red cube'",
}
LATE = {
    'nan': 'values that are not finite',
    'truncated': 'the weights of this task were changed',
    'corrupt': 'the weights of this task were changed',
}


@pytest.mark.parametrize('name', AT_ONCE, ids=lambda name: name[:20])
def test_what_cannot_be_followed_is_refused_at_once(robot, models, name):
    folder = models / 'tasks' / name if len(name) < 100 else name
    before = robot.diagnostics('policy')
    success, reason = robot.set_parameter('policy_node', 'task', str(folder))
    assert not success
    assert AT_ONCE[name] in reason
    values = robot.diagnostics('policy')
    assert values['task_swap'].startswith('refused: ') and AT_ONCE[name] in values['task_swap']
    assert int(values['refused_tasks']) == int(before['refused_tasks']) + 1
    keeps_following(robot, models, values)


@pytest.mark.parametrize('name', LATE)
def test_weights_that_are_broken_are_refused_and_the_parameter_goes_back(robot, models, name):
    ask(robot, task=models / 'tasks' / name)
    values = run_until(robot, 'refused: ')
    assert LATE[name] in values['task_swap']
    robot.wait_for(
        lambda: robot.parameter('policy_node', 'task').string_value == str(models / 'tasks' / 'tiny'),
        'the parameter',
    )
    keeps_following(robot, models, values)


def keeps_following(robot: FakeRobot, models: Path, values: dict[str, str]) -> None:
    assert values['task'] == str(models / 'tasks' / 'tiny')
    assert robot.parameter('policy_node', 'task').string_value == str(models / 'tasks' / 'tiny')
    robot.run(10)
    assert robot.status('following') == 'following'
    assert robot.stamps_ns('target_pose')[-10:] == [robot.now_ns - i * PERIOD_NS for i in reversed(range(10))]


def test_streams_are_subscribed_before_and_closed_after(robot, models):
    robot.wait_for(lambda: robot.count_subscribers('agentview/image_raw') == 1, 'one subscription')
    swap(robot, models / 'tasks' / 'wrist_only')
    robot.wait_for(lambda: robot.count_subscribers('agentview/image_raw') == 0, 'the end of a subscription')
    assert robot.count_subscribers('wrist/image_raw') == 1
    robot.forget()
    robot.run(9, skip=('agentview',))  # nobody needs it any more
    assert robot.status('following') == 'following'
    assert 'agentview_rate_hz' not in robot.diagnostics('streams')

    ask(robot, task=models / 'tasks' / 'tiny')
    values = run_until(robot, 'refused: ', skip=('agentview',))
    assert "no observation for it within 1 s: stream 'agentview': nothing has arrived" in values['task_swap']
    assert values['task'].endswith('wrist_only')
    robot.wait_for(lambda: robot.count_subscribers('agentview/image_raw') == 0, 'the end of a subscription')
    robot.run(10)
    swap(robot, models / 'tasks' / 'tiny')
    assert robot.count_subscribers('agentview/image_raw') == robot.count_subscribers('wrist/image_raw') == 1
    robot.run(10)
    assert robot.status('following') == 'following'


def test_instructions_change_and_are_refused_while_running(robot, models, node):
    publisher = robot.create_publisher(String, 'policy_node/instruction', 10)
    robot.wait_for_subscribers(publisher)
    refused = int(robot.diagnostics('policy')['refused_instructions'])
    log = len(node.output())
    for text, reason in (
        ('', 'is empty'), ('   ', 'is empty'), ('juggle', "'juggle' is not what the task was trained on"),
        ('x' * 1_000_000, 'at most 1000 characters, got 1000000'),
    ):  # fmt: skip
        publisher.publish(String(data=text))
        refused += 1
        while (values := robot.diagnostics('policy'))['refused_instructions'] != str(refused):
            assert int(values['refused_instructions']) < refused
        assert values['task_swap'].startswith('refused: ') and reason in values['task_swap']
    for _ in range(500):  # more than the queue holds
        publisher.publish(String(data='juggle'))
    publisher.publish(String(data=INSTRUCTION))  # what it does already
    assert int(robot.diagnostics('policy', after=2)['refused_instructions']) > refused
    assert node.output()[log:].count('instruction refused') < 20
    assert len(node.output()) - log < 20_000
    assert robot.diagnostics('policy')['instruction'] == INSTRUCTION
    robot.destroy_publisher(publisher)
    robot.run(5)


def test_a_task_with_language_follows_what_it_is_told(robot, models):
    tasks = models / 'tasks'
    assert robot.set_parameters_atomically('policy_node', task=str(tasks / 'words'), instruction=GREEN) == (
        True,
        '',
    )
    values = run_until(robot, f'following task {str(tasks / "words")!r}')
    assert values['instruction'] == GREEN
    publisher = robot.create_publisher(String, 'policy_node/instruction', 10)
    robot.wait_for_subscribers(publisher)
    for text in (RED, 'pick up the green block'):  # the second by the sentence model
        publisher.publish(String(data=text))
        values = run_until(robot, f'following instruction {text!r}')
        assert values['instruction'] == text
        assert 0.0 <= float(values['task_swap_ms']) < 50.0
        robot.wait_for(
            lambda text=text: robot.parameter('policy_node', 'instruction').string_value == text, 'parameter'
        )
    publisher.publish(String(data='x' * 1_000_000))
    assert 'at most 1000 characters' in run_until(robot, 'refused: ')['task_swap']
    success, reason = robot.set_parameter('policy_node', 'instruction', '')
    assert not success and 'say which to follow' in reason
    ask(robot, instruction=GREEN)
    assert run_until(robot, f'following instruction {GREEN!r}')['instruction'] == GREEN
    robot.destroy_publisher(publisher)


def test_what_is_followed_outlives_deactivation(robot, models):
    swap(robot, models / 'tasks' / 'second')
    assert robot.change_state('deactivate')
    ask(robot, task=models / 'tasks' / 'tiny')  # a loop that stands still needs no observation
    robot.wait_for(lambda: robot.diagnostics('policy')['task_swap'].startswith('following'), 'the other task')
    assert robot.diagnostics('policy')['task'] == str(models / 'tasks' / 'tiny')
    assert robot.change_state('activate')
    robot.begin()
    robot.run(5)
