"""Datasets across the border: ours opened by LeRobot's own class, LeRobot's opened and trained on here.

    python bench/lerobot_exchange.py --python LEROBOT_ENV/bin/python

LeRobot is no dependency of this package and must not become one: LEROBOT_ENV is an environment of its own,

    python3 -m venv LEROBOT_ENV && LEROBOT_ENV/bin/pip install 'lerobot==0.4.4'

whose video decoder (torchcodec) wants FFmpeg's shared libraries, e.g. `apt install ffmpeg`, or their folders in
`--library-path`; without, choose `--backend pyav`.

Frames are those of a dataset with images, by default demonstrations of Lift. Everything is compared element by
element; the figures go to docs/bench/lerobot_exchange.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
import yaml
from rich.console import Console
from rich.table import Table

from decoupled_policy_ros.data.datasets.dataset import Dataset, DatasetSpec, DatasetWriter
from decoupled_policy_ros.data.readers.opening import open_demonstrations
from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.robot.description import load_robot

SIDE = Path(__file__).with_name('lerobot_side.py')
IMAGE = 'observation.images.'
FILE_MB = '0.05'  # so small that what LeRobot writes is spread over files and folders

#: What the columns of the datasets that LeRobot writes here mean; they hold what ours do, under names of their own.
MAPPING: dict[str, Any] = {
    'source': 'frames of this package, written by LeRobot',
    'joints': {'column': 'observation.state[0:7]', 'unit': 'rad'},
    'gripper': {'column': 'observation.state[7:9]', 'finger_signs': [1, -1]},
    'pose': {
        'position': 'observation.ee_pose[0:3]', 'rotation': 'observation.ee_pose[3:9]', 'form': 'rot6d_columns',
        'frame': 'base',
    },
    'action': {'kind': 'pose', 'position': 'action[0:3]', 'rotation': 'action[3:9]'},
    'gripper_command': {'column': 'action[9]', 'open': -1.0, 'closed': 1.0},
}  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        python: the interpreter of an environment with lerobot.
        dataset: a dataset of ours with PNG images; Lift demonstrations are made where it isn't there.
        episodes: how many of its episodes.
        steps: training steps on what LeRobot wrote.
        backend: LeRobot's video decoder, torchcodec or pyav.
        library_path: folders of shared libraries for LeRobot's side.
        json: write the figures here.
    """

    python: Path
    dataset: Path = Path('out/demos/lift_images')
    episodes: int = 10
    steps: int = 20
    backend: str = 'torchcodec'
    library_path: str = ''
    json: Path | None = Path('docs/bench/lerobot_exchange.json')


class LeRobot:
    """The process of lerobot_side.py in the other environment: called with a verb and its words, it answers.

    Args:
        python: the interpreter of that environment.
        library_path: folders of shared libraries for it.
        folder: where it may keep its caches.
    """

    def __init__(self, python: Path, library_path: str, folder: Path):
        environment = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'LD_LIBRARY_PATH')}
        environment |= {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(folder / 'huggingface')}
        if library_path:
            environment['LD_LIBRARY_PATH'] = library_path
        self._errors = (folder / 'lerobot.log').open('w+')
        self._process = subprocess.Popen(
            [str(python), str(SIDE)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip

    def __call__(self, *words: str) -> dict[str, Any]:
        """What it says to an order."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(words) + '\n')
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._process.stdout.readline()
        if not answer:
            self._errors.seek(0)
            raise SystemExit(f'lerobot_side.py failed at {" ".join(words)}:\n{self._errors.read()[-4000:]}')
        return json.loads(answer)

    def __enter__(self) -> LeRobot:
        return self

    def __exit__(self, *_rest: object) -> None:
        self._process.communicate()
        self._errors.close()


def source_frames(arguments: Any) -> tuple[Dataset, list[tuple[str, dict[str, np.ndarray]]]]:
    """Instruction and frames of the first episodes."""
    if not arguments.dataset.exists():
        from decoupled_policy_ros.sim.demonstrations import make_demonstrations

        make_demonstrations('lift', arguments.episodes, arguments.dataset)
    source = Dataset.open(arguments.dataset)
    episodes = []
    for index in range(min(arguments.episodes, source.n_episodes)):
        episode = source.episode(index)
        frames = {k: v for k, v in episode.arrays.items() if k.startswith(('observation.', 'action'))}
        frames |= {IMAGE + camera: episode.images(camera) for camera in source.cameras}
        episodes.append((episode.instruction, frames))
    return source, episodes


def write_ours(root: Path, source: Dataset, episodes: list, images: str) -> None:
    """The frames as a dataset of ours."""
    frames = episodes[0][1]
    cameras = {c: frames[IMAGE + c].shape[1:3] for c in source.cameras}
    known = {'joint_positions', 'proprioception', 'pose'}
    vectors = {
        name.removeprefix('observation.'): rows.shape[1]
        for name, rows in frames.items()
        if name.startswith('observation.')
        and rows.ndim == 2
        and name.removeprefix('observation.') not in known
    }
    robot = load_robot(source.conventions['robot'])
    spec = DatasetSpec.of(robot, source.rate_hz, cameras, vectors, images)
    with DatasetWriter(root, spec) as writer:
        for instruction, rows in episodes:
            writer.add_episode(instruction, True, rows)


def ours_there(
    arguments: Arguments, lerobot: LeRobot, folder: Path, source: Dataset, episodes: list
) -> list[dict]:
    """Write PNG, H.264 and AV1, have LeRobot read every frame, and compare with what we read and what was written."""
    figures = []
    for images in ('png', 'h264', 'av1'):
        root, out = folder / images, folder / f'{images}.npz'
        write_ours(root, source, episodes, images)
        said = lerobot('read', str(root), str(out), arguments.backend)
        ours, columns = Dataset.open(root), 0
        largest, mean, error = 0.0, [], []
        with np.load(out) as theirs:
            tasks = [ours.task_of(e) for e in range(ours.n_episodes) for _ in range(ours.lengths[e])]
            assert theirs['task'].tolist() == tasks, 'instructions differ'
            for name, feature in ours.features.items():
                if feature['dtype'] in ('image', 'video'):
                    difference = np.abs(theirs[name] - ours.images(name).astype(np.float32))
                    largest, mean = max(largest, float(difference.max())), [*mean, float(difference.mean())]
                    written = np.concatenate([rows[name] for _, rows in episodes])
                    error.append(float(np.abs(ours.images(name).astype(float) - written).mean()))
                else:
                    column = ours.column(name)
                    assert theirs[name].dtype == column.dtype, (name, theirs[name].dtype)
                    assert np.array_equal(theirs[name], column), f'{name} differs'
                    columns += 1
        figures.append(
            {
                'images': images,
                'frames': said['frames'],
                'episodes': said['episodes'],
                'vector_columns_equal_bit_for_bit': columns,
                'image_difference_max_levels': largest,
                'image_difference_mean_levels': float(np.mean(mean)),
                'image_error_against_source_mean_levels': float(np.mean(error)),
                'bytes': sum(path.stat().st_size for path in root.rglob('*') if path.is_file()),
                'lerobot': said['lerobot'],
            }
        )
    return figures


def theirs_here(
    arguments: Arguments, lerobot: LeRobot, folder: Path, source: Dataset, episodes: list
) -> list[dict]:
    """Have LeRobot write the frames, open its datasets with our reader, compare, and train some steps."""
    renamed = {'observation.joint_positions': 'observation.state', 'observation.pose': 'observation.ee_pose'}
    names = [*renamed, 'action', *(IMAGE + camera for camera in source.cameras)]
    arrays = {renamed.get(n, n): np.concatenate([rows[n] for _, rows in episodes]) for n in names}
    lengths = [len(rows['action']) for _, rows in episodes]
    frames = folder / 'frames.npz'
    np.savez(frames, lengths=lengths, tasks=[words for words, _ in episodes], fps=source.rate_hz, **arrays)
    mapping = folder / 'exchange.yaml'
    cameras = {camera: camera for camera in source.cameras}
    mapping.write_text(yaml.safe_dump(MAPPING | {'rate_hz': source.rate_hz, 'cameras': cameras}))
    figures = []
    for kind in ('image', 'h264', 'libsvtav1'):
        root = folder / f'lerobot_{kind}'
        lerobot('write', str(frames), str(root), kind, FILE_MB)
        dataset = Dataset.open(root)
        assert dataset.lengths.tolist() == lengths
        assert [dataset.task_of(e) for e in range(len(lengths))] == [words for words, _ in episodes]
        for name, array in arrays.items():
            if not name.startswith(IMAGE):
                assert np.array_equal(dataset.column(name), array), f'{name} differs'
        out = folder / f'{root.name}.npz'
        lerobot('read', str(root), str(out), arguments.backend)
        with np.load(out) as theirs:
            difference = max(
                float(np.abs(theirs[IMAGE + c] - dataset.images(c).astype(np.float32)).max())
                for c in source.cameras
            )
        error = [
            float(np.abs(dataset.images(camera).astype(float) - arrays[IMAGE + camera]).mean())
            for camera in source.cameras
        ]
        found = open_demonstrations(root, load_robot(source.conventions['robot']), str(mapping))
        pose = np.abs(found.column('observation.pose')[:, :9] - arrays['observation.ee_pose'][:, :9]).max()
        figures.append(
            {
                'images': kind,
                'frames': dataset.n_frames,
                'episodes': dataset.n_episodes,
                'data_files': len(list(root.rglob('data/**/*.parquet'))),
                'video_files': len(list(root.rglob('*.mp4'))),
                'image_difference_max_levels': difference,
                'image_error_against_source_mean_levels': float(np.mean(error)),
                'pose_by_our_kinematics_largest_difference': float(pose),
                'training': train(arguments, folder, root, mapping, source),
            }
        )
    return figures


def train(arguments: Arguments, folder: Path, root: Path, mapping: Path, source: Dataset) -> dict[str, Any]:
    """Some Stage 2 steps on the shipped backbone; returns the losses at both ends."""
    from decoupled_policy_ros.training.config import Stage2Config
    from decoupled_policy_ros.training.stage2 import train_task

    out = folder / f'{root.name}_task'
    values = {
        'name': 'exchange', 'robot': source.conventions['robot'], 'dataset': root, 'mapping': str(mapping),
        'backbone': 'dp_mixer_panda', 'cameras': list(source.cameras), 'vectors': ['proprioception'],
        'encoder': {'crop': 76, 'base_channels': 16},
        'optimisation': {'steps': arguments.steps, 'batch_size': 16, 'warmup_steps': 2, 'threads': 1},
    }  # fmt: skip
    train_task(Stage2Config.model_validate(values), out)
    losses = json.loads((out / 'run.json').read_text())['losses']
    return {'steps': arguments.steps, 'first_loss': losses[0], 'last_loss': losses[-1]}


def main(arguments: Arguments) -> None:
    """Exchange, print, save."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, episodes = source_frames(arguments)
        with LeRobot(arguments.python, arguments.library_path, folder) as lerobot:
            ours = ours_there(arguments, lerobot, folder, source, episodes)
            theirs = theirs_here(arguments, lerobot, folder, source, episodes)
    table = Table(title='ours in LeRobot, and LeRobot here; differences in levels of 255')
    for column in ('written by', 'images', 'frames', 'read there and here', 'against the source', 'loss'):
        table.add_column(column, justify='right')
    for f in ours:
        table.add_row(
            'us', f['images'], str(f['frames']), f'max {f["image_difference_max_levels"]:g}',
            f'{f["image_error_against_source_mean_levels"]:.2f}', '',
        )  # fmt: skip
    for f in theirs:
        training = f['training']
        table.add_row(
            'LeRobot', f['images'], str(f['frames']), f'max {f["image_difference_max_levels"]:g}',
            f'{f["image_error_against_source_mean_levels"]:.2f}',
            f'{training["first_loss"]:.3f} to {training["last_loss"]:.3f} in {training["steps"]} steps',
        )  # fmt: skip
    Console(width=120).print(table)
    report = {
        'backend': arguments.backend,
        'dataset': str(arguments.dataset),
        'ours_in_lerobot': ours,
        'lerobot_here': theirs,
    }
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
