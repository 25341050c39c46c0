"""Coming to rest inside limits, from whatever the arm is being told to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.runtime.motion import NS_PER_S, MotionState

Array = NDArray[np.float64]

#: Time between the commands of a stop that nobody else paces (s).
STOPPING_PERIOD_S = 0.01
#: A clock that has not moved for so long (s, wall) stands still.
STANDS_STILL_S = 0.1


@dataclass(frozen=True)
class StoppingLimits:
    """How hard to brake; a jerk of None is not limited."""

    linear_m_s2: float
    angular_rad_s2: float
    linear_m_s3: float | None = None
    angular_rad_s3: float | None = None


class Stop:
    """From a state to rest, straight ahead: along the velocity, about the axis that the arm was turning about.

    The velocity falls as 1 - 3 u^2 + 2 u^3 over u = t / T: it never grows, and the acceleration begins and ends
    at zero. It is at most 1.5 v / T, and the jerk 6 v / T^2, so T follows from the limits; position and rotation share
    the longer one. The way is v T / 2.

    Args:
        state: pose and velocity at the beginning.
        start_ns: stamp of the beginning.
        limits: how hard to brake.
    """

    def __init__(self, state: MotionState, start_ns: int, limits: StoppingLimits):
        self._state, self.start_ns = state, start_ns
        self.duration_s = max(
            _duration_s(state.linear_m_s, limits.linear_m_s2, limits.linear_m_s3),
            _duration_s(state.angular_rad_s, limits.angular_rad_s2, limits.angular_rad_s3),
        )

    def state(self, stamp_ns: int) -> MotionState:
        """Pose and velocity at a time; before the beginning those of the beginning, after the end at rest."""
        begin = self._state
        elapsed_s = (stamp_ns - self.start_ns) / NS_PER_S
        if elapsed_s <= 0.0:
            return begin
        u = min(elapsed_s / self.duration_s, 1.0) if self.duration_s > 0.0 else 1.0
        way_s = self.duration_s * (u - u**3 + u**4 / 2)
        share = 1 - 3 * u**2 + 2 * u**3
        rotation = Rotation.from_rotvec(way_s * begin.angular_rad_s).as_matrix() @ begin.pose[:3, :3]
        pose = poses.pose_from_position_rotation(begin.pose[:3, 3] + way_s * begin.linear_m_s, rotation)
        return MotionState(pose, share * begin.linear_m_s, share * begin.angular_rad_s)

    def gripper(self, stamp_ns: int) -> None:
        """The gripper keeps what it holds."""
        return None


def come_to_rest(
    now_ns: Callable[[], int],
    since_ns: int,
    hold: Callable[[int], Array | None],
    publish: Callable[[Array, int], None],
    wait: Callable[[float], object],
) -> None:
    """Command the way to rest, until the arm is at rest or the clock stands still.

    Args:
        now_ns: the clock.
        since_ns: time of the last command.
        hold: pose (4, 4) of braking for a time; None where nothing was ever commanded.
        publish: takes a pose and its time.
        wait: waits for so long (s) at the most.
    """
    pose, moved_s = None, time.monotonic()
    while time.monotonic() - moved_s < STANDS_STILL_S:
        stamp_ns = now_ns()
        if stamp_ns > since_ns:
            before, pose = pose, hold(stamp_ns)
            if pose is None:
                return
            publish(pose, stamp_ns)
            if before is not None and np.array_equal(pose, before):
                return
            since_ns, moved_s = stamp_ns, time.monotonic()
        wait(STOPPING_PERIOD_S)


def _duration_s(velocity: Array, acceleration: float, jerk: float | None) -> float:
    speed = float(np.linalg.norm(velocity))
    longest = 1.5 * speed / acceleration
    return longest if jerk is None else max(longest, float(np.sqrt(6 * speed / jerk)))
