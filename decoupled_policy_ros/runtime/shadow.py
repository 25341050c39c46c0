"""Steering of an arm that somebody else moves: it is shown where a policy would take it, and nobody follows.

So each chunk begins where the arm is at that time, and as fast as it moves, never where the chunk before it would
have led.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime.chunks import NS_PER_S, Chunk
from decoupled_policy_ros.runtime.guard.guard import Guard
from decoupled_policy_ros.runtime.guard.verdict import Verdict
from decoupled_policy_ros.runtime.motion import Motion, MotionState, UnderWay
from decoupled_policy_ros.runtime.steering import Guarded, Joints, Plan, Steering

Array = NDArray[np.float64]

#: Time over which the joints' velocity is taken, and how old the sample before may be (ns).
DIFFERENCE_NS, OLDEST_NS = 40_000_000, 200_000_000
#: Longest time (s) that a velocity is extrapolated for.
AHEAD_S = 0.1
#: For velocities of the end effector, by difference of forward kinematics (s).
STEP_S = 1e-3


class StampedJoints(Joints, Protocol):
    """Where the arm's joints are, and since when."""

    def at(self, now_ns: int) -> tuple[int, Array] | None:
        """Stamp and joint positions (n,) of a time, rad; None if nobody knows."""


def arm_state(joints: StampedJoints, kinematics: Kinematics, now_ns: int, stamp_ns: int) -> MotionState:
    """State of a moving arm at a stamp a little later than now, as far as its last joint states tell.

    Its joints go on as they moved of late, for 0.1 s at most; an arm that was seen only once is at rest.

    Raises:
        ValueError: nobody knows where the arm is.
    """
    latest = joints.at(now_ns)
    if latest is None:
        raise ValueError(joints.why_not(now_ns))
    last_ns, joints_rad = latest
    before = joints.at(last_ns - DIFFERENCE_NS)
    if before is None or last_ns - before[0] > OLDEST_NS:
        return MotionState.at_rest(kinematics.forward(joints_rad))
    velocity_rad_s = (joints_rad - before[1]) * (NS_PER_S / (last_ns - before[0]))
    ahead_s = min(max(0.0, (stamp_ns - last_ns) / NS_PER_S), AHEAD_S)
    then_rad = joints_rad + ahead_s * velocity_rad_s
    pose, after = kinematics.forward_many(np.stack([then_rad, then_rad + STEP_S * velocity_rad_s]))
    turn_rad = Rotation.from_matrix(after[:3, :3] @ pose[:3, :3].T).as_rotvec()
    return MotionState(pose, (after[:3, 3] - pose[:3, 3]) / STEP_S, turn_rad / STEP_S)


class FromArm(Guarded):
    """Guarded steering whose paths all begin at the arm.

    Args:
        guard, kinematics, period_ns: as for `Guarded`.
        joints: where the arm is, and how fast.
    """

    def __init__(self, guard: Guard, kinematics: Kinematics, joints: StampedJoints, period_ns: int | None):
        super().__init__(guard, kinematics, joints, period_ns)
        self._stamped = joints

    def _check(self, chunk: Chunk, now_ns: int, motion: Motion | None, before: Motion | None) -> Verdict:
        return super()._check(chunk, now_ns, None, None)

    def _beginning(
        self,
        motion: Motion | None,
        before: Motion | None,
        joints_rad: Array | None,
        now_ns: int,
        start_ns: int,
    ) -> MotionState:
        return arm_state(self._stamped, self._kinematics, now_ns, start_ns)


class Shadowing:
    """Steering that tells what it would have followed.

    Args:
        steering: decides it, each time from the arm on.
        predicted: told of each chunk that would have been followed, as the policy predicted it.
    """

    def __init__(self, steering: Steering, predicted: Callable[[Chunk], None]):
        self._steering, self._predicted = steering, predicted
        self._planned: tuple[Plan, Chunk] | None = None

    @property
    def guard(self) -> Guard | None:
        """What checks the chunks, if anything does."""
        return self._steering.guard

    def plan(self, chunk: Chunk, now_ns: int) -> Plan:
        """What would be followed of a chunk; raises ChunkRejected where nothing would."""
        plan = self._steering.plan(chunk, now_ns)
        self._planned = plan, chunk
        return plan

    def adopt(self, plan: Plan) -> bool:
        """Follow a chunk as planned; False if the plan came too late."""
        adopted = self._steering.adopt(plan)
        if adopted and self._planned is not None and self._planned[0] is plan:
            self._predicted(self._planned[1])
        return adopted

    def under_way(self) -> UnderWay | None:
        """Nothing that a chunk could go on from: the arm does what somebody else wants."""
        return None

    def follow(self, now_ns: int) -> tuple[Array, float | None]:
        """Pose (4, 4) and gripper value that the arm would be told for a time."""
        return self._steering.follow(now_ns)

    def hold(self, now_ns: int, begin: bool = False) -> Array | None:
        """Pose (4, 4) that it would be told while nothing new is known."""
        return self._steering.hold(now_ns, begin)

    def missed_s(self, now_ns: int) -> float:
        """For how long (s) nothing was shown, if that is too long."""
        return self._steering.missed_s(now_ns)

    def reset(self, silently: bool = False) -> None:
        """Forget what was shown."""
        self._steering.reset(silently)
        self._planned = None

    def values(self) -> dict[str, str]:
        """What the steering reports."""
        return self._steering.values()
