"""Recorded messages into stream buffers, through the code that the policy node runs live, every one accounted for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from decoupled_policy_ros.data.bags.reader import Bag, BagMessage
from decoupled_policy_ros.errors import DatasetError, MessageError
from decoupled_policy_ros.observation.contract import ObservationContract
from decoupled_policy_ros.observation.messages import pose_from_message, stamp_ns
from decoupled_policy_ros.observation.sources import JointBuffer, StreamSource, stream_sources
from decoupled_policy_ros.observation.streams import StreamBuffer
from decoupled_policy_ros.robot.description import RobotDescription

POSE_TYPE = 'geometry_msgs/msg/PoseStamped'
GRIPPER_TYPE = 'std_msgs/msg/Float64'

#: A stamp that is older than the one before by more than this (s) is a clock that went back, not a late message.
JUMP_S = 0.5
#: Log times within this (s) of the stamps are of the same clock.
SAME_CLOCK_S = 1.0
#: From so many messages out of order on, as a number and as a share, a topic has no order at all.
DISORDER, DISORDER_SHARE = 10, 0.02
_UNBOUNDED = 2**62  # what was sampled is dropped, so that a buffer holds LAG_S at most


@dataclass
class TopicCount:
    """What has become of the messages of one topic."""

    message_type: str
    received: int = 0
    refused: int = 0
    last_refusal: str = ''
    not_newer: int = 0
    disordered: int = 0
    last_data: bytes = b''

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        values = {name: getattr(self, name) for name in ('message_type', 'received', 'refused', 'not_newer')}
        return values | ({'last_refusal': self.last_refusal} if self.refused else {})


class GripperCommands:
    """Gripper values by the time at which they came; the message has no stamp of its own."""

    def __init__(self) -> None:
        self._stamps_ns: list[int] = []
        self._values: list[float] = []

    def push(self, stamp_ns: int, value: float) -> None:
        """Append; of two at the same time the later one counts."""
        self._stamps_ns.append(max(stamp_ns, self._stamps_ns[-1] if self._stamps_ns else stamp_ns))
        self._values.append(value)

    def at_or_before(self, stamp_ns: int) -> float | None:
        """The value in force, or None."""
        index = bisect_right(self._stamps_ns, stamp_ns)
        return self._values[index - 1] if index else None


class Intake:
    """Stream buffers of one recording, and what became of the messages that went there.

    Args:
        bag: the recording; its topics are checked.
        robot: the arm in it.
        contract: gives the streams.
        commanded: whether commanded poses are needed.
        namespace: of the robot's topics in the bag.

    Raises:
        DatasetError: a topic is missing, of another type or empty.
        ConfigError: the robot has no topic for a stream.
    """

    def __init__(
        self,
        bag: Bag,
        robot: RobotDescription,
        contract: ObservationContract,
        commanded: bool,
        namespace: str,
    ):
        self.path = bag.path
        self.sources = stream_sources(
            robot,
            contract,
            joint_capacity=_UNBOUNDED,
            image_capacity=_UNBOUNDED,
            see_size=self._require_one_size,
        )
        self.joints = next(s.buffer for s in self.sources.values() if isinstance(s.buffer, JointBuffer))
        self.targets = StreamBuffer(_UNBOUNDED) if commanded else None
        self.gripper = GripperCommands()
        self.counts: dict[str, TopicCount] = {}
        self.first_ns: int | None = None
        self._bag, self._robot = bag, robot
        self._sizes: dict[str, tuple[int, int]] = {}
        self._takers: dict[str, Callable[[BagMessage, Any], None]] = {}
        self._namespace = namespace
        self._connect(namespace)

    @property
    def topics(self) -> list[str]:
        """The topics that are read."""
        return list(self._takers)

    def _connect(self, namespace: str) -> None:
        for source in self.sources.values():
            topic = absolute(source.topic, namespace)
            self._bag.require(topic, source.message_type)
            self._add(topic, source.message_type, self._stream_taker(source))
        names = self._robot.topics
        if self.targets is not None:
            topic = absolute(names['target_pose'], namespace)
            self._bag.require(topic, POSE_TYPE)
            self._add(topic, POSE_TYPE, self._take_target)
        gripper = absolute(names['gripper_command'], namespace)
        found = self._bag.topics.get(gripper)
        if found is not None and found.count:
            self._bag.require(gripper, GRIPPER_TYPE)
            self._add(gripper, GRIPPER_TYPE, self._take_gripper)

    def _add(self, topic: str, message_type: str, take: Callable[[BagMessage, Any], None]) -> None:
        if topic in self._takers:
            raise DatasetError(
                f'robot {self._robot.name!r} has the topic {topic} twice; each stream needs its own'
            )
        self._takers[topic], self.counts[topic] = take, TopicCount(message_type)

    def take(self, message: BagMessage) -> None:
        """Push one message into its buffer; one that is not what its fields claim is counted and left out.

        Raises:
            DatasetError: its clock went back, or a camera's pictures changed their size.
        """
        count = self.counts[message.topic]
        count.received += 1
        try:
            self._takers[message.topic](message, message.decode())
        except MessageError as error:
            count.refused += 1
            count.last_refusal = str(error)

    def _stream_taker(self, source: StreamSource) -> Callable[[BagMessage, Any], None]:
        def take(logged: BagMessage, message: Any) -> None:
            stamp = stamp_ns(message.header.stamp)
            if self._is_newer(logged, stamp, source.buffer):
                source.take(message)
                self.first_ns = stamp if self.first_ns is None else min(self.first_ns, stamp)

        return take

    def _take_target(self, logged: BagMessage, message: Any) -> None:
        assert self.targets is not None
        stamp = stamp_ns(message.header.stamp)
        if self._is_newer(logged, stamp, self.targets):
            self.targets.push(stamp, pose_from_message(message, *self._robot.base_frames))

    def _take_gripper(self, logged: BagMessage, message: Any) -> None:
        if not abs(message.data) < float('inf'):
            raise MessageError(f'gripper width {message.data} is not finite')
        newest_ns = self.newest_ns()
        if newest_ns is None:
            stamp = 0  # in force before anything was seen
        else:
            # A bag recorded without use_sim_time has log times of another clock than its stamps.
            same_clock = abs(logged.log_ns - newest_ns) < SAME_CLOCK_S * 1e9
            stamp = logged.log_ns if same_clock else newest_ns
        self.gripper.push(stamp, float(self._robot.gripper.normalised_from_width(message.data)))

    def _is_newer(self, logged: BagMessage, stamp: int, buffer: StreamBuffer) -> bool:
        count, latest_ns = self.counts[logged.topic], buffer.latest_stamp_ns
        before, count.last_data = count.last_data, logged.data
        if latest_ns is None or stamp > latest_ns:
            return True
        if stamp < latest_ns - JUMP_S * 1e9:
            raise DatasetError(
                f'{self.path}: the stamps of {logged.topic} go back from {seconds(latest_ns)} to {seconds(stamp)}: '
                f'a clock was set back, or a simulation started anew; split the recording there'
            )
        count.not_newer += 1
        count.disordered += stamp < latest_ns or logged.data != before
        return False

    def _require_one_size(self, camera: str, size: tuple[int, int]) -> None:
        first = self._sizes.setdefault(camera, size)
        if size != first:
            topic = absolute(self.sources[camera].topic, self._namespace)
            raise DatasetError(
                f'{self.path}: the images of {topic} change from {first[0]} x {first[1]} to {size[0]} x {size[1]} '
                f'pixels (height x width)'
            )

    def require_usable(self) -> None:
        """Check what was counted once all messages have been taken.

        Raises:
            DatasetError: a topic has no usable message, or no order.
        """
        for topic, count in self.counts.items():
            if count.received and count.refused == count.received:
                raise DatasetError(
                    f'{self.path}: none of the {count.received} messages of {topic} can be used; the last '
                    f'one: {count.last_refusal}'
                )
            if count.disordered > max(DISORDER, DISORDER_SHARE * count.received):
                raise DatasetError(
                    f'{self.path}: {count.disordered} of {count.received} messages of {topic} are stamped '
                    f'before their predecessor, or alike with other contents: two publishers share the topic, or '
                    f'the clock went back'
                )

    def newest_ns(self) -> int | None:
        """The newest stamp of all streams."""
        stamps = [source.buffer.latest_stamp_ns for source in self.sources.values()]
        return max((stamp for stamp in stamps if stamp is not None), default=None)

    def forget_before(self, time_ns: int) -> None:
        """Drop what no frame at `time_ns` or later can need."""
        for source in self.sources.values():
            source.buffer.drop_before(time_ns)
        if self.targets is not None:
            self.targets.drop_before(time_ns)


def absolute(topic: str, namespace: str = '') -> str:
    """The topic's full name, as a bag has it; a name that begins with '/' stands as it is."""
    if topic.startswith('/'):
        return topic
    return '/' + '/'.join(part for part in (namespace.strip('/'), topic) if part)


def seconds(stamp_ns: int) -> str:
    """A stamp as text, exact."""
    return f'{stamp_ns // 10**9}.{stamp_ns % 10**9:09d} s'
