"""Checks streams of commands: how fast, how suddenly and how far they move an arm, and whether that is allowed.

    checker = LimitsChecker.of(load_robot('panda_sim').limits)
    checker.add(stamp_ns, pose)               # each command
    checker.require_none()

Over DDS command_watch.py does that with every command of the nodes that a test starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.robot.description import Limits, RobotDescription
from decoupled_policy_ros.runtime.guard.guard import BESIDE_M
from decoupled_policy_ros.runtime.joint_motion import VELOCITY_MARGIN, JointMotion
from decoupled_policy_ros.runtime.steering import LONGEST_GAP_S

Array = NDArray[np.float64]

#: What may be above a limit by rounding.
TOLERANCE = 1.002
#: Commands further apart than this (s) are the end of one motion and the beginning of another.
PAUSE_S = 1.0
#: How far outside of the workspace a command may lie: what a path may turn beside it, and rounding.
OUTSIDE_M = BESIDE_M + 1e-5


@dataclass
class LimitsChecker:
    """Records the largest speed, acceleration and step of a stream of poses by the stamps that they carry.

    Between two commands the speed is their distance over the time between them, so it is never above the largest speed
    of any motion that leads through both; in the same way the change of it over the time between the middles of two
    pairs is never above the largest acceleration. Where commands get lost on the way nothing is reported wrongly.

    Attributes:
        linear_m_s, linear_m_s2, angular_rad_s, angular_rad_s2: limits; None for none.
        step_m: largest distance between two commands, None for none.
        largest: of each, so far.
        breaches: what broke a limit, and when.
    """

    linear_m_s: float | None = None
    linear_m_s2: float | None = None
    angular_rad_s: float | None = None
    angular_rad_s2: float | None = None
    step_m: float | None = None
    workspace_m: Array | None = None
    largest: dict[str, float] = field(default_factory=dict)
    breaches: list[str] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.restart()

    @classmethod
    def of(cls, limits: Limits) -> LimitsChecker:
        """A checker of an arm's limits."""
        return cls(
            limits.ee_linear_velocity_m_s,
            limits.ee_linear_acceleration_m_s2,
            limits.ee_angular_velocity_rad_s,
            limits.ee_angular_acceleration_rad_s2,
            workspace_m=limits.workspace_m,
        )

    def restart(self) -> None:
        """The next command begins a new motion, as after a reset of the simulator."""
        self._last: tuple[int, Array] | None = None
        self._velocity: tuple[float, Array, Array] | None = None  # middle (s), linear, angular

    def add(self, stamp_ns: int, pose: Array) -> None:
        """Look at a command (4, 4) and its stamp."""
        self.count += 1
        if not np.isfinite(pose).all():
            self.breaches.append(f'not finite at {stamp_ns}: {pose.tolist()}')
            return self.restart()
        if self.workspace_m is not None:
            outside = np.maximum(self.workspace_m[0] - pose[:3, 3], pose[:3, 3] - self.workspace_m[1])
            self._look('outside_m', float(outside.max()), OUTSIDE_M, stamp_ns)
        last, self._last = self._last, (stamp_ns, pose)
        if last is None:
            return None
        apart_s = (stamp_ns - last[0]) * 1e-9
        if apart_s <= 0.0:
            self.breaches.append(f'stamp {stamp_ns} is not after {last[0]}')
            return self.restart()
        if apart_s > PAUSE_S:
            self._velocity = None
            return None
        if apart_s > LONGEST_GAP_S:
            self._velocity = None  # an arm that heard nothing is at its last command, and may be held there
        way = pose[:3, 3] - last[1][:3, 3]
        turn = Rotation.from_matrix(pose[:3, :3] @ last[1][:3, :3].T).as_rotvec()
        self._look('step_m', float(np.linalg.norm(way)), self.step_m, stamp_ns)
        self._move(last[0] * 1e-9 + apart_s / 2, way / apart_s, turn / apart_s, stamp_ns)
        return None

    def require_none(self) -> None:
        """Fail if a limit was broken, or nothing was ever seen."""
        assert self.count > 0, 'the checker saw no command'
        assert not self.breaches, f'{len(self.breaches)} breaches: ' + '; '.join(self.breaches[:5])

    def _move(self, middle_s: float, linear: Array, angular: Array, stamp_ns: int) -> None:
        self._look('linear_m_s', float(np.linalg.norm(linear)), self.linear_m_s, stamp_ns)
        self._look('angular_rad_s', float(np.linalg.norm(angular)), self.angular_rad_s, stamp_ns)
        before, self._velocity = self._velocity, (middle_s, linear, angular)
        if before is not None:
            since_s = middle_s - before[0]
            change = float(np.linalg.norm(linear - before[1])) / since_s
            self._look('linear_m_s2', change, self.linear_m_s2, stamp_ns)
            change = float(np.linalg.norm(angular - before[2])) / since_s
            self._look('angular_rad_s2', change, self.angular_rad_s2, stamp_ns)

    def _look(self, name: str, value: float, limit: float | None, stamp_ns: int) -> None:
        self.largest[name] = max(self.largest.get(name, 0.0), value)
        if limit is not None and value > TOLERANCE * limit:
            self.breaches.append(f'{name} {value:.4g} above {limit:g} at {stamp_ns * 1e-9:.3f} s')


#: How far a trajectory may begin from where the one before it has the joints then (rad, and rad/s).
JOIN_RAD, JOIN_RAD_S = 1e-3, 0.05


def sampled(motion: JointMotion) -> tuple[Array, Array]:
    """Positions and velocities (m, joints) on the way that a controller takes, ten from each point to the next."""
    stamps_ns = [motion.stamps_ns[0]]
    for begin, end in pairwise(motion.stamps_ns):
        stamps_ns += [begin + (end - begin) * part // 10 for part in range(1, 11)]
    positions, velocities = zip(*map(motion.at, stamps_ns), strict=True)
    return np.stack(positions), np.stack(velocities)


class JointChecker:
    """Looks at joint trajectories: ranges, speeds, accelerations, and whether each goes on from the one before.

    Args:
        robot: gives names and limits.
    """

    def __init__(self, robot: RobotDescription):
        self._names, self._limits = tuple(robot.joint_names), robot.limits
        self.largest: dict[str, float] = {}
        self.breaches: list[str] = []
        self.count = 0
        self.restart()

    def restart(self) -> None:
        """The next trajectory begins a new motion."""
        self._before: JointMotion | None = None

    def add(self, names: tuple[str, ...], motion: JointMotion) -> None:
        """Look at a trajectory, its joints in the order of `names`."""
        self.count += 1
        before, self._before = self._before, motion
        start_ns, positions = motion.stamps_ns[0], motion.positions_rad
        if names != self._names:
            self.breaches.append(f'joints {names}, expected {self._names}')
            return self.restart()
        if not np.isfinite(positions).all():
            self.breaches.append(f'not finite at {start_ns}: {positions.tolist()}')
            return self.restart()
        durations_s = np.diff(np.array(motion.stamps_ns, np.int64)) * 1e-9
        if (durations_s <= 0.0).any():
            self.breaches.append(f'stamps that do not increase at {start_ns}: {list(motion.stamps_ns)}')
            return self.restart()
        passed, rates = sampled(motion)
        outside = np.maximum(self._limits.lower_rad - passed, passed - self._limits.upper_rad)
        self._look('outside_rad', outside, 1e-6, start_ns)
        if len(positions) > 1:
            fastest = (1 + VELOCITY_MARGIN) * self._limits.velocity_rad_s
            self._look('joint_velocity', np.abs(rates), fastest, start_ns)
        if motion.velocities_rad_s is not None and len(positions) > 1:
            change = np.abs(np.diff(motion.velocities_rad_s, axis=0)) / durations_s[:, None]
            self._look('joint_acceleration', change, self._limits.acceleration_rad_s2, start_ns)
        if before is not None:
            positions_rad, velocities_rad_s = before.at(start_ns)
            self._look('join_rad', np.abs(positions[0] - positions_rad), JOIN_RAD, start_ns)
            if motion.velocities_rad_s is not None:
                step = np.abs(motion.velocities_rad_s[0] - velocities_rad_s)
                self._look('join_rad_s', step, JOIN_RAD_S, start_ns)
        return None

    def _look(self, name: str, values: Array, limits: Array | float, stamp_ns: int) -> None:
        self.largest[name] = max(self.largest.get(name, -np.inf), float(values.max()))
        over = values - TOLERANCE * np.asarray(limits)
        if over.max() > 0.0:
            joint = int(np.unravel_index(int(np.argmax(over)), over.shape)[-1])
            worst = float(values.reshape(-1, values.shape[-1])[:, joint].max())
            limit = float(np.broadcast_to(limits, values.shape[-1:])[joint])
            self.breaches.append(
                f'{name} {worst:.4g} above {limit:g} of {self._names[joint]} at {stamp_ns * 1e-9:.3f} s'
            )
