"""Poses and their 10-D form: round trips at machine precision, conventions against known rotations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.robot import poses

finite = st.floats(-10.0, 10.0, allow_nan=False)
quaternions = (
    st.tuples(*[st.floats(-1.0, 1.0)] * 4).map(np.array).filter(lambda quat: np.linalg.norm(quat) > 0.1)
)
positions = st.tuples(finite, finite, finite).map(np.array)
grippers = st.floats(-1.0, 1.0)
all_poses = st.builds(poses.pose_from_position_quat, positions, quaternions)


@given(all_poses, grippers)
def test_action_round_trip_is_exact_to_machine_precision(pose, gripper):
    action = poses.action_from_pose(pose, gripper)
    back, gripper_back = poses.pose_from_action(action)
    assert action.shape == (poses.ACTION_DIM,)
    np.testing.assert_allclose(back, pose, rtol=0, atol=1e-14)
    assert gripper_back == gripper


@given(all_poses)
def test_quaternion_round_trip(pose):
    position_m, quat_xyzw = poses.position_quat_from_pose(pose)
    np.testing.assert_allclose(poses.pose_from_position_quat(position_m, quat_xyzw), pose, rtol=0, atol=1e-14)
    assert quat_xyzw[np.argmax(np.abs(quat_xyzw))] > 0


def test_batches_equal_their_rows():
    rng = np.random.default_rng(0)
    pose = poses.pose_from_position_quat(rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5, 4)))
    gripper = rng.uniform(-1, 1, (2, 5))
    action = poses.action_from_pose(pose, gripper)
    position_m, quat_xyzw = poses.position_quat_from_pose(pose)
    assert action.shape == (2, 5, 10)
    assert quat_xyzw.shape == (2, 5, 4)
    for i, j in np.ndindex(2, 5):
        np.testing.assert_array_equal(action[i, j], poses.action_from_pose(pose[i, j], gripper[i, j]))
        np.testing.assert_array_equal(quat_xyzw[i, j], poses.position_quat_from_pose(pose[i, j])[1])
        np.testing.assert_array_equal(position_m[i, j], pose[i, j, :3, 3])


def test_action_holds_columns_of_a_known_rotation():
    # A quarter turn about z takes x to y and y to -x: the columns are (0, 1, 0) and (-1, 0, 0).
    pose = poses.pose_from_position_quat([1, 2, 3], [0, 0, np.sqrt(0.5), np.sqrt(0.5)])
    expected = [1, 2, 3, 0, 1, 0, -1, 0, 0, -1]
    np.testing.assert_allclose(poses.action_from_pose(pose, -1.0), expected, atol=1e-15)


def test_quaternions_are_xyzw():
    half_turn_about_x = np.diag([1.0, -1.0, -1.0])
    _, quat_xyzw = poses.position_quat_from_pose(
        poses.pose_from_position_rotation(np.zeros(3), half_turn_about_x)
    )
    np.testing.assert_allclose(quat_xyzw, [1, 0, 0, 0], atol=1e-15)


@given(all_poses, st.floats(0.2, 5.0), st.floats(0.2, 5.0), st.floats(-3.0, 3.0))
def test_raw_network_output_becomes_a_rotation(pose, stretch_a, stretch_b, shear):
    a, b = pose[:3, 0], pose[:3, 1]
    raw = np.concatenate([stretch_a * a, stretch_b * b + shear * a])
    np.testing.assert_allclose(poses.rotation_from_rot6d(raw), pose[:3, :3], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    'rot6d',
    [
        [0, 0, 0, 0, 1, 0],
        [1, 0, 0, 2, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [np.nan, 0, 0, 0, 1, 0],
        [np.inf, 0, 0, 0, 1, 0],
    ],
)
@pytest.mark.filterwarnings('ignore:invalid value')
def test_degenerate_rot6d_is_refused(rot6d):
    with pytest.raises(ValueError, match='finite and independent'):
        poses.rotation_from_rot6d(rot6d)


@pytest.mark.parametrize('quat_xyzw', [[0, 0, 0, 0], [0, 0, np.nan, 1], [np.inf, 0, 0, 1]])
def test_bad_quaternion_is_refused(quat_xyzw):
    with pytest.raises(ValueError, match='quaternion must be finite'):
        poses.pose_from_position_quat([0, 0, 0], quat_xyzw)


@given(all_poses)
def test_inverse_undoes(pose):
    np.testing.assert_allclose(poses.inverse(pose) @ pose, np.eye(4), rtol=0, atol=1e-13)


@given(all_poses, all_poses)
def test_interpolation_ends_where_it_should(pose_a, pose_b):
    np.testing.assert_allclose(poses.interpolate(pose_a, pose_b, 0.0), pose_a, atol=1e-12)
    np.testing.assert_allclose(poses.interpolate(pose_a, pose_b, 1.0), pose_b, atol=1e-12)


def test_interpolation_is_straight_and_of_constant_rate():
    pose_a = poses.pose_from_position_quat([0, 0, 0], [0, 0, 0, 1])
    pose_b = poses.pose_from_position_quat([1, 2, 4], Rotation.from_rotvec([0, 0, 1.2]).as_quat())
    quarter = poses.interpolate(pose_a, pose_b, 0.25)
    np.testing.assert_allclose(quarter[:3, 3], [0.25, 0.5, 1.0], atol=1e-14)
    np.testing.assert_allclose(Rotation.from_matrix(quarter[:3, :3]).as_rotvec(), [0, 0, 0.3], atol=1e-14)


def test_quaternion_beside_a_reference_keeps_its_sign_for_almost_half_a_turn():
    down = Rotation.from_quat([1, 0, 0, 0])
    yaws = np.radians(np.arange(-175, 176))
    rotation = (down * Rotation.from_rotvec(yaws[:, None] * [0, 0, 1])).as_matrix()
    pose = poses.pose_from_position_rotation(np.zeros((len(yaws), 3)), rotation)
    _, quat_xyzw = poses.position_quat_from_pose(pose, near_quat_xyzw=[1, 0, 0, 0])
    steps = np.linalg.norm(np.diff(quat_xyzw, axis=0), axis=-1)
    np.testing.assert_allclose(
        steps, 2 * np.sin(np.radians(0.25)), rtol=1e-6
    )  # a flip would be a step of almost 2
