"""What a policy decided while it ran, written down so that it can be decided again.

Commands follow from the messages of the observed streams and from what happened to be when: which sample of each
stream had arrived, at what time a chunk was planned and from when on it was followed, at what times the arm was told
something. The first is in any recording of the topics. The second is here, as text for a topic beside them: integers
for stamps, in nanoseconds, and nothing of what came out. `replay` computes that anew.

    start    everything before is forgotten: from here on the commands can be computed, with the run as `run` says
    cycle    a chunk, followed or refused
    ticks    times of commands, along the chunk (follow) or come to rest (hold)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.observation.sampler import Observation
from decoupled_policy_ros.runtime.joining import Wish

if TYPE_CHECKING:  # it brings torch, which takes seconds
    from decoupled_policy_ros.runtime.engine import Engine

Array = NDArray[np.float64]

FORMAT = 1
FOLLOW, HOLD = 'follow', 'hold'
#: So many commands are written down together, if nothing else happens: a second at 50 Hz.
TICKS = 50
#: And so many chunks that were refused.
REFUSED = 20


@dataclass(frozen=True)
class Start:
    """A beginning.

    Attributes:
        now_ns: when what was commanded before was brought to rest; 0 where nothing was.
        run: what the commands depend on besides, see `nodes.cycle_output`.
        silently: nothing was brought to rest, for somebody else commands the arm, or it has not done what it was told.
    """

    now_ns: int
    run: dict[str, Any]
    silently: bool = False


@dataclass(frozen=True)
class Cycle:
    """A chunk.

    Attributes:
        task, task_sha256: name and identity of the task that it comes of.
        instruction: that was followed.
        stamp_ns: of its observation.
        samples_ns: stamps of the samples in it, by stream, oldest frame first.
        now_ns: when it was planned.
        start_ns: from when on it was followed; 0 if it was refused.
        takeover_ns: from when on it was meant to be followed.
        joined: whether it was to join the motion of the chunk before; otherwise it began from rest.
        joints_ns: stamps of the joint states that were looked at, in turn; None where there was none. Where a chunk
            was refused, only if the arm is told to stay there as its first command.
        refused: why it was not followed; empty if it was.
        swap: how often the task had been exchanged by then, by one loaded anew, as far as chunks came of it.
    """

    task: str
    task_sha256: str | None
    instruction: str
    stamp_ns: int
    samples_ns: dict[str, list[int]]
    now_ns: int
    start_ns: int
    takeover_ns: int
    joined: bool
    joints_ns: list[int | None]
    refused: str = ''
    swap: int = 0

    @property
    def led_to_commands(self) -> bool:
        """Whether commands may have come of it: along its chunk, or to stay where the arm was when it was refused."""
        return not self.refused or bool(self.joints_ns)


@dataclass(frozen=True)
class Ticks:
    """Times of commands.

    Attributes:
        what: 'follow' or 'hold'.
        stamps_ns: as they are in the commands.
    """

    what: str
    stamps_ns: list[int]


Decision = Start | Cycle | Ticks
_KINDS: dict[str, type[Start] | type[Cycle] | type[Ticks]] = {'start': Start, 'cycle': Cycle, 'ticks': Ticks}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def decisions_to_text(number: int, decisions: Sequence[Decision]) -> str:
    """Text of a message, `number` of its topic; floats are written so that they are read back exactly."""
    values = [{'kind': _NAMES[type(decision)], **asdict(decision)} for decision in decisions]
    message = {'format': FORMAT, 'number': number, 'decisions': values}
    return json.dumps(message, allow_nan=False, separators=(',', ':'))


def decisions_from_text(text: str) -> tuple[int, list[Decision]]:
    """Number and decisions of a message; inverse of `decisions_to_text`.

    Raises:
        DatasetError: it is no such text, or one of another version.
    """
    try:
        message = json.loads(text)
        if message['format'] != FORMAT:
            raise DatasetError(
                f'a log of cycles of format {message["format"]}; this version reads format {FORMAT}'
            )
        decisions: list[Decision] = []
        for values in message['decisions']:
            kind = _KINDS[values.pop('kind')]
            decisions.append(kind(**values))
        return int(message['number']), decisions
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f'{text[:80]!r} is no message of a log of cycles: {error!r}') from error


class StampedJoints(Protocol):
    """Where the arm's joints are, and since when."""

    def at(self, now_ns: int) -> tuple[int, Array] | None:
        """Stamp and positions (n,) of a time, rad; None if nobody knows."""

    def why_not(self, now_ns: int) -> str:
        """Why nobody knows."""


class CycleLog:
    """Takes down what the policy's loop decides.

    Everything but `planning`, and looking at joints, which the worker does, is called with the loop's lock held.

    Args:
        publish: told of each message; None: nothing is written down.
        describe: what the commands depend on, for `Start.run`.
    """

    def __init__(
        self,
        publish: Callable[[str], None] | None = None,
        describe: Callable[[], Mapping[str, Any]] = dict,
    ):
        self._publish, self._describe = publish, describe
        self._number = 0
        self._pending: list[Decision] = []
        self._ticks = Ticks(FOLLOW, [])
        self._now_ns = self._read_ns = 0
        self._joints_ns: list[int | None] = []
        self._joints: NotedJoints | None = None
        self._engine: Engine | None = None
        self._swap = -1

    def joints(self, joints: StampedJoints) -> NotedJoints:
        """The same joints; which are looked at is noted."""
        self._joints = NotedJoints(joints, self._joints_ns)
        return self._joints

    def clock(self, now_ns: Callable[[], int]) -> Callable[[], int]:
        """The same clock; what it says to somebody who starts afresh is noted."""

        def read() -> int:
            self._read_ns = now_ns()
            return self._read_ns

        return read

    def started(self, silently: bool = False) -> None:
        """Everything before has been forgotten; `silently` as for `Steering.reset`."""
        if self._publish is not None:
            self._flush()
            self._pending.append(Start(self._read_ns, dict(self._describe()), silently))
            self._flush()
        self._read_ns = 0

    def planning(self, now_ns: int) -> int:
        """A chunk is being computed, or planned, as of now; gives back the time."""
        self._now_ns = now_ns
        self._joints_ns.clear()
        return now_ns

    def adopted(self, engine: Engine, observation: Observation, start_ns: int, wish: Wish) -> None:
        """The chunk that was planned last, as it was wished for, is followed."""
        joints_ns = list(self._joints_ns)
        self._add(self._cycle(engine, observation, joints_ns, start_ns, wish))
        self._flush()

    def refused(self, engine: Engine, observation: Observation, reason: str, stays: bool) -> None:
        """A chunk is not followed; where it `stays`, a command to stay where the arm is may come of that."""
        if stays and not self._joints_ns and self._joints is not None:
            self._joints.at(self._now_ns)  # it was refused before anybody looked where the arm is
        joints_ns = list(self._joints_ns) if stays else []
        self._add(self._cycle(engine, observation, joints_ns, refused=reason))
        if len(self._pending) >= REFUSED:
            self._flush()

    def ticked(self, stamp_ns: int, followed: bool) -> None:
        """A command has been given."""
        what = FOLLOW if followed else HOLD
        if self._ticks.what != what or len(self._ticks.stamps_ns) >= TICKS:
            self._end_ticks()
            self._ticks = Ticks(what, [])
        if self._publish is not None:
            self._ticks.stamps_ns.append(stamp_ns)
        if len(self._ticks.stamps_ns) >= TICKS:
            self._flush()

    def _cycle(
        self,
        engine: Engine,
        observation: Observation,
        joints_ns: list[int | None],
        start_ns: int = 0,
        wish: Wish | None = None,
        refused: str = '',
    ) -> Cycle:
        if engine is not self._engine:
            self._engine, self._swap = engine, self._swap + 1
        return Cycle(
            engine.policy.task.name,
            engine.policy.task.sha256,
            engine.instruction,
            observation.stamp_ns,
            {name: list(stamps_ns) for name, stamps_ns in observation.stamps_ns.items()},
            self._now_ns,
            start_ns,
            0 if wish is None else wish.takeover_ns,
            wish is not None and wish.under_way is not None,
            joints_ns,
            refused,
            self._swap,
        )

    def _add(self, decision: Decision) -> None:
        self._end_ticks()
        if self._publish is not None:
            self._pending.append(decision)

    def _end_ticks(self) -> None:
        if self._ticks.stamps_ns:
            self._pending.append(self._ticks)
            self._ticks = Ticks(self._ticks.what, [])

    def _flush(self) -> None:
        self._end_ticks()
        if self._publish is not None and self._pending:
            self._publish(decisions_to_text(self._number, self._pending))
            self._number += 1
            self._pending.clear()


class NotedJoints:
    """Joints as the guard asks for them.

    Args:
        joints: knows.
        stamps_ns: gets the stamp of each answer.
    """

    def __init__(self, joints: StampedJoints, stamps_ns: list[int | None]):
        self._joints, self._stamps_ns = joints, stamps_ns

    def at(self, now_ns: int) -> tuple[int, Array] | None:
        """Stamp and positions (n,) of a time, rad; None if nobody knows."""
        found = self._joints.at(now_ns)
        self._stamps_ns.append(None if found is None else found[0])
        return found

    def positions(self, now_ns: int) -> Array | None:
        """Joint positions (n,) of a time, rad; None if nobody knows."""
        found = self.at(now_ns)
        return None if found is None else found[1]

    def why_not(self, now_ns: int) -> str:
        """Why nobody knows."""
        return self._joints.why_not(now_ns)
