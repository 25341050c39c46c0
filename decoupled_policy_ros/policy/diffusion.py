"""Forward and reverse diffusion with the squared-cosine schedule.

| variable            | symbol                | meaning                                    |
|---------------------|-----------------------|--------------------------------------------|
| `alpha_bar[k]`      | prod_{j<=k} 1-beta_j  | share of signal power left at step k       |
| `x_k`               | x_k                   | normalised noisy actions at step k         |
| `eps`               | epsilon(x_k, k, o)    | noise in x_k                               |
| `x_0`               | x_0 hat               | clean actions in x_k                       |

The network predicts eps, x_0 ('sample') or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0; any one of them
and x_k give the others.

DDPM: Ho et al. 2020, eq. 7 and 11 (fixed small variance). DDIM with eta = 0: Song et al. 2021, eq. 12.
Squared-cosine: Nichol and Dhariwal 2021, eq. 17, beta capped at 0.999. v: Salimans and Ho 2022, appendix D.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decoupled_policy_ros.policy.schedule import Schedule, ScheduleConfig, to_float32

MAX_BETA = 0.999


class NoiseSchedule(Schedule):
    """alpha_bar of every training step, and one reverse step of DDPM and of DDIM."""

    samplers = ('ddim', 'ddpm')

    def __init__(self, config: ScheduleConfig | None = None):
        super().__init__(config or ScheduleConfig())
        steps = self.config.training_steps

        def signal(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        beta = [min(1 - signal((k + 1) / steps) / signal(k / steps), MAX_BETA) for k in range(steps)]
        self.beta = torch.tensor(beta, dtype=torch.float32)
        self.alpha_bar = torch.cumprod(1 - self.beta, 0)
        self._signal = (
            self.alpha_bar.tolist()
        )  # as numbers: taking one out of a tensor costs as much as a step
        self.clean, self.noise = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()

    def target(self, x_0: Tensor, eps: Tensor, k: Tensor) -> Tensor:
        if self.config.prediction == 'epsilon':
            return eps
        if self.config.prediction == 'sample':
            return x_0
        clean, noise = self._shares(k, x_0)
        return clean * eps - noise * x_0

    def clean_actions(self, output: Tensor, x_k: Tensor, k: int) -> Tensor:
        return self.estimates(output, x_k, k)[0]

    def sampling_steps(self, count: int) -> list[int]:
        self._require_count(count)
        return [i * self.config.training_steps // count for i in range(count)][::-1]

    def step(
        self, output: Tensor, x_k: Tensor, k: int, previous_k: int, sampler: str, noise: Tensor | None = None
    ) -> Tensor:
        if sampler == 'ddim':
            return self.ddim_step(output, x_k, k, previous_k)
        if noise is None:
            raise ValueError('a step of DDPM takes noise')
        return self.ddpm_step(output, x_k, k, previous_k, noise)

    def ddim_step(self, output: Tensor, x_k: Tensor, k: int, previous_k: int) -> Tensor:
        """Deterministic step from k to `previous_k` < k; a negative `previous_k` means clean."""
        alpha_bar = self._alpha_bar(previous_k)
        x_0, eps = self.estimates(output, x_k, k)
        return math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * eps

    def ddpm_step(self, output: Tensor, x_k: Tensor, k: int, previous_k: int, noise: Tensor) -> Tensor:
        """Stochastic step with standard normal `noise` like x_k, which the last step leaves unused."""
        alpha_bar, alpha_bar_prev = self._alpha_bar(k), self._alpha_bar(previous_k)
        beta = 1 - alpha_bar / alpha_bar_prev
        x_0, _ = self.estimates(output, x_k, k)
        x_k, noise = to_float32(x_k, noise)
        mean = (math.sqrt(alpha_bar_prev) * beta * x_0 + math.sqrt(1 - beta) * (1 - alpha_bar_prev) * x_k) / (
            1 - alpha_bar
        )
        if previous_k < 0:
            return mean
        variance = max(beta * (1 - alpha_bar_prev) / (1 - alpha_bar), 1e-20)
        return mean + math.sqrt(variance) * noise

    def estimates(self, output: Tensor, x_k: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """x_0, clipped to [-1, 1], and eps, not changed by the clipping, that a network output implies at step k."""
        output, x_k = to_float32(output, x_k)
        alpha_bar = self._alpha_bar(k)
        clean, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        if self.config.prediction == 'epsilon':
            x_0, eps = (x_k - noise * output) / clean, output
        elif self.config.prediction == 'sample':
            x_0, eps = output, (x_k - clean * output) / noise
        else:
            x_0, eps = clean * x_k - noise * output, clean * output + noise * x_k
        return x_0.clamp(-1, 1), eps

    def _alpha_bar(self, k: int) -> float:
        return self._signal[k] if k >= 0 else 1.0
