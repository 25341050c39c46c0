"""What `decoupled-policy inspect` shows of a dataset or a recording: the essentials as a short table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from decoupled_policy_ros.data.bags.episodes import PARTIAL, read_episode
from decoupled_policy_ros.data.bags.reader import bag_summary, is_bag
from decoupled_policy_ros.data.bags.unended import unended
from decoupled_policy_ros.errors import DatasetError

_LONGEST = 200  # characters of a value
_LISTED = 20  # instructions, cameras and recordings at most


def dataset_table(path: Path, values: dict[str, Any]) -> Table:
    """The essentials of what `describe` returns."""
    rows = [
        ('episodes', str(values['episodes'])),
        ('frames', f'{values["frames"]} at {values["rate_hz"]:g} Hz'),
        ('instructions', _list(values['instructions'])),
        ('cameras', _list(values['cameras']) or 'none'),
    ]
    if 'labels' in values:
        rows.append(('labels', ', '.join(f'{n} {label}' for label, n in values['labels'].items())))
    rows += [(name, _text(value)) for name, value in values['conventions'].items()]
    return _table(str(path), rows)


def recordings_in(path: Path) -> list[Path]:
    """The recording at `path`, or those in it; empty where there is none."""
    if is_bag(path):
        return [path]
    if not path.is_dir():
        return []
    return sorted(entry for entry in path.iterdir() if is_bag(entry) and not entry.name.startswith('.'))


def unfinished(path: Path) -> str:
    """What is in a folder that no recorder has ended, and what helps; '' where there is nothing of the kind."""
    if not path.is_dir():
        return ''
    partial = sorted(entry.name for entry in (path, *path.iterdir()) if PARTIAL.fullmatch(entry.name))
    if partial:
        return f'{path} has unfinished episodes only ({_list(partial)}); `decoupled-policy recover` completes them'
    return unended(path)


def recording_or_error(path: Path) -> dict[str, Any]:
    """What a recording says of itself, or the `error` where it can't."""
    try:
        return recording_values(path)
    except DatasetError as error:
        return {'recording': str(path), 'error': str(error)}


def recording_values(path: Path) -> dict[str, Any]:
    """What a recording says of itself, as JSON-able values.

    Raises:
        DatasetError: it can't be opened, or its episode.json is damaged.
    """
    episode = read_episode(path if path.is_dir() else path.parent) or {}
    summary = bag_summary(path)
    return {
        'recording': str(path),
        'instruction': episode.get('instruction'),
        'success': episode.get('success'),
        'robot': (episode.get('robot') or {}).get('name'),
        'duration_s': summary.duration_s,
        'topics': summary.counts,
    }


def recording_table(path: Path) -> Table:
    """One recording: instruction, label, length, and its topics with their numbers of messages."""
    values = recording_values(path)
    rows = [
        ('instruction', values['instruction'] or 'not said'),
        ('success', _label(values['success'])),
        ('robot', values['robot'] or 'not said'),
        ('duration', f'{values["duration_s"]:.1f} s'),
        *((topic, f'{count} messages') for topic, count in values['topics'].items()),
    ]
    return _table(f'recording {path}', rows)


def recordings_table(path: Path, recordings: list[Path]) -> Table:
    """A folder of recordings, one row each; of very many the first ones."""
    table = Table(title=escape(f'{len(recordings)} recordings in {path}'))
    for column in ('recording', 'instruction', 'success', 'duration (s)', 'messages'):
        table.add_column(column, overflow='fold')
    for recording in recordings[:_LISTED]:
        try:
            values = recording_values(recording)
        except DatasetError as error:
            table.add_row(escape(recording.name), escape(str(error)), '', '', '', style='red')
            continue
        table.add_row(
            escape(recording.name),
            escape(values['instruction'] or 'not said'),
            _label(values['success']),
            f'{values["duration_s"]:.1f}',
            str(sum(values['topics'].values())),
        )
    if len(recordings) > _LISTED:
        table.caption = f'and {len(recordings) - _LISTED} more'
    return table


def _table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=escape(title), show_header=False)
    table.add_column()
    table.add_column(overflow='fold')
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    return table


def _label(success: bool | None) -> str:
    return {True: 'success', False: 'failure', None: 'unlabelled'}[success]


def _list(values: list[str]) -> str:
    more = f', and {len(values) - _LISTED} more' if len(values) > _LISTED else ''
    return ', '.join(values[:_LISTED]) + more


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f'{text[:_LONGEST]} ... (all of it with --json)'
