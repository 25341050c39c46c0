"""The log of a run's decisions in a recording."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from decoupled_policy_ros.data.bags.reader import Bag
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.runtime.cycles import Cycle, Decision, Start, decisions_from_text

LOG_TYPE = 'std_msgs/msg/String'
#: Last part of the topic's name.
LOG_NAME = 'cycles'


@dataclass(frozen=True)
class Entry:
    """Decisions of one message of the log.

    Attributes:
        log_ns: when it was recorded.
        decisions: in their order.
        gap: numbers of the messages before it that are missing, in words; empty if none are.
    """

    log_ns: int
    decisions: list[Decision]
    gap: str = ''


@dataclass(frozen=True)
class RecordedLog:
    """The decisions of a recording, from the first start on.

    Attributes:
        topic: full name.
        entries: message by message.
        before: messages before the first start, which nothing can be computed from.
    """

    topic: str
    entries: list[Entry]
    before: int

    @property
    def run(self) -> Mapping[str, Any]:
        """What the commands of the first start depend on."""
        return next(d.run for entry in self.entries for d in entry.decisions if isinstance(d, Start))

    @property
    def parts(self) -> list[list[Cycle]]:
        """All cycles that commands may have come of, from each start to the next."""
        found: list[list[Cycle]] = []
        for decision in (d for entry in self.entries for d in entry.decisions):
            if isinstance(decision, Start):
                found.append([])
            elif isinstance(decision, Cycle) and decision.led_to_commands:
                found[-1].append(decision)
        return found


def read_log(bag: Bag, node: str = '') -> RecordedLog:
    """The log of a recording.

    Args:
        bag: the recording.
        node: full name of the policy's node, for a recording of several.

    Raises:
        DatasetError: there is no log in it, there are several, or it has no start.
    """
    topic = _log_topic(bag, node)
    entries: list[Entry] = []
    before, expected = 0, 0
    for message in bag.messages([topic]):
        number, decisions = decisions_from_text(message.decode().data)
        decisions = [_as_far_as_followed(decision) for decision in decisions]
        begins = bool(decisions) and isinstance(decisions[0], Start)
        if entries or begins:
            # A node that is started again counts anew.
            lost = bool(entries) and number != expected and (number > expected or not begins)
            gap = f'{expected} to {number - 1}' if number > expected + 1 else f'{expected}'
            entries.append(Entry(message.log_ns, decisions, gap if lost else ''))
        else:
            before += 1
        expected = number + 1
    if not entries:
        raise DatasetError(
            f'{bag.path}: {topic} has no start of the policy; begin to record before the policy is enabled'
        )
    return RecordedLog(topic, entries, before)


def _as_far_as_followed(decision: Decision) -> Decision:
    """What was refused came of an observation that nothing is computed from again."""
    if isinstance(decision, Cycle) and decision.refused:
        return replace(decision, samples_ns={})
    return decision


def _log_topic(bag: Bag, node: str) -> str:
    if node:
        topic = f'/{node.strip("/")}/{LOG_NAME}'
        bag.require(topic, LOG_TYPE)
        return topic
    found = [
        topic.name
        for topic in bag.topics.values()
        if topic.name.endswith(f'/{LOG_NAME}') and topic.message_type == LOG_TYPE and topic.count
    ]
    if len(found) == 1:
        return found[0]
    if found:
        nodes = ', '.join(name.removesuffix(f'/{LOG_NAME}') for name in found)
        raise DatasetError(f'{bag.path} has the logs of several nodes, say which to replay: {nodes}')
    raise DatasetError(
        f'{bag.path} has no log of a policy: record its topic ~/cycles ({LOG_TYPE}) besides the others'
    )
