"""What became of a recording that was not finished or was cut later, and what its episode.json says of it then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decoupled_policy_ros.data.bags.episodes import read_episode
from decoupled_policy_ros.data.bags.repair import Repair
from decoupled_policy_ros.data.bags.salvage import Scan
from decoupled_policy_ros.errors import DatasetError

DAMAGED_SUFFIX = '.damaged'


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


def damage_of(bag: Path, scan: Scan) -> str:
    """Where a file is damaged, and how."""
    return f'{bag.name} is damaged at byte {scan.kept_end} ({scan.damage or "it ends there"})'


def header_of_bag(folder: Path) -> tuple[dict[str, Any], str]:
    """Content of the bag's episode.json, {} where it has none, and what is wrong with it."""
    try:
        return read_episode(folder) or {}, ''
    except DatasetError as error:
        return {}, f'left out: {error}'


def recovered_header(
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
