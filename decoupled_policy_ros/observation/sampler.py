"""From stamped streams to one observation, or a refusal. Nothing is ever filled in.

For an observation at time t and a contract of n frames at rate r, frame i of n stands for the time

    t_i = t - (n - 1 - i) / r,        i = 0 .. n-1  (the last one is t itself)

and holds of every stream the latest sample at or before t_i. The sample's age is t_i minus its stamp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.errors import (
    ConfigError,
    ObservationError,
    StreamMissing,
    StreamSkewed,
    StreamStale,
)
from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.observation.streams import StreamBuffer

_NS = 1e-9


@dataclass(frozen=True, eq=False)
class Observation:
    """All streams for one time.

    `frames[name]` are n_obs_steps samples of the stream as they arrived, oldest first, and `stamps_ns[name]` their
    stamps; `ages_s[name]` is the age of the newest one at `stamp_ns`.
    """

    stamp_ns: int
    frames: dict[str, tuple[NDArray, ...]]
    ages_s: dict[str, float]
    stamps_ns: dict[str, tuple[int, ...]]

    @cached_property
    def arrays(self) -> dict[str, NDArray]:
        """The frames of each stream as one array (n_obs_steps, *stream shape)."""
        return {name: np.stack(frames) for name, frames in self.frames.items()}


class Sampler:
    """Takes observations out of stream buffers, by the rules of a contract. Any thread may call it.

    Raises:
        ConfigError: a stream of the contract has no buffer.
    """

    def __init__(self, contract: ObservationContract, buffers: Mapping[str, StreamBuffer]):
        missing = [name for name in contract.names if name not in buffers]
        if missing:
            raise ConfigError(
                f'no buffer for stream {", ".join(missing)}; there are {", ".join(buffers) or "none"}'
            )
        self.contract = contract
        self._buffers = {name: buffers[name] for name in contract.names}

    def latest_common_stamp_ns(self, until_ns: int | None = None) -> int | None:
        """The newest time for which every stream has arrived: the least of their latest stamps, or None.

        With `until_ns` what is stamped later does not count: whoever stamped it has another clock.
        """
        latest = [
            buffer.latest() if until_ns is None else buffer.at_or_before(until_ns)
            for buffer in self._buffers.values()
        ]
        known = [sample[0] for sample in latest if sample is not None]
        return min(known) if len(known) == len(latest) else None

    def newest(self, since_ns: int) -> dict[str, NDArray]:
        """The newest sample of each stream that has one stamped since then: what an observation may yet be made of."""
        latest = {spec: self._buffers[spec.name].latest() for spec in self.contract.streams}
        return {
            spec.name: sample[1]
            for spec, sample in latest.items()
            if sample is not None and sample[0] >= since_ns and sample[1].shape == spec.shape
        }

    def clear(self) -> None:
        """Forget every sample of the streams, as after a jump of the clock."""
        for buffer in self._buffers.values():
            buffer.clear()

    def sample(self, stamp_ns: int, now_ns: int | None = None) -> Observation:
        """The observation at `stamp_ns`.

        Args:
            stamp_ns: time of the newest frame.
            now_ns: if given, each stream must also have delivered within its limit before now, and `stamp_ns`
                itself must not be further from now than the largest limit.

        Raises:
            StreamMissing: a stream has nothing at or before the time of a frame.
            StreamStale: a sample is older than its stream's limit.
            StreamSkewed: samples of one frame are further apart than the contract's limit.
            ObservationError: a sample has another shape than the contract says.
        """
        if now_ns is not None:
            self._require_live(stamp_ns, now_ns)
        frames: list[dict[str, tuple[int, NDArray]]] = []
        for back in range(self.contract.n_obs_steps - 1, -1, -1):
            frame_ns = stamp_ns - self.contract.offset_ns(back)
            frame = {spec.name: self._latest(spec, frame_ns) for spec in self.contract.streams}
            self._require_together({name: stamp for name, (stamp, _) in frame.items()})
            frames.append(frame)
        return Observation(
            stamp_ns=stamp_ns,
            frames={name: tuple(frame[name][1] for frame in frames) for name in self.contract.names},
            ages_s={name: (stamp_ns - frames[-1][name][0]) * _NS for name in self.contract.names},
            stamps_ns={name: tuple(frame[name][0] for frame in frames) for name in self.contract.names},
        )

    def _latest(self, spec: StreamSpec, frame_ns: int) -> tuple[int, NDArray]:
        buffer = self._buffers[spec.name]
        found = buffer.at_or_before(frame_ns)
        if found is None:
            oldest = buffer.oldest_stamp_ns
            known = (
                'nothing has arrived'
                if oldest is None
                else f'its oldest sample is {_s(oldest - frame_ns)} later'
            )
            raise StreamMissing(
                f'stream {spec.name!r} has no sample at or before {frame_ns} ns: {known} (limit {spec.max_age_s:g} s)',
                stream=spec.name,
                limit_s=spec.max_age_s,
            )
        sample_ns, array = found
        if frame_ns - sample_ns > _ns(spec.max_age_s):
            raise self._stale(spec, frame_ns - sample_ns, f'at {frame_ns} ns')
        if array.shape != spec.shape:
            raise ObservationError(
                f'stream {spec.name!r} delivers shape {array.shape}, the contract says {spec.shape}',
                stream=spec.name,
            )
        return sample_ns, array

    def _require_live(self, stamp_ns: int, now_ns: int) -> None:
        """Name the stream that stopped, which is not always the first one that a look at `stamp_ns` would find."""
        ages: list[tuple[int, StreamSpec]] = []
        for spec in self.contract.streams:
            latest_ns = self._buffers[spec.name].latest_stamp_ns
            if latest_ns is None:
                raise StreamMissing(
                    f'stream {spec.name!r}: nothing has arrived (limit {spec.max_age_s:g} s)',
                    stream=spec.name,
                    limit_s=spec.max_age_s,
                )
            ages.append((now_ns - latest_ns, spec))
        age_ns, spec = max(ages, key=lambda pair: abs(pair[0]) - _ns(pair[1].max_age_s))
        if abs(age_ns) > _ns(spec.max_age_s):  # a stamp far in the future is as wrong as an old one
            raise self._stale(spec, age_ns, 'now')
        age_ns = now_ns - stamp_ns
        spec = max(self.contract.streams, key=lambda spec: spec.max_age_s)
        if abs(age_ns) > _ns(spec.max_age_s):
            raise self._stale(spec, age_ns, 'now, at the time asked for')

    def _require_together(self, stamps_ns: dict[str, int]) -> None:
        last, first = max(stamps_ns, key=stamps_ns.__getitem__), min(stamps_ns, key=stamps_ns.__getitem__)
        skew_ns = stamps_ns[last] - stamps_ns[first]
        if skew_ns > _ns(self.contract.max_skew_s):
            raise StreamSkewed(
                f'stream {first!r} is {_s(skew_ns)} behind stream {last!r}, limit {self.contract.max_skew_s:g} s',
                stream=first,
                age_s=skew_ns * _NS,
                limit_s=self.contract.max_skew_s,
            )

    @staticmethod
    def _stale(spec: StreamSpec, age_ns: int, when: str) -> StreamStale:
        state = f'{_s(age_ns)} old' if age_ns >= 0 else f'{_s(-age_ns)} in the future'
        return StreamStale(
            f'stream {spec.name!r} is {state} {when}, limit {spec.max_age_s:g} s',
            stream=spec.name,
            age_s=age_ns * _NS,
            limit_s=spec.max_age_s,
        )


def _ns(duration_s: float) -> int:
    return round(duration_s * 1e9)  # limits are compared in whole nanoseconds: 150 ms is not above 0.15 s


def _s(duration_ns: int) -> str:
    return f'{duration_ns * _NS:.3f} s'
