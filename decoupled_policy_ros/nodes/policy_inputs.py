"""From subscriptions to stream buffers: the live end of the road that the converter walks offline."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from numpy.typing import NDArray
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image, JointState

from decoupled_policy_ros.errors import ConfigError, MessageError
from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.observation.image import fit_image
from decoupled_policy_ros.observation.messages import (
    compressed_image_to_array,
    image_to_array,
    joint_positions_from_message,
    stamp_ns,
)
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.observation.streams import StreamBuffer
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.kinematics import Kinematics

#: Enough for the history of a 1 kHz joint state; pictures are kept at the size that the policy sees.
JOINT_CAPACITY, IMAGE_CAPACITY = 2000, 64


class JointBuffer(StreamBuffer):
    """Joint positions as they came; turned into proprioception only where a frame is taken.

    A real arm reports its joints up to a thousand times a second and a policy looks five times a second.
    """

    def __init__(self, capacity: int, proprioception: Proprioception):
        super().__init__(capacity)
        self._proprioception = proprioception

    def at_or_before(self, stamp_ns: int) -> tuple[int, NDArray] | None:
        """The latest sample with a stamp <= `stamp_ns`, as (its stamp, proprioception), or None."""
        found = super().at_or_before(stamp_ns)
        return None if found is None else (found[0], self._proprioception(found[1]))


@dataclass
class Stream:
    """One subscription's buffer and what has become of its messages."""

    topic: str
    buffer: StreamBuffer
    max_age_s: float
    refused: int = 0
    last_refusal: str = ''
    refused_at: int = -1
    arrivals: deque[float] = field(default_factory=lambda: deque(maxlen=50))

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
        if abs(age_s) <= self.max_age_s:
            return ''
        state = f'{age_s:.3f} s old' if age_s > 0 else f'{-age_s:.3f} s in the future'
        return f'{name} is {state}, limit {self.max_age_s:g} s'


class Inputs:
    """Subscriptions of one observation contract, their buffers and their counters.

    Args:
        node: the node that subscribes.
        robot: gives the topics.
        contract: gives the streams.
        qos: of every subscription.
        notify: called when a stream has a new sample.

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
    ):
        self._node, self._robot, self._notify = node, robot, notify
        self._proprioception = Proprioception(robot, Kinematics(robot))
        sources = {spec.name: self._source(spec) for spec in contract.streams}
        self.streams = {
            spec.name: Stream(sources[spec.name][1], self._buffer(spec), spec.max_age_s)
            for spec in contract.streams
        }
        self._subscriptions = [
            node.create_subscription(kind, topic, partial(self._take, self.streams[name], convert), qos)
            for name, (kind, topic, convert) in sources.items()
        ]

    @property
    def buffers(self) -> dict[str, StreamBuffer]:
        """Buffer of each stream."""
        return {name: stream.buffer for name, stream in self.streams.items()}

    def clear(self) -> None:
        """Forget every sample."""
        for stream in self.streams.values():
            stream.buffer.clear()

    def status(self, name: str, now_ns: int, observed_ages_s: dict[str, float]) -> DiagnosticStatus:
        """Rate, age and refusals of each stream, and the age with which it last entered a chunk."""
        values: dict[str, str] = {}
        for stream_name, stream in self.streams.items():
            latest_ns = stream.buffer.latest_stamp_ns
            values |= {
                f'{stream_name}_topic': stream.topic,
                f'{stream_name}_rate_hz': f'{stream.rate_hz():.1f}',
                f'{stream_name}_age_s': 'never'
                if latest_ns is None
                else f'{(now_ns - latest_ns) * 1e-9:.3f}',
                f'{stream_name}_observed_age_s': f'{observed_ages_s.get(stream_name, 0.0):.3f}',
                f'{stream_name}_refused': str(stream.refused + stream.buffer.rejected),
                f'{stream_name}_last_refusal': stream.last_refusal,
            }
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

    def close(self) -> None:
        """Unsubscribe."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def explain(self, name: str) -> str:
        """What was wrong with the last message of a stream; empty if nothing was, or it is long ago."""
        stream = self.streams.get(name)
        if stream is None or stream.refused_at != stream.buffer.accepted:
            return ''
        return f'last message refused: {stream.last_refusal}'

    def _source(self, spec: StreamSpec) -> tuple[type, str, Callable[[Any], NDArray]]:
        """Message type, topic and conversion of a stream."""
        if spec.kind == 'image':
            if spec.name not in self._robot.cameras:
                raise ConfigError(
                    f'the task needs camera {spec.name!r}, robot {self._robot.name!r} has '
                    f'{", ".join(sorted(self._robot.cameras)) or "none"}'
                )
            camera = self._robot.cameras[spec.name]
            kind, decode = (
                (CompressedImage, compressed_image_to_array) if camera.compressed else (Image, image_to_array)
            )
            size = (spec.shape[0], spec.shape[1])
            return kind, camera.topic, lambda message: fit_image(decode(message), size)
        if spec.kind == 'proprioception':
            if spec.shape != (self._proprioception.dim,):
                raise ConfigError(
                    f'the task needs proprioception of shape {spec.shape}, robot {self._robot.name!r} has '
                    f'({self._proprioception.dim},)'
                )
            return JointState, self._robot.topics['joint_states'], self._joint_positions
        raise ConfigError(
            f'the task needs the {spec.kind} stream {spec.name!r}, which no topic carries: such a task runs in '
            f'`decoupled-policy evaluate` only'
        )

    def _buffer(self, spec: StreamSpec) -> StreamBuffer:
        if spec.kind == 'image':
            return StreamBuffer(IMAGE_CAPACITY)
        return JointBuffer(JOINT_CAPACITY, self._proprioception)

    def _joint_positions(self, message: JointState) -> NDArray:
        return joint_positions_from_message(message, self._robot.all_joint_names)

    def _take(self, stream: Stream, convert: Callable[[Any], NDArray], message: Any) -> None:
        stream.arrivals.append(time.monotonic())
        try:
            stamp, array = stamp_ns(message.header.stamp), convert(message)
        except MessageError as error:
            stream.refused += 1
            stream.last_refusal, stream.refused_at = str(error), stream.buffer.accepted
            self._node.get_logger().warning(f'{stream.topic}: refused: {error}', throttle_duration_sec=2.0)
            return
        if stream.buffer.push(stamp, array):
            self._notify()
