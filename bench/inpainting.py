"""Which way of in-painting makes a network that mixes time go on from what is pinned, where the answer is known.

    python bench/inpainting.py                                                      (make bench)

Actions of which the distribution is known: 16 waypoints, strongly correlated. The best denoiser of those is linear,
and so is the exact answer to what the rest is once a quarter of the waypoints is pinned. DDIM with each way, and the
mean of the rest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.policy.diffusion import NoiseSchedule
from decoupled_policy_ros.policy.sampling import Known, Sampler

COVARIANCE = 0.09 * (torch.ones(16, 16) + 0.05 * torch.eye(16))
PINNED, VALUE, BATCH = 4, 0.4, 512


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        steps: numbers of DDIM steps.
        json: write the figures here.
    """

    steps: tuple[int, ...] = (5, 10, 20, 100)
    json: Path | None = Path('docs/bench/inpainting.json')


def gain(schedule: NoiseSchedule, k: int) -> Tensor:
    """The best estimate of the clean actions is this times the noisy ones."""
    clean, noise = schedule.shares(k)
    return clean * COVARIANCE @ torch.linalg.inv(clean**2 * COVARIANCE + noise**2 * torch.eye(16))


def known() -> Known:
    weight = torch.zeros(16)
    weight[:PINNED] = 1.0
    return Known(torch.full((16, 10), VALUE), weight)


def ours(schedule: NoiseSchedule, steps: int) -> Tensor:
    """As the sampler does it."""
    sampler = Sampler(schedule, steps)

    def predict(i: int, x: Tensor) -> Tensor:
        clean, noise = schedule.shares(sampler.ks[i])
        return (x - clean * gain(schedule, sampler.ks[i]) @ x) / noise

    generator = torch.Generator().manual_seed(0)
    return sampler.run(predict, torch.randn(BATCH, 16, 10, generator=generator), None, known())


def repaint(schedule: NoiseSchedule, steps: int, repeats: int) -> Tensor:
    """Pinned actions take the place of x_k at each noise level; each step is done so many times."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(BATCH, 16, 10, generator=generator)

    pinned, x = known(), normal()
    weight = pinned.weight[:, None]
    ks = schedule.sampling_steps(steps)
    for k, after in zip(ks, [*ks[1:], -1], strict=True):
        (clean, noise), (clean_after, noise_after) = schedule.shares(k), schedule.shares(after)
        for repeat in range(repeats if after >= 0 else 1):
            if repeat:  # back to the noise level before
                share = clean / clean_after
                x = share * x + (1 - share**2) ** 0.5 * normal()
            x = torch.lerp(x, clean * pinned.actions + noise * normal(), weight)
            x_0 = gain(schedule, k) @ x
            x = clean_after * x_0 + noise_after * (x - clean * x_0) / noise
    return torch.lerp(x, pinned.actions, weight)


def guided(schedule: NoiseSchedule, steps: int, largest: float) -> Tensor:
    """The estimate of the clean actions moves along the gradient of how well it agrees with what is pinned."""
    pinned = known()
    x = torch.randn(BATCH, 16, 10, generator=torch.Generator().manual_seed(0))
    ks = schedule.sampling_steps(steps)
    for k, after in zip(ks, [*ks[1:], -1], strict=True):
        (clean, noise), (clean_after, noise_after) = schedule.shares(k), schedule.shares(after)
        network = gain(schedule, k)
        x_0 = network @ x
        gradient = network.T @ (pinned.weight[:, None] * (pinned.actions - x_0))
        x_0 = x_0 + min(largest, 1 / clean) * gradient
        x = clean_after * x_0 + noise_after * (x - clean * x_0) / noise
    return x


WAYS = {
    'in the place of x_k (RePaint, each step once)': lambda s, n: repaint(s, n, 1),
    'in the place of x_k (RePaint, each step 4 times)': lambda s, n: repaint(s, n, 4),
    'gradient through the network, weight at most 5': lambda s, n: guided(s, n, 5.0),
    'in the place of the clean actions (ours)': ours,
}


def measure(arguments: Arguments) -> dict[str, Any]:
    """Means of the pinned part and of the rest for each way and number of steps, and what the rest should be."""
    schedule = NoiseSchedule()
    exact = COVARIANCE[PINNED:, :PINNED] @ torch.linalg.inv(COVARIANCE[:PINNED, :PINNED])
    rows = []
    for name, way in WAYS.items():
        for steps in arguments.steps:
            actions = way(schedule, steps)
            rows.append(
                {
                    'way': name,
                    'steps': steps,
                    'pinned': round(float(actions[:, :PINNED].mean()), 3),
                    'rest': round(float(actions[:, PINNED:].mean()), 3),
                }
            )
    return {'value': VALUE, 'exact_rest': round(float((exact * VALUE).sum(1).mean()), 3), 'rows': rows}


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    report = measure(arguments)
    print(json.dumps(report, indent=1))
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
