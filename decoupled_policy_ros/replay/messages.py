"""What the policy publishes, as messages without ROS: the numbers are computed as the node computes them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rosbags.typesys import Stores, get_typestore

from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.poses import position_quat_from_pose
from decoupled_policy_ros.runtime.chunks import NS_PER_S, Chunk
from decoupled_policy_ros.runtime.joint_motion import JointMotion

Quaternion = tuple[float, float, float, float]

STORE = get_typestore(Stores.ROS2_JAZZY)
POSE, TRAJECTORY = 'geometry_msgs/msg/PoseStamped', 'trajectory_msgs/msg/MultiDOFJointTrajectory'
JOINT_TRAJECTORY, WIDTH = 'trajectory_msgs/msg/JointTrajectory', 'std_msgs/msg/Float64'


def _make(name: str, *values: Any) -> Any:
    return STORE.types[name](*values)


def _time(stamp_ns: int) -> Any:
    return _make('builtin_interfaces/msg/Time', stamp_ns // NS_PER_S, stamp_ns % NS_PER_S)


def _duration(duration_ns: int) -> Any:
    return _make('builtin_interfaces/msg/Duration', duration_ns // NS_PER_S, duration_ns % NS_PER_S)


def _header(stamp_ns: int, frame_id: str) -> Any:
    return _make('std_msgs/msg/Header', _time(stamp_ns), frame_id)


def pose_message(
    pose: NDArray[np.float64], frame_id: str, stamp_ns: int, near_quat_xyzw: Quaternion | None
) -> tuple[Any, Quaternion]:
    """PoseStamped of a pose (4, 4), and its quaternion: of q and -q the one nearer to `near_quat_xyzw`."""
    position_m, quat_xyzw = position_quat_from_pose(pose, near_quat_xyzw)
    quaternion = quat_xyzw.tolist()
    message = _make(
        POSE,
        _header(stamp_ns, frame_id),
        _make(
            'geometry_msgs/msg/Pose',
            _make('geometry_msgs/msg/Point', *position_m.tolist()),
            _make('geometry_msgs/msg/Quaternion', *quaternion),
        ),
    )
    return message, tuple(quaternion)


def trajectory_message(chunk: Chunk, robot: RobotDescription) -> Any:
    """MultiDOFJointTrajectory of a chunk, from its observation's stamp on."""
    points = []
    for i in chunk.ahead():
        position_m, quat_xyzw = position_quat_from_pose(chunk.poses_base_ee[i])
        transform = _make(
            'geometry_msgs/msg/Transform',
            _make('geometry_msgs/msg/Vector3', *position_m.tolist()),
            _make('geometry_msgs/msg/Quaternion', *quat_xyzw.tolist()),
        )
        since = _duration(chunk.stamps_ns[i] - chunk.observation_stamp_ns)
        points.append(_make('trajectory_msgs/msg/MultiDOFJointTrajectoryPoint', [transform], [], [], since))
    header = _header(chunk.observation_stamp_ns, robot.base_frame)
    return _make(TRAJECTORY, header, [robot.ee_frame], points)


def joint_trajectory_message(motion: JointMotion, robot: RobotDescription) -> Any:
    """JointTrajectory of a motion; times count from its first point."""
    none = np.zeros(0)
    points = []
    for i, stamp_ns in enumerate(motion.stamps_ns):
        velocities = none if motion.velocities_rad_s is None else motion.velocities_rad_s[i]
        since = _duration(stamp_ns - motion.stamps_ns[0])
        points.append(
            _make(
                'trajectory_msgs/msg/JointTrajectoryPoint',
                motion.positions_rad[i],
                velocities,
                none,
                none,
                since,
            )
        )
    header = _header(motion.stamps_ns[0], robot.base_frame)
    return _make(JOINT_TRAJECTORY, header, list(robot.joint_names), points)


def width_message(width_m: float) -> Any:
    """Float64 of an opening width."""
    return _make(WIDTH, width_m)


def message_stamp_ns(message: Any) -> int:
    """Stamp of a message with a header."""
    return int(message.header.stamp.sec * NS_PER_S + message.header.stamp.nanosec)


def numbers(message: Any, name: str = '') -> Iterator[tuple[str, Any]]:
    """Every field of a message with its name, such as pose.position.x, and value."""
    if is_dataclass(message):
        for field in fields(message):
            if field.name != '__msgtype__':
                yield from numbers(
                    getattr(message, field.name), f'{name}.{field.name}' if name else field.name
                )
    elif isinstance(message, (Sequence, np.ndarray)) and not isinstance(message, str):
        yield f'{name} (length)', len(message)
        for i, value in enumerate(message):
            yield from numbers(value, f'{name}[{i}]')
    else:
        yield name, message


def first_difference(recorded: Any, replayed: Any) -> tuple[str, Any, Any] | None:
    """Name and both values of the first field that is not the same, bit for bit."""
    for (name, value), (_, other) in zip(numbers(recorded), numbers(replayed), strict=False):
        if isinstance(value, float) and isinstance(other, float):
            if struct.pack('<d', value) != struct.pack('<d', other):
                return name, float(value), float(other)
        elif value != other:
            return name, value, other
    return None
