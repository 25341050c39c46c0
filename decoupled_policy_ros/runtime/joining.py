"""How a chunk joins the motion under way: what it is asked to begin with, which sample it is, and from when it counts.

The same for the node and for rollouts, without a network: `wish` says what to ask of the engine, and `join` makes one
chunk of its samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.runtime.chunks import NS_PER_S, Chunk
from decoupled_policy_ros.runtime.ensembling import Ensemble
from decoupled_policy_ros.runtime.motion import UnderWay
from decoupled_policy_ros.runtime.prefix import Prefix, prefix_of
from decoupled_policy_ros.runtime.selection import (
    SamplesDisagree,
    SpreadLimits,
    join_errors_m,
    most_typical,
    spread_m,
)

if TYPE_CHECKING:  # it brings torch, which takes seconds
    from decoupled_policy_ros.policy.policy import Policy

Array = NDArray[np.float64]

MOST_SAMPLES = 64


@dataclass(frozen=True)
class JoinSettings:
    """How chunks join.

    Attributes:
        inpaint: whether the executed prefix is in-painted.
        blend: waypoints after it that are drawn towards the motion under way, see `runtime.prefix`.
        ensemble: decay of temporal ensembling; None for none.
        samples: chunks that are drawn of each observation.
        spread: what is done about samples that lie apart.

    Raises:
        ConfigError: blend or samples is out of range.
    """

    inpaint: bool = False
    blend: int = 4
    ensemble: float | None = None
    samples: int = 1
    spread: SpreadLimits = field(default_factory=SpreadLimits)

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= MOST_SAMPLES:
            raise ConfigError(f'samples must be in 1..{MOST_SAMPLES}, got {self.samples}')
        if self.blend < 0:
            raise ConfigError(f'blend must be at least 0 waypoints, got {self.blend}')


@dataclass(frozen=True)
class ChunkTiming:
    """When the waypoints of a policy's chunks are meant.

    Attributes:
        rate_hz, n_obs_steps, n_execute: see `Chunk`.
        horizon: waypoints of a chunk.
    """

    rate_hz: float
    n_obs_steps: int
    n_execute: int
    horizon: int

    @classmethod
    def of(cls, policy: Policy) -> ChunkTiming:
        """When a policy means its chunks."""
        contract, horizon = policy.contract, policy.backbone.denoiser.horizon
        return cls(contract.rate_hz, contract.n_obs_steps, policy.n_execute, horizon)

    def stamps_ns(self, observation_stamp_ns: int) -> list[int]:
        """Stamps of the waypoints of a chunk whose newest observation has a stamp."""
        first = self.n_obs_steps - 1
        return [
            observation_stamp_ns + round((i - first) * NS_PER_S / self.rate_hz) for i in range(self.horizon)
        ]


@dataclass(frozen=True, eq=False)
class Wish:
    """What is asked of the engine for an observation, and kept for what becomes of the answer.

    Attributes:
        stamp_ns: of the observation.
        takeover_ns: from here on the chunk is to be followed.
        under_way: what is followed until then; None for an arm at rest.
        known: what the chunk shall begin with.
    """

    stamp_ns: int
    takeover_ns: int
    under_way: UnderWay | None
    known: Prefix | None


@dataclass(frozen=True, eq=False)
class Joined:
    """What became of the samples.

    Attributes:
        chunk: the one to follow.
        others: the samples that are not followed.
        slowed: by how much the chunk is slower than it was predicted.
        predicted: (horizon, 10) the sample that the chunk was made of.
        stamps_ns: (horizon,) when its waypoints were meant.
    """

    chunk: Chunk
    others: tuple[Chunk, ...]
    slowed: float
    predicted: Array
    stamps_ns: list[int]


class Joiner:
    """Makes chunks join; one for each motion, in the order of its chunks.

    Args:
        timing: of the policy's chunks.
        settings: how.

    Attributes:
        spread_m: how far apart the latest samples lay.
    """

    def __init__(self, timing: ChunkTiming, settings: JoinSettings):
        self.timing, self.settings = timing, settings
        self._ensemble = None if settings.ensemble is None else Ensemble(settings.ensemble)
        self.reset()

    def reset(self) -> None:
        """Start afresh: there are no chunks before the next one."""
        self._apart_since_ns: int | None = None
        self.spread_m = 0.0
        if self._ensemble is not None:
            self._ensemble.reset()

    def wish(self, stamp_ns: int, takeover_ns: int, under_way: UnderWay | None) -> Wish:
        """What to ask of the engine for the observation of a stamp.

        Args:
            stamp_ns: of the observation.
            takeover_ns: when the chunk will be there.
            under_way: what is followed now. Where it ends before, the chunk takes over there; where there is nothing,
                at once.
        """
        if under_way is None:
            if self._ensemble is not None:
                self._ensemble.reset()
            return Wish(stamp_ns, stamp_ns, None, None)
        takeover_ns = max(stamp_ns, min(takeover_ns, under_way.end_ns))
        if not self.settings.inpaint:
            return Wish(stamp_ns, takeover_ns, under_way, None)
        stamps_ns = self.timing.stamps_ns(stamp_ns)
        known = prefix_of(under_way, stamps_ns, takeover_ns, self.settings.blend)
        return Wish(stamp_ns, takeover_ns, under_way, known)

    def join(self, samples: Array, wish: Wish) -> Joined:
        """The chunk to follow, of samples (K, horizon, 10) that were asked for.

        Raises:
            ValueError: a rotation is degenerate, or a waypoint is not finite.
            SamplesDisagree: none should be followed.
        """
        waypoints, _ = poses.pose_from_action(samples)
        stamps_ns, limits = self.timing.stamps_ns(wish.stamp_ns), self.settings.spread
        best, apart_m = 0, 0.0
        if len(samples) > 1:
            free = waypoints[:, self._executed(stamps_ns, wish.takeover_ns), :3, 3]
            self.spread_m = apart_m = spread_m(free)
            if wish.under_way is None:
                best = most_typical(free)
            else:
                best = int(np.argmin(join_errors_m(waypoints, stamps_ns, wish.under_way, wish.takeover_ns)))
            self._require_agreement(apart_m, len(samples), wish.stamp_ns)
        actions = samples[best]
        if self._ensemble is not None:
            actions = self._ensemble.mean(actions, stamps_ns)
        slowed = limits.slowing(apart_m)
        chunk = self._chunk(actions, wish)
        others = tuple(self._chunk(other, wish) for i, other in enumerate(samples) if i != best)
        chunk = chunk.slowed(slowed) if slowed > 1.0 else chunk
        return Joined(chunk, others, slowed, samples[best], stamps_ns)

    def followed(self, joined: Joined) -> None:
        """A chunk has passed all checks, and is followed."""
        if self._ensemble is not None:
            self._ensemble.add(joined.predicted, joined.stamps_ns)

    def _executed(self, stamps_ns: list[int], takeover_ns: int) -> slice:
        """The waypoints that are executed unless something happens."""
        first = min(int(np.searchsorted(stamps_ns, takeover_ns)), len(stamps_ns) - 1)
        return slice(first, first + self.timing.n_execute)

    def _require_agreement(self, apart_m: float, count: int, stamp_ns: int) -> None:
        limits = self.settings.spread
        if not limits.holds(apart_m):
            self._apart_since_ns = None
            return
        if self._apart_since_ns is None:
            self._apart_since_ns = stamp_ns
        lasting_s = (stamp_ns - self._apart_since_ns) / NS_PER_S
        needs_help = 0.0 < limits.help_s <= lasting_s
        message = f'spread: the {count} samples lie {apart_m:.3f} m apart, limit {limits.hold_m:g} m'
        if needs_help:
            message += f', for {lasting_s:.1f} s now: the policy does not know what to do here, please help'
        raise SamplesDisagree(message, needs_help)

    def _chunk(self, actions: Array, wish: Wish) -> Chunk:
        timing = self.timing
        return Chunk(
            actions, wish.stamp_ns, timing.rate_hz, timing.n_obs_steps, timing.n_execute, wish.takeover_ns
        )
