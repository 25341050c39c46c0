"""What a replay found, as a table, as JSON, and its commands as a recording."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from decoupled_policy_ros.data.bags.writer import BagWriter
from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.files import whole_folder, write_json
from decoupled_policy_ros.replay import messages
from decoupled_policy_ros.replay.comparison import KINDS
from decoupled_policy_ros.replay.player import Command
from decoupled_policy_ros.replay.replay import Replayed


def table(replayed: Replayed) -> Table:
    """Topic by topic: how many there are, and how many came out the same."""
    shown = Table()
    for heading in ('', 'recorded', 'compared', 'identical', 'not compared'):
        shown.add_column(heading, justify='left' if heading in ('', 'not compared') else 'right')
    playback = replayed.playback
    shown.add_row('chunks followed', str(playback.followed), str(playback.played), '', '')
    for result in replayed.comparisons:
        notes = [
            f'{count} {what}'
            for count, what in (
                (result.apart, 'recorded outside of what the log tells of'),
                (result.unknown, 'recorded, and not computed'),
                (result.lost, 'computed, and not recorded'),
            )
            if count
        ]
        numbers = (result.recorded, result.compared, result.identical)
        shown.add_row(result.topic, *map(str, numbers), ', '.join(notes))
    return shown


def lines(replayed: Replayed) -> Iterator[str]:
    """Everything that is to be said besides the table, worst last."""
    for difference in replayed.other:
        yield f'not as in the run: {difference}'
    if replayed.playback.refused:
        yield f'{replayed.playback.refused} chunks were refused in the run, and so were not commanded'
    yield from replayed.playback.problems
    for comparison in replayed.comparisons:
        if comparison.first is not None:
            yield f'first difference of {comparison.first}'
    state = 'identical, bit for bit' if replayed.identical else 'NOT identical'
    yield (
        f'{sum(c.compared for c in replayed.comparisons)} commands compared: {state}; '
        f'{replayed.wall_s:.1f} s for {replayed.run_s:.1f} s of run'
    )


def values(replayed: Replayed) -> dict[str, Any]:
    """All of it as JSON-able values, commands included."""
    playback = replayed.playback
    return {
        'identical': replayed.identical,
        'not_as_in_the_run': replayed.other,
        'chunks': {'followed': playback.followed, 'computed': playback.played, 'refused': playback.refused},
        'problems': playback.problems,
        'topics': {
            result.topic: {
                **{
                    name: getattr(result, name)
                    for name in ('recorded', 'compared', 'identical', 'apart', 'unknown', 'lost')
                },
                'first_difference': None if result.first is None else str(result.first),
            }
            for result in replayed.comparisons
        },
        'run_s': replayed.run_s,
        'wall_s': replayed.wall_s,
        'commands': [
            {'topic': topic, **{name: _plain(value) for name, value in messages.numbers(command.message)}}
            for topic, command in _named(replayed)
        ],
    }


def write(replayed: Replayed, out: Path) -> None:
    """Write a .json file, or the commands as a rosbag2 folder (MCAP).

    Raises:
        ConfigError: there is a file or folder of that name.
    """
    if out.suffix == '.json':
        if out.exists():
            raise ConfigError(f'{out} exists already: give a new file, or remove it first')
        write_json(out, values(replayed))
        return
    with whole_folder(out) as folder, BagWriter(folder, out.name) as bag:
        stamp_ns = 0
        for topic, command in _named(replayed):
            kind = KINDS[command.what]
            bag.add_topic(topic, kind)
            if command.what != 'gripper_command':
                stamp_ns = messages.message_stamp_ns(command.message)
            bag.write(topic, bytes(messages.STORE.serialize_cdr(command.message, kind)), stamp_ns)


def _named(replayed: Replayed) -> Iterator[tuple[str, Command]]:
    for command in replayed.commands:
        yield replayed.topics.get(command.what, command.what), command


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float)) else value.item()
