"""Tasks that change while policy_node follows one: what it takes, and what the stream of commands notices of it.

    python bench/task_swap.py                                         three minutes, docs/bench/task_swap.json
    python bench/task_swap.py --stretches 1 --stretch-s 8 --json out/bench/task_swap.json          (make bench)

policy_node with its guard, on the wall clock, commands at 50 Hz; an arm that goes where it is told and two cameras of
84 x 84 pixels at 20 Hz are processes of their own. Stretches in which the task changes every two seconds and stretches
in which it does not alternate, so that a machine whose load changes disturbs both. The tasks are one of full size that
says a circle whatever it sees, a copy of it, and one with other weights (each changed by a hundredth), all on the
backbone that stays in memory. Times of a swap are the node's own; the commands' are the middleware's times of
publication, outside of it.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from live_cell import ARM, CAMERAS, LiveRobot, commit, resources
from node_latency import RATE_HZ, SETTLE_S, Listener, spread
from ros_harness import WATCHED, NodeProcess
from told_policy import FULL, circle, save_told_policy

from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.policy.checkpoint import load_backbone, load_task, save_task

COUNTS = ('cycles', 'cycles_missed', 'holds', 'underruns', 'bridged_ticks', 'rejected_chunks')


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        stretches: of each kind.
        stretch_s: length of each.
        every_s: from one swap to the next.
        json: write the figures here.
    """

    stretches: int = 3
    stretch_s: float = 20.0
    every_s: float = 2.0
    json: Path | None = Path('docs/bench/task_swap.json')


def make_tasks(folder: Path) -> list[Path]:
    """A task, a copy, and one with other weights, which say the same: their network's blocks add nothing."""
    first = save_told_policy(folder, circle(), size=FULL)
    copy, other = folder / 'tasks' / 'copy', folder / 'tasks' / 'other'
    shutil.copytree(first, copy)
    task = load_task(first, load_backbone(folder / 'backbones' / first.name))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(
                0.01 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0
            )
    save_task(other, task)
    return [first, copy, other]


def swap(listener: Listener, task: Path) -> dict[str, float]:
    """Change the task, and wait until it is followed; what that took."""
    before = int(listener.values()['task_swaps'])
    begin = time.perf_counter()
    success, reason = listener.set_parameter('policy_node', 'task', str(task))
    answered = time.perf_counter()
    assert success, reason
    values = listener.wait_for(
        lambda: (values := listener.values()) and int(values['task_swaps']) > before and values, str(task)
    )
    assert values['task_swap'] == f'following task {str(task)!r}', values['task_swap']
    return {
        'answer_ms': 1e3 * (answered - begin),
        **{f'{name}_ms': float(values[f'task_{name}_ms']) for name in ('load', 'wait', 'swap')},
        'asked_to_followed_ms': 1e3 * (time.perf_counter() - begin),
    }


def newest(listener: Listener) -> dict[str, str]:
    """The values of the next diagnostics."""
    last = listener.received('/diagnostics')[-1:]
    listener.wait_for(lambda: last and listener.received('/diagnostics')[-1] is not last[0], 'diagnostics')
    return listener.values()


def stretch(
    listener: Listener, tasks: Any, arguments: Arguments
) -> tuple[list[dict[str, float]], dict[str, int]]:
    """One stretch, with swaps if there are tasks; the swaps, and what was counted."""
    before = newest(listener)
    end_s, swaps = time.monotonic() + arguments.stretch_s, []
    while time.monotonic() < end_s:
        begin_s = time.monotonic()
        if tasks is not None:
            swaps.append(swap(listener, next(tasks)))
        time.sleep(max(0.0, arguments.every_s - (time.monotonic() - begin_s)))
    after = newest(listener)
    return swaps, {name: int(after[name]) - int(before[name]) for name in COUNTS}


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Everything as numbers."""
    first, copy, other = make_tasks(folder)
    tasks = itertools.cycle((other, copy, first))
    listener, arm, cameras = Listener(), LiveRobot(ARM), LiveRobot(CAMERAS)
    parameters = {'task': str(first), 'autostart': True, 'control_rate_hz': RATE_HZ}
    node = NodeProcess('policy_node', folder / 'policy.log', parameters)
    counts: dict[str, dict[str, int]] = {'with_swaps': defaultdict(int), 'without': defaultdict(int)}
    periods_ms: dict[str, list[float]] = {'with_swaps': [], 'without': []}
    swaps: list[dict[str, float]] = []
    load = []
    try:
        listener.status('following')
        time.sleep(SETTLE_S)
        swap(listener, next(tasks))  # the first one loads code
        memory = [resources(node.process.pid)]
        for kind in ['without', 'with_swaps'] * arguments.stretches:
            sent = len(listener.published_ns)
            done, counted = stretch(listener, tasks if kind == 'with_swaps' else None, arguments)
            swaps += done
            for name, count in counted.items():
                counts[kind][name] += count
            periods_ms[kind] += (np.diff(listener.published_ns[sent:]) * 1e-6).tolist()
            load.append(os.getloadavg()[0])
            if kind == 'with_swaps':
                memory.append(resources(node.process.pid))
        assert WATCHED.watch is not None
        breaches = WATCHED.watch.breaches()
        assert 'Traceback' not in node.output(), node.output()
    finally:
        node.stop()
        arm.kill()
        cameras.kill()
        listener.close()
    period_ms = 1e3 / RATE_HZ
    return {
        'commit': commit(), 'cores': len(os.sched_getaffinity(0)), 'load_average': float(np.mean(load)),
        'swaps': len(swaps),
        **{name: spread(np.array([each[name] for each in swaps])) for name in swaps[0]},
        'counts': {kind: dict(counted) for kind, counted in counts.items()},
        'commands': {kind: len(values) for kind, values in periods_ms.items()},
        'period_error_ms': {
            kind: spread(np.abs(np.array(values) - period_ms)) for kind, values in periods_ms.items()
        },
        'breaches': len(breaches), 'first_breaches': breaches[:3],
        'rss_mb': [each['rss_mb'] for each in memory],
        'threads_of_the_process': [each['threads'] for each in memory],
    }  # fmt: skip


def _rounded(value: float) -> str:
    """Three digits, or all before the point."""
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def table(report: dict[str, Any]) -> str:
    """The figures as they stand in docs/tasks.md."""
    times = {
        'the exchange, with the lock held': 'swap_ms',
        'from when it is loaded until the cycle under way has ended': 'wait_ms',
        'loading, in the thread': 'load_ms',
        'answer to the parameter': 'answer_ms',
    }
    kinds = ('with_swaps', 'without')
    lines = ['| ms | median | largest |', '|---|---|---|']
    for text, name in times.items():
        lines.append(f'| {text} | {_rounded(report[name]["p50"])} | {_rounded(report[name]["max"])} |')
    lines += ['', '| | with swaps | without |', '|---|---|---|']
    for name, (with_swaps, without) in {
        'commands': [report['commands'][kind] for kind in kinds],
        **{name: [report['counts'][kind][name] for kind in kinds] for name in COUNTS},
    }.items():
        lines.append(f'| {name.replace("_", " ")} | {with_swaps:,} | {without:,} |')
    for text, name in {'median': 'p50', '99th percentile': 'p99', 'largest': 'max'}.items():
        off_ms = [f'{report["period_error_ms"][kind][name]:.1f}' for kind in kinds]
        lines.append(f'| commands off their period, {text} (ms) | {" | ".join(off_ms)} |')
    rss_mb = ', '.join(f'{each:.0f}' for each in report['rss_mb'])
    lines += [
        '',
        f'{report["swaps"]} swaps; resident memory before and after each stretch with swaps: {rss_mb} MB; '
        f'{report["breaches"]} commands beyond a limit; load average {report["load_average"]:.1f}.',
    ]
    return '\n'.join(lines)


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    with tempfile.TemporaryDirectory() as folder:
        report = measure(arguments, Path(folder))
    print(json.dumps(report, indent=1), table(report), sep='\n\n')
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
