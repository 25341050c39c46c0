"""Commands of a recording beside those that were computed again."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from decoupled_policy_ros.data.bags.reader import Bag
from decoupled_policy_ros.replay import messages
from decoupled_policy_ros.replay.playback import Playback
from decoupled_policy_ros.replay.player import Command

#: What is compared, with the type that it has.
KINDS = {
    'trajectory': messages.TRAJECTORY,
    'target_pose': messages.POSE,
    'gripper_command': messages.WIDTH,
    'joint_trajectory': messages.JOINT_TRAJECTORY,
}
#: So much (ns) a command may be recorded before the message of the log that it follows.
NEAR_NS = 1_000_000_000


@dataclass(frozen=True)
class Difference:
    """Where a command is not what it was.

    Attributes:
        topic: full name.
        stamp_ns: of the command; None where it has none.
        field: the first one that differs, or what differs.
        recorded, replayed: its values.
        chunk_ns: stamp of the observation of the chunk that was followed.
    """

    topic: str
    stamp_ns: int | None
    field: str
    recorded: Any
    replayed: Any
    chunk_ns: int

    def __str__(self) -> str:
        stamp = '' if self.stamp_ns is None else f' stamped {self.stamp_ns} ns'
        chunk = f', in the chunk of the observation at {self.chunk_ns} ns' if self.chunk_ns else ''
        return f'{self.topic}{stamp}{chunk}: {self.field} was {self.recorded!r}, replayed it is {self.replayed!r}'


@dataclass
class TopicComparison:
    """What was found of one topic.

    Attributes:
        topic: full name.
        recorded: messages in the recording.
        compared, identical: those that were computed again, and those that came out the same.
        apart: recorded outside of what the log tells of, so that they could not be computed.
        unknown: recorded while the log says that there was no such command.
        lost: computed, but not recorded.
        first: difference.
    """

    topic: str
    recorded: int = 0
    compared: int = 0
    identical: int = 0
    apart: int = 0
    unknown: int = 0
    lost: int = 0
    first: Difference | None = None

    @property
    def differs(self) -> bool:
        """Whether anything is not as it was."""
        return self.first is not None or self.unknown > 0


@dataclass(frozen=True)
class Recorded:
    """A command of the recording."""

    log_ns: int
    message: Any


def compare(
    bag: Bag, topics: Mapping[str, str], playback: Playback, commands: Iterable[Command]
) -> list[TopicComparison]:
    """Compare each topic of `KINDS` that has been recorded or computed.

    Args:
        bag: the recording.
        topics: full names.
        playback: tells which parts were computed.
        commands: as computed.
    """
    replayed: dict[str, list[Command]] = defaultdict(list)
    for command in commands:
        replayed[command.what].append(command)
    comparisons = []
    for what, message_type in KINDS.items():
        topic = topics.get(what, what)
        found = bag.topics.get(topic)
        there = found is not None and found.message_type == message_type
        recorded = [Recorded(m.log_ns, m.decode()) for m in bag.messages([topic])] if there else []
        if recorded or replayed[what]:
            result = TopicComparison(topic, len(recorded))
            match = _match_in_turn if what == 'gripper_command' else _match_by_stamp
            match(result, playback, recorded, replayed[what])
            comparisons.append(result)
    return comparisons


def _match_by_stamp(
    result: TopicComparison, playback: Playback, recorded: list[Recorded], replayed: list[Command]
) -> None:
    left: dict[tuple[int, int], deque[Command]] = defaultdict(deque)
    last_ns: dict[int, int] = {}
    for command in replayed:
        stamp_ns = messages.message_stamp_ns(command.message)
        left[command.part, stamp_ns].append(command)
        last_ns[command.part] = stamp_ns
    for found in recorded:
        part = bisect_right(playback.starts_ns, found.log_ns) - 1
        stamp_ns = messages.message_stamp_ns(found.message)
        # Topics are recorded one beside the other: near a start a command may come before the log's word of it.
        near = [p for p in (part, part + 1, part - 1) if left.get((p, stamp_ns))]
        if near:
            _compare(result, found.message, left[near[0], stamp_ns].popleft(), stamp_ns)
        elif part < 0 or part in playback.broken or stamp_ns > last_ns.get(part, last_ns.get(part - 1, 0)):
            result.apart += 1
        else:
            result.unknown += 1
            if result.first is None:
                result.first = Difference(result.topic, stamp_ns, 'the message', 'there', 'not there', 0)
    result.lost = sum(map(len, left.values()))


def _match_in_turn(
    result: TopicComparison, playback: Playback, recorded: list[Recorded], replayed: list[Command]
) -> None:
    """Widths have no stamp: they are compared one after the other, up to the first part that was not computed."""
    if playback.broken:
        replayed = [command for command in replayed if command.part < min(playback.broken)]
    surplus = max(len(recorded) - len(replayed), 0)
    begin_ns = playback.starts_ns[0] - NEAR_NS
    before = min(surplus, sum(found.log_ns < begin_ns for found in recorded))
    result.apart = surplus  # what was told before the log begins, or after it ends
    for found, command in zip(recorded[before:], replayed, strict=False):
        _compare(result, found.message, command, None)
    result.lost = len(replayed) - result.compared


def _compare(result: TopicComparison, recorded: Any, command: Command, stamp_ns: int | None) -> None:
    result.compared += 1
    difference = messages.first_difference(recorded, command.message)
    if difference is None:
        result.identical += 1
    elif result.first is None:
        result.first = Difference(result.topic, stamp_ns, *difference, command.chunk_ns)
