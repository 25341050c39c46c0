"""The time that an episode is logged by: the system's, as if nobody set its clock meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

#: The system's clock is taken to be set where it differs by more than this; slewing moves both clocks alike.
_SET_NS = 50_000_000

Clock = Callable[[], int]


class EpisodeClock:
    """System time at `restart`, going on with the monotonic clock, which nobody can set.

    DDS stamps what it receives with the system's clock. Once that is set back, what comes would seem to be from before
    the episode, and log times would go back, so that nobody could read the messages in their order any more.

    Args:
        system_ns, monotonic_ns: the clocks.
    """

    def __init__(self, system_ns: Clock, monotonic_ns: Clock = time.monotonic_ns):
        self._system_ns, self._monotonic_ns = system_ns, monotonic_ns
        self._ahead_ns = 0  # of the monotonic clock
        self.restart()

    def restart(self) -> int:
        """Take over the system's time; returns it (ns)."""
        system_ns = self._system_ns()
        self._ahead_ns = system_ns - self._monotonic_ns()
        self._was_set = False
        return system_ns

    def now_ns(self) -> int:
        """Time of the episode."""
        return self._monotonic_ns() + self._ahead_ns

    def set_by_ns(self) -> int:
        """By how much the system's clock was set since `restart`; negative: back."""
        before_ns, system_ns, after_ns = self._monotonic_ns(), self._system_ns(), self._monotonic_ns()
        # This thread may not have run for a while between two readings: the truth lies between these.
        least_ns, most_ns = system_ns - after_ns - self._ahead_ns, system_ns - before_ns - self._ahead_ns
        return least_ns if least_ns > _SET_NS else most_ns if most_ns < -_SET_NS else 0

    def reception_ns(self, received_ns: int) -> int:
        """Time of the episode at which a message was received that is taken from DDS now.

        Args:
            received_ns: the same by the system's clock at that moment; 0 unknown.
        """
        now_ns = self.now_ns()
        if not received_ns:
            return now_ns
        if not self._was_set and abs(now_ns - received_ns) < _SET_NS:  # nearly always; to ask rclpy is slow
            return received_ns
        set_by_ns = self.set_by_ns()
        # From then on all are looked at: a small step is seen in the young messages alone, and they would overtake.
        self._was_set |= set_by_ns != 0
        # It may have been received shortly before the clock was set.
        nearest = min(received_ns, received_ns - set_by_ns, key=lambda time_ns: abs(now_ns - time_ns))
        return min(nearest, now_ns)
