"""Who else commands the same arm: publishers on its command topics, and whether they speak.

Two programs that command one arm in turn tear it back and forth, each of them inside its own limits. Others are found
by the graph; while there are any, the topic is listened to, and what this node has not said was said by another.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from geometry_msgs.msg import PoseStamped
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.subscription import Subscription
from trajectory_msgs.msg import JointTrajectory

from decoupled_policy_ros.nodes.common import SENSOR, time_ns

#: How often the graph is looked at (s, wall).
LOOK_S = 0.2
#: Who has said nothing for so long (s, wall) does not command.
SILENCE_S = 0.5


class Said:
    """The last commands that a publisher has sent, to be known again."""

    def __init__(self, publisher: Publisher):
        self.publisher = publisher
        self._keys: deque[tuple[Any, ...]] = deque(maxlen=100)

    def publish(self, message: Any) -> None:
        """Publish a command and remember it."""
        self._keys.append(_key(message))
        self.publisher.publish(message)

    def __contains__(self, message: Any) -> bool:
        return _key(message) in self._keys


def _key(message: Any) -> tuple[Any, ...]:
    """What two commands of different origin never share."""
    stamp_ns = time_ns(message.header.stamp)
    if isinstance(message, JointTrajectory):
        return (stamp_ns, len(message.points), *(x for point in message.points[:2] for x in point.positions))
    p, q = message.pose.position, message.pose.orientation
    return (stamp_ns, p.x, p.y, p.z, q.x, q.y, q.z, q.w)


class OtherCommanders:
    """Watches the topics that a node commands on, from the node's own executor.

    Args:
        node: its graph and its executor.
        heard: told when another one begins to command, in words.
    """

    def __init__(self, node: Node, heard: Callable[[str], object]):
        self._node, self._heard = node, heard
        self._said: list[Said] = []
        self._others: dict[str, list[str]] = {}
        self._subscriptions: dict[str, Subscription] = {}
        self._spoke_s: dict[str, float] = {}
        self._timer = node.create_timer(LOOK_S, self.look, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def watch(self, said: Sequence[Said]) -> None:
        """Watch the topics of what the node itself sends."""
        self._said = list(said)
        self.look()

    def close(self) -> None:
        """Watch no topic any more."""
        self._said = []
        for subscription in self._subscriptions.values():
            self._node.destroy_subscription(subscription)
        for known in (self._others, self._subscriptions, self._spoke_s):
            known.clear()

    def present(self) -> str:
        """Those that could command the same arm; empty without any."""
        return '; '.join(f'{", ".join(names)} on {topic}' for topic, names in self._others.items() if names)

    def commanding(self) -> str:
        """Those that command it now; empty without any."""
        since_s = time.monotonic() - SILENCE_S
        topics = [topic for topic, spoke_s in self._spoke_s.items() if spoke_s > since_s]
        return '; '.join(f'{", ".join(self._others[t]) or "somebody"} commands {t} too' for t in topics)

    def look(self) -> None:
        """Look at the graph."""
        for said in self._said:
            topic = said.publisher.topic_name
            if self._node.count_publishers(topic) < 2:
                self._others[topic] = []
                continue
            infos = self._node.get_publishers_info_by_topic(topic)
            names = [f'{info.node_namespace.rstrip("/")}/{info.node_name}' for info in infos]
            mine = self._node.get_fully_qualified_name()
            if mine in names:
                names.remove(mine)
            self._others[topic] = sorted(names)
            if topic not in self._subscriptions:
                kind = said.publisher.msg_type
                self._subscriptions[topic] = self._node.create_subscription(
                    kind,
                    topic,
                    lambda message, said=said, topic=topic: self._take(message, said, topic),
                    SENSOR,  # hears reliable publishers and best-effort ones
                )

    def _take(self, message: PoseStamped | JointTrajectory, said: Said, topic: str) -> None:
        if message not in said:
            begins = not self.commanding()
            self._spoke_s[topic] = time.monotonic()
            if begins:
                self._heard(self.commanding())
