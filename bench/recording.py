"""Does the episode recorder lose anything at two raw cameras and 1 kHz joint states, and what does it cost?

    python bench/recording.py --seconds 300

Publishers (2 x 640x480 rgb8 at 30 Hz, joint states at 1 kHz, each message counted in its stamp) and the recorder run
as processes. Afterwards every message of every topic is looked for in the file. The same is done with best-effort
publishers, with Fast DDS as it comes and with config/fastdds_large_messages.xml. The floor is a process that polls the
same serialised messages and does nothing but write them to a file; beside it stands the usual rclpy subscriber, a
callback for each message, doing the same. 300 s take 17 GB on the disk of --out, which are removed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from mcap.reader import make_reader
from rich.console import Console
from rich.table import Table

from decoupled_policy_ros.files import write_json

ROOT = Path(__file__).resolve().parents[1]
PROFILE = ROOT / 'config' / 'fastdds_large_messages.xml'
PUBLISHER = ROOT / 'test' / 'camera_publisher.py'
RATES_HZ = {'/joint_states': 1000.0, '/agentview/image_raw': 30.0, '/wrist/image_raw': 30.0}
NODE = 'episode_recorder_node'
SETTLE_S = 3.0


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        seconds: length of the recording that counts.
        compare_seconds: length of each of the others, and of the floor.
        out: folder for the recordings; made, and removed in the end.
        json: write the figures here.
        floor: be the floor: write what comes to this file until the process is interrupted.
        callbacks: be the usual subscriber instead.
    """

    seconds: float = 20.0
    compare_seconds: float = 10.0
    out: Path = Path('out/bench_recording')
    json: Path | None = Path('docs/bench/recording.json')
    floor: Path | None = None
    callbacks: bool = False


@dataclass(frozen=True)
class Run:
    """One combination of publishers and transport."""

    name: str
    seconds: float
    best_effort: bool
    profile: bool


def environment(run: Run) -> dict[str, str]:
    """Environment of every process of a run."""
    values = {**os.environ, 'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST', 'OMP_NUM_THREADS': '1'}
    values['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), values.get('PYTHONPATH')]))
    values.pop('FASTRTPS_DEFAULT_PROFILES_FILE', None)
    return values | ({'FASTRTPS_DEFAULT_PROFILES_FILE': str(PROFILE)} if run.profile else {})


@contextmanager
def process(command: list[str], run: Run, log: Path) -> Iterator[subprocess.Popen]:
    """A process for as long as the block lasts; ended by Ctrl-C."""
    with log.open('wb') as output:
        child = subprocess.Popen(
            [sys.executable, *command],
            env=environment(run),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
    try:
        yield child
    finally:
        child.send_signal(signal.SIGINT)
        child.wait(60)
        child.stdin.close()


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def peak_mb(pid: int) -> float:
    """Largest resident memory of a process so far (MiB)."""
    lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith('VmHWM'))


class Remote:
    """Asks the recorder's services."""

    def __init__(self) -> None:
        import rclpy

        rclpy.init()
        self.node = rclpy.create_node('recording_bench')

    def ask(self, kind: Any, name: str, request: Any) -> Any:
        """Call a service; ends the bench if it is refused."""
        import rclpy

        client = self.node.create_client(kind, f'{NODE}/{name}')
        if not client.wait_for_service(60.0):
            raise SystemExit(f'no service {NODE}/{name}: see the logs in --out')
        future = client.call_async(request)
        rclpy.spin_until_future_complete(self.node, future)
        self.node.destroy_client(client)
        return future.result()

    def start(self) -> None:
        """Start as soon as the recorder hears all topics."""
        from std_srvs.srv import Trigger

        deadline = time.monotonic() + 60
        while not (answer := self.ask(Trigger, 'start', Trigger.Request())).success:
            if time.monotonic() > deadline:
                raise SystemExit(answer.message)
            time.sleep(0.5)

    def keep(self) -> None:
        """Keep the episode."""
        from std_srvs.srv import SetBool

        answer = self.ask(SetBool, 'keep', SetBool.Request(data=True))
        if not answer.success:
            raise SystemExit(answer.message)


def record(run: Run, arguments: Arguments, remote: Remote) -> dict[str, Any]:
    """Record for the run's length; what the recorder took, and what is missing."""
    folder = arguments.out / run.name
    log = arguments.out / f'{run.name}.log'
    recorder = ['-m', f'decoupled_policy_ros.nodes.{NODE}', '--ros-args', '-p', f"output_dir:='{folder}'"]
    with (
        process(publisher(run), run, arguments.out / 'publisher.log') as cameras,
        process(recorder, run, log) as child,
    ):
        time.sleep(SETTLE_S)
        remote.start()
        started, cpu = time.monotonic(), [cpu_s(p.pid) for p in (child, cameras)]
        time.sleep(run.seconds)
        elapsed = time.monotonic() - started
        share, cameras_share = (
            (cpu_s(p.pid) - c) / elapsed for p, c in zip((child, cameras), cpu, strict=True)
        )
        memory_mb = peak_mb(child.pid)
        keeping = time.monotonic()
        remote.keep()
        kept_s = time.monotonic() - keeping
    episode = folder / 'episode_000000'
    report = json.loads((episode / 'episode.json').read_text())
    size = sum(path.stat().st_size for path in episode.glob('*.mcap'))
    topics = {name: counted(indices, report['topics'][name]) for name, indices in indices_of(episode).items()}
    shutil.rmtree(folder)
    return {
        'name': run.name,
        'reliability': 'best effort' if run.best_effort else 'reliable',
        'fastdds_profile': PROFILE.name if run.profile else None,
        'seconds': (report['ended_ns'] - report['started_ns']) / 1e9,
        'recorder_cpu_share': share,
        'publisher_cpu_share': cameras_share,
        'recorder_peak_mb': memory_mb,
        'mb_per_s': size / 1e6 / ((report['ended_ns'] - report['started_ns']) / 1e9),
        'keep_s': kept_s,
        'topics': topics,
        'lost': sum(topic['missing_in_file'] for topic in topics.values()),
    }


def publisher(run: Run) -> list[str]:
    """Command line of the publishers."""
    return [str(PUBLISHER), *(['--best-effort'] if run.best_effort else [])]


def indices_of(episode: Path) -> dict[str, np.ndarray]:
    """Which of the publisher's messages are in an episode, by topic, in the order of the file."""
    sys.path.insert(0, str(PUBLISHER.parent))
    from camera_publisher import START_NS

    from decoupled_policy_ros.data.bags.stamp_watch import header_stamp_ns

    found: dict[str, list[int]] = {}
    (path,) = episode.glob('*.mcap')
    with path.open('rb') as file:
        for _, channel, message in make_reader(file).iter_messages(log_time_order=False):
            found.setdefault(channel.topic, []).append(header_stamp_ns(message.data) - START_NS)
    return {
        topic: np.round(np.array(stamps) * RATES_HZ[topic] / 1e9).astype(int)
        for topic, stamps in found.items()
    }


def counted(indices: np.ndarray, report: dict[str, Any]) -> dict[str, Any]:
    """What is missing between the first and the last message of a topic, by sequence."""
    expected = int(indices.max() - indices.min() + 1)
    return {
        'messages': len(indices),
        'missing_in_file': expected - len(np.unique(indices)),
        'twice': len(indices) - len(np.unique(indices)),
        'missing_as_reported': max(report['missing'], report['lost_by_dds']) + report['overflowed'],
        'in_order': bool(np.all(np.diff(indices) > 0)),
    }


def measure_floor(run: Run, arguments: Arguments, *options: str) -> dict[str, float]:
    """Processor share of a subscriber that only writes what it takes."""
    path = arguments.out / 'floor.bin'
    with (
        process(publisher(run), run, arguments.out / 'publisher.log'),
        process([__file__, '--floor', str(path), *options], run, arguments.out / 'floor.log') as child,
    ):
        while not (path.exists() and path.stat().st_size):  # until it hears the cameras
            time.sleep(SETTLE_S)
        started, cpu, size = time.monotonic(), cpu_s(child.pid), path.stat().st_size
        time.sleep(run.seconds)
        elapsed = time.monotonic() - started
        share = (cpu_s(child.pid) - cpu) / elapsed
        rate = (path.stat().st_size - size) / 1e6 / elapsed
    path.unlink()
    return {'cpu_share': share, 'mb_per_s': rate}


def disk_mb_per_s(path: Path) -> float:
    """How fast 1 GB gets to the disk in pieces of 2 MiB."""
    block = os.urandom(2**21)
    started = time.monotonic()
    with path.open('wb') as file:
        for _ in range(512):
            file.write(block)
        os.fsync(file.fileno())
    path.unlink()
    return 512 * 2**21 / 1e6 / (time.monotonic() - started)


def be_the_floor(path: Path, callbacks: bool) -> None:
    """Take serialised messages and write them to a file, until the process is interrupted."""
    import rclpy
    from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
    from rclpy.executors import ExternalShutdownException
    from rclpy.qos import QoSProfile
    from sensor_msgs.msg import Image, JointState

    rclpy.init()
    node = rclpy.create_node('floor')
    with path.open('wb', buffering=2**21) as file, suppress(KeyboardInterrupt, ExternalShutdownException):
        group = MutuallyExclusiveCallbackGroup()
        subscriptions = [
            node.create_subscription(
                JointState if topic == '/joint_states' else Image,
                topic,
                file.write,
                QoSProfile(depth=1000),
                raw=True,
                callback_group=group,
            )
            for topic in RATES_HZ
        ]
        if callbacks:
            rclpy.spin(node)
        while rclpy.ok():
            time.sleep(0.01)
            for subscription in subscriptions:
                while taken := subscription.handle.take_message(subscription.msg_type, True):
                    file.write(taken[0])


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    if arguments.floor:
        be_the_floor(arguments.floor, arguments.callbacks)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    short = arguments.compare_seconds
    runs = [
        Run('reliable', arguments.seconds, False, True),
        Run('reliable_default', short, False, False),
        Run('best_effort', short, True, True),
        Run('best_effort_default', short, True, False),
    ]
    remote = Remote()
    plain = Run('floor', short, False, True)
    floors = [measure_floor(plain, arguments)]
    figures = [record(run, arguments, remote) for run in runs]
    floors.append(measure_floor(plain, arguments))
    usual = measure_floor(plain, arguments, '--callbacks')
    disk = disk_mb_per_s(arguments.out / 'disk.bin')
    report = {
        'machine': f'{platform.machine()}, {os.cpu_count()} cores',
        'load_average': os.getloadavg(),
        'disk_mb_per_s': disk,
        'floor': {key: (floors[0][key] + floors[1][key]) / 2 for key in floors[0]},
        'rclpy_callbacks': usual,
        'runs': figures,
    }
    report['cpu_ratio_to_floor'] = figures[0]['recorder_cpu_share'] / report['floor']['cpu_share']
    shutil.rmtree(arguments.out)
    show(report)
    if arguments.json:
        write_json(arguments.json, report)


def show(report: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table(title='2 x 640x480 rgb8 at 30 Hz and joint states at 1 kHz')
    for name in ('publishers', 'Fast DDS', 's', 'MB/s', 'messages', 'lost', 'CPU', 'peak MiB'):
        table.add_column(name, justify='left' if name in ('publishers', 'Fast DDS') else 'right')
    for run in report['runs']:
        table.add_row(
            run['reliability'], run['fastdds_profile'] or 'as it comes', f'{run["seconds"]:.0f}',
            f'{run["mb_per_s"]:.1f}', str(sum(t['messages'] for t in run['topics'].values())), str(run['lost']),
            f'{run["recorder_cpu_share"]:.0%}', f'{run["recorder_peak_mb"]:.0f}',
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    floor, usual = report['floor'], report['rclpy_callbacks']
    console.print(
        f'floor, polled and written to a plain file: {floor["cpu_share"]:.0%} of a core for '
        f'{floor["mb_per_s"]:.1f} MB/s (recorder: {report["cpu_ratio_to_floor"]:.2f} times that); '
        f'the same by rclpy callbacks: {usual["cpu_share"]:.0%}; disk: {report["disk_mb_per_s"]:.0f} MB/s'
    )


if __name__ == '__main__':
    main(tyro.cli(Arguments))
