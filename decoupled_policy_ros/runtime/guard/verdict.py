"""What the guard says about a motion: what it found, what it did about it, and what may be executed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.runtime.motion import Path


class Outcome(Enum):
    """What becomes of a motion that breaks a rule, from the mildest on."""

    TIME_SCALE = 'time_scale'  # the same way, more slowly
    CLAMP = 'clamp'  # positions are moved into the workspace
    TRUNCATE = 'truncate'  # ends at rest before the waypoint, which is one that should not be needed
    REJECT = 'reject'  # the arm comes to rest where it is


@dataclass(frozen=True)
class Finding:
    """One rule that a motion breaks.

    Attributes:
        rule: its name, one of `settings.RULES`.
        outcome: what was done about it.
        value, limit: what was found and what would have been valid, in `unit`; None where that is no number.
        waypoint: index in the chunk; None where the motion as a whole is meant.
        detail: which joint, links or box.
    """

    rule: str
    outcome: Outcome
    value: float | None = None
    limit: float | None = None
    unit: str = ''
    waypoint: int | None = None
    detail: str = ''

    def cut_off(self) -> Finding:
        """The same, where the motion ends before it."""
        return replace(self, outcome=Outcome.TRUNCATE)

    def __str__(self) -> str:
        if self.value is None or self.limit is None:
            return f'{self.rule}: {self.detail} ({self.outcome.value})'
        where = '' if self.waypoint is None else f' at waypoint {self.waypoint}'
        what = f' of {self.detail}' if self.detail else ''
        unit = f' {self.unit}' if self.unit else ''
        return f'{self.rule}{what}{where}: {self.value:.4g}{unit}, limit {self.limit:.4g}{unit} ({self.outcome.value})'


@dataclass(frozen=True, eq=False)
class Verdict:
    """The guard's answer.

    Attributes:
        path: what may be executed; None if the motion is rejected.
        findings: rules that it broke, at most one for each rule and outcome.
        joints_rad: (n, joints) at the waypoints of the path, where they were computed.
    """

    path: Path | None
    findings: tuple[Finding, ...] = ()
    joints_rad: NDArray[np.float64] | None = None

    @property
    def time_scale(self) -> float:
        """Largest factor by which a part of it was slowed down, 1 for none."""
        return 1.0 if self.path is None else self.path.time_scale

    @property
    def rejection(self) -> Finding | None:
        """What it was rejected for."""
        rejected = [f for f in self.findings if f.outcome is Outcome.REJECT]
        return rejected[-1] if rejected else None


class GuardStatistics:
    """What the guard has found so far; any thread may add and read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.checked = 0
        self.counts: Counter[tuple[str, Outcome]] = Counter()
        self.last: dict[Outcome, str] = {}
        self.largest_time_scale = 1.0

    def add(self, verdict: Verdict) -> None:
        """Count one verdict."""
        with self._lock:
            self.checked += 1
            self.largest_time_scale = max(self.largest_time_scale, verdict.time_scale)
        self.found(verdict.findings)

    def found(self, findings: Iterable[Finding]) -> None:
        """Count findings, of a check or of whoever refused a message before it came to one."""
        with self._lock:
            for finding in findings:
                self.counts[finding.rule, finding.outcome] += 1
                self.last[finding.outcome] = str(finding)

    def count(self, outcome: Outcome) -> int:
        """How many findings ended so."""
        with self._lock:
            return sum(count for (_, what), count in self.counts.items() if what is outcome)

    def values(self) -> dict[str, str]:
        """Everything as text, for diagnostics: a count for each rule and outcome that occurred, the last reasons."""
        with self._lock:
            values = {'guard_checked': str(self.checked)}
            values |= {
                f'guard_{outcome.value}_{rule}': str(count)
                for (rule, outcome), count in sorted(self.counts.items(), key=lambda item: item[0][0])
            }
            values['guard_largest_time_scale'] = f'{self.largest_time_scale:.2f}'
            values |= {f'guard_last_{outcome.value}': text for outcome, text in self.last.items()}
        return values
