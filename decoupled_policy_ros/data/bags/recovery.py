"""`decoupled-policy recover FOLDER`: episodes and bags that their recorder did not live to finish."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
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
    try_lock,
)
from decoupled_policy_ros.data.bags.recovered import (
    DAMAGED_SUFFIX,
    Recovery,
    damage_of,
    header_of_bag,
    recovered_header,
)
from decoupled_policy_ros.data.bags.repair import repair_bag
from decoupled_policy_ros.data.bags.salvage import Scan, scan_mcap
from decoupled_policy_ros.data.bags.truncated import recordings_in, recover_bag
from decoupled_policy_ros.data.bags.unended import PACKED
from decoupled_policy_ros.data.bags.writer import LIBRARY
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.files import write_json

REST_SUFFIX = '.rest'


def recover(folder: str | Path) -> list[Recovery]:
    """Make an episode of each partial one in `folder` and below, and a bag beside each truncated one.

    A finished episode that was cut later is such a bag; what its episode.json says of it goes with what is saved. A
    metadata.yaml that says nothing, as after a power cut, is written anew from what is in the files, as is one that
    is missing beside files with the names of one recording. Files of other names are recordings of their own, and a
    bag is made of each one that is truncated; those that are whole are left alone.
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
            recovery = _recover_episode(path) if kind == 'episode' else recover_bag(path)
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
        elif any(name.endswith(('.mcap', PACKED)) for name in files):
            yield from (('bag', recording) for recording in recordings_in(path))


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
        note = f'not one message is intact, {damage_of(bag, scan)}: kept as it is'
        return Recovery(partial, None, note, {}, received, scan.lost_bytes)
    header, note = header_of_bag(partial)
    if note:  # with such a file nobody would read the episode
        os.rename(partial / EPISODE_FILE, partial / f'{EPISODE_FILE}{DAMAGED_SUFFIX}')
    if scan.damage:
        rest = _keep_rest(bag, scan)
        note = '; '.join(filter(None, (note, f'{damage_of(bag, scan)}: what follows is kept in {rest.name}')))
    (partial / RESERVE_FILE).unlink(missing_ok=True)
    repair = repair_bag([bag], {'recorder': LIBRARY, 'recovered_from': partial.name})
    done = Recovery(partial, _final_path(partial), note, repair.messages, received, repair.lost_bytes)
    if header:
        header |= {'instruction': progress.get('instruction', header.get('instruction', '')), 'success': None}
        write_json(partial / EPISODE_FILE, recovered_header(header, topics, repair, done, scan.size))
    publish(partial, _final_path(partial).name)
    return done


def _noted_topics(progress: dict[str, Any]) -> dict[str, Any]:
    """What was noted of each topic; a note that a power cut left half written may be anything."""
    topics = progress.get('topics')
    noted = topics.items() if isinstance(topics, dict) else ()
    return {name: t for name, t in noted if isinstance(t, dict) and isinstance(t.get('received'), int)}


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
