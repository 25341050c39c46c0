"""What training reads: Stage 1 windows of motion, Stage 2 windows of demonstrations, as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoupled_policy_ros.data.dataset import Dataset
from decoupled_policy_ros.data.motions import (
    MAX_GAP_S,
    Motion,
    demonstration_motions,
    read_motions,
    resample,
    synth_motions,
)
from decoupled_policy_ros.data.windows import window_indices
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.training.config import MotionSource, Stage1Config, Stage2Config


@dataclass
class MotionWindows:
    """Aligned windows of joints and poses.

    Attributes:
        joints: (F, 8) arm joints in rad and the gripper in [-1, 1].
        actions: (F, 10) end-effector poses.
        index: (N, horizon) frames of each window, clamped at the ends of a motion.
    """

    joints: NDArray[np.float32]
    actions: NDArray[np.float32]
    index: NDArray[np.int64]


def load_motion_windows(config: Stage1Config, robot: RobotDescription) -> tuple[MotionWindows, list[dict]]:
    """All windows of a Stage 1 configuration, and what they came from.

    Raises:
        DatasetError: a source is empty, or its samples are too far apart.
        FingerprintMismatch: a source's kinematics differ from the robot's.
    """
    motions, provenance = [], []
    for source in config.sources:
        found = _motions_of(source, robot, config)
        motions += found
        frames = sum(len(motion.actions) for motion in found)
        provenance.append(
            {**source.model_dump(exclude_none=True, mode='json'), 'motions': len(found), 'frames': frames}
        )
    joints = np.concatenate([motion.joint_positions for motion in motions]).astype(np.float32)
    actions = np.concatenate([motion.actions for motion in motions]).astype(np.float32)
    lengths = [len(motion.actions) for motion in motions]
    _, index, _ = window_indices(lengths, config.backbone.horizon, 1)
    return MotionWindows(joints, actions, index), provenance


def _motions_of(source: MotionSource, robot: RobotDescription, config: Stage1Config) -> list[Motion]:
    if source.synthetic is not None:
        return synth_motions(robot, source.synthetic, config.optimisation.seed, config.rate_hz)
    if source.demonstrations is not None:
        motions = list(demonstration_motions(Dataset.open(source.demonstrations), robot))
    else:
        assert source.recorded is not None  # a source has exactly one of the three
        motions = _recorded_motions(source.recorded, config.rate_hz)
    expected = Fingerprint.of(robot, config.rate_hz)
    for motion in motions:
        motion.fingerprint.require_equal(
            expected,
            what=str(source.recorded or source.demonstrations),
            other_what=f'robot {robot.name!r} at {config.rate_hz} Hz',
        )
    return motions


def _recorded_motions(folder: Path, rate_hz: float) -> list[Motion]:
    recorded = read_motions(folder)
    pieces = [piece for motion in recorded for piece in resample(motion, rate_hz)]
    if not pieces:
        gaps_s = np.concatenate([np.diff(motion.stamps_ns) for motion in recorded]) / 1e9
        between = f'their samples are {np.median(gaps_s):.3g} s apart' if len(gaps_s) else 'single samples'
        raise DatasetError(
            f'no motion in {folder} can be used at {rate_hz:g} Hz: {len(recorded)} recorded, {between}; needed are '
            f'pieces of at least {1 / rate_hz:.3g} s in which no two samples are more than {MAX_GAP_S} s apart'
        )
    return pieces


@dataclass
class DemonstrationWindows:
    """Demonstrations in memory, with the windows in which a policy is trained.

    Attributes:
        streams: name -> (F, ...) tensor; images uint8, vectors float32.
        actions: (F, 10) float32, commanded.
        observation_index: (N, n_obs_steps); action_index: (N, horizon), from the first observation frame on.
    """

    streams: dict[str, Tensor]
    actions: Tensor
    observation_index: Tensor
    action_index: Tensor
    instruction: str
    provenance: dict


def load_demonstrations(
    config: Stage2Config, horizon: int, robot: RobotDescription, rate_hz: float
) -> DemonstrationWindows:
    """Read the dataset of a Stage 2 configuration.

    Raises:
        DatasetError: no dataset, a camera or column that it lacks, or several instructions.
        FingerprintMismatch: its kinematics or rate are not the robot's.
    """
    dataset = Dataset.open(config.dataset)
    dataset.fingerprint.require_equal(
        Fingerprint.of(robot, rate_hz), what=f'dataset {config.dataset}', other_what=f'robot {robot.name!r}'
    )
    if len(dataset.tasks) != 1 and config.instruction is None:
        raise DatasetError(
            f'{config.dataset} holds the instructions {dataset.tasks}; one policy has one instruction'
        )
    n = min(config.episodes or dataset.n_episodes, dataset.n_episodes)
    frames = int(dataset.lengths[:n].sum())
    streams = {name: torch.from_numpy(dataset.images(name)[:frames]) for name in config.cameras}
    for name in config.vectors:
        streams[name] = torch.from_numpy(dataset.column(f'observation.{name}')[:frames].astype(np.float32))
    observation_index, action_index, _ = window_indices(dataset.lengths[:n], horizon, config.n_obs_steps)
    return DemonstrationWindows(
        streams,
        torch.from_numpy(dataset.column('action')[:frames].astype(np.float32)),
        torch.from_numpy(observation_index),
        torch.from_numpy(action_index),
        config.instruction or dataset.tasks[0],
        {'dataset': config.dataset.name, 'episodes': n, 'frames': frames},
    )


def contract_of(config: Stage2Config, streams: dict[str, Tensor], rate_hz: float) -> ObservationContract:
    """The observation contract that these demonstrations imply: what the policy must see when it runs."""

    def spec(name: str) -> StreamSpec:
        kind = (
            'image' if name in config.cameras else 'proprioception' if name == 'proprioception' else 'vector'
        )
        return StreamSpec(name, kind, tuple(streams[name].shape[1:]), config.max_age_s)

    return ObservationContract(
        rate_hz, config.n_obs_steps, tuple(spec(name) for name in streams), config.max_skew_s
    )
