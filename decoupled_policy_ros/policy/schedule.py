"""What the network predicts, and how a chunk is sampled from its predictions: the part that objectives share.

A backbone's file states its schedule, so the same network and the same files serve diffusion and flow matching.
All tables and all steps are float32, whatever the network computes in: in bfloat16 the late steps' noise would
vanish in rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from decoupled_policy_ros.errors import ConfigError

PREDICTIONS = {'squared_cosine': ('epsilon', 'sample', 'v'), 'rectified_flow': ('velocity',)}


@dataclass(frozen=True)
class ScheduleConfig:
    """What a backbone file states of its objective.

    Attributes:
        training_steps: noise levels that the network is trained on.
        kind: 'squared_cosine' (diffusion), or 'rectified_flow' (flow matching).
        prediction: what the network predicts: 'epsilon', 'sample' or 'v' with diffusion, 'velocity' with flow
            matching; the first by default.

    Raises:
        ConfigError: an unknown kind or prediction, or a number of steps out of range.
    """

    __pydantic_config__ = {'extra': 'forbid'}  # noqa: RUF012 (read by the training configuration)

    training_steps: int = 100
    kind: str = 'squared_cosine'
    prediction: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in PREDICTIONS:
            raise ConfigError(f'objective.kind {self.kind!r} is unknown; valid: {", ".join(PREDICTIONS)}')
        valid = PREDICTIONS[self.kind]
        if self.prediction is None:
            object.__setattr__(self, 'prediction', valid[0])
        if self.prediction not in valid:
            raise ConfigError(
                f'objective.prediction {self.prediction!r} does not exist with {self.kind!r}; '
                f'valid: {", ".join(valid)}'
            )
        if not 1 <= self.training_steps <= 10_000:
            raise ConfigError(f'training_steps must be in 1..10000, got {self.training_steps}')

    def to_dict(self) -> dict:
        return asdict(self)


class Schedule(ABC):
    """Noise levels k = 0 (nearly clean) to training_steps - 1 (noise), and the way back.

    Attributes:
        samplers: names of the ways back; the first is the default.
        clean, noise: share of the clean actions and of the noise in x_k, float32 (training_steps,).
    """

    samplers: ClassVar[tuple[str, ...]]
    clean: Tensor
    noise: Tensor

    def __init__(self, config: ScheduleConfig):
        self.config = config

    def add_noise(self, x_0: Tensor, eps: Tensor, k: Tensor) -> Tensor:
        """x_k = clean_k x_0 + noise_k eps, for noise levels k (B,)."""
        clean, noise = self._shares(k, x_0)
        return clean * x_0 + noise * eps

    @abstractmethod
    def target(self, x_0: Tensor, eps: Tensor, k: Tensor) -> Tensor:
        """What the network should predict for x_k at noise levels k (B,)."""

    @abstractmethod
    def clean_actions(self, output: Tensor, x_k: Tensor, k: int) -> Tensor:
        """The clean actions, clipped to [-1, 1], that a network output implies at noise level k."""

    @abstractmethod
    def sampling_steps(self, count: int) -> list[int]:
        """`count` noise levels, evenly spaced, from noisy to clean.

        Raises:
            ConfigError: more sampling steps than training steps, or none.
        """

    @abstractmethod
    def step(
        self, output: Tensor, x_k: Tensor, k: int, previous_k: int, sampler: str, noise: Tensor | None = None
    ) -> Tensor:
        """From noise level k to `previous_k` < k by one network output; a negative `previous_k` means clean.

        Args:
            noise: standard normal like x_k, for samplers that are random.
        """

    def shares(self, k: int) -> tuple[float, float]:
        """Share of the clean actions and of the noise in x_k; a negative k means clean."""
        return (1.0, 0.0) if k < 0 else (float(self.clean[k]), float(self.noise[k]))

    def _shares(self, k: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.dim() - 1))
        clean, noise = (table.to(like.device)[k].view(shape) for table in (self.clean, self.noise))
        return clean, noise

    def _require_count(self, count: int) -> None:
        total = self.config.training_steps
        if not 1 <= count <= total:
            raise ConfigError(f'denoising steps must be in 1..{total} (the training steps), got {count}')


def to_float32(*tensors: Tensor) -> list[Tensor]:
    """The same in float32, the type that all steps are computed in."""
    return [tensor.to(torch.float32) for tensor in tensors]
