"""Motions cut out of a stream of joint states, without ROS: what counts as motion, and what ends one."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoupled_policy_ros.data.motions.files import MotionWriter
from decoupled_policy_ros.data.motions.joint_rows import GRIPPER_MEMORY_S, MAX_GRIPPER_AGE_S, JointRows
from decoupled_policy_ros.data.motions.kinematic_residual import pose_residuals
from decoupled_policy_ros.data.motions.motions import motion_actions, read_motions
from decoupled_policy_ros.data.motions.recorder import SPEED_WINDOW_S, MotionRecorder, MotionSettings
from decoupled_policy_ros.errors import ConfigError, DatasetError
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics

S = 1_000_000_000
START_NS = 1_700_000_000 * S


@pytest.fixture(scope='module')
def robot():
    return load_robot('panda_sim')


def stream(robot, segments, rate_hz=200.0):
    """Stamps and joints of an arm that alternately moves (True) and rests (False) for so many seconds."""
    velocity = np.concatenate([np.full(round(s * rate_hz), 0.3 if moves else 0.0) for moves, s in segments])
    joints = np.tile(np.append(robot.home_rad, -1.0), (len(velocity), 1))
    phase = np.cumsum(velocity) / rate_hz * 4
    joints[:, :2] += 0.1 * np.stack([np.sin(phase), np.cos(phase)], -1)  # one of the two is always under way
    stamps_ns = START_NS + np.rint(np.arange(len(velocity)) * S / rate_hz).astype(np.int64)
    return stamps_ns, joints


def record(folder, robot, stamps_ns, joints, block=40, **thresholds):
    recorder = MotionRecorder(folder, robot, MotionSettings(**thresholds))
    for first in range(0, len(stamps_ns), block):
        recorder.push(stamps_ns[first : first + block], joints[first : first + block])
    recorder.finish()
    return recorder, read_motions(folder) if recorder.counters.files else []


def test_idle_time_is_removed_and_each_motion_has_its_file(tmp_path, robot):
    segments = [(False, 2), (True, 3), (False, 0.3), (True, 1), (False, 4), (True, 2), (False, 1)]
    stamps_ns, joints = stream(robot, segments)
    recorder, motions = record(tmp_path, robot, stamps_ns, joints)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        'motion_000000.arrow',
        'motion_000001.arrow',
    ]
    for motion, (start_s, end_s) in zip(motions, [(2.0, 6.3), (10.3, 12.3)], strict=True):
        assert (motion.stamps_ns[0] - START_NS) / S == pytest.approx(start_s - SPEED_WINDOW_S, abs=0.06)
        assert (motion.stamps_ns[-1] - START_NS) / S == pytest.approx(end_s + SPEED_WINDOW_S, abs=0.06)
        rows = np.searchsorted(stamps_ns, motion.stamps_ns)
        assert np.all(np.diff(rows) == 1)
        np.testing.assert_array_equal(motion.joint_positions, joints[rows].astype(np.float32))
        np.testing.assert_allclose(motion.actions, motion_actions(Kinematics(robot), joints[rows]), atol=1e-6)
    assert recorder.counters.recorded == sum(len(motion) for motion in motions)
    assert recorder.counters.samples == len(stamps_ns)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_files_do_not_depend_on_how_the_stream_is_cut_into_blocks(tmp_path_factory, robot, data):
    segments = data.draw(
        st.lists(st.tuples(st.booleans(), st.floats(0.05, 1.5)), min_size=1, max_size=6), label='segments'
    )
    stamps_ns, joints = stream(robot, segments, rate_hz=100.0)
    blocks = [data.draw(st.integers(1, 60)) for _ in range(2)]
    results = [record(tmp_path_factory.mktemp('m'), robot, stamps_ns, joints, block)[1] for block in blocks]
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a.stamps_ns, b.stamps_ns)
        np.testing.assert_array_equal(a.joint_positions, b.joint_positions)


def test_a_moving_gripper_is_a_motion_and_noise_is_none(tmp_path, robot):
    stamps_ns, joints = stream(robot, [(False, 4)])
    joints = joints + np.random.default_rng(0).normal(0, 1e-4, joints.shape)
    _, motions = record(tmp_path / 'noise', robot, stamps_ns, joints)
    assert motions == []
    joints[400:500, 7] = np.linspace(-1, 1, 100)
    joints[500:, 7] = 1
    _, motions = record(tmp_path / 'gripper', robot, stamps_ns, joints)
    assert len(motions) == 1
    assert motions[0].joint_positions[0, 7] < -0.99
    assert motions[0].joint_positions[-1, 7] > 0.99


def test_short_motions_are_dropped_and_counted(tmp_path, robot):
    stamps_ns, joints = stream(robot, [(False, 1), (True, 0.2), (False, 1)])
    recorder, motions = record(tmp_path, robot, stamps_ns, joints, min_motion_s=0.8)
    assert motions == []
    assert list(tmp_path.iterdir()) == []
    assert (recorder.counters.too_short, recorder.counters.files, recorder.counters.recorded) == (1, 0, 0)


def test_a_gap_and_an_impossible_step_end_a_motion(tmp_path, robot):
    stamps_ns, joints = stream(robot, [(True, 6)])
    stamps_ns[400:] += S // 4
    joints[800:, 3] += 0.5
    recorder, motions = record(tmp_path, robot, stamps_ns, joints)
    assert [len(motion) for motion in motions] == [400, 400, 400]
    assert (recorder.counters.gaps, recorder.counters.steps) == (1, 1)


def test_late_samples_are_left_out_and_a_clock_set_back_starts_anew(tmp_path, robot):
    stamps_ns, joints = stream(robot, [(True, 4)])
    shuffled = stamps_ns.copy()
    shuffled[[100, 101]] = shuffled[[101, 100]]
    recorder, motions = record(tmp_path / 'late', robot, shuffled, joints)
    assert recorder.counters.out_of_order == 1
    assert [len(motion) for motion in motions] == [len(stamps_ns) - 1]

    reset = stamps_ns.copy()
    reset[500:] -= 100 * S
    recorder, motions = record(tmp_path / 'reset', robot, reset, joints)
    assert recorder.counters.clock_jumps == 1
    assert [len(motion) for motion in motions] == [500, 300]


def test_a_new_recorder_never_overwrites(tmp_path, robot):
    stamps_ns, joints = stream(robot, [(True, 2)])
    (tmp_path / 'motion_000001.arrow.part').touch()
    for _ in range(2):
        record(tmp_path, robot, stamps_ns, joints)
    assert {path.name for path in tmp_path.iterdir()} == {
        'motion_000000.arrow', 'motion_000001.arrow.part', 'motion_000002.arrow',
    }  # fmt: skip


def test_thresholds_must_be_positive():
    with pytest.raises(ConfigError, match='idle_time_s must be positive, got 0'):
        MotionSettings(idle_time_s=0.0)


def test_residual_is_that_of_the_poses_own_time(tmp_path, robot):
    stamps_ns, joints = stream(robot, [(True, 3)])
    kinematics = Kinematics(robot)
    middle_ns = (stamps_ns[10:400:7] + stamps_ns[11:401:7]) // 2
    middle = (joints[10:400:7] + joints[11:401:7]) / 2
    poses = kinematics.forward_many(middle[:, :-1])
    poses[:, 2, 3] += 0.01
    outside_ns = np.array([stamps_ns[0] - 1, stamps_ns[-1] + 1])
    pose_stamps = np.concatenate([middle_ns, stamps_ns[20:30], outside_ns])
    exact = kinematics.forward_many(joints[20:30, :-1])
    everything = np.concatenate([poses, exact, exact[:2]])
    inside, position_m, rotation_rad = pose_residuals(
        kinematics, stamps_ns, joints[:, :-1], pose_stamps, everything, max_gap_s=0.1
    )
    assert inside.tolist() == [True] * (len(pose_stamps) - 2) + [False, False]
    np.testing.assert_allclose(position_m[: len(poses)], 0.01, atol=1e-9)
    np.testing.assert_allclose(position_m[len(poses) :], 0.0, atol=1e-12)
    np.testing.assert_allclose(rotation_rad, 0.0, atol=1e-6)

    recorder = MotionRecorder(tmp_path, robot)
    recorder.push(stamps_ns, joints)
    recorder.push_poses(pose_stamps, everything)
    recorder.finish()
    summary = read_motions(tmp_path)[0].summary
    assert summary['residual_count'] == len(pose_stamps) - 2
    assert summary['residual_max_m'] == pytest.approx(0.01, abs=1e-9)
    assert summary['residual_mean_m'] == pytest.approx(0.01 * len(poses) / (len(pose_stamps) - 2), abs=1e-9)


def message(names, positions, stamp_ns=START_NS):
    stamp = SimpleNamespace(sec=stamp_ns // S, nanosec=stamp_ns % S)
    return SimpleNamespace(header=SimpleNamespace(stamp=stamp), name=list(names), position=list(positions))


def test_rows_go_by_name_and_unsound_messages_are_counted(robot):
    names = robot.all_joint_names
    positions = np.arange(9.0) / 100
    shuffled = np.random.default_rng(0).permutation(9)
    bad = positions.copy()
    bad[2] = np.nan
    rows = JointRows(robot)
    stamps_ns, joints = rows.rows(
        [
            message(names, positions),
            message([names[i] for i in shuffled], positions[shuffled], START_NS + 1),
            message(names, bad),
            message(names[:8], positions[:8]),
            message(names, positions, 0),
            message(['lift_joint'], [1.0]),
        ]
    )
    assert stamps_ns.tolist() == [START_NS, START_NS + 1]
    expected = np.append(positions[:7], robot.gripper.normalised(positions[7:]))
    np.testing.assert_array_equal(joints, [expected, expected])
    assert rows.rejected == {'joints': 2, 'unstamped': 1}
    assert rows.foreign == 1


def test_gripper_states_from_a_topic_of_their_own_are_the_latest_before_and_never_old(robot):
    rows = JointRows(robot, gripper_apart=True)
    arm, gripper = robot.joint_names, robot.gripper.joint_names

    def gripper_message(width_m, stamp_ns):
        return message(gripper, np.array(robot.gripper.joint_signs) * width_m / 2, stamp_ns)

    arm_stamps = [START_NS + round(s * S) for s in (-0.01, 0.0, 0.05, 0.1, 0.11 + MAX_GRIPPER_AGE_S)]
    stamps_ns, joints = rows.rows(
        [message(arm, np.zeros(7), stamp) for stamp in arm_stamps],
        [gripper_message(0.08, START_NS), gripper_message(0.0, START_NS + S // 10)],
    )
    assert stamps_ns.tolist() == arm_stamps[1:4]
    np.testing.assert_allclose(joints[:, 7], [-1, -1, 1], atol=1e-12)
    assert rows.rejected == {'gripper': 2}


def gripper_apart(robot, clock_ns, since_s, until_s, rate_hz=100, width_m=0.08):
    """Stamps, and states of an arm and of its gripper at them."""
    count = round((until_s - since_s) * rate_hz)
    stamps_ns = [START_NS + clock_ns + round((since_s + k / rate_hz) * S) for k in range(count)]
    fingers = np.array(robot.gripper.joint_signs) * width_m / 2
    arms = [message(robot.joint_names, np.zeros(7), stamp) for stamp in stamps_ns]
    return stamps_ns, arms, [message(robot.gripper.joint_names, fingers, stamp) for stamp in stamps_ns]


def test_no_arm_state_is_lost_of_a_gripper_whose_states_come_all_at_once_or_earlier(robot):
    for arm_later in (False, True):
        rows = JointRows(robot, gripper_apart=True)
        stamps_ns, arms, grippers = gripper_apart(robot, 0, 0, 8, rate_hz=1000)
        if arm_later:
            assert not len(rows.rows([], grippers)[0])
            grippers = []
        assert rows.rows(arms, grippers)[0].tolist() == stamps_ns
        assert not rows.rejected


def test_a_clock_that_is_set_back_ends_no_recording_and_mixes_no_gripper_states(robot):
    rows = JointRows(robot, gripper_apart=True)

    def record(clock_ns, since_s, until_s, width_m):
        stamps_ns, arms, grippers = gripper_apart(robot, clock_ns, since_s, until_s, width_m=width_m)
        found_ns, joints = rows.rows(arms, grippers[::10])
        assert found_ns.tolist() == stamps_ns
        np.testing.assert_allclose(joints[:, 7], -1 if width_m else 1, atol=1e-12)

    for second in range(15):
        record(0, second, second + 1, 0.08)
    for second in range(35):  # until the clock has passed what it was before
        record(-30 * S - S // 20, second, second + 1, 0.0)
    assert not rows.rejected


def test_what_is_remembered_of_a_gripper_is_bounded(robot):
    rows = JointRows(robot, gripper_apart=True)
    for second in range(100):
        rows.rows([], gripper_apart(robot, 0, second, second + 1)[2])
    assert len(rows._gripper[0]) == len(rows._gripper[1]) <= 100 * GRIPPER_MEMORY_S + 1


def test_a_full_disk_ends_in_a_clear_error_and_what_was_written_is_saved(tmp_path):
    """A limit on the file size stands in for a full disk: writes fail in the same way."""
    script = """
import resource, sys
import numpy as np
from decoupled_policy_ros.data.motions.recorder import MotionRecorder
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.robot.description import load_robot
robot = load_robot('panda_sim')
recorder = MotionRecorder(sys.argv[1], robot)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
for block in range(20):
    k = np.arange(block * 100, block * 100 + 100)
    joints = np.tile(np.append(robot.home_rad, -1.0), (100, 1))
    joints[:, 0] += 0.1 * np.sin(k / 100)
    try:
        recorder.push(10**18 + k * 10_000_000, joints)
    except DatasetError as error:
        print(error)
        recorder.abandon()
        break
else:
    raise SystemExit('the limit was never hit')
"""
    done = subprocess.run(
        [sys.executable, '-c', script, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    assert 'motion_000000.arrow.part can not be written' in done.stdout
    (recovery,) = MotionWriter.recover(tmp_path)
    assert recovery.n_samples >= 300
    (motion,) = read_motions(tmp_path)
    assert np.all(np.diff(motion.stamps_ns) == 10_000_000)


def test_a_folder_that_can_not_be_made_is_named(tmp_path, robot):
    (tmp_path / 'file').touch()
    with pytest.raises(DatasetError, match='file can not be made'):
        MotionRecorder(tmp_path / 'file', robot)
