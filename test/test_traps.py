"""Mistakes that others made when they put one robot's data into another's policy: each is refused, or can't happen.

The others on the list are tested where they belong:

    statistics of actions live in the backbone      test_traps_training (..._by_the_statistics_in_the_backbones_file)
    foreign frames, joint orders, rotation forms    test_traps_training (..._written_in_another_way...)
    positions alone are normalised                  test_policy (..._touches_positions_only)
    quaternions are xyzw, 6-D rotations columns     test_poses, test_messages
    6-D rotations are made orthonormal              test_poses, test_chunks
    -1 is open: simulator, readers, commands        test_sim, test_readers, test_robot, test_policy_node
    frozen is not only without gradient, but eval   test_traps_training (..._dropout...), test_backbone_training
    the average leaves frozen weights alone         test_traps_training (..._verbatim, ..._loaded_before_training...)
    no BatchNorm in an encoder                      test_traps_training (..._statistics_of_a_batch), test_encoders
    more denoising than training steps              test_traps_training, test_objectives (..._out_of_range_are_refused)
    schedules in float32                            test_objectives, test_backbones (..._under_autocast)
    seams between chunks                            test_chunk_seams
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from foreign_files import (
    SITE_TO_HAND,
    WORLD_BASE,
    absolute_actions,
    droid_columns,
    rotation_values,
    truths,
    write_lerobot,
    write_robomimic,
)  # fmt: skip
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.data.readers.calibration import calibrate, require_near
from decoupled_policy_ros.data.readers.conventions import rotation_matrices
from decoupled_policy_ros.data.readers.interface import FingerPositions, GripperScale
from decoupled_policy_ros.data.readers.opening import open_demonstrations
from decoupled_policy_ros.errors import DatasetError, FingerprintMismatch
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import load_robot, robot_file
from decoupled_policy_ros.robot.fingerprint import Fingerprint


@pytest.fixture(scope='module')
def robot():
    return load_robot('panda_sim')


@pytest.fixture(scope='module')
def episodes(robot):
    return truths(robot, 2)


FORMS = {
    'quaternions with w first': ('quat_wxyz', 'quat_xyzw'),
    'quaternions with w last': ('quat_xyzw', 'quat_wxyz'),
    'extrinsic angles': ('euler_xyz_extrinsic', 'euler_xyz_intrinsic'),
    'intrinsic angles': ('euler_xyz_intrinsic', 'euler_xyz_extrinsic'),
    'an axis with its angle': ('axis_angle', 'euler_xyz_extrinsic'),
    'rows of the matrix': ('rot6d_rows', 'rot6d_columns'),
    'columns of the matrix': ('rot6d_columns', 'rot6d_rows'),
}


@pytest.mark.parametrize('in_base', [True, False], ids=['base frame', 'unknown world'])
@pytest.mark.parametrize('mistake', FORMS)
def test_a_rotation_read_in_another_form_than_written_is_no_pose_of_this_arm(episodes, mistake, in_base):
    written, read = FORMS[mistake]
    forward = np.concatenate([e.poses for e in episodes])
    theirs = (forward if in_base else WORLD_BASE @ forward) @ np.diag([-1.0, -1.0, 1.0, 1.0])
    right, wrong = theirs.copy(), theirs.copy()
    values = rotation_values(theirs[:, :3, :3], written)
    right[:, :3, :3], wrong[:, :3, :3] = rotation_matrices(values, written), rotation_matrices(values, read)
    assert calibrate(forward, right, in_base, 'data').largest_rad < 1e-6
    with pytest.raises(DatasetError, match=r'rad only; at most 0.002 m and 0.02 rad are accepted'):
        calibrate(forward, wrong, in_base, 'data')


def test_scipys_case_of_euler_letters_is_spelled_out():
    """'xyz' turns about the fixed axes, 'XYZ' about those that turn along; here both have names that say so."""
    angles = np.array([[0.3, 0.5, -0.7]])
    x, y, z = (
        Rotation.from_euler(axis, angle).as_matrix() for axis, angle in zip('xyz', angles[0], strict=True)
    )
    np.testing.assert_allclose(rotation_matrices(angles, 'euler_xyz_extrinsic')[0], z @ y @ x, atol=1e-12)
    np.testing.assert_allclose(rotation_matrices(angles, 'euler_xyz_intrinsic')[0], x @ y @ z, atol=1e-12)
    with pytest.raises(DatasetError, match="unknown rotation form 'euler_xyz'; valid: quat_xyzw"):
        rotation_matrices(angles, 'euler_xyz')


def hand_goals(episode, world_base):
    """Goals of the hand where those of the grip site are meant."""
    goal = world_base @ episode.commands
    turn = Rotation.from_matrix(goal[:, :3, :3] @ SITE_TO_HAND).as_rotvec()
    return np.column_stack([goal[:, :3, 3], turn, episode.gripper_commands])


def site_quaternions(episode, world_base):
    """Measured rotation of the grip site where that of the hand is meant."""
    return rotation_values((world_base @ episode.poses)[:, :3, :3], 'quat_xyzw')


@pytest.mark.parametrize('mistake', [{'actions': hand_goals}, {'robot0_eef_quat': site_quaternions}])
def test_commands_and_poses_of_frames_90_degrees_apart_are_refused(robot, episodes, tmp_path, mistake):
    with pytest.raises(
        DatasetError, match=r'1\.5\d* rad \(median\).*a tool turned by 90 degrees is 1\.571 rad'
    ):
        open_demonstrations(write_robomimic(tmp_path / 'demo.hdf5', episodes, **mistake), robot)


def test_commands_in_the_base_frame_beside_poses_in_the_world_are_refused(robot, episodes, tmp_path):
    path = write_robomimic(
        tmp_path / 'demo.hdf5', episodes, actions=lambda e, x: absolute_actions(e, np.eye(4))
    )
    with pytest.raises(DatasetError, match=r'commands are 1\.07 m'):
        open_demonstrations(path, robot)


def turned_tool(tmp_path: Path):
    """The simulated Panda with its end effector on the hand instead of the grip site: 90 degrees away."""
    values = yaml.safe_load(robot_file('panda_sim').read_text())
    values['frames']['tool']['quat_xyzw'] = [0.0, 0.0, 0.0, 1.0]
    (tmp_path / 'turned.yaml').write_text(yaml.safe_dump(values))
    return load_robot(tmp_path / 'turned.yaml')


def test_stages_in_frames_90_degrees_apart_do_not_meet(robot, tmp_path):
    """Backbone, dataset and robot carry the fingerprint of the chain, tool included."""
    ours, theirs = Fingerprint.of(robot, 20.0), Fingerprint.of(turned_tool(tmp_path), 20.0)
    assert ours.ee_frame == theirs.ee_frame
    with pytest.raises(FingerprintMismatch, match='description_sha256'):
        theirs.require_equal(ours, 'dataset', 'backbone')


def test_a_robot_with_another_tool_gets_poses_of_its_own_tool(robot, episodes, tmp_path):
    """The same file read for both: one turned by 90 degrees against the other, measured and commanded alike."""
    path = write_robomimic(tmp_path / 'demo.hdf5', episodes)
    for name in ('observation.pose', 'action'):
        site, _ = poses.pose_from_action(open_demonstrations(path, robot).column(name))
        hand, _ = poses.pose_from_action(open_demonstrations(path, turned_tool(tmp_path)).column(name))
        np.testing.assert_allclose(site[:, :3, :3] @ SITE_TO_HAND, hand[:, :3, :3], atol=1e-5)


def test_a_gripper_that_closes_when_told_to_open_is_refused(robot, episodes, tmp_path):
    def swapped(episode, world_base):
        actions = absolute_actions(episode, world_base)
        return actions * [1, 1, 1, 1, 1, 1, -1]

    path = write_robomimic(tmp_path / 'demo.hdf5', episodes, actions=swapped)
    with pytest.raises(DatasetError, match=r'closes when it is told to open \(correlation -0\.'):
        open_demonstrations(path, robot)


def test_droid_counts_up_as_it_closes(robot, episodes, tmp_path, repository):
    columns = [droid_columns(e, np.eye(4)) for e in episodes]
    cameras = {c: [e.images for e in episodes] for c in ('wrist_left', 'exterior_1_left', 'exterior_2_left')}
    root = write_lerobot(tmp_path / 'droid', columns, 15, ['x'] * 2, cameras)
    found = open_demonstrations(root, robot)
    told = np.concatenate([c['action.gripper_position'][:, 0] for c in columns])
    np.testing.assert_array_equal(found.column('action')[:, 9], np.where(told == 1.0, 1.0, -1.0))
    mapping = yaml.safe_load((repository / 'config/datasets/droid_lerobot.yaml').read_text())
    mapping['gripper_command'] |= {'open': 1.0, 'closed': 0.0}
    (tmp_path / 'swapped.yaml').write_text(yaml.safe_dump(mapping))
    with pytest.raises(DatasetError, match='closes when it is told to open'):
        open_demonstrations(root, robot, mapping=str(tmp_path / 'swapped.yaml'))


def test_half_a_width_is_not_a_width(robot):
    """Franka's driver is told half the width, and its fingers report half of it each."""
    width_m = np.array([0.0, 0.03, 0.08])
    with pytest.raises(
        DatasetError, match=r'0 to 0\.08, but .* 0\.04 open and 0 closed; .* half a width was declared'
    ):
        GripperScale(0.04, 0.0).to_value(width_m, 'gripper')
    np.testing.assert_allclose(GripperScale(0.08, 0.0).to_value(width_m, 'gripper'), [1, 0.25, -1])
    both = FingerPositions((1.0, 1.0)).to_fingers(
        np.stack([width_m, width_m], -1) / 2, robot.gripper, 'gripper'
    )
    np.testing.assert_allclose(both, np.stack([width_m, -width_m], -1) / 2, atol=1e-12)
    np.testing.assert_allclose(robot.gripper.width(both), width_m, atol=1e-12)
    fr3 = load_robot('fr3').gripper
    np.testing.assert_allclose(
        fr3.normalised(GripperScale(0.08, 0.0).to_fingers(width_m, fr3, 'gripper')), [1, 0.25, -1]
    )


def test_a_command_near_enough_is_no_mistake(episodes):
    """A controller that lags by centimetres and some degrees is a controller."""
    reached = episodes[0].poses
    offset = poses.pose_from_position_rotation([0.05, 0, 0], Rotation.from_rotvec([0, 0, 0.3]).as_matrix())
    require_near(reached @ offset, reached, 'data')
