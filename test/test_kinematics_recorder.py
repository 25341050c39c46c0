"""kinematics_recorder_node as a process, over real DDS."""

import dataclasses
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from arm_publisher import START_NS, joint_positions
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.parameter import Parameter
from ros_harness import NodeProcess, Peer
from sensor_msgs.msg import JointState
from std_msgs.msg import String

from decoupled_policy_ros.data.motions.joint_rows import JointRows
from decoupled_policy_ros.data.motions.motions import motion_actions, read_motions, resample
from decoupled_policy_ros.data.motions.recorder import MotionRecorder
from decoupled_policy_ros.nodes.common import LATCHED, floats, pose_stamped, time_message
from decoupled_policy_ros.nodes.kinematics_recorder_node import KinematicsRecorderNode, RecorderNodeSettings
from decoupled_policy_ros.nodes.recorder_worker import PERIOD_S, RETRY_S, RecorderWorker
from decoupled_policy_ros.robot.description import load_robot, robot_file
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.kinematics import Kinematics

pytestmark = pytest.mark.process

MS = 1_000_000
STATUS = 'kinematics_recorder_node/status'


class Arm:
    """arm_publisher.py as a process."""

    def __init__(self, options):
        script = Path(__file__).with_name('arm_publisher.py')
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, script, *options], stdin=pipe, stdout=pipe, text=True
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with self.process.stdout as lines:
            self.lines.extend(lines)

    def number(self, word):
        """The number that followed `word` last, or None."""
        found = [line.split()[1] for line in list(self.lines) if line.startswith(word)]
        return int(found[-1]) if found else None

    def go(self):
        self.process.stdin.write('go\n')
        self.process.stdin.flush()

    def stop(self):
        self.process.stdin.close()
        assert self.process.wait(60) == 0
        self._reader.join()


class Stage:
    """Recorders and arms as processes, and a peer that hears what the recorder says."""

    def __init__(self, folder):
        self.folder = folder
        self.peer = Peer()
        self.peer.record(DiagnosticStatus, STATUS, LATCHED)
        self.peer.record(DiagnosticArray, '/diagnostics')
        self.recorders, self.arms = [], []

    def recorder(self, folder, **parameters):
        self.peer.forget()
        log = self.folder / f'recorder_{len(self.recorders)}.log'
        self.recorders.append(
            NodeProcess('kinematics_recorder_node', log, {'output_dir': str(folder), **parameters})
        )
        return self.recorders[-1]

    def arm(self, *options):
        self.arms.append(Arm(options))
        return self.arms[-1]

    def values(self):
        """Values of the last status."""
        statuses = self.peer.received(STATUS)
        return {pair.key: pair.value for pair in statuses[-1].values} if statuses else {}

    def wait(self, condition, what):
        """Wait for a status whose values fulfil `condition`; returns them."""
        return self.peer.wait_for(lambda: (v := self.values()) and condition(v) and v, what)

    def wait_until_heard(self):
        self.wait(lambda v: float(v['rate_hz']) > 0 and v['recording'] == 'false', 'joint states at rest')

    def play(self, arm, files=1):
        """Let the arm move once it is heard, and wait until the recorder has closed so many files."""
        self.wait_until_heard()
        arm.go()
        self.peer.wait_for(lambda: arm.number('done') is not None, 'the end of the movement')
        self.wait(lambda v: int(v['files']) == files and v['recording'] == 'false', 'the files')

    def close(self):
        for arm in self.arms:
            if arm.process.poll() is None:
                arm.stop()
        for recorder in self.recorders:
            recorder.stop()
        self.peer.close()


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    yield stage
    stage.close()


@pytest.fixture
def motions_folder(tmp_path):
    return tmp_path / 'motions'


def all_joints(robot, moved_s):
    """Rows (T, 8) that the recorder should make of an arm that moved for so many seconds."""
    positions = np.stack([joint_positions(robot, s) for s in moved_s])
    return np.concatenate([positions[:, :7], robot.gripper.normalised(positions[:, 7:])[:, None]], -1)


def test_nothing_is_lost_at_1_khz_and_the_residual_is_reported(stage, motions_folder):
    recorder = stage.recorder(motions_folder)
    arm = stage.arm('--segments', '5', '--pose-every', '10', '--pose-offset-m', '0.002')
    stage.play(arm)
    values = stage.wait(lambda v: int(v['residual_count']) > 500, 'residuals')
    assert recorder.stop() == 0, recorder.output()
    first, last = arm.number('first'), arm.number('done')
    assert last - first == 4999

    (motion,) = read_motions(motions_folder)
    index = (motion.stamps_ns - START_NS) // MS
    np.testing.assert_array_equal(motion.stamps_ns, START_NS + np.arange(index[0], index[-1] + 1) * MS)
    assert index[0] <= first
    assert index[-1] >= last
    robot = load_robot('panda_sim')
    expected = all_joints(robot, np.clip(index - first + 1, 0, 5000) / 1000)
    np.testing.assert_allclose(motion.joint_positions, expected, atol=1e-6)
    np.testing.assert_allclose(motion.actions, motion_actions(Kinematics(robot), expected), atol=1e-6)
    assert motion.fingerprint == Fingerprint.of(robot, 0.0)
    assert len(resample(motion, 20.0)[0]) >= 100

    for report in (motion.summary, values):
        assert float(report['residual_mean_m']) == pytest.approx(0.002, abs=1e-6)
        assert float(report['residual_max_m']) == pytest.approx(0.002, abs=1e-6)
        assert float(report['residual_max_rad']) < 1e-6
    assert motion.summary['residual_count'] == len(range(-(-index[0] // 10), index[-1] // 10 + 1))
    assert (values['lost_by_dds'], values['out_of_order'], values['rejected']) == ('0', '0', '0')
    assert stage.peer.last(STATUS).level == DiagnosticStatus.OK
    (status,) = stage.peer.last('/diagnostics').status
    assert status.name == 'kinematics_recorder_node: motions'
    assert stage.peer.last('/diagnostics').header.stamp.sec > 0


def test_a_killed_recorder_loses_less_than_a_second(stage, motions_folder):
    recorder = stage.recorder(motions_folder)
    arm = stage.arm('--segments', '600')
    stage.wait_until_heard()
    arm.go()
    stage.wait(lambda v: int(v['recorded']) > 2000, 'some motion')
    recorder.process.kill()
    recorder.process.wait()
    sent = arm.number('sent')
    arm.stop()
    assert [path.name for path in motions_folder.iterdir()] == ['motion_000000.arrow.part']

    again = stage.recorder(motions_folder)
    stage.wait(lambda v: 'rate_hz' in v, 'the second recorder')
    assert again.stop() == 0
    assert 'motion_000000.arrow.part was left by a recorder that was killed' in again.output()
    (motion,) = read_motions(motions_folder)
    index = (motion.stamps_ns - START_NS) // MS
    np.testing.assert_array_equal(np.diff(index), 1)
    assert len(motion) > 2000
    assert index[-1] >= sent - 1000
    assert motion.summary['recovered'] is True


def test_rests_are_left_out_and_the_order_of_joints_does_not_matter(stage, motions_folder):
    motions = {}
    for order, options in (('forward', ['--best-effort']), ('backward', ['--reverse'])):
        recorder = stage.recorder(motions_folder / order, use_current_pose=False)
        arm = stage.arm('--segments', '1,1.5,1', '--rate-hz', '200', *options)
        stage.play(arm, files=2)
        assert recorder.stop() == 0, recorder.output()
        arm.stop()
        motions[order] = read_motions(motions_folder / order)
        start_ns = START_NS + arm.number('first') * 5 * MS
        for motion, start_s in zip(motions[order], (0.0, 2.5), strict=True):
            begin_s, end_s = (motion.stamps_ns[[0, -1]] - start_ns) / 1e9
            assert begin_s == pytest.approx(start_s - 0.1, abs=0.03)
            assert end_s == pytest.approx(start_s + 1.1, abs=0.03)
    for forward, backward in zip(motions['forward'], motions['backward'], strict=True):
        np.testing.assert_array_equal(forward.joint_positions, backward.joint_positions)
        np.testing.assert_array_equal(forward.actions, backward.actions)


def test_nan_and_missing_joints_are_rejected_counted_and_reported(stage, motions_folder):
    recorder = stage.recorder(motions_folder)
    arm = stage.arm('--segments', '2', '--rate-hz', '200', '--nan-every', '50', '--lack-every', '80')
    stage.play(arm)
    assert recorder.stop() == 0, recorder.output()
    (motion,) = read_motions(motions_folder)
    moved = (motion.stamps_ns - START_NS) // (5 * MS) - arm.number('first') + 1
    assert np.isfinite(motion.joint_positions).all()
    assert np.isfinite(motion.actions).all()
    gone = sorted({*range(50, 401, 50), *range(80, 401, 80)})
    assert sorted(set(range(1, 401)) - set(moved.tolist())) == gone
    assert int(stage.values()['rejected']) == len(gone)
    warnings = [s.message for s in stage.peer.received(STATUS) if s.level == DiagnosticStatus.WARN]
    rejections = [text for text in warnings if 'joint states rejected' in text]
    assert rejections
    assert all('not finite' in text or 'lacks joint1' in text for text in rejections)


def test_a_robot_that_does_not_exist_ends_the_node_with_one_line(stage, motions_folder):
    recorder = stage.recorder(motions_folder, robot='ur99')
    assert recorder.process.wait(60) == 1
    assert "no robot 'ur99'" in recorder.output()
    assert 'Traceback' not in recorder.output()


def test_no_rest_is_held_in_memory_for_a_second(stage, motions_folder):
    (idle_s,) = (
        f.metadata['floating'] for f in dataclasses.fields(RecorderNodeSettings) if f.name == 'idle_time_s'
    )
    assert idle_s[1] + PERIOD_S < 1.0
    recorder = stage.recorder(motions_folder, idle_time_s=2.0)
    assert recorder.process.wait(60) == 1
    assert 'idle_time_s' in recorder.output()
    assert 'Traceback' not in recorder.output()


@pytest.mark.parametrize('latched', [False, True])
def test_the_arm_is_what_robot_description_says_or_else_the_file(stage, motions_folder, latched):
    """An FR3 whose upper arm is 50 mm longer than that of the file."""
    urdf = robot_file('fr3').with_suffix('.urdf').read_text()
    assert urdf.count('0 -0.316 0') == 1
    longer = urdf.replace('0 -0.316 0', '0 -0.366 0')
    publisher = stage.peer.create_publisher(String, 'robot_description', LATCHED) if latched else None
    if publisher:
        publisher.publish(String(data=longer))
    timeout_s = 60.0 if latched else 0.3
    recorder = stage.recorder(motions_folder, robot='fr3', robot_description_timeout_s=timeout_s)
    arm = stage.arm('--segments', '1', '--rate-hz', '200', '--robot', 'fr3')
    stage.play(arm)
    assert recorder.stop() == 0, recorder.output()
    (motion,) = read_motions(motions_folder)
    robots = {True: load_robot('fr3', description_xml=longer), False: load_robot('fr3')}
    expected = motion_actions(Kinematics(robots[latched]), motion.joint_positions)
    np.testing.assert_allclose(motion.actions, expected, atol=1e-6)
    other = motion_actions(Kinematics(robots[not latched]), motion.joint_positions)
    assert np.linalg.norm(motion.actions[:, :3] - other[:, :3], axis=1).min() > 0.04
    assert motion.fingerprint == Fingerprint.of(robots[latched], 0.0)
    assert ('no URDF on robot_description within 0.3 s' in recorder.output()) is not latched
    if publisher:
        stage.peer.destroy_publisher(publisher)


def test_every_parameter_is_described_and_in_the_file(repository, rclpy_context, tmp_path):
    overrides = [Parameter('output_dir', value=str(tmp_path))]
    node = KinematicsRecorderNode(context=rclpy_context, parameter_overrides=overrides)
    try:
        names = list(RecorderNodeSettings.__dataclass_fields__)
        for descriptor in node.describe_parameters(names):
            assert len(descriptor.description) > 10, descriptor.name
            assert descriptor.read_only, descriptor.name
            if isinstance(node.get_parameter(descriptor.name).value, float):
                assert descriptor.floating_point_range, descriptor.name
    finally:
        node.destroy_node()
    file = yaml.safe_load((repository / 'config/kinematics_recorder.yaml').read_text())['/**'][
        'ros__parameters'
    ]
    assert sorted([*file, 'robot', 'output_dir']) == sorted(names)
    defaults = RecorderNodeSettings()
    assert file == {name: getattr(defaults, name) for name in file}


@pytest.mark.parametrize('late_ticks', [0, 3])
def test_every_pose_inside_a_motion_is_compared_however_late_the_joint_states_are(tmp_path, late_ticks):
    """After a while without processor time a slow topic is up to date long before a fast one."""
    robot = load_robot('panda_sim')
    kinematics, states, poses = Kinematics(robot), [], []
    for k in range(2500):  # at 500 Hz: rest, two seconds of motion, rest
        positions = joint_positions(robot, np.clip(k / 500 - 1.0, 0.0, 2.0))
        state = JointState(name=list(robot.all_joint_names), position=floats(positions))
        state.header.stamp = time_message(START_NS + k * 2 * MS)
        states.append(state)
        if k % 5 == 0:
            pose = kinematics.forward(positions[:7])
            poses.append(pose_stamped(pose, robot.base_frame, START_NS + k * 2 * MS))
    blocks, pose_blocks = np.split(np.arange(2500), 5), np.split(np.arange(500), 5)
    heard = [[] for _ in range(late_ticks)] + [[states[i] for i in block] for block in blocks]
    heard_poses = [[poses[i] for i in block] for block in pose_blocks] + [[] for _ in range(late_ticks)]
    recorder = MotionRecorder(tmp_path, robot)
    worker = RecorderWorker(
        recorder,
        JointRows(robot, False),
        partial(heard.pop, 0),
        list,
        partial(heard_poses.pop, 0),
        0.0,
        print,
    )
    for _ in range(len(heard)):
        worker._tick()
    recorder.finish()
    (motion,) = read_motions(tmp_path)
    first, last = (motion.stamps_ns[[0, -1]] - START_NS) // MS
    assert last - first > 2000
    assert motion.summary['residual_count'] == len(range(-(-first // 10), last // 10 + 1))
    assert motion.summary['residual_max_m'] < 1e-9


def test_poses_of_a_franka_are_compared_in_the_frame_that_its_driver_names(tmp_path):
    robot = load_robot('fr3')
    heard = [pose_stamped(np.eye(4), frame, START_NS) for frame in ('base', 'fr3_link0', 'world')]
    worker = RecorderWorker(
        MotionRecorder(tmp_path, robot), JointRows(robot, False), list, list, lambda: heard, 0.0, print
    )
    worker._hear_poses()
    assert len(worker._waiting_poses) == 2 and worker.rejected_poses == 1
    assert worker.last_pose_rejection == "pose is in frame 'world', expected 'fr3_link0' or 'base'"


def test_poses_do_not_pile_up_while_nothing_is_recorded(tmp_path):
    robot = load_robot('panda_sim')
    pose = pose_stamped(Kinematics(robot).forward(robot.home_rad), robot.base_frame, START_NS)
    rows, no_space = JointRows(robot, False), 1e12  # MB
    worker = RecorderWorker(
        MotionRecorder(tmp_path, robot), rows, list, list, lambda: [pose] * 10, no_space, print
    )
    for _ in range(5):
        worker._tick()
    assert worker.stopped and not worker._waiting_poses


def test_a_folder_that_was_removed_stops_a_motion_and_is_made_anew_by_the_next(tmp_path):
    robot, folder, said = load_robot('panda_sim'), tmp_path / 'motions', []
    blocks = []
    for second in range(7):  # at 100 Hz: rest, motion, and so on
        block = []
        for k in range(second * 100, second * 100 + 100):
            positions = joint_positions(robot, second // 2 + (second % 2) * (k % 100) / 100)
            state = JointState(name=list(robot.all_joint_names), position=floats(positions))
            state.header.stamp = time_message(START_NS + k * 10 * MS)
            block.append(state)
        blocks.append(block)
    worker = RecorderWorker(
        MotionRecorder(folder, robot),
        JointRows(robot, False),
        partial(blocks.pop, 0),
        list,
        list,
        0.0,
        said.append,
    )
    shutil.rmtree(folder)
    worker._tick()
    assert not said and worker.free_mb > 0
    worker._tick()
    assert worker.recorder.recording and folder.is_dir()
    shutil.rmtree(folder)
    worker._tick()
    assert worker.stopped == f'{folder} is gone' and said == [f'recording stopped: {folder} is gone']
    worker._failed_at -= RETRY_S  # a while later
    while blocks:
        worker._tick()
    worker._guarded(worker.recorder.finish)
    assert said[1].startswith('recording goes on') and len(said) == 2
    assert len(read_motions(folder)) == 2
