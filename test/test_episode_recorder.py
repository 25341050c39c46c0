"""episode_recorder_node as a process, over real DDS."""

import dataclasses
import errno
import itertools
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import rclpy
import yaml
from camera_publisher import START_NS
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from ros_harness import TIMEOUT_S, NodeProcess, Peer
from rosbags.rosbag2 import Reader
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64, String
from std_srvs.srv import SetBool, Trigger

from decoupled_policy_ros.data.bags.episodes import read_episode
from decoupled_policy_ros.data.bags.recovery import recover
from decoupled_policy_ros.data.bags.stamp_watch import header_stamp_ns
from decoupled_policy_ros.errors import DecoupledPolicyError
from decoupled_policy_ros.nodes.common import COMMAND, LATCHED, SENSOR, time_message
from decoupled_policy_ros.nodes.episode_clock import EpisodeClock
from decoupled_policy_ros.nodes.episode_intake import Budget, RawIntake
from decoupled_policy_ros.nodes.episode_recorder_node import EpisodeRecorderNode
from decoupled_policy_ros.nodes.episode_settings import EpisodeSettings
from decoupled_policy_ros.nodes.teleop_episodes import EpisodeClient
from decoupled_policy_ros.observation.contract import ObservationContract
from decoupled_policy_ros.robot.description import load_robot, robot_file
from decoupled_policy_ros.robot.fingerprint import Fingerprint

pytestmark = pytest.mark.process

NODE = 'episode_recorder_node'
STATUS = f'{NODE}/status'
JOINTS, CAMERAS = '/joint_states', ('/agentview/image_raw', '/wrist/image_raw')
RATES_HZ = {JOINTS: 1000.0, **dict.fromkeys(CAMERAS, 30.0)}
NO_COMMAND = 'no command was recorded on /target_pose'
SMALL = ('--height', '24', '--width', '32')


class Publisher:
    """camera_publisher.py as a process."""

    def __init__(self, *options):
        script = Path(__file__).with_name('camera_publisher.py')
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, script, *options], stdin=pipe, stdout=pipe, text=True
        )

    def stop(self):
        """End it; returns how many messages of each topic it sent."""
        printed, _ = self.process.communicate(timeout=60)
        return json.loads(printed)


class Stage:
    """Recorders and publishers as processes, and a peer that asks the recorder."""

    def __init__(self, folder):
        self.output = folder / 'episodes'
        self.folder = folder
        self.peer = Peer()
        self.peer.record(DiagnosticStatus, STATUS, LATCHED)
        self.recorders, self.publishers = [], []

    def recorder(self, **parameters):
        log = self.folder / f'recorder_{len(self.recorders)}.log'
        self.peer.forget()
        self.recorders.append(NodeProcess(NODE, log, {'output_dir': str(self.output), **parameters}))
        return self.recorders[-1]

    def publisher(self, *options):
        self.publishers.append(Publisher(*options))
        return self.publishers[-1]

    def ask(self, name, label=None):
        """Call a service; returns success and message."""
        if label is None:
            response = self.peer.call(Trigger, f'{NODE}/{name}', Trigger.Request())
        else:
            response = self.peer.call(SetBool, f'{NODE}/{name}', SetBool.Request(data=label))
        return response.success, response.message

    def status(self, condition, what):
        """Wait for a status whose values fulfil `condition`; returns it with its values."""

        def found():
            for status in self.peer.received(STATUS)[-1:]:
                values = {pair.key: pair.value for pair in status.values}
                if condition(values):
                    return status, values
            return None

        return self.peer.wait_for(found, what)

    def wait_until_heard(self, topics=tuple(RATES_HZ)):
        self.status(
            lambda v: all(float(v.get(f'rate_hz:{t}', 0)) > 0 for t in topics), f'{topics} to be heard'
        )

    def start(self):
        """Start an episode; where machine and disk are busy a topic may be silent for a while before."""
        name, deadline = self.next_name(), time.monotonic() + TIMEOUT_S
        while not (answer := self.ask('start'))[0]:
            assert 'nothing on' in answer[1] and time.monotonic() < deadline, answer
            time.sleep(0.2)
        assert answer[1] == f'recording {name}'

    def record_for(self, seconds):
        """Start, and wait until the episode is so long."""
        self.start()
        return self.status(lambda v: float(v['duration_s']) >= seconds, f'{seconds} s of recording')

    def next_name(self):
        return f'episode_{len(list(self.output.glob("episode_*"))):06d}'

    def close(self):
        for publisher in self.publishers:
            if publisher.process.poll() is None:
                publisher.stop()
        for recorder in self.recorders:
            recorder.stop()
        self.peer.close()
        self.peer.destroy_node()  # its publishers are no part of the next test


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    yield stage
    stage.close()


def read_bag(folder):
    """Serialised messages by topic, in the order of the bag."""
    found = {}
    with Reader(folder) as reader:
        for connection, _, data in reader.messages():
            found.setdefault(connection.topic, []).append(bytes(data))
    return found


def counts_of(folder):
    """Which of the publisher's messages are in a bag, by topic."""
    return {
        topic: np.round([(header_stamp_ns(m) - START_NS) * RATES_HZ[topic] / 1e9 for m in messages]).astype(
            int
        )
        for topic, messages in read_bag(folder).items()
        if topic in RATES_HZ
    }


def test_a_killed_recorder_loses_less_than_a_second_of_two_cameras_and_1_khz(stage):
    recorder = stage.recorder()
    publisher = stage.publisher()
    stage.wait_until_heard()
    stage.record_for(5.0)
    recorder.process.kill()
    sent = publisher.stop()  # counts what was sent up to and after the end of the recorder
    recorder.process.wait()
    again = stage.recorder()
    stage.status(lambda v: v['state'] == 'idle', 'the second recorder')
    assert f'`decoupled-policy recover {stage.output}` saves them' in again.output()
    (recovery,) = recover(stage.output)
    assert recovery.path == stage.output / 'episode_000000'
    found = counts_of(recovery.path)
    assert set(found) == set(RATES_HZ)
    for topic, index in found.items():
        np.testing.assert_array_equal(np.diff(index), 1)
        assert len(index) > 3.5 * RATES_HZ[topic]
        assert sent[topic] - 1 - index[-1] < RATES_HZ[topic]
        assert recovery.saved[topic] == len(index)
        assert recovery.lost(topic) < RATES_HZ[topic]
    header = read_episode(recovery.path)
    assert header['success'] is None
    assert header['recovered']['messages'][JOINTS]['saved'] == len(found[JOINTS])


def check_log(output):
    """Each outcome is in the log, with the severity that it has; the end, too, which finds no /rosout any more."""
    for level, text in (
        ('INFO', 'recording episode_000000'),
        ('WARN', f'kept episode_000000 as a success; {NO_COMMAND}'),
        ('INFO', 'threw episode_000001 away'),
        ('INFO', 'moved episode_000001 to .discarded, recording episode_000001'),
        ('WARN', 'recording stopped: the recorder was shut down; kept episode_000001 without a label'),
    ):
        lines = [line for line in output.splitlines() if line.endswith(f': {text}')]
        assert [f'[{level}]' in line for line in lines[:1]] == [True], text
    assert 'rosout' not in output


def test_episodes_are_kept_thrown_away_and_recorded_again(stage):
    recorder = stage.recorder(instruction='lift the cube')
    assert stage.ask('keep', True) == (False, 'nothing is being recorded')
    assert stage.ask('discard') == (False, 'nothing is being recorded')
    success, reason = stage.ask('start')
    assert not success
    assert [f'nobody publishes {topic}' in reason for topic in RATES_HZ] == [True] * 3
    publisher = stage.publisher(*SMALL, '--joint-hz', '200')
    stage.wait_until_heard()

    status, values = stage.record_for(1.0)
    assert status.level == DiagnosticStatus.OK, status.message
    assert status.message.startswith('recording episode_000000 for ')
    assert (values['state'], values['episode'], values['lost']) == ('recording', 'episode_000000', '0')
    assert stage.ask('start') == (False, 'episode_000000 is being recorded already')
    assert stage.ask('keep', True) == (True, f'kept episode_000000 as a success; {NO_COMMAND}')
    stage.record_for(0.5)
    assert stage.ask('discard') == (True, 'threw episode_000001 away')
    stage.record_for(0.5)
    assert stage.ask('rerecord') == (True, 'threw episode_000001 away; recording episode_000001')
    stage.status(lambda v: float(v['duration_s']) >= 0.5, 'some of the new one')
    assert stage.ask('keep', False) == (True, f'kept episode_000001 as a failure; {NO_COMMAND}')
    kept = stage.output / 'episode_000001'
    content = {path.name: path.read_bytes() for path in kept.iterdir()}
    assert stage.ask('rerecord') == (True, 'moved episode_000001 to .discarded, recording episode_000001')
    aside = stage.output / '.discarded' / 'episode_000001'
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == content
    instruction = stage.peer.create_publisher(String, f'{NODE}/instruction', QoSProfile(depth=1))
    stage.peer.wait_for_subscribers(instruction)
    instruction.publish(String(data='stack the cubes'))
    stage.status(lambda v: v['instruction'] == 'stack the cubes', 'the new instruction')
    assert recorder.stop() == 0, recorder.output()  # keeps the one that was running
    check_log(recorder.output())

    publisher.stop()
    first, last = (read_episode(stage.output / name) for name in ('episode_000000', 'episode_000001'))
    assert sorted(path.name for path in stage.output.iterdir()) == [
        '.discarded', 'episode_000000', 'episode_000001',
    ]  # fmt: skip
    assert (first['success'], first['instruction'], 'stopped' in first) == (True, 'lift the cube', False)
    assert (last['success'], last['instruction']) == (None, 'stack the cubes')
    assert last['stopped'] == 'the recorder was shut down'
    robot = load_robot('panda_sim')
    assert first['fingerprint'] == Fingerprint.of(robot, 20.0).to_dict()
    assert first['robot']['name'] == 'panda_sim'
    assert first['robot']['yaml'] == robot_file('panda_sim').read_text()
    assert first['robot']['description'] == robot.source.path.read_text()
    contract = ObservationContract.from_dict(first['contract'])
    assert contract.names == ('proprioception', 'agentview', 'wrist')
    assert {s.shape for s in contract.streams} == {(9,), (84, 84, 3)}
    assert 0.9e9 < first['ended_ns'] - first['started_ns'] < 20e9
    for topic, index in counts_of(stage.output / 'episode_000000').items():
        np.testing.assert_array_equal(np.diff(index), 5 if topic == JOINTS else 1)
        report = first['topics'][topic]
        assert report['received'] == report['written'] == len(index)
        assert (report['lost_by_dds'], report['missing'], report['stamp_gaps']) == (0, 0, 0)


def test_what_is_lost_before_it_comes_here_is_counted_exactly(stage):
    """Pictures that nobody sends again, to a recorder that the system does not let run for a while."""
    recorder = stage.recorder()
    stage.publisher('--best-effort', '--joint-hz', '50')
    stage.wait_until_heard()
    stage.record_for(1.0)
    recorder.process.send_signal(signal.SIGSTOP)
    # From a second on, the shared memory of Fast DDS may give a reader up for good: docs/reliability.md.
    time.sleep(0.8)
    recorder.process.send_signal(signal.SIGCONT)
    status, _ = stage.status(lambda v: int(v['lost']) > 20, 'the loss to be seen')
    assert status.level == DiagnosticStatus.WARN
    assert f'messages lost on {CAMERAS[0]}' in status.message
    time.sleep(1.0)
    assert stage.ask('keep', True)[0]
    topics = read_episode(stage.output / 'episode_000000')['topics']
    for topic, index in counts_of(stage.output / 'episode_000000').items():
        step = 20 if topic == JOINTS else 1
        assert topics[topic]['missing'] == (index[-1] - index[0]) / step + 1 - len(index)
        # The usual step is learned from the first ten, which a busy machine may not have let through yet.
        if np.argmax(np.diff(index)) > 15 and np.diff(index).max() > 10 * step:
            assert topics[topic]['stamp_gaps'] > 0
    assert topics[CAMERAS[0]]['missing'] > 10


def test_memory_is_bounded_and_what_finds_no_room_is_counted(rclpy_context):
    node = rclpy.create_node('bounded', context=rclpy_context)
    try:
        publisher = node.create_publisher(String, 'words', QoSProfile(depth=100))
        budget = Budget(1000)
        intake = RawIntake(node, String, 'words', 100, budget, EpisodeClock(time.time_ns))
        deadline = time.monotonic() + 60
        while not publisher.get_subscription_count() and time.monotonic() < deadline:
            intake.adapt()  # becomes what the publisher offers once that is known
        intake.begin(0, lambda: 7)

        def publish(count):
            before = intake.received
            for _ in range(count):
                publisher.publish(String(data='x' * 191))  # 200 bytes with length, zero and encapsulation
            while intake.received < before + count and time.monotonic() < deadline:
                intake.poll()

        publish(8)
        assert (intake.received, intake.overflowed, budget.held_bytes) == (8, 3, 1000)
        assert [(len(m.data), m.log_ns, m.sequence) for m in intake.take()] == [
            (200, 7, k) for k in range(1, 6)
        ]
        assert budget.held_bytes == 0
        publish(2)
        intake.end()
        assert [m.sequence for m in intake.take()] == [9, 10]
        assert (intake.received, intake.overflowed, intake.missing, budget.held_bytes) == (10, 3, 0, 0)
    finally:
        node.destroy_node()


def test_the_subscription_is_what_each_publisher_offers(stage):
    """Reliable, best effort, latched from before the start, and one that comes later."""
    latched = stage.peer.create_publisher(String, 'robot_description', LATCHED)
    latched.publish(String(data='<robot/>'))
    recorder = stage.recorder(extra_topics=['robot_description', 'late'])
    stage.publisher(*SMALL, '--best-effort', '--joint-hz', '0')
    joints = stage.peer.create_publisher(JointState, 'joint_states', QoSProfile(depth=1000))
    stage.peer.wait_for_subscribers(joints, latched)
    message, count = JointState(name=['joint1'], position=[0.0]), itertools.count()

    def send():
        message.header.stamp = time_message(START_NS + next(count) * 1_000_000)
        joints.publish(message)

    stage.peer.create_timer(0.005, send)
    stage.wait_until_heard()
    assert stage.ask('start')[0]
    late = stage.peer.create_publisher(Float64, 'late', SENSOR)
    command = stage.peer.create_publisher(PoseStamped, 'target_pose', COMMAND)
    stage.peer.wait_for_subscribers(late, command)
    command.publish(PoseStamped())
    for value in range(10):
        late.publish(Float64(data=float(value)))
    stage.status(lambda v: float(v['duration_s']) >= 1.5, 'some seconds')
    assert stage.ask('keep', True) == (True, 'kept episode_000000 as a success')
    folder = stage.output / 'episode_000000'
    topics = read_episode(folder)['topics']
    offered = {name: (topic['reliability'], topic['durability']) for name, topic in topics.items()}
    assert offered == {
        JOINTS: ('reliable', 'volatile'),
        **dict.fromkeys(CAMERAS, ('best_effort', 'volatile')),
        '/robot_description': ('reliable', 'transient_local'),
        '/late': ('best_effort', 'volatile'),
        '/target_pose': ('reliable', 'volatile'),
    }
    found = read_bag(folder)
    assert len(found['/robot_description']) == 1
    assert len(found['/late']) == 10
    for index in counts_of(folder).values():
        assert len(index) > 10
        np.testing.assert_array_equal(np.diff(index), 1)
    assert recorder.stop() == 0, recorder.output()


def test_a_disk_that_is_full_stops_it_and_what_is_there_is_kept(stage):
    recorder = stage.recorder()
    stage.publisher('--joint-hz', '100')
    stage.wait_until_heard()
    limits = resource.prlimit(recorder.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(recorder.process.pid, resource.RLIMIT_FSIZE, (60 * 2**20, limits[1]))
    stage.start()
    status, _ = stage.status(lambda v: v['state'] == 'stopped', 'the end of the disk')
    assert status.level == DiagnosticStatus.ERROR
    assert 'File too large' in status.message
    assert 'kept episode_000000 without a label' in status.message
    header = read_episode(stage.output / 'episode_000000')
    assert 'File too large' in header['stopped']
    assert header['success'] is None
    for topic, index in counts_of(stage.output / 'episode_000000').items():
        np.testing.assert_array_equal(np.diff(index), 10 if topic == JOINTS else 1)
    assert stage.ask('keep', True) == (False, 'nothing is being recorded')

    resource.prlimit(recorder.process.pid, resource.RLIMIT_FSIZE, limits)
    stage.record_for(0.5)
    assert stage.ask('keep', True) == (True, f'kept episode_000001 as a success; {NO_COMMAND}')
    assert recorder.stop() == 0, recorder.output()
    assert 'recording stopped' in recorder.output()


def test_start_says_what_speaks_against_it(stage):
    """A topic of another type than the robot's file implies, silence, a disk that is too small, an unknown type."""
    recorder = stage.recorder(min_free_mb=1e6, silence_s=0.5)
    wrong = stage.peer.create_publisher(String, 'joint_states', QoSProfile(depth=1))
    stage.publisher(*SMALL, '--joint-hz', '0', '--cameras', '1')
    stage.peer.wait_for_subscribers(wrong)
    stage.wait_until_heard([CAMERAS[0]])
    success, reason = stage.ask('start')
    assert not success
    assert (
        '/joint_states has type std_msgs/msg/String, the robot file means sensor_msgs/msg/JointState'
        in reason
    )
    assert 'nobody publishes /wrist/image_raw' in reason
    assert 'min_free_mb is 1000000' in reason
    assert CAMERAS[0] not in reason
    stage.publishers[0].stop()
    stage.status(
        lambda v: f'nobody publishes {CAMERAS[0]} any more' in v['warnings'], 'the silence to be seen'
    )
    assert recorder.stop() == 0, recorder.output()
    assert list(stage.output.iterdir()) == []


@pytest.fixture
def recorder(rclpy_context, tmp_path):
    """A recorder in this process, whose services are called directly."""
    overrides = [Parameter('output_dir', value=str(tmp_path)), Parameter('require_topics', value=False)]
    node = EpisodeRecorderNode(context=rclpy_context, parameter_overrides=overrides)
    yield node
    node.destroy_node()


def test_teleoperation_notices_each_episode_that_begins(recorder):
    """It repeats the gripper's command then, whichever service it was that began the episode."""
    begun = []
    client = EpisodeClient(recorder, NODE, lambda: begun.append(recorder.worker.episode), lambda: None)
    recorder._status = SimpleNamespace(publish=client._on_status)
    recorder._report()
    for service in ('start', 'rerecord', 'rerecord', 'discard', 'rerecord'):
        response = getattr(recorder, f'_on_{service}')(None, Trigger.Response())
        assert response.success, response.message
        recorder._report()
    assert begun == ['episode_000000'] * 4


def test_what_can_not_be_removed_is_said_and_recording_goes_on(recorder, monkeypatch):
    def ask(service):
        response = getattr(recorder, f'_on_{service}')(None, Trigger.Response())
        return response.success, response.message

    for number, service in enumerate(('discard', 'rerecord')):
        name = f'episode_{number:06d}'
        assert ask('start') == (True, f'recording {name}')
        with monkeypatch.context() as patch:
            refuse = Mock(side_effect=OSError(errno.EACCES, 'Permission denied'))
            patch.setattr('decoupled_policy_ros.data.bags.episodes.shutil.rmtree', refuse)
            success, message = ask(service)
        assert not success
        assert f'.{name}.partial can not be removed: Permission denied' in message
        assert recorder.worker.episode == ''
    assert ask('start') == (True, 'recording episode_000002')
    assert ask('discard') == (True, 'threw episode_000002 away')


def test_a_folder_that_was_removed_ends_an_episode_and_is_made_anew_by_the_next(recorder):
    worker, folder = recorder.worker, recorder.worker.store.folder

    def looked():
        worker._looked_at = -1.0
        worker._tick()
        recorder._report()

    def start():
        return recorder._on_start(None, Trigger.Response())

    said = []
    recorder._status = SimpleNamespace(publish=lambda status: said.append((status.level, status.message)))
    shutil.rmtree(folder)
    looked()
    assert said[-1][0] == DiagnosticStatus.WARN and said[-1][1].startswith('idle')
    assert worker.free_mb > 0 and not folder.exists()
    assert start().message == 'recording episode_000000'
    shutil.rmtree(folder)
    looked()
    level, message = said[-1]
    assert level == DiagnosticStatus.ERROR
    gone = f'its folder was removed; {folder}/.episode_000000.partial is gone'
    assert message.startswith(f'recording stopped: {gone}') and not folder.exists()
    assert start().message == 'recording episode_000000'
    shutil.rmtree(folder)
    answer = recorder._on_keep(SetBool.Request(data=True), SetBool.Response())
    assert not answer.success and answer.message.endswith('.episode_000000.partial is gone')
    assert start().success and recorder._on_discard(None, Trigger.Response()).success


@pytest.mark.parametrize(
    ('parameters', 'complaint'),
    [
        ({'robot': 'ur99'}, "no robot 'ur99'"),
        ({'output_dir': '/dev/null/episodes'}, '/dev/null/episodes can not be made: Not a directory'),
        ({'compression': 'gzip'}, "'gzip' is not one of 'none', 'lz4', 'zstd'"),
    ],
)
def test_a_parameter_that_can_not_be_is_refused(rclpy_context, parameters, complaint):
    overrides = [Parameter(name, value=value) for name, value in parameters.items()]
    with pytest.raises(DecoupledPolicyError) as error:
        EpisodeRecorderNode(context=rclpy_context, parameter_overrides=overrides)
    assert complaint in str(error.value)


def test_every_parameter_is_described_and_in_the_file(repository, rclpy_context, tmp_path):
    overrides = [Parameter('output_dir', value=str(tmp_path))]
    node = EpisodeRecorderNode(context=rclpy_context, parameter_overrides=overrides)
    try:
        names = [field.name for field in dataclasses.fields(EpisodeSettings)]
        for descriptor in node.describe_parameters(names):
            assert len(descriptor.description) > 10, descriptor.name
            assert descriptor.read_only == (descriptor.name != 'instruction')
            value = node.get_parameter(descriptor.name).value
            if isinstance(value, float):
                assert descriptor.floating_point_range, descriptor.name
            if type(value) is int:
                assert descriptor.integer_range, descriptor.name
    finally:
        node.destroy_node()
    file = yaml.safe_load((repository / 'config/episode_recorder.yaml').read_text())['/**']['ros__parameters']
    assert sorted([*file, 'robot', 'output_dir', 'instruction']) == sorted(names)
    defaults = dataclasses.asdict(EpisodeSettings())
    assert {**file, 'extra_topics': tuple(file['extra_topics'])} == {name: defaults[name] for name in file}
