"""Motion of the end effector in continuous time: where it is told to be, and how fast it is told to move.

A `Path` is what a chunk means between its waypoints, straight lines, with each corner rounded just enough to be
turned within a limited acceleration (linear segments with parabolic blends; Craig, "Introduction to Robotics",
chapter 7). Its velocity is continuous, from the velocity with which it begins on, and never above that of the lines;
a corner passes its waypoint at a distance of |change of velocity| b / 4, b being half the time that the corner takes.

                  P1 ___________ P2
                    '           '
       v0         .'             '.
    P0 ---> K ---'                 '---- P3

K is where the velocity at the beginning would lead in the time `turn_s`, a quarter of the first segment at most and by
default: rounding the corner there begins at P0, or later. Rotation does the same in rotation vectors, in the frame of
the nearest corner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.robot import poses

Array = NDArray[np.float64]

NS_PER_S = 1_000_000_000
#: Borders nearer to each other than this are one.
APART_NS = 1_000_000
#: Where the first corner of a path is looked at.
TURN_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, eq=False)
class MotionState:
    """Pose (4, 4) of the end effector in the base frame, with its linear and angular velocity (3,) there."""

    pose: Array
    linear_m_s: Array
    angular_rad_s: Array

    @classmethod
    def at_rest(cls, pose: Array) -> MotionState:
        """A pose (4, 4) that is not left."""
        return cls(pose, np.zeros(3), np.zeros(3))

    @property
    def body_twist(self) -> Array:
        """Velocity (6,): linear in the base frame, angular in the end effector's own."""
        return np.concatenate([self.linear_m_s, self.pose[:3, :3].T @ self.angular_rad_s])


class Motion(Protocol):
    """What is commanded from a stamp on, for ever."""

    @property
    def start_ns(self) -> int:
        """Stamp of the beginning."""

    def state(self, stamp_ns: int) -> MotionState:
        """Pose and velocity at a time."""

    def gripper(self, stamp_ns: int) -> float | None:
        """Gripper value in [-1 open, +1 closed] at a time; None where the gripper is left as it is."""


@dataclass(frozen=True, eq=False)
class UnderWay:
    """What the arm is told to do as things stand: a motion, and the one before it until that begins.

    Attributes:
        motion: the newest.
        before: the one that it replaces; None where there was none.
        end_ns: last stamp that anything is meant for; from there on the arm rests, only because nobody knows better.
    """

    motion: Motion
    before: Motion | None
    end_ns: int

    @property
    def start_ns(self) -> int:
        """Stamp of the beginning: as a motion itself it may be the one before another."""
        return self.motion.start_ns if self.before is None else self.before.start_ns

    def followed_by(self, commanded_ns: int | None) -> Motion:
        """What the next motion comes after, with the last command at a time: all of this that is still to come."""
        begun = commanded_ns is None or commanded_ns >= self.motion.start_ns
        return self.motion if begun or self.before is None else self

    def at(self, stamp_ns: int) -> Motion:
        """The motion that a time belongs to."""
        before = self.before
        return before if before is not None and stamp_ns < self.motion.start_ns else self.motion

    def state(self, stamp_ns: int) -> MotionState:
        """Pose and velocity at a time."""
        return self.at(stamp_ns).state(stamp_ns)

    def gripper(self, stamp_ns: int) -> float | None:
        """Gripper value at a time; None where the gripper is left as it is."""
        return self.at(stamp_ns).gripper(stamp_ns)


def rotation_steps(poses_base_ee: Array) -> Array:
    """Rotation vectors (n - 1, 3) from each pose (n, 4, 4) to the next, in the frame of either."""
    R = poses_base_ee[:, :3, :3]
    return Rotation.from_matrix(np.swapaxes(R[:-1], 1, 2) @ R[1:]).as_rotvec()


def slopes(steps: Array, durations_s: Array, start: Array, turn_s: float | None = None) -> Array:
    """Velocities (n + 2, d) of the lines of a path: at the beginning, from K to P1, ..., and of rest at the end.

    Args:
        steps: (n, d) from each waypoint to the next, the first from the start.
        durations_s: (n,) of the segments.
        start: (d,) velocity at the beginning.
        turn_s: time of K; after a quarter of the first segment by default.
    """
    turn_s = durations_s[0] / 4 if turn_s is None else turn_s
    lines = np.zeros((len(steps) + 2, len(start)))
    lines[0] = start
    lines[1:-1] = steps / durations_s[:, None]
    lines[1] = (steps[0] - start * turn_s) / (durations_s[0] - turn_s)
    return lines


def widest_corners(durations_s: Array) -> Array:
    """Half the time (n + 1,) that each corner may take at most: K, P1, ..., Pn."""
    halves = durations_s / 2
    return np.concatenate([halves[:1] / 2, np.minimum(halves[:-1], halves[1:]), halves[-1:]])


class Path:
    """From a state along waypoints to rest at the last of them.

    Args:
        start: where and how the motion begins.
        poses_base_ee: (n, 4, 4) waypoints after it, n at least 1.
        gripper: (n + 1,) value from the start and from each waypoint on.
        stamps_ns: (n + 1,) of the start and of the waypoints, increasing.
        corners_s: (n + 1,) half the time that each corner takes, K, P1, ..., Pn; the widest that fit by default.
        time_scale: by how much its slowest part is slower than it was meant to be.
        turn_s: time of K since the start, at most a quarter of the first segment, which it is by default.
    """

    def __init__(
        self,
        start: MotionState,
        poses_base_ee: Array,
        gripper: Array,
        stamps_ns: list[int],
        corners_s: Array | None = None,
        time_scale: float = 1.0,
        turn_s: float | None = None,
    ):
        self._start, self.gripper_values, self.time_scale = start, gripper, time_scale
        self.poses_base_ee, self.stamps_ns = poses_base_ee, stamps_ns
        self.start_ns, last_ns = stamps_ns[0], stamps_ns[-1]
        times_s = (np.array(stamps_ns, np.int64) - self.start_ns) / NS_PER_S
        durations_s = np.diff(times_s)
        turn_s = float(durations_s[0]) / 4 if turn_s is None else turn_s
        widest_s = widest_corners(durations_s)
        widest_s[0] = turn_s
        self._corners_s = widest_s if corners_s is None else np.minimum(corners_s, widest_s)
        self.end_ns = last_ns + int(np.ceil(self._corners_s[-1] * NS_PER_S))
        begin = start.body_twist
        corner = _moved(start.pose, begin * turn_s)
        self._knots = np.concatenate([corner[None], poses_base_ee])
        self._knot_times_s = np.concatenate([[turn_s], times_s[1:]])
        # Each time belongs to the corner whose half of a line it lies on.
        self._borders_s = np.concatenate([[durations_s[0] / 2], (times_s[1:-1] + times_s[2:]) / 2])
        steps = np.hstack([np.diff(self._knots[:, :3, 3], axis=0), rotation_steps(self._knots)])
        lines = np.zeros((len(stamps_ns) + 1, 6))
        lines[0] = begin
        lines[1:-1] = steps / np.diff(self._knot_times_s)[:, None]
        self._lines = lines

    @property
    def borders_ns(self) -> list[int]:
        """Increasing stamps, from the start to the end, between which the acceleration is constant or zero."""
        knots_s, corners_s = self._knot_times_s, self._corners_s
        since_s = np.concatenate([[0.0], knots_s - corners_s, knots_s + corners_s])
        since_ns = np.unique(np.round(since_s * NS_PER_S).astype(np.int64))
        apart = since_ns[1:][np.diff(since_ns) > APART_NS]
        inside = [self.start_ns + int(since) for since in apart]
        return [self.start_ns, *(at for at in inside if at < self.end_ns - APART_NS), self.end_ns]

    @property
    def turn_ns(self) -> list[int]:
        """Stamps from the start to the end of the first corner: there alone the path is not between its waypoints."""
        ends_s = float(self._knot_times_s[0] + self._corners_s[0])
        return [self.start_ns + round(share * ends_s * NS_PER_S) for share in TURN_SHARES]

    def state(self, stamp_ns: int) -> MotionState:
        """Pose and velocity at a time; before the start the start's, after the end at rest there."""
        if stamp_ns <= self.start_ns:
            return self._start
        if stamp_ns >= self.end_ns:
            return MotionState.at_rest(self.poses_base_ee[-1].copy())
        time_s = (stamp_ns - self.start_ns) / NS_PER_S
        i = int(np.searchsorted(self._borders_s, time_s))
        since_s, half_s = time_s - self._knot_times_s[i], float(self._corners_s[i])
        before, after = self._lines[i], self._lines[i + 1]
        if since_s <= -half_s:
            way, rate = before * since_s, before
        elif since_s >= half_s:
            way, rate = after * since_s, after
        else:
            turned = (since_s + half_s) / (2 * half_s)
            rate = before + (after - before) * turned
            way = before * since_s + (after - before) * (half_s * turned**2)
        pose = _moved(self._knots[i], way)
        return MotionState(pose, rate[:3], pose[:3, :3] @ _body_rate(way[3:], rate[3:]))

    def gripper(self, stamp_ns: int) -> float:
        """Value of the latest waypoint at or before the time: an edge happens at a waypoint, never before it."""
        i = int(np.searchsorted(self.stamps_ns, stamp_ns, side='right')) - 1
        return float(self.gripper_values[max(i, 0)])


def _moved(pose: Array, way: Array) -> Array:
    """Pose (4, 4) moved by a way (6,): position in the base frame, rotation vector in the pose's own."""
    rotation = pose[:3, :3]
    if way[3:].any():
        rotation = rotation @ Rotation.from_rotvec(way[3:]).as_matrix()
    return poses.pose_from_position_rotation(pose[:3, 3] + way[:3], rotation)


def _body_rate(turn: Array, rate: Array) -> Array:
    """Angular velocity, body frame, of a rotation vector that changes at a rate: J_r(turn) rate, to third order."""
    once = np.cross(turn, rate)
    return rate - once / 2 + np.cross(turn, once) / 6
