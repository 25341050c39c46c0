"""A live run over DDS, recorded by the recorder node, and computed again without ROS: bit for bit the same."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ros_harness import TIMEOUT_S, PolicyPeer, node_process
from rosbags.rosbag2 import StoragePlugin, Writer
from sensor_msgs.msg import JointState
from std_srvs.srv import SetBool, Trigger
from test_policy_node import FakeRobot
from untrained import save_untrained_policy, save_untrained_task

from decoupled_policy_ros.data.bags.reader import Bag
from decoupled_policy_ros.data.bags.stamp_watch import header_stamp_ns
from decoupled_policy_ros.data.bags.writer import BagWriter
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.replay import report
from decoupled_policy_ros.replay.log import read_log
from decoupled_policy_ros.replay.messages import STORE, first_difference
from decoupled_policy_ros.replay.replay import Replayed, ReplayOptions, replay
from decoupled_policy_ros.runtime.cycles import Cycle
from decoupled_policy_ros.runtime.guard.settings import JOINT_RULES

pytestmark = pytest.mark.process

RECORDER = 'episode_recorder_node'
POLICY = {'enabled': False, 'autostart': True, 'denoising_steps': 4, 'seed': 3}


def recorded(peer: PolicyPeer, folder: Path, act: Callable[[], None]) -> Path:
    """Record what comes of something that is done to a policy which is active and disabled."""
    peer.record(JointState, 'joint_states')
    parameters = {'output_dir': str(folder / 'episodes')}
    with node_process(RECORDER, folder / 'recorder.log', parameters) as recorder:
        peer.status('disabled', 'no commands')
        deadline = time.monotonic() + TIMEOUT_S
        while not (answer := peer.call(Trigger, f'{RECORDER}/start', Trigger.Request())).success:
            assert time.monotonic() < deadline, answer.message
            time.sleep(0.2)  # it has not heard all topics yet
        peer.wait_for(lambda: listening(peer, '/policy_node/cycles'), 'the recorder')
        wait_for_more(peer, 'joint_states', 5)  # what the first chunk is made of
        act()
        peer.diagnostics('policy')  # a second later
        assert peer.call(SetBool, f'{RECORDER}/keep', SetBool.Request(data=True)).success
        assert 'Traceback' not in recorder.output()
    return folder / 'episodes' / 'episode_000000'


def enable(peer: PolicyPeer, enabled: bool) -> None:
    assert peer.call(SetBool, 'policy_node/enable', SetBool.Request(data=enabled)).success


def wait_for_more(peer: PolicyPeer, topic: str, count: int) -> None:
    """Wait for so many more messages."""
    enough = len(peer.received(topic)) + count
    peer.wait_for(lambda: len(peer.received(topic)) >= enough, f'{count} of {topic}')


def listening(peer: PolicyPeer, topic: str) -> bool:
    """Whether the recorder listens to a topic."""
    subscribers = peer.get_subscriptions_info_by_topic(topic)
    return any(subscriber.node_name == RECORDER for subscriber in subscribers)


def by_topic(replayed: Replayed) -> dict:
    return {comparison.topic: comparison for comparison in replayed.comparisons}


@pytest.mark.sim
def test_a_run_in_simulated_time_is_computed_again_bit_for_bit(tmp_path):
    """The shipped policy drives the simulated arm, with the guard."""
    simulator = {'real_time_factor': 0.0, 'lockstep_timeout_s': 30.0}
    policy = {**POLICY, 'task': 'lift', 'use_sim_time': True, 'lockstep': True}
    peer = PolicyPeer()
    try:
        with (
            node_process('sim_robot_node', tmp_path / 'sim.log', simulator) as sim,
            node_process('policy_node', tmp_path / 'policy.log', policy) as node,
        ):

            def act() -> None:
                enable(peer, True)
                wait_for_more(peer, 'target_pose', 60)

            episode = recorded(peer, tmp_path, act)
            assert 'Traceback' not in sim.output() + node.output()
    finally:
        peer.close()
    replayed = replay(episode, ReplayOptions(('lift',)))
    assert replayed.identical, list(report.lines(replayed))
    assert replayed.other == []
    found = by_topic(replayed)
    assert found['/target_pose'].identical == found['/target_pose'].compared >= 50
    assert found['/policy_node/trajectory'].identical >= 7


# --- in real time, with the guard ------------------------------------------------------------------


@pytest.fixture(scope='module')
def task_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('models')
    first = save_untrained_policy(folder)
    save_untrained_task(folder / 'tasks' / 'second', folder / 'backbones' / 'tiny', instruction='go on')
    return first


@pytest.fixture(scope='module')
def run(tmp_path_factory, task_folder) -> Path:
    """Two runs of a guarded policy on the wall clock, whose decisions depend on how busy the machine was.

    In the second one another task takes over.
    """
    folder = tmp_path_factory.mktemp('real_time')
    checks = folder / 'guard.yaml'  # an untrained network points anywhere: what is left slows it down
    ignored = sorted(JOINT_RULES | {'join', 'workspace'})
    checks.write_text(yaml.safe_dump({'ignored_rules': ignored, 'max_time_scale': 1e3}))
    joining = {'inpaint': True, 'samples': 2, 'ensemble': 0.1}
    policy = {**POLICY, **joining, 'task': str(task_folder), 'guard_file': str(checks), 'threads': 1}
    robot = FakeRobot()
    try:
        with node_process('policy_node', folder / 'policy.log', policy) as node:

            def show() -> None:
                robot.now_ns = robot.get_clock().now().nanoseconds
                robot.observe()

            def act() -> None:
                enable(robot, True)
                wait_for_more(robot, 'target_pose', 60)
                enable(robot, False)
                enable(robot, True)
                wait_for_more(robot, 'target_pose', 60)
                assert robot.set_parameter('policy_node', 'task', str(task_folder.parent / 'second'))[0]
                robot.wait_for(lambda: 'following task' in node.output(), 'the other task')
                wait_for_more(robot, 'target_pose', 60)
                enable(robot, False)

            robot.create_timer(0.05, show)
            episode = recorded(robot, folder, act)
            assert 'Traceback' not in node.output()
    finally:
        robot.close()
    return episode


def test_a_guarded_run_in_real_time_is_computed_again_bit_for_bit(run, task_folder):
    replayed = replay(run, ReplayOptions((str(task_folder),)))
    assert replayed.identical, list(report.lines(replayed))
    found = by_topic(replayed)
    assert found['/target_pose'].identical >= 160
    assert found['/policy_node/trajectory'].identical >= 6
    assert found['/gripper_command'].identical >= 2
    assert replayed.playback.broken == set()
    with Bag(run) as bag:
        assert {cycle.task for part in read_log(bag).parts for cycle in part} == {'tiny', 'second'}


def test_the_verb_prints_a_table_and_writes_the_commands(run, task_folder, tmp_path):
    """Of a recording that another program has written, in SQLite."""
    recording, out = tmp_path / 'sqlite', tmp_path / 'replayed'
    with Bag(run) as bag, Writer(recording, version=9, storage_plugin=StoragePlugin.SQLITE3) as copy:
        topics = {
            topic.name: copy.add_connection(topic.name, topic.message_type, typestore=STORE)
            for topic in bag.topics.values()
        }
        for message in bag.messages(topics):
            copy.write(topics[message.topic], message.log_ns, message.data)
    command = [
        sys.executable,
        '-m',
        'decoupled_policy_ros.cli',
        'replay',
        str(recording),
        '--policy',
        str(task_folder),
    ]
    result = subprocess.run([*command, '--out', str(out)], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'identical, bit for bit' in result.stdout
    with Bag(run) as before, Bag(out) as after:
        for topic in ('/target_pose', '/gripper_command', '/policy_node/trajectory'):
            one, other = ([m.decode() for m in bag.messages([topic])] for bag in (before, after))
            assert len(one) == len(other) > 0
            assert [first_difference(a, b) for a, b in zip(one, other, strict=True)] == [None] * len(one)


# --- what is not as it was -------------------------------------------------------------------------


def copied(run: Path, folder: Path, change: Callable[[str, bytes, int], bytes | None]) -> Path:
    """A copy of a recording; `change` gives what becomes of a message, by topic, data and number: None is left out."""
    counts: Counter[str] = Counter()
    with Bag(run) as bag, BagWriter(folder) as copy:
        for topic in bag.topics.values():
            copy.add_topic(topic.name, topic.message_type)
        for message in bag.messages(bag.topics):
            data = change(message.topic, message.data, counts[message.topic])
            counts[message.topic] += 1
            if data is not None:
                copy.write(message.topic, data, message.log_ns)
    return folder


def used_frame(run: Path) -> tuple[Cycle, int]:
    """The second chunk that was followed, and the stamp of the newest wrist picture in it."""
    with Bag(run) as bag:
        cycle = read_log(bag).parts[0][1]
    return cycle, cycle.samples_ns['wrist'][-1]


def test_another_seed_is_named_and_its_first_difference_shown(run, task_folder, tmp_path):
    replayed = replay(run, ReplayOptions((str(task_folder),), seed=4))
    assert not replayed.identical
    assert replayed.other == ['seed: 3 in the run, 4 now']
    first = by_topic(replayed)['/policy_node/trajectory'].first
    assert first is not None and 'transforms[0]' in first.field and first.recorded != first.replayed
    report.write(replayed, tmp_path / 'replayed.json')
    values = json.loads((tmp_path / 'replayed.json').read_text())
    assert values['identical'] is False
    assert values['topics']['/policy_node/trajectory']['first_difference'] == str(first)
    assert len(values['commands']) == len(replayed.commands) > 50


def test_a_changed_byte_of_a_picture_is_seen_in_its_chunk(run, task_folder, tmp_path):
    cycle, stamp_ns = used_frame(run)

    def change(topic: str, data: bytes, number: int) -> bytes:
        if topic != '/wrist/image_raw' or header_stamp_ns(data) != stamp_ns:
            return data
        middle = len(data) - (42 * 84 + 42) * 3  # the edges are cropped
        return data[:middle] + bytes([data[middle] ^ 0x80]) + data[middle + 1 :]

    replayed = replay(copied(run, tmp_path / 'bag', change), ReplayOptions((str(task_folder),)))
    assert not replayed.identical
    found = by_topic(replayed)['/policy_node/trajectory']
    assert found.first is not None and found.first.chunk_ns == found.first.stamp_ns == cycle.stamp_ns
    assert f'in the chunk of the observation at {cycle.stamp_ns} ns' in str(found.first)


def test_a_picture_that_is_missing_is_named(run, task_folder, tmp_path):
    cycle, stamp_ns = used_frame(run)

    def change(topic: str, data: bytes, number: int) -> bytes | None:
        return None if topic == '/wrist/image_raw' and header_stamp_ns(data) == stamp_ns else data

    replayed = replay(copied(run, tmp_path / 'bag', change), ReplayOptions((str(task_folder),)))
    assert not replayed.identical
    (problem,) = replayed.playback.problems
    assert f'the chunk of the observation at {cycle.stamp_ns} ns can not be computed' in problem
    assert f"/wrist/image_raw stamped {stamp_ns} ns, for stream 'wrist', is not in the recording" in problem
    # What came before it, and the second run, are the same as ever.
    found = by_topic(replayed)['/target_pose']
    assert 50 <= found.identical == found.compared < found.recorded
    assert found.apart == found.recorded - found.compared


def test_a_message_of_the_log_that_is_missing_is_named(run, task_folder, tmp_path):
    def change(topic: str, data: bytes, number: int) -> bytes | None:
        return None if topic == '/policy_node/cycles' and number == 2 else data

    replayed = replay(copied(run, tmp_path / 'bag', change), ReplayOptions((str(task_folder),)))
    assert not replayed.identical
    assert re.search(
        r'messages \d+ of /policy_node/cycles are not in the recording', replayed.playback.problems[0]
    )


def test_a_recording_without_the_log_is_refused(run, tmp_path):
    def change(topic: str, data: bytes, number: int) -> bytes | None:
        return None if topic == '/policy_node/cycles' else data

    with pytest.raises(DatasetError, match='has no log of a policy: record its topic ~/cycles'):
        replay(copied(run, tmp_path / 'bag', change), ReplayOptions())
