"""What a policy's cycles are made of, and how that is exchanged while they go on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from decoupled_policy_ros.observation.sampler import Sampler
from decoupled_policy_ros.runtime.commanding import Commander
from decoupled_policy_ros.runtime.planning import Planner
from decoupled_policy_ros.runtime.ticks import Signal

if TYPE_CHECKING:  # it brings torch, which takes seconds
    from decoupled_policy_ros.runtime.engine import Engine


class Exchangeable:
    """The part of `PolicyLoop` that another task replaces.

    A cycle takes tens of milliseconds without the lock, so changes wait for its end: then none is made of two tasks.
    The motion under way goes on meanwhile, and after it until a chunk of the new task joins.

    Args:
        planner: predicts chunks.
        commander: follows them.
    """

    def __init__(self, planner: Planner, commander: Commander):
        self._planner, self._commander = planner, commander
        self._lock = threading.RLock()
        self._observed = Signal(self._lock)  # wakes the worker
        self._cycling = False
        self._changes: deque[Callable[[], None]] = deque()

    @property
    def cycling(self) -> bool:
        """Whether there are cycles, or could be once commands are enabled; not after a failure."""
        return self._cycling

    @property
    def engine(self) -> Engine:
        """The engine that is followed; no change is half made."""
        with self._lock:
            return self._planner.engine

    def between_cycles(self, change: Callable[[], None]) -> None:
        """Make a change under the lock at the end of the cycle that is being computed; at once if there are none."""
        with self._lock:
            self._changes.append(change)
            if not self.cycling:
                self._make_changes()
            self._observed.notify_all()

    def follow_task(self, engine: Engine, sampler: Sampler, explain: Callable[[str], str]) -> None:
        """Take the next chunks from another engine, warmed up, and its observations by another sampler.

        To be called by a change. Noise, statistics, gripper and motion go on, and the next chunk joins the motion.

        Args:
            engine: the policy, warmed up.
            sampler: takes its observations out of the stream buffers.
            explain: what went wrong lately on a stream, to be added to a refusal.
        """
        self._planner.follow_task(engine, sampler)
        self._commander.follow_task(explain)

    def _make_changes(self) -> None:
        with self._lock:
            while self._changes:
                self._changes.popleft()()

    def _end_cycles(self) -> None:
        """Make the changes that are waiting, and have those to come made at once: there are no cycles any more."""
        with self._lock:
            self._cycling = False
            self._make_changes()
