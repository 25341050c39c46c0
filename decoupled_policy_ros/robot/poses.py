"""Poses in SE(3), and their 10-D form in which a policy thinks.

The one pose type of this package is a homogeneous matrix, float64, shape (..., 4, 4), named after the
frames it relates: ``pose_base_ee`` holds the end effector expressed in the base frame. The one action
type is

    action = [ x y z | r11 r21 r31 r12 r22 r32 | g ]        shape (..., 10)

position in metres, the first two **columns** of the rotation matrix (Zhou et al., "On the Continuity of
Rotation Representations in Neural Networks", CVPR 2019), and the gripper in [-1, 1]: -1 open, +1 closed.
Quaternions are ROS's: x, y, z, w.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

Array = NDArray[np.float64]

ACTION_DIM = 10
POSITION = slice(0, 3)
ROTATION = slice(3, 9)
GRIPPER = 9
GRIPPER_OPEN, GRIPPER_CLOSED = -1.0, 1.0
ROTATION_CONVENTION = 'rot6d_columns'


def pose_from_position_rotation(position_m: ArrayLike, rotation: ArrayLike) -> Array:
    """Assemble poses (..., 4, 4) from positions (..., 3) and rotation matrices (..., 3, 3)."""
    position_m, rotation = np.asarray(position_m, float), np.asarray(rotation, float)
    pose = np.zeros((*np.broadcast_shapes(position_m.shape[:-1], rotation.shape[:-2]), 4, 4))
    pose[..., :3, :3] = rotation
    pose[..., :3, 3] = position_m
    pose[..., 3, 3] = 1.0
    return pose


def pose_from_position_quat(position_m: ArrayLike, quat_xyzw: ArrayLike) -> Array:
    """Assemble poses (..., 4, 4) from positions (..., 3) and unit quaternions (..., 4), x y z w.

    Raises:
        ValueError: a quaternion is zero or not finite.
    """
    quat = np.asarray(quat_xyzw, float)
    norm = np.linalg.norm(quat, axis=-1)
    if not np.all(np.isfinite(norm)) or np.any(norm < 1e-6):
        raise ValueError(f'a quaternion must be finite and not zero, got {quat.tolist()}')
    rotation = Rotation.from_quat(quat.reshape(-1, 4)).as_matrix().reshape(*quat.shape[:-1], 3, 3)
    return pose_from_position_rotation(position_m, rotation)


def position_quat_from_pose(pose: ArrayLike, near_quat_xyzw: ArrayLike | None = None) -> tuple[Array, Array]:
    """Positions (..., 3) in metres and quaternions (..., 4), x y z w, of poses (..., 4, 4).

    A rotation has two quaternions, q and -q. With `near_quat_xyzw` (4,) the one on its side is returned, so
    that the sign flips only half a turn away from there: no fixed rule does better, and w >= 0 would flip
    where a gripper points down. Without it, the one whose largest component is positive.
    """
    pose = np.asarray(pose, float)
    quat = Rotation.from_matrix(pose[..., :3, :3].reshape(-1, 3, 3)).as_quat()
    if near_quat_xyzw is None:
        side = np.take_along_axis(quat, np.abs(quat).argmax(-1)[:, None], -1)
    else:
        side = (quat * np.asarray(near_quat_xyzw, float)).sum(-1, keepdims=True)
    quat = quat * np.where(side < 0, -1.0, 1.0)
    return pose[..., :3, 3].copy(), quat.reshape(*pose.shape[:-2], 4)


def rot6d_from_rotation(rotation: ArrayLike) -> Array:
    """First two columns of rotation matrices (..., 3, 3), one after the other: (..., 6)."""
    rotation = np.asarray(rotation, float)
    return np.concatenate([rotation[..., :, 0], rotation[..., :, 1]], -1)


def rotation_from_rot6d(rot6d: ArrayLike) -> Array:
    """Rotation matrices (..., 3, 3) nearest in the Gram-Schmidt sense to raw 6-D values (..., 6).

    Raises:
        ValueError: the two columns are zero, parallel or not finite, so that no rotation is meant.
    """
    rot6d = np.asarray(rot6d, float)
    a, b = rot6d[..., :3], rot6d[..., 3:]
    x, x_norm = _normalised(a)
    y, y_norm = _normalised(b - (x * b).sum(-1, keepdims=True) * x)
    if not np.all((x_norm > 1e-6) & (y_norm > 1e-6)):  # also false for NaN
        raise ValueError(f'6-D rotation columns must be finite and independent, got {rot6d.tolist()}')
    return np.stack([x, y, np.cross(x, y)], -1)


def _normalised(vector: Array) -> tuple[Array, Array]:
    norm = np.linalg.norm(vector, axis=-1)
    return vector / np.where(norm > 0, norm, 1.0)[..., None], norm


def action_from_pose(pose_base_ee: ArrayLike, gripper: ArrayLike) -> Array:
    """Actions (..., 10) from poses (..., 4, 4) and gripper values (...) in [-1 open, +1 closed]."""
    pose = np.asarray(pose_base_ee, float)
    gripper = np.broadcast_to(np.asarray(gripper, float), pose.shape[:-2])
    return np.concatenate([pose[..., :3, 3], rot6d_from_rotation(pose[..., :3, :3]), gripper[..., None]], -1)


def pose_from_action(action: ArrayLike) -> tuple[Array, Array]:
    """Poses (..., 4, 4) and gripper values (...) of actions (..., 10); inverse of `action_from_pose`.

    Raises:
        ValueError: the rotation part is degenerate (see `rotation_from_rot6d`).
    """
    action = np.asarray(action, float)
    pose = pose_from_position_rotation(action[..., POSITION], rotation_from_rot6d(action[..., ROTATION]))
    return pose, action[..., GRIPPER].copy()


def inverse(pose: ArrayLike) -> Array:
    """Inverse of rigid poses (..., 4, 4): R -> R^T, p -> -R^T p."""
    pose = np.asarray(pose, float)
    rotation_t = np.swapaxes(pose[..., :3, :3], -1, -2)
    return pose_from_position_rotation(-(rotation_t @ pose[..., :3, 3:])[..., 0], rotation_t)


def interpolate(pose_a: Array, pose_b: Array, fraction: float) -> Array:
    """Pose (4, 4) at `fraction` in [0, 1] from a to b: straight in position, shortest arc in rotation."""
    rotation_a = Rotation.from_matrix(pose_a[:3, :3])
    arc = (rotation_a.inv() * Rotation.from_matrix(pose_b[:3, :3])).as_rotvec()
    rotation = (rotation_a * Rotation.from_rotvec(fraction * arc)).as_matrix()
    return pose_from_position_rotation((1 - fraction) * pose_a[:3, 3] + fraction * pose_b[:3, 3], rotation)
