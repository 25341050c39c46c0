"""Plays a recording: messages are taken in their order, each decision is made as soon as its messages are there."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from decoupled_policy_ros.data.bags.reader import Bag
from decoupled_policy_ros.errors import DecoupledPolicyError
from decoupled_policy_ros.replay.log import RecordedLog
from decoupled_policy_ros.replay.player import Player
from decoupled_policy_ros.runtime.cycles import Cycle, Decision, Start
from decoupled_policy_ros.runtime.run_record import run_differences

#: A message that is recorded this much later (s) than the decision that it was for is taken for missing.
LATE_S = 10.0


@dataclass
class Playback:
    """What has been played.

    Attributes:
        starts_ns: when each part begins: all that comes after one start, up to the next.
        problems: what could not be computed, and why.
        broken: parts that could not be computed to their end.
        followed, refused: chunks, as the log has them.
        played: chunks that were computed.
    """

    starts_ns: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)
    followed: int = 0
    refused: int = 0
    played: int = 0

    @property
    def part(self) -> int:
        """Number of the present part."""
        return len(self.starts_ns) - 1


@dataclass(frozen=True)
class Gap:
    """Messages of the log that are missing; it waits its turn, for what comes before it may be of another part."""

    messages: str


def play(bag: Bag, log: RecordedLog, player: Player) -> Playback:
    """Play a recording; the player has the commands afterwards.

    Raises:
        DatasetError: the file is damaged.
    """
    playback = Playback()
    entries, before = deque(log.entries), log.before
    waiting: deque[tuple[int, Decision | Gap]] = deque()

    def decide(until_ns: int | None) -> None:
        while waiting:
            log_ns, decision = waiting[0]
            overdue = until_ns is None or until_ns > log_ns + LATE_S * 1e9
            if not _decide(playback, player, log.run, log_ns, decision, overdue):
                return
            waiting.popleft()

    every = [skill.inputs for skill in player.skills.values()]
    for message in bag.messages({log.topic}.union(*(inputs.topics for inputs in every))):
        if message.topic != log.topic:
            for inputs in every:
                inputs.take(message)
        elif before:
            before -= 1
        else:
            entry = entries.popleft()
            if entry.gap:
                waiting.append((entry.log_ns, Gap(f'messages {entry.gap} of {log.topic}')))
            waiting.extend((entry.log_ns, decision) for decision in entry.decisions)
        decide(message.log_ns)
    decide(None)
    return playback


def _decide(
    playback: Playback,
    player: Player,
    first: Mapping[str, Any],
    log_ns: int,
    decision: Decision | Gap,
    overdue: bool,
) -> bool:
    """Make one decision; False if its messages have to be waited for."""
    if isinstance(decision, Gap):
        _break(playback, f'{decision.messages} are not in the recording')
    elif isinstance(decision, Start):
        playback.starts_ns.append(log_ns)
        player.start(decision, playback.part)
        changed = run_differences(_lasting(first), _lasting(decision.run))
        if changed:
            _break(playback, f'the policy was configured anew: {"; ".join(changed)}')
    elif isinstance(decision, Cycle):
        needed = playback.part not in playback.broken and decision.led_to_commands
        missing = player.skills[decision.task_sha256].inputs.missing(decision) if needed else ''
        if missing and not overdue:
            return False
        playback.followed += not decision.refused
        playback.refused += bool(decision.refused)
        if needed:
            _follow(playback, player, decision, missing)
        elif decision.led_to_commands:
            player.skills[decision.task_sha256].inputs.done(
                decision
            )  # else every sample up to the end is kept
    elif playback.part not in playback.broken:
        player.ticks(decision)
    return True


def _follow(playback: Playback, player: Player, cycle: Cycle, missing: str) -> None:
    where = f'the chunk of the observation at {cycle.stamp_ns} ns'
    if missing:
        _break(playback, f'{where} can not be computed: {missing}')
        return
    try:
        if cycle.refused:
            player.stay(cycle)
        else:
            player.cycle(cycle)
            playback.played += 1
    except (DecoupledPolicyError, ValueError) as error:
        _break(playback, f'{where} was followed, and is not now: {error}')
    player.skills[cycle.task_sha256].inputs.done(cycle)


def _break(playback: Playback, problem: str) -> None:
    playback.problems.append(f'{problem}; nothing after it, up to the next start, is compared')
    playback.broken.add(playback.part)


def _lasting(run: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same for all starts of one configuration."""
    return {name: value for name, value in run.items() if name != 'quat_xyzw'}
