"""The episode recorder's status line: time, rate per topic, what is lost, what is left of the disk."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus

from decoupled_policy_ros.nodes.common import NS_PER_S
from decoupled_policy_ros.nodes.episode_clock import EpisodeClock
from decoupled_policy_ros.nodes.episode_intake import Budget
from decoupled_policy_ros.nodes.episode_topics import RecordedTopic
from decoupled_policy_ros.nodes.episode_worker import EpisodeWorker

_RATE_WINDOW_S = 2.0
_MIB = 2**20


class EpisodeStatus:
    """Judges how recording goes.

    Args:
        worker: writes.
        topics: what is recorded.
        budget: memory that messages wait in.
        clock: of the episode.
        silence: why a topic is not usable now, '' it is.
    """

    def __init__(
        self,
        worker: EpisodeWorker,
        topics: Sequence[RecordedTopic],
        budget: Budget,
        clock: EpisodeClock,
        silence: Callable[[RecordedTopic], str],
    ):
        self._worker, self._topics, self._budget = worker, topics, budget
        self._clock, self._silence = clock, silence
        self._heard: dict[str, deque[tuple[float, int]]] = {topic.name: deque() for topic in topics}

    def judge(self, duration_s: float) -> tuple[bytes, str, dict[str, Any]]:
        """Level, sentence and values for a running episode of `duration_s`."""
        worker = self._worker
        state = 'recording' if worker.episode else 'stopped' if worker.stopped else 'idle'
        rates = {topic.name: self._rate_hz(topic) for topic in self._topics if topic.intake is not None}
        warnings = self.warnings()
        values = {
            'state': state,
            'episode': worker.episode,
            'duration_s': f'{duration_s if worker.episode else 0.0:.1f}',
            'size_mb': f'{worker.size_mb:.1f}',
            'lost': self.lost(),
            'queue_mb': f'{self._budget.held_bytes / _MIB:.1f}',
            'disk_free_mb': f'{worker.free_mb:.0f}',
            'kept': worker.kept,
            'discarded': worker.discarded,
            'last_episode': str(worker.last or ''),
            'instruction': worker.instruction,
            'stopped': worker.stopped,
            'warnings': '; '.join(warnings),
            **{f'rate_hz:{name}': f'{rate:.1f}' for name, rate in rates.items()},
        }
        text = {
            'recording': f'recording {worker.episode} for {duration_s:.1f} s',
            'stopped': f'recording stopped: {worker.stopped}',
            'idle': f'idle, {worker.kept} kept, {worker.discarded} discarded',
        }[state]
        heard = (
            ', '.join(f'{name.lstrip("/")} {rate:.0f} Hz' for name, rate in rates.items()) or 'nothing heard'
        )
        text = f'{text}; {heard}; {values["lost"]} lost; {worker.free_mb / 1024:.1f} GiB left'
        if warnings:
            text = f'{text}; {values["warnings"]}'
        if worker.stopped:
            return DiagnosticStatus.ERROR, text, values
        return DiagnosticStatus.WARN if warnings else DiagnosticStatus.OK, text, values

    def lost(self) -> int:
        """Messages of the running episode, or the last one, that are known to be lost."""
        intakes = [topic.intake for topic in self._topics if topic.intake is not None]
        return sum(max(intake.missing, intake.lost_by_dds) + intake.overflowed for intake in intakes)

    def warnings(self) -> list[str]:
        """What is not as it should be, one line each."""
        found = [topic.problem for topic in self._topics if topic.problem]
        silent = [self._silence(topic) for topic in self._topics if topic.plan.required]
        found += [reason for reason in silent if reason and reason not in found]
        for topic in self._topics:
            intake = topic.intake
            if intake is None:
                continue
            if intake.unheard:
                found.append(f'{intake.unheard} publisher(s) of {topic.name} offer too little to be heard')
            lost = max(intake.missing, intake.lost_by_dds)
            if lost:
                found.append(f'{lost} messages lost on {topic.name}')
            if intake.overflowed:
                found.append(f'{intake.overflowed} messages of {topic.name} found no room in memory')
        set_by_s = self._clock.set_by_ns() / NS_PER_S
        if self._worker.episode and set_by_s:
            way = 'back' if set_by_s < 0 else 'forward'
            found.append(f"the system's clock was set {way} by {abs(set_by_s):.3f} s during the episode")
        for name, report in self._worker.topic_reports().items():
            wrong = {key: report.get(key) for key in ('zero_stamps', 'stamps_out_of_order')}
            found += [f'{count} {key.replace("_", " ")} on {name}' for key, count in wrong.items() if count]
        return found

    def _rate_hz(self, topic: RecordedTopic) -> float:
        """Messages per second over the last two seconds."""
        assert topic.intake is not None
        now, heard = time.monotonic(), self._heard[topic.name]
        heard.append((now, topic.intake.heard))
        while now - heard[0][0] > _RATE_WINDOW_S:
            heard.popleft()
        span_s = now - heard[0][0]
        return (heard[-1][1] - heard[0][1]) / span_s if span_s > 0 else 0.0
