"""Reading and writing datasets: training windows and frames per second, beside LeRobot on the same data.

    python bench/dataset_reader.py                                              (make bench)
    python bench/dataset_reader.py --python LEROBOT_ENV/bin/python              (make bench LEROBOT_PYTHON=...)

Read: batches of 64 windows of two observations (two cameras, proprioception) and sixteen actions, drawn at random,
images as float32 in [0, 1], as LeRobot's DataLoader gives them. Ours come from memory, where training puts them once;
that time is given too. Written: the same frames from memory to a complete dataset, PNG, H.264 and AV1. LeRobot's side
runs in an environment of its own, see lerobot_exchange.py; without one its columns stay empty. Ours and LeRobot's
runs alternate; medians and their ratios are given, per second and, because machines are shared, per second of
processor time, of all threads and processes together.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import tyro
from lerobot_exchange import IMAGE, LeRobot, source_frames, write_ours
from rich.console import Console
from rich.table import Table

from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.training.config import Stage2Config
from decoupled_policy_ros.training.sources import load_demonstrations

BATCH = 64
HORIZON = 16
CODECS = {'png': 'image', 'h264': 'h264', 'av1': 'libsvtav1'}  # ours: LeRobot's


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        python: the interpreter of an environment with lerobot; without, only ours is measured.
        library_path: folders of shared libraries for LeRobot's side (FFmpeg's, for torchcodec).
        dataset: a dataset of ours with PNG images; Lift demonstrations are made where it isn't there.
        episodes: how many of its episodes.
        large_frames: how many frames are written at 640x480 too.
        repeats: runs of each kind.
        json: write the figures here; docs/bench/dataset_reader.json by default where LeRobot was measured too.
    """

    python: Path | None = None
    library_path: str = ''
    dataset: Path = Path('out/demos/lift_images')
    episodes: int = 10
    large_frames: int = 100
    repeats: int = 3
    json: Path | None = None


def our_windows(root: Path, robot: str, cameras: list[str], batches: int = 200) -> tuple[float, float, float]:
    """Seconds until all is in memory, and after that windows per second and per processor second."""
    values = {
        'name': 'bench', 'robot': robot, 'dataset': root, 'cameras': cameras, 'vectors': ['proprioception'],
        'optimisation': {'steps': 1},
    }  # fmt: skip
    description = load_robot(robot)
    started = time.perf_counter()
    data = load_demonstrations(Stage2Config.model_validate(values), HORIZON, description, 20.0)
    loaded_s = time.perf_counter() - started
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(batches):
        frames, action_frames, _ = data.at(data.draw(BATCH))
        batch = {name: stream[frames] for name, stream in data.streams.items()}
        batch |= {name: batch[name].float().div_(255) for name in cameras}
        batch['action'] = data.actions[action_frames]
    windows = batches * BATCH
    return loaded_s, windows / (time.perf_counter() - started), windows / (time.process_time() - cpu_started)


def measure_reading(
    arguments: Arguments, lerobot: LeRobot | None, folder: Path, source: Any, episodes: list
) -> list[dict[str, Any]]:
    """One row for PNG and one for each codec."""
    rows = []
    for images in CODECS:
        root = folder / f'read_{images}'
        write_ours(root, source, episodes, images)
        ours, theirs = [], []
        for _ in range(arguments.repeats):
            ours.append(our_windows(root, source.conventions['robot'], source.cameras))
            if lerobot is not None:
                theirs.append(lerobot('time_read', str(root), '6'))
        row = {
            'images': images,
            'frames': sum(len(frames['action']) for _, frames in episodes),
            'ours_load_s': statistics.median(seconds for seconds, _, _ in ours),
            'ours_windows_per_s': statistics.median(rate for _, rate, _ in ours),
            'ours_windows_per_cpu_s': statistics.median(rate for _, _, rate in ours),
        }
        if theirs:
            best = [max(said['windows_per_s'].values()) for said in theirs]
            row['lerobot_windows_per_s'] = statistics.median(best)
            row['lerobot_windows_per_cpu_s'] = statistics.median(said['windows_per_cpu_s'] for said in theirs)
            row['lerobot_by_workers'] = {
                k: statistics.median(said['windows_per_s'][k] for said in theirs)
                for k in theirs[0]['windows_per_s']
            }
            row['ratio'] = statistics.median(o[1] / b for o, b in zip(ours, best, strict=True))
            row['cpu_ratio'] = statistics.median(
                o[2] / said['windows_per_cpu_s'] for o, said in zip(ours, theirs, strict=True)
            )
        rows.append(row)
    return rows


def measure_writing(
    arguments: Arguments, lerobot: LeRobot | None, folder: Path, source: Any, episodes: list, name: str
) -> list[dict[str, Any]]:
    """One row for PNG and one for each codec."""
    columns = {k: np.concatenate([frames[k] for _, frames in episodes]) for k in episodes[0][1]}
    lengths = [len(frames['action']) for _, frames in episodes]
    saved = folder / f'{name}.npz'
    np.savez(saved, lengths=lengths, tasks=[words for words, _ in episodes], fps=source.rate_hz, **columns)
    rows = []
    for images, theirs_name in CODECS.items():
        ours, theirs, size = [], [], 0
        for repeat in range(arguments.repeats):
            root = folder / f'{name}_{images}_{repeat}'
            started, cpu_started = time.perf_counter(), time.process_time()
            write_ours(root, source, episodes, images)
            ours.append((time.perf_counter() - started, time.process_time() - cpu_started))
            size = sum(path.stat().st_size for path in root.rglob('*') if path.is_file())
            if lerobot is not None:
                there = str(folder / f'their_{root.name}')
                theirs.append(lerobot('write', str(saved), there, theirs_name, ''))
        n = sum(lengths)
        row = {
            'size': name,
            'images': images,
            'frames': n,
            'cameras': len(source.cameras),
            'ours_frames_per_s': n / statistics.median(seconds for seconds, _ in ours),
            'ours_frames_per_cpu_s': n / statistics.median(cpu for _, cpu in ours),
            'ours_bytes': size,
        }
        if theirs:
            row['lerobot_frames_per_s'] = n / statistics.median(said['seconds'] for said in theirs)
            row['lerobot_frames_per_cpu_s'] = n / statistics.median(said['cpu_seconds'] for said in theirs)
            row['lerobot_bytes'] = theirs[-1]['bytes']
            row['ratio'] = statistics.median(
                said['seconds'] / o[0] for o, said in zip(ours, theirs, strict=True)
            )
            row['cpu_ratio'] = statistics.median(
                said['cpu_seconds'] / o[1] for o, said in zip(ours, theirs, strict=True)
            )
        rows.append(row)
    return rows


def enlarged(episodes: list, count: int) -> list:
    """The first `count` frames with images of 640x480, in episodes of at most 50 frames."""
    out, left = [], count
    for words, frames in episodes:
        n = min(left, 50, len(frames['action']))
        if n == 0:
            break
        out.append(
            (
                words,
                {
                    k: np.stack([cv2.resize(i, (640, 480), interpolation=cv2.INTER_CUBIC) for i in v[:n]])
                    if k.startswith(IMAGE)
                    else v[:n]
                    for k, v in frames.items()
                },
            )
        )
        left -= n
    return out


def print_tables(report: dict[str, Any]) -> None:
    """Both tables; LeRobot's columns are empty where it wasn't measured."""

    def number(value: float | None, digits: int = 0) -> str:
        return '' if value is None else f'{value:,.{digits}f}'

    def rates(row: dict[str, Any], what: str) -> list[str]:
        return [
            number(row[f'ours_{what}_per_s']), number(row.get(f'lerobot_{what}_per_s')), number(row.get('ratio'), 1),
            number(row[f'ours_{what}_per_cpu_s']), number(row.get(f'lerobot_{what}_per_cpu_s')),
            number(row.get('cpu_ratio'), 1),
        ]  # fmt: skip

    columns = ('ours /s', 'LeRobot /s', 'ratio', 'ours /CPU s', 'LeRobot /CPU s', 'ratio')
    table = Table(title=f'training windows, {report["cores"]} cores')
    for column in ('images', 'frames', 'ours, load s', *columns):
        table.add_column(column, justify='right')
    for row in report['reading']:
        table.add_row(
            row['images'], str(row['frames']), number(row['ours_load_s'], 2), *rates(row, 'windows')
        )
    Console(width=120).print(table)
    table = Table(title='frames written, two cameras a frame')
    for column in ('size', 'images', *columns, 'ours kB', 'LeRobot kB'):
        table.add_column(column, justify='right')
    for row in report['writing']:
        theirs = row.get('lerobot_bytes')
        table.add_row(
            row['size'], row['images'], *rates(row, 'frames'), number(row['ours_bytes'] / row['frames'] / 1e3, 1),
            number(theirs / row['frames'] / 1e3 if theirs else None, 1),
        )  # fmt: skip
    Console(width=120).print(table)


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lerobot = None
        if arguments.python is not None:
            lerobot = stack.enter_context(LeRobot(arguments.python, arguments.library_path, folder))
        source, episodes = source_frames(arguments)
        reading = measure_reading(arguments, lerobot, folder, source, episodes)
        writing = measure_writing(arguments, lerobot, folder, source, episodes, '84x84')
        large = enlarged(episodes, arguments.large_frames)
        writing += measure_writing(arguments, lerobot, folder, source, large, '640x480')
    report = {
        'machine': platform.machine(),
        'cores': os.cpu_count(),
        'torch': torch.__version__,
        'threads': torch.get_num_threads(),
        'repeats': arguments.repeats,
        'reading': reading,
        'writing': writing,
    }
    print_tables(report)
    out = arguments.json or (Path('docs/bench/dataset_reader.json') if arguments.python else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main(tyro.cli(Arguments))
