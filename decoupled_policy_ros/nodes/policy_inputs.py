"""From subscriptions to stream buffers: the live end of the road that the converter walks offline."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image, JointState

from decoupled_policy_ros.errors import MessageError
from decoupled_policy_ros.nodes.joint_states import JointStates, forget_the_future, refuse_the_future
from decoupled_policy_ros.observation.contract import ObservationContract
from decoupled_policy_ros.observation.sources import (
    COMPRESSED_IMAGE_TYPE,
    IMAGE_TYPE,
    JOINT_STATE_TYPE,
    StreamSource,
    stream_sources,
)
from decoupled_policy_ros.observation.streams import StreamBuffer
from decoupled_policy_ros.robot.description import RobotDescription

MESSAGE_TYPES = {IMAGE_TYPE: Image, COMPRESSED_IMAGE_TYPE: CompressedImage, JOINT_STATE_TYPE: JointState}


@dataclass
class Stream:
    """One subscription's source and what has become of its messages."""

    source: StreamSource
    subscription: Subscription | None = None
    refused: int = 0
    last_refusal: str = ''
    refused_at: int = -1
    arrivals: deque[float] = field(default_factory=lambda: deque(maxlen=50))

    @property
    def topic(self) -> str:
        """Topic, relative to the node's namespace."""
        return self.source.topic

    @property
    def buffer(self) -> StreamBuffer:
        """What has arrived."""
        return self.source.buffer

    def rate_hz(self) -> float:
        """Messages per second (wall) over the last 50, falling towards 0 once none come any more."""
        arrivals = list(self.arrivals)
        if len(arrivals) < 2:
            return 0.0
        return (len(arrivals) - 1) / max(time.monotonic() - arrivals[0], 1e-9)

    def trouble(self, name: str, now_ns: int) -> str:
        """What keeps this stream out of an observation at `now_ns`: silence, or an age beyond its limit."""
        latest_ns = self.buffer.latest_stamp_ns
        if latest_ns is None:
            return f'nothing on {name}'
        age_s = (now_ns - latest_ns) * 1e-9
        limit_s = self.source.spec.max_age_s
        if abs(age_s) <= limit_s:
            return ''
        state = f'{age_s:.3f} s old' if age_s > 0 else f'{-age_s:.3f} s in the future'
        return f'{name} is {state}, limit {limit_s:g} s'


class Inputs:
    """Subscriptions of one observation contract, their buffers and their counters.

    Args:
        node: the node that subscribes.
        robot: gives the topics.
        contract: gives the streams.
        qos: of every subscription.
        notify: called when a stream has a new sample.
        joints: also given every joint state, before the stream that is made of it.
        before: those of another contract, whose streams are taken over where this one has the same, with all that
            they hold.

    Raises:
        ConfigError: the contract has a stream that this robot has no topic for, or of another size.
    """

    def __init__(
        self,
        node: Node,
        robot: RobotDescription,
        contract: ObservationContract,
        qos: QoSProfile,
        notify: Callable[[], None],
        joints: JointStates | None = None,
        before: Inputs | None = None,
    ):
        self._node, self._robot, self._qos = node, robot, qos
        self._notify, self._joints = notify, joints
        self._rate_hz = contract.rate_hz
        known = {} if before is None else before.streams
        self.streams: dict[str, Stream] = {}
        for name, source in stream_sources(robot, contract).items():
            same = name in known and known[name].source.reads_as(source)
            self.streams[name] = known[name] if same else self._subscribed(Stream(source))
        if joints is not None and not self._has_joints:
            joints.subscribe(node, qos)

    def succeeded_by(self, contract: ObservationContract) -> Inputs:
        """Inputs of another contract beside these, sharing the streams that both have.

        Raises:
            ConfigError: as for a new one.
        """
        return Inputs(self._node, self._robot, contract, self._qos, self._notify, self._joints, self)

    @property
    def buffers(self) -> dict[str, StreamBuffer]:
        """Buffer of each stream."""
        return {name: stream.buffer for name, stream in self.streams.items()}

    def clear(self) -> None:
        """Forget every sample."""
        for stream in self.streams.values():
            stream.buffer.clear()
        if self._joints is not None:
            self._joints.clear()

    def status(self, name: str, now_ns: int, observed_ages_s: dict[str, float]) -> DiagnosticStatus:
        """Rate, age and refusals of each stream, and the age with which it last entered a chunk."""
        values = {'required_rate_hz': f'{self._rate_hz:g}'}
        for stream_name, stream in self.streams.items():
            latest_ns = stream.buffer.latest_stamp_ns
            values |= {
                f'{stream_name}_topic': stream.topic,
                f'{stream_name}_rate_hz': f'{stream.rate_hz():.1f}',
                f'{stream_name}_age_s': 'never'
                if latest_ns is None
                else f'{(now_ns - latest_ns) * 1e-9:.3f}',
                f'{stream_name}_max_age_s': f'{stream.source.spec.max_age_s:g}',
                f'{stream_name}_refused': str(stream.refused + stream.buffer.rejected),
                f'{stream_name}_last_refusal': stream.last_refusal,
            }
            if stream_name in observed_ages_s:
                values[f'{stream_name}_observed_age_s'] = f'{observed_ages_s[stream_name]:.3f}'
        troubles = [
            trouble
            for stream_name, stream in self.streams.items()
            if (trouble := stream.trouble(stream_name, now_ns))
        ]
        return DiagnosticStatus(
            level=DiagnosticStatus.WARN if troubles else DiagnosticStatus.OK,
            name=name,
            message='; '.join(troubles) or 'receiving',
            values=[KeyValue(key=key, value=value) for key, value in values.items()],
        )

    def close(self, others: Sequence[Inputs] = ()) -> None:
        """Unsubscribe from what no others use."""
        used = {id(stream) for inputs in others for stream in inputs.streams.values()}
        for stream in self.streams.values():
            if stream.subscription is not None and id(stream) not in used:
                self._node.destroy_subscription(stream.subscription)
                stream.subscription = None
        if self._joints is not None and all(inputs._has_joints for inputs in others):
            self._joints.close()

    @property
    def _has_joints(self) -> bool:
        return any(self._is_joints(stream) for stream in self.streams.values())

    def _subscribed(self, stream: Stream) -> Stream:
        kind = MESSAGE_TYPES[stream.source.message_type]
        stream.subscription = self._node.create_subscription(
            kind, stream.topic, partial(self._take, stream), self._qos
        )
        return stream

    @staticmethod
    def _is_joints(stream: Stream) -> bool:
        return stream.source.message_type == JOINT_STATE_TYPE

    def explain(self, name: str) -> str:
        """What was wrong with the last message of a stream; empty if nothing was, or it is long ago."""
        stream = self.streams.get(name)
        if stream is None or stream.refused_at != stream.buffer.accepted:
            return ''
        return f'last message refused: {stream.last_refusal}'

    def _take(self, stream: Stream, message: Any) -> None:
        stream.arrivals.append(time.monotonic())
        try:
            refuse_the_future(self._node, message, stream.source.spec.max_age_s)
            forget_the_future(self._node, message, stream.buffer)
            if self._joints is not None and self._is_joints(stream):
                forget_the_future(self._node, message, self._joints.buffer)
                self._joints.take(message)
            taken = stream.source.take(message)
        except MessageError as error:
            stream.refused += 1
            stream.last_refusal, stream.refused_at = str(error), stream.buffer.accepted
            self._node.get_logger().warning(f'{stream.topic}: refused: {error}', throttle_duration_sec=2.0)
            return
        if taken:
            self._notify()
