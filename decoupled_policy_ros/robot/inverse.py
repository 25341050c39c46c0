"""Inverse kinematics of an arm: damped least squares on Pinocchio, inside the joint limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pinocchio as pin
from numpy.typing import NDArray
from scipy.linalg.lapack import dposv

from decoupled_policy_ros.robot.description import RobotDescription

Array = NDArray[np.float64]

#: Largest error of a solution, m and rad alike.
TOLERANCE = 1e-4
#: A waypoint is a centimetre or two from the one before and takes two or three steps; a far pose takes some ten.
MAX_STEPS = 40
#: Largest change of a joint in one step (rad): the linearisation holds no further.
MAX_STEP_RAD = 0.4
#: Damping for each metre or radian of error: none at the solution, so that the last steps are Newton's.
DAMPING = 0.05
#: How often other joints are tried for those that a limit holds back.
MAX_HELD = 3
_EYE = np.eye(6)


@dataclass(frozen=True, eq=False)
class Solution:
    """What the joints do for a pose.

    Attributes:
        joints_rad: (n,) inside the joint limits.
        error: what is left of the pose, the norm of position (m) and rotation (rad).
        jacobian: (6, n) there, of the end effector in its own frame, linear part first.
        at_limit: (n,) bool: joints that a limit holds back.
    """

    joints_rad: Array
    error: float
    jacobian: Array
    at_limit: NDArray[np.bool_]

    @property
    def reached(self) -> bool:
        """Whether the pose is reached."""
        return self.error <= TOLERANCE


class InverseKinematics:
    """Joint positions for poses of the end effector in the base frame; one object for each thread.

    Each step is dq = J^T (J J^T + d^2 I)^-1 e with e the twist (in the end effector's frame) that leads to the target
    and d in proportion to |e| (Sugihara, "Solvability-unconcerned inverse kinematics by the Levenberg-Marquardt
    method", 2011, in spirit), each joint kept inside its limits.
    A redundant arm goes on with the joints that are free to move.

    Args:
        robot: gives the kinematics.
        tolerance: error at which a solution is near enough, m and rad alike; at most `TOLERANCE`.

    Raises:
        RobotDescriptionError: the model lacks a joint or frame of the robot, see `load_robot`.
    """

    def __init__(self, robot: RobotDescription, tolerance: float = TOLERANCE):
        self._tolerance = tolerance
        chain = self._chain = robot.source.chain(robot.base_link, robot.ee_link, robot.joint_names)
        self.lower_rad, self.upper_rad = robot.limits.lower_rad, robot.limits.upper_rad
        self._data = chain.model.createData()
        self._neutral = pin.neutral(chain.model)
        self._tool = chain.ee_placement * pin.SE3(np.array(robot.tool))
        self._to_ee = self._tool.inverse().action  # joint frame's twist -> end effector's
        self._base = chain.base_placement
        self._tangent = np.zeros(chain.model.nv)
        self._damping = np.empty(6)

    def solve(self, pose_base_ee: Array, from_rad: Array) -> Solution:
        """Joint positions of a pose (4, 4), found from nearby joint positions (n,).

        Where the pose is out of reach, the solution is as near as it gets, and says so by its error.
        """
        target = self._base * pin.SE3(pose_base_ee[:3, :3], pose_base_ee[:3, 3])
        q = np.clip(from_rad, self.lower_rad, self.upper_rad)
        best: Solution | None = None
        stuck = 0
        free: NDArray[np.bool_] = np.ones(len(q), bool)
        for _ in range(MAX_STEPS):
            error, jacobian = self._linearise(q, target)
            size = float(np.sqrt(error @ error))
            if best is None or size < 0.98 * best.error:
                stuck = 0
            else:
                stuck += 1
            if best is None or size < best.error:
                at_limit = ~free & ((q <= self.lower_rad) | (q >= self.upper_rad))
                best = Solution(q, size, jacobian, at_limit)
            if size <= self._tolerance or stuck > 6:
                break
            q, free = self._step(q, error, jacobian, free)
        assert best is not None
        return best

    def jacobian(self, joints_rad: Array) -> Array:
        """Jacobian (6, n) of the end effector in its own frame, linear part first."""
        return self._linearise(joints_rad, pin.SE3.Identity())[1]

    def _linearise(self, q: Array, target: pin.SE3) -> tuple[Array, Array]:
        chain = self._chain
        self._tangent[chain.velocity_index] = q
        configuration = self._tangent
        if chain.model.nq != chain.model.nv:  # Pinocchio stores continuous joints as cosine and sine
            configuration = pin.integrate(chain.model, self._neutral, self._tangent)
        pin.computeJointJacobians(chain.model, self._data, configuration)
        local = pin.getJointJacobian(chain.model, self._data, chain.ee_joint, pin.ReferenceFrame.LOCAL)
        pose = self._data.oMi[chain.ee_joint] * self._tool
        return pin.log6(pose.actInv(target)).vector, (self._to_ee @ local)[:, chain.velocity_index]

    def _step(
        self, q: Array, error: Array, jacobian: Array, free: NDArray[np.bool_]
    ) -> tuple[Array, NDArray[np.bool_]]:
        """One step; a joint that it would lead out of its limits goes as far as they let it, and the others are solved
        for anew.
        """
        damping = (DAMPING * min(1.0, float(np.sqrt(error @ error)))) ** 2 + 1e-10
        free = np.ones_like(free)
        held = np.zeros_like(q)
        for _ in range(MAX_HELD):
            J = jacobian * free
            step = held + J.T @ dposv(J @ J.T + damping * _EYE, error - jacobian @ held)[1]
            largest = np.abs(step).max()
            if largest > MAX_STEP_RAD:
                step *= MAX_STEP_RAD / largest
            new = q + step
            outside = ((new < self.lower_rad) | (new > self.upper_rad)) & free
            if not outside.any():
                break
            free = free & ~outside
            held = np.where(free, 0.0, np.clip(new, self.lower_rad, self.upper_rad) - q)
        return np.clip(new, self.lower_rad, self.upper_rad), free
