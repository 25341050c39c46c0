"""Coming to rest inside limits, on the way that the arm is being told to go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.runtime.motion import NS_PER_S, Motion, MotionState

Array = NDArray[np.float64]

#: Time between the commands of a stop that nobody else paces (s).
STOPPING_PERIOD_S = 0.01
#: How finely a stop is looked at (s), and what an acceleration may be above its limit by rounding.
SAMPLE_S, ROUNDING = 0.004, 1.001
#: When it may begin, as shares of what is left of the motion, and how long it may take, as multiples of the least.
DELAYS, LONGER = np.linspace(0.0, 1.0, 16, endpoint=False), (1.0, 1.25, 1.6, 2.0, 3.0, 5.0)
#: A clock that has not moved for so long (s, wall) stands still.
STANDS_STILL_S = 0.1


@dataclass(frozen=True)
class StoppingLimits:
    """How hard to brake; a jerk of None is not limited."""

    linear_m_s2: float
    angular_rad_s2: float
    linear_m_s3: float | None = None
    angular_rad_s3: float | None = None


@dataclass(frozen=True)
class JointBraking:
    """How the joints move along a motion, and how hard they may brake.

    Attributes:
        velocities_rad_s: (joints,) at a stamp of the motion.
        limits_rad_s2: (joints,).
    """

    velocities_rad_s: Callable[[int], Array]
    limits_rad_s2: Array


@dataclass(frozen=True, eq=False)
class StraightOn:
    """Where a state leads if nothing changes: along its velocity, about the axis that it turns about."""

    begin: MotionState
    start_ns: int

    def state(self, stamp_ns: int) -> MotionState:
        """Pose and velocity at a time."""
        since_s, begin = (stamp_ns - self.start_ns) / NS_PER_S, self.begin
        if since_s <= 0.0:
            return begin
        rotation = Rotation.from_rotvec(since_s * begin.angular_rad_s).as_matrix() @ begin.pose[:3, :3]
        pose = poses.pose_from_position_rotation(begin.pose[:3, 3] + since_s * begin.linear_m_s, rotation)
        return MotionState(pose, begin.linear_m_s, begin.angular_rad_s)

    def gripper(self, stamp_ns: int) -> None:
        """Nothing is said about it."""
        return None


class Stop:
    """Along a motion, ever more slowly, to rest: no pose is commanded that the motion would not have led to.

    A motion that was checked keeps clear of everything, what leads straight on from it may not: into the floor that it
    was about to brake before. The time of the motion goes by with 1 - 3 u^2 + 2 u^3 over u = t / T. So the speed is
    never above the motion's, and what is added to its acceleration begins and ends at zero; it is at most 1.5 v / T,
    and the jerk 6 v / T^2. T follows from the limits. Where they leave too little beside the acceleration of the motion
    itself T is longer, or the slowing down begins later, whichever ends sooner; a motion that rests before is followed
    to its end.

    Args:
        motion: what is commanded until then.
        start_ns: stamp of the beginning.
        limits: how hard to brake.
        rests_ns: when the motion comes to rest by itself; None for one that never does, and is not accelerated.
        joints: what they have to keep, too, on a motion that comes to rest by itself.

    Attributes:
        duration_s: until the arm rests.
        end_ns: stamp from which on it does.
    """

    def __init__(
        self,
        motion: Motion,
        start_ns: int,
        limits: StoppingLimits,
        rests_ns: int | None = None,
        joints: JointBraking | None = None,
    ):
        self._motion, self.start_ns = motion, start_ns
        begin = motion.state(start_ns)
        delay_s, self._slowing_s = 0.0, _least_s(begin.linear_m_s, begin.angular_rad_s, limits)
        if rests_ns is not None and self._slowing_s > 0.0:
            left_s = max(0.0, (rests_ns - start_ns) / NS_PER_S)
            braking = _Braking(motion, start_ns, limits, joints)
            delay_s, self._slowing_s = braking.soonest(left_s, self._slowing_s)
        self._slows_ns = start_ns + round(delay_s * NS_PER_S)
        self.duration_s = delay_s + self._slowing_s
        self.end_ns = self._slows_ns + int(np.ceil(self._slowing_s * NS_PER_S))

    @classmethod
    def at_rest(cls, pose: Array, stamp_ns: int, limits: StoppingLimits) -> Stop:
        """Nothing but to stay at a pose (4, 4)."""
        return cls(StraightOn(MotionState.at_rest(pose), stamp_ns), stamp_ns, limits)

    def state(self, stamp_ns: int) -> MotionState:
        """Pose and velocity at a time; before the beginning those of the beginning, after the end at rest."""
        elapsed_s = (stamp_ns - self._slows_ns) / NS_PER_S
        if elapsed_s <= 0.0:
            return self._motion.state(max(stamp_ns, self.start_ns))
        u = min(elapsed_s / self._slowing_s, 1.0) if self._slowing_s > 0.0 else 1.0
        way, share = slowed(u)
        state = self._motion.state(self._slows_ns + round(self._slowing_s * way * NS_PER_S))
        return MotionState(state.pose, share * state.linear_m_s, share * state.angular_rad_s)

    def gripper(self, stamp_ns: int) -> None:
        """The gripper keeps what it holds."""
        return None


def slowed(u: Any) -> tuple[Any, Any]:
    """After a share u of the duration: the share that has gone by on the motion, and what is left of the velocity."""
    return u - u**3 + u**4 / 2, 1 - 3 * u**2 + 2 * u**3


def ways_to_slow(left_s: float, least_s: float) -> Iterator[tuple[float, float]]:
    """Delays and durations (s) of slowing a motion down that rests by itself in `left_s`, in the order of their ends.

    Args:
        left_s: until the motion rests by itself; what ends no sooner is left out.
        least_s: of slowing down.
    """
    tried = [(delay * left_s, longer * least_s) for delay in DELAYS for longer in LONGER]
    return (way for way in sorted(tried, key=sum) if sum(way) < left_s)


class _Braking:
    """Which ways to slow a motion down keep the limits; the motion is looked at as far as that takes."""

    def __init__(self, motion: Motion, start_ns: int, limits: StoppingLimits, joints: JointBraking | None):
        self._motion, self._start_ns, self._limits, self._joints = motion, start_ns, limits, joints
        self._velocities: list[Array] = []

    def soonest(self, left_s: float, least_s: float) -> tuple[float, float]:
        """Delay and duration (s) of the slowing down that ends first; by itself the motion rests in `left_s`."""
        return next((way for way in ways_to_slow(left_s, least_s) if self._keeps(*way)), (left_s, 0.0))

    def _keeps(self, delay_s: float, duration_s: float) -> bool:
        u = np.linspace(0.0, 1.0, int(np.ceil(duration_s / SAMPLE_S)) + 4)
        way, share = slowed(u)
        known = self._known(delay_s + duration_s * way)
        limits, joints = self._limits, self._joints
        if duration_s < _least_s(known[:3, 0], known[3:6, 0], limits):
            return False
        change = np.abs(np.diff(share * known)) / (duration_s * u[1])
        linear, angular = np.linalg.norm(change[:3], axis=0), np.linalg.norm(change[3:6], axis=0)
        return bool(
            linear.max() <= ROUNDING * limits.linear_m_s2
            and angular.max() <= ROUNDING * limits.angular_rad_s2
            and (joints is None or (change[6:] <= ROUNDING * joints.limits_rad_s2[:, None]).all())
        )

    def _known(self, times_s: Array) -> Array:
        """Velocities (6 and joints, n) of the motion at times after the beginning."""
        while len(self._velocities) * SAMPLE_S < times_s[-1] + SAMPLE_S:
            stamp_ns = self._start_ns + round(len(self._velocities) * SAMPLE_S * NS_PER_S)
            state = self._motion.state(stamp_ns)
            joints = [] if self._joints is None else [self._joints.velocities_rad_s(stamp_ns)]
            self._velocities.append(np.concatenate([state.linear_m_s, state.angular_rad_s, *joints]))
        at_s = SAMPLE_S * np.arange(len(self._velocities))
        return np.stack([np.interp(times_s, at_s, each) for each in np.stack(self._velocities, 1)])


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


def _least_s(linear_m_s: Array, angular_rad_s: Array, limits: StoppingLimits) -> float:
    """What it takes to brake from these velocities (3,), straight ahead."""
    return max(
        _duration_s(linear_m_s, limits.linear_m_s2, limits.linear_m_s3),
        _duration_s(angular_rad_s, limits.angular_rad_s2, limits.angular_rad_s3),
    )


def _duration_s(velocity: Array, acceleration: float, jerk: float | None) -> float:
    speed = float(np.linalg.norm(velocity))
    longest = 1.5 * speed / acceleration
    return longest if jerk is None else max(longest, float(np.sqrt(6 * speed / jerk)))
