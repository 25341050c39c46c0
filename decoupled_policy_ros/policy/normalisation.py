"""Normalisation: of actions the positions only, of vector observations every component.

The action statistics belong to the backbone, which has learned in their units; those of the observations
belong to the task. Both are buffers, so they are saved, hashed and moved with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from decoupled_policy_ros.robot.poses import ACTION_DIM, POSITION

# A component that hardly varies in the data is scaled as if it varied by this much (m, or a unitless 2 %),
# so that sensor noise isn't blown up to the full range.
MIN_RANGE = 0.02


def _scale_offset(lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """scale, offset with scale * x + offset in [-1, 1] for x in [lower, upper]."""
    centre, half = (lower + upper) / 2, np.maximum(upper - lower, MIN_RANGE) / 2
    return 1 / half, -centre / half


def _range(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest of each column, found without a copy of the rows, of which there may be many millions."""
    return rows.min(0).astype(float), rows.max(0).astype(float)


class ActionNormaliser(nn.Module):
    """Positions from [lower, upper] (m) to [-1, 1]; 6-D rotation and gripper lie there already."""

    scale: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('scale', torch.ones(ACTION_DIM))
        self.register_buffer('offset', torch.zeros(ACTION_DIM))

    def fit(self, actions: ArrayLike, at_least_m: Sequence[Sequence[float]] | None = None) -> None:
        """Take the position range of actions (..., 10) in metres, or more where `at_least_m` (2, 3) says so."""
        lower, upper = _range(np.asarray(actions).reshape(-1, ACTION_DIM)[:, POSITION])
        if at_least_m is not None:
            lower, upper = np.minimum(lower, at_least_m[0]), np.maximum(upper, at_least_m[1])
        scale, offset = _scale_offset(lower, upper)
        self.scale[POSITION] = torch.from_numpy(scale).to(self.scale)
        self.offset[POSITION] = torch.from_numpy(offset).to(self.offset)

    @property
    def position_range_m(self) -> tuple[list[float], list[float]]:
        """Positions (lower, upper) that map to -1 and +1."""
        lower, upper = self.inverse(-torch.ones(ACTION_DIM)), self.inverse(torch.ones(ACTION_DIM))
        return lower[POSITION].tolist(), upper[POSITION].tolist()

    def forward(self, actions: Tensor) -> Tensor:
        return actions * self.scale + self.offset

    def inverse(self, normalised: Tensor) -> Tensor:
        return (normalised - self.offset) / self.scale


class VectorNormaliser(nn.Module):
    """Every component of a vector stream from its range in the data to [-1, 1]."""

    scale: Tensor
    offset: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer('scale', torch.ones(dim))
        self.register_buffer('offset', torch.zeros(dim))

    def fit(self, vectors: ArrayLike) -> None:
        """Take the range of vectors (..., dim)."""
        scale, offset = _scale_offset(*_range(np.asarray(vectors).reshape(-1, len(self.scale))))
        self.scale.copy_(torch.from_numpy(scale))
        self.offset.copy_(torch.from_numpy(offset))

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors * self.scale + self.offset
