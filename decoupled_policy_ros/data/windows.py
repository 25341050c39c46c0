"""Training windows over episodes that lie one after the other: observation history and action chunk.

For the window whose newest observation is frame t, with n observation steps and horizon H:

    observation frames    t-n+1 ... t
    action frames         t-n+1 ... t-n+H        a chunk starts at the time of its first observation

No window leaves its episode: frames before its first or after its last are clamped to those, and the
mask says which action frames are real.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from decoupled_policy_ros.errors import DatasetError


def window_indices(
    lengths: ArrayLike, horizon: int, n_obs_steps: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """One window per frame of every episode.

    Args:
        lengths: frames of each episode (E,), each at least 1.
        horizon: actions in a chunk, H.
        n_obs_steps: frames in the observation history, n; 1 where there is no history.

    Returns:
        Global frame indices of the observations (N, n) and of the actions (N, H), N being the sum of the
        lengths, and the mask (N, H) that is true where an action frame was not clamped.

    Raises:
        DatasetError: a length, the horizon or n_obs_steps is less than 1.
    """
    frames = np.asarray(lengths, np.int64)
    if frames.ndim != 1 or np.any(frames < 1):
        raise DatasetError(f'episode lengths must be a list of numbers of at least 1, got {frames.tolist()}')
    if horizon < 1 or n_obs_steps < 1:
        raise DatasetError(f'horizon and n_obs_steps must be at least 1, got {horizon} and {n_obs_steps}')
    start = np.repeat(np.cumsum(frames) - frames, frames)[:, None]
    last = start + np.repeat(frames, frames)[:, None] - 1
    newest = np.arange(frames.sum())[:, None]
    oldest = newest - (n_obs_steps - 1)
    observations = np.maximum(oldest + np.arange(n_obs_steps), start)
    wanted = oldest + np.arange(horizon)
    actions = np.clip(wanted, start, last)
    return observations, actions, wanted == actions
