"""What the policy has done so far, in numbers."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np

#: Cycles over which percentiles are taken: half an hour at 2.5 cycles a second would be 4,500.
WINDOW = 2000


class Statistics:
    """Counters and latencies since activation; guarded by the lock of the loop that owns it."""

    def __init__(self) -> None:
        self.cycles = 0
        self.commands = 0
        self.holds = 0
        self.underruns = 0
        self.bridged_ticks = 0
        self.rejected_chunks = 0
        self.last_rejection = ''
        self.refusals: Counter[str] = Counter()
        self.ages_s: dict[str, float] = {}
        self._timings_ms: dict[str, deque[float]] = {}

    def add_cycle(self, timings_ms: dict[str, float], ages_s: dict[str, float]) -> None:
        """Count a cycle with the duration of each of its stages and the age of each stream."""
        self.cycles += 1
        self.ages_s = dict(ages_s)
        for stage, duration_ms in timings_ms.items():
            self._timings_ms.setdefault(stage, deque(maxlen=WINDOW)).append(duration_ms)

    def percentile_ms(self, percent: float) -> dict[str, float]:
        """Percentile of each stage's duration over the last cycles; empty before the first."""
        return {stage: float(np.percentile(values, percent)) for stage, values in self._timings_ms.items()}

    def values(self) -> dict[str, str]:
        """Everything as text, for diagnostics."""
        counters = ('cycles', 'commands', 'holds', 'underruns', 'bridged_ticks', 'rejected_chunks')
        values = {name: str(getattr(self, name)) for name in counters}
        values['last_rejection'] = self.last_rejection
        values |= {f'refusals_{stream}': str(count) for stream, count in sorted(self.refusals.items())}
        for percent in (50, 99):
            stages = self.percentile_ms(percent)
            values |= {f'latency_{stage}_p{percent}_ms': f'{value:.2f}' for stage, value in stages.items()}
        return values
