"""Writes datasets: their columns are described in `dataset`, the files on disk in `lerobot_layout`."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from decoupled_policy_ros.data.datasets import lerobot_layout as layout
from decoupled_policy_ros.data.datasets.episode import EncodedEpisode, Frames, encode_episode
from decoupled_policy_ros.data.datasets.metadata import EpisodeTable
from decoupled_policy_ros.data.datasets.spec import DatasetSpec
from decoupled_policy_ros.data.datasets.statistics import to_lists, vector_statistics
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.files import sync_folder, sync_tree, write_json

if TYPE_CHECKING:
    from decoupled_policy_ros.data.datasets.videos import JoinedVideos


class DatasetWriter:
    """Writes a dataset episode by episode; it appears at `root` on `close`, and not before.

    Until then it grows in a hidden folder beside `root`. Used as a context manager, an exception inside
    the block removes that folder and nothing appears; so does a disk that is full.

    Args:
        root: folder to make; must not exist.
        spec: what the dataset looks like.
        provenance: JSON-able, where it came from; goes into info.json.

    Raises:
        DatasetError: `root` exists, or can't be written.
    """

    def __init__(self, root: str | Path, spec: DatasetSpec, provenance: Mapping[str, Any] | None = None):
        self.root = Path(root)
        if self.root.exists():
            raise DatasetError(f'{self.root} exists already; choose a folder that does not, or remove it')
        self.spec = spec
        self.features = spec.features
        self._provenance = dict(provenance or {})
        self._schema = layout.arrow_schema(self.features)
        self._partial = self.root.with_name(f'.{self.root.name}.partial-{uuid.uuid4().hex[:8]}')
        self._file: pq.ParquetWriter | None = None
        self._place = (0, 0)  # chunk index, file index of the file being written
        self._tasks: dict[str, int] = {}
        self._episodes = EpisodeTable(self._partial)
        self.n_frames = 0
        self._videos: dict[str, JoinedVideos] = {}
        with self._all_or_nothing():
            (self._partial / 'meta').mkdir(parents=True)
            self._videos = self._open_videos()

    def _open_videos(self) -> dict[str, JoinedVideos]:
        if self.spec.images == 'png' or not self.spec.cameras:
            return {}
        from decoupled_policy_ros.data.datasets.videos import JoinedVideos  # who writes PNG needs no PyAV

        keys = [layout.IMAGE_PREFIX + name for name, _ in self.spec.cameras]
        return {key: JoinedVideos(self._partial, key, self.spec.rate_hz) for key in keys}

    @property
    def n_episodes(self) -> int:
        """Episodes added so far."""
        return self._episodes.n_episodes

    def add_episode(self, instruction: str, success: bool | None, frames: Frames) -> None:
        """Encode and append one episode; the arguments are those of `encode_episode` and `add`.

        Raises:
            DatasetError: a column is missing, unknown, of another shape or length, or not finite.
        """
        folder = self._partial / f'episode_{self.n_episodes:06d}'
        encoded = encode_episode(self.spec, frames, folder, threads=os.cpu_count() or 1)
        self.add(encoded, instruction, success)
        shutil.rmtree(folder)

    def add(self, encoded: EncodedEpisode, instruction: str, success: bool | None) -> None:
        """Append one encoded episode, whose folder stays as it is.

        Args:
            encoded: the episode.
            instruction: what was done, in words; episodes with the same words share a task.
            success: whether it worked out; None where nobody said.

        Raises:
            DatasetError: the episode was encoded for another dataset, or can't be read or written; in the latter
                case the dataset is given up.
        """
        mine, theirs = self.spec.to_dict(), encoded.spec.to_dict()
        differing = [f'{k}: {theirs[k]!r}, here {mine[k]!r}' for k in mine if theirs[k] != mine[k]]
        if differing:
            raise DatasetError(f'{encoded.folder} is no episode of {self.root}: {"; ".join(differing)}')
        task_index = self._tasks.setdefault(instruction, len(self._tasks))
        with self._all_or_nothing():
            index = self._append_frames(encoded, task_index)
            videos = {
                f'videos/{name}/{key}': value
                for name, joined in self._videos.items()
                for key, value in joined.add(encoded.video_path(_camera(name)), encoded.length).items()
            }
        of_index = {name: vector_statistics(rows) for name, rows in index.items()}
        row = {
            'episode_index': self.n_episodes,
            'tasks': [instruction],
            'length': encoded.length,
            'success': None if success is None else bool(success),
            'data/chunk_index': self._place[0],
            'data/file_index': self._place[1],
            'dataset_from_index': self.n_frames,
            'dataset_to_index': self.n_frames + encoded.length,
            **videos,
        }
        with self._all_or_nothing():
            self._episodes.add(row, {k: {**encoded.statistics, **of_index}[k] for k in self.features})
        self.n_frames += encoded.length

    def _append_frames(self, encoded: EncodedEpisode, task_index: int) -> dict[str, Any]:
        """Copy the frames, row group by row group, with the index columns (T,) that it returns."""
        n = encoded.length
        index = {
            'timestamp': (np.arange(n) / self.spec.rate_hz).astype(np.float32),
            'frame_index': np.arange(n),
            'episode_index': np.full(n, self.n_episodes),
            'index': self.n_frames + np.arange(n),
            'task_index': np.full(n, task_index),
        }
        out, first = self._open_file(), 0
        with pq.ParquetFile(encoded.frames_path) as file:
            if file.metadata.num_rows != n:
                raise DatasetError(f'{encoded.folder} holds {file.metadata.num_rows} frames, not {n}')
            for group in range(file.metadata.num_row_groups):
                table = file.read_row_group(group)
                rows = slice(first, first + len(table))
                columns = [
                    layout.arrow_vector(index[name][rows], self._schema.field(name).type)
                    if name in index
                    else table[name]
                    for name in self._schema.names
                ]
                out.write_table(pa.table(columns, schema=self._schema), row_group_size=len(table))
                first = rows.stop
        return index

    def _open_file(self) -> pq.ParquetWriter:
        """The data file to append to; a new one after DATA_FILE_MB, so that no file grows without bound."""
        chunk, file = self._place
        if self._file is not None:
            path = self._partial / layout.DATA_PATH.format(chunk_index=chunk, file_index=file)
            if path.stat().st_size < layout.DATA_FILE_MB * 2**20:
                return self._file
            self._file.close()
            self._place = chunk, file = layout.next_place(self._place)
        path = self._partial / layout.DATA_PATH.format(chunk_index=chunk, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = pq.ParquetWriter(path, self._schema, compression='snappy')
        return self._file

    def close(self) -> Path:
        """Write the metadata and let the dataset appear at `root`; returns `root`.

        Raises:
            DatasetError: no episode was added, the disk is full, or `root` came into being meanwhile.
        """
        if not self.n_episodes:
            self.abort()
            raise DatasetError(f'{self.root}: no episode was added; a dataset holds at least one')
        with self._all_or_nothing():
            if self._file is not None:
                self._file.close()
                self._file = None
            for name, joined in self._videos.items():
                self.features[name]['info'] = joined.close()
            self._write_metadata()
        if self.root.exists():
            raise DatasetError(
                f'{self.root} came into being meanwhile; this dataset is left at {self._partial}'
            )
        with self._all_or_nothing():
            sync_tree(self._partial)
            os.rename(self._partial, self.root)
        sync_folder(self.root.parent)
        return self.root

    def abort(self) -> None:
        """Remove everything that was written; nothing appears at `root`."""
        closing = [video.close for video in self._videos.values()] + [self._episodes.close_file]
        for close in closing if self._file is None else [self._file.close, *closing]:
            # Where the disk is full, closing fails as writing did; the files go anyway.
            with contextlib.suppress(OSError, pa.ArrowException, DatasetError):
                close()
        self._file = None
        shutil.rmtree(self._partial, ignore_errors=True)

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Whatever fails in the block, nothing is left; a failing disk is a DatasetError."""
        try:
            yield
        except BaseException as error:
            self.abort()
            if isinstance(error, (OSError, pa.ArrowException)):
                raise DatasetError(f'{self.root} can not be written: {error}') from error
            raise

    def _write_metadata(self) -> None:
        self._episodes.close()
        write_json(self._partial / layout.STATS_PATH, to_lists(self._episodes.statistics), indent=2)
        write_json(self._partial / layout.INFO_PATH, self._info(), indent=2)
        pq.write_table(layout.tasks_table(list(self._tasks)), self._partial / layout.TASKS_PATH)

    def _info(self) -> dict[str, Any]:
        rate_hz = self.spec.rate_hz
        return {
            'codebase_version': layout.VERSION,
            'robot_type': self.spec.robot_name,
            'total_episodes': self.n_episodes,
            'total_frames': self.n_frames,
            'total_tasks': len(self._tasks),
            'chunks_size': layout.CHUNK_FILES,
            'data_files_size_in_mb': layout.DATA_FILE_MB,
            'video_files_size_in_mb': layout.VIDEO_FILE_MB,
            # LeRobot wants an integer where there is one.
            'fps': int(rate_hz) if rate_hz.is_integer() else rate_hz,
            'splits': {'train': f'0:{self.n_episodes}'},
            'data_path': layout.DATA_PATH,
            'video_path': layout.VIDEO_PATH if self._videos else None,
            'features': self.features,
            layout.OWN_BLOCK: self.spec.conventions()
            | ({'provenance': self._provenance} if self._provenance else {}),
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


def _camera(feature: str) -> str:
    return feature.removeprefix(layout.IMAGE_PREFIX)
