"""Writes datasets: their columns are described in `dataset`, the files on disk in `lerobot_layout`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from decoupled_policy_ros.data import lerobot_layout as layout
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.poses import ACTION_DIM, ROTATION_CONVENTION

GRIPPER_CONVENTION = '-1 open, +1 closed'
ACTION_KIND = 'absolute pose_base_ee, commanded'

_ACTION_NAMES = ['x', 'y', 'z', 'r11', 'r21', 'r31', 'r12', 'r22', 'r32', 'gripper']
_PROPRIOCEPTION_NAMES = ['x', 'y', 'z', 'qx', 'qy', 'qz', 'qw']


class DatasetWriter:
    """Writes a dataset episode by episode; it appears at `root` on `close`, and not before.

    Until then it grows in a hidden folder beside `root`. Used as a context manager, an exception inside
    the block removes that folder and nothing appears.

    Args:
        root: folder to make; must not exist.
        robot: the arm that moved.
        rate_hz: frames per second.
        cameras: camera name -> (height, width).
        vectors: name -> dimension of further observation vectors.

    Raises:
        DatasetError: `root` exists.
    """

    def __init__(
        self,
        root: str | Path,
        robot: RobotDescription,
        rate_hz: float,
        cameras: Mapping[str, tuple[int, int]] | None = None,
        vectors: Mapping[str, int] | None = None,
    ):
        self.root = Path(root)
        if self.root.exists():
            raise DatasetError(f'{self.root} exists already; choose a folder that does not, or remove it')
        self.robot_name = robot.name
        self.fingerprint = Fingerprint.of(robot, rate_hz)
        self.rate_hz = rate_hz
        self.features = _features(robot, cameras or {}, vectors or {})
        self._schema = layout.arrow_schema(self.features)
        self._partial = self.root.with_name(f'.{self.root.name}.partial-{os.getpid()}')
        shutil.rmtree(self._partial, ignore_errors=True)
        (self._partial / 'meta').mkdir(parents=True)
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix='png')
        self._file: pq.ParquetWriter | None = None
        self._place = (0, 0)  # chunk index, file index of the file being written
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._statistics: list[dict[str, layout.Statistics]] = []
        self.n_frames = 0

    @property
    def n_episodes(self) -> int:
        """Episodes added so far."""
        return len(self._episodes)

    def add_episode(self, instruction: str, success: bool, frames: Mapping[str, ArrayLike]) -> None:
        """Append one episode.

        Args:
            instruction: what was done, in words; episodes with the same words share a task.
            success: whether it worked out.
            frames: column name -> rows (T, ...), for every column that this dataset declares.

        Raises:
            DatasetError: a column is missing, unknown, of another shape or length, or not finite.
        """
        arrays = _checked_frames(frames, self.features, self.n_episodes)
        length = len(arrays['action'])
        task_index = self._tasks.setdefault(instruction, len(self._tasks))
        arrays |= {
            'timestamp': (np.arange(length) / self.rate_hz).astype(np.float32),
            'frame_index': np.arange(length),
            'episode_index': np.full(length, self.n_episodes),
            'index': self.n_frames + np.arange(length),
            'task_index': np.full(length, task_index),
        }
        columns = [self._column(name, arrays[name]) for name in self._schema.names]
        self._open_file().write_table(pa.table(columns, schema=self._schema), row_group_size=length)
        self._statistics.append(
            {k: layout.feature_statistics(arrays[k], f) for k, f in self.features.items()}
        )
        self._episodes.append(
            {
                'episode_index': self.n_episodes,
                'tasks': [instruction],
                'length': length,
                'success': bool(success),
                'data/chunk_index': self._place[0],
                'data/file_index': self._place[1],
                'dataset_from_index': self.n_frames,
                'dataset_to_index': self.n_frames + length,
                'meta/episodes/chunk_index': 0,
                'meta/episodes/file_index': 0,
            }
        )
        self.n_frames += length

    def _column(self, name: str, array: NDArray[Any]) -> pa.Array:
        if self.features[name]['dtype'] == 'image':
            return layout.arrow_images(array, self._pool)
        return layout.arrow_vector(array, self._schema.field(name).type)

    def _open_file(self) -> pq.ParquetWriter:
        """The data file to append to; a new one after DATA_FILE_MB, so that no file grows without bound."""
        chunk, file = self._place
        if self._file is not None:
            path = self._partial / layout.DATA_PATH.format(chunk_index=chunk, file_index=file)
            if path.stat().st_size < layout.DATA_FILE_MB * 2**20:
                return self._file
            self._file.close()
            self._place = chunk, file = (chunk, file + 1) if file + 1 < layout.CHUNK_FILES else (chunk + 1, 0)
        path = self._partial / layout.DATA_PATH.format(chunk_index=chunk, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = pq.ParquetWriter(path, self._schema, compression='snappy')
        return self._file

    def close(self) -> Path:
        """Write the metadata and let the dataset appear at `root`; returns `root`.

        Raises:
            DatasetError: no episode was added, or `root` came into being meanwhile.
        """
        if not self._episodes:
            self.abort()
            raise DatasetError(f'{self.root}: no episode was added; a dataset holds at least one')
        if self._file is not None:
            self._file.close()
            self._file = None
        self._pool.shutdown()
        self._write_metadata()
        if self.root.exists():
            raise DatasetError(
                f'{self.root} came into being meanwhile; this dataset is left at {self._partial}'
            )
        os.rename(self._partial, self.root)
        return self.root

    def abort(self) -> None:
        """Remove everything that was written; nothing appears at `root`."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._pool.shutdown()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _write_metadata(self) -> None:
        total = {key: layout.merge_statistics([s[key] for s in self._statistics]) for key in self.features}
        write_json(self._partial / layout.STATS_PATH, _to_lists(total), indent=2)
        write_json(self._partial / layout.INFO_PATH, self._info(), indent=2)
        pq.write_table(layout.tasks_table(list(self._tasks)), self._partial / layout.TASKS_PATH)
        rows = [
            episode
            | {f'stats/{k}/{s}': v.tolist() for k, stats in statistics.items() for s, v in stats.items()}
            for episode, statistics in zip(self._episodes, self._statistics, strict=True)
        ]
        path = self._partial / layout.EPISODES_PATH.format(chunk_index=0, file_index=0)
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), path, compression='snappy')

    def _info(self) -> dict[str, Any]:
        return {
            'codebase_version': layout.VERSION,
            'robot_type': self.robot_name,
            'total_episodes': self.n_episodes,
            'total_frames': self.n_frames,
            'total_tasks': len(self._tasks),
            'chunks_size': layout.CHUNK_FILES,
            'data_files_size_in_mb': layout.DATA_FILE_MB,
            'video_files_size_in_mb': 2 * layout.DATA_FILE_MB,
            # LeRobot wants an integer where there is one.
            'fps': int(self.rate_hz) if float(self.rate_hz).is_integer() else self.rate_hz,
            'splits': {'train': f'0:{self.n_episodes}'},
            'data_path': layout.DATA_PATH,
            'video_path': None,
            'features': self.features,
            layout.OWN_BLOCK: {
                'robot': self.robot_name,
                'fingerprint': self.fingerprint.to_dict(),
                'rotation': ROTATION_CONVENTION,
                'gripper': GRIPPER_CONVENTION,
                'action': ACTION_KIND,
            },
        }

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _features(
    robot: RobotDescription, cameras: Mapping[str, tuple[int, int]], vectors: Mapping[str, int]
) -> dict[str, Any]:
    joints = list(robot.all_joint_names)
    features = {
        'observation.joint_positions': layout.vector_feature(len(joints), joints),
        'observation.proprioception': layout.vector_feature(
            7 + len(robot.gripper.joint_names), [*_PROPRIOCEPTION_NAMES, *robot.gripper.joint_names]
        ),
        'observation.pose': layout.vector_feature(ACTION_DIM, _ACTION_NAMES),
        'action': layout.vector_feature(ACTION_DIM, _ACTION_NAMES),
    }
    for name, dim in vectors.items():
        features[f'observation.{name}'] = layout.vector_feature(dim)
    for name, (height, width) in cameras.items():
        features[layout.IMAGE_PREFIX + name] = layout.image_feature(height, width)
    return features | layout.INDEX_FEATURES


def _checked_frames(
    frames: Mapping[str, ArrayLike], features: dict[str, Any], episode: int
) -> dict[str, NDArray[Any]]:
    expected = set(features) - set(layout.INDEX_FEATURES)
    if set(frames) != expected:
        missing, unknown = sorted(expected - set(frames)), sorted(set(frames) - expected)
        raise DatasetError(
            f'episode {episode}: columns missing {missing}, unknown {unknown}; needs {sorted(expected)}'
        )
    length = len(np.asarray(frames['action']))
    arrays = {}
    for name in expected:
        array, shape = np.asarray(frames[name]), (length, *features[name]['shape'])
        if length == 0 or array.shape != shape:
            raise DatasetError(
                f'episode {episode}: {name} has shape {array.shape}, it should have {shape} with T > 0'
            )
        if features[name]['dtype'] == 'image':
            if array.dtype != np.uint8:
                raise DatasetError(f'episode {episode}: {name} is {array.dtype}, images are uint8')
            arrays[name] = array
            continue
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).all(-1))[0])
            raise DatasetError(
                f'episode {episode}: {name} is not finite in frame {row}: {array[row].tolist()}'
            )
        arrays[name] = array.astype(np.float32)
    return arrays


def _to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _to_lists(v) for k, v in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
