"""Flow matching on straight paths (rectified flow): the network predicts the velocity from actions to noise.

    x_t = (1 - t) x_0 + t eps,   dx/dt = eps - x_0,   t_k = (k + 1) / training_steps

Sampling goes from t = 1 to 0 by Euler steps. Lipman et al. 2023; Liu et al. 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decoupled_policy_ros.policy.schedule import Schedule, ScheduleConfig, to_float32


class FlowSchedule(Schedule):
    """Times t_k of the training grid, and one Euler step."""

    samplers = ('euler',)

    def __init__(self, config: ScheduleConfig | None = None):
        super().__init__(config or ScheduleConfig(kind='rectified_flow'))
        steps = self.config.training_steps
        self.noise = torch.arange(1, steps + 1, dtype=torch.float32) / steps
        self.clean = 1 - self.noise

    def target(self, x_0: Tensor, eps: Tensor, k: Tensor) -> Tensor:
        return eps - x_0

    def clean_actions(self, output: Tensor, x_k: Tensor, k: int) -> Tensor:
        velocity, x_k = to_float32(output, x_k)
        return (x_k - float(self.noise[k]) * velocity).clamp(-1, 1)

    def sampling_steps(self, count: int) -> list[int]:
        self._require_count(count)
        total = self.config.training_steps
        return [round(total * i / count) - 1 for i in range(count, 0, -1)]

    def step(
        self, output: Tensor, x_k: Tensor, k: int, previous_k: int, sampler: str, noise: Tensor | None = None
    ) -> Tensor:
        """Euler step towards the clean actions that the velocity leads to, which are clipped to [-1, 1]."""
        left = float(self.noise[previous_k]) / float(self.noise[k]) if previous_k >= 0 else 0.0
        x_0 = self.clean_actions(output, x_k, k)
        return x_0 + left * (x_k - x_0)
