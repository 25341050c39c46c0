"""Motion of the joints in continuous time, as joint_trajectory_controller understands it.

Between two points the joints follow the cubic that has the positions and velocities of both; without velocities they
follow a straight line. Before the first point and after the last one the joints are where that one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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
#: How fast a redundant arm leans towards its home posture, for each rad/s of its motion and each rad that it is away:
#: it never moves for the posture alone.
LEAN = 0.5
#: Least intervals of a stop: where its velocity is a cubic, the error of the curve between them is below 0.1 mm.
STOP_INTERVALS = 8


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
        length_s = (self.stamps_ns[i] - self.stamps_ns[i - 1]) / NS_PER_S
        u = (stamp_ns - self.stamps_ns[i - 1]) / NS_PER_S / length_s
        begin, way = self.positions_rad[i - 1], self.positions_rad[i] - self.positions_rad[i - 1]
        if self.velocities_rad_s is None:
            return begin + u * way, way / length_s
        before, after = self.velocities_rad_s[i - 1] * length_s, self.velocities_rad_s[i] * length_s
        second, third = 3 * way - 2 * before - after, before + after - 2 * way
        positions = begin + u * (before + u * (second + u * third))
        return positions, (before + u * (2 * second + 3 * u * third)) / length_s

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


def braking(
    position_rad: Array, velocity_rad_s: Array, start_ns: int, acceleration_rad_s2: Array
) -> JointMotion:
    """From positions and velocities (joints,) to rest, every joint within its acceleration.

    The velocity falls as 1 - 3 u^2 + 2 u^3, as `stopping.Stop` does it.
    """
    duration_s = max(float(np.max(1.5 * np.abs(velocity_rad_s) / acceleration_rad_s2)), 1e-3)
    u = np.linspace(0.0, 1.0, STOP_INTERVALS + 1)[:, None]
    return JointMotion(
        [start_ns + round(share * duration_s * NS_PER_S) for share in u[:, 0]],
        position_rad + duration_s * velocity_rad_s * (u - u**3 + u**4 / 2),
        velocity_rad_s * (1 - 3 * u**2 + 2 * u**3),
    )


class JointPlanner:
    """Joints for motions of the end effector, each point found from the one before; for one thread at a time.

    Args:
        robot: gives the kinematics.
        limits: gives the velocities that joints keep.

    Raises:
        RobotDescriptionError: the model lacks a joint or frame of the robot, see `load_robot`.
    """

    def __init__(self, robot: RobotDescription, limits: Limits):
        self._inverse = InverseKinematics(robot)
        self._names, self._home_rad, self._limits = robot.joint_names, robot.home_rad, limits

    def motion(
        self, states: Sequence[MotionState], stamps_ns: Sequence[int], from_rad: Array
    ) -> tuple[JointMotion, Finding | None]:
        """Joints of states (n,) at stamps (n,), and what is wrong with them, if anything is.

        Where a pose leaves joints free, they lean towards home while the arm moves: the least motion for each step
        alone would take them farther and farther away (Klein and Huang, "Review of pseudoinverse control for use with
        kinematically redundant manipulators", 1983). A pose out of reach is replaced by the nearest that is not.
        """
        positions, velocities = [np.asarray(from_rad, float)], []
        way, lean = self._rates(self._inverse.jacobian(from_rad), states[0], from_rad)
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
            way, lean = self._rates(solution.jacobian, state, solution.joints_rad)
            # To first order leaning moves the end effector nowhere; half of it belongs to either end of the way.
            position = solution.joints_rad + lean * (step_s / 2)
            positions.append(np.clip(position, self._limits.lower_rad, self._limits.upper_rad))
            velocities.append(way + lean)
        motion = JointMotion(stamps_ns, np.stack(positions[1:]), np.stack(velocities))
        return motion, finding or self._too_fast(motion)

    def _rates(self, jacobian: Array, state: MotionState, joints_rad: Array) -> tuple[Array, Array]:
        """Velocities (joints,): the least that move the end effector as asked, and those that lean towards home."""
        rotation = state.pose[:3, :3].T
        twist = np.concatenate([rotation @ state.linear_m_s, rotation @ state.angular_rad_s])
        inverse = np.linalg.pinv(jacobian, rcond=1e-3)
        way = inverse @ twist
        away = self._home_rad - joints_rad
        return way, (away - inverse @ (jacobian @ away)) * (LEAN * float(np.linalg.norm(way)))

    def _too_fast(self, motion: JointMotion) -> Finding | None:
        """The joint that exceeds its velocity most on the way from one point to the next."""
        durations_s = [(b - a) / NS_PER_S for a, b in pairwise(motion.stamps_ns)]
        speed = np.diff(motion.positions_rad, axis=0) / np.array(durations_s)[:, None]
        # As for the guard, a joint at an end of its range may rest there and creep.
        limit = self._limits.velocity_towards(motion.positions_rad[1:], speed)
        limit = np.maximum(limit, CREEP_SHARE * self._limits.velocity_rad_s)
        share = np.abs(speed) / limit
        if not share.size or share.max() <= 1 + VELOCITY_MARGIN:
            return None
        i, joint = np.unravel_index(int(np.argmax(share)), share.shape)
        value, name = float(abs(speed[i, joint])), self._names[joint]
        return Finding(
            'joint_velocity',
            Outcome.REJECT,
            value,
            float(limit[i, joint]),
            'rad/s',
            detail=f'{name} before point {i + 1}',
        )
