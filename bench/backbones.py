"""Every backbone and way of conditioning: parameters, one denoising step, one training step, in one run.

    python bench/backbones.py                                    all, with 20 rounds
    python bench/backbones.py --only dp_mlp dp_mixer --rounds 200

A denoising step is the backbone alone at batch 1, as it runs in every step of a control cycle; the modulation is
there already. Backbones take turns, so that a machine whose speed drifts slows all, and each is compared with
DP-MLP of the same round. A training step is forward, backward, AdamW and EMA on a batch of Stage 2's shape, in
normal training, where the backbone learns too.
"""

from __future__ import annotations

import platform
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim.swa_utils import AveragedModel

from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.policy.backbones import BACKBONES, DPCSize, DPTSize
from decoupled_policy_ros.policy.backbones.interface import Denoiser
from decoupled_policy_ros.policy.conditioning import conditioning_for
from decoupled_policy_ros.policy.diffusion import NoiseSchedule

STEPS, STEP_DIM = 2, 137  # two cameras and proprioception, two steps
REFERENCE = 'dp_mlp film'


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        only: kinds of backbones; all by default. DP-MLP is always there, to compare with.
        rounds: measured denoising steps of each.
        threads: CPU threads.
        train: also measure one training step of each, at this batch size; 0 for none.
        full_size: DP-C with the paper's MimicGen widths instead of 256/512/1024.
        json: write the figures here.
    """

    only: tuple[str, ...] = tuple(BACKBONES)
    rounds: int = 20
    threads: int = 1
    train: int = 0
    full_size: bool = False
    json: Path | None = None


def candidates(arguments: Arguments) -> dict[str, Denoiser]:
    """The backbones by name, at their full sizes but for DP-C."""
    sizes = {
        'dp_c': DPCSize() if arguments.full_size else DPCSize(widths=(256, 512, 1024)),
        'dp_t': DPTSize(),
    }
    return {
        f'{kind} {mechanism}': backbone(sizes.get(kind), mechanism)
        for kind, backbone in BACKBONES.items()
        for mechanism in backbone.mechanisms
        if kind in arguments.only or f'{kind} {mechanism}' == REFERENCE
    }


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def denoising_seconds(backbones: dict[str, Denoiser], rounds: int) -> dict[str, list[float]]:
    """Seconds of one denoising step in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in backbones}
    noisy = torch.randn(1, 16, 10)
    with torch.inference_mode():
        modulations = {
            name: conditioning_for(backbone, STEPS, STEP_DIM)(
                backbone.tau(torch.tensor([50])), torch.randn(1, STEPS * STEP_DIM)
            )
            for name, backbone in backbones.items()
        }
        for _ in range(rounds):
            for name, backbone in backbones.items():
                backbone(noisy, modulations[name])  # the weights come into the cache again
                start = time.perf_counter()
                for _ in range(3):
                    backbone(noisy, modulations[name])
                seconds[name].append((time.perf_counter() - start) / 3)
    return seconds


def training_step(backbone: Denoiser, batch: int) -> tuple[float, float]:
    """Seconds of one step of normal training, after a first, and its loss."""
    module = nn.ModuleList([backbone, conditioning_for(backbone, STEPS, STEP_DIM)]).train()
    schedule, average = NoiseSchedule(), AveragedModel(module)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    for _ in range(2):
        start = time.perf_counter()
        x_0, eps = torch.rand(batch, 16, 10) * 2 - 1, torch.randn(batch, 16, 10)
        k = torch.randint(100, (batch,))
        modulation = module[1](backbone.tau(k), torch.randn(batch, STEPS * STEP_DIM))
        loss = nn.functional.mse_loss(backbone(schedule.add_noise(x_0, eps, k), modulation), eps)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        average.update_parameters(module)
        seconds = time.perf_counter() - start
    return seconds, float(loss.detach())


def measure(arguments: Arguments) -> dict:
    """One row for each backbone and mechanism."""
    backbones = {
        name: backbone.eval().requires_grad_(False) for name, backbone in candidates(arguments).items()
    }
    seconds = denoising_seconds(backbones, arguments.rounds)
    rows = []
    for name, backbone in backbones.items():
        ratios = [mine / reference for mine, reference in zip(seconds[name], seconds[REFERENCE], strict=True)]
        row = {
            'backbone': name,
            'frozen': count(backbone),
            'conditioning': count(conditioning_for(backbone, STEPS, STEP_DIM)),
            'denoising_step_ms': 1e3 * statistics.median(seconds[name]),
            'fastest_ms': 1e3 * min(seconds[name]),
            'ratio_to_dp_mlp': statistics.median(ratios),
        }
        if arguments.train:
            backbone.requires_grad_(True)
            row['training_step_s'], row['loss'] = training_step(backbone, arguments.train)
        rows.append(row)
    return {
        'rounds': arguments.rounds,
        'threads': torch.get_num_threads(),
        'batch_of_training': arguments.train,
        'peak_memory_gib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        'torch': torch.__version__,
        'machine': platform.machine(),
        'rows': rows,
    }


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    report = measure(arguments)
    table = Table(
        title=f'{report["threads"]} thread(s), {report["rounds"]} rounds, peak {report["peak_memory_gib"]:.1f} GiB'
    )
    table.add_column('backbone')
    for column in ('frozen', 'conditioning', 'denoising step ms', 'fastest', '/ DP-MLP', 'training step s'):
        table.add_column(column, justify='right')
    for row in report['rows']:
        table.add_row(
            row['backbone'],
            f'{row["frozen"]:,}',
            f'{row["conditioning"]:,}',
            f'{row["denoising_step_ms"]:.2f}',
            f'{row["fastest_ms"]:.2f}',
            f'{row["ratio_to_dp_mlp"]:.2f}',
            f'{row["training_step_s"]:.2f}' if 'training_step_s' in row else '-',
        )
    Console(width=120).print(table)
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
