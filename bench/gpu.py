"""One policy cycle on a GPU: launched kernel by kernel and recorded as graphs, taking turns in one run.

    python bench/gpu.py

The policy has full size and random weights: two 84x84 cameras, each with a ResNet-18 of 64 channels, two steps, the
older pictures encoded when they came. Milliseconds are the clock's, with the GPU waited for after each part.

- reference: `Policy.predict_naive`, all of the network in every denoising step.
- plain: our engine with every kernel launched by Python.
- recorded: our engine as it runs.
"""

from __future__ import annotations

import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from policy_cycle import Arguments as CycleArguments
from policy_cycle import (
    Observation,
    Side,
    Timings,
    cycle,
    each,
    largest_difference,
    measure,
    medians,
    ratio,
    untrained,
)
from rich.console import Console

from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.policy import Policy
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.runtime.fused import Network, PlainNetwork


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        device: of the GPU.
        backbones: kinds, with their default sizes.
        rounds: measured rounds.
        json: write the figures here.
    """

    device: str = 'cuda'
    backbones: tuple[str, ...] = ('dp_mixer', 'dp_mlp')
    rounds: int = 50
    json: Path | None = Path('docs/bench/gpu.json')


class PlainEngine(Engine):
    """Every kernel launched by Python."""

    def __init__(self, policy: Policy, steps: int, device: str):
        super().__init__(policy, steps, device=device)
        self.features._pictures = {
            name: policy.task.encoder.streams[name] for name in self.features._pictures
        }

    def _network(self, dtype: torch.dtype) -> Network:
        return PlainNetwork(self.backbone.denoiser)


def reference(policy: Policy, device: str) -> Side:
    """The naive cycle."""

    def side(observation: Observation) -> Timings:
        batch = {name: torch.from_numpy(np.stack(f))[None].to(device) for name, f in observation.items()}
        start = time.perf_counter()
        policy.predict_naive(batch, torch.randn(1, 16, 10, device=device), 10).cpu()
        return {'total': 1e3 * (time.perf_counter() - start)}

    return side


def run(arguments: Arguments, backbone: str) -> dict:
    """All figures of one backbone."""
    policy, on_processor = (untrained(CycleArguments(backbone=backbone), 64) for _ in range(2))
    device, set_up_s, sides = arguments.device, {}, {}
    engines: dict[str, Engine] = {}
    for name, kind in {'plain': PlainEngine, 'recorded': Engine}.items():
        start = time.perf_counter()
        engines[name] = kind(policy, 10, device=device)
        for samples in (1, 8):
            engines[name].warm_up(samples=samples)
            sides[f'{name} 10' + (f' K{samples}' if samples > 1 else '')] = cycle(engines[name], samples), 1
        set_up_s[name] = time.perf_counter() - start
    sides['reference 10'] = reference(policy, device), 1
    sides['recorded 100'] = cycle(Engine(policy, 100, device=device)), 5
    timings = measure(sides, policy, arguments.rounds)
    wanted = [('reference 10', 'recorded 10', 'total'), ('recorded 10 K8', 'recorded 10', 'total')]
    wanted += [('plain 10', 'recorded 10', part) for part in ('denoise', 'total')]
    return {
        'median_ms': each(timings, statistics.median),
        'p99_ms': each(timings, lambda values: float(np.quantile(list(values), 0.99))),
        'ratios': {f'{part}: {a} / {b}': ratio(timings, a, b, part) for a, b, part in wanted},
        'set_up_s': set_up_s,
        'largest_difference': largest_difference(on_processor, engines['recorded'], 10),
    }


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    warnings.filterwarnings('ignore')
    console, report = Console(width=110), {}
    for backbone in arguments.backbones:
        found = report[backbone] = run(arguments, backbone)
        console.print(medians(found['median_ms'], f'median ms, {backbone}'))
        console.print({name: round(values['median'], 2) for name, values in found['ratios'].items()})
        console.print('set-up s', found['set_up_s'], 'largest difference', found['largest_difference'])
    if arguments.json:
        about = {
            'gpu': torch.cuda.get_device_name(arguments.device),
            'torch': torch.__version__,
            'rounds': arguments.rounds,
        }
        write_json(arguments.json, about | report)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
