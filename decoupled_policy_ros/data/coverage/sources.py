"""The motions of a Stage 1 source as a stream of blocks, whatever is on disk: recordings or a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.data.datasets.lerobot_layout import INFO_PATH
from decoupled_policy_ros.data.motions.files import SUFFIX
from decoupled_policy_ros.data.motions.motions import MAX_GAP_S, read_motions, resample
from decoupled_policy_ros.data.readers.converted import ACTION, JOINTS, POSE
from decoupled_policy_ros.data.readers.interface import Rows
from decoupled_policy_ros.data.readers.opening import KINDS, open_demonstrations
from decoupled_policy_ros.data.readers.streaming import stream_columns
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.fingerprint import Fingerprint

BLOCK_FRAMES = 65_536

Poses = Literal['achieved', 'commanded']


@dataclass(frozen=True, eq=False)
class MotionBlock:
    """Frames of one or more motions, one after the other; a motion may go on in the next block.

    Attributes:
        joints: (T, arm joints + 1), rad and the gripper in [-1 open, +1 closed].
        actions: (T, 10).
        first: (T,), true where a motion begins.
        rate_hz: frames per second.
    """

    joints: NDArray[np.floating]
    actions: NDArray[np.floating]
    first: NDArray[np.bool_]
    rate_hz: float

    def __len__(self) -> int:
        return len(self.first)


class CoverageSource(Protocol):
    """Where blocks come from."""

    path: Path

    def blocks(self) -> Iterator[MotionBlock]: ...


def open_source(
    path: str | Path, robot: RobotDescription, rate_hz: float, poses: Poses = 'achieved', **options: Any
) -> CoverageSource:
    """Open a folder of motion files, one motion file, or a dataset of any kind that can be read.

    Args:
        path: where it is.
        robot: the arm that it must be about.
        rate_hz: rate at which recordings are resampled; a dataset has its own.
        poses: of a dataset, the poses that the arm had, or those that it was told to go to. A recording knows
            only the former.
        options: of `open_demonstrations`: mapping, filter_key, every.

    Raises:
        DatasetError: nothing there, none of these, or an option that recordings have no use for.
        FingerprintMismatch: it is about another arm.
    """
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        raise DatasetError(f'{path} is an empty folder; valid: {KINDS}')
    is_dataset = (path / INFO_PATH).is_file()
    if not is_dataset and (path.suffix == SUFFIX or any(path.rglob(f'*{SUFFIX}'))) and path.exists():
        useless = [f'{name} {value!r}' for name, value in options.items() if value not in (None, 1)]
        if useless:
            raise DatasetError(
                f'{path} has recordings of motion, and {", ".join(useless)} is for datasets; leave it out'
            )
        return RecordingSource(path, robot, rate_hz)
    return DatasetSource(path, robot, poses, options)


class RecordingSource:
    """Motion files, one in memory at a time, at a fixed rate."""

    def __init__(self, path: Path, robot: RobotDescription, rate_hz: float):
        self.path = path
        self._files = sorted(path.rglob(f'*{SUFFIX}')) if path.is_dir() else [path]
        self._robot, self._rate_hz = robot, rate_hz
        self._fingerprint = Fingerprint.of(robot, rate_hz)

    def blocks(self) -> Iterator[MotionBlock]:
        """Blocks of at most BLOCK_FRAMES.

        Raises:
            DatasetError: a file can't be read, or no motion is dense enough for the rate.
            FingerprintMismatch: a file is about another arm.
        """
        used = 0
        for file in self._files:
            (motion,) = read_motions(file)
            replace(motion.fingerprint, rate_hz=self._rate_hz).require_equal(
                self._fingerprint, what=str(file), other_what=f'robot {self._robot.name!r}'
            )
            for piece in resample(motion, self._rate_hz):
                used += len(piece)
                first = np.arange(len(piece)) == 0
                yield from _cut(piece.joint_positions, piece.actions, first, self._rate_hz)
        if not used:
            raise DatasetError(
                f'no motion in {self.path} can be used at {self._rate_hz:g} Hz: {len(self._files)} files, none with '
                f'{1 / self._rate_hz:.3g} s in which no two samples are more than {MAX_GAP_S} s apart'
            )


class DatasetSource:
    """The episodes of a dataset of any kind, read from end to end."""

    def __init__(self, path: Path, robot: RobotDescription, poses: Poses, options: Mapping[str, Any]):
        self.path = path
        self._demonstrations = open_demonstrations(path, robot, **options)
        self._robot = robot
        self._poses = POSE if poses == 'achieved' else ACTION
        self._demonstrations.fingerprint.require_equal(
            Fingerprint.of(robot, self._demonstrations.rate_hz),
            what=f'dataset {path}',
            other_what=f'robot {robot.name!r}',
        )

    def blocks(self) -> Iterator[MotionBlock]:
        """Blocks of at most BLOCK_FRAMES; only two columns of the files are read.

        Raises:
            DatasetError: a data file is missing or damaged, or there is no such column.
        """
        waiting: list[Rows] = []
        n_waiting = 0
        for rows in stream_columns(self._demonstrations, [JOINTS, self._poses]):
            waiting.append(rows)
            n_waiting += len(rows[JOINTS])
            if n_waiting >= BLOCK_FRAMES:
                yield from self._blocks(waiting)
                waiting, n_waiting = [], 0
        if waiting:
            yield from self._blocks(waiting)

    def _blocks(self, episodes: list[Rows]) -> Iterator[MotionBlock]:
        positions, actions = (
            np.concatenate([rows[name] for rows in episodes]) for name in (JOINTS, self._poses)
        )
        arm = len(self._robot.joint_names)
        gripper = self._robot.gripper.normalised(positions[:, arm:])
        joints = np.concatenate([positions[:, :arm], gripper[:, None]], -1)
        first = np.zeros(len(joints), bool)
        first[np.cumsum([0, *(len(rows[JOINTS]) for rows in episodes[:-1])])] = True
        yield from _cut(joints, actions, first, self._demonstrations.rate_hz)


def _cut(
    joints: NDArray[np.floating],
    actions: NDArray[np.floating],
    first: NDArray[np.bool_],
    rate_hz: float,
) -> Iterator[MotionBlock]:
    for start in range(0, len(first), BLOCK_FRAMES):
        rows = slice(start, start + BLOCK_FRAMES)
        yield MotionBlock(joints[rows], actions[rows], first[rows], rate_hz)
