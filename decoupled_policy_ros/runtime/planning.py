"""One cycle of the policy: from the stream buffers to the chunk that is followed next, and when that is due.

A chunk is there a while after it is requested, and in that while the arm moves on. So the next one is requested before
the executed part of the present one ends, by what a cycle took of late; it is asked to begin with what will have been
executed by the time that it is there, and it is followed from then on. Where time waits for the commands, a cycle takes
none, and the chunk is requested when it is due.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from decoupled_policy_ros.observation.sampler import Observation, Sampler
from decoupled_policy_ros.runtime.chunks import Chunk, next_frames_ns
from decoupled_policy_ros.runtime.joining import ChunkTiming, Joined, Joiner, JoinSettings, Wish
from decoupled_policy_ros.runtime.latency import Latency
from decoupled_policy_ros.runtime.motion import UnderWay

if TYPE_CHECKING:  # it brings torch, which takes seconds: the node is there before it is configured
    from decoupled_policy_ros.runtime.engine import Engine

NS_PER_MS = 1e6
#: A chunk is reckoned with this much later still: threads are not woken on time.
MARGIN_NS = 10_000_000


@dataclass(frozen=True, eq=False)
class Prediction:
    """A chunk that the policy proposes.

    Attributes:
        observation: that it comes of.
        wish: what was asked of the engine.
        joined: the chunk and what is known of it.
        requested_ns: when it was requested.
        timings_ms: what its stages took; sample, encode, modulate, denoise, total.
    """

    observation: Observation
    wish: Wish
    joined: Joined
    requested_ns: int
    timings_ms: dict[str, float]


class Planner:
    """Predicts chunks, on the worker's thread.

    Args:
        engine: the policy, warmed up.
        sampler: takes observations out of the stream buffers.
        join: how chunks join.
        seed: of the noise; with an observation's stamp it decides the noise of its chunk.
        lockstep: time waits for the commands.

    Attributes:
        engine: the policy that is followed.
    """

    def __init__(self, engine: Engine, sampler: Sampler, join: JoinSettings, seed: int, lockstep: bool):
        self._join, self._seed, self._lockstep = join, seed, lockstep
        self._latency = Latency()
        self.follow_task(engine, sampler)

    def follow_task(self, engine: Engine, sampler: Sampler) -> None:
        """Take the next chunks from another engine, warmed up, and its observations by another sampler."""
        self.engine, self._sampler = engine, sampler
        self._joiner = Joiner(ChunkTiming.of(engine.policy), self._join)

    def clear(self) -> None:
        """Forget every sample of the streams."""
        self._sampler.clear()

    def reset(self) -> None:
        """Start afresh: the next chunk has nothing to do with those before it."""
        self._joiner.reset()

    def request_ns(self, chunk: Chunk) -> int:
        """When the chunk after this one is to be requested: not before this one has begun."""
        return max(chunk.begins_ns, chunk.replan_stamp_ns - self._ahead_ns)

    def encode_ahead(self, chunk: Chunk | None) -> bool:
        """Encode one picture that the observation after a chunk's may be made of; False if there is none."""
        since_ns = 0 if chunk is None else next_frames_ns(chunk, self.request_ns(chunk))
        return self.engine.ahead(self._sampler.newest(since_ns))

    def observe(self, chunk: Chunk | None, now_ns: int) -> tuple[Observation | None, float]:
        """The observation that the next chunk starts from, None while it has still to come, and what that took (ms).

        Raises:
            ObservationError: a stream is missing, stale or skewed.
        """
        start = time.perf_counter()
        # Where time waits, /clock may be heard after its frames, and is waited for. Otherwise what is
        # stamped later than now was stamped by another clock, and by ours it is not known yet.
        stamp_ns = self._sampler.latest_common_stamp_ns(None if self._lockstep else now_ns)
        observation = self._sampler.sample(now_ns if stamp_ns is None else stamp_ns, now_ns)
        too_early = stamp_ns is None or (chunk is not None and stamp_ns < self._earliest_ns(chunk))
        unheard = stamp_ns is not None and stamp_ns > now_ns
        return None if too_early or unheard else observation, 1e3 * (time.perf_counter() - start)

    def predict(
        self, observation: Observation, sample_ms: float, under_way: UnderWay | None, now_ns: int
    ) -> Prediction:
        """The chunk that the policy proposes for an observation.

        Raises:
            InferenceError: it is not finite, or its samples disagree.
            ValueError: it has a rotation that is none.
        """
        takeover_ns = observation.stamp_ns if self._lockstep else now_ns + self._ahead_ns
        wish = self._joiner.wish(observation.stamp_ns, takeover_ns, under_way)
        self.engine.reset(self._seed, observation.stamp_ns)
        prediction = self.engine(observation.frames, wish.known, self._join.samples)
        timings_ms = {'sample': sample_ms, **prediction.timings_ms}
        timings_ms['total'] += sample_ms
        joined = self._joiner.join(prediction.samples, wish)
        return Prediction(observation, wish, joined, now_ns, timings_ms)

    def followed(self, prediction: Prediction, now_ns: int) -> None:
        """A prediction has passed all checks, and is followed since now."""
        self._latency.add(now_ns - prediction.requested_ns)
        self._joiner.followed(prediction.joined)

    def values(self) -> dict[str, str]:
        """What there is to report: how much ahead chunks are requested, and how the samples lay last."""
        values = {'requested_ahead_ms': f'{self._ahead_ns / NS_PER_MS:.2f}'}
        if self._join.samples > 1:
            spread_m = self._joiner.spread_m
            values['spread_m'] = f'{spread_m:.4f}'
            values['spread_slowed'] = f'{self._join.spread.slowing(spread_m):.2f}'
        return values

    @property
    def _ahead_ns(self) -> int:
        return 0 if self._lockstep else self._latency.estimate_ns + MARGIN_NS

    def _earliest_ns(self, chunk: Chunk) -> int:
        """The least stamp of an observation for the chunk after this one: any newer one, or the one that is due."""
        return chunk.replan_stamp_ns if self._lockstep else chunk.observation_stamp_ns + 1
