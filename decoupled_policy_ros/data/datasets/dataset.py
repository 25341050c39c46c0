"""Datasets of demonstrations: reading the LeRobot v3 layout, and what our columns mean.

Frame k of an episode holds the observation at t_k and the command in force from t_k to t_{k+1}:

    observation.joint_positions   (n,)       arm joints then gripper joints, in the robot's order
    observation.proprioception    (9,)       ee position 3 | quaternion xyzw 4 | gripper joints 2
    observation.pose              (10,)      achieved pose and measured gripper, in the form of an action
    action                        (10,)      commanded pose and gripper; or the achieved ones of the next frame
    observation.<vector>          (dim,)     optional, e.g. the simulator's object state
    observation.images.<camera>   (H, W, 3)  uint8 RGB, kept as PNG or as video

What LeRobot has no place for (whose kinematics, which conventions, which of the two actions) stands in info.json
under `decoupled_policy`; datasets that LeRobot or others wrote are read too, but have none of it. A dataset appears
under its name when it is complete, and only then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from decoupled_policy_ros.data.datasets import lerobot_layout as layout
from decoupled_policy_ros.data.datasets.episode import EncodedEpisode, encode_episode
from decoupled_policy_ros.data.datasets.files import DataFiles
from decoupled_policy_ros.data.datasets.spec import DatasetSpec
from decoupled_policy_ros.data.datasets.statistics import Statistics, from_lists
from decoupled_policy_ros.data.datasets.writer import DatasetWriter
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.observation.image import fit_image
from decoupled_policy_ros.robot.fingerprint import Fingerprint

__all__ = ['Dataset', 'DatasetSpec', 'DatasetWriter', 'EncodedEpisode', 'Episode', 'encode_episode']

_IMAGE_ROWS = 512  # encoded images in memory at a time


@dataclass(frozen=True)
class Episode:
    """One episode: `arrays` maps column name -> rows (T, ...), images are decoded on request."""

    index: int
    length: int
    instruction: str
    success: bool | None
    arrays: dict[str, NDArray[Any]]
    _dataset: Dataset

    def images(self, camera: str, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """All images (T, H, W, 3) of one camera, RGB, resized to `size` = (H, W) if that is given."""
        return self._dataset.images(camera, self.index, size)


def label_counts(labels: Sequence[bool | None]) -> dict[str, int]:
    """How many episodes are labelled a success, a failure, and not at all."""
    return {
        'success': sum(label is True for label in labels),
        'failure': sum(label is False for label in labels),
        'unlabelled': sum(label is None for label in labels),
    }


class Dataset:
    """Read access to a dataset in LeRobot v3 layout; columns are read when they are asked for."""

    def __init__(self, root: Path, info: dict[str, Any], episodes: pa.Table, tasks: list[str]):
        self.root = root
        self.info = info
        self.tasks = tasks
        self._episodes = episodes
        self.lengths = episodes['length'].to_numpy().astype(np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)
        self._files = DataFiles(root, info['data_path'], episodes, self.starts, self.lengths)

    @classmethod
    def open(cls, root: str | Path) -> Dataset:
        """Open the dataset at `root`.

        Raises:
            DatasetError: it isn't there, isn't in v3 layout, or its metadata don't fit together.
        """
        root = Path(root)
        try:
            info = json.loads((root / layout.INFO_PATH).read_text())
            layout.require_info(info, root)
            paths = sorted((root / 'meta' / 'episodes').glob('chunk-*/file-*.parquet'))
            columns = [n for n in pq.read_schema(paths[0]).names if not n.startswith('stats/')]
            tables = [pq.read_table(path, columns=columns) for path in paths]
            episodes = pa.concat_tables(tables, promote_options='permissive')
            tasks = layout.task_names(pq.read_table(root / layout.TASKS_PATH))
        except (OSError, ValueError, IndexError, pa.ArrowException) as error:
            raise DatasetError(f'{root} is no readable LeRobot {layout.VERSION} dataset: {error}') from error
        layout.require_episode_columns(episodes.column_names, root)
        episodes = episodes.sort_by('episode_index')
        if episodes['episode_index'].to_pylist() != list(range(len(episodes))):
            raise DatasetError(f'{root}: meta/episodes does not count its episodes from 0 without a gap')
        lengths = episodes['length'].to_numpy()
        if lengths.sum() != info['total_frames']:
            raise DatasetError(
                f'{root}: episode lengths do not add up to {info["total_frames"]} frames of info.json'
            )
        wrong = np.flatnonzero(episodes['dataset_to_index'].to_numpy() != np.cumsum(lengths))
        if len(wrong):
            raise DatasetError(
                f'{root}: by its index, episode {wrong[0]} does not end where its length says; frames must lie one '
                'after the other'
            )
        return cls(root, info, episodes, tasks)

    @property
    def n_episodes(self) -> int:
        """Number of episodes."""
        return len(self.lengths)

    @property
    def n_frames(self) -> int:
        """Number of frames of all episodes."""
        return int(self.lengths.sum())

    @property
    def labels(self) -> list[bool | None] | None:
        """Whether each episode worked out, None where nobody said; None for a dataset without such labels."""
        if 'success' not in self._episodes.column_names:
            return None
        return self._episodes['success'].to_pylist()

    @property
    def rate_hz(self) -> float:
        """Frames per second."""
        return float(self.info['fps'])

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """Column name -> dtype, shape, names."""
        return self.info['features']

    @property
    def cameras(self) -> list[str]:
        """Names of the cameras."""
        return [
            name.removeprefix(layout.IMAGE_PREFIX)
            for name in self.features
            if name.startswith(layout.IMAGE_PREFIX)
        ]

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Whose kinematics this is.

        Raises:
            DatasetError: the dataset does not say.
        """
        try:
            return Fingerprint.from_dict(self.info[layout.OWN_BLOCK]['fingerprint'])
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(
                f'{self.root}: info.json has no {layout.OWN_BLOCK}.fingerprint ({error!r})'
            ) from error

    @property
    def conventions(self) -> dict[str, Any]:
        """How poses, gripper and actions are written down, as info.json says; empty where others wrote it."""
        return {k: v for k, v in self.info.get(layout.OWN_BLOCK, {}).items() if k != 'fingerprint'}

    @cached_property
    def statistics(self) -> dict[str, Statistics]:
        """Feature -> min, max, mean, std, count, quantiles over all frames."""
        return from_lists(json.loads((self.root / layout.STATS_PATH).read_text()))

    def column(self, name: str, episode: int | None = None) -> NDArray[Any]:
        """Rows (N, ...) of one column, of all episodes one after the other or of one.

        Raises:
            DatasetError: no such column or episode, an image column, or a damaged file.
        """
        feature, rows = self._feature(name), self._rows(episode)
        if feature['dtype'] in ('image', 'video'):
            raise DatasetError(f'{name} is a column of images; read it with images()')
        column = self._files.read([name], episode)[name]
        if len(column) != rows:
            raise DatasetError(f'{self.root}: {name} has {len(column)} rows for {rows} frames')
        return layout.vector_column(column, feature, name)

    def images(
        self, camera: str, episode: int | None = None, size: tuple[int, int] | None = None
    ) -> NDArray[np.uint8]:
        """Images (N, H, W, 3) of one camera, RGB, of all episodes one after the other or of one.

        Args:
            camera: its name, with or without LeRobot's prefix.
            episode: whose images, or None for all.
            size: (H, W) to which each image is resized as it is decoded, the way the live node does; None
                leaves them as they are stored.

        Raises:
            DatasetError: no such camera or episode, an image or video that can't be decoded, one that is of
                another size than declared, a video with more or fewer frames than its episode, or a size larger
                than what this package stored.
        """
        name = camera if camera in self.features else layout.IMAGE_PREFIX + camera
        feature = self._feature(name)
        if feature['dtype'] not in ('image', 'video'):
            raise DatasetError(f'{name} is a column of {feature["dtype"]}; read it with column()')
        stored, rows = layout.image_size(feature, name), self._rows(episode)
        self._require_not_enlarged(name, stored, size)
        images = np.empty((rows, *(size or stored), 3), np.uint8)
        if feature['dtype'] == 'video':
            self._read_videos(name, stored, episode, images)
            return images
        first = 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            columns = (
                self._files.stream(name, _IMAGE_ROWS)
                if episode is None
                else [self._files.read([name], episode)[name]]
            )
            for column in columns:
                part = images[first : first + len(column)]
                layout.decode_images(column, part, stored, pool, name, first)
                first += len(column)
        if first != rows:
            raise DatasetError(f'{self.root}: {name} has {first} images for {rows} frames')
        return images

    def _require_not_enlarged(self, name: str, stored: tuple[int, int], size: tuple[int, int] | None) -> None:
        """What convert shrank would be enlarged to a blur that a policy, given the camera's pictures, never sees."""
        if layout.OWN_BLOCK not in self.info or size is None:
            return
        if size[0] > stored[0] or size[1] > stored[1]:
            raise DatasetError(
                f'{self.root}: {name} is stored as {stored[0]}x{stored[1]} and can not be enlarged to '
                f'{size[0]}x{size[1]}: take at most that, or convert the recordings with --size {size[0]} {size[1]}'
            )

    def _read_videos(
        self, name: str, stored: tuple[int, int], episode: int | None, images: NDArray[np.uint8]
    ) -> None:
        from decoupled_policy_ros.data.datasets.videos import read_episodes  # who has no videos needs no PyAV

        wanted = (images.shape[1], images.shape[2])

        def put(row: int, image: NDArray[np.uint8]) -> None:
            if image.shape[:2] != stored:
                raise DatasetError(f'{name}: the video is {image.shape[:2]}, but info.json declares {stored}')
            images[row] = fit_image(image, wanted)

        def path_of(chunk: int, file: int) -> Path:
            template = self.info['video_path']
            return self.root / template.format(video_key=name, chunk_index=chunk, file_index=file)

        rows = self._episodes if episode is None else self._episodes.slice(episode, 1)
        read_episodes(rows, name, path_of, self.rate_hz, put)

    def task_of(self, episode: int) -> str:
        """The instruction of an episode; where several were given, the one that it begins with."""
        self._check_episode(episode)
        if 'tasks' in self._episodes.column_names:
            named = self._episodes['tasks'][episode].as_py()
            if named and len(named) == 1:
                return str(named[0])
        return self.tasks[int(self.column('task_index', episode)[0])]

    def episode(self, index: int) -> Episode:
        """Episode `index` with all its columns but the images."""
        self._check_episode(index)
        names = [n for n, f in self.features.items() if f['dtype'] not in ('image', 'video')]
        table = self._files.read(names, index)
        row = self._episodes.slice(index, 1).to_pylist()[0]
        return Episode(
            index=index,
            length=int(self.lengths[index]),
            instruction=self.task_of(index),
            success=row.get('success'),
            arrays={n: layout.vector_column(table[n], self.features[n], n) for n in names},
            _dataset=self,
        )

    def _check_episode(self, index: int) -> None:
        if not 0 <= index < self.n_episodes:
            raise DatasetError(f'{self.root} has no episode {index}; it has 0 to {self.n_episodes - 1}')

    def _rows(self, episode: int | None) -> int:
        if episode is None:
            return self.n_frames
        self._check_episode(episode)
        return int(self.lengths[episode])

    def _feature(self, name: str) -> dict[str, Any]:
        if name not in self.features:
            raise DatasetError(f'{self.root} has no column {name!r}; it has {sorted(self.features)}')
        return self.features[name]
