"""From chunks to commands: which pose belongs to a time, with a guard or without one.

Without one, a chunk is followed as it was predicted, from when it begins on (`runtime.direct`). With one, every chunk
first becomes a path that begins where and how fast the arm is told to move at that moment and keeps all limits. A hold
brakes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.errors import InferenceError
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime.chunks import NS_PER_S, Chunk
from decoupled_policy_ros.runtime.guard.guard import Guard, Request, missing_joints
from decoupled_policy_ros.runtime.guard.verdict import Finding, GuardStatistics, Outcome, Verdict
from decoupled_policy_ros.runtime.motion import Motion, MotionState, Path, UnderWay
from decoupled_policy_ros.runtime.stopping import JointBraking, Stop

Array = NDArray[np.float64]

#: A path begins this much after now (s) at least: by then it has been planned. Or twice as long as planning took
#: lately, if that is longer.
LEAD_S = 0.01
#: Tolerance of stamps (ns): those of chunks are rounded.
ROUNDING_NS = 1000
#: Where nothing is commanded for longer (s), and for more periods of commands, the arm is no longer taken to be on the
#: way but at its last command; and the first command has to come within so many periods.
LONGEST_GAP_S, LONGEST_GAP, LONGEST_FIRST_GAP = 0.1, 3, 2


class ChunkRejected(InferenceError):
    """The guard refuses a chunk; the message says which rule, value and limit."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What will be followed.

    Attributes:
        chunk: waypoints with their stamps.
        path: along them, where there is a guard.
        after: the motion that it goes on from; None for an arm at rest.
    """

    chunk: Chunk
    path: Path | None = None
    after: Motion | None = None

    @property
    def time_scale(self) -> float:
        """By how much its slowest part is slower than it was predicted."""
        return 1.0 if self.path is None else self.path.time_scale

    @property
    def begins_ns(self) -> int:
        """First time for which a command comes from it."""
        return self.chunk.begins_ns if self.path is None else self.path.start_ns


class Steering(Protocol):
    """Turns chunks into commands. `plan` may take its time and runs on the worker, the rest under the loop's lock."""

    @property
    def guard(self) -> Guard | None:
        """What checks the chunks, if anything does."""

    def plan(self, chunk: Chunk, now_ns: int) -> Plan:
        """What will be followed of a chunk.

        Raises:
            ChunkRejected: nothing will.
        """

    def adopt(self, plan: Plan) -> bool:
        """Follow a chunk as planned; False if the plan came too late, and another one is needed."""

    def under_way(self) -> UnderWay | None:
        """What the arm does if nothing new comes; None before the first chunk and once it has been held."""

    def follow(self, now_ns: int) -> tuple[Array, float | None]:
        """Pose (4, 4) and gripper value for a time; None where the gripper is left as it is."""

    def hold(self, now_ns: int, begin: bool = False) -> Array | None:
        """Pose (4, 4) for a time at which nothing new is known; None before the first command.

        With `begin` that may be the first command: to stay where the arm is, if that is known.
        """

    def missed_s(self, now_ns: int) -> float:
        """For how long (s) no command was given, if that is too long to go on with what is followed; else 0.

        To go on would begin with a jump. What is followed then has to be held.
        """

    def reset(self, silently: bool = False) -> None:
        """Forget what was commanded; `silently`: without another command, for somebody else gives
        them now, or the arm has not done those before.
        """

    def values(self) -> dict[str, str]:
        """What there is to report."""


class Joints(Protocol):
    """Where the arm's joints are."""

    def positions(self, now_ns: int) -> Array | None:
        """Joint positions (n,) of a time, rad; None if nobody knows."""

    def why_not(self, now_ns: int) -> str:
        """Why nobody knows."""


class Guarded:
    """Follows what the guard lets through, without a jump from one chunk to the next.

    Args:
        guard: checks each chunk.
        kinematics: of the arm, for where it is before the first command.
        joints: where the arm is.
        period_ns: of commands; None: time waits for them, and while a chunk is planned, so that its path begins at the
            last command.
    """

    def __init__(self, guard: Guard, kinematics: Kinematics, joints: Joints, period_ns: int | None):
        self.guard, self._kinematics, self._joints, self._period_ns = guard, kinematics, joints, period_ns
        self.statistics = GuardStatistics()
        self._longest_s = 0.0
        self.reset()

    def reset(self, silently: bool = False) -> None:
        """Forget what was commanded: the next path begins where the arm is, at rest."""
        self._motion: Motion | None = None
        self._before: Motion | None = None
        self._last_ns: int | None = None

    @property
    def motion(self) -> Motion | None:
        """What is followed now, or will be soon; None before the first command."""
        return self._motion

    def plan(self, chunk: Chunk, now_ns: int) -> Plan:
        """The path from what is commanded then to and along the chunk's waypoints that are still to come.

        Raises:
            ChunkRejected: the guard refuses it.
        """
        begin = time.perf_counter()
        motion, before = self._motion, self._before  # what is followed may change meanwhile: `adopt` notices
        verdict = self._check(chunk, now_ns, motion, before)
        self._longest_s *= 0.9
        self.took(time.perf_counter() - begin)
        self.statistics.add(verdict)
        if verdict.path is None:
            raise ChunkRejected(str(verdict.rejection))
        path = verdict.path
        return Plan(
            chunk.retimed(path.poses_base_ee, path.gripper_values[1:], path.stamps_ns[1:]), path, motion
        )

    def took(self, planning_s: float) -> None:
        """Know how long (s) a plan took: the next paths begin late enough for that."""
        self._longest_s = max(self._longest_s, planning_s)

    def adopt(self, plan: Plan) -> bool:
        """Follow a path from its beginning on; False where it no longer begins at what is commanded then."""
        path = plan.path
        assert path is not None
        if plan.after is not self._motion or (self._last_ns is not None and self._last_ns > path.start_ns):
            return False
        if self._motion is not None:
            self._before = UnderWay(self._motion, self._before, path.start_ns).followed_by(self._last_ns)
        self._motion = path
        return True

    def under_way(self) -> UnderWay | None:
        """The path, and the one before it; None before the first one and from a hold on."""
        motion, before = self._motion, self._before  # the streamer may change them meanwhile
        return UnderWay(motion, before, motion.stamps_ns[-1]) if isinstance(motion, Path) else None

    def follow(self, now_ns: int) -> tuple[Array, float | None]:
        """Where the path is at a time; the motion before it until it begins."""
        motion = _at(now_ns, self._motion, self._before)
        self._last_ns = now_ns
        return motion.state(now_ns).pose, motion.gripper(now_ns)

    def missed_s(self, now_ns: int) -> float:
        """For how long (s) no command was given, if that is too long to go on with what is followed; else 0."""
        motion, last_ns, period_ns = self._motion, self._last_ns, self._period_ns
        if motion is None or period_ns is None:
            return 0.0
        longest_ns = longest_gap_ns(period_ns)
        if last_ns is None:
            last_ns, longest_ns = motion.start_ns, LONGEST_FIRST_GAP * period_ns
        return (now_ns - last_ns) / NS_PER_S if now_ns - last_ns > longest_ns else 0.0

    def hold(
        self,
        now_ns: int,
        begin: bool = False,
        joints: JointBraking | None = None,
        since_ns: int | None = None,
    ) -> Array | None:
        """Brake on the way that was commanded last, and stay; before that, stay where the arm is if asked to.

        Where commands were missing for too long the arm stays at the last one.

        Args:
            now_ns, begin: as for `Steering.hold`.
            joints: what they have to keep as well.
            since_ns: until when the arm has gone on without commands, if it does that.
        """
        motion = self._motion
        if motion is not None and since_ns is None and self.missed_s(now_ns):
            last_ns = motion.start_ns if self._last_ns is None else self._last_ns
            pose = _at(last_ns, motion, self._before).state(last_ns).pose
            self._motion, self._before = Stop.at_rest(pose, now_ns, self.guard.stopping), None
            motion = self._motion
        if motion is None and begin and (joints_rad := self._joints.positions(now_ns)) is not None:
            pose = self._kinematics.forward(joints_rad)
            motion = self._motion = Stop.at_rest(pose, now_ns, self.guard.stopping)
        if motion is None:
            return None
        if not isinstance(motion, Stop):
            assert isinstance(motion, Path)
            before = self._before
            if since_ns is None:
                since_ns = now_ns if self._last_ns is None else self._last_ns
            way = UnderWay(motion, before, motion.end_ns).followed_by(since_ns)
            if way is not motion and isinstance(before, Stop):
                motion = before  # the path has not begun, and the stop before it goes on
            else:
                motion = Stop(way, since_ns, self.guard.stopping, motion.end_ns, joints)
            self._motion, self._before = motion, None
        self._last_ns = now_ns
        return motion.state(now_ns).pose

    def values(self) -> dict[str, str]:
        """What the guard has found."""
        return self.statistics.values() | {'guard_longest_ms': f'{1e3 * self._longest_s:.2f}'}

    def _check(self, chunk: Chunk, now_ns: int, motion: Motion | None, before: Motion | None) -> Verdict:
        joints_rad = self._joints.positions(now_ns)
        if joints_rad is None and (motion is None or self.guard.settings.needs_joints):
            return Verdict(None, (missing_joints(self._joints.why_not(now_ns)),))
        start_ns = self._start_ns(chunk, now_ns)
        start = self._beginning(motion, before, joints_rad, now_ns, start_ns)
        earliest_ns = start_ns + round(NS_PER_S / chunk.rate_hz) - ROUNDING_NS
        first = int(np.searchsorted(chunk.stamps_ns, earliest_ns))
        if first == len(chunk):
            late_s = (earliest_ns - chunk.end_stamp_ns) / NS_PER_S
            return Verdict(None, (Finding('passed', Outcome.REJECT, late_s, 0.0, 's'),))
        return self.guard.check(
            Request(
                start,
                start_ns,
                chunk.poses_base_ee[first:],
                chunk.stamps_ns[first:],
                chunk.gripper[max(first - 1, 0) :] if first else np.append(chunk.gripper[:1], chunk.gripper),
                joints_rad,
                max(1, chunk.first + chunk.n_execute - first),
                first,
            )
        )

    def _beginning(
        self,
        motion: Motion | None,
        before: Motion | None,
        joints_rad: Array | None,
        now_ns: int,
        start_ns: int,
    ) -> MotionState:
        """Where and how the arm is told to move at a stamp a little later than now; before any command it rests."""
        if motion is not None:
            return _at(start_ns, motion, before).state(start_ns)
        assert joints_rad is not None
        return MotionState.at_rest(self._kinematics.forward(joints_rad))

    def _start_ns(self, chunk: Chunk, now_ns: int) -> int:
        """Where the path begins: where the chunk does, or soon; if time waits, a waypoint before the next command."""
        if self._period_ns is not None:
            return max(chunk.begins_ns, now_ns + round(max(LEAD_S, 2 * self._longest_s) * NS_PER_S))
        last_ns = self._last_ns
        return now_ns - round(NS_PER_S / chunk.rate_hz) if last_ns is None else last_ns


def longest_gap_ns(period_ns: int) -> int:
    """How long no command may be given, with a period of commands, for the arm still to be on its way."""
    return max(LONGEST_GAP * period_ns, round(LONGEST_GAP_S * NS_PER_S))


def _at(stamp_ns: int, motion: Motion | None, before: Motion | None) -> Motion:
    """Which of two motions a time belongs to: the one before until the other begins."""
    assert motion is not None
    return UnderWay(motion, before, stamp_ns).at(stamp_ns)
