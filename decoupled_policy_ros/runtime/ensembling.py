"""Temporal ensembling: what is executed at a time is a mean of what several chunks said of it.

Zhao et al., "Learning fine-grained bimanual manipulation with low-cost hardware" (ACT), 2023: the oldest chunk that
covers a time has weight 1, the i-th after it exp(-m i). With a small m all count alike and motion is smooth and late;
with a large one the oldest decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.errors import ConfigError

Array = NDArray[np.float64]


class Ensemble:
    """The latest chunks, as they were predicted.

    Args:
        decay: m, at least 0.

    Raises:
        ConfigError: m is negative or not finite.
    """

    def __init__(self, decay: float):
        if not 0.0 <= decay < np.inf:
            raise ConfigError(f'the decay of an ensemble must be 0 or positive, got {decay}')
        self.decay = decay
        self.reset()

    def reset(self) -> None:
        """Forget the chunks."""
        self._chunks: list[tuple[Array, NDArray[np.int64]]] = []

    def add(self, actions: Array, stamps_ns: Sequence[int]) -> None:
        """Actions (n, 10) of a chunk as it was predicted, with increasing stamps (n,), that is followed now."""
        stamps: NDArray[np.int64] = np.asarray(stamps_ns, np.int64)
        self._chunks = [(old, of) for old, of in self._chunks if of[-1] >= stamps[0]]
        self._chunks.append((actions, stamps))

    def mean(self, actions: Array, stamps_ns: Sequence[int]) -> Array:
        """Actions (n, 10) of a new chunk, each the mean over all chunks that cover its stamp (n,).

        The gripper is the new chunk's own: an edge has no mean. Columns of rotations are averaged as they are, which
        is the nearest mean rotation once they are made orthonormal.
        """
        stamps: NDArray[np.int64] = np.asarray(stamps_ns, np.int64)
        total, weights = np.zeros_like(actions), np.zeros(len(actions))
        rank = np.zeros(len(actions))  # of a chunk among those that cover a waypoint, the oldest being 0
        for old, of in (*self._chunks, (actions, stamps)):
            covered = (stamps >= of[0]) & (stamps <= of[-1])
            weight = np.where(covered, np.exp(-self.decay * rank), 0.0)
            since = (stamps - of[0]).astype(float)
            said = np.stack([np.interp(since, (of - of[0]).astype(float), column) for column in old.T], -1)
            total += weight[:, None] * said
            weights += weight
            rank += covered
        mean = total / weights[:, None]
        mean[:, -1] = actions[:, -1]
        return mean
