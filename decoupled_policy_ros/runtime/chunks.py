"""A predicted chunk in time: which waypoint is meant for when, and what lies between two of them.

With n_obs_steps observation frames, index 0 of a chunk is the time of the **first** frame. So the newest
observation's stamp t belongs to index n_obs_steps - 1, and

    stamp(i) = t + (i - (n_obs_steps - 1)) / rate_hz.

From there n_execute waypoints are executed and the next chunk is due at stamp(n_obs_steps - 1 + n_execute);
for the paper's 2, 16 and 8 that is 1..8, t .. t + 0.35 s, and t + 0.4 s. The waypoints after that, 9..15, bridge
the time in which the next chunk is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
from numpy.typing import ArrayLike, NDArray

from decoupled_policy_ros.errors import ChunkExhausted
from decoupled_policy_ros.robot import poses

Array = NDArray[np.float64]

NS_PER_S = 1_000_000_000


def interpolate_waypoints(stamps_ns: Sequence[int], waypoints: Array, stamp_ns: int) -> Array:
    """Pose (4, 4) at a time between waypoints (n, 4, 4) with increasing stamps (n,).

    Straight in position, shortest arc in rotation; exactly the waypoint at a waypoint's own stamp.

    Raises:
        ChunkExhausted: the time lies before the first or after the last waypoint.
    """
    after = int(np.searchsorted(stamps_ns, stamp_ns))
    if after == len(stamps_ns) or stamp_ns < stamps_ns[0]:
        raise ChunkExhausted(
            f'no waypoint at {stamp_ns / NS_PER_S:.3f} s: they span {stamps_ns[0] / NS_PER_S:.3f} s '
            f'to {stamps_ns[-1] / NS_PER_S:.3f} s'
        )
    if stamps_ns[after] == stamp_ns:
        return waypoints[after].copy()
    start, end = stamps_ns[after - 1], stamps_ns[after]
    return poses.interpolate(waypoints[after - 1], waypoints[after], (stamp_ns - start) / (end - start))


class Chunk:
    """Waypoints of one prediction, each with its absolute stamp.

    Args:
        actions: (horizon, 10), see `robot.poses`; the rotation need not be orthonormal yet.
        observation_stamp_ns: stamp of the newest observation that it was predicted from.
        rate_hz: waypoints per second.
        n_obs_steps: observation frames that it was predicted from.
        n_execute: waypoints to execute before the next chunk is due.
        begins_ns: stamp from which on it is followed, in place of what is followed until then; its observation's by
            default.

    Raises:
        ValueError: a waypoint's rotation is degenerate or not finite, or the horizon is too short for
            n_obs_steps and n_execute.
    """

    def __init__(
        self,
        actions: ArrayLike,
        observation_stamp_ns: int,
        rate_hz: float,
        n_obs_steps: int = 2,
        n_execute: int = 8,
        begins_ns: int | None = None,
    ):
        actions = np.asarray(actions, float)
        if len(actions) < n_obs_steps - 1 + n_execute or n_execute < 1:
            raise ValueError(
                f'a chunk of {len(actions)} waypoints is too short for {n_obs_steps} observation steps and '
                f'{n_execute} executed ones; at least {n_obs_steps - 1 + max(n_execute, 1)}'
            )
        if not np.all(np.isfinite(actions)):
            raise ValueError(
                f'a waypoint of the chunk is not finite: {actions[~np.isfinite(actions).all(-1)][0]}'
            )
        self.poses_base_ee, gripper = poses.pose_from_action(actions)
        self.gripper = np.clip(gripper, -1.0, 1.0)
        self.observation_stamp_ns = int(observation_stamp_ns)
        self.begins_ns = self.observation_stamp_ns if begins_ns is None else begins_ns
        self.rate_hz = float(rate_hz)
        self.first = n_obs_steps - 1  # index of the observation's own stamp
        self.n_execute = n_execute
        self.stamps_ns = [self.stamp_ns(i) for i in range(len(actions))]

    def __len__(self) -> int:
        return len(self.gripper)

    def stamp_ns(self, index: int) -> int:
        """Absolute stamp of a waypoint as it was predicted."""
        return self.observation_stamp_ns + round((index - self.first) * NS_PER_S / self.rate_hz)

    def retimed(self, poses_base_ee: Array, gripper: Array, stamps_ns: Sequence[int]) -> Chunk:
        """This chunk with other waypoints (n, 4, 4), gripper values (n,) and stamps (n,), due as before."""
        chunk = copy(self)
        chunk.poses_base_ee, chunk.gripper, chunk.stamps_ns = poses_base_ee, gripper, list(stamps_ns)
        return chunk

    def slowed(self, factor: float) -> Chunk:
        """This chunk so many times slower from where it begins to be followed, due as before."""
        late_ns = [max(0, stamp - self.begins_ns) for stamp in self.stamps_ns]
        stamps_ns = [
            stamp + round((factor - 1.0) * late) for stamp, late in zip(self.stamps_ns, late_ns, strict=True)
        ]
        return self.retimed(self.poses_base_ee, self.gripper, stamps_ns)

    def ahead(self) -> range:
        """Indices of the waypoints that are not before the observation."""
        return range(int(np.searchsorted(self.stamps_ns, self.observation_stamp_ns)), len(self))

    @property
    def replan_stamp_ns(self) -> int:
        """Stamp from which on the next chunk is due, and of the observation that it should start from."""
        return self.stamp_ns(self.first + self.n_execute)

    @property
    def end_stamp_ns(self) -> int:
        """Stamp of the last waypoint; past it there is nothing to follow."""
        return self.stamps_ns[-1]

    def sample(self, stamp_ns: int) -> tuple[Array, float]:
        """Pose (4, 4) in the base frame and gripper value in [-1 open, +1 closed] for a time.

        The pose is interpolated. The gripper is the value of the latest waypoint at or before the time: an edge
        happens at a waypoint, never halfway before it.

        Raises:
            ChunkExhausted: the time lies before the first or after the last waypoint.
        """
        pose = interpolate_waypoints(self.stamps_ns, self.poses_base_ee, stamp_ns)
        index = int(np.searchsorted(self.stamps_ns, stamp_ns, side='right')) - 1
        return pose, float(self.gripper[index])


def next_frames_ns(chunk: Chunk, request_ns: int) -> int:
    """Stamp from which on frames may be part of the observation after a chunk's, its oldest frame included.

    Args:
        chunk: the one that is followed.
        request_ns: when the next one is requested; its observation may be a frame old by then, or, where that is when
            the chunk is due, half a frame for a camera that is out of step.
    """
    frames = chunk.first + (0.5 if request_ns == chunk.replan_stamp_ns else 1.0)
    return round(request_ns - frames * NS_PER_S / chunk.rate_hz)


class GripperLatch:
    """Turns a stream of gripper values into edges, with hysteresis, so that noise around zero moves nothing.

    Args:
        hysteresis: half width of the dead band around zero, in [0, 1).

    Raises:
        ValueError: the hysteresis is outside [0, 1).
    """

    def __init__(self, hysteresis: float = 0.2):
        if not 0.0 <= hysteresis < 1.0:
            raise ValueError(f'gripper hysteresis must lie in [0, 1), got {hysteresis}')
        self.hysteresis = hysteresis
        self.state: str | None = None

    def update(self, value: float | None) -> str | None:
        """Return 'open' or 'closed' if this value changes the state, else None; no value changes nothing.

        The first value always gives an edge, by its sign: until then nobody knows what the gripper does.
        """
        if value is None:
            return None
        if self.state is None:
            state = 'closed' if value > 0.0 else 'open'
        elif abs(value) <= self.hysteresis:
            return None
        else:
            state = 'closed' if value > 0.0 else 'open'
        if state == self.state:
            return None
        self.state = state
        return state

    def reset(self) -> None:
        """Forget the state: the next value gives an edge."""
        self.state = None
