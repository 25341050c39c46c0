"""The denoising backbone: output = f(x_k ; modulation), shared by every task and frozen after Stage 1.

A backbone never sees an observation. It owns the timestep projection tau (diffusion step -> embedding),
because tau is frozen with it, and receives everything else as a modulation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.policy.backbones.modulation import Needs


@dataclass(frozen=True)
class Size:
    """Sizes that every backbone has; each kind adds its own. Written into the backbone's file.

    Attributes:
        horizon: waypoints in a chunk.

    Raises:
        ConfigError: a size that is not positive, or a dropout outside of [0, 1).
    """

    __pydantic_config__ = {'extra': 'forbid'}  # noqa: RUF012 (read by the training configuration)

    horizon: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == 'dropout':
                if not 0 <= value < 1:
                    raise ConfigError(f'backbone.dropout must be in [0, 1), got {value}')
            elif isinstance(value, int) and value < 1:
                raise ConfigError(f'backbone.{field.name} must be at least 1, got {value}')


class Denoiser(nn.Module, ABC):
    """What all backbones have in common.

    Args:
        size: its sizes, an instance of its own `Size`.
        mechanism: how it is conditioned, one of its `mechanisms`; the first by default.

    Attributes:
        needs: what its conditioning network must deliver.
        mixes_time: whether a waypoint of its prediction depends on others of its input.
        tau: embeddings (B, tau.width) of integer diffusion steps (B,); frozen with the rest.

    Raises:
        ConfigError: it can't be conditioned that way.
    """

    kind: ClassVar[str]
    mechanisms: ClassVar[tuple[str, ...]]
    mixes_time: ClassVar[bool] = True
    Size: ClassVar[type[Size]]
    needs: Needs
    tau: Sinusoid

    def __init__(self, size: Any, mechanism: str | None):
        super().__init__()
        self.mechanism = mechanism or self.mechanisms[0]
        if self.mechanism not in self.mechanisms:
            raise ConfigError(
                f'{self.kind} can not be conditioned by {self.mechanism!r}; valid: {", ".join(self.mechanisms)}'
            )
        self.horizon: int = size.horizon
        self.config: dict[str, Any] = asdict(size)

    @abstractmethod
    def forward(self, noisy_actions: Tensor, modulation: Tensor) -> Tensor:
        """Prediction (B, horizon, 10) for normalised noisy actions (B, horizon, 10).

        What it predicts (noise, clean actions, velocity) is the schedule's business.

        Args:
            modulation: (B, needs.size), or tokens (B, n + horizon, needs.width), from a conditioning network.
        """


class Sinusoid(nn.Module):
    """Sine and cosine of the diffusion step at `width` / 2 frequencies; nothing in it is learned."""

    def __init__(self, width: int):
        super().__init__()
        if width < 4 or width % 2:
            raise ConfigError(f'the width of a timestep embedding must be even and at least 4, got {width}')
        self.width = width

    def forward(self, k: Tensor) -> Tensor:
        """Embeddings (B, width) of integer diffusion steps (B,)."""
        half = self.width // 2
        frequency = torch.exp(torch.arange(half, device=k.device) * (-math.log(10_000) / (half - 1)))
        angle = k[:, None].float() * frequency
        return torch.cat([angle.sin(), angle.cos()], -1)


class TimestepProjection(Sinusoid):
    """tau(k): sinusoidal features of the diffusion step, then a two-layer perceptron."""

    def __init__(self, width: int):
        super().__init__(width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))

    def forward(self, k: Tensor) -> Tensor:
        """Embeddings (B, width) of integer diffusion steps (B,)."""
        return self.layers(super().forward(k))


def full_precision(x: Tensor) -> AbstractContextManager:
    """Float32 even under autocast: at the last denoising steps the noise is finer than bfloat16."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
