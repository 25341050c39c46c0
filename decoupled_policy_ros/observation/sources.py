"""Where each stream of an observation comes from: topic, message type, conversion, buffer; no ROS import.

The policy node subscribes to these sources and the converter reads them out of a bag: what a message becomes is
decided here, once, so that live and offline give the same arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

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
from decoupled_policy_ros.robot.description import CameraDescription, RobotDescription
from decoupled_policy_ros.robot.kinematics import Kinematics

#: Enough for the history of a 1 kHz joint state; pictures are kept at the size that the policy sees.
JOINT_CAPACITY, IMAGE_CAPACITY = 2000, 64

IMAGE_TYPE = 'sensor_msgs/msg/Image'
COMPRESSED_IMAGE_TYPE = 'sensor_msgs/msg/CompressedImage'
JOINT_STATE_TYPE = 'sensor_msgs/msg/JointState'


class JointBuffer(StreamBuffer):
    """Joint positions as they came; turned into proprioception only where a frame is taken.

    A real arm reports its joints up to a thousand times a second and a policy looks five times a second.
    """

    def __init__(self, capacity: int, proprioception: Proprioception):
        super().__init__(capacity)
        self._proprioception = proprioception

    @property
    def near_quat_xyzw(self) -> tuple[float, ...]:
        """Of the two quaternions of a rotation proprioception has the one that is nearer to this."""
        return tuple(self._proprioception.near_quat_xyzw.tolist())

    def at_or_before(self, stamp_ns: int) -> tuple[int, NDArray] | None:
        """The latest sample with a stamp <= `stamp_ns`, as (its stamp, proprioception), or None."""
        found = super().at_or_before(stamp_ns)
        return None if found is None else (found[0], self._proprioception(found[1]))

    def joint_positions_at_or_before(self, stamp_ns: int) -> tuple[int, NDArray] | None:
        """That sample as it came: (its stamp, joint vector (n,)), or None."""
        return super().at_or_before(stamp_ns)


@dataclass(frozen=True, eq=False)
class StreamSource:
    """One stream of a contract, from message to buffer.

    Attributes:
        spec: what the contract says of it.
        topic: relative topic name, of the robot's description.
        message_type: for example sensor_msgs/msg/Image.
        convert: message -> array; raises MessageError.
        buffer: where the arrays go.
    """

    spec: StreamSpec
    topic: str
    message_type: str
    convert: Callable[[Any], NDArray]
    buffer: StreamBuffer

    def reads_as(self, other: StreamSource) -> bool:
        """Whether what is in this one's buffer means the same to another's contract, of the same robot."""
        near = [getattr(source.buffer, 'near_quat_xyzw', None) for source in (self, other)]
        return self.spec == other.spec and near[0] == near[1]

    def take(self, message: Any) -> bool:
        """Convert a message (rclpy's or rosbags') and push it; False if its stamp is not newer than the last.

        Raises:
            MessageError: a zero stamp, or the message is not what its fields claim.
        """
        return self.buffer.push(stamp_ns(message.header.stamp), self.convert(message))


def stream_sources(
    robot: RobotDescription,
    contract: ObservationContract,
    *,
    joint_capacity: int = JOINT_CAPACITY,
    image_capacity: int = IMAGE_CAPACITY,
    see_size: Callable[[str, tuple[int, int]], None] = lambda camera, size: None,
) -> dict[str, StreamSource]:
    """The source of each stream of a contract, by name; every call makes buffers of its own.

    `see_size` is told the camera and the (height, width) of each of its pictures as it came.

    Raises:
        ConfigError: the contract has a stream that this robot has no topic for, or of another size.
    """
    proprioception = Proprioception(robot, Kinematics(robot), contract.near_quat_xyzw)
    sources = {}
    for spec in contract.streams:
        if spec.kind == 'image':
            sources[spec.name] = _camera_source(robot, spec, image_capacity, see_size)
        elif spec.kind == 'proprioception':
            sources[spec.name] = _joint_source(robot, spec, proprioception, joint_capacity)
        else:
            raise ConfigError(
                f'the task needs the {spec.kind} stream {spec.name!r}, which no topic carries: such a task runs '
                f'in `decoupled-policy evaluate` only'
            )
    return sources


def _camera_source(
    robot: RobotDescription, spec: StreamSpec, capacity: int, see_size: Callable[[str, tuple[int, int]], None]
) -> StreamSource:
    if spec.name not in robot.cameras:
        raise ConfigError(
            f'the task needs camera {spec.name!r}, robot {robot.name!r} has '
            f'{", ".join(sorted(robot.cameras)) or "none"}'
        )
    camera = robot.cameras[spec.name]
    kind = COMPRESSED_IMAGE_TYPE if camera.compressed else IMAGE_TYPE
    convert = _image_conversion(spec, camera, see_size)
    return StreamSource(spec, camera.topic, kind, convert, StreamBuffer(capacity))


def _image_conversion(
    spec: StreamSpec, camera: CameraDescription, see_size: Callable[[str, tuple[int, int]], None]
) -> Callable[[Any], NDArray]:
    decode = compressed_image_to_array if camera.compressed else image_to_array
    size, declared = (spec.shape[0], spec.shape[1]), camera.size

    def convert(message: Any) -> NDArray:
        pixels = decode(message)
        if declared is not None and pixels.shape[:2] != declared:
            raise MessageError(
                f'image of camera {spec.name!r} has {pixels.shape[0]} x {pixels.shape[1]} pixels (height x width), '
                f'its description says {declared[0]} x {declared[1]}'
            )
        see_size(spec.name, (pixels.shape[0], pixels.shape[1]))
        return fit_image(pixels, size)

    return convert


def _joint_source(
    robot: RobotDescription, spec: StreamSpec, proprioception: Proprioception, capacity: int
) -> StreamSource:
    if spec.shape != (proprioception.dim,):
        raise ConfigError(
            f'the task needs proprioception of shape {spec.shape}, robot {robot.name!r} has '
            f'({proprioception.dim},)'
        )

    def convert(message: Any) -> NDArray:
        return joint_positions_from_message(message, robot.all_joint_names)

    buffer = JointBuffer(capacity, proprioception)
    return StreamSource(spec, robot.topics['joint_states'], JOINT_STATE_TYPE, convert, buffer)
