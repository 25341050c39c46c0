"""The episode recorder's own thread: takes what the callbacks collected and writes it, twenty times a second."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from decoupled_policy_ros.data.bags.episodes import EpisodeStore, EpisodeWriter
from decoupled_policy_ros.data.bags.stamp_watch import StampWatch
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.nodes.episode_intake import RawIntake, RawMessage
from decoupled_policy_ros.nodes.episode_topics import RecordedTopic

PERIOD_S = 0.05
DISK_PERIOD_S = 0.5
SYNC_PERIOD_S = 1.0


class EpisodeWorker:
    """Writes episodes in a thread of its own.

    Its methods are for the thread that also runs the callbacks; each holds the writing thread off for as long as it
    takes.

    Args:
        store: where episodes go.
        min_free_mb: with less space on the disk recording stops.
        now_ns: what episodes are timed by.
        say: told once when recording stops by itself.
    """

    def __init__(
        self, store: EpisodeStore, min_free_mb: float, now_ns: Callable[[], int], say: Callable[[str], None]
    ):
        self.store = store
        self.stopped = ''  # why recording stopped by itself; until it is started anew
        self.instruction = ''
        self.failure: Exception | None = None
        self.last: Path | None = None  # the episode that was kept last
        self.kept = self.discarded = 0
        self.free_mb = store.free_mb
        self._min_free_mb, self._now_ns, self._say = min_free_mb, now_ns, say
        self._episode: EpisodeWriter | None = None
        self._finished: EpisodeWriter | None = None  # the one before
        self._topics: dict[str, RecordedTopic] = {}
        self._watches: dict[str, StampWatch] = {}
        self._lock = threading.RLock()
        self._looked_at = -DISK_PERIOD_S
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (('episodes', self._run), ('episodes to disk', self._sync))
        ]

    @property
    def episode(self) -> str:
        """Name of the episode that is being recorded; '' none."""
        episode = self._episode
        return episode.name if episode else ''

    @property
    def size_mb(self) -> float:
        """What the running episode takes up on the disk."""
        episode = self._episode
        return episode.bag.size_bytes / 2**20 if episode else 0.0

    def begin(self, header: Mapping[str, Any], instruction: str) -> str:
        """Start an episode with what `episode.json` holds from the start; returns its name.

        Raises:
            DatasetError: the folder can't be written.
        """
        with self._lock:
            self._episode = self.store.begin({'instruction': instruction, **header})
            self.instruction, self.stopped = instruction, ''
            self._topics.clear()
            self._watches.clear()
            return self._episode.name

    def add(self, topic: RecordedTopic) -> None:
        """Record a topic in the running episode; its intake has begun."""
        with self._lock:
            if self._episode is None or topic.definition is None:
                return
            self._episode.bag.add_topic(topic.name, topic.definition, topic.offered(), topic.type_hash())
            self._topics[topic.name] = topic
            if topic.definition.has_header:
                self._watches[topic.name] = StampWatch()

    def finish(self, success: bool | None, stopped: str = '') -> Path:
        """Write what is left and complete the episode; `stopped` says why it ended where nobody asked for that.

        Raises:
            DatasetError: nothing was recorded, or the disk is full or gone.
        """
        ended_ns = self._end_intakes()
        with self._lock:
            episode = self._take_episode()
            values: dict[str, Any] = {'stopped': stopped} if stopped else {}
            try:
                self._write_pending(episode)
            except DatasetError as error:  # what is on the disk is kept
                values['stopped'] = stopped or str(error)
            path = episode.finish(
                instruction=self.instruction,
                success=success,
                ended_ns=ended_ns,
                topics=self.topic_reports(),
                **values,
            )
            self.kept += 1
            self.last = path
            return path

    def discard(self) -> str:
        """Throw the running episode away; returns its name.

        Raises:
            DatasetError: nothing is being recorded, or it can't be removed; nothing is recorded any more then.
        """
        self._end_intakes()
        with self._lock:
            episode = self._take_episode()
            for topic in self._topics.values():
                if topic.intake:
                    topic.intake.take()
            episode.discard()
            self.discarded += 1
            return episode.name

    def set_last_aside(self) -> Path | None:
        """Move the episode that was kept last to the discarded ones; returns where it is now, None: there is none.

        Raises:
            DatasetError: the folder can't be written; the episode is where it was.
        """
        with self._lock:
            if self.last is None or not self.last.is_dir():
                return None
            path = self.store.set_aside(self.last)
            self.last = None
            self.kept -= 1
            self.discarded += 1
            return path

    def start(self) -> None:
        """Begin to work."""
        for thread in self._threads:
            thread.start()

    def close(self, say: Callable[[str], None] | None = None) -> None:
        """End the thread; an episode that is being recorded is kept without a label, and `say` told so."""
        self._say = say or self._say
        self._end.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        with self._lock:
            if self._episode is not None:
                self._stop('the recorder was shut down')

    def recorded(self, name: str) -> int:
        """Messages of a topic in the running episode, or the last one."""
        report = self.topic_reports().get(name)
        return int(report['written']) if report else 0

    def topic_reports(self) -> dict[str, Any]:
        """What episode.json says of each topic."""
        return {
            name: self._topic_report(topic, topic.intake)
            for name, topic in list(self._topics.items())
            if topic.intake is not None
        }

    def _topic_report(self, topic: RecordedTopic, intake: RawIntake) -> dict[str, Any]:
        episode = self._episode or self._finished
        written = episode.bag.topics[topic.name].messages if episode else 0
        watch = self._watches.get(topic.name)
        return {
            'type': topic.type_name,
            'received': intake.received,
            'written': written,
            'lost_by_dds': intake.lost_by_dds,
            'missing': intake.missing,
            'overflowed': intake.overflowed,
            'reliability': 'reliable' if intake.profile.reliable else 'best_effort',
            'durability': 'transient_local' if intake.profile.latched else 'volatile',
            **(watch.report() if watch else {}),
        }

    # --- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._end.wait(PERIOD_S):
                with self._lock:
                    self._tick()
        except Exception as error:  # it must not die in silence: the node asks for `failure`
            self.failure = error

    def _sync(self) -> None:
        """Have the disk keep pace, so that the end of an episode does not wait for gigabytes."""
        while not self._end.wait(SYNC_PERIOD_S):
            with self._lock:
                file = self._episode.bag.duplicate() if self._episode else -1
            if file >= 0:
                with contextlib.suppress(OSError):  # the writing thread meets the same
                    os.fdatasync(file)
                os.close(file)

    def _tick(self) -> None:
        self._look_at_disk()
        episode = self._episode
        if episode is None:
            return
        try:
            episode.note_progress(self.instruction, self.topic_reports())
            self._write_pending(episode)
            episode.bag.flush_if_due()
        except DatasetError as error:
            self._stop(str(error))

    def _write_pending(self, episode: EpisodeWriter) -> None:
        pending: list[tuple[RawMessage, str]] = []
        for name, topic in self._topics.items():
            if topic.intake is not None:
                pending += [(message, name) for message in topic.intake.take()]
        pending.sort(key=lambda entry: entry[0].log_ns)
        write = episode.bag.write
        for message, name in pending:
            write(name, message.data, message.log_ns, message.publish_ns, message.sequence)
            if name in self._watches:
                self._watches[name].see(message.data)

    def _look_at_disk(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < DISK_PERIOD_S:
            return
        self._looked_at = now
        self.free_mb = self.store.free_mb
        if self._episode is not None and not self._episode.folder.is_dir():
            self._stop('its folder was removed')  # what is open can still be written, and goes with it
        elif self._episode is not None and self.free_mb < self._min_free_mb:
            self._stop(f'{self.free_mb:.0f} MiB left on the disk, min_free_mb is {self._min_free_mb:.0f}')

    def _stop(self, reason: str) -> None:
        """Keep what is there, without a label, and say why."""
        try:
            reason = f'{reason}; kept {self.finish(None, stopped=reason).name} without a label'
        except DatasetError as error:
            reason = f'{reason}; {error}'
        self.stopped = reason
        self._say(f'recording stopped: {reason}')

    def _take_episode(self) -> EpisodeWriter:
        episode, self._episode = self._episode, None
        if episode is None:
            raise DatasetError('nothing is being recorded')
        self._finished = episode
        return episode

    def _end_intakes(self) -> int:
        """Have no more messages taken; returns the time, which does not wait for the writing thread."""
        ended_ns = self._now_ns()
        for topic in list(self._topics.values()):
            if topic.intake is not None:
                topic.intake.end()
        return ended_ns
