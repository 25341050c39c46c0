"""One recording to encoded episodes: its frames, cut into pieces at every gap. Runs in any process or machine.

A frame's images wait on disk until their piece is complete, so a recording of hours takes no more memory than one
of seconds (but for some 1.2 kB of joints and actions a frame).
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.data.bags.reader import Bag
from decoupled_policy_ros.data.conversion.histograms import AgeHistograms
from decoupled_policy_ros.data.conversion.streams import Frame, Gap, Resampler
from decoupled_policy_ros.data.datasets.episode import encode_episode
from decoupled_policy_ros.data.datasets.lerobot_layout import IMAGE_PREFIX
from decoupled_policy_ros.data.datasets.spec import DatasetSpec
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.observation.contract import ObservationContract
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.kinematics import Kinematics

RESULT_FILE = 'bag.json'
PROGRESS_FILE = 'progress.json'
PROGRESS_PERIOD_S = 1.0
GAPS_LISTED = 50

#: An arm that moves and turns less than this, and whose gripper does too, stands still.
IDLE_M, IDLE_RAD, IDLE_GRIPPER = 2e-3, 0.01, 0.02


@dataclass(frozen=True)
class BagTask:
    """All that a process needs to know to convert one recording; picklable.

    Attributes:
        bag: the recording.
        folder: where its encoded episodes go; appears when they are complete.
        robot: name or file of the robot.
        robot_xml: its URDF, where the recording brings it along.
        contract: streams, rate and limits.
        spec: of the dataset; says which actions and images.
        on_gap: 'cut' or 'refuse'.
        min_frames: shorter pieces are left out.
        max_command_age_s: longest time that a command is in force.
        trim_idle: leave out the arm's standing still at both ends of a piece.
        namespace: of the robot's topics in the recording.
    """

    bag: Path
    folder: Path
    robot: str
    robot_xml: str | None
    contract: ObservationContract
    spec: DatasetSpec
    on_gap: str
    min_frames: int
    max_command_age_s: float
    trim_idle: bool
    namespace: str


def convert_bag(task: BagTask) -> dict[str, Any]:
    """Convert one recording into `task.folder`, and return what is in its bag.json.

    Raises:
        DatasetError: the recording can't be read or lacks something, has a gap where gaps are refused, or the
            disk is full. Then nothing is left.
        FingerprintMismatch: the task's robot is not that of its dataset.
    """
    partial = task.folder.with_name(f'{task.folder.name}.part-{uuid.uuid4().hex[:8]}')
    parts = f'{glob.escape(task.folder.name)}.part-*'
    for left in task.folder.parent.glob(parts):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with Bag(task.bag) as bag:
            result = _Conversion(task, bag, partial).run()
        write_json(partial / RESULT_FILE, result)
        if task.folder.exists():  # from a process that was killed before it could say so
            shutil.rmtree(task.folder)
        os.rename(partial, task.folder)
    except OSError as error:
        raise DatasetError(f'{partial} can not be written: {error}') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


class _Conversion:
    """The state of one conversion."""

    def __init__(self, task: BagTask, bag: Bag, folder: Path):
        self.task, self.bag, self.folder = task, bag, folder
        self.robot = load_robot(task.robot, task.robot_xml)
        self.kinematics = Kinematics(self.robot)
        fingerprint = Fingerprint.of(self.robot, task.spec.rate_hz)
        fingerprint.require_equal(task.spec.fingerprint, f'{task.bag} with robot {task.robot}', 'the dataset')
        self.cameras = [name for name, _ in task.spec.cameras]
        self.resampler = Resampler(
            bag,
            self.robot,
            task.contract,
            task.spec.action == 'commanded',
            task.max_command_age_s,
            task.namespace,
        )
        self.histograms = AgeHistograms(task.contract)
        self.cut: Counter[str] = Counter()
        self.gaps: list[dict[str, Any]] = []
        self.pieces: list[dict[str, Any]] = []
        self.piece = _Piece(folder, self.cameras)
        self.gap: Gap | None = None  # since the last frame
        self.measured_gripper = 0
        self.reported = 0.0

    def run(self) -> dict[str, Any]:
        """Read, cut, encode; returns the record."""
        started = time.monotonic()
        try:
            for message in self.bag.messages(self.resampler.intake.topics):
                self.resampler.take(message)
                self._take(self.resampler.ready())
                self._report_progress(message.log_ns)
            self._take(self.resampler.finish())
            self._end_piece()
        finally:
            self.piece.discard()
        (self.folder / PROGRESS_FILE).unlink(missing_ok=True)
        kept = sum(piece['frames'] for piece in self.pieces)
        return {
            'bag': str(self.task.bag),
            'bag_s': self.bag.duration_s,
            'bag_bytes': size_bytes(self.task.bag),
            'wall_s': time.monotonic() - started,
            'frames': kept,
            'cut': dict(self.cut),
            'pieces': self.pieces,
            'gaps': self.gaps,
            'measured_gripper_frames': self.measured_gripper,
            'topics': {topic: count.to_dict() for topic, count in self.resampler.intake.counts.items()},
            'histograms': self.histograms.to_dict(),
        }

    def _take(self, results: Iterator[Frame | Gap]) -> None:
        for result in results:
            if isinstance(result, Gap):
                self._take_gap(result)
            else:
                if self.gap is not None and self.pieces_or_frames:
                    self._refuse(self.gap)
                self.gap = None
                self.piece.add(result)

    @property
    def pieces_or_frames(self) -> bool:
        """Whether a frame came before."""
        return bool(self.pieces or self.piece.frames or self.cut['short piece'])

    def _take_gap(self, gap: Gap) -> None:
        self.cut[gap.reason] += gap.frames
        if len(self.gaps) < GAPS_LISTED and (self.gap is None or self.gap.reason != gap.reason):
            self.gaps.append({'stamp_ns': gap.stamp_ns, 'reason': gap.reason, 'detail': gap.detail})
        if gap.reason.endswith('stopped') and not gap.at_start:
            self._refuse(gap)
        self.gap = self.gap or gap
        self._end_piece()

    def _refuse(self, gap: Gap) -> None:
        if self.task.on_gap == 'refuse':
            raise DatasetError(
                f'{self.task.bag}: no frame at {gap.stamp_ns} ns: {gap.detail}; a gap like this is cut out with '
                f'--on-gap cut'
            )

    def _end_piece(self) -> None:
        """Encode what has come since the last gap, or count it as too short."""
        piece = self.piece
        if not piece.frames:
            return
        spec, n = self.task.spec, len(piece.frames)
        rows = slice(0, n)
        if spec.action == 'achieved':
            rows = slice(0, n - 1)
            self.cut['no next pose'] += 1
        columns = self._columns(piece.frames)
        if self.task.trim_idle:
            moving = _moving_rows(columns, rows)
            self.cut['idle'] += rows.stop - rows.start - (moving.stop - moving.start)
            rows = moving
        length = rows.stop - rows.start
        if length < max(self.task.min_frames, 1):
            self.cut['short piece'] += length
        else:
            self._encode(piece, columns, rows)
        piece.discard()
        self.piece = _Piece(self.folder, self.cameras)

    def _encode(self, piece: _Piece, columns: dict[str, NDArray[Any]], rows: slice) -> None:
        kept = piece.frames[rows]
        frames: dict[str, Any] = {name: values[rows] for name, values in columns.items()}
        for camera, (height, width) in self.task.spec.cameras:
            frames[IMAGE_PREFIX + camera] = piece.images(camera, (height, width, 3), rows)
        name = f'piece_{len(self.pieces):03d}'
        encode_episode(self.task.spec, frames, self.folder / name)
        self.histograms.add([frame.ages_s for frame in kept])
        self.measured_gripper += sum(frame.gripper is None for frame in kept)
        stamps = {'start_ns': kept[0].stamp_ns, 'end_ns': kept[-1].stamp_ns}
        self.pieces.append({'folder': name, 'frames': len(kept), **stamps})

    def _columns(self, frames: list[_Row]) -> dict[str, NDArray[Any]]:
        """Vectors (T, dim) of a piece; the action of a frame is the command in force, or what came next."""
        robot, spec = self.robot, self.task.spec
        joints = np.stack([frame.joint_positions for frame in frames])
        pose = self.kinematics.forward_many(joints[:, : len(robot.joint_names)])
        measured = robot.gripper.normalised(joints[:, len(robot.joint_names) :])
        following = np.minimum(np.arange(len(frames)) + 1, len(frames) - 1)
        gripper = measured[following]  # where nobody commanded it, whatever the poses are
        target = pose[following]
        if spec.action == 'commanded':
            target = np.stack([frame.target for frame in frames])  # type: ignore[misc]
        if spec.gripper_source == 'commanded':
            pairs = zip(frames, gripper, strict=True)
            gripper = np.array([m if frame.gripper is None else frame.gripper for frame, m in pairs])
        return {
            'observation.joint_positions': joints,
            'observation.proprioception': np.stack([frame.proprioception for frame in frames]),
            'observation.pose': poses.action_from_pose(pose, measured),
            'action': poses.action_from_pose(target, gripper),
        }

    def _report_progress(self, log_ns: int) -> None:
        now = time.monotonic()
        if now - self.reported >= PROGRESS_PERIOD_S:
            self.reported = now
            done_s = (log_ns - self.bag.start_ns) * 1e-9
            frames = sum(piece['frames'] for piece in self.pieces) + len(self.piece.frames)
            progress = json.dumps({'bag_s': done_s, 'frames': frames})
            (self.folder / PROGRESS_FILE).write_text(
                progress
            )  # not by write_json: it need not reach the disk


@dataclass(frozen=True, eq=False)
class _Row:
    """What is kept of a frame in memory."""

    stamp_ns: int
    ages_s: dict[str, float]
    joint_positions: NDArray[np.float64]
    proprioception: NDArray[np.float32]
    target: NDArray[np.float64] | None
    gripper: float | None


@dataclass
class _Piece:
    """Frames since the last gap; their images are in one file per camera, one after the other."""

    folder: Path
    cameras: list[str]
    frames: list[_Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._files = {camera: (self.folder / f'.{camera}.raw').open('wb') for camera in self.cameras}

    def add(self, frame: Frame) -> None:
        """Append a frame."""
        arrays = frame.observation.arrays
        for camera, file in self._files.items():
            file.write(np.ascontiguousarray(arrays[camera][0]).data)
        proprioception = next(a[0] for name, a in arrays.items() if name not in self._files)
        ages_s = frame.observation.ages_s
        joints = np.array(frame.joint_positions)
        self.frames.append(_Row(frame.stamp_ns, ages_s, joints, proprioception, frame.target, frame.gripper))

    def images(self, camera: str, shape: tuple[int, int, int], rows: slice) -> Iterator[NDArray[np.uint8]]:
        """Images of these rows, one by one."""
        self._files[camera].flush()
        size = int(np.prod(shape))
        with open(self._files[camera].name, 'rb') as file:
            file.seek(rows.start * size)
            for _ in range(rows.start, rows.stop):
                yield np.frombuffer(file.read(size), np.uint8).reshape(shape)

    def discard(self) -> None:
        """Remove the files."""
        for file in self._files.values():
            file.close()
            Path(file.name).unlink(missing_ok=True)


def _moving_rows(columns: dict[str, NDArray[Any]], rows: slice) -> slice:
    """The rows between the arm's first and last movement, in pose or gripper."""
    values = np.concatenate([columns['observation.pose'], columns['action'][:, poses.GRIPPER :]], -1)[rows]
    limits = np.array([*[IDLE_M] * 3, *[IDLE_RAD] * 6, IDLE_GRIPPER, IDLE_GRIPPER])
    begun = np.flatnonzero((np.abs(values - values[:1]) > limits).any(-1))
    ended = np.flatnonzero((np.abs(values - values[-1:]) > limits).any(-1))
    if not len(begun):
        return slice(rows.start, rows.start)
    return slice(rows.start + max(int(begun[0]) - 1, 0), rows.start + min(int(ended[-1]) + 2, len(values)))


def size_bytes(bag: Path) -> int:
    """Size of a recording's files."""
    files = [path for path in bag.rglob('*') if path.is_file()] if bag.is_dir() else [bag]
    return sum(path.stat().st_size for path in files)
