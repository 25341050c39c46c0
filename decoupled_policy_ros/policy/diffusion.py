"""Forward and reverse diffusion with the squared-cosine schedule, always in float32 or better.

| variable            | symbol                | meaning                                    |
|---------------------|-----------------------|--------------------------------------------|
| `alpha_bar[k]`      | prod_{j<=k} 1-beta_j  | share of signal power left at step k       |
| `x_k`               | x_k                   | normalised noisy actions at step k         |
| `eps`               | epsilon(x_k, k, o)    | noise that the network predicts            |
| `x_0`               | x_0 hat               | clean actions that this eps implies        |

DDPM: Ho et al. 2020, eq. 7 and 11 (fixed small variance). DDIM with eta = 0: Song et al. 2021, eq. 12.
Squared-cosine: Nichol and Dhariwal 2021, eq. 17, beta capped at 0.999.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from decoupled_policy_ros.errors import ConfigError

MAX_BETA = 0.999


@dataclass(frozen=True)
class ScheduleConfig:
    """What a backbone file states of its noise schedule; epsilon prediction with clipping to [-1, 1]."""

    training_steps: int = 100
    kind: str = 'squared_cosine'
    prediction: str = 'epsilon'

    def __post_init__(self) -> None:
        if self.kind != 'squared_cosine' or self.prediction != 'epsilon':
            raise ConfigError(
                f'noise schedule {self.kind!r} with {self.prediction!r} prediction is unknown; '
                "valid: 'squared_cosine' with 'epsilon'"
            )
        if not 1 <= self.training_steps <= 10_000:
            raise ConfigError(f'training_steps must be in 1..10000, got {self.training_steps}')

    def to_dict(self) -> dict:
        return asdict(self)


class NoiseSchedule:
    """alpha_bar of every training step, and one reverse step of DDPM and of DDIM."""

    def __init__(self, config: ScheduleConfig | None = None):
        self.config = config or ScheduleConfig()
        steps = self.config.training_steps

        def signal(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        beta = [min(1 - signal((k + 1) / steps) / signal(k / steps), MAX_BETA) for k in range(steps)]
        self.beta = torch.tensor(beta, dtype=torch.float32)
        self.alpha_bar = torch.cumprod(1 - self.beta, 0)

    def add_noise(self, x_0: Tensor, eps: Tensor, k: Tensor) -> Tensor:
        """x_k = sqrt(alpha_bar_k) x_0 + sqrt(1 - alpha_bar_k) eps, for steps k (B,)."""
        alpha_bar = self.alpha_bar.to(x_0.device)[k].view(-1, *[1] * (x_0.dim() - 1))
        return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps

    def sampling_steps(self, count: int) -> list[int]:
        """`count` training steps, evenly spaced, from noisy to clean; the last is 0.

        Raises:
            ConfigError: more sampling steps than training steps, or none.
        """
        total = self.config.training_steps
        if not 1 <= count <= total:
            raise ConfigError(f'denoising steps must be in 1..{total} (the training steps), got {count}')
        return [i * (total // count) for i in range(count)][::-1]

    def clean_estimate(self, eps: Tensor, x_k: Tensor, k: int) -> Tensor:
        """x_0 implied by eps at step k, clipped to [-1, 1]."""
        alpha_bar = float(self.alpha_bar[k])
        return ((x_k - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)).clamp(-1, 1)

    def ddim_step(self, eps: Tensor, x_k: Tensor, k: int, previous_k: int) -> Tensor:
        """Deterministic step from k to `previous_k` < k; a negative `previous_k` means clean."""
        alpha_bar = float(self.alpha_bar[previous_k]) if previous_k >= 0 else 1.0
        x_0 = self.clean_estimate(eps, x_k, k)
        return math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * eps

    def ddpm_step(self, eps: Tensor, x_k: Tensor, k: int, noise: Tensor) -> Tensor:
        """Stochastic step from k to k - 1 with standard normal `noise` like x_k (unused at k = 0)."""
        alpha_bar = float(self.alpha_bar[k])
        alpha_bar_prev = float(self.alpha_bar[k - 1]) if k > 0 else 1.0
        beta = 1 - alpha_bar / alpha_bar_prev
        x_0 = self.clean_estimate(eps, x_k, k)
        mean = (math.sqrt(alpha_bar_prev) * beta * x_0 + math.sqrt(1 - beta) * (1 - alpha_bar_prev) * x_k) / (
            1 - alpha_bar
        )
        if k == 0:
            return mean
        variance = max(beta * (1 - alpha_bar_prev) / (1 - alpha_bar), 1e-20)
        return mean + math.sqrt(variance) * noise
