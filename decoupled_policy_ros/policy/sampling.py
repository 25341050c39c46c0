"""From noise to a chunk: the loop over the denoising steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.policy.diffusion import NoiseSchedule
from decoupled_policy_ros.policy.flow import FlowSchedule
from decoupled_policy_ros.policy.schedule import Schedule, ScheduleConfig

SCHEDULES: dict[str, type[NoiseSchedule | FlowSchedule]] = {
    'squared_cosine': NoiseSchedule,
    'rectified_flow': FlowSchedule,
}
RANDOM_SAMPLERS = ('ddpm',)
#: Where noise comes from: one generator of a whole batch, one of each sample, or torch's own.
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Known:
    """Actions that a chunk shall agree with: what has been executed of it before it is there, and what follows that.

    Attributes:
        actions: normalised, (horizon, 10) for a whole batch or (B, horizon, 10) for each sample.
        weight: (horizon,) or (B, horizon) in [0, 1]: 1 pins a waypoint, 0 leaves it free, in between it is drawn
            towards the known one.
    """

    actions: Tensor
    weight: Tensor


def standard_normal(shape: Sequence[int], generators: Generators) -> Tensor:
    """Noise of that shape, on the CPU; with generators of each sample, a sample is what it would be alone."""
    if generators is None or isinstance(generators, torch.Generator):
        return torch.randn(*shape, generator=generators)
    return torch.cat([torch.randn(1, *shape[1:], generator=generator) for generator in generators])


def make_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that a backbone file states."""
    return SCHEDULES[config.kind](config)


class Sampler:
    """Some steps of a schedule with one of its samplers.

    Args:
        steps: how many.
        kind: 'ddim' or 'ddpm' for diffusion, 'euler' for flow matching; the schedule's first by default.
        shared_noise: all waypoints of a chunk get the same noise. For a network that does not mix them that changes
            nothing about any one of them, and they tremble no more against each other.

    Attributes:
        ks: noise level of each step, from noise to clean.

    Raises:
        ConfigError: a sampler or a number of steps that the schedule does not have.
    """

    def __init__(self, schedule: Schedule, steps: int, kind: str | None = None, shared_noise: bool = False):
        self.schedule, self.shared_noise = schedule, shared_noise
        self.kind = kind or schedule.samplers[0]
        if self.kind not in schedule.samplers:
            raise ConfigError(
                f'sampler {self.kind!r} does not exist with a {schedule.config.kind!r} schedule; '
                f'valid: {", ".join(schedule.samplers)}'
            )
        self.ks = schedule.sampling_steps(steps)

    def noise(self, shape: Sequence[int], generators: Generators) -> Tensor:
        """Noise (B, horizon, 10) of that shape, on the CPU, see `standard_normal`."""
        if not self.shared_noise:
            return standard_normal(shape, generators)
        return standard_normal((shape[0], 1, *shape[2:]), generators).expand(*shape).contiguous()

    def run(
        self,
        predict: Callable[[int, Tensor], Tensor],
        noise: Tensor,
        generators: Generators = None,
        known: Known | None = None,
    ) -> Tensor:
        """Normalised actions like `noise`, (B, horizon, 10).

        With `known`, its waypoints are in-painted: after each step, from k to k',

            x_k' <- x_k' + clean_k' w (x_known - x_0),   x_0 the clean actions that the network sees in x_k,

        which puts the known actions in the place of x_0 in proportion to their weights and leaves the noise as it is.
        So pinned waypoints come out as they are known, and as long as the network sees something else there, the
        difference adds up: a network that mixes time is led to go on from them, without a gradient through it (as
        Black et al., "Real-time execution of action chunking flow policies", 2025, take) and without more steps (as
        Lugmayr et al., "RePaint", CVPR 2022, take).

        Args:
            predict: the network's output for step number i (of `ks`) and noisy actions (B, horizon, 10).
            noise: standard normal.
            generators: on the CPU, of the noise that a random sampler adds.
            known: waypoints to agree with.
        """
        x = noise
        for i, (k, previous_k) in enumerate(zip(self.ks, [*self.ks[1:], -1], strict=True)):
            added = None
            if self.kind in RANDOM_SAMPLERS:
                added = self.noise(x.shape, generators).to(x.device)
            output = predict(i, x)
            stepped = self.schedule.step(output, x, k, previous_k, self.kind, added)
            if known is not None:
                apart = known.actions - self.schedule.clean_actions(output, x, k)
                stepped = stepped + self.schedule.shares(previous_k)[0] * known.weight[..., None] * apart
            x = stepped
        return x
