"""When a command is due, and waiting for what it needs."""

from __future__ import annotations

import threading

#: Longest sleep of a thread (s): it is woken by what it waits for, this is the safety net.
IDLE_S = 0.05


class Signal(threading.Condition):
    """A condition that counts, so that what came between a look and a wait is not slept through."""

    count = 0

    def notify(self, n: int = 1) -> None:
        """Wake a waiting thread."""
        self.count += 1
        super().notify(n)

    def wait_after(self, count: int, timeout_s: float) -> None:
        """Wait for a notification after so many, for some time at most."""
        if self.count == count:
            self.wait(timeout_s)


class Ticks:
    """The grid of commands on the node's clock; in lockstep each new value of the clock is a tick.

    Args:
        rate_hz: commands per second.
        lockstep: see `LoopSettings`.
    """

    def __init__(self, rate_hz: float, lockstep: bool):
        self._period_ns, self._lockstep = round(1e9 / rate_hz), lockstep
        self.restart()

    def restart(self) -> None:
        """The next moment is a tick."""
        self._last_ns = 0

    def until_s(self, now_ns: int) -> float:
        """Seconds until a command is due; not positive when it is."""
        if now_ns == 0:
            return IDLE_S
        if self._lockstep:
            return 0.0 if now_ns > self._last_ns else IDLE_S
        return (self._last_ns + self._period_ns - now_ns) * 1e-9

    def done(self, now_ns: int) -> None:
        """A command was given; the next one is due a period after this one was, so that the rate does not drift."""
        due_ns = self._last_ns + self._period_ns
        late = self._lockstep or now_ns - due_ns >= self._period_ns
        self._last_ns = now_ns if late else due_ns
