"""From joint positions to the proprioception vector that policies see."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from decoupled_policy_ros.errors import MessageError
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.kinematics import Kinematics


class Proprioception:
    """End-effector position 3 (m, base frame) | quaternion 4 (xyzw) | gripper joint positions, as float32.

    Input is the joint vector in the order of `robot.all_joint_names`. One vector or many give the same bits.
    Of the two quaternions of a rotation the one nearer to `near_quat_xyzw` is taken, so that the vector is
    continuous up to half a turn away from there.

    Args:
        robot: whose joints they are.
        kinematics: of the robot.
        near_quat_xyzw: a task's contract has it; None for that of the robot's home.
    """

    def __init__(
        self, robot: RobotDescription, kinematics: Kinematics, near_quat_xyzw: ArrayLike | None = None
    ):
        self._kinematics = kinematics
        self._n_arm = len(robot.joint_names)
        self._names = robot.all_joint_names
        if near_quat_xyzw is None:
            _, near_quat_xyzw = poses.position_quat_from_pose(kinematics.forward(robot.home_rad))
        self.near_quat_xyzw = np.array(near_quat_xyzw, float)
        self.dim = 7 + len(robot.gripper.joint_names)

    def __call__(self, joint_positions: ArrayLike) -> NDArray[np.float32]:
        """Vector (dim,) for one joint vector (n,)."""
        return self.many(np.asarray(joint_positions, float)[None])[0]

    def many(self, joint_positions: ArrayLike) -> NDArray[np.float32]:
        """Vectors (T, dim) for joint vectors (T, n).

        Raises:
            MessageError: the last axis does not fit the robot's joints.
        """
        positions = np.asarray(joint_positions, float)
        if positions.ndim != 2 or positions.shape[1] != len(self._names):
            raise MessageError(
                f'joint vector of shape {positions.shape[1:]}; the joints are {", ".join(self._names)}'
            )
        pose_base_ee = self._kinematics.forward_many(positions[:, : self._n_arm])
        position_m, quat_xyzw = poses.position_quat_from_pose(pose_base_ee, self.near_quat_xyzw)
        return np.concatenate([position_m, quat_xyzw, positions[:, self._n_arm :]], -1).astype(np.float32)
