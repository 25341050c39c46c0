"""How long a cycle takes on the node's clock, as measured lately: what the next one is requested ahead by."""

from __future__ import annotations

import numpy as np

#: Share of the cycles that are to be there in time.
QUANTILE = 0.95
#: Cycles that count: 40 s at 2.5 a second, so that a slow spell is over soon after it is over.
CYCLES = 100


class Latency:
    """A running high quantile of durations."""

    def __init__(self) -> None:
        self._durations_ns: list[int] = []
        self.estimate_ns = 0

    def add(self, duration_ns: int) -> None:
        """A cycle took so long; a negative duration is one during which the clock was set, and counts nothing."""
        if duration_ns < 0:
            return
        self._durations_ns = [*self._durations_ns[1 - CYCLES :], duration_ns]
        self.estimate_ns = int(np.quantile(self._durations_ns, QUANTILE, method='higher'))
