"""Chunks followed as they were predicted, without a guard: for a simulator, and to see what the guard changes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.runtime.chunks import NS_PER_S, Chunk
from decoupled_policy_ros.runtime.motion import Motion, MotionState, UnderWay
from decoupled_policy_ros.runtime.steering import ChunkRejected, Plan
from decoupled_policy_ros.runtime.stopping import Stop, StoppingLimits, StraightOn

Array = NDArray[np.float64]


class AsPredicted:
    """A chunk as a motion: straight from waypoint to waypoint, from when it begins on."""

    def __init__(self, chunk: Chunk):
        self._chunk, self.start_ns = chunk, chunk.begins_ns
        self.end_ns = chunk.end_stamp_ns

    def state(self, stamp_ns: int) -> MotionState:
        """Pose, and the velocity of the line that is travelled then; outside of the chunk its nearest waypoint."""
        stamps_ns, waypoints = self._chunk.stamps_ns, self._chunk.poses_base_ee
        stamp_ns = min(max(stamp_ns, stamps_ns[0]), stamps_ns[-1])
        pose, _ = self._chunk.sample(stamp_ns)
        after = max(1, int(np.searchsorted(stamps_ns, stamp_ns)))
        before, way = waypoints[after - 1], waypoints[after]
        period_s = (stamps_ns[after] - stamps_ns[after - 1]) / NS_PER_S
        turn = Rotation.from_matrix(way[:3, :3] @ before[:3, :3].T).as_rotvec()
        return MotionState(pose, (way[:3, 3] - before[:3, 3]) / period_s, turn / period_s)

    def gripper(self, stamp_ns: int) -> float:
        """Value of the latest waypoint at or before a time."""
        stamps_ns = self._chunk.stamps_ns
        return self._chunk.sample(min(max(stamp_ns, stamps_ns[0]), stamps_ns[-1]))[1]


class Direct:
    """Follows chunks as they were predicted.

    Args:
        stopping: how hard a hold brakes; where it is None, a hold repeats the last command.
    """

    guard = None

    def __init__(self, stopping: StoppingLimits | None = None) -> None:
        self._stopping = stopping
        self.reset()

    def reset(self, silently: bool = False) -> None:
        """Forget what was commanded."""
        self._motion: Motion | None = None
        self._before: Motion | None = None
        self._last: Array | None = None
        self._last_ns = 0

    def plan(self, chunk: Chunk, now_ns: int) -> Plan:
        """The chunk as it is.

        Raises:
            ChunkRejected: all of it has passed.
        """
        if chunk.end_stamp_ns < now_ns:
            late_s = (now_ns - chunk.end_stamp_ns) / NS_PER_S
            raise ChunkRejected(f'passed: the last waypoint of the chunk was meant for {late_s:.3f} s ago')
        return Plan(chunk)

    def adopt(self, plan: Plan) -> bool:
        """Follow this chunk from when it begins on."""
        if self._motion is not None:
            ends_ns = plan.chunk.begins_ns
            self._before = UnderWay(self._motion, self._before, ends_ns).followed_by(self._last_ns)
        self._motion = AsPredicted(plan.chunk)
        return True

    def under_way(self) -> UnderWay | None:
        """The chunk, and the one before it; None before the first one and from a hold on."""
        motion, before = self._motion, self._before  # the streamer may change them meanwhile
        return UnderWay(motion, before, motion.end_ns) if isinstance(motion, AsPredicted) else None

    def follow(self, now_ns: int) -> tuple[Array, float | None]:
        """The chunk at a time; the one before it until it begins."""
        assert self._motion is not None
        motion = UnderWay(self._motion, self._before, now_ns).at(now_ns)
        self._last, self._last_ns = motion.state(now_ns).pose, now_ns
        return self._last, motion.gripper(now_ns)

    def hold(self, now_ns: int, begin: bool = False) -> Array | None:
        """Brake from what was commanded last; or the last command again. Where the arm is nobody knows here."""
        if self._last is None or self._stopping is None:
            return self._last
        assert self._motion is not None
        if not isinstance(self._motion, Stop):
            motion = UnderWay(self._motion, self._before, self._last_ns).at(self._last_ns)
            way = StraightOn(motion.state(self._last_ns), self._last_ns)
            self._motion = Stop(way, self._last_ns, self._stopping)
            self._before = None
        self._last, self._last_ns = self._motion.state(now_ns).pose, now_ns
        return self._last

    def missed_s(self, now_ns: int) -> float:
        """Nothing is too long: without a guard commands may jump."""
        return 0.0

    def values(self) -> dict[str, str]:
        """Nothing to report."""
        return {}
