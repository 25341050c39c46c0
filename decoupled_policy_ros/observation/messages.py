"""Messages to arrays, by field name: rclpy messages and rosbags objects go through the same lines.

Sensor data is taken over without a copy where the layout allows it. Anything that is not what its fields
claim is a MessageError.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.errors import MessageError
from decoupled_policy_ros.observation.decoders import ENCODINGS, decode_compressed, decoder_named
from decoupled_policy_ros.robot import poses


def stamp_ns(stamp: Any) -> int:
    """Nanoseconds of a builtin_interfaces/Time.

    Raises:
        MessageError: the stamp is zero, which in ROS means that nobody set it.
    """
    value = stamp.sec * 1_000_000_000 + stamp.nanosec
    if value <= 0:
        raise MessageError(f'header stamp is {stamp.sec} s {stamp.nanosec} ns: a zero stamp is no stamp')
    return value


def image_to_array(msg: Any, decoder: str = 'auto') -> NDArray:
    """Pixels of a sensor_msgs/Image in native byte order.

    Args:
        msg: the message.
        decoder: 'opencv', 'cv_bridge', or 'auto': cv_bridge where ROS 2's is installed, OpenCV otherwise.

    Returns:
        (H, W, 3) uint8 in RGB order for colour and Bayer encodings, (H, W) uint8 for mono8, (H, W) uint16 for
        16UC1, (H, W) float32 for 32FC1.

    Raises:
        MessageError: the encoding is unknown (the message lists those known), or `step`, the size or the
            length of the data contradict each other.
    """
    encoding = ENCODINGS.get(msg.encoding)
    if encoding is None:
        raise MessageError(f'unknown image encoding {msg.encoding!r}; known: {", ".join(ENCODINGS)}')
    row_bytes = msg.width * encoding.pixel_bytes
    if msg.height < 1 or msg.width < 1 or msg.step < row_bytes:
        raise MessageError(
            f'image of {msg.height} rows of {msg.width} pixels {msg.encoding} needs step >= {row_bytes}, got {msg.step}'
        )
    data = _bytes(msg.data)
    if len(data) != msg.step * msg.height:
        raise MessageError(
            f'image data has {len(data)} bytes, {msg.height} rows of step {msg.step} have {msg.step * msg.height}'
        )
    return decoder_named(decoder)(msg, data, encoding)


def compressed_image_to_array(msg: Any) -> NDArray:
    """Pixels of a sensor_msgs/CompressedImage (JPEG, PNG, or 16-bit depth PNG); same arrays as `image_to_array`.

    Raises:
        MessageError: the data can't be decoded; the message holds its format.
    """
    return decode_compressed(_bytes(msg.data), msg.format)


def joint_positions_from_message(msg: Any, names: Sequence[str]) -> NDArray[np.float64]:
    """Positions (n,) of a sensor_msgs/JointState in the order of `names`, whatever order the message has.

    Raises:
        MessageError: a joint is missing or comes twice, there are fewer positions than names, or a position is
            NaN or infinite.
    """
    if len(msg.position) != len(msg.name):
        raise MessageError(f'joint state has {len(msg.name)} names but {len(msg.position)} positions')
    order = _permutation(tuple(msg.name), tuple(names))
    positions = np.asarray(msg.position, float)[order]
    if not np.isfinite(positions).all():
        bad = {
            name: float(value) for name, value in zip(names, positions, strict=True) if not np.isfinite(value)
        }
        raise MessageError(f'joint state has positions that are not finite: {bad}')
    return positions


@lru_cache(maxsize=64)
def _permutation(message_names: tuple[str, ...], names: tuple[str, ...]) -> NDArray[np.intp]:
    index = {name: i for i, name in enumerate(message_names)}
    missing = [name for name in names if name not in index]
    if missing:
        raise MessageError(
            f'joint state lacks {", ".join(missing)}; it has {", ".join(message_names) or "no joints"}'
        )
    twice = sorted({name for name in names if message_names.count(name) > 1})
    if twice:
        raise MessageError(f'joint state names {", ".join(twice)} more than once')
    return np.array([index[name] for name in names], dtype=np.intp)


def pose_from_message(msg: Any, *frames: str) -> NDArray[np.float64]:
    """Pose (4, 4) of a geometry_msgs/PoseStamped, in the frame of its header.

    Args:
        msg: the message.
        frames: if given, the frame ids of which the header must have one; `RobotDescription.base_frames` for poses
            in the base frame.

    Raises:
        MessageError: another frame, a value that is not finite, or a quaternion that is not of unit length.
    """
    if frames and msg.header.frame_id not in frames:
        raise MessageError(
            f'pose is in frame {msg.header.frame_id!r}, expected {" or ".join(map(repr, frames))}'
        )
    p, q = msg.pose.position, msg.pose.orientation
    position_m, quat_xyzw = np.array([p.x, p.y, p.z]), np.array([q.x, q.y, q.z, q.w])
    if not np.isfinite(position_m).all() or not abs(np.linalg.norm(quat_xyzw) - 1.0) < 1e-2:
        raise MessageError(
            f'pose has position {position_m.tolist()} and quaternion {quat_xyzw.tolist()}: '
            f'it must be finite with a unit quaternion'
        )
    return poses.pose_from_position_quat(position_m, quat_xyzw)


def _bytes(data: Any) -> NDArray[np.uint8]:
    try:
        return np.frombuffer(data, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise MessageError(
            f'message data of type {type(data).__name__} is not a block of bytes: {error}'
        ) from error
