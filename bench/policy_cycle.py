"""One policy cycle by stage, beside the same cycle computed naively, in one run.

    python bench/policy_cycle.py                                                    (make bench)

Naive means what a first implementation does: in every denoising step the observation is encoded, the
conditioning network runs on [tau ; features], and the backbone denoises. Ours encodes once, adds the constant
timestep table to one matrix-vector product, and loops through the backbone alone. Both give the same chunk.
Cycles alternate, so that a machine whose speed drifts slows both; medians and their ratio are printed.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from decoupled_policy_ros.policy import load_policy
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.runtime.engine import Engine


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        task: task folder or name.
        robot: robot description.
        cycles: measured cycles of each kind.
        threads: CPU threads, as the policy node's parameter.
        json: write the figures here.
    """

    task: str = 'lift'
    robot: str = 'panda_sim'
    cycles: int = 30
    threads: int = 1
    json: Path | None = Path('docs/bench/policy_cycle.json')


def gemm_gflops() -> float:
    """Rate of the backbone's own matrix product (16 x 256 by 256 x 1024), float32."""
    layer, x = torch.nn.Linear(256, 1024), torch.randn(16, 256)
    with torch.inference_mode():
        for _ in range(200):
            layer(x)
        start = time.perf_counter()
        for _ in range(2000):
            layer(x)
    return 2 * 16 * 256 * 1024 * 2000 / (time.perf_counter() - start) / 1e9


def measure(arguments: Arguments) -> dict:
    """Median milliseconds of both, by stage, for 10 and 100 denoising steps."""
    policy = load_policy(arguments.task, load_robot(arguments.robot))
    rng = np.random.default_rng(0)
    observation = {
        s.name: rng.integers(0, 256, (policy.contract.n_obs_steps, *s.shape)).astype(np.uint8)
        if s.kind == 'image'
        else rng.normal(size=(policy.contract.n_obs_steps, *s.shape)).astype('f')
        for s in policy.contract.streams
    }
    batch = {name: torch.from_numpy(array)[None] for name, array in observation.items()}
    figures = []
    for steps, cycles in ((10, arguments.cycles), (100, max(3, arguments.cycles // 10))):
        engine = Engine(policy, steps)
        engine.warm_up()
        timings, naive, difference = [], [], 0.0
        for cycle in range(cycles):
            engine.reset(cycle)
            prediction = engine(observation)
            timings.append(prediction.timings_ms)
            noise = torch.randn(1, 16, 10, generator=torch.Generator().manual_seed(cycle))
            start = time.perf_counter()
            chunk = policy.predict_naive(batch, noise, steps)
            naive.append(1e3 * (time.perf_counter() - start))
            difference = max(difference, float(np.abs(chunk[0].numpy() - prediction.actions).max()))
        ours = {stage: statistics.median(t[stage] for t in timings) for stage in timings[0]}
        ratios = [n / t['total'] for n, t in zip(naive, timings, strict=True)]
        figures.append(
            {
                'denoising_steps': steps,
                'cycles': cycles,
                'ours_ms': ours,
                'naive_ms': statistics.median(naive),
                'ratio': statistics.median(ratios),
                'ratio_min': min(ratios),
                'ratio_max': max(ratios),
                'largest_difference': difference,
            }
        )
    gflops = gemm_gflops()
    flop = (
        2
        * 16
        * sum(
            p.numel()
            for n, p in policy.backbone.denoiser.named_parameters()
            if n.startswith('blocks') and p.dim() > 1
        )
    )
    for figure in figures:
        figure['denoise_floor_ms'] = flop * figure['denoising_steps'] / gflops / 1e6
    return {
        'task': arguments.task,
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'machine': platform.machine(),
        'gemm_gflops': gflops,
        'figures': figures,
    }


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    torch.set_num_threads(arguments.threads)
    report = measure(arguments)
    table = Table(title=f'policy cycle, median ms, {report["threads"]} threads')
    for column in (
        'denoising steps',
        'encode',
        'modulate',
        'denoise',
        'total',
        'naive total',
        'naive / ours',
        'denoise / floor',
    ):
        table.add_column(column, justify='right')
    for f in report['figures']:
        ours = f['ours_ms']
        table.add_row(
            str(f['denoising_steps']),
            *[f'{ours[k]:.2f}' for k in ('encode', 'modulate', 'denoise', 'total')],
            f'{f["naive_ms"]:.1f}',
            f'{f["ratio"]:.1f}',
            f'{ours["denoise"] / f["denoise_floor_ms"]:.1f}',
        )
    Console(width=110).print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main(tyro.cli(Arguments))
