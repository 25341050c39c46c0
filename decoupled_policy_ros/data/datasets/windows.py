"""Training windows over episodes that lie one after the other: observation history and action chunk.

For the window whose newest observation is frame t, with n observation steps and horizon H:

    observation frames    t-n+1 ... t
    action frames         t-n+1 ... t-n+H        a chunk starts at the time of its first observation

No window leaves its episode: frames before its first or after its last are clamped to those, and the
mask says which actions are real. There is one window per frame, and it has the number of its frame t.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from decoupled_policy_ros.errors import DatasetError

Indices = NDArray[np.int64]


class Windows:
    """All windows of some episodes; frames are worked out when they are asked for, so memory is O(episodes).

    Args:
        lengths: frames of each episode (E,), each at least 1.
        horizon: actions in a chunk, H.
        n_obs_steps: frames in the observation history, n; 1 where there is no history.

    Attributes:
        ends: of each episode (E,), the number of the first frame after it.

    Raises:
        DatasetError: a length, the horizon or n_obs_steps is less than 1.
    """

    def __init__(self, lengths: ArrayLike, horizon: int, n_obs_steps: int):
        frames = np.asarray(lengths, np.int64)
        if frames.ndim != 1 or np.any(frames < 1):
            raise DatasetError(
                f'episode lengths must be a list of numbers of at least 1, got {frames.tolist()[:20]}'
            )
        if horizon < 1 or n_obs_steps < 1:
            raise DatasetError(f'horizon and n_obs_steps must be at least 1, got {horizon} and {n_obs_steps}')
        self.horizon = horizon
        self.n_obs_steps = n_obs_steps
        self.ends = np.cumsum(frames)
        self._starts = self.ends - frames

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def episodes(self, batch: ArrayLike) -> Indices:
        """The episode (B,) of each of the windows (B,).

        Raises:
            DatasetError: a window that isn't there.
        """
        windows = np.asarray(batch, np.int64)
        if windows.size and not (windows.min() >= 0 and windows.max() < len(self)):
            raise DatasetError(
                f'windows are numbered 0 to {len(self) - 1}, got {windows.min()} to {windows.max()}'
            )
        return np.searchsorted(self.ends, windows, side='right')

    def observations(self, batch: ArrayLike) -> Indices:
        """Frames (B, n) of the observation histories of the windows (B,), oldest first."""
        return self._clamped(batch, self.n_obs_steps)[0]

    def actions(self, batch: ArrayLike) -> Indices:
        """Frames (B, H) of the action chunks of the windows (B,)."""
        return self._clamped(batch, self.horizon)[0]

    def mask(self, batch: ArrayLike) -> NDArray[np.bool_]:
        """True (B, H) where a frame of `actions` was not clamped."""
        return self._clamped(batch, self.horizon)[1]

    def _clamped(self, batch: ArrayLike, count: int) -> tuple[Indices, NDArray[np.bool_]]:
        """`count` frames from the oldest observation on, clamped to the episode, and which were not."""
        episode = self.episodes(batch)
        oldest = np.asarray(batch, np.int64) - (self.n_obs_steps - 1)
        wanted = oldest[:, None] + np.arange(count)
        frames = np.clip(wanted, self._starts[episode][:, None], self.ends[episode][:, None] - 1)
        return frames, wanted == frames
