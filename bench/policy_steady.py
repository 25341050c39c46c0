"""Whether the first policy cycle is like all others, and memory like before it.

    python bench/policy_steady.py                                                     (make bench)

The policy is that of `policy_cycle.py`, at the width of the shipped task; pictures are new in every cycle, so that
nothing is taken from memory.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import threading
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from policy_cycle import Arguments as Sizes
from policy_cycle import TimedEngine, cycle, observed, untrained
from rich.console import Console

from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.policy import Policy
from decoupled_policy_ros.policy.packed import usable_precisions
from decoupled_policy_ros.runtime.engine import Engine


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        width: channels of the ResNets after the stem.
        cycles: over which memory is watched.
        json: write the figures here.
    """

    width: int = 16
    cycles: int = 3000
    json: Path | None = Path('docs/bench/policy_steady.json')


def first_cycle(policy: Policy, precision: str) -> dict[str, float]:
    """Milliseconds of the first cycle of a new engine in a new thread, and of those after it; medians of nine."""
    rng, firsts, later = np.random.default_rng(2), [], []
    for _ in range(9):
        engine, taken = TimedEngine(policy, 10, precision=precision), []

        def work(engine: Engine = engine, taken: list[float] = taken) -> None:
            taken.extend(engine(observed(policy.contract, rng)).timings_ms['total'] for _ in range(9))

        engine.warm_up()
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
        firsts.append(taken[0])
        later.append(statistics.median(taken[1:]))
    return {'first': statistics.median(firsts), 'eight_after': statistics.median(later), 'firsts': firsts}


def memory(engine: Engine, policy: Policy, cycles: int) -> dict[str, float]:
    """Growth (kB) of resident memory, and of what Python has allocated, over so many cycles after a hundred."""
    rng = np.random.default_rng(3)
    side = cycle(engine)

    def run(count: int) -> None:
        for _ in range(count):
            side(observed(policy.contract, rng))
        gc.collect()

    def resident_kb() -> float:
        return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1024

    run(100)
    before = resident_kb()
    run(cycles)
    grown = resident_kb() - before
    tracemalloc.start()
    run(20)
    traced = tracemalloc.get_traced_memory()[0]
    run(cycles // 10)
    traced_grown = (tracemalloc.get_traced_memory()[0] - traced) / 1024
    tracemalloc.stop()
    return {'cycles': cycles, 'resident_kb': grown, 'traced_cycles': cycles // 10, 'traced_kb': traced_grown}


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    torch.set_num_threads(1)
    policy = untrained(Sizes(), arguments.width)
    report: dict = {'torch': torch.__version__, 'machine': platform.machine(), 'width': arguments.width}
    for precision in usable_precisions(torch.device('cpu')):
        engine = TimedEngine(policy, 10, precision=precision)
        report[precision] = {'first_cycle_ms': first_cycle(policy, precision)}
        report[precision]['memory'] = memory(engine, policy, arguments.cycles)
    Console().print(report)
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
