"""`decoupled-policy demo`: simulator and policy node as separate processes, episodes, a table, a video."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rclpy
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.nodes.demo_client import POLICY, SIMULATOR, DemoClient, DemoError
from decoupled_policy_ros.nodes.demo_film import Film, compose
from decoupled_policy_ros.nodes.signals import interrupt_later, interrupted_by_all
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.sim.tasks import sim_task

RATE_HZ = 20
FILM_EVERY = 2
START_TIMEOUT_S, CALL_TIMEOUT_S = 180.0, 60.0
#: Simulated time that the camera keeps running after a success.
AFTERWARDS_S = 0.4


@dataclass(frozen=True)
class Episode:
    """What became of one episode."""

    number: int
    seed: int
    success: bool
    sim_s: float
    wall_s: float
    cycles: int
    holds: int
    held_because: str  # the last time; empty if it never was


def run_demo(
    task: str = 'lift',
    episodes: int = 10,
    out: Path = Path('out/demo'),
    sim: str = 'lift',
    seed: int = 0,
    max_s: float | None = None,
    guard: bool = True,
) -> dict[str, Any]:
    """Run episodes and leave summary.json, demo.mp4, demo.png and the nodes' logs in `out`.

    Args:
        task: folder of a task, or name of one in models/tasks.
        episodes: how many.
        out: folder for what it leaves.
        sim: the simulated task, see `sim.tasks`.
        seed: the first scene is that of seed + 1; each further episode adds one.
        max_s: simulated seconds after which an episode has failed; the task's own by default.
        guard: whether chunks go through the guard.

    Returns:
        What is in summary.json.

    Raises:
        DemoError: a process ended or refused; its own message and the log's path are in the error.
        SimulationError, RobotDescriptionError: `sim` is unknown, or the simulated robot can't be read.
    """
    console = Console()
    max_s = max_s or sim_task(sim).max_steps / RATE_HZ
    robot = load_robot('panda_sim')
    out.mkdir(parents=True, exist_ok=True)
    domain = _free_domain()
    os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
    os.environ.setdefault('AMENT_PREFIX_PATH', sys.prefix)  # where PyPI's ROS 2 wheels look for themselves
    commands = {SIMULATOR: _simulator(sim, seed), POLICY: _policy(task, guard)}
    with interrupted_by_all(), _processes(commands, out, domain) as processes, _context(domain) as context:
        client = DemoClient(robot, context, processes.check)
        with console.status('starting simulator and policy'):
            try:
                client.activate_policy(START_TIMEOUT_S)
            except DemoError as error:
                raise DemoError(f'{error}: {processes.last_line(POLICY)}') from error
            client.wait_for_simulator(START_TIMEOUT_S)
        results = []
        with Film(out, RATE_HZ // FILM_EVERY) as film:
            for number in range(1, episodes + 1):
                with console.status(f'episode {number} of {episodes}'):
                    results.append(_episode(client, film, number, max_s))
                console.print(_line(results[-1]), highlight=False, soft_wrap=True)
        diagnostics = client.diagnostics(CALL_TIMEOUT_S)
        client.destroy_node()
    summary = _summary(task, sim, results, diagnostics)
    write_json(out / 'summary.json', summary)
    console.print(_table(summary))
    console.print(
        f'{out}: summary.json, {film.video.name}, {film.picture.name}, logs', highlight=False, soft_wrap=True
    )
    return summary


def _episode(client: DemoClient, film: Film, number: int, max_s: float) -> Episode:
    start_wall = time.monotonic()
    seed = int(client.begin_episode(CALL_TIMEOUT_S).removeprefix('seed '))
    client.wait_until(lambda: client.start_ns, 'the first chunk of an episode', CALL_TIMEOUT_S)

    def elapsed_s() -> float:
        return (client.now_ns - client.start_ns) * 1e-9

    def film_it() -> None:
        said = 'done' if client.succeeded else ''
        insets = {name: image for name, image in client.images.items() if name != 'overview'}
        caption = f'episode {number}   {elapsed_s():4.1f} s   {said}'
        film.add(compose(client.images['overview'], insets, caption, client.succeeded))

    client.on_overview = film_it
    client.wait_until(
        lambda: client.succeeded or elapsed_s() >= max_s, 'the end of an episode', 60 * CALL_TIMEOUT_S
    )
    success, sim_s, cycles, holds = client.succeeded, elapsed_s(), client.cycles, client.holds
    because = client.held_because
    wall_s = time.monotonic() - start_wall
    if success:
        client.wait_until(lambda: elapsed_s() >= sim_s + AFTERWARDS_S, 'the simulated clock', CALL_TIMEOUT_S)
        sim_s = (client.success_ns - client.start_ns) * 1e-9
    client.on_overview = lambda: None
    client.end_episode(CALL_TIMEOUT_S)
    film.end_episode(success)
    return Episode(number, seed, success, round(sim_s, 2), round(wall_s, 2), cycles, holds, because)


def _line(episode: Episode) -> str:
    outcome = '[green]success[/]' if episode.success else '[red]failure[/]'
    because = f': {escape(episode.held_because)}' if episode.holds else ''
    return (
        f'episode {episode.number:2d}  seed {episode.seed:3d}  {outcome}  {episode.sim_s:5.2f} s simulated in '
        f'{episode.wall_s:5.1f} s  {episode.cycles:3d} cycles  {episode.holds} holds{because}'
    )


def _summary(task: str, sim: str, results: list[Episode], diagnostics: dict[str, str]) -> dict[str, Any]:
    latency_ms: dict[str, dict[str, float]] = {}
    for key, value in diagnostics.items():
        if key.startswith('latency_'):
            stage, percentile = key.removeprefix('latency_').removesuffix('_ms').rsplit('_', 1)
            latency_ms.setdefault(stage, {})[percentile] = float(value)
    return {
        'task': task,
        'simulated_task': sim,
        'episodes': len(results),
        'successes': sum(result.success for result in results),
        'cycles': sum(result.cycles for result in results),
        'holds': sum(result.holds for result in results),
        'underruns': int(diagnostics['underruns']),
        'rejected_chunks': int(diagnostics['rejected_chunks']),
        'latency_ms': latency_ms,
        'results': [asdict(result) for result in results],
    }


def _table(summary: dict[str, Any]) -> Table:
    table = Table(
        title=f'{summary["task"]}: {summary["successes"]} of {summary["episodes"]} episodes succeeded'
    )
    table.add_column('policy cycle, stage')
    for column in ('p50 (ms)', 'p99 (ms)'):
        table.add_column(column, justify='right')
    for stage, values in summary['latency_ms'].items():
        table.add_row(stage, f'{values["p50"]:.1f}', f'{values["p99"]:.1f}', end_section=stage == 'total')
    table.caption = ', '.join(
        f'{summary[key]} {key.replace("_", " ")}'
        for key in ('cycles', 'rejected_chunks', 'holds', 'underruns')
    )
    return table


# --- processes -------------------------------------------------------------------------------------


class _Processes:
    """The two nodes, each with a log; ended by their own ids."""

    def __init__(self, names: Iterable[str], out: Path):
        self._logs = {name: out / f'{name}.log' for name in names}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, commands: dict[str, list[str]], domain: int) -> None:
        """Start each in a session of its own: a Ctrl-C reaches this process only, which then ends them in order."""
        environment = {**os.environ, 'ROS_DOMAIN_ID': str(domain)}
        for name, command in commands.items():
            with self._logs[name].open('wb') as log:
                self._running[name] = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )

    def check(self) -> None:
        """Raise DemoError if one has ended."""
        for name, process in self._running.items():
            if process.poll() is not None:
                raise DemoError(f'{name} ended with status {process.returncode}: {self.last_line(name)}')

    def last_line(self, name: str) -> str:
        """The last error that a node logged, or its last line, and where the rest is."""
        lines = [line for line in self._logs[name].read_text(errors='replace').splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(('[ERROR]', '[FATAL]'))]
        return f'{(errors or lines or ["it said nothing"])[-1]} (see {self._logs[name]})'

    def end(self) -> None:
        """Ask each to end, wait, and insist where asking does not help."""
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in self._running.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _processes(commands: dict[str, list[str]], out: Path, domain: int) -> Iterator[_Processes]:
    processes = _Processes(commands, out)
    try:
        with interrupt_later():
            processes.start(commands, domain)
        yield processes
    finally:
        processes.end()


@contextmanager
def _context(domain: int) -> Iterator[rclpy.Context]:
    context = rclpy.Context()
    rclpy.init(args=[], context=context, domain_id=domain)
    try:
        yield context
    finally:
        context.try_shutdown()


def _simulator(task: str, seed: int) -> list[str]:
    return _command(
        SIMULATOR,
        task=f"'{task}'",
        seed=seed,
        real_time_factor=0.0,
        lockstep_timeout_s=CALL_TIMEOUT_S,
        overview_every=FILM_EVERY,
        overview_height=480,
        overview_width=640,
    )


def _policy(task: str, guard: bool) -> list[str]:
    options = {'use_sim_time': 'true', 'lockstep': 'true', 'enabled': 'false', 'guard': str(guard).lower()}
    return _command(POLICY, task=f"'{task}'", **options)


def _command(node: str, **parameters: object) -> list[str]:
    pairs = [argument for name, value in parameters.items() for argument in ('-p', f'{name}:={value}')]
    return [sys.executable, '-m', f'decoupled_policy_ros.nodes.{node}', '--ros-args', *pairs]


def _free_domain() -> int:
    """A ROS domain whose first DDS port is free: another demo on this machine has one of its own."""
    domains = range(1, 102)  # beyond that the ports overlap those that Linux gives to outgoing connections
    start = os.getpid() % len(domains)
    for domain in [*domains[start:], *domains[:start]]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(('', 7400 + 250 * domain))
                return domain
            except OSError:
                continue
    raise DemoError('no ROS domain is free on this machine')
