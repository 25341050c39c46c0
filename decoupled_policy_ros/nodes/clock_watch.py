"""Whether the node's clock, which may be a simulator's, moves."""

from __future__ import annotations

from decoupled_policy_ros.runtime.states import HOLDING, WAITING


class ClockWatch:
    """Compares the clock with what it was at the last look; looks too close together would find that it stands."""

    def __init__(self) -> None:
        self._looked_ns, self._stands = -1, False

    def look(self, now_ns: int) -> None:
        """Look at the clock; to be called at a steady pace of wall time, far slower than the clock's."""
        self._stands, self._looked_ns = now_ns == self._looked_ns, now_ns

    def trouble(self) -> tuple[str, str] | None:
        """State and reason where the clock stood between the last two looks; None where it moves."""
        if not self._stands:
            return None
        return (HOLDING, '/clock stands still') if self._looked_ns else (WAITING, 'nothing on /clock')
