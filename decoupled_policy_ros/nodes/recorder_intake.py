"""Subscriptions that lose nothing: a callback that only appends, and the reliability that publishers offer."""

from __future__ import annotations

from collections import deque
from typing import Any

from rclpy.event_handler import QoSMessageLostInfo, SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription

#: Messages that DDS holds for us: 5 s of a 1 kHz stream, should this process not be scheduled for so long.
DEPTH = 5000


class Intake:
    """Collects the messages of one topic between two calls of `take`.

    A best-effort subscription hears every publisher but may lose messages; a reliable one hears reliable
    publishers only. So it begins as best effort, and `adapt` makes it what all publishers offer. Messages that
    come before the publishers are known are not taken, for some of them could be lost in the change.
    """

    def __init__(self, node: Node, kind: type, topic: str):
        self.topic = node.resolve_topic_name(topic)
        self.lost = 0  # as counted by DDS
        self._node, self._kind = node, kind
        self._messages: deque[Any] = deque()
        self._reliable = self._settled = False
        self._subscription = self._subscribe()

    def take(self) -> list[Any]:
        """All messages since the last call; from any thread."""
        return [self._messages.popleft() for _ in range(len(self._messages))]

    def adapt(self) -> None:
        """Look at the publishers and subscribe anew if another reliability fits them better."""
        publishers = self._node.get_publishers_info_by_topic(self.topic)
        if not publishers:
            return
        offered = [publisher.qos_profile.reliability for publisher in publishers]
        reliable = all(reliability == ReliabilityPolicy.RELIABLE for reliability in offered)
        if reliable != self._reliable:
            self._reliable = reliable
            self._node.destroy_subscription(self._subscription)
            self._subscription = self._subscribe()
        if not self._settled:
            self._settled = True
            kind = 'reliable' if reliable else 'best effort'
            self._node.get_logger().info(f'{self.topic}: {len(publishers)} publisher(s), subscribed {kind}')

    def _subscribe(self) -> Subscription:
        profile = QoSProfile(
            reliability=ReliabilityPolicy.RELIABLE if self._reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.VOLATILE,
            history=HistoryPolicy.KEEP_LAST,
            depth=DEPTH,
        )
        events = SubscriptionEventCallbacks(message_lost=self._on_lost)
        return self._node.create_subscription(
            self._kind, self.topic, self._on_message, profile, event_callbacks=events
        )

    def _on_message(self, message: Any) -> None:
        if self._settled:
            self._messages.append(message)

    def _on_lost(self, info: QoSMessageLostInfo) -> None:
        self.lost += info.total_count_change
