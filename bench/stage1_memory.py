"""Stage 1 on 25 million frames: memory and speed of loading, of training steps, and of measuring the coverage.

    python bench/stage1_memory.py --out /path/to/scratch

A dataset in LeRobot v3 layout, with a camera, is written into a folder of its own under --out and removed again.
Each measurement is a process of its own; its peak is what the operating system counted (ru_maxrss). Seconds
are those of the clock; CPU seconds are the process's own, imports included, whatever else the machine does.
"""

from __future__ import annotations

import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from decoupled_policy_ros.files import write_json

# What is heavy is imported by the child that needs it: a child's peak starts with what its parent held.

LIMIT_GB = 8.0
EPISODE_FRAMES = 300  # 15 s at 20 Hz
DIFFERENT_EPISODES = 64
RATE_HZ = 20.0
BATCH = 64
GB = 1e9


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        out: existing folder for the data set, which needs 170 bytes per frame.
        frames: size of the dataset.
        steps: training steps, with the default backbone and batches of 64 windows.
        batches: batches that are drawn without training.
        robot: robot description.
        keep: leave the dataset where it is, and use it if it is there.
        child: for this script's own use.
        json: write the figures here.
    """

    out: Path
    frames: int = 25_000_000
    steps: int = 20
    batches: int = 2000
    robot: str = 'panda_sim'
    keep: bool = False
    child: Literal['', 'write', 'load', 'train', 'coverage'] = ''
    json: Path | None = Path('docs/bench/stage1_memory.json')

    @property
    def dataset(self) -> Path:
        """Where the dataset is."""
        return self.out / f'stage1_{self.frames}'


def write(arguments: Arguments) -> dict:
    """Write the dataset: synthetic motions over and over, each time with other positions.

    A small dataset comes from our own writer, the large one repeats its row groups and metadata.
    """
    import pyarrow.parquet as pq

    from decoupled_policy_ros.data.datasets import lerobot_layout as layout

    seed = arguments.out / 'seed'
    shutil.rmtree(seed, ignore_errors=True)
    write_seed(seed, arguments.robot)
    table = pq.read_table(seed / layout.DATA_PATH.format(chunk_index=0, file_index=0))
    episodes = max(1, round(arguments.frames / EPISODE_FRAMES))
    root = arguments.dataset
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(seed / 'meta', root / 'meta')
    places = write_data(root, table, episodes)
    write_meta(root, episodes, places)
    shutil.rmtree(seed)
    size = sum(path.stat().st_size for path in root.rglob('*.parquet'))
    return {
        'episodes': episodes,
        'frames': episodes * EPISODE_FRAMES,
        'files': places[-1] + 1,
        'gb': size / GB,
    }


def write_seed(root: Path, robot_name: str) -> None:
    """DIFFERENT_EPISODES episodes of synthetic motion with a camera, by the package's own writer."""
    import numpy as np

    from decoupled_policy_ros.data.datasets.dataset import DatasetSpec, DatasetWriter
    from decoupled_policy_ros.data.motions.motions import synth_motions
    from decoupled_policy_ros.robot.description import load_robot

    robot = load_robot(robot_name)
    motions, rows = [], 0
    while rows < DIFFERENT_EPISODES * EPISODE_FRAMES:
        motions += synth_motions(robot, 16, seed=len(motions), rate_hz=RATE_HZ)
        rows = sum(map(len, motions))
    joints, actions = (
        np.concatenate([getattr(motion, name) for motion in motions])[: DIFFERENT_EPISODES * EPISODE_FRAMES]
        for name in ('joint_positions', 'actions')
    )
    width = robot.gripper.width_from_normalised(joints[:, -1:])
    fingers = width / 2 * np.array(robot.gripper.joint_signs)
    black = np.zeros((EPISODE_FRAMES, 84, 84, 3), np.uint8)
    with DatasetWriter(root, DatasetSpec.of(robot, RATE_HZ, {'wrist': (84, 84)})) as writer:
        for first in range(0, len(joints), EPISODE_FRAMES):
            episode = slice(first, first + EPISODE_FRAMES)
            frames = {
                'observation.joint_positions': np.concatenate([joints[episode, :-1], fingers[episode]], -1),
                'observation.proprioception': np.zeros((EPISODE_FRAMES, 9)),
                'observation.pose': actions[episode],
                'action': actions[episode],
                'observation.images.wrist': black,
            }
            writer.add_episode('anything', True, frames)


def write_data(root: Path, seed: 'pa.Table', episodes: int) -> list[int]:  # noqa: F821, UP037
    """The data files, one row group per episode as our writer has it; returns the file of each episode."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from decoupled_policy_ros.data.datasets import lerobot_layout as layout

    rng = np.random.default_rng(0)
    places: list[int] = []
    writer, file = None, 0
    for episode in range(episodes):
        path = root / layout.DATA_PATH.format(chunk_index=0, file_index=file)
        if writer is not None and path.stat().st_size > layout.DATA_FILE_MB * 2**20:
            writer.close()
            writer, file = None, file + 1
            path = root / layout.DATA_PATH.format(chunk_index=0, file_index=file)
        if writer is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            writer = pq.ParquetWriter(path, seed.schema, compression='snappy')
        table = seed.slice(episode % DIFFERENT_EPISODES * EPISODE_FRAMES, EPISODE_FRAMES)
        first = episode * EPISODE_FRAMES
        replaced = {
            'episode_index': np.full(EPISODE_FRAMES, episode),
            'index': first + np.arange(EPISODE_FRAMES),
        }
        for name in ('observation.pose', 'observation.joint_positions'):
            column = table[name].combine_chunks()
            rows = column.flatten().to_numpy().reshape(EPISODE_FRAMES, -1).copy()
            rows[:, :3] += rng.normal(scale=0.01, size=(EPISODE_FRAMES, 3)).astype(np.float32)
            replaced[name] = pa.FixedSizeListArray.from_arrays(rows.reshape(-1), type=column.type)
        for name, values in replaced.items():
            table = table.set_column(
                table.schema.get_field_index(name), seed.schema.field(name), pa.array(values)
            )
        writer.write_table(table, row_group_size=EPISODE_FRAMES)
        places.append(file)
    assert writer is not None
    writer.close()
    return places


def write_meta(root: Path, episodes: int, places: list[int]) -> None:
    """meta/episodes and info.json for so many episodes."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from decoupled_policy_ros.data.datasets import lerobot_layout as layout

    path = root / layout.EPISODES_PATH.format(chunk_index=0, file_index=0)
    seed = pq.read_table(path)
    table = seed.take(pa.array(np.arange(episodes) % DIFFERENT_EPISODES))
    first = np.arange(episodes) * EPISODE_FRAMES
    for name, values in {
        'episode_index': np.arange(episodes), 'length': np.full(episodes, EPISODE_FRAMES),
        'dataset_from_index': first, 'dataset_to_index': first + EPISODE_FRAMES,
        'data/chunk_index': np.zeros(episodes, np.int64), 'data/file_index': np.array(places),
    }.items():  # fmt: skip
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    pq.write_table(table, path)
    info = json.loads((root / layout.INFO_PATH).read_text())
    info |= {
        'total_episodes': episodes,
        'total_frames': episodes * EPISODE_FRAMES,
        'splits': {'train': f'0:{episodes}'},
    }
    (root / layout.INFO_PATH).write_text(json.dumps(info))


def stage1_config(arguments: Arguments):
    """Stage 1 on the dataset, with everything at its default."""
    from decoupled_policy_ros.training.config import Stage1Config

    return Stage1Config.model_validate(
        {
            'name': 'stage1_memory',
            'robot': arguments.robot,
            'rate_hz': RATE_HZ,
            'sources': [{'demonstrations': str(arguments.dataset)}],
            'optimisation': {'steps': arguments.steps, 'batch_size': BATCH, 'threads': 1},
        }
    )


def load(arguments: Arguments) -> dict:
    """The windows as training loads them, and batches as training draws them."""
    import torch

    from decoupled_policy_ros.robot.description import load_robot
    from decoupled_policy_ros.training.sources import load_motion_windows

    before_gb = peak_gb()
    start = time.perf_counter()
    windows, _ = load_motion_windows(stage1_config(arguments), load_robot(arguments.robot))
    loaded_s = time.perf_counter() - start
    joints, actions = torch.from_numpy(windows.joints), torch.from_numpy(windows.actions)
    torch.manual_seed(0)
    start = time.perf_counter()
    for _ in range(arguments.batches):
        frames = windows.draw(BATCH)
        batch = joints[frames], actions[frames]
    drawn_s = time.perf_counter() - start
    assert all(rows.shape[:2] == (BATCH, windows.windows.horizon) for rows in batch)
    return {
        'windows': len(windows.windows),
        'imports_gb': before_gb,
        'load_s': loaded_s,
        'frames_per_s': len(windows.windows) / loaded_s,
        'windows_per_s': arguments.batches * BATCH / drawn_s,
    }


def train(arguments: Arguments) -> dict:
    """A few steps of Stage 1, by the function that the command calls."""
    from decoupled_policy_ros.training.stage1 import train_stage1

    out = arguments.out / 'stage1_run'
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    train_stage1(stage1_config(arguments), out)
    seconds = time.perf_counter() - start
    run = json.loads((out / 'run.json').read_text())
    shutil.rmtree(out)
    return {'steps': arguments.steps, 'batch': BATCH, 'total_s': seconds, 'steps_s': run['seconds']}


def coverage(arguments: Arguments) -> dict:
    """Everything that `decoupled-policy coverage` measures."""
    from decoupled_policy_ros.data.coverage.coverage import measure
    from decoupled_policy_ros.robot.description import load_robot

    start = time.perf_counter()
    measured = measure([arguments.dataset], load_robot(arguments.robot))
    seconds = time.perf_counter() - start
    return {'frames': measured.n_frames, 'seconds': seconds, 'frames_per_s': measured.n_frames / seconds}


def peak_gb() -> float:
    """Most memory that this process has had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def cpu_s() -> float:
    """Processor time of this process so far: what counts where other processes want the cores too."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def in_child(child: str) -> dict:
    """Run one of the above in a process of its own, with this script's own options."""
    command = [sys.executable, __file__, *sys.argv[1:], '--child', child]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def show(report: dict) -> None:
    """Print the figures as a table."""
    table = Table(
        title=f'Stage 1 on {report["dataset"]["frames"] / 1e6:g} million frames, limit {LIMIT_GB:g} GB'
    )
    for column in ('', 'peak GB', 'seconds', 'CPU seconds', 'rate'):
        table.add_column(column, justify='right' if column else 'left')
    loaded, trained, measured = report['load'], report['train'], report['coverage']
    table.add_row(
        'load and draw', f'{loaded["peak_gb"]:.2f}', f'{loaded["load_s"]:.0f}', f'{loaded["cpu_s"]:.0f}',
        f'{loaded["frames_per_s"]:,.0f} frames/s loaded, {loaded["windows_per_s"]:,.0f} windows/s drawn',
    )  # fmt: skip
    table.add_row(
        'train',
        f'{trained["peak_gb"]:.2f}',
        f'{trained["total_s"]:.0f}',
        f'{trained["cpu_s"]:.0f}',
        f'{trained["steps"]} steps in it',
    )
    table.add_row(
        'coverage', f'{measured["peak_gb"]:.2f}', f'{measured["seconds"]:.0f}', f'{measured["cpu_s"]:.0f}',
        f'{measured["frames_per_s"]:,.0f} frames/s',
    )  # fmt: skip
    Console(width=110).print(table)


def main(arguments: Arguments) -> None:
    """Write, measure, remove, print, save."""
    if arguments.child:
        figures = {'write': write, 'load': load, 'train': train, 'coverage': coverage}[arguments.child](
            arguments
        )
        print(json.dumps({**figures, 'cpu_s': cpu_s(), 'peak_gb': peak_gb()}))
        return
    try:
        if not (arguments.dataset / 'meta' / 'info.json').is_file():
            in_child('write')
        info = json.loads((arguments.dataset / 'meta' / 'info.json').read_text())
        files = list((arguments.dataset / 'data').rglob('*.parquet'))
        report = {
            'limit_gb': LIMIT_GB,
            'machine': platform.machine(),
            'dataset': {
                'frames': info['total_frames'],
                'episodes': info['total_episodes'],
                'files': len(files),
                'gb': sum(path.stat().st_size for path in files) / GB,
            },
            **{child: in_child(child) for child in ('load', 'train', 'coverage')},
        }
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.dataset, ignore_errors=True)
    report['within_limit'] = (
        max(report[child]['peak_gb'] for child in ('load', 'train', 'coverage')) < LIMIT_GB
    )
    show(report)
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
