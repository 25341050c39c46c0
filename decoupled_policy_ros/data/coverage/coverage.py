"""What a Stage 1 source covers: where the arm was, how it was turned, how fast it moved, and in which directions.

A backbone can only command what its motions taught it: a task's positions are scaled by Stage 1's range and
clipped to it, and what lies inside the range but far from every motion is a guess. So the motions are measured
before hours of training are spent on them.

Frames are counted one by one; speeds and directions between a frame and the one before it in the same motion.
All of it is a stream: memory doesn't grow with the number of frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.data.coverage.bins import (
    Array,
    Histogram,
    RotationCells,
    SphereBins,
    Thinned,
    VoxelGrid,
)
from decoupled_policy_ros.data.coverage.sources import CoverageSource, MotionBlock, open_source
from decoupled_policy_ros.data.motions.recorder import MotionSettings
from decoupled_policy_ros.errors import ConfigError, DatasetError
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.robot.poses import GRIPPER, POSITION, ROTATION, rotation_from_rot6d

Progress = Callable[[int], None]

JOINT_BINS, POSITION_BINS, SPEED_BINS, TILT_BINS, GRIPPER_BINS = 60, 100, 240, 36, 40
SPEED_RANGE = 1.2  # of the limit: what lies beyond is still seen, as `above`
OPEN_BELOW, CLOSED_ABOVE = (
    -0.9,
    0.9,
)  # gripper values; in between it holds something, or was told to stop there
STILL_M_S = 0.005  # an end effector slower than this has no direction
_SMALLEST_AREA = 1e-6  # of the parallelogram that two columns of a rotation span, which should be 1
_REACH_BATCH = 50_000
_NEW_VOXELS = 0.002  # a batch of samples that adds a smaller share than this ends the search


@dataclass(frozen=True)
class CoverageSettings:
    """How finely to look.

    Attributes:
        voxel_m: edge of a voxel.
        rate_hz: rate at which recordings are resampled; the policy's.
        reach_samples: at most so many joint configurations are drawn to see which voxels can be reached at all.
        points: at most so many positions are kept for pictures and point clouds.
    """

    voxel_m: float = 0.05
    rate_hz: float = 20.0
    reach_samples: int = 1_000_000
    points: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ('voxel_m', 'rate_hz', 'reach_samples', 'points'):
            if not getattr(self, name) > 0:
                raise ConfigError(f'{name} must be positive, got {getattr(self, name)}')


@dataclass
class Shares:
    """Counts of frames by what the gripper and the arm did; the last three need a frame before them."""

    open: int = 0
    closed: int = 0
    between: int = 0
    steps: int = 0
    gripper_moving: int = 0
    idle: int = 0

    def to_dict(self) -> dict[str, float]:
        """Shares in [0, 1]."""
        frames, steps = max(self.open + self.closed + self.between, 1), max(self.steps, 1)
        values = {name: getattr(self, name) / frames for name in ('open', 'closed', 'between')}
        return {**values, 'gripper_moving': self.gripper_moving / steps, 'idle': self.idle / steps}


class Coverage:
    """Coverage of the blocks added so far.

    Args:
        robot: whose limits and workspace everything is measured against.
        settings: how finely.
    """

    def __init__(self, robot: RobotDescription, settings: CoverageSettings | None = None):
        self.robot, self.settings = robot, settings or CoverageSettings()
        limits, box_m = robot.limits, robot.limits.workspace_m
        self.grid = VoxelGrid(box_m, self.settings.voxel_m)
        self.reachable = np.zeros(self.grid.shape, bool)
        self.reach_samples = 0
        self.positions_m = [Histogram(low, high, POSITION_BINS) for low, high in box_m.T]
        ranges = zip(limits.lower_rad, limits.upper_rad, strict=True)
        self.joints_rad = [Histogram(lower, upper, JOINT_BINS) for lower, upper in ranges]
        self.joint_speeds_rad_s = [Histogram(0, SPEED_RANGE * v, SPEED_BINS) for v in limits.velocity_rad_s]
        self.gripper = Histogram(-1, 1, GRIPPER_BINS)
        self.linear_m_s = Histogram(0, SPEED_RANGE * limits.ee_linear_velocity_m_s, SPEED_BINS)
        self.angular_rad_s = Histogram(0, SPEED_RANGE * limits.ee_angular_velocity_rad_s, SPEED_BINS)
        self.directions, self.approaches = SphereBins(), SphereBins()
        self.tilt_deg = Histogram(0, 180, TILT_BINS)
        self.rotations = RotationCells()
        self.shares = Shares()
        self.points = Thinned(self.settings.points, 3)
        self.n_frames, self.n_motions, self.duration_s = 0, 0, 0.0
        self.sources: list[dict[str, Any]] = []
        self._last: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None

    def add(self, block: MotionBlock) -> None:
        """Count a block; one that doesn't begin with a motion's first frame goes on where the last block ended."""
        if not len(block):
            return
        joints, actions = block.joints.astype(float), block.actions.astype(float)
        rotations = rotation_from_rot6d(actions[:, ROTATION])
        self.n_frames += len(block)
        self.n_motions += int(block.first.sum())
        self.duration_s += len(block) / block.rate_hz
        self._add_frames(joints, actions, rotations)
        first = block.first.copy()
        if self._last is not None and not first[0]:
            last_joints, last_actions = self._last
            joints = np.concatenate([last_joints, joints])
            actions = np.concatenate([last_actions, actions])
            rotations = np.concatenate([rotation_from_rot6d(last_actions[:, ROTATION]), rotations])
        else:
            first = first[1:]
        self._last = joints[-1:], actions[-1:]
        steps = np.flatnonzero(~first)
        self._add_steps(
            (joints[steps + 1] - joints[steps]) * block.rate_hz,
            (actions[steps + 1, POSITION] - actions[steps, POSITION]) * block.rate_hz,
            angles_between(rotations[steps], rotations[steps + 1]) * block.rate_hz,
        )

    def _add_frames(self, joints: Array, actions: Array, rotations: Array) -> None:
        positions_m, gripper = actions[:, POSITION], actions[:, GRIPPER]
        self.grid.add(positions_m)
        self.points.add(positions_m)
        for histogram, values in zip(self.positions_m, positions_m.T, strict=True):
            histogram.add(values)
        for histogram, values in zip([*self.joints_rad, self.gripper], joints.T, strict=True):
            histogram.add(values)
        approach = rotations[:, :, 2]
        self.approaches.add(approach)
        self.tilt_deg.add(np.degrees(np.arccos(np.clip(-approach[:, 2], -1, 1))))
        self.rotations.add(rotations)
        self.shares.open += int((gripper < OPEN_BELOW).sum())
        self.shares.closed += int((gripper > CLOSED_ABOVE).sum())
        self.shares.between += int(((gripper >= OPEN_BELOW) & (gripper <= CLOSED_ABOVE)).sum())

    def _add_steps(self, joint_speeds: Array, velocities_m_s: Array, angular_rad_s: Array) -> None:
        """Count steps: joint speeds (N, n + 1), the end effector's velocity (N, 3) and angular speed (N,)."""
        linear_m_s = np.linalg.norm(velocities_m_s, axis=-1)
        self.linear_m_s.add(linear_m_s)
        self.angular_rad_s.add(angular_rad_s)
        speeds = np.abs(joint_speeds)
        for histogram, values in zip(self.joint_speeds_rad_s, speeds.T, strict=False):
            histogram.add(values)
        moving = linear_m_s > STILL_M_S
        self.directions.add(velocities_m_s[moving] / linear_m_s[moving, None])
        gripper_moving = speeds[:, -1] > MotionSettings.idle_gripper_speed
        at_rest = np.all(speeds[:, :-1] <= MotionSettings.idle_speed_rad_s, axis=-1)
        self.shares.steps += len(speeds)
        self.shares.gripper_moving += int(gripper_moving.sum())
        self.shares.idle += int((at_rest & ~gripper_moving).sum())

    def find_reachable(self, progress: Progress = lambda frames: None) -> None:
        """Mark the voxels that some joint configuration inside the limits reaches, as far as samples tell.

        Collisions with the arm itself or the table are not looked at. Sampling ends when a batch finds hardly any
        voxel that those before it had not found. `progress` is called with 0 after each batch: nothing was read.
        """
        limits, kinematics = self.robot.limits, Kinematics(self.robot)
        rng = np.random.default_rng(self.settings.seed)
        found = np.zeros(self.grid.visits.size, bool)
        while self.reach_samples < self.settings.reach_samples:
            n = min(_REACH_BATCH, self.settings.reach_samples - self.reach_samples)
            joints = rng.uniform(limits.lower_rad, limits.upper_rad, (n, len(limits.lower_rad)))
            index = self.grid.index(kinematics.forward_many(joints)[:, :3, 3])
            before = int(found.sum())
            found[index[index >= 0]] = True
            self.reach_samples += n
            progress(0)
            if int(found.sum()) - before < _NEW_VOXELS * before:
                break
        self.reachable = found.reshape(self.grid.shape) | self.visited

    @property
    def visited(self) -> NDArray[np.bool_]:
        """Voxels (the grid's shape) in which the end effector was."""
        return self.grid.visits > 0

    @property
    def position_range_m(self) -> Array:
        """Lowest and highest position of each axis (2, 3): what a backbone can command at all."""
        return np.array([[h.minimum for h in self.positions_m], [h.maximum for h in self.positions_m]])


def angles_between(rotations: Array, others: Array) -> Array:
    """Angles (N,) in rad between rotation matrices (N, 3, 3): |R - R'| = 2 sqrt(2) sin(angle / 2), Frobenius norm.

    Unlike the arc cosine of the trace it is exact for small angles.
    """
    distance = np.linalg.norm(others - rotations, axis=(-2, -1))
    return 2 * np.arcsin(np.clip(distance / np.sqrt(8), 0, 1))


def measure(
    paths: Iterable[str | Path],
    robot: RobotDescription,
    settings: CoverageSettings | None = None,
    progress: Progress = lambda frames: None,
    **options: Any,
) -> Coverage:
    """Coverage of Stage 1 sources together: folders of motion files, motion files, datasets of any kind.

    Args:
        paths: the sources.
        robot: the arm that they must be about.
        settings: how finely to look.
        progress: called with the number of frames of each block, and with 0 while what can be reached is looked for.
        options: for datasets, see `open_source`.

    Raises:
        DatasetError: a source is missing, empty or damaged.
        FingerprintMismatch: a source is about another arm.
    """
    coverage = Coverage(robot, settings)
    sources = [open_source(path, robot, coverage.settings.rate_hz, **options) for path in paths]
    coverage.sources = [add_source(source, progress, coverage.add) for source in sources]
    coverage.find_reachable(progress)
    return coverage


def add_source(
    source: CoverageSource, progress: Progress, *adds: Callable[[MotionBlock], None]
) -> dict[str, Any]:
    """Hand every block of a source to all of `adds`; returns what the source was."""
    frames, motions, rate_hz = 0, 0, 0.0
    for block in source.blocks():
        _require_poses(block, f'{source.path}, frame {frames}')
        for add in adds:
            add(block)
        frames += len(block)
        motions += int(block.first.sum())
        rate_hz = block.rate_hz
        progress(len(block))
    if not frames:
        raise DatasetError(f'{source.path} holds no frames')
    return {'path': str(source.path), 'frames': frames, 'motions': motions, 'rate_hz': rate_hz}


def _require_poses(block: MotionBlock, where: str) -> None:
    """Raise DatasetError where a value isn't finite or six numbers are no rotation; one NaN would spoil every sum."""
    finite = np.isfinite(block.joints).all(-1) & np.isfinite(block.actions).all(-1)
    columns = np.nan_to_num(block.actions[:, ROTATION].astype(float)).reshape(-1, 2, 3)
    good = finite & (np.linalg.norm(np.cross(columns[:, 0], columns[:, 1]), axis=-1) > _SMALLEST_AREA)
    if not good.all():
        row = int(np.argmin(good))
        raise DatasetError(
            f'{where} + {row}: joints {block.joints[row].tolist()} and action {block.actions[row].tolist()} must be '
            f'finite, and the action hold two independent columns of a rotation'
        )
