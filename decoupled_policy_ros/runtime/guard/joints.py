"""What the joints do along a path, and whether they can."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.inverse import TOLERANCE, InverseKinematics, Solution
from decoupled_policy_ros.runtime.guard.settings import GuardSettings
from decoupled_policy_ros.runtime.guard.verdict import Finding, Outcome
from decoupled_policy_ros.runtime.motion import MotionState

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class JointPath:
    """Joints along a path.

    Attributes:
        joints_rad: (n + 1, joints) at the start and at the waypoints.
        velocity_rad_s: (joints,) at the start.
        singular: (n + 1,) smallest singular value of the Jacobian.
    """

    joints_rad: Array
    velocity_rad_s: Array
    singular: Array

    def up_to(self, count: int) -> JointPath:
        """Its first so many waypoints."""
        return JointPath(self.joints_rad[: count + 1], self.velocity_rad_s, self.singular[: count + 1])


class JointChecks:
    """Inverse kinematics of every waypoint, and the rules on reach, limits, continuity and singularity."""

    def __init__(self, robot: RobotDescription, settings: GuardSettings):
        self._names, self._settings = robot.joint_names, settings
        self._kinematics = InverseKinematics(robot)

    def follow(
        self, start: MotionState, poses_base_ee: Array, measured_rad: Array, first: int
    ) -> tuple[JointPath, Finding | None]:
        """Joints of the start and of waypoints (n, 4, 4), up to the first that breaks a rule, and which that is.

        Args:
            start: what the arm is told to do now.
            poses_base_ee: where it shall go.
            measured_rad: (joints,) where its joints are.
            first: index of the first waypoint in its chunk.
        """
        begin = self._kinematics.solve(start.pose, measured_rad)
        solutions = [begin]
        finding = self._away(begin, measured_rad)
        if finding is None:
            for i, pose in enumerate(poses_base_ee):
                solution = self._kinematics.solve(pose, solutions[-1].joints_rad)
                finding = self._unreached(solution, first + i) or self._jump(
                    solution, solutions[-1], first + i
                )
                if finding is not None:
                    break
                solutions.append(solution)
        jacobians = np.stack([solution.jacobian for solution in solutions])
        rotation = start.pose[:3, :3]
        twist = np.concatenate([rotation.T @ start.linear_m_s, rotation.T @ start.angular_rad_s])
        path = JointPath(
            np.stack([solution.joints_rad for solution in solutions]),
            np.linalg.lstsq(begin.jacobian, twist, rcond=1e-3)[0],
            np.linalg.svd(jacobians, compute_uv=False)[:, -1].astype(float),
        )
        return path, finding

    def near_singularity(self, path: JointPath, first: int) -> Finding | None:
        """The first waypoint that is too near a singularity, unless the motion leads away from one."""
        floor = self._settings.singularity_floor
        low = (path.singular < floor) & (path.singular < path.singular[0])
        if not self._settings.looks_at('singularity') or not low.any():
            return None
        i = int(np.argmax(low))
        return Finding('singularity', Outcome.REJECT, float(path.singular[i]), floor, waypoint=first + i - 1)

    def slowing(self, path: JointPath, first: int) -> tuple[Array, Finding | None]:
        """Factors (n,) by which segments take longer near a singularity, and what it is if one does."""
        slow = self._settings.singularity_slow
        nearest = np.minimum(path.singular[:-1], path.singular[1:])
        if not self._settings.looks_at('singularity') or nearest.min() >= slow:
            return np.ones(len(nearest)), None
        factors = np.maximum(1.0, slow / np.maximum(nearest, slow / self._settings.max_time_scale))
        i = int(np.argmin(nearest))
        return factors, Finding(
            'singularity', Outcome.TIME_SCALE, float(nearest[i]), slow, waypoint=first + i
        )

    def _away(self, begin: Solution, measured_rad: Array) -> Finding | None:
        """Whether the joints are somewhere else than the last command asks for."""
        away = np.abs(begin.joints_rad - measured_rad)
        worst = int(np.argmax(away))
        limit = self._settings.continuity_rad
        if not self._settings.looks_at('continuity') or away[worst] <= limit:
            return None
        return Finding(
            'continuity', Outcome.REJECT, float(away[worst]), limit, 'rad',
            detail=f'{self._names[worst]} from where it is to the last command',
        )  # fmt: skip

    def _unreached(self, solution: Solution, waypoint: int) -> Finding | None:
        if solution.reached:
            return None
        if solution.at_limit.any():
            j = int(np.argmax(solution.at_limit))
            if not self._settings.looks_at('joint_position'):
                return None
            at = float(solution.joints_rad[j])
            return Finding(
                'joint_position', Outcome.REJECT, at, at, 'rad', waypoint,
                f'{self._names[j]}, which would have to go beyond',
            )  # fmt: skip
        if not self._settings.looks_at('reach'):
            return None
        return Finding(
            'reach', Outcome.REJECT, solution.error, TOLERANCE, 'm and rad', waypoint, 'what is left'
        )

    def _jump(self, solution: Solution, before: Solution, waypoint: int) -> Finding | None:
        change = np.abs(solution.joints_rad - before.joints_rad)
        worst = int(np.argmax(change))
        limit = self._settings.continuity_rad
        if not self._settings.looks_at('continuity') or change[worst] <= limit:
            return None
        return Finding(
            'continuity',
            Outcome.REJECT,
            float(change[worst]),
            limit,
            'rad',
            waypoint,
            self._names[worst],
        )
