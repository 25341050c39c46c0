"""How fast recordings become a dataset: seconds of recording per second, MB/s, one worker against two.

    python bench/conversion.py                                                      (make bench)

Each recording has two 640x480 rgb8 cameras at 30 Hz and joint states at 1 kHz, 56 MB a second. It is converted at
20 Hz to 84x84 pictures as PNG and as H.264, and to H.264 of full size. The floor is reading the same messages from
the same files and doing nothing with them. The runs alternate, so that a machine whose speed drifts slows all of
them; medians and ratios are printed, and the processor time, which a busy machine does not lengthen as it does the
wall time. The files are read once before, so they come from memory where they fit.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rosbags.typesys import Stores, get_typestore

from decoupled_policy_ros.data.bags.reader import Bag
from decoupled_policy_ros.data.bags.writer import BagWriter
from decoupled_policy_ros.data.conversion.convert import convert
from decoupled_policy_ros.data.conversion.plan import ConvertSettings
from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.robot.description import load_robot

STORE = get_typestore(Stores.ROS2_JAZZY)
START_NS = 1_700_000_000_000_000_000
SIZE, IMAGE_HZ, JOINT_HZ = (480, 640), 30, 1000
JOINTS, IMAGE = 'sensor_msgs/msg/JointState', 'sensor_msgs/msg/Image'


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        seconds: length of each recording.
        bags: number of recordings.
        repeats: measurements of each kind.
        folder: where recordings and datasets go meanwhile; the system's folder for such by default.
        json: write the figures here.
    """

    seconds: float = 10.0
    bags: int = 2
    repeats: int = 2
    folder: Path | None = None
    json: Path | None = Path('docs/bench/conversion.json')


def make_bag(path: Path, seconds: float, seed: int) -> Path:
    """A recording of an arm that moves in front of two cameras that see something photo-like move."""
    robot, rng, types = load_robot('panda_sim'), np.random.default_rng(seed), STORE.types
    coarse = rng.integers(0, 256, (30, 80, 3)).repeat(16, 0).repeat(16, 1)  # twice as wide as a picture
    scene = np.clip(coarse + rng.normal(0.0, 6.0, coarse.shape), 0, 255).astype(np.uint8)
    empty = np.zeros(0)

    def header(stamp_ns: int) -> Any:
        stamp = types['builtin_interfaces/msg/Time'](stamp_ns // 10**9, stamp_ns % 10**9)
        return types['std_msgs/msg/Header'](stamp, 'frame')

    def image(stamp_ns: int, shift: int) -> Any:
        pixels = np.ascontiguousarray(scene[:, shift : shift + SIZE[1]]).reshape(-1)
        return types[IMAGE](header(stamp_ns), *SIZE, 'rgb8', 0, 3 * SIZE[1], pixels)

    with BagWriter(path) as writer:
        topics = {f'/{camera.topic}': IMAGE for camera in robot.cameras.values()}
        for topic, name in {'/joint_states': JOINTS, **topics}.items():
            writer.add_topic(topic, name)
        shown = 0
        for k in range(int(seconds * JOINT_HZ)):
            stamp_ns = START_NS + k * (10**9 // JOINT_HZ)
            positions = np.append(robot.home_rad + 0.2 * np.sin(k / JOINT_HZ + np.arange(7)), [0.03, -0.03])
            joints = types[JOINTS](header(stamp_ns), list(robot.all_joint_names), positions, empty, empty)
            writer.write('/joint_states', bytes(STORE.serialize_cdr(joints, JOINTS)), stamp_ns)
            if k * IMAGE_HZ >= shown * JOINT_HZ:
                for topic in topics:
                    data = STORE.serialize_cdr(image(stamp_ns, 4 * shown % SIZE[1]), IMAGE)
                    writer.write(topic, bytes(data), stamp_ns)
                shown += 1
    return path


def read(bags: list[Path]) -> float:
    """Seconds that it takes to read all messages."""
    started = time.perf_counter()
    for path in bags:
        with Bag(path) as bag:
            for _ in bag.messages(list(bag.topics)):
                pass
    return time.perf_counter() - started


def processor_s() -> float:
    """Processor seconds of this process and of those it has ended so far."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Wall seconds of every kind of run, and what follows from them."""
    load = os.getloadavg()[0]  # of others: what is above 0 here makes wall times worse than they are
    bags = [make_bag(folder / f'bag{i}', arguments.seconds, i) for i in range(arguments.bags)]
    megabytes = sum(file.stat().st_size for bag in bags for file in bag.iterdir()) / 1e6
    small = ConvertSettings('panda_sim', instruction='bench')
    kinds = {
        'png, 84 x 84': small,
        'h264, 84 x 84': replace(small, images='h264'),
        'h264, 480 x 640': replace(small, images='h264', size=SIZE),
    }
    walls: dict[tuple[str, int], list[float]] = {(k, w): [] for k in kinds for w in (1, 2)}
    processor: dict[str, list[float]] = {kind: [] for kind in kinds}
    floors, sizes = [read(bags)], {}
    for _ in range(arguments.repeats):
        floors.append(read(bags))
        for kind, workers in walls:
            out = folder / 'out'
            started, used = time.perf_counter(), processor_s()
            convert(bags, out, kinds[kind], workers)
            walls[kind, workers].append(time.perf_counter() - started)
            if workers == 1:
                processor[kind].append(processor_s() - used)
            sizes[kind] = sum(file.stat().st_size for file in out.rglob('*') if file.is_file()) / 1e6
            shutil.rmtree(out)
    seconds, floor = arguments.seconds * arguments.bags, statistics.median(floors[1:])
    figures = []
    for kind in kinds:
        one, two = (walls[kind, workers] for workers in (1, 2))
        figures.append(
            {
                'images': kind,
                'wall_s': {'1': statistics.median(one), '2': statistics.median(two)},
                'bag_s_per_s': {'1': seconds / statistics.median(one), '2': seconds / statistics.median(two)},
                'bag_mb_per_s': {
                    '1': megabytes / statistics.median(one),
                    '2': megabytes / statistics.median(two),
                },
                'two_workers_faster': statistics.median(a / b for a, b in zip(one, two, strict=True)),
                'processor_s_per_bag_s': statistics.median(processor[kind]) / seconds,
                'over_reading': statistics.median(one) / floor,
                'dataset_mb': sizes[kind],
            }
        )
    return {
        'recordings': arguments.bags,
        'seconds_each': arguments.seconds,
        'bag_mb': megabytes,
        'repeats': arguments.repeats,
        'cores': len(os.sched_getaffinity(0)),
        'machine': platform.machine(),
        'load_average_before': load,
        'reading_s': floor,
        'figures': figures,
    }


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    folder = Path(tempfile.mkdtemp(prefix='conversion-', dir=arguments.folder))
    try:
        report = measure(arguments, folder)
    finally:
        shutil.rmtree(folder)
    table = Table(
        title=f'{report["recordings"]} recordings of {report["seconds_each"]:g} s, {report["bag_mb"]:.0f} MB'
    )
    for column in (
        'images',
        'workers',
        's of recording per s',
        'MB/s of recording',
        'two / one',
        'wall / reading',
        'processor s per s',
    ):
        table.add_column(column, justify='left' if column == 'images' else 'right')
    for f in report['figures']:
        for workers in ('1', '2'):
            table.add_row(
                f['images'] if workers == '1' else '',
                workers,
                f'{f["bag_s_per_s"][workers]:.2f}',
                f'{f["bag_mb_per_s"][workers]:.0f}',
                f'{f["two_workers_faster"]:.2f}' if workers == '2' else '',
                f'{f["over_reading"]:.1f}' if workers == '1' else '',
                f'{f["processor_s_per_bag_s"]:.2f}' if workers == '1' else '',
            )
    Console(width=120).print(table)
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
