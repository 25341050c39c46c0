"""One policy cycle beside its floor, our own reference, the paper's public code and LeRobot's, in one run.

    python bench/policy_cycle.py --theirs CHECKOUT --lerobot LEROBOT_ENV/bin/python            (make bench)

All sides take turns, round by round, so that a machine whose speed drifts slows all of them; medians are printed, and
medians of the ratios within a round. On one thread seconds are those of the processor, so that what else runs on the
machine counts for little; on more they are the clock's. Peers run in processes of their own, see `policy_side.py`;
without one its rows are left out.

- cycle: two 84x84 cameras, each with a ResNet-18 of its own, two steps; the older pictures have been encoded when they
  came. A cycle with `nothing ahead` encodes both.
- reference: `Policy.predict_naive`, all of the network in every denoising step.
- floor: the products of the backbone's matrices alone, as often as there are denoising steps, with the engine's own
  product; so its rate is the best that was found here for these shapes. `mkl` is the same with `torch.nn.Linear`.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.policy import Backbone, Policy, Task
from decoupled_policy_ros.policy.backbones import BACKBONES
from decoupled_policy_ros.policy.packed import PRECISIONS, PackedLinear, usable_precisions
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.runtime.engine import Engine

Observation = dict[str, tuple[NDArray, ...]]
#: Milliseconds of a side's parts; a side that has not all parts gives fewer.
Timings = dict[str, float]
Side = Callable[[Observation], Timings]
#: What runs in every so many rounds only is what takes seconds: it does not run before the first one, either.
LONG = 25


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        theirs: checkout of the paper's public code.
        theirs_python: Python with its requirements (torchvision, diffusers, einops).
        lerobot: Python that has lerobot.
        robot: robot description.
        backbone: kind of backbone, with its default sizes.
        threads: numbers of CPU threads to measure with.
        widths: channels of the ResNets after the stem: 64 is full width, the shipped task has 16.
        rounds: measured rounds; what takes long runs in some of them.
        all: also what takes many seconds: 100 steps of the reference and of the peers.
        json: write the figures here; those of other numbers of threads and widths that are in it stay.
    """

    theirs: Path | None = None
    theirs_python: str = sys.executable
    lerobot: str | None = None
    robot: str = 'panda_sim'
    backbone: str = 'dp_mlp'
    threads: tuple[int, ...] = (1, 2)
    widths: tuple[int, ...] = (64, 16)
    rounds: int = 17
    all: bool = True
    json: Path | None = Path('docs/bench/policy_cycle.json')


class TimedEngine(Engine):
    """An engine that takes the time by the clock of this bench."""

    def _now_s(self) -> float:
        return now_s()


def now_s() -> float:
    """Seconds of the processor on one thread, of the clock on more."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def untrained(arguments: Arguments, width: int) -> Policy:
    """A policy of the paper's sizes."""
    torch.manual_seed(0)
    robot = load_robot(arguments.robot)
    backbone = Backbone(BACKBONES[arguments.backbone](None), Fingerprint.of(robot, 20.0))
    cameras = [StreamSpec(name, 'image', (84, 84, 3), 0.2) for name in ('agentview', 'wrist')]
    contract = ObservationContract(
        20.0, 2, (*cameras, StreamSpec('proprioception', 'proprioception', (9,), 0.2)), 0.1
    )
    return Policy(backbone, Task(contract, backbone, {'crop': 76, 'base_channels': width}), robot)


def observed(contract: ObservationContract, rng: np.random.Generator) -> Observation:
    """Frames that nobody has seen, as the sampler gives them."""
    observation: Observation = {}
    for s in contract.streams:
        shape = (contract.n_obs_steps, *s.shape)
        whole = rng.integers(0, 256, shape, np.uint8) if s.kind == 'image' else rng.random(shape, np.float32)
        whole.flags.writeable = False
        observation[s.name] = tuple(whole)
    return observation


def cycle(engine: Engine, samples: int = 1, ahead: bool = True) -> Side:
    """Our cycle; the older frames are encoded before the clock starts."""

    def side(observation: Observation) -> Timings:
        while ahead and engine.ahead({name: frames[0] for name, frames in observation.items()}):
            pass
        return engine(observation, samples=samples).timings_ms

    return side


def reference(policy: Policy, steps: int) -> Side:
    """The same computed naively."""

    def side(observation: Observation) -> Timings:
        batch = {name: torch.from_numpy(np.stack(frames))[None] for name, frames in observation.items()}
        start = now_s()
        policy.predict_naive(batch, torch.randn(1, 16, 10), steps)
        return {'total': 1e3 * (now_s() - start)}

    return side


def products(policy: Policy, steps: int, samples: int, precision: str | None) -> Side:
    """The floor: the backbone's products alone; `torch.nn.Linear` itself without a precision."""
    layers = [m for m in policy.backbone.denoiser.blocks.modules() if isinstance(m, torch.nn.Linear)]
    dtype = PRECISIONS[precision or 'float32']
    run = layers if precision is None else [PackedLinear.of(layer, 16, dtype) for layer in layers]
    inputs = {n: torch.randn(1, 16 * samples, n).to(dtype) for n in {layer.in_features for layer in layers}}
    work = [(product, inputs[layer.in_features]) for product, layer in zip(run, layers, strict=True)]

    def side(observation: Observation) -> Timings:
        with torch.inference_mode():
            start = now_s()
            for _ in range(steps):
                for product, x in work:
                    product(x)
            return {'denoise': 1e3 * (now_s() - start)}

    return side


@contextlib.contextmanager
def peer(command: list[str]) -> Iterator[tuple[dict, Callable[[int], Side]]]:
    """A process of `policy_side.py`: what it says of itself, and its sides by number of denoising steps."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    given, answers = process.stdin, process.stdout

    def ask(steps: int) -> Timings:
        print(steps, file=given, flush=True)
        return json.loads(answers.readline())

    try:
        yield json.loads(answers.readline()), lambda steps: lambda observation: ask(steps)
    finally:
        given.close()
        process.wait()


def measure(
    sides: dict[str, tuple[Side, int]], policy: Policy, rounds: int
) -> dict[str, list[Timings | None]]:
    """Timings of each side in each round, after one that does not count; of some only in every n-th round."""
    rng = np.random.default_rng(0)
    timings: dict[str, list[Timings | None]] = {name: [] for name in sides}
    for number in range(-1, rounds):
        for name, (side, every) in sides.items():
            taken = (
                side(observed(policy.contract, rng))
                if number % every == 0 or (number < 0 and every < LONG)
                else None
            )
            if number >= 0:
                timings[name].append(taken)
    return timings


def each(
    timings: dict[str, list[Timings | None]], of: Callable[[Iterable[float]], float]
) -> dict[str, Timings]:
    """The median, or another figure, of each side's parts, in milliseconds."""
    found = {name: [t for t in values if t is not None] for name, values in timings.items()}
    return {
        name: {part: of([t[part] for t in values]) for part in values[0]} for name, values in found.items()
    }


def ratio(timings: dict[str, list[Timings | None]], above: str, below: str, part: str) -> dict[str, float]:
    """Median and range of one side over another within a round."""
    pairs = zip(timings[above], timings[below], strict=True)
    values = [a[part] / b[part] for a, b in pairs if a is not None and b is not None]
    return {'median': statistics.median(values), 'least': min(values), 'most': max(values)}


def largest_difference(policy: Policy, engine: Engine, steps: int) -> float:
    """Of chunks from the reference's, whose numbers are in [-1, 1], over ten observations."""
    rng, largest = np.random.default_rng(1), 0.0
    for seed in range(10):
        observation = observed(policy.contract, rng)
        engine.reset(seed)
        noise = torch.randn(1, 16, 10, generator=torch.Generator().manual_seed(seed))
        batch = {name: torch.from_numpy(np.stack(frames))[None] for name, frames in observation.items()}
        naive = policy.predict_naive(batch, noise, steps)[0].numpy()
        largest = max(largest, float(np.abs(engine(observation).actions - naive).max()))
    return largest


def our_sides(policy: Policy, engines: dict[str, Engine], full: bool) -> dict[str, tuple[Side, int]]:
    """What is measured of ours; the number says in every how many rounds."""
    sides: dict[str, tuple[Side, int]] = {'reference 10': (reference(policy, 10), 5)}
    for precision, engine in engines.items():
        sides[f'{precision} 10'] = cycle(engine), 1
        sides[f'{precision} 10 nothing ahead'] = cycle(engine, ahead=False), 1
        sides[f'{precision} 10 K8'] = cycle(engine, samples=8), 1
        sides[f'floor {precision} 10'] = products(policy, 10, 1, precision), 1
        if full:
            sides[f'{precision} 100'] = cycle(TimedEngine(policy, 100, precision=precision)), 5
            sides[f'floor {precision} 10 K8'] = products(policy, 10, 8, precision), 1
    if full:
        sides['reference 100'] = reference(policy, 100), LONG
        sides['floor mkl 10'] = products(policy, 10, 1, None), 1
    return sides


def ratios_of(timings: dict[str, list[Timings | None]]) -> dict[str, dict[str, float]]:
    """Those that say something, of the sides that there are."""
    wanted = [('reference 10', 'float32 10', 'total'), ('reference 100', 'float32 100', 'total')]
    for precision in PRECISIONS:
        wanted += [
            (f'{precision} 10', f'floor {precision} 10', 'denoise'),
            (f'{precision} 10 K8', f'floor {precision} 10 K8', 'denoise'),
            (f'floor {precision} 10 K8', f'floor {precision} 10', 'denoise'),
            (f'{precision} 10 K8', f'{precision} 10', 'denoise'),
            (f'{precision} 10 K8', f'{precision} 10', 'total'),
        ]
        for theirs in ('paper', 'lerobot'):
            for their_steps in (10, 100):
                wanted += [
                    (f'{theirs} {their_steps}', f'{precision} 10', part) for part in ('total', 'denoise')
                ]
    there = [(a, b, part) for a, b, part in wanted if a in timings and b in timings]
    return {f'{part}: {a} / {b}': ratio(timings, a, b, part) for a, b, part in there}


def run(arguments: Arguments, threads: int, width: int) -> dict:
    """All figures for one number of threads and one width; peers take part at full width."""
    torch.set_num_threads(threads)
    full = width == max(arguments.widths)
    policy = untrained(arguments, width)
    here = usable_precisions(torch.device('cpu'))
    engines = {precision: TimedEngine(policy, 10, precision=precision) for precision in here}
    sides = our_sides(policy, engines, full)
    side = [str(Path(__file__).with_name('policy_side.py'))]
    commands = {}
    if full and arguments.theirs:
        commands['paper'] = [arguments.theirs_python, *side, 'paper', str(arguments.theirs), str(threads)]
    if full and arguments.lerobot:
        commands['lerobot'] = [arguments.lerobot, *side, 'lerobot', str(threads)]
    described = {}
    if not arguments.all:
        sides = {name: (side, every) for name, (side, every) in sides.items() if every < LONG}
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            described[name], made = stack.enter_context(peer(command))
            sides[f'{name} 10'] = made(10), 8
            if arguments.all:
                sides[f'{name} 100'] = made(100), 5 if name == 'paper' else LONG
        timings = measure(sides, policy, arguments.rounds)
    found = {
        'threads': threads,
        'width': width,
        'backbone': arguments.backbone,
        'rounds': arguments.rounds,
        'torch': torch.__version__,
        'machine': platform.machine(),
        'median_ms': each(timings, statistics.median),
        'least_ms': each(timings, min),
        'ratios': ratios_of(timings),
        'peers': described,
        'largest_difference': largest_difference(policy, engines['float32'], 10),
    }
    layers = [m for m in policy.backbone.denoiser.blocks.modules() if isinstance(m, torch.nn.Linear)]
    flop = 2 * 16 * 10 * sum(layer.weight.numel() for layer in layers)
    found['gflops'] = {
        name: flop * (8 if name.endswith('K8') else 1) / parts['denoise'] / 1e6
        for name, parts in found['median_ms'].items()
        if name.startswith('floor')
    }
    return found


def medians(median_ms: dict[str, Timings], title: str) -> Table:
    """The parts of each side."""
    parts = ('encode', 'modulate', 'denoise', 'total')
    table = Table('side', *parts, title=title)
    for name, taken in median_ms.items():
        table.add_row(name, *(f'{taken[p]:.2f}' if p in taken else '' for p in parts))
    return table


def show(found: dict) -> None:
    """Medians and ratios as tables."""
    console = Console(width=110)
    title = f'median ms, {found["threads"]} thread(s), ResNet-18 of {found["width"]} channels'
    console.print(medians(found['median_ms'], title))
    table = Table('ratio', 'median', 'least', 'most')
    for name, values in found['ratios'].items():
        table.add_row(name, *(f'{v:.2f}' for v in values.values()))
    console.print(table)
    for key in ('gflops', 'largest_difference', 'peers'):
        console.print(key, found.get(key))


def save(path: Path, found: dict) -> None:
    """Put one run's figures in the place of those of the same number of threads and width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.is_file() else []
    runs = {(r['threads'], r['width']): r for r in [*before, found]}
    path.write_text(json.dumps([runs[key] for key in sorted(runs)], indent=1) + '\n')


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    for threads in arguments.threads:
        for width in arguments.widths:
            found = run(arguments, threads, width)
            show(found)
            if arguments.json:
                save(arguments.json, found)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
