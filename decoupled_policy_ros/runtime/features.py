"""Features of the streams' frames, each picture encoded once and as soon as it is there.

Of the two frames of an observation only the newest is news. A picture is known again by being the same array, which
nobody writes to; so it doesn't matter what its stamp says, nor whether the clock has jumped since. The pictures of a
single observation are encoded one by one, so that its features are the same whether it was encoded ahead or not, bit
for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from decoupled_policy_ros.policy.language import INSTRUCTION
from decoupled_policy_ros.policy.packed import packs_on, with_packed_convolutions
from decoupled_policy_ros.policy.policy import Task
from decoupled_policy_ros.runtime.graphs import Recorded

#: The n_obs_steps frames of each stream, oldest first, or one array of them.
Frames = Mapping[str, tuple[NDArray, ...] | NDArray]
#: Pictures kept besides those of an observation: the newer ones that have arrived since.
AHEAD = 2


class FrameFeatures:
    """The encoder of a task, with a memory of the pictures that it has seen lately.

    Args:
        task: whose encoder it is, on the device where it is to run.
        device: that device.
        dtype: that convolutions are computed in on a CPU, see `policy.packed`.
    """

    def __init__(self, task: Task, device: torch.device, dtype: torch.dtype):
        self._encoder, self._device, self._contract = task.encoder, device, task.contract
        self._pictures = {
            s.name: self._of_one(task.encoder.streams[s.name], s.shape, dtype)
            for s in self._contract.streams
            if s.kind == 'image'
        }
        self._seen: dict[str, deque[tuple[NDArray, Tensor]]] = {
            name: deque(maxlen=self._contract.n_obs_steps + AHEAD) for name in self._pictures
        }

    def _of_one(
        self, encoder: nn.Module, shape: Sequence[int], dtype: torch.dtype
    ) -> Callable[[Tensor], Tensor]:
        """The encoder of a stream's pictures for one of them."""
        black = torch.zeros(1, 1, *shape, dtype=torch.uint8, device=self._device)
        if packs_on(self._device):
            return with_packed_convolutions(encoder, black, dtype)
        return Recorded(encoder, black) if self._device.type == 'cuda' else encoder

    def ahead(self, frames: Mapping[str, NDArray]) -> bool:
        """Encode the first of these pictures that is new; False if none is."""
        for name in self._pictures:
            if name in frames and self._known(name, frames[name]) is None:
                self._encode(name, [frames[name]])
                return True
        return False

    def __call__(self, observations: Sequence[Frames], spoken: Mapping[str, Tensor]) -> Tensor:
        """Features (B, feature_dim) of B observations; `spoken` is what `Task.spoken` gives."""
        encoded = {
            name: self._of_pictures(name, [o[name] for o in observations])
            if name in self._pictures
            else encoder(torch.from_numpy(np.stack([tuple(o[name]) for o in observations])).to(self._device))
            for name, encoder in self._encoder.streams.items()
        }
        told = spoken.get(INSTRUCTION)
        return self._encoder.join(encoded, None if told is None else told.expand(len(observations), -1))

    def _of_pictures(self, name: str, observed: Sequence[tuple[NDArray, ...] | NDArray]) -> Tensor:
        """Features (B, n_obs_steps, n) of a stream's pictures."""
        pictures = [picture for frames in observed for picture in frames]
        features = [self._known(name, picture) for picture in pictures]
        unseen = [p for p, f in zip(pictures, features, strict=True) if f is None]
        new = iter(self._encode(name, unseen, together=len(observed) > 1 and not packs_on(self._device)))
        return torch.stack([next(new) if f is None else f for f in features]).unflatten(
            0, (len(observed), -1)
        )

    def _known(self, name: str, picture: NDArray) -> Tensor | None:
        return next((features for seen, features in self._seen[name] if seen is picture), None)

    def _encode(self, name: str, pictures: Sequence[NDArray], together: bool = False) -> list[Tensor]:
        """Features (n,) of each picture; those that nobody can write to are remembered."""
        encoder = self._encoder.streams[name] if together else self._pictures[name]
        size = max(1, len(pictures)) if together else 1
        features: list[Tensor] = []
        for i in range(0, len(pictures), size):
            batch = torch.from_numpy(np.stack(pictures[i : i + size])).to(self._device)
            features += encoder(batch[:, None]).float()[:, 0].unbind()
        for picture, encoded in zip(pictures, features, strict=True):
            if not picture.flags.writeable:
                self._seen[name].append((picture, encoded))
        return features
