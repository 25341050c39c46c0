"""The guard: a motion is checked as a whole, before the arm is told of any of it.

Rule by rule, the mildest thing that helps is done: positions are moved into the workspace, the way is travelled more
slowly, what lies beyond the part that will be executed is cut off. Everything else is rejected, and whoever asked
brings the arm to rest where it is (`runtime.stopping`).

One object for each thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.shapes import Box
from decoupled_policy_ros.runtime.guard.collision import CollisionChecks
from decoupled_policy_ros.runtime.guard.joints import JointChecks, JointPath
from decoupled_policy_ros.runtime.guard.settings import GuardSettings
from decoupled_policy_ros.runtime.guard.timing import (
    ORDERS,
    Moving,
    motion_limits,
    ratios,
    rounding,
    stretch,
)
from decoupled_policy_ros.runtime.guard.verdict import Finding, Outcome, Verdict
from decoupled_policy_ros.runtime.motion import NS_PER_S, MotionState, Path, rotation_steps

Array = NDArray[np.float64]

#: How far from orthonormal the columns of a rotation may be.
ORTHONORMAL = 1e-6
#: How far (m) a motion may turn beside the workspace: the corner of the one before it may have been rounded otherwise.
BESIDE_M = 5e-4
UNITS = {
    'linear_velocity': 'm/s', 'linear_acceleration': 'm/s2', 'linear_jerk': 'm/s3', 'angular_velocity': 'rad/s',
    'angular_acceleration': 'rad/s2', 'angular_jerk': 'rad/s3',
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Request:
    """A motion that somebody wants.

    Attributes:
        start: what the arm is told to do at `start_ns`, where this motion begins.
        start_ns: stamp of the beginning.
        poses_base_ee: (n, 4, 4) waypoints, n at least 1.
        stamps_ns: (n,) when each is meant, increasing and later than the start.
        gripper: (n + 1,) value from the start and from each waypoint on.
        joints_rad: (joints,) as measured; None where nobody knows.
        needed: so many of the waypoints have to be good; those after them may be cut off.
        first: index of the first waypoint in its chunk, for messages.
        unhurried: the stamps are a wish, and a motion that takes however much longer is as good.
    """

    start: MotionState
    start_ns: int
    poses_base_ee: Array
    stamps_ns: Sequence[int]
    gripper: Array
    joints_rad: Array | None
    needed: int
    first: int = 0
    unhurried: bool = False


class Guard:
    """Checks motions of one robot.

    Args:
        robot: gives limits, kinematics and shapes.
        settings: how strict to be.

    Raises:
        ConfigError, RobotDescriptionError: settings and robot do not fit together.
    """

    def __init__(self, robot: RobotDescription, settings: GuardSettings | None = None):
        self.settings = settings = settings or GuardSettings()
        self.limits = settings.limits(robot)
        self.stopping = settings.stopping(robot)
        self._robot = robot
        self._joints = JointChecks(robot, settings)
        self._collisions = CollisionChecks(
            robot,
            settings.boxes,
            settings.collision_margin_m,
            settings.looks_at('self_collision'),
            settings.looks_at('boxes'),
        )

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Boxes that are looked at: the robot's own and those of the settings."""
        return self._collisions.boxes

    def check(self, request: Request) -> Verdict:
        """What may be executed of a motion, and what was found."""
        found = well_formed(request.poses_base_ee, request.first)
        if found is not None:
            return Verdict(None, (found,))
        findings: list[Finding] = []
        wanted, clamped = self._into_workspace(request)
        findings += clamped
        if joined := self.apart(request.start.pose, wanted[0], request.first):
            return Verdict(None, (*findings, joined))
        joints: JointPath | None = None
        if self.settings.needs_joints:
            if request.joints_rad is None:
                return Verdict(None, (*findings, missing_joints('no joint state')))
            joints, stopped = self._follow(request, wanted)
            if stopped is not None:
                good = (stopped.waypoint or 0) - request.first
                if stopped.outcome is Outcome.REJECT:
                    return Verdict(None, (*findings, stopped))
                findings.append(stopped)
                wanted, joints = wanted[:good], joints.up_to(good)
        return self._slow_enough(request, wanted, joints, findings)

    def _into_workspace(self, request: Request) -> tuple[Array, list[Finding]]:
        """Waypoints with their positions inside the workspace, and how far outside the farthest was."""
        lower, upper = self.limits.workspace_m
        wanted = request.poses_base_ee
        inside = np.clip(wanted[:, :3, 3], lower, upper)
        outside = np.abs(inside - wanted[:, :3, 3])
        if not self.settings.looks_at('workspace') or not outside.any():
            return wanted, []
        waypoint, axis = np.unravel_index(int(np.argmax(outside)), outside.shape)
        value = float(wanted[waypoint, axis, 3])
        limit = float(lower[axis] if value < lower[axis] else upper[axis])
        wanted = wanted.copy()
        wanted[:, :3, 3] = inside
        found = Finding(
            'workspace', Outcome.CLAMP, value, limit, 'm', request.first + int(waypoint), 'xyz'[axis]
        )
        return wanted, [found]

    def apart(
        self, told: Array, other: Array, waypoint: int | None = None, detail: str = ''
    ) -> Finding | None:
        """Whether a pose (4, 4) is too far from where the arm is told to be (4, 4)."""
        if not self.settings.looks_at('join'):
            return None
        far_m = float(np.linalg.norm(other[:3, 3] - told[:3, 3]))
        turn = Rotation.from_matrix(told[:3, :3].T @ other[:3, :3]).magnitude()
        for value, limit, unit in (
            (far_m, self.settings.join_m, 'm'), (float(turn), self.settings.join_rad, 'rad')
        ):  # fmt: skip
            if value > limit:
                return Finding('join', Outcome.REJECT, value, limit, unit, waypoint, detail)
        return None

    def _follow(self, request: Request, wanted: Array) -> tuple[JointPath, Finding | None]:
        """Joints along the way, up to what stops it; that is cut off if it is not needed."""
        assert request.joints_rad is not None
        path, stopped = self._joints.follow(request.start, wanted, request.joints_rad, request.first)
        reasons = (
            stopped,
            self._joints.near_singularity(path, request.first),
            self._collision(path, request.first),
        )
        earliest = [r for r in reasons if r is not None]
        if not earliest:
            return path, None
        found = min(earliest, key=lambda r: -1 if r.waypoint is None else r.waypoint)
        if found.waypoint is None or found.waypoint - request.first < request.needed:
            return path, found
        return path, found.cut_off()

    def _collision(self, path: JointPath, first: int) -> Finding | None:
        for i, joints_rad in enumerate(path.joints_rad[1:], start=1):
            if found := self._touching(joints_rad, first + path.leads_to(i)):
                return found
        return None

    def _touching(self, joints_rad: Array, waypoint: int) -> Finding | None:
        touched = self._collisions.touching(joints_rad) if self._collisions.pairs else None
        if touched is None:
            return None
        one, other, is_box, distance_m = touched
        rule = 'boxes' if is_box else 'self_collision'
        margin_m = self.settings.collision_margin_m
        return Finding(rule, Outcome.REJECT, distance_m, margin_m, 'm', waypoint, f'{one} and {other}')

    def _slow_enough(
        self, request: Request, wanted: Array, joints: JointPath | None, findings: list[Finding]
    ) -> Verdict:
        """The path in time; what no slowing down helps is cut off if it is not needed."""
        verdict = self._timed(request, wanted, joints, findings)
        while verdict.path is None and len(wanted) > request.needed:
            too_fast = verdict.findings[-1]
            good = 0 if too_fast.waypoint is None else too_fast.waypoint - request.first
            count = max(request.needed, min(good, len(wanted) - 1))
            wanted, joints = wanted[:count], None if joints is None else joints.up_to(count)
            verdict = self._timed(request, wanted, joints, [*findings, too_fast.cut_off()])
        return verdict

    def _timed(
        self, request: Request, wanted: Array, joints: JointPath | None, findings: list[Finding]
    ) -> Verdict:
        """The path with the stamps that every limit holds with, ending at rest."""
        moving, findings = self._moving(request.start, wanted, joints), list(findings)
        stamps_ns = [request.start_ns, *request.stamps_ns[: len(wanted)]]
        durations_s = np.diff(np.array(stamps_ns, np.int64)) / NS_PER_S
        least: Array = np.ones(len(wanted))
        if joints is not None:
            least, slow = self._joints.slowing(joints, request.first)
            findings += [slow] if slow is not None else []
        findings += self._too_fast(moving, durations_s, request.first)
        largest = np.inf if request.unhurried else self.settings.max_time_scale
        factors = stretch(moving, durations_s, False, least, largest)
        if factors is None:
            return Verdict(None, (*findings, _too_slow(findings, largest)))
        # Braking at the end takes what it takes: it is what happens if no other motion comes, and no breach.
        at_rest = stretch(moving, durations_s, True, factors, np.inf)
        if at_rest is None:
            return Verdict(None, (*findings, _too_slow(findings, largest)))
        if at_rest.max() > 1.0:
            elapsed_ns = np.round(np.cumsum(at_rest * durations_s) * NS_PER_S).astype(np.int64)
            # Up to the first segment that takes longer the stamps are those that were asked for, exactly.
            same = int(np.argmax(at_rest > 1.0))
            late_ns = [request.start_ns + int(elapsed) for elapsed in elapsed_ns]
            stamps_ns = [*stamps_ns[: same + 1], *late_ns[same:]]
        gripper = request.gripper[: len(wanted) + 1]
        durations_s = at_rest * durations_s
        rounded, turn_s = rounding(moving, durations_s)
        path = Path(request.start, wanted, gripper, stamps_ns, rounded, float(factors.max()), turn_s)
        astray = self._astray(path, request, joints)
        if astray is not None:
            return Verdict(None, (*findings, astray))
        return Verdict(path, tuple(findings), None if joints is None else joints.at_waypoints_rad)

    def _astray(self, path: Path, request: Request, joints: JointPath | None) -> Finding | None:
        """What is wrong where the path leaves the lines from waypoint to waypoint: as it turns at its beginning."""
        if not request.start.body_twist.any():
            return None
        turn = [path.state(at).pose for at in path.turn_ns]
        positions = np.array([pose[:3, 3] for pose in turn])
        if self.settings.looks_at('workspace'):
            # Who begins outside comes back, and goes no farther.
            lower, upper = self.limits.workspace_m
            lower, upper = np.minimum(lower, positions[0]), np.maximum(upper, positions[0])
            outside = np.maximum(lower - positions, positions - upper)
            point, axis = np.unravel_index(int(np.argmax(outside)), outside.shape)
            if outside[point, axis] > BESIDE_M:
                value = float(positions[point, axis])
                limit = float(lower[axis] if value < lower[axis] else upper[axis])
                where = f'{"xyz"[axis]}, as it turns there'
                return Finding('workspace', Outcome.REJECT, value, limit, 'm', request.first, where)
        if joints is None:
            return None
        middle_rad = self._joints.near(turn[len(turn) // 2], joints.joints_rad[0])
        return self._touching(middle_rad, request.first)

    def _moving(self, start: MotionState, wanted: Array, joints: JointPath | None) -> Moving:
        way = np.concatenate([start.pose[None], wanted])
        steps = [np.diff(way[:, :3, 3], axis=0), rotation_steps(way)]
        begin = [start.body_twist]
        if joints is not None:
            steps.append(joints.steps_rad)
            begin.append(joints.velocity_rad_s)
        limits = motion_limits(self.limits, self.settings, joints)
        return Moving(np.hstack(steps), np.concatenate(begin), limits)

    def _too_fast(self, moving: Moving, durations_s: Array, first: int) -> list[Finding]:
        """Each limit that the motion would break as it was asked for, where it breaks it most."""
        findings = []
        for rule, share in ratios(moving, durations_s, False).items():
            if share.max() > 1.0:
                worst = int(np.argmax(share))
                unit = UNITS.get(rule, 'times the limit')
                limit = float(moving.limits[rule]) if rule in UNITS else 1.0
                findings.append(
                    Finding(rule, Outcome.TIME_SCALE, float(share[worst]) * limit, limit, unit, first + worst)
                )
        return findings


def well_formed(poses_base_ee: ArrayLike, first: int = 0) -> Finding | None:
    """Whether waypoints (n, 4, 4) are finite rigid transformations; these two rules can't be left out."""
    waypoints = np.asarray(poses_base_ee, float)
    finite = np.isfinite(waypoints).all((1, 2))
    if not finite.all():
        i = int(np.argmin(finite))
        bad = waypoints[i][~np.isfinite(waypoints[i])]
        return Finding('finite', Outcome.REJECT, float(bad[0]), 0.0, waypoint=first + i)
    R = waypoints[:, :3, :3]
    deviation = np.abs(np.swapaxes(R, 1, 2) @ R - np.eye(3)).max((1, 2))
    deviation = np.maximum(deviation, np.abs(np.linalg.det(R) - 1.0))
    deviation = np.maximum(deviation, np.abs(waypoints[:, 3] - [0.0, 0.0, 0.0, 1.0]).max(1))
    i = int(np.argmax(deviation))
    if deviation[i] <= ORTHONORMAL:
        return None
    return Finding('rotation', Outcome.REJECT, float(deviation[i]), ORTHONORMAL, waypoint=first + i)


def missing_joints(why: str) -> Finding:
    """There are no joint positions to start from."""
    return Finding('joint_state', Outcome.REJECT, detail=why)


def _too_slow(findings: Sequence[Finding], largest: float) -> Finding:
    """The last of the limits that can't be kept, now a reason to reject."""
    scaled = [f for f in findings if f.outcome is Outcome.TIME_SCALE and f.rule.rpartition('_')[2] in ORDERS]
    if not scaled:
        return Finding('linear_velocity', Outcome.REJECT, float('inf'), largest, 'times slower')
    worst = max(scaled, key=lambda f: (f.value or 0.0) / (f.limit or 1.0))
    detail = f'a motion that {largest:g} times slower would not keep it either'
    return Finding(worst.rule, Outcome.REJECT, worst.value, worst.limit, worst.unit, worst.waypoint, detail)
