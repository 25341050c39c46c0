"""Hours of a policy with its guard, beside an arm, cameras and random faults; every command is looked at.

    python bench/soak.py                            an hour, docs/bench/soak.json
    python bench/soak.py --minutes 3 --seed 1 --json out/soak.json

The arm and the cameras are processes of their own, in real time, on a /clock that faults make jump. The network has the
size of the shipped one; its weights say circles, so that the arm moves all the time. Faults come one after the other,
at random times; each has to be recovered from. The report holds what broke a limit (nothing should), how long
recoveries took, and whether memory, file descriptors, threads and latencies stay what they are.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from live_cell import ARM, CAMERAS, LiveRobot, Watcher, commit, resources
from rich.console import Console
from rich.table import Table
from ros_harness import WATCHED, NodeProcess
from std_msgs.msg import String
from std_srvs.srv import SetBool
from told_policy import FULL, circle, save_told_policy
from untrained import save_untrained_task

from decoupled_policy_ros.files import write_json

#: A fault that is not recovered from in so long (s) never is.
LOST_S = 90.0
#: A process has its size after so long (s): the first tasks that are swapped take memory that stays its own.
SETTLED_S = 180.0
#: How often resources are looked at, and the commands (s).
LOOK_S = 5.0


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        minutes: how long.
        seed: of the faults and their times.
        every_s: mean time from one recovery to the next fault.
        json: write the report here.
    """

    minutes: float = 60.0
    seed: int = 0
    every_s: float = 5.0
    json: Path | None = Path('docs/bench/soak.json')


@dataclass
class Life:
    """One process of the policy, from its start to its end."""

    began_s: float
    samples: list[dict[str, float]] = field(default_factory=list)

    def settled(self) -> list[dict[str, float]]:
        """Samples after the time in which a process grows to its size."""
        return [sample for sample in self.samples if sample['t_s'] - self.began_s > SETTLED_S]


class Soak:
    """The processes and what becomes of them."""

    def __init__(self, arguments: Arguments, folder: Path):
        self.random, self.folder = random.Random(arguments.seed), folder
        self.started_s, self.commit = time.monotonic(), commit()
        models = folder / 'models'
        self.tasks = [save_told_policy(models, circle(), 'told', size=FULL)]
        self.tasks.append(save_untrained_task(models / 'tasks' / 'other', models / 'backbones' / 'told'))
        self.task = 0
        broken = models / 'tasks' / 'broken'
        broken.mkdir()
        for file in self.tasks[0].iterdir():
            (broken / file.name).write_bytes(file.read_bytes()[:-7])
        self.broken = broken
        self.watcher = Watcher()
        self.instructions = self.watcher.create_publisher(String, 'policy_node/instruction', 10)
        self.arm = LiveRobot(ARM, '--clock-hz', '100')
        self.cameras = LiveRobot(CAMERAS, '--use-sim-time')
        self.clock_s, self.starts = 0.0, 0
        self.lives: list[Life] = []
        self.breaches: list[str] = []
        self.recoveries: dict[str, list[float]] = {}
        self.lost: list[str] = []
        self.refused: dict[str, int] = {'tasks': 0, 'instructions': 0}
        self.tracebacks: list[str] = []
        self.start_policy()

    def start_policy(self) -> None:
        """Start the policy's process."""
        self.starts += 1
        parameters = {
            'task': str(self.tasks[self.task]), 'use_sim_time': True, 'autostart': True, 'enabled': True,
        }  # fmt: skip
        log = self.folder / f'policy_{self.starts}.log'
        self.policy = NodeProcess('policy_node', log, parameters)
        self.lives.append(Life(self.now_s()))

    def end_policy(self) -> None:
        """Kill it, and look at what it has printed."""
        self.policy.process.kill()
        self.policy.stop()
        if 'Traceback' in self.policy.output():
            self.tracebacks.append(self.policy.output()[-2000:])

    def now_s(self) -> float:
        """Time since the beginning (s)."""
        return time.monotonic() - self.started_s

    # --- faults ---------------------------------------------------------------------------------

    def faults(self) -> dict[str, tuple[float, Callable[[], None]]]:
        """Faults by name, each with how often it comes and what it does."""
        return {
            'stream lost': (3.0, self.lose_stream),
            'stream late': (2.0, self.late_stream),
            'zero stamps': (1.0, self.zero_stamps),
            'joints not finite': (1.0, self.joints_not_finite),
            'cameras killed and restarted': (1.0, self.restart_cameras),
            'clock forward': (1.0, lambda: self.jump(self.random.uniform(0.5, 5.0))),
            'clock back': (1.0, lambda: self.jump(-self.random.uniform(0.5, 5.0))),
            'clock stands': (1.0, self.clock_stands),
            'instruction of garbage': (1.0, self.garbage),
            'another task': (2.0, self.swap),
            'a broken task': (1.0, self.swap_to_broken),
            'disabled and enabled': (1.0, self.disable),
            'deactivated and activated': (1.0, self.deactivate),
            'policy killed and restarted': (0.15, self.kill_policy),
        }

    def _for_a_while(self, robot: LiveRobot, **faults: Any) -> None:
        robot.set(**faults, clock_s=self.clock_s)
        time.sleep(self.random.uniform(0.1, 2.0))
        robot.set(clock_s=self.clock_s)

    def _stream(self) -> tuple[LiveRobot, str]:
        stream = self.random.choice((*ARM, *CAMERAS))
        return (self.arm if stream in ARM else self.cameras), stream

    def lose_stream(self) -> None:
        """Silence."""
        robot, stream = self._stream()
        self._for_a_while(robot, silent=[stream])

    def late_stream(self) -> None:
        """Old stamps."""
        robot, stream = self._stream()
        self._for_a_while(robot, late_s={stream: self.random.uniform(0.1, 1.0)})

    def zero_stamps(self) -> None:
        """No stamps."""
        robot, stream = self._stream()
        self._for_a_while(robot, unstamped=[stream])

    def joints_not_finite(self) -> None:
        """A joint at NaN."""
        joint = f'joint{self.random.randint(1, 7)}'
        self._for_a_while(self.arm, values={joint: None})

    def restart_cameras(self) -> None:
        """A crash, and a new process."""
        self.cameras.kill()
        self.cameras.start()

    def jump(self, by_s: float) -> None:
        """The clock jumps."""
        self.clock_s += by_s
        self.arm.set(clock_s=self.clock_s)

    def clock_stands(self) -> None:
        """The clock pauses, and goes on where it would be without."""
        self._for_a_while(self.arm, clock_stands=True)

    def garbage(self) -> None:
        """What nobody could follow."""
        text = self.random.choice(('', 'x' * 2**20, '\u0000\u2603' * 50, 'juggle'))
        self.instructions.publish(String(data=text))

    def swap(self) -> None:
        """Another task while it runs."""
        self.task = 1 - self.task
        asked, reason = self.watcher.set_parameter('policy_node', 'task', str(self.tasks[self.task]))
        assert asked, reason
        self.watcher.wait_for(
            lambda: self.watcher.values().get('task') == str(self.tasks[self.task]), 'the other task'
        )

    def swap_to_broken(self) -> None:
        """A truncated task, which is refused."""
        self.watcher.set_parameter('policy_node', 'task', str(self.broken))

    def disable(self) -> None:
        """~/enable false, true."""
        for wanted in (False, True):
            assert self.watcher.call(SetBool, 'policy_node/enable', SetBool.Request(data=wanted)).success

    def deactivate(self) -> None:
        """Deactivated in the middle of a chunk."""
        assert self.watcher.change_state('deactivate')
        assert self.watcher.change_state('activate')

    def kill_policy(self) -> None:
        """A kill -9 in the middle of a motion, and a new process."""
        self.count_refused()
        self.end_policy()
        self.start_policy()

    # --- what becomes of it ---------------------------------------------------------------------

    def inflict(self) -> None:
        """One fault, and the way back from it."""
        table = self.faults()
        (name,) = self.random.choices(list(table), [weight for weight, _ in table.values()])
        began_s = self.now_s()
        try:
            table[name][1]()
            ended_s = self.now_s()
            self.watcher.forget()
            self.watcher.wait_for(
                lambda: (
                    self.watcher.state() == 'following' and len(self.watcher._received['target_pose']) > 5
                ),
                f'the way back from {name}',
            )
            self.recoveries.setdefault(name, []).append(self.now_s() - ended_s)
        except AssertionError as error:
            self.lost.append(f'{name} at {began_s:.0f} s: {error}; {self.watcher.state()}')
            self.end_policy()
            self.start_policy()

    def look(self) -> None:
        """Commands, and what the policy's process uses."""
        assert WATCHED.watch is not None
        self.breaches += [f'{self.now_s():.0f} s: {breach}' for breach in WATCHED.watch.breaches()]
        values = self.watcher.values()
        if self.policy.process.poll() is not None:
            self.lost.append(f'the policy ended by itself: {self.policy.output()[-500:]}')
            self.start_policy()
        elif 'latency_total_p50_ms' in values:
            sample = {'t_s': self.now_s(), **resources(self.policy.process.pid)}
            for key in ('latency_total_p50_ms', 'latency_total_p99_ms', 'command_jitter_p50_ms'):
                sample[key] = float(values.get(key, 'nan'))
            self.lives[-1].samples.append(sample)

    def count_refused(self) -> None:
        """What the policy that ends now has refused."""
        for what in self.refused:
            self.refused[what] += int(self.watcher.values().get(f'refused_{what}', 0))

    def close(self) -> None:
        """End everything."""
        self.count_refused()
        self.end_policy()
        self.arm.kill()
        self.cameras.kill()
        self.watcher.close()


def slope_per_hour(samples: list[dict[str, float]], key: str) -> float:
    """Straight line through a quantity over time."""
    times, values = np.array([[s['t_s'], s[key]] for s in samples]).T
    return float(np.polyfit(times, values, 1)[0] * 3600.0)


def report_of(soak: Soak, arguments: Arguments) -> dict[str, Any]:
    """Everything as numbers."""
    assert WATCHED.watch is not None
    lives = [life.settled() for life in soak.lives]
    long = [samples for samples in lives if len(samples) >= 12]
    samples = [sample for life in lives for sample in life]
    longest = max(lives, key=len)
    recovered = [seconds for times in soak.recoveries.values() for seconds in times]
    sixth = max(1, len(samples) // 6)
    report: dict[str, Any] = {
        'commit': soak.commit, 'minutes': soak.now_s() / 60.0, 'seed': arguments.seed,
        'commands': WATCHED.watch.counts()[0], 'breaches': len(soak.breaches), 'first_breaches': soak.breaches[:20],
        'largest': WATCHED.watch.largest(),
        'faults': {name: len(times) for name, times in sorted(soak.recoveries.items())},
        'recovery_s_p50': {name: statistics.median(times) for name, times in sorted(soak.recoveries.items())},
        'recovery_s_max': {name: max(times) for name, times in sorted(soak.recoveries.items())},
        'recoveries': len(recovered), 'not_recovered': soak.lost,
        'policy_starts': soak.starts, 'tracebacks': soak.tracebacks, 'refused': soak.refused,
    }  # fmt: skip
    if longest:
        report['longest_life_minutes'] = (longest[-1]['t_s'] - longest[0]['t_s']) / 60.0
        for key in ('rss_mb', 'descriptors', 'threads'):
            values = [sample[key] for sample in longest]
            report[key] = {'first': values[0], 'last': values[-1], 'max': max(values)}
        for key in ('latency_total_p50_ms', 'latency_total_p99_ms', 'command_jitter_p50_ms'):
            report[key] = {
                'first_sixth': statistics.median(sample[key] for sample in samples[:sixth]),
                'last_sixth': statistics.median(sample[key] for sample in samples[-sixth:]),
            }
    report['rss_mb_per_hour'] = [slope_per_hour(samples, 'rss_mb') for samples in long]
    return report


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report."""
    table = Table(title=f'{report["minutes"]:.0f} minutes, seed {report["seed"]}, commit {report["commit"]}')
    for column in ('fault', 'times', 'back after s (p50)', 'max'):
        table.add_column(column)
    for name, times in report['faults'].items():
        median, worst = report['recovery_s_p50'][name], report['recovery_s_max'][name]
        table.add_row(name, str(times), f'{median:.2f}', f'{worst:.2f}')
    console.print(table)
    console.print(
        f'{report["commands"]} commands, {report["breaches"]} broke a limit; {report["recoveries"]} recoveries, '
        f'{len(report["not_recovered"])} failed; {len(report["tracebacks"])} tracebacks'
    )
    for key in ('rss_mb', 'descriptors', 'threads', 'rss_mb_per_hour', 'latency_total_p50_ms'):
        console.print(f'{key}: {report.get(key)}')


def main(arguments: Arguments) -> None:
    """Soak, print, save."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(arguments, Path(folder))
        try:
            soak.watcher.status('following')
            next_s = looked_s = soak.now_s()
            while soak.now_s() < 60.0 * arguments.minutes:
                if soak.now_s() >= next_s:
                    soak.inflict()
                    next_s = soak.now_s() + soak.random.expovariate(1.0 / arguments.every_s)
                if soak.now_s() >= looked_s + LOOK_S:
                    soak.look()
                    looked_s = soak.now_s()
                time.sleep(0.1)
            soak.look()
        finally:
            soak.close()
        report = report_of(soak, arguments)
    show(report, console)
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
