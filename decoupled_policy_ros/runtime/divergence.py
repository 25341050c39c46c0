"""How far an arm was from where a policy said it would be, while somebody else moved it.

Each chunk is compared once the arm has passed the time of its last waypoint. For the waypoint at a stamp t the arm is
where forward kinematics puts it at t, its joints interpolated between the samples before and after.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.observation.streams import StreamBuffer
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime.chunks import Chunk

Array = NDArray[np.float64]

#: Joint states that are kept: 4 s at 1 kHz. A chunk lies in the past after less than one.
SAMPLES = 4000
#: Between two joint states further apart nothing is known of the arm.
GAP_NS = 150_000_000
#: Chunks that wait for the arm, and compared ones that figures are taken of.
PENDING, WINDOW = 32, 50
#: A gripper counts as closed from this value in [-1 open, +1 closed] on: around an object it never gets to +1.
CLOSED = -0.8


@dataclass(frozen=True, eq=False)
class Compared:
    """A chunk beside what the arm did.

    Attributes:
        chunk: as it was predicted.
        stamps_ns: of its waypoints from the observation's stamp on, n of them.
        position_m, rotation_rad: distance of each waypoint from the arm (n,); NaN where nobody knows.
        gripper_agrees: whether both were open, or closed (n,); NaN where nobody knows.
    """

    chunk: Chunk
    stamps_ns: list[int]
    position_m: Array
    rotation_rad: Array
    gripper_agrees: Array


class Divergence:
    """Takes down chunks and joint states; for one thread each.

    Args:
        robot: gives joints, kinematics and the gripper's range.
    """

    def __init__(self, robot: RobotDescription):
        self._robot, self._kinematics = robot, Kinematics(robot)
        self._arm, self._gripper = StreamBuffer(SAMPLES), StreamBuffer(SAMPLES)
        self._pending: deque[Chunk] = deque(maxlen=PENDING)
        self._compared: deque[Compared] = deque(maxlen=WINDOW)
        self._count = 0

    def predicted(self, chunk: Chunk) -> None:
        """A chunk that would have been followed."""
        self._pending.append(chunk)

    def measured(
        self, stamp_ns: int, joints_rad: Array, gripper_positions: Array | None = None
    ) -> list[Compared]:
        """Where the arm is at a time; returns the chunks that can be compared now.

        Args:
            stamp_ns: later than the last one, or it is left out.
            joints_rad: (n,) of the arm.
            gripper_positions: of the gripper's joints, where they are known.
        """
        self._arm.push(stamp_ns, joints_rad)
        if gripper_positions is not None:
            self._gripper.push(stamp_ns, gripper_positions)
        done = []
        pending = self._pending  # another thread may clear it
        while pending and pending[0].stamp_ns(len(pending[0]) - 1) <= stamp_ns:
            done.append(self._compare(pending.popleft()))
        self._compared.extend(done)
        self._count += len(done)
        return done

    def clear(self) -> None:
        """Forget chunks and arm, as after a jump of the clock; figures stay."""
        self._arm.clear()
        self._gripper.clear()
        self._pending = deque(maxlen=PENDING)

    def values(self) -> dict[str, str]:
        """For diagnostics: figures over the last chunks, and their means by step from the observation on."""
        values = {'divergence_chunks': str(self._count)}
        compared = list(self._compared)
        if not compared:
            return values
        steps = len(compared[-1].stamps_ns)
        compared = [c for c in compared if len(c.stamps_ns) == steps]
        for name, digits in (('position_m', 4), ('rotation_rad', 4), ('gripper_agrees', 2)):
            rows = np.stack([getattr(c, name) for c in compared])
            known = rows[np.isfinite(rows)]
            if len(known):
                figures = (
                    {'mean': known.mean(), 'max': known.max()} if digits == 4 else {'mean': known.mean()}
                )
                values |= {f'divergence_{name}_{what}': f'{v:.{digits}f}' for what, v in figures.items()}
                values[f'divergence_{name}_by_step'] = ' '.join(f'{v:.{digits}f}' for v in _means(rows))
        return values

    def _compare(self, chunk: Chunk) -> Compared:
        indices = range(chunk.first, len(chunk))
        stamps_ns = [chunk.stamp_ns(i) for i in indices]
        position_m, rotation_rad, agrees = (np.full(len(stamps_ns), np.nan) for _ in range(3))
        for row, (i, stamp_ns) in enumerate(zip(indices, stamps_ns, strict=True)):
            joints_rad, fingers = _between(self._arm, stamp_ns), _between(self._gripper, stamp_ns)
            if joints_rad is not None:
                pose, arm = chunk.poses_base_ee[i], self._kinematics.forward(joints_rad)
                position_m[row] = np.linalg.norm(pose[:3, 3] - arm[:3, 3])
                rotation_rad[row] = Rotation.from_matrix(pose[:3, :3].T @ arm[:3, :3]).magnitude()
            if fingers is not None:
                closed = float(self._robot.gripper.normalised(fingers)) > CLOSED
                agrees[row] = closed == (chunk.gripper[i] > 0.0)
        return Compared(chunk, stamps_ns, position_m, rotation_rad, agrees)


def _means(rows: Array) -> list[float]:
    """Mean of each column over its known values; NaN where there is none."""
    return [
        float(column[np.isfinite(column)].mean()) if np.isfinite(column).any() else np.nan
        for column in rows.T
    ]


def _between(buffer: StreamBuffer, stamp_ns: int) -> Array | None:
    """Sample at a time, straight between those before and after it; None where they are too far apart."""
    before, after_ns = buffer.at_or_before(stamp_ns), buffer.first_after(stamp_ns)
    if before is None:
        return None
    start_ns, start = before
    if start_ns == stamp_ns:
        return np.asarray(start)
    after = None if after_ns is None else buffer.at_or_before(after_ns)
    if after is None or after[0] - start_ns > GAP_NS:
        return None
    share = (stamp_ns - start_ns) / (after[0] - start_ns)
    return np.asarray(start + share * (after[1] - start))
