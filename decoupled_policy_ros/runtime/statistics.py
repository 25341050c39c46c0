"""What the policy has done so far, in numbers.

Threads that stream only count and write into arrays that are there already; what there is to report is copied out
under the loop's lock, and percentiles are taken of the copy by whoever reports.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.runtime.chunks import NS_PER_S, Chunk

#: Values over which percentiles are taken: of cycles 13 minutes at 2.5 a second, of commands 40 s at 50 a second.
WINDOW = 2000
NS_PER_MS = 1e6


class Window:
    """The last values of one quantity; adding one allocates nothing.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int = WINDOW):
        self._values = np.zeros(size)
        self._added = 0

    def add(self, value: float) -> None:
        """Keep a value, in place of the oldest one if there are enough."""
        self._values[self._added % len(self._values)] = value
        self._added += 1

    def copy(self) -> NDArray[np.float64]:
        """The values (n,) that are kept, in no order."""
        return self._values[: self._added].copy()


class Statistics:
    """Counters and latencies since activation; guarded by the lock of the loop that owns it.

    Args:
        command_period_ns: time from one command to the next; None where time waits for commands.
    """

    COUNTERS = (
        'cycles', 'cycles_missed', 'commands', 'holds', 'underruns', 'bridged_ticks', 'rejected_chunks',
    )  # fmt: skip

    def __init__(self, command_period_ns: int | None = None) -> None:
        self.cycles = 0
        self.cycles_missed = 0
        self.commands = 0
        self.holds = 0
        self.underruns = 0
        self.bridged_ticks = 0
        self.rejected_chunks = 0
        self.last_rejection = ''
        self.refusals: Counter[str] = Counter()
        self.ages_s: dict[str, float] = {}
        self._period_ns = command_period_ns
        self._cycle_ns = 0
        self._timings_ms: dict[str, Window] = {}
        self._reactions_ms, self._intervals_ms = Window(), Window()
        self.state_begins()
        self.interrupt()

    def interrupt(self) -> None:
        """What comes next has nothing to do with what was: neither a cycle nor a command was missed in between."""
        self._due_ns: int | None = None
        self._observed_ns = self._begins_ns = 0
        self._commanded_ns = 0

    def add_cycle(self, timings_ms: Mapping[str, float], ages_s: Mapping[str, float]) -> None:
        """Count a cycle with the duration of each of its stages and the age of each stream."""
        self.cycles += 1
        self.ages_s = dict(ages_s)
        for stage, duration_ms in timings_ms.items():
            self._timings_ms.setdefault(stage, Window()).add(duration_ms)

    def add_chunk(self, chunk: Chunk, begins_ns: int) -> None:
        """A chunk is followed from a time on.

        A cycle counts as missed when the frame that its chunk was due from went by unused.
        """
        observed_ns, due_ns = chunk.observation_stamp_ns, chunk.replan_stamp_ns
        if self._due_ns is not None:
            # A camera's frames are not on the chunks' grid: the first one after the due time is the right one.
            late_ns = observed_ns - self._due_ns - round(1.5 * NS_PER_S / chunk.rate_hz)
            self.cycles_missed += max(0, 1 + late_ns // (due_ns - observed_ns))
        self._due_ns, self._observed_ns, self._begins_ns = due_ns, observed_ns, begins_ns
        self._cycle_ns = due_ns - observed_ns

    def add_command(self, stamp_ns: int, published_ns: int, followed: bool) -> None:
        """Count a command for a time, published at another on the same clock; `followed` if it is a chunk's."""
        self.commands += 1
        if followed and self._observed_ns and stamp_ns >= self._begins_ns:
            self._reactions_ms.add((published_ns - self._observed_ns) / NS_PER_MS)
            self._observed_ns = 0  # only the first command of a chunk
        if self._commanded_ns:
            self._intervals_ms.add((published_ns - self._commanded_ns) / NS_PER_MS)
        self._commanded_ns = published_ns

    def add_rejection(self, reason: str) -> None:
        """Count a chunk that is not followed."""
        self.rejected_chunks += 1
        self.last_rejection = reason

    def state_begins(self) -> None:
        """The policy does something else from now on."""
        self._state_since_s = time.monotonic()

    def snapshot(self) -> Snapshot:
        """Everything as it is now."""
        return Snapshot(self)


class Snapshot:
    """A copy of `Statistics`, for whoever reports them without holding up the commands."""

    def __init__(self, statistics: Statistics):
        self.ages_s = statistics.ages_s
        self._counters = {name: getattr(statistics, name) for name in Statistics.COUNTERS}
        self._last_rejection = statistics.last_rejection
        self._refusals = dict(statistics.refusals)
        self._timings_ms = {stage: window.copy() for stage, window in statistics._timings_ms.items()}
        self._reactions_ms = statistics._reactions_ms.copy()
        self._intervals_ms = statistics._intervals_ms.copy()
        self._period_ns, self._cycle_ns = statistics._period_ns, statistics._cycle_ns
        self._state_age_s = time.monotonic() - statistics._state_since_s

    def values(self) -> dict[str, str]:
        """Everything as text, for diagnostics.

        `latency_STAGE_*` are durations of computation. `observation_to_command_*` is the time from the stamp of an
        observation to the first command of the chunk that came of it. `command_jitter_*` is how far the time from
        one command to the next was from what it should be.
        """
        values = {'state_age_s': f'{self._state_age_s:.1f}'}
        values |= {name: str(count) for name, count in self._counters.items()}
        values['last_rejection'] = self._last_rejection
        values |= {f'refusals_{stream}': str(count) for stream, count in sorted(self._refusals.items())}
        for percent in (50, 99):
            for stage, durations_ms in self._timings_ms.items():
                values[f'latency_{stage}_p{percent}_ms'] = _percentile(durations_ms, percent)
        if self._cycle_ns:
            values['cycle_period_ms'] = f'{self._cycle_ns / NS_PER_MS:.2f}'
        values |= self._distribution('observation_to_command', self._reactions_ms)
        if self._period_ns is not None:
            values['command_period_ms'] = f'{self._period_ns / NS_PER_MS:.2f}'
            if len(self._intervals_ms):
                values['command_rate_hz'] = f'{1e3 / max(self._intervals_ms.mean(), 1e-6):.2f}'
            jitter_ms = abs(self._intervals_ms - self._period_ns / NS_PER_MS)
            values |= self._distribution('command_jitter', jitter_ms)
        return values

    @staticmethod
    def _distribution(name: str, values_ms: NDArray[np.float64]) -> dict[str, str]:
        if not len(values_ms):
            return {}
        values = {f'{name}_p{percent}_ms': _percentile(values_ms, percent) for percent in (50, 99)}
        return values | {f'{name}_max_ms': f'{values_ms.max():.2f}'}


def _percentile(values: NDArray[np.float64], percent: float) -> str:
    return f'{np.percentile(values, percent):.2f}'
