"""Episodes on disk: a rosbag2 folder each, with `episode.json` beside the bag.

    OUTPUT/episode_000000/                  complete; metadata.yaml, episode_000000_0.mcap, episode.json
    OUTPUT/.episode_000001.partial/         being recorded, or left by a recorder that was killed
        episode_000001_0.mcap               grows by whole chunks, see writer
        episode.json                        as known at the start
        progress.json                       messages received and written so far, by topic
        reserve                             room for the end of the file on a disk that becomes full
    OUTPUT/.discarded/episode_000002/       was kept, then recorded anew; nothing here is ever deleted

A folder gets its final name by a rename once everything in it is written. A recorder holds a lock (flock) on the
partial folder for as long as it lives; `recovery` makes episodes of those that nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from decoupled_policy_ros.data.bags.repair import repair_bag
from decoupled_policy_ros.data.bags.writer import BagWriter
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.files import free_mb, sync_folder, write_json

EPISODE_FILE = 'episode.json'
PROGRESS_FILE = 'progress.json'
RESERVE_FILE = 'reserve'
DISCARDED = '.discarded'
FORMAT = 1
#: What is in an episode.json, where it is.
FIELDS = {
    'robot': dict, 'robot.name': str, 'robot.description': str, 'instruction': str, 'success': bool, 'topics': dict,
}  # fmt: skip
PARTIAL = re.compile(r'\.episode_(\d{6,})\.partial')
_EPISODE = re.compile(r'episode_(\d{6,})')
_RESERVE_BYTES = 2**20


class EpisodeStore:
    """The folder that episodes go to.

    Args:
        folder: made if it is missing, now and whenever an episode begins.
        compression: of new bags, see `BagWriter`.

    Raises:
        DatasetError: the folder can't be made or written.
    """

    def __init__(self, folder: str | Path, compression: str = 'none'):
        self.folder = Path(folder).expanduser()
        self.compression = compression
        self._make_folder()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatasetError(f'{self.folder} can not be made: {error.strerror or error}') from error
        if not self.folder.is_dir() or not os.access(self.folder, os.W_OK | os.X_OK):
            raise DatasetError(f'{self.folder} can not be written')

    @property
    def free_mb(self) -> float:
        """Space left on the disk (MiB)."""
        return free_mb(self.folder)

    def episodes(self) -> list[Path]:
        """Complete episodes in their order."""
        return [path for _, path in sorted(self._numbered(_EPISODE))]

    def abandoned(self) -> list[Path]:
        """Partial folders that no living recorder holds."""
        return [path for _, path in sorted(self._numbered(PARTIAL)) if not is_locked(path)]

    def _numbered(self, pattern: re.Pattern[str]) -> Iterator[tuple[int, Path]]:
        for path in self.folder.iterdir():
            match = pattern.fullmatch(path.name)
            if match and path.is_dir():
                yield int(match[1]), path

    def next_number(self) -> int:
        """One more than the highest number of any episode, complete or partial."""
        numbers = [number for pattern in (_EPISODE, PARTIAL) for number, _ in self._numbered(pattern)]
        return max(numbers, default=-1) + 1

    def begin(self, header: Mapping[str, Any]) -> EpisodeWriter:
        """Start an episode under the next free number; `header` is what `episode.json` holds at the start.

        Raises:
            DatasetError: the folder can't be written.
        """
        self._make_folder()
        with locked(self.folder):  # two recorders never take one number
            return EpisodeWriter(self.folder, self.next_number(), header, self.compression)

    def set_aside(self, episode: Path) -> Path:
        """Move a complete episode to the folder of discarded ones, where it replaces nothing; returns its new path.

        Raises:
            DatasetError: the folder can't be written.
        """
        try:
            with locked(self.folder):
                folder = self.folder / DISCARDED
                folder.mkdir(exist_ok=True)
                names = (
                    episode.name,
                    *(f'{episode.name}_{i}' for i in range(2, len(os.listdir(folder)) + 3)),
                )
                target = next(folder / name for name in names if not (folder / name).exists())
                return episode.rename(target)
        except OSError as error:
            raise DatasetError(f'{episode} can not be set aside: {error.strerror or error}') from error


class EpisodeWriter:
    """One episode from its start to `finish` or `discard`; made by `EpisodeStore.begin`."""

    def __init__(self, output: Path, number: int, header: Mapping[str, Any], compression: str):
        self.number = number
        self.name = f'episode_{number:06d}'
        self.folder = output / f'.{self.name}.partial'
        self.header = {'format': FORMAT, 'success': None, **header}
        self._progress_bytes = 0
        self._lock = self._progress = -1
        try:
            self.folder.mkdir()
            self._lock = _lock(self.folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_json(self.folder / EPISODE_FILE, self.header)
            self._progress = os.open(
                self.folder / PROGRESS_FILE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
            _reserve(self.folder / RESERVE_FILE)
            self.bag = BagWriter(self.folder, self.name, compression)
        except (OSError, DatasetError) as error:
            for descriptor in (self._progress, self._lock):
                if descriptor >= 0:
                    os.close(descriptor)
            shutil.rmtree(self.folder, ignore_errors=True)
            reason = error.strerror or error if isinstance(error, OSError) else error
            raise DatasetError(f'{self.folder} can not be written: {reason}') from error

    def note_progress(self, instruction: str, topics: Mapping[str, Any]) -> None:
        """Write down what was received and written so far, for `recover`.

        Raises:
            DatasetError: the disk is full or gone.
        """
        text = json.dumps({'instruction': instruction, 'topics': dict(topics)})
        content = text.encode().ljust(self._progress_bytes)  # one call: whoever reads it sees all of it
        try:
            os.pwrite(self._progress, content, 0)
        except OSError as error:
            raise DatasetError(f'{self.folder} can not be written: {error.strerror or error}') from error
        self._progress_bytes = len(content)

    def finish(self, **values: Any) -> Path:
        """Complete the bag and its `episode.json` (the header with `values`), and give the folder its final name.

        A bag that could not be written to its end keeps what is intact.

        Raises:
            DatasetError: not one message was recorded (nothing is left then, if it can be removed), the disk is full
                or gone (the partial folder is left to `recover` then), or the folder was removed.
        """
        if not self.folder.is_dir():  # it would be made anew, without the bag
            self._release()
            raise DatasetError(f'{self.folder} is gone')
        if not self.bag.n_messages:
            self.discard()
            raise DatasetError(f'{self.name}: not one message was recorded; nothing is kept')
        try:
            self._finish_bag()
            write_json(self.folder / EPISODE_FILE, self.header | values)
            return publish(self.folder, self.name)
        except OSError as error:
            raise DatasetError(f'{self.folder} can not be finished: {error.strerror or error}') from error
        finally:
            self._release()

    def _finish_bag(self) -> None:
        try:
            self.bag.close()
            (self.folder / RESERVE_FILE).unlink(missing_ok=True)
        except DatasetError:
            self.bag.abandon()
            (self.folder / RESERVE_FILE).unlink(missing_ok=True)
            repair_bag([self.bag.path], self.bag.custom)

    def discard(self) -> None:
        """Throw the episode away.

        Raises:
            DatasetError: the folder, or a part of it, can't be removed.
        """
        self._close_files()  # a network's file system does not remove what is open
        try:
            shutil.rmtree(self.folder)
        except OSError as error:
            raise DatasetError(
                f'{self.name} is not recorded any more, but {self.folder} can not be removed: '
                f'{error.strerror or error}; remove it, or `decoupled-policy recover` makes an episode of what is left'
            ) from error
        finally:
            self._release()

    def _release(self) -> None:
        self._close_files()
        with contextlib.suppress(OSError):  # closed already
            os.close(self._lock)
        self._lock = -1

    def _close_files(self) -> None:
        self.bag.abandon()
        with contextlib.suppress(OSError):
            os.close(self._progress)
        self._progress = -1


def publish(partial: Path, name: str) -> Path:
    """Give a partial folder, whose bag and episode.json are complete, its final name; returns the final path."""
    for leftover in (PROGRESS_FILE, RESERVE_FILE):
        (partial / leftover).unlink(missing_ok=True)
    final = partial.with_name(name)
    os.rename(partial, final)
    sync_folder(final.parent)
    return final


def read_episode(folder: Path) -> dict[str, Any] | None:
    """Content of a folder's episode.json; None where there is none, as in a bag of another recorder.

    Raises:
        DatasetError: it is no JSON object, of a later format, or has a field of another type.
    """
    path = folder / EPISODE_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise DatasetError(f'{path} is damaged: {error}') from error
    if not isinstance(values, dict) or values.get('format') != FORMAT:
        found = values.get('format') if isinstance(values, dict) else type(values).__name__
        raise DatasetError(f'{path}: format {found!r} is not {FORMAT}, the one that is known here')
    robot = values.get('robot')
    fields = (
        values | {f'robot.{name}': value for name, value in robot.items()}
        if isinstance(robot, dict)
        else values
    )
    for name, kind in FIELDS.items():
        if not isinstance(fields.get(name), kind | None):
            raise DatasetError(f'{path} is damaged: {name} is {fields[name]!r}')
    return values


def is_locked(folder: Path) -> bool:
    """Whether a living recorder holds the folder."""
    descriptor = try_lock(folder)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder; waits for whoever holds it."""
    descriptor = _lock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def try_lock(folder: Path) -> int | None:
    """Hold the folder until the descriptor that is returned is closed; None where somebody else holds it."""
    try:
        return _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None


def _lock(folder: Path, operation: int) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, operation)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _reserve(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with contextlib.suppress(OSError):  # a file system without it: the last chunk makes room then
            os.posix_fallocate(descriptor, 0, _RESERVE_BYTES)
    finally:
        os.close(descriptor)
