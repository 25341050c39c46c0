"""Motion of the joints in continuous time, as joint_trajectory_controller understands it.

Between two points the joints follow the cubic that has the positions and velocities of both; without velocities they
follow a straight line. Before the first point and after the last one the joints are where that one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.inverse import TOLERANCE, InverseKinematics
from decoupled_policy_ros.robot.limits import CREEP_SHARE, Limits
from decoupled_policy_ros.runtime.guard.verdict import Finding, Outcome
from decoupled_policy_ros.runtime.motion import NS_PER_S, MotionState

Array = NDArray[np.float64]

#: A joint may be this much faster than its limit (a share): the guard has slowed the motion down to the limit itself.
VELOCITY_MARGIN = 0.05
#: A joint's acceleration may be this much above the limit that the path is planned with (a share): leaning adds up to
#: 0.32, and it is looked at where it is largest, at the ends of cubics.
ACCELERATION_MARGIN = 1.0
#: How far out of its range a joint may get by rounding, and how near an end of it a joint is at it (rad).
ROUNDING_RAD, HELD_RAD = 1e-6, 1e-4
#: Error at which a point's joints are near enough (m and rad alike): over the time to the next one it is acceleration.
NEAR = 1e-7
#: How fast a redundant arm leans towards its home posture, for each rad/s of its motion and each rad that it is away:
#: it never moves for the posture alone.
LEAN = 0.5


@dataclass(frozen=True, eq=False)
class JointMotion:
    """Points that the joints pass.

    Attributes:
        stamps_ns: (n,) increasing, n at least 1.
        positions_rad: (n, joints).
        velocities_rad_s: (n, joints); None for straight lines.
    """

    stamps_ns: Sequence[int]
    positions_rad: Array
    velocities_rad_s: Array | None = None

    def at(self, stamp_ns: int) -> tuple[Array, Array]:
        """Positions and velocities (joints,) at a time."""
        i = int(np.searchsorted(self.stamps_ns, stamp_ns, side='right'))
        if i in (0, len(self.stamps_ns)):
            nearest = max(i - 1, 0)
            velocities = np.zeros(self.positions_rad.shape[1])
            if self.velocities_rad_s is not None and stamp_ns == self.stamps_ns[nearest]:
                velocities = self.velocities_rad_s[nearest]
            return self.positions_rad[nearest], velocities
        length_s = self.durations_s[i - 1]
        u = (stamp_ns - self.stamps_ns[i - 1]) / NS_PER_S / length_s
        before, second, third = (each[i - 1] for each in self._cubics)
        positions = self.positions_rad[i - 1] + u * (before + u * (second + u * third))
        return positions, (before + u * (2 * second + 3 * u * third)) / length_s

    @cached_property
    def durations_s(self) -> Array:
        """(n - 1, 1) from each point to the next."""
        return np.diff(np.asarray(self.stamps_ns, np.int64))[:, None] / NS_PER_S

    @property
    def ranges_rad(self) -> tuple[Array, Array]:
        """Lowest and highest positions (n - 1, joints) on the way from each point to the next."""
        q, (before, second, third) = self.positions_rad, self._cubics
        # u where the velocity is zero; the root that divides by what does not cancel
        root = second + np.copysign(np.sqrt(np.maximum(second**2 - 3 * before * third, 0.0)), second)
        with np.errstate(divide='ignore', invalid='ignore'):
            turns = np.nan_to_num(np.stack([-before / root, -root / (3 * third)]), posinf=0.0, neginf=0.0)
        u = np.clip(turns, 0.0, 1.0)
        reached = np.concatenate([[q[:-1], q[1:]], q[:-1] + u * (before + u * (second + u * third))])
        return reached.min(0), reached.max(0)

    @property
    def fastest_rad_s(self) -> Array:
        """Largest speeds (n - 1, joints) on the way from each point to the next."""
        before, second, third = self._cubics
        with np.errstate(divide='ignore', invalid='ignore'):
            u = np.clip(np.nan_to_num(-second / (3 * third), posinf=0.0, neginf=0.0), 0.0, 1.0)
        rates = [
            before + share * (2 * second + 3 * share * third)
            for share in (np.zeros_like(u), u, np.ones_like(u))
        ]
        return np.abs(rates).max(0) / self.durations_s

    @property
    def most_sudden_rad_s2(self) -> Array:
        """Largest accelerations (n - 1, joints) on the way from each point to the next, which are at either end."""
        _, second, third = self._cubics
        return np.maximum(abs(2 * second), abs(2 * second + 6 * third)) / self.durations_s**2

    @cached_property
    def _cubics(self) -> tuple[Array, Array, Array]:
        """Coefficients (n - 1, joints) of u, u^2 and u^3, u going from 0 to 1 from each point to the next."""
        way = np.diff(self.positions_rad, axis=0)
        if self.velocities_rad_s is None:
            return way, np.zeros_like(way), np.zeros_like(way)
        before, after = (
            rates * self.durations_s for rates in (self.velocities_rad_s[:-1], self.velocities_rad_s[1:])
        )
        return before, 3 * way - 2 * before - after, before + after - 2 * way

    def resting_until(self, stamp_ns: int) -> JointMotion:
        """This motion, and from its end on rest until a later time."""
        last = self.positions_rad[-1:]
        rates = self.velocities_rad_s
        return JointMotion(
            [*self.stamps_ns, stamp_ns],
            np.concatenate([self.positions_rad, last]),
            None if rates is None else np.concatenate([rates, np.zeros_like(last)]),
        )

    def until(self, stamp_ns: int) -> JointMotion:
        """This motion up to a time, with a point there."""
        n = int(np.searchsorted(self.stamps_ns, stamp_ns))
        positions, velocities = self.at(stamp_ns)
        rates = self.velocities_rad_s
        return JointMotion(
            [*self.stamps_ns[:n], stamp_ns],
            np.concatenate([self.positions_rad[:n], positions[None]]),
            None if rates is None else np.concatenate([rates[:n], velocities[None]]),
        )


class JointPlanner:
    """Joints for motions of the end effector, each point found from the one before; for one thread at a time.

    Args:
        robot: gives the kinematics.
        limits: what the joints keep.
        looks_at_acceleration: whether that is one of them.

    Raises:
        RobotDescriptionError: the model lacks a joint or frame of the robot, see `load_robot`.
    """

    def __init__(self, robot: RobotDescription, limits: Limits, looks_at_acceleration: bool = True):
        self._looks_at_acceleration = looks_at_acceleration
        self._inverse = InverseKinematics(robot, NEAR)
        self._names, self._home_rad, self._limits = robot.joint_names, robot.home_rad, limits

    def motion(
        self, states: Sequence[MotionState], stamps_ns: Sequence[int], from_rad: Array
    ) -> tuple[JointMotion, Finding | None]:
        """Joints of states (n,) at stamps (n,), and the first pose that is out of reach, if one is.

        Where a pose leaves joints free, they lean towards home while the arm moves: the least motion for each step
        alone would take them farther and farther away (Klein and Huang, "Review of pseudoinverse control for use with
        kinematically redundant manipulators", 1983). A pose out of reach is replaced by the nearest that is not.
        """
        positions, velocities = [np.asarray(from_rad, float)], []
        way, lean, _ = self._rates(self._inverse.jacobian(from_rad), states[0], from_rad)
        finding: Finding | None = None
        elapsed_s = np.diff([stamps_ns[0], *stamps_ns]) / NS_PER_S
        for i, (state, step_s) in enumerate(zip(states, elapsed_s, strict=True)):
            solution = self._inverse.solve(state.pose, positions[-1] + step_s * (way + lean / 2))
            if not solution.reached and finding is None:
                finding = Finding(
                    'reach',
                    Outcome.REJECT,
                    solution.error,
                    TOLERANCE,
                    'm and rad',
                    detail=f'what is left at point {i}',
                )
            before, (way, lean, idle) = way, self._rates(solution.jacobian, state, solution.joints_rad)
            # To first order leaning moves the end effector nowhere; half of it belongs to either end of the way. It led
            # here by the rates before alone: what moves nothing of those is not in the rates here.
            position = solution.joints_rad + (lean - idle @ before) * (step_s / 2)
            positions.append(np.clip(position, self._limits.lower_rad, self._limits.upper_rad))
            velocities.append(way + lean)
        motion = JointMotion(stamps_ns, np.stack(positions[1:]), np.stack(velocities))
        return self._inside(motion), finding

    def _rates(self, jacobian: Array, state: MotionState, joints_rad: Array) -> tuple[Array, Array, Array]:
        """Velocities (joints,): the least that move the end effector as asked, and those that lean towards home.

        With them comes the matrix (joints, joints) that makes of velocities their part that leaves the end effector
        where it is. A joint at an end of its range that would go on beyond has none, and the others do without it.
        """
        rotation = state.pose[:3, :3].T
        twist = np.concatenate([rotation @ state.linear_m_s, rotation @ state.angular_rad_s])
        below = joints_rad <= self._limits.lower_rad + HELD_RAD
        above = joints_rad >= self._limits.upper_rad - HELD_RAD
        free = np.ones(len(joints_rad), bool)
        while True:
            inverse = np.linalg.pinv(jacobian * free, rcond=1e-3)
            way, idle = inverse @ twist, np.diag(1.0 * free) - inverse @ (jacobian * free)
            lean = idle @ (self._home_rad - joints_rad) * (LEAN * float(np.linalg.norm(way)))
            rates = way + lean
            held = free & ((below & (rates < 0.0)) | (above & (rates > 0.0)))
            if not held.any():
                return way, lean, idle
            free &= ~held

    def _inside(self, motion: JointMotion) -> JointMotion:
        """The motion with velocities, but for the first, that let no joint swing out of its range between points.

        Where an end of the range stops a joint on the way to a point, the velocity before does not know of it. At most
        three times as fast as on the way to either side, and at rest where it turns, a joint stays between its points
        (Fritsch and Carlson, "Monotone piecewise cubic interpolation", 1980).
        """
        lowest, highest = motion.ranges_rad
        outside = (lowest < self._limits.lower_rad).any(0) | (highest > self._limits.upper_rad).any(0)
        if not outside.any():
            return motion
        assert motion.velocities_rad_s is not None
        ways = np.diff(motion.positions_rad, axis=0) / motion.durations_s
        fastest = 3 * np.minimum(abs(ways[:-1]), abs(ways[1:])) * (ways[:-1] * ways[1:] > 0.0)
        up = ways[1:] > 0.0
        rates = motion.velocities_rad_s.copy()
        kept = np.clip(rates[1:-1], np.where(up, 0.0, -fastest), np.where(up, fastest, 0.0))
        rates[1:-1] = np.where(outside, kept, rates[1:-1])
        return JointMotion(motion.stamps_ns, motion.positions_rad, rates)

    def breach(self, motion: JointMotion) -> Finding | None:
        """What is wrong with the way that a controller takes between the points of a motion, if anything is."""
        return self._outside(motion) or self._too_fast(motion) or self._too_sudden(motion)

    def _outside(self, motion: JointMotion) -> Finding | None:
        """The joint that swings out of its range most between two points."""
        lower, upper = self._limits.lower_rad, self._limits.upper_rad
        lowest, highest = motion.ranges_rad
        if not lowest.size or max((lower - lowest).max(), (highest - upper).max()) <= ROUNDING_RAD:
            return None
        below = lower - lowest > highest - upper
        farthest, end = np.where(below, lowest, highest), np.where(below, lower, upper)
        return self._finding('joint_position', abs(farthest - end), farthest, end, 'rad')

    def _too_fast(self, motion: JointMotion) -> Finding | None:
        """The joint that exceeds its velocity most, over the way from one point to the next or where it is fastest."""
        average = np.diff(motion.positions_rad, axis=0) / motion.durations_s
        # As for the guard, a joint at an end of its range may rest there and creep.
        limit = self._limits.velocity_towards(motion.positions_rad[1:], average)
        limit = np.maximum(limit, CREEP_SHARE * self._limits.velocity_rad_s)
        fastest, value = motion.fastest_rad_s, np.abs(average)
        peaks = fastest / self._limits.velocity_rad_s > value / limit
        value, limit = np.where(peaks, fastest, value), np.where(peaks, self._limits.velocity_rad_s, limit)
        share = value / limit
        if not share.size or share.max() <= 1 + VELOCITY_MARGIN:
            return None
        return self._finding('joint_velocity', share, value, limit, 'rad/s')

    def _too_sudden(self, motion: JointMotion) -> Finding | None:
        """The joint that exceeds its acceleration most."""
        sudden = motion.most_sudden_rad_s2
        share = sudden / self._limits.acceleration_rad_s2
        if not self._looks_at_acceleration or not share.size or share.max() <= 1 + ACCELERATION_MARGIN:
            return None
        limit = np.broadcast_to(self._limits.acceleration_rad_s2, share.shape)
        return self._finding('joint_acceleration', share, sudden, limit, 'rad/s2')

    def _finding(self, rule: str, excess: Array, value: Array, limit: Array, unit: str) -> Finding:
        i, joint = np.unravel_index(int(np.argmax(excess)), excess.shape)
        detail = f'{self._names[joint]} before point {i + 1}'
        value_there, limit_there = float(value[i, joint]), float(limit[i, joint])
        return Finding(rule, Outcome.REJECT, value_there, limit_there, unit, detail=detail)
