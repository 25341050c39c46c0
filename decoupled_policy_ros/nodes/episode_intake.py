"""Serialised messages as they come, polled by a thread of their own, in bounded memory."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from rclpy.callback_groups import CallbackGroup
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.subscription import Subscription

from decoupled_policy_ros.nodes.episode_clock import EpisodeClock
from decoupled_policy_ros.nodes.recorder_intake import Intake

POLL_S = 0.01
#: With simulated time, what has no stamp is logged with the time at which it is polled.
POLL_SIM_TIME_S = 0.002


class Budget:
    """Bytes that all intakes together may hold."""

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> bool:
        """Take room for a message; False if there is none."""
        with self._lock:
            if self.held_bytes + size > self.limit_bytes:
                return False
            self.held_bytes += size
            return True

    def give_back(self, size: int) -> None:
        """Return room."""
        with self._lock:
            self.held_bytes -= size


class RawMessage(NamedTuple):
    """A message as it came from the wire."""

    log_ns: int  # clock of the episode at reception
    data: bytes
    publish_ns: int
    sequence: int  # the publisher's own count; 0 unknown


class _LeftAlone(CallbackGroup):
    """Subscriptions that the executor does not wait for."""

    def can_execute(self, entity: Any) -> bool:
        return False

    def beginning_execution(self, entity: Any) -> bool:
        return False

    def ending_execution(self, entity: Any) -> None:
        pass


class RawIntake(Intake):
    """Collects serialised messages, while `begin` and `end` say so, within a budget of memory.

    It is polled, by a thread that is not the executor's: to wake up that one for each message of a 1 kHz stream costs
    several times the rest of recording it, and the middleware notes down when each was received. Where a topic has one
    publisher, the publisher's count of its messages tells exactly how many are missing. The last messages of a latched
    topic are kept, and are the first of each episode.

    Args:
        node, kind, topic, depth: as `Intake`.
        budget: what this and other intakes may hold.
        clock: of the episode.
    """

    LATCHED_MESSAGES = 100

    def __init__(self, node: Node, kind: type, topic: str, depth: int, budget: Budget, clock: EpisodeClock):
        self.received = self.missing = self.overflowed = 0  # since `begin`
        self.heard = 0  # ever
        self.heard_at = 0.0  # monotonic clock (s)
        self._budget, self._clock = budget, clock
        self._recording = False
        self._begin_ns = self._last_sequence = self._lost_before = 0
        self._log_ns: Callable[[], int] | None = None
        self._last: deque[RawMessage] = deque(maxlen=self.LATCHED_MESSAGES)
        self._group = _LeftAlone()
        self._polling = threading.Lock()
        self._closed = False
        super().__init__(node, kind, topic, depth, latched=True)

    @property
    def lost_by_dds(self) -> int:
        """Messages lost since `begin`, as DDS counts them."""
        return self.lost - self._lost_before

    def begin(self, begin_ns: int, log_ns: Callable[[], int] | None) -> None:
        """Take messages that were received from `begin_ns` (clock of the episode) on, and the latched ones from before.

        `log_ns` gives the log time of a message; None: the time at which the middleware received it.
        """
        with self._polling:
            self._begin(begin_ns, log_ns)

    def _begin(self, begin_ns: int, log_ns: Callable[[], int] | None) -> None:
        self.take()  # what came while the episode before was ended
        self.received = self.missing = self.overflowed = self._last_sequence = 0
        self._lost_before = self.lost
        self._begin_ns, self._log_ns = begin_ns, log_ns
        self._recording = self.hold = True
        if self.profile.latched:
            now_ns = self._clock.now_ns()
            for message in self._last:  # the clock may have been set back since
                self._store(message._replace(log_ns=self._log_time(min(message.log_ns, now_ns))))

    def end(self) -> None:
        """Take no more; what has come until now is taken."""
        self.poll()
        with self._polling:
            self._recording = self.hold = False

    def take(self) -> list[RawMessage]:
        """All messages since the last call; from any thread, but one at a time."""
        messages = super().take()
        self._budget.give_back(sum(len(message.data) for message in messages))
        return messages

    def adapt(self) -> None:
        """As `Intake.adapt`, between two polls."""
        with self._polling:
            super().adapt()

    def close(self) -> None:
        """End the subscription, between two polls."""
        with self._polling:
            super().close()
            self._closed = True

    def poll(self) -> None:
        """Take what the middleware has."""
        with self._polling:
            if self._closed:
                return
            handle = self._subscription.handle
            with handle:
                for _ in range(self._depth):  # an end, however fast they come
                    taken = handle.take_message(self._kind, True)
                    if taken is None:
                        break
                    self._on_raw(*taken)
            with self._lost_event:
                lost = self._lost_event.take_event()
            if lost is not None:
                self._on_lost(lost)

    def _create(self, profile: QoSProfile) -> Subscription:
        subscription = self._node.create_subscription(
            self._kind,
            self.topic,
            lambda _: None,
            profile,
            callback_group=self._group,
            event_callbacks=SubscriptionEventCallbacks(use_default_callbacks=False),
            raw=True,
        )
        kinds = rclpy_implementation.rcl_subscription_event_type_t
        with subscription.handle:
            self._lost_event = rclpy_implementation.EventHandle(
                subscription.handle, kinds.RCL_SUBSCRIPTION_MESSAGE_LOST
            )
        return subscription

    def _on_raw(self, data: bytes, info: dict[str, Any]) -> None:
        received_ns = self._clock.reception_ns(info['received_timestamp'])
        self.heard += 1
        self.heard_at = time.monotonic()
        if not self._recording and not self.profile.latched:
            return
        log_ns = self._log_time(received_ns)
        sequence = info['publication_sequence_number'] or 0
        message = RawMessage(log_ns, data, info['source_timestamp'] or log_ns, sequence)
        if self.profile.latched:
            self._last.append(message)
        waited = received_ns < self._begin_ns and not self.profile.latched
        if not self._recording or waited:
            return  # what waited in DDS from before the beginning is not of this episode
        if 0 < self._last_sequence < sequence - 1 and len(self.publishers) == 1:
            self.missing += sequence - self._last_sequence - 1
        self._last_sequence = sequence
        self._store(message)

    def _log_time(self, received_ns: int) -> int:
        """When a message is logged: never before the beginning, or long after that were others written already."""
        return max(received_ns, self._begin_ns) if self._log_ns is None else self._log_ns()

    def _store(self, message: RawMessage) -> None:
        self.received += 1
        if self._budget.add(len(message.data)):
            self._messages.append(message)
        else:
            self.overflowed += 1


class Poller:
    """Polls intakes in a thread of its own, every `period_s`."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self.failure: Exception | None = None
        self.intakes: list[RawIntake] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name='intake', daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._end.wait(self._period_s):
                for intake in list(self.intakes):
                    intake.poll()
        except Exception as error:  # it must not die in silence: the node asks for `failure`
            self.failure = error
