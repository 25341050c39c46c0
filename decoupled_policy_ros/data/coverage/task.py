"""What a task needs beside what Stage 1 covers: whether a backbone of these motions can serve the task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from decoupled_policy_ros.data.coverage.coverage import Coverage, add_source
from decoupled_policy_ros.data.coverage.sources import MotionBlock, open_source
from decoupled_policy_ros.robot.poses import POSITION, ROTATION, rotation_from_rot6d

AXES = ('x', 'y', 'z')
#: Stage 2 lets a task pass whose positions are no further than this outside of the backbone's range (m).
TOLERANCE_M = 1e-3


class TaskNeeds:
    """Commanded poses of a task, measured on the voxels and ranges of Stage 1.

    Args:
        stage1: complete; it isn't changed.
    """

    def __init__(self, stage1: Coverage):
        self.stage1 = stage1
        self.own = Coverage(stage1.robot, stage1.settings)
        self.outside_range = np.zeros((2, 3), np.int64)  # frames below and above Stage 1's range, by axis
        self.outside_any = 0
        self.positions_covered = self.rotations_covered = self.poses_covered = 0

    def add(self, block: MotionBlock) -> None:
        """Count a block of commanded poses."""
        self.own.add(block)
        positions_m = block.actions[:, POSITION].astype(float)
        lower_m, upper_m = self.stage1.position_range_m
        outside = np.stack([positions_m < lower_m - TOLERANCE_M, positions_m > upper_m + TOLERANCE_M])
        self.outside_range += outside.sum(1)
        self.outside_any += int(outside.any((0, 2)).sum())
        voxels = self.stage1.grid.index(positions_m)
        covered = (voxels >= 0) & self.stage1.visited.reshape(-1)[voxels]
        cells = self.stage1.rotations.index(rotation_from_rot6d(block.actions[:, ROTATION].astype(float)))
        turned = self.stage1.rotations.counts[cells] > 0
        self.positions_covered += int(covered.sum())
        self.rotations_covered += int(turned.sum())
        self.poses_covered += int((covered & turned).sum())

    @property
    def beyond_m(self) -> np.ndarray:
        """How far the task goes below and above Stage 1's range, by axis (2, 3); 0 where it is inside."""
        (low, high), (task_low, task_high) = self.stage1.position_range_m, self.own.position_range_m
        return np.where(self.outside_range, [low - task_low, task_high - high], 0.0)

    def verdict(self) -> str:
        """One sentence on whether a backbone of this Stage 1 can serve the task."""
        frames = self.own.n_frames
        if not self.outside_any:
            share = self.positions_covered / frames
            return (
                f'every commanded position is inside the range of Stage 1; {share:.1%} of them, and '
                f'{self.rotations_covered / frames:.1%} of the orientations, are where Stage 1 has been'
            )
        shares, beyond_m = self.outside_range / frames, self.beyond_m
        leaves = [
            f'{axis} {side} by up to {beyond_m[i, j]:.3f} m in {shares[i, j]:.1%} of the frames'
            for i, side in enumerate(('below', 'above'))
            for j, axis in enumerate(AXES)
            if self.outside_range[i, j]
        ]
        return (
            f'Stage 2 will refuse this task on a backbone of these motions, which clips positions to their range: '
            f'{self.outside_any / frames:.1%} of the commanded ones are outside, {"; ".join(leaves)}'
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values; shares of the task's frames."""
        frames, own, beyond_m = self.own.n_frames, self.own, self.beyond_m
        needed = own.visited
        return {
            'sources': own.sources,
            'verdict': self.verdict(),
            'inside_range': 1 - self.outside_any / frames,
            'positions_covered': self.positions_covered / frames,
            'orientations_covered': self.rotations_covered / frames,
            'poses_covered': self.poses_covered / frames,
            'voxels_needed': int(needed.sum()),
            'voxels_covered': int((needed & self.stage1.visited).sum()),
            'outside_workspace': own.grid.outside / frames,
            'axes': {
                axis: {
                    'range_m': own.position_range_m[:, j].tolist(),
                    'below': self.outside_range[0, j] / frames,
                    'above': self.outside_range[1, j] / frames,
                    'beyond_m': beyond_m[:, j].tolist(),
                }
                for j, axis in enumerate(AXES)
            },
            'linear_speed_p99_m_s': own.linear_m_s.quantile(0.99),
            'angular_speed_p99_rad_s': own.angular_rad_s.quantile(0.99),
        }


def compare_task(
    path: str | Path,
    stage1: Coverage,
    progress: Callable[[int], None] = lambda frames: None,
) -> TaskNeeds:
    """What the task demonstrated in `path` needs of Stage 1; of a dataset, the commanded poses.

    Raises:
        DatasetError: the task's data are missing, empty or damaged.
        FingerprintMismatch: they are about another arm.
    """
    needs = TaskNeeds(stage1)
    source = open_source(path, stage1.robot, stage1.settings.rate_hz, 'commanded')
    needs.own.sources = [add_source(source, progress, needs.add)]
    return needs
