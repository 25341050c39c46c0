"""What the joints do along a path, and whether they can."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.inverse import TOLERANCE, InverseKinematics, Solution
from decoupled_policy_ros.runtime.guard.settings import GuardSettings
from decoupled_policy_ros.runtime.guard.verdict import Finding, Outcome
from decoupled_policy_ros.runtime.motion import MotionState

Array = NDArray[np.float64]


#: Farthest from one point that is looked at to the next. A capsule of 3 cm that moves so far clips an edge by 3 mm at
#: the most unseen, less than the margin.
SPACING_M, SPACING_RAD = 0.025, 0.1
#: Most parts that a way is looked at in, so that a check takes a bounded time: 30 cm and 1.2 rad, more than `join` has.
MAX_PARTS = 12


@dataclass(frozen=True, eq=False)
class JointPath:
    """Joints along a path: at the start, at its n waypoints and at points between them, m + 1 in all.

    Attributes:
        joints_rad: (m + 1, joints).
        waypoints: (n + 1,) which of them are the start and the waypoints.
        velocity_rad_s: (joints,) at the start.
        singular: (m + 1,) smallest singular value of the Jacobian.
    """

    joints_rad: Array
    waypoints: NDArray[np.int64]
    velocity_rad_s: Array
    singular: Array

    @property
    def at_waypoints_rad(self) -> Array:
        """(n, joints) at the waypoints."""
        return self.joints_rad[self.waypoints[1:]]

    @property
    def steps_rad(self) -> Array:
        """(n, joints) from each waypoint to the next, as if all of the way were as fast as its fastest part."""
        counts = np.repeat(np.diff(self.waypoints), np.diff(self.waypoints))
        steps = np.diff(self.joints_rad, axis=0) * counts[:, None]
        forwards, backwards = np.maximum.reduceat(steps, self.waypoints[:-1]), self.least(steps)
        return np.where(forwards >= -backwards, forwards, backwards)

    def least(self, values: Array) -> Array:
        """Smallest of values (m, ...) from point to point, (n, ...) from waypoint to waypoint."""
        return np.minimum.reduceat(values, self.waypoints[:-1])

    def leads_to(self, point: int) -> int:
        """Index of the waypoint that a point, not the start, is on the way to, or is."""
        return int(np.searchsorted(self.waypoints, point)) - 1

    def up_to(self, count: int) -> JointPath:
        """Its first so many waypoints."""
        end = int(self.waypoints[count]) + 1
        return JointPath(
            self.joints_rad[:end], self.waypoints[: count + 1], self.velocity_rad_s, self.singular[:end]
        )


class JointChecks:
    """Inverse kinematics of every waypoint, and the rules on reach, limits, continuity and singularity."""

    def __init__(self, robot: RobotDescription, settings: GuardSettings):
        self._names, self._settings = robot.joint_names, settings
        self._kinematics = InverseKinematics(robot)

    def follow(
        self, start: MotionState, poses_base_ee: Array, measured_rad: Array, first: int
    ) -> tuple[JointPath, Finding | None]:
        """Joints from the start along waypoints (n, 4, 4), up to where a rule is broken, and which one that is.

        Args:
            start: what the arm is told to do now.
            poses_base_ee: where it shall go.
            measured_rad: (joints,) where its joints are.
            first: index of the first waypoint in its chunk.
        """
        begin = self._kinematics.solve(start.pose, measured_rad)
        solutions, waypoints = [begin], [0]
        finding = self._away(begin, measured_rad)
        way = np.concatenate([start.pose[None], poses_base_ee])
        for i, pose in enumerate(poses_base_ee if finding is None else ()):
            last = solutions[-1]
            # From out of reach, where nobody looks at that, there is no way to look at; from the start there always is,
            # though it may be told to be where the measured joints do not quite get.
            for point in [*(between(way[i], pose) if last.reached or i == 0 else ()), pose]:
                solution = self._kinematics.solve(point, solutions[-1].joints_rad)
                finding = self._jump(solution, last, first + i)
                if point is pose or last.reached:
                    finding = self._unreached(solution, first + i) or finding
                if finding is not None:
                    break
                solutions.append(solution)
            if finding is not None:
                break
            waypoints.append(len(solutions) - 1)
        jacobians = np.stack([solution.jacobian for solution in solutions])
        rotation = start.pose[:3, :3]
        twist = np.concatenate([rotation.T @ start.linear_m_s, rotation.T @ start.angular_rad_s])
        path = JointPath(
            np.stack([solution.joints_rad for solution in solutions]),
            np.array(waypoints),
            np.linalg.lstsq(begin.jacobian, twist, rcond=1e-3)[0],
            np.linalg.svd(jacobians, compute_uv=False)[:, -1].astype(float),
        )
        return path, finding

    def near(self, pose_base_ee: Array, joints_rad: Array) -> Array:
        """Joints (joints,) of a pose (4, 4) that is near where other ones are."""
        return self._kinematics.solve(pose_base_ee, joints_rad).joints_rad

    def near_singularity(self, path: JointPath, first: int) -> Finding | None:
        """Where the way is too near a singularity first, unless the motion leads away from one."""
        floor = self._settings.singularity_floor
        low = (path.singular < floor) & (path.singular < path.singular[0])
        if not self._settings.looks_at('singularity') or not low.any():
            return None
        i = int(np.argmax(low))
        waypoint = first + path.leads_to(i)
        return Finding('singularity', Outcome.REJECT, float(path.singular[i]), floor, waypoint=waypoint)

    def slowing(self, path: JointPath, first: int) -> tuple[Array, Finding | None]:
        """Factors (n,) by which segments take longer near a singularity, and what it is if one does."""
        slow = self._settings.singularity_slow
        nearest = path.least(np.minimum(path.singular[:-1], path.singular[1:]))
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


def between(begin: Array, end: Array) -> list[Array]:
    """Poses (4, 4) on the way from one to another, `SPACING_M` and `SPACING_RAD` apart at most, or `MAX_PARTS`."""
    way_m = float(np.linalg.norm(end[:3, 3] - begin[:3, 3]))
    # ||R - R'|| is sqrt(8) times the sine of half the angle between them.
    turn_rad = 2.0 * np.arcsin(min(1.0, float(np.linalg.norm(end[:3, :3] - begin[:3, :3])) / np.sqrt(8.0)))
    count = min(MAX_PARTS, int(np.ceil(max(way_m / SPACING_M, turn_rad / SPACING_RAD) - 1e-9)))
    return [poses.interpolate(begin, end, part / count) for part in range(1, count)]
