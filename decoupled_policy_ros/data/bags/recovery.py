"""`decoupled-policy recover FOLDER`: episodes and bags that their recorder did not live to finish."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from decoupled_policy_ros.data.bags.episodes import (
    EPISODE_FILE,
    PARTIAL,
    PROGRESS_FILE,
    RESERVE_FILE,
    EpisodeStore,
    locked,
    publish,
    read_episode,
    try_lock,
)
from decoupled_policy_ros.data.bags.format import METADATA_FILE
from decoupled_policy_ros.data.bags.reader import bag_summary
from decoupled_policy_ros.data.bags.repair import Repair, rebuild_metadata, repair_bag
from decoupled_policy_ros.data.bags.salvage import Scan, scan_mcap
from decoupled_policy_ros.data.bags.unended import (
    RECOVERED_SUFFIX,
    has_end,
    is_one_recording,
    recording_files,
)
from decoupled_policy_ros.data.bags.writer import LIBRARY
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.files import write_json

REST_SUFFIX, DAMAGED_SUFFIX = '.rest', '.damaged'


@dataclass(frozen=True)
class Recovery:
    """What became of one partial episode or truncated bag.

    `path` is None where nothing was made of it, and `note` says why; `failed` where that can be made good, as a full
    disk can. `received` is what the recorder had noted down by topic when it died; a bag of another recorder has none.
    """

    source: Path
    path: Path | None
    note: str = ''
    saved: dict[str, int] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    lost_bytes: int = 0
    failed: bool = False

    def lost(self, topic: str) -> int:
        """Messages of a topic that had been received and are not in the bag."""
        return max(0, self.received.get(topic, 0) - self.saved.get(topic, 0))

    @property
    def lost_messages(self) -> int:
        """Messages of all topics that had been received and are not in the bag."""
        return sum(self.lost(topic) for topic in self.received)


def recover(folder: str | Path) -> list[Recovery]:
    """Make an episode of each partial one in `folder` and below, and a bag beside each truncated one.

    A finished episode that was cut later is such a bag; what its episode.json says of it goes with what is saved. A
    metadata.yaml that says nothing, as after a power cut, is written anew from what is in the files, as is one that
    is missing beside files with the names of one recording.
    Nothing that a living recorder is writing is touched. To do it again does nothing. One that can't be read or
    written does not keep the others from being recovered.

    Raises:
        DatasetError: the folder is missing.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DatasetError(f'{folder} is no folder')
    done = []
    for kind, path in list(_find(folder)):
        try:
            recovery = _recover_episode(path) if kind == 'episode' else _recover_bag(path)
        except Exception as error:  # whatever is wrong with one, the others are recovered
            reason = str(error) if isinstance(error, (DatasetError, OSError)) else repr(error)
            recovery = Recovery(path, None, f'not recovered: {reason}', failed=True)
        if recovery is not None:
            done.append(recovery)
    return done


def _find(folder: Path) -> Iterator[tuple[str, Path]]:
    for root, folders, files in os.walk(folder.resolve()):
        folders.sort()
        path = Path(root)
        if PARTIAL.fullmatch(path.name):
            folders.clear()
            yield 'episode', path
        elif path.name.startswith('.') and path != folder.resolve():
            folders.clear()
        elif any(name.endswith('.mcap') for name in files):
            yield 'bag', path


def recovery_table(recoveries: Sequence[Recovery]) -> Table:
    """What was saved and what was lost, by topic, for the terminal."""
    table = Table(title='recovered' if any(recovery.path for recovery in recoveries) else 'nothing recovered')
    table.add_column('from', overflow='fold')
    table.add_column('topic', overflow='fold')
    for name in ('received', 'saved', 'lost', 'bytes cut'):
        table.add_column(name, justify='right')
    for recovery in recoveries:
        topics = list(dict.fromkeys([*recovery.saved, *recovery.received])) or ['']
        for i, topic in enumerate(topics):
            noted = topic in recovery.received
            table.add_row(
                '' if i else escape(recovery.source.name),
                escape(topic) or '-',
                str(recovery.received[topic]) if noted else '?',
                str(recovery.saved.get(topic, 0)),
                str(recovery.lost(topic)) if noted else '?',
                '' if i else str(recovery.lost_bytes),
                end_section=i == len(topics) - 1,
            )
    return table


# --- a partial episode ---------------------------------------------------------------------------


def _recover_episode(partial: Path) -> Recovery | None:
    with locked(partial.parent):
        lock = try_lock(partial)
        if lock is None:
            return Recovery(partial, None, 'a recorder is writing it: left alone')
    try:
        return _finish_episode(partial)
    finally:
        os.close(lock)


def _finish_episode(partial: Path) -> Recovery:
    progress = _read_progress(partial)
    topics = _noted_topics(progress)
    received = {name: int(topic['received']) for name, topic in topics.items()}
    bag = next(iter(sorted(partial.glob('*.mcap'))), None)
    scan = scan_mcap(bag) if bag is not None else Scan(0)
    if bag is None or not (scan.blocks or scan.lost_bytes):
        shutil.rmtree(partial)
        return Recovery(partial, None, 'not one message was written: removed', {}, received)
    if not scan.blocks:
        note = f'not one message is intact, {_damage(bag, scan)}: kept as it is'
        return Recovery(partial, None, note, {}, received, scan.lost_bytes)
    header, note = _header_of_bag(partial)
    if note:  # with such a file nobody would read the episode
        os.rename(partial / EPISODE_FILE, partial / f'{EPISODE_FILE}{DAMAGED_SUFFIX}')
    if scan.damage:
        rest = _keep_rest(bag, scan)
        note = '; '.join(filter(None, (note, f'{_damage(bag, scan)}: what follows is kept in {rest.name}')))
    (partial / RESERVE_FILE).unlink(missing_ok=True)
    repair = repair_bag([bag], {'recorder': LIBRARY, 'recovered_from': partial.name})
    done = Recovery(partial, _final_path(partial), note, repair.messages, received, repair.lost_bytes)
    if header:
        header |= {'instruction': progress.get('instruction', header.get('instruction', '')), 'success': None}
        write_json(partial / EPISODE_FILE, _recovered_header(header, topics, repair, done, scan.size))
    publish(partial, _final_path(partial).name)
    return done


def _noted_topics(progress: dict[str, Any]) -> dict[str, Any]:
    """What was noted of each topic; a note that a power cut left half written may be anything."""
    topics = progress.get('topics')
    noted = topics.items() if isinstance(topics, dict) else ()
    return {name: t for name, t in noted if isinstance(t, dict) and isinstance(t.get('received'), int)}


def _damage(bag: Path, scan: Scan) -> str:
    return f'{bag.name} is damaged at byte {scan.kept_end} ({scan.damage or "it ends there"})'


def _keep_rest(bag: Path, scan: Scan) -> Path:
    """Copy what the repair is going to cut off: after damage, unlike after a torn end, there may be whole chunks."""
    rest = bag.with_name(f'{bag.name}{REST_SUFFIX}')
    try:
        with bag.open('rb') as file, rest.open('wb') as copy:
            file.seek(scan.kept_end)
            shutil.copyfileobj(file, copy)
            copy.flush()
            os.fsync(copy.fileno())
    except OSError as error:  # half a copy takes up what is left of a full disk
        rest.unlink(missing_ok=True)
        raise DatasetError(f'{rest} can not be written: {error.strerror}') from error
    return rest


def _recovered_header(
    header: Mapping[str, Any], topics: dict[str, Any], repair: Repair, done: Recovery, bytes_found: int
) -> dict[str, Any]:
    """What episode.json says of an episode once it is recovered; `topics` is what the recorder said of them."""
    recovered = {
        'from': done.source.name,
        'bytes_found': bytes_found,
        'lost_bytes': done.lost_bytes,
        'lost_messages': done.lost_messages,
        'messages': {
            name: {'received': done.received.get(name, saved), 'saved': saved, 'lost': done.lost(name)}
            for name, saved in repair.messages.items()
        },
    }
    topics = _topics(topics, repair)
    return {**header, 'ended_ns': repair.end_ns, 'topics': topics, 'recovered': recovered}


def _topics(noted: dict[str, Any], repair: Repair) -> dict[str, Any]:
    """What episode.json says of each topic, by what the recorder noted down and what is in the bag."""
    return {
        name: {'type': repair.types[name], 'received': saved, **noted.get(name, {}), 'written': saved}
        for name, saved in repair.messages.items()
    }


def _read_progress(partial: Path) -> dict[str, Any]:
    try:
        progress = json.loads((partial / PROGRESS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}  # killed before it was first written
    return progress if isinstance(progress, dict) else {}


def _final_path(partial: Path) -> Path:
    path = partial.with_name(partial.name.removeprefix('.').removesuffix('.partial'))
    if path.exists():
        path = path.with_name(f'episode_{EpisodeStore(partial.parent).next_number():06d}')
    return path


# --- a truncated bag: another recorder's, or a finished episode that was cut later ----------------


def _recover_bag(folder: Path) -> Recovery | None:
    target = folder.with_name(folder.name + RECOVERED_SUFFIX)
    files = recording_files(folder, '.mcap')
    whole = all(map(has_end, files))
    if target.exists() or (whole and not _lacks_metadata(folder, files)):
        return None  # done before, or nothing to do
    if any(_is_being_written(path) for path in files):
        return Recovery(folder, None, 'a recorder is writing it: left alone')
    if whole:
        scans = {path: scan_mcap(path) for path in files}
        if not any(scan.lost_bytes for scan in scans.values()):
            return _rebuild_metadata(folder, scans)
    needed = sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(folder).free
    if free < needed + 2**20:
        raise DatasetError(
            f'{folder}: a copy takes {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are left'
        )
    hidden = folder.with_name(f'.{target.name}.partial')
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    try:
        for path in files:
            shutil.copyfile(path, hidden / path.name)
        scans = {path: scan_mcap(path) for path in files}
        copies = [hidden / path.name for path, scan in scans.items() if scan.blocks]
        if not copies:
            damage = '; '.join(_damage(path, scan) for path, scan in scans.items())
            return Recovery(folder, None, f'not one message is intact: {damage}', lost_bytes=needed)
        repair = repair_bag(copies, {'recorder': LIBRARY, 'recovered_from': folder.name})
        lost_bytes = repair.lost_bytes
        for path in set(files) - {folder / copy.name for copy in copies}:
            lost_bytes += path.stat().st_size
            (hidden / path.name).unlink()
        header, note = _header_of_bag(folder)
        damaged = [_damage(path, scan) for path, scan in scans.items() if scan.damage]
        note = '; '.join(filter(None, (note, *damaged)))
        topics: dict[str, Any] = header.get('topics', {})
        received = {name: int(topic['received']) for name, topic in topics.items() if 'received' in topic}
        done = Recovery(folder, target, note, repair.messages, received, lost_bytes)
        if header:
            write_json(hidden / EPISODE_FILE, _recovered_header(header, topics, repair, done, needed))
        os.rename(hidden, target)
        return done
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _header_of_bag(folder: Path) -> tuple[dict[str, Any], str]:
    """Content of the bag's episode.json, {} where it has none, and what is wrong with it."""
    try:
        return read_episode(folder) or {}, ''
    except DatasetError as error:
        return {}, f'left out: {error}'


def _lacks_metadata(folder: Path, files: list[Path]) -> bool:
    """Whether metadata.yaml says nothing, as after a power cut, or is missing beside the files of one recording."""
    if not (folder / METADATA_FILE).is_file():
        return is_one_recording(folder, files)
    try:
        bag_summary(folder)
    except DatasetError:
        return True
    return False


def _rebuild_metadata(folder: Path, scans: Mapping[Path, Scan]) -> Recovery:
    note = f'{METADATA_FILE} was missing and is written anew'
    if (folder / METADATA_FILE).is_file():
        damaged = folder / f'{METADATA_FILE}{DAMAGED_SUFFIX}'
        shutil.copyfile(folder / METADATA_FILE, damaged)
        note = f'{METADATA_FILE} was damaged and is written anew; what it was is kept in {damaged.name}'
    saved = rebuild_metadata(scans)
    return Recovery(folder, folder, note, saved)


def _is_being_written(path: Path) -> bool:
    """Whether any process has the file open for writing, where the system tells."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False  # somebody else's file, or a file system without leases
    finally:
        os.close(descriptor)
    return False
