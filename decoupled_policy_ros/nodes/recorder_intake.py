"""Subscriptions that lose nothing: a callback that only appends, and the QoS that publishers offer."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from rclpy.event_handler import QoSMessageLostInfo, SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from rclpy.topic_endpoint_info import TopicEndpointInfo

from decoupled_policy_ros.nodes.common import resolve_topic

#: Messages that DDS holds for us: 5 s of a 1 kHz stream, should this process not be scheduled for so long.
DEPTH = 5000


class Offer(NamedTuple):
    """What of QoS decides whether a publisher and a subscription match."""

    reliable: bool
    latched: bool  # transient local

    @classmethod
    def of(cls, publisher: TopicEndpointInfo) -> Offer:
        """What one publisher offers."""
        qos = publisher.qos_profile
        return cls(
            qos.reliability == ReliabilityPolicy.RELIABLE, qos.durability == DurabilityPolicy.TRANSIENT_LOCAL
        )

    def serves(self, requested: Offer) -> bool:
        """Whether a subscription that asks for `requested` hears a publisher that offers this."""
        return self.reliable >= requested.reliable and self.latched >= requested.latched

    def __str__(self) -> str:
        return ('reliable' if self.reliable else 'best effort') + (', latched' if self.latched else '')


class Intake:
    """Collects the messages of one topic between two calls of `take`.

    A best-effort subscription hears every publisher but may lose messages; a reliable one hears reliable
    publishers only. So it begins with what the publishers that are known offer, best effort without any, and `adapt`
    makes it what all publishers offer. Messages that come before the publishers are known are not taken, for some
    of them could be lost in the change.

    Args:
        node: gets the subscription.
        kind: message class.
        topic: name, resolved by the node.
        depth: messages that DDS holds for us.
        latched: ask for transient local durability where all publishers offer it.
    """

    def __init__(self, node: Node, kind: type, topic: str, depth: int = DEPTH, latched: bool = False):
        self.topic = resolve_topic(node, topic)
        self.lost = 0  # as counted by DDS
        self.hold = False  # leave a subscription that hears anybody as it is
        self.publishers: Sequence[TopicEndpointInfo] = ()
        self.unheard = 0  # publishers whose offer does not serve the subscription, while it is held
        self._node, self._kind, self._depth, self._latched = node, kind, depth, latched
        self._messages: deque[Any] = deque()
        self._settled = False
        self.profile = self._offered() or Offer(False, False)
        self._subscription = self._subscribe()

    def take(self) -> list[Any]:
        """All messages since the last call; from any thread."""
        return [self._messages.popleft() for _ in range(len(self._messages))]

    def adapt(self) -> None:
        """Look at the publishers and subscribe anew if another QoS fits them better."""
        offered = self._offered()
        if offered is None:
            return
        heard = [Offer.of(publisher).serves(self.profile) for publisher in self.publishers]
        if offered != self.profile and not (self.hold and any(heard)):
            self.profile = offered
            self._node.destroy_subscription(self._subscription)
            self._subscription = self._subscribe()
            heard = []
        self.unheard = heard.count(False)
        if not self._settled:
            self._settled = True
            self._node.get_logger().info(
                f'{self.topic}: {len(self.publishers)} publisher(s), subscribed {self.profile}'
            )

    def close(self) -> None:
        """End the subscription."""
        self._node.destroy_subscription(self._subscription)

    def _offered(self) -> Offer | None:
        """What all publishers of the type offer; None without any."""
        type_name = f'{self._kind.__module__.partition(".")[0]}/msg/{self._kind.__name__}'
        publishers = self._node.get_publishers_info_by_topic(self.topic)
        self.publishers = [publisher for publisher in publishers if publisher.topic_type == type_name]
        if not self.publishers:
            return None
        offers = [Offer.of(publisher) for publisher in self.publishers]
        return Offer(
            all(offer.reliable for offer in offers), self._latched and all(offer.latched for offer in offers)
        )

    def _subscribe(self) -> Subscription:
        latched, reliable = self.profile.latched, self.profile.reliable
        profile = QoSProfile(
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
            history=HistoryPolicy.KEEP_LAST,
            depth=self._depth,
        )
        return self._create(profile)

    def _create(self, profile: QoSProfile) -> Subscription:
        events = SubscriptionEventCallbacks(message_lost=self._on_lost)
        return self._node.create_subscription(
            self._kind, self.topic, self._on_message, profile, event_callbacks=events
        )

    def _on_message(self, message: Any) -> None:
        if self._settled:
            self._messages.append(message)

    def _on_lost(self, info: QoSMessageLostInfo) -> None:
        self.lost += info.total_count_change
