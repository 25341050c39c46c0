"""What training reads: Stage 1 windows of motion, Stage 2 windows of demonstrations, as tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoupled_policy_ros.data.datasets.dataset import label_counts
from decoupled_policy_ros.data.datasets.windows import Windows
from decoupled_policy_ros.data.motions.motions import (
    MAX_GAP_S,
    Motion,
    demonstration_motions,
    iterate_motions,
    resample,
    resampled_lengths,
    synth_motions,
)
from decoupled_policy_ros.data.readers.interface import Demonstrations
from decoupled_policy_ros.data.readers.opening import open_demonstrations
from decoupled_policy_ros.data.readers.views import in_one, labels_of, only_successful
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.robot.description import RobotDescription, load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.robot.poses import ACTION_DIM
from decoupled_policy_ros.training.config import MotionSource, Stage1Config, Stage2Config
from decoupled_policy_ros.training.memory import require_memory


@dataclass
class MotionWindows:
    """Aligned windows of joints and poses.

    Attributes:
        joints: (F, J) arm joints in rad and the gripper in [-1, 1], 8 columns for an arm of 7 joints. Where motion is
            of several arms, each has columns of its own, which are zero in the motion of the others.
        actions: (F, 10) end-effector poses.
        windows: one for each frame, clamped at the ends of a motion.
        shares: (S, 3) first window, end and weight of each source; None where all windows are drawn alike.
    """

    joints: NDArray[np.float32]
    actions: NDArray[np.float32]
    windows: Windows
    shares: Tensor | None = None

    def draw(self, batch_size: int) -> Tensor:
        """Frames (batch_size, horizon) of windows drawn at random."""
        if self.shares is None:
            batch = torch.randint(len(self.windows), (batch_size,))
        else:
            first, end, weight = self.shares.T
            source = torch.multinomial(weight * (end - first), batch_size, replacement=True)
            place = torch.rand(batch_size, dtype=torch.float64) * (end - first)[source]
            batch = (first[source] + place.floor()).long()
        return torch.from_numpy(self.windows.actions(batch.numpy()))


@dataclass(frozen=True)
class _Motions:
    """Motions of one source: whose they are, and how long each is, known before they are read."""

    source: MotionSource
    arm: Fingerprint
    lengths: NDArray[np.int64]
    motions: Iterable[Motion]
    notes: dict[str, object]


def load_motion_windows(config: Stage1Config, robot: RobotDescription) -> tuple[MotionWindows, list[dict]]:
    """All windows of a Stage 1 configuration, and what they came from.

    Poses of another arm's motion are taken as they are, each in the base frame of the arm that moved: what the target
    arm will be commanded is a pose of its tool, whatever joints it takes.

    Joints and poses of all sources stand in memory once, 72 bytes a frame of 7 joints; nothing else grows with them.

    Raises:
        DatasetError: a source is empty, or its samples are too far apart.
        FingerprintMismatch: a source's kinematics differ from those of the arm that it is said to be of.
    """
    sources = [_motions_of(source, _arm_of(source, robot), config) for source in config.sources]
    frames = [int(source.lengths.sum()) for source in sources]
    columns, width = _joint_columns([source.arm for source in sources])
    joints = np.zeros((sum(frames), width), np.float32)
    actions = np.empty((sum(frames), ACTION_DIM), np.float32)
    first = 0
    for source in sources:
        for motion in source.motions:
            rows = slice(first, first + len(motion))
            joints[rows, columns[source.arm]], actions[rows] = motion.joint_positions, motion.actions
            first = rows.stop
    own = Fingerprint.of(robot, config.rate_hz)
    provenance = [
        {
            **s.source.model_dump(exclude_none=True, mode='json'),
            'motions': len(s.lengths),
            'frames': n,
            **({} if s.arm == own else {'fingerprint': s.arm.to_dict()}),
            **s.notes,
        }
        for s, n in zip(sources, frames, strict=True)
    ]
    windows = Windows(np.concatenate([source.lengths for source in sources]), config.backbone.horizon, 1)
    return MotionWindows(joints, actions, windows, _shares(config.sources, frames)), provenance


def _arm_of(source: MotionSource, robot: RobotDescription) -> RobotDescription:
    return robot if source.robot is None else load_robot(source.robot)


def _joint_columns(arms: list[Fingerprint]) -> tuple[dict[Fingerprint, slice], int]:
    """Each arm's columns, and how many there are: two arms in the same ones would be taken for one another."""
    columns: dict[Fingerprint, slice] = {}
    width = 0
    for arm in dict.fromkeys(arms):
        columns[arm] = slice(width, width := width + len(arm.joint_names) + 1)
    return columns, width


def _shares(sources: list[MotionSource], frames: list[int]) -> Tensor | None:
    if all(source.weight is None for source in sources):
        return None
    ends = np.cumsum(frames)
    weights = [source.weight or 1.0 for source in sources]
    return torch.from_numpy(np.stack([ends - frames, ends, weights], -1).astype(np.float64))


def _motions_of(source: MotionSource, robot: RobotDescription, config: Stage1Config) -> _Motions:
    rate_hz = config.rate_hz
    arm = Fingerprint.of(robot, rate_hz)
    if source.demonstrations is not None:
        return _demonstrated_motions(source, source.demonstrations, robot, arm)
    if source.synthetic is not None:
        motions = synth_motions(robot, source.synthetic, config.optimisation.seed, rate_hz)
    else:
        assert source.recorded is not None  # a source has exactly one of the three
        motions = _recorded_motions(source.recorded, rate_hz)
        for motion in motions:
            motion.fingerprint.require_equal(
                arm,
                what=str(source.recorded),
                other_what=f'robot {robot.name!r} at {rate_hz} Hz',
            )
    return _Motions(source, arm, np.array([len(motion) for motion in motions], np.int64), motions, {})


def _demonstrated_motions(
    source: MotionSource, path: Path, robot: RobotDescription, arm: Fingerprint
) -> _Motions:
    rate_hz = arm.rate_hz
    dataset = open_demonstrations(path, robot, source.mapping, source.filter_key, recorded_hz=rate_hz)
    lengths = resampled_lengths(dataset.lengths, dataset.rate_hz, rate_hz)
    notes: dict[str, object] = {}
    if dataset.rate_hz != rate_hz:
        notes = {
            'rate_hz': dataset.rate_hz,
            'resampled': f'joints interpolated to {rate_hz:g} Hz, poses by FK',
        }
    return _Motions(source, arm, lengths, demonstration_motions(dataset, robot, rate_hz), notes)


def _recorded_motions(folder: Path, rate_hz: float) -> list[Motion]:
    pieces: list[Motion] = []
    gaps_s = []
    for motion in iterate_motions(folder):
        pieces += resample(motion, rate_hz)
        gaps_s.append(np.median(np.diff(motion.stamps_ns)) / 1e9 if len(motion) > 1 else np.nan)
    if not pieces:
        apart_s = np.nanmedian(gaps_s) if np.any(np.isfinite(gaps_s)) else None
        between = f'their samples are {apart_s:.3g} s apart' if apart_s is not None else 'single samples'
        raise DatasetError(
            f'no motion in {folder} can be used at {rate_hz:g} Hz: {len(gaps_s)} recorded, {between}; needed are '
            f'pieces of at least {1 / rate_hz:.3g} s in which no two samples are more than {MAX_GAP_S} s apart'
        )
    return pieces


@dataclass
class DemonstrationWindows:
    """Demonstrations in memory, with the windows in which a policy is trained.

    Attributes:
        streams: name -> (F, ...) tensor; images uint8, vectors float32.
        actions: (F, 10) float32, commanded.
        windows: one for each frame; a chunk starts with the first observation frame.
        instructions: of all episodes, each once.
        instruction_of: (E,) the place in `instructions` of each episode's own.
    """

    streams: dict[str, Tensor]
    actions: Tensor
    windows: Windows
    instructions: list[str]
    instruction_of: NDArray[np.int64]
    provenance: dict
    held_out: list[int] = field(default_factory=list)
    training_windows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def episodes_sha256(self) -> str:
        """Hash of where episodes end and what was said in each, which rows of streams and actions don't show."""
        ends = self.windows.ends.tolist()
        text = json.dumps([ends, self.instructions, self.instruction_of.tolist()])
        return hashlib.sha256(text.encode()).hexdigest()

    def draw(self, batch_size: int) -> Tensor:
        """Numbers of windows (batch_size,), at random from the episodes that are not held out."""
        if not self.held_out:
            return torch.randint(len(self.windows), (batch_size,))
        return self.training_windows[torch.randint(len(self.training_windows), (batch_size,))]

    def at(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames of observations (B, n_obs_steps) and of actions (B, horizon) of windows (B,), and which instruction
        each of them belongs to (B,).
        """
        numbers = batch.numpy()
        frames = self.windows.observations(numbers), self.windows.actions(numbers)
        instructions = self.instruction_of[self.windows.episodes(numbers)]
        return torch.from_numpy(frames[0]), torch.from_numpy(frames[1]), torch.from_numpy(instructions)

    def hold_out(self, share: float) -> Tensor:
        """Take this share of the episodes, evenly from all, out of what is drawn; returns their windows.

        Raises:
            DatasetError: no episode would be left to train on.
        """
        episodes = self.windows.episodes(np.arange(len(self.windows)))
        total = int(episodes[-1]) + 1
        count = max(1, round(share * total))
        if count >= total:
            raise DatasetError(
                f'validation.held_out {share} takes all {total} episodes; leave some to train on'
            )
        self.held_out = ((np.arange(count) + 0.5) * total / count).astype(int).tolist()
        held = np.isin(episodes, self.held_out)
        self.training_windows = torch.from_numpy(np.flatnonzero(~held))
        return torch.from_numpy(np.flatnonzero(held))


def open_dataset(config: Stage2Config, robot: RobotDescription) -> Demonstrations:
    """The dataset of a Stage 2 configuration, whoever wrote it.

    Raises:
        DatasetError: none there, its numbers are not of this arm, or only successful episodes are asked for where
            none is known.
    """
    found = open_demonstrations(config.dataset, robot, config.mapping, config.filter_key, config.every)
    return only_successful(found) if config.only_successful else found


def load_demonstrations(
    config: Stage2Config, horizon: int, robot: RobotDescription, rate_hz: float
) -> DemonstrationWindows:
    """Read the dataset of a Stage 2 configuration.

    Raises:
        DatasetError: no dataset, a camera or column that it lacks, more pictures than memory holds, or several
            instructions for one policy without language; or it has of a rotation the quaternion on the other side
            than this robot's home.
        FingerprintMismatch: its kinematics or rate are not the robot's.
    """
    dataset = open_dataset(config, robot)
    dataset.fingerprint.require_equal(
        Fingerprint.of(robot, rate_hz), what=f'dataset {config.dataset}', other_what=f'robot {robot.name!r}'
    )
    n = min(config.episodes or dataset.n_episodes, dataset.n_episodes)
    instruction = (config.instruction or '').strip()
    said = [instruction or dataset.task_of(episode).strip() for episode in range(n)]
    instructions = list(dict.fromkeys(said))
    if len(instructions) != 1 and config.language is None:
        raise DatasetError(
            f'{config.dataset} holds the instructions {instructions}; one policy has one instruction: set '
            f'`language` for a policy that tells them apart, or `instruction` to train all of them under that one, '
            f'or convert with --instruction, or apart'
        )
    frames = int(dataset.lengths[:n].sum())
    theirs = config.cameras if isinstance(config.cameras, dict) else {name: name for name in config.cameras}
    require_memory(dataset, frames, theirs.values(), config.image_size)
    streams = {
        name: torch.from_numpy(_images(dataset, camera, n, config.image_size))
        for name, camera in theirs.items()
    }
    for name in config.vectors:
        streams[name] = torch.from_numpy(dataset.column(f'observation.{name}')[:frames].astype(np.float32))
    if 'proprioception' in streams:
        _require_near_home(streams['proprioception'].numpy(), robot, config.dataset)
    return DemonstrationWindows(
        streams,
        torch.from_numpy(dataset.column('action')[:frames].astype(np.float32)),
        Windows(dataset.lengths[:n], horizon, config.n_obs_steps),
        instructions,
        np.array([instructions.index(text) for text in said], np.int64),
        {'dataset': config.dataset.name, 'episodes': n, 'frames': frames} | _labels(dataset, n),
    )


def _require_near_home(proprioception: NDArray[np.float32], robot: RobotDescription, path: Path) -> None:
    near_quat_xyzw = Proprioception(robot, Kinematics(robot)).near_quat_xyzw
    far = np.flatnonzero(
        proprioception[:, 3:7] @ near_quat_xyzw < -1e-6
    )  # those half a turn away lie on both sides
    if len(far):
        raise DatasetError(
            f'{path}: in {len(far)} of {len(proprioception)} frames, the first is {far[0]}, the quaternion is the one '
            f'farther from that of home_rad of robot {robot.name!r}: it was written with another home_rad; put that '
            f'back, or write the dataset anew'
        )


def _labels(dataset: Demonstrations, n: int) -> dict[str, dict[str, int]]:
    """For the provenance: how many of the first n episodes have which label, where there are labels."""
    labels = labels_of(dataset)
    return {} if labels is None else {'labels': label_counts(labels[:n])}


def _images(dataset: Demonstrations, camera: str, n: int, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Pictures (F, H, W, 3) of the first n episodes; those of the others are not read."""
    if n == dataset.n_episodes:
        return dataset.images(camera, None, size)
    parts = (dataset.images(camera, episode, size) for episode in range(n))
    return in_one(parts, int(dataset.lengths[:n].sum()))
