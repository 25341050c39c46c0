"""Forward kinematics of an arm, on Pinocchio."""

from __future__ import annotations

import threading

import numpy as np
import pinocchio as pin
from numpy.typing import ArrayLike, NDArray

from decoupled_policy_ros.errors import RobotDescriptionError
from decoupled_policy_ros.robot.description import RobotDescription

Array = NDArray[np.float64]


class Kinematics:
    """Where the end effector is for given joint angles; joints in the order of `robot.joint_names`.

    Any thread may call it: Pinocchio's work space is guarded by a lock.

    Raises:
        RobotDescriptionError: the model lacks a joint or frame of the robot, see `load_robot`.
    """

    def __init__(self, robot: RobotDescription):
        self.joint_names = robot.joint_names
        self.n = len(robot.joint_names)
        self._chain = robot.source.chain(robot.base_link, robot.ee_link, robot.joint_names)
        self._data = self._chain.model.createData()
        self._neutral = pin.neutral(self._chain.model)
        self._base_inverse = self._chain.base_placement.inverse()
        self._tool = pin.SE3(np.array(robot.tool))
        self._tangent = np.zeros(self._chain.model.nv)
        self._lock = threading.Lock()

    def forward(self, joint_positions_rad: ArrayLike) -> Array:
        """Pose (4, 4) of the end effector in the base frame for joint positions (n,).

        Raises:
            RobotDescriptionError: the number of positions is not n.
        """
        positions = np.asarray(joint_positions_rad, float)
        if positions.shape != (self.n,):
            raise self._wrong_shape(positions)
        return self._forward(positions, self._tool).homogeneous

    def link_forward(self, joint_positions_rad: ArrayLike) -> Array:
        """Pose (4, 4) of the model's link that carries the tool (`robot.ee_link`), for positions (n,)."""
        positions = np.asarray(joint_positions_rad, float)
        if positions.shape != (self.n,):
            raise self._wrong_shape(positions)
        return self._forward(positions, pin.SE3.Identity()).homogeneous

    def forward_many(self, joint_positions_rad: ArrayLike) -> Array:
        """Poses (T, 4, 4) for joint positions (T, n).

        Raises:
            RobotDescriptionError: the last axis is not n long.
        """
        positions = np.asarray(joint_positions_rad, float)
        if positions.ndim != 2 or positions.shape[1] != self.n:
            raise self._wrong_shape(positions)
        poses = np.empty((len(positions), 4, 4))
        for pose, row in zip(poses, positions, strict=True):
            pose[:] = self._forward(row, self._tool).homogeneous
        return poses

    def screws(self) -> Array:
        """Screw axes (n, 6) of the joints in the base frame at zero: (v, w), linear part first.

        With the pose at zero they are the whole chain as a product of exponentials (Lynch and Park, "Modern
        Robotics", section 4.1), whatever link frames the description chose on the way.
        """
        chain = self._chain
        with self._lock:
            pin.computeJointJacobians(chain.model, self._data, self._neutral)
            world = pin.getJointJacobian(chain.model, self._data, chain.ee_joint, pin.ReferenceFrame.WORLD)
        return (self._base_inverse.action @ world)[:, chain.velocity_index].T

    def _forward(self, positions: Array, tool: pin.SE3) -> pin.SE3:
        chain = self._chain
        with self._lock:
            self._tangent[chain.velocity_index] = positions
            # integrate() also serves continuous joints, which Pinocchio stores as cosine and sine.
            configuration = pin.integrate(chain.model, self._neutral, self._tangent)
            pin.forwardKinematics(chain.model, self._data, configuration)
            return self._base_inverse * self._data.oMi[chain.ee_joint] * chain.ee_placement * tool

    def _wrong_shape(self, positions: Array) -> RobotDescriptionError:
        return RobotDescriptionError(
            f'joint positions of shape {positions.shape} do not fit {self.n} joints: {", ".join(self.joint_names)}'
        )
