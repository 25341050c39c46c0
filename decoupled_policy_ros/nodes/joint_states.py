"""Where the joints are, for the guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import JointState

from decoupled_policy_ros.errors import MessageError
from decoupled_policy_ros.nodes.common import time_ns
from decoupled_policy_ros.observation.messages import joint_positions_from_message, stamp_ns
from decoupled_policy_ros.observation.sources import JOINT_CAPACITY
from decoupled_policy_ros.observation.streams import StreamBuffer
from decoupled_policy_ros.robot.description import RobotDescription

#: How far ahead of simulated time a sample is one of a time before (ns): /clock may be heard late, by a step or a few.
FUTURE_NS = 1_000_000_000


def refuse_the_future(node: Node, message: Any, limit_s: float) -> None:
    """Refuse a message that is stamped far ahead of the node's clock: in a buffer it would bar all that come after it.

    Not with simulated time: there both come from the simulator, and /clock may be heard after what it stamps, which
    a simulator that waits sends only once.

    Raises:
        MessageError: the stamp is more than `limit_s` ahead.
    """
    clock = node.get_clock()
    if clock.ros_time_is_active:
        return
    now_ns = clock.now().nanoseconds
    ahead_s = (time_ns(message.header.stamp) - now_ns) * 1e-9
    if ahead_s > limit_s:
        raise MessageError(f'header stamp is {ahead_s:.3f} s in the future, limit {limit_s:g} s')


def forget_the_future(node: Node, message: Any, buffer: StreamBuffer) -> None:
    """Empty a buffer whose newest sample is far ahead both of simulated time and of what comes now.

    When a simulator starts again, or a bag from its beginning, a message from before may arrive after the clock has
    gone back: it would bar all others until time has caught up with it.
    """
    clock = node.get_clock()
    if not clock.ros_time_is_active:
        return
    now_ns = max(clock.now().nanoseconds, time_ns(message.header.stamp))
    latest_ns = buffer.latest_stamp_ns
    if latest_ns is not None and latest_ns - now_ns > FUTURE_NS:
        buffer.clear()


class JointStates:
    """The arm's latest joint positions, by name, with their age.

    Args:
        robot: gives names, and the topic for `subscribe`.
        max_age_s: older ones, by their own stamps, are no longer known.

    Attributes:
        buffer: what has arrived.
    """

    def __init__(self, robot: RobotDescription, max_age_s: float):
        self._robot, self._max_age_ns = robot, round(max_age_s * 1e9)
        self.buffer = StreamBuffer(JOINT_CAPACITY)  # stamps may be ahead: back to now, at 1 kHz too
        self._refusal = ''
        self._close: Callable[[], object] = lambda: None

    def subscribe(self, node: Node, qos: QoSProfile) -> None:
        """Listen to the robot's joint states, where nobody else hands them over."""
        self.close()

        def take(message: JointState) -> None:
            try:
                refuse_the_future(node, message, self._max_age_ns * 1e-9)
            except MessageError as error:
                self._refusal = str(error)
            else:
                forget_the_future(node, message, self.buffer)
                self.take(message)

        subscription = node.create_subscription(JointState, self._robot.topics['joint_states'], take, qos)
        self._close = lambda: node.destroy_subscription(subscription)

    def close(self) -> None:
        """Unsubscribe."""
        self._close()
        self._close = lambda: None

    def take(self, message: JointState) -> None:
        """Remember a message; one that lacks a joint, a stamp or a finite position is left out."""
        try:
            positions_rad = joint_positions_from_message(message, self._robot.joint_names)
            self.buffer.push(stamp_ns(message.header.stamp), positions_rad)
            self._refusal = ''
        except MessageError as error:
            self._refusal = str(error)

    def clear(self) -> None:
        """Forget every message, as after a jump of the clock."""
        self.buffer.clear()

    def at(self, now_ns: int) -> tuple[int, NDArray[np.float64]] | None:
        """Stamp and joint positions (n,) of a time, rad; None if there are none that are young enough."""
        latest = self.buffer.at_or_before(now_ns)
        if latest is None or now_ns - latest[0] > self._max_age_ns:
            return None
        return latest[0], np.asarray(latest[1], float)

    def positions(self, now_ns: int) -> NDArray[np.float64] | None:
        """Joint positions (n,) of a time, rad; None if there are none that are young enough."""
        latest = self.at(now_ns)
        return None if latest is None else latest[1]

    def why_not(self, now_ns: int) -> str:
        """Why there are no joint positions of a time."""
        latest_ns = self.buffer.latest_stamp_ns
        if self._refusal:
            return f'joint state refused: {self._refusal}'
        if latest_ns is None:
            return f'no joint state on {self._robot.topics["joint_states"]}'
        limit_s = self._max_age_ns * 1e-9
        return f'the joint state is {(now_ns - latest_ns) * 1e-9:.3f} s old, limit {limit_s:g} s'
