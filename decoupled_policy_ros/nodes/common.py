"""What every node of this package shares: QoS, described parameters, message conversions, `spin_main`."""

from __future__ import annotations

import array
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import rclpy
from builtin_interfaces.msg import Duration, Time
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from geometry_msgs.msg import Pose, PoseStamped, Transform
from numpy.typing import ArrayLike, NDArray
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import NameValidationException, ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.logging import get_logger
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.wait_for_message import wait_for_message
from sensor_msgs.msg import Image
from std_msgs.msg import String

from decoupled_policy_ros.errors import ConfigError, DecoupledPolicyError
from decoupled_policy_ros.nodes.signals import shut_down_by_signals
from decoupled_policy_ros.robot.description import RobotDescription, description_topic, load_robot
from decoupled_policy_ros.robot.poses import pose_from_position_quat, position_quat_from_pose

Settings = TypeVar('Settings')

RCLError = rclpy_implementation.RCLError
InvalidHandle = rclpy_implementation.InvalidHandle
UnknownROSArgsError = rclpy_implementation.UnknownROSArgsError

NS_PER_S = 1_000_000_000

# Cameras and robot state: the newest matters, a lost one does not. Deep enough that two 30 Hz cameras
# survive a callback that takes 100 ms.
SENSOR = QoSProfile(
    reliability=ReliabilityPolicy.BEST_EFFORT,
    durability=DurabilityPolicy.VOLATILE,
    history=HistoryPolicy.KEEP_LAST,
    depth=5,
)
# Our own simulated arm's state: reliable, so that a lossless subscriber is served as well as a SENSOR one.
STATE = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
    history=HistoryPolicy.KEEP_LAST,
    depth=10,
)
# Commands: reliable, for a best-effort publisher matches no arm controller, and never a queue of old ones.
COMMAND = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
)
# Anybody's commands: one that subscribes by best effort hears reliable publishers and others, and the newest counts.
ANYBODYS = QoSProfile(
    reliability=ReliabilityPolicy.BEST_EFFORT,
    durability=DurabilityPolicy.VOLATILE,
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
)
# Status: a late joiner gets the last one.
LATCHED = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
)


def declare(
    node: Node,
    name: str,
    default: Any,
    description: str,
    *,
    floating: tuple[float, float] | None = None,
    integer: tuple[int, int] | None = None,
    choices: Sequence[str] = (),
    read_only: bool = True,
) -> Any:
    """Declare a parameter with its descriptor and return its value.

    Args:
        node: the node that gets it.
        name: the parameter's name.
        default: the value when nothing is set; its type is the parameter's type.
        description: one sentence, with the unit.
        floating: lowest and highest value of a float.
        integer: lowest and highest value of an int.
        choices: the valid values of a string; written into the descriptor's constraints.
        read_only: False for a parameter that may change while the node runs.

    Raises:
        ConfigError: the value is none of `choices`.
    """
    descriptor = ParameterDescriptor(description=description, read_only=read_only)
    if floating is not None:
        descriptor.floating_point_range = [FloatingPointRange(from_value=floating[0], to_value=floating[1])]
    if integer is not None:
        descriptor.integer_range = [IntegerRange(from_value=integer[0], to_value=integer[1])]
    if choices:
        descriptor.additional_constraints = 'one of ' + ', '.join(repr(choice) for choice in choices)
    value = node.declare_parameter(name, default, descriptor).value
    if choices and value not in choices:
        raise ConfigError(f'parameter {name}: {value!r} is not {descriptor.additional_constraints}')
    return value


def parameter(default: Any, description: str, **constraints: Any) -> Any:
    """Field of a settings dataclass that is a parameter of a node; constraints as in `declare`."""
    return dataclasses.field(default=default, metadata={'description': description, **constraints})


def declare_settings(node: Node, settings: type[Settings]) -> Settings:
    """Declare each field of a dataclass made of `parameter` fields and return it with the node's values."""
    fields = dataclasses.fields(settings)  # type: ignore[arg-type]
    return settings(
        **{field.name: declare(node, field.name, field.default, **field.metadata) for field in fields}
    )


def read_settings(node: Node, settings: type[Settings]) -> Settings:
    """Read the present values of parameters that `declare_settings` declared.

    Raises:
        ConfigError: a value is none of the parameter's choices.
    """
    fields = dataclasses.fields(settings)  # type: ignore[arg-type]
    values = {field.name: node.get_parameter(field.name).value for field in fields}
    require_choices(settings, values)
    return settings(**values)


def require_choices(settings: type[Settings], values: Mapping[str, Any]) -> None:
    """Refuse values of some parameters of `settings` that are none of their choices.

    Raises:
        ConfigError: there is one; the message names it and what is valid.
    """
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        choices = field.metadata.get('choices')
        if choices and field.name in values and values[field.name] not in choices:
            raise ConfigError(
                f'parameter {field.name}: {values[field.name]!r} is not one of {", ".join(choices)}'
            )


def read_robot(node: Node, name: str, timeout_s: float) -> RobotDescription:
    """Load a robot, with the URDF from its description topic where the robot names one and it is latched there.

    Args:
        node: subscribes to the topic for as long as this takes.
        name: robot in config/robots or path of a YAML file.
        timeout_s: how long to wait for the topic (wall).

    Raises:
        RobotDescriptionError: see `load_robot`; also when the topic is silent and the robot has no file.
        ExternalShutdownException: the node was to end before the topic spoke.
    """
    topic = description_topic(name)
    if topic is None:
        return load_robot(name)
    arrived, message = wait_for_message(String, node, topic, qos_profile=LATCHED, time_to_wait=timeout_s)
    if arrived:
        return load_robot(name, description_xml=message.data)
    if not node.context.ok():  # its wait is over with Ctrl-C, too
        raise ExternalShutdownException
    node.get_logger().info(f'no URDF on {topic} within {timeout_s} s: taking the file of robot {name!r}')
    return load_robot(name)


def resolve_topic(node: Node, name: str) -> str:
    """Full name of a topic, remapped.

    Raises:
        ConfigError: it is no name of a topic.
    """
    try:
        return str(node.resolve_topic_name(name))
    except RCLError as error:
        if not node.context.ok():
            raise
        raise ConfigError(f'topic {name!r}: {_reason(error)}') from error


def time_message(stamp_ns: int) -> Time:
    """builtin_interfaces/Time of a stamp in nanoseconds."""
    return Time(sec=stamp_ns // NS_PER_S, nanosec=stamp_ns % NS_PER_S)


def duration_message(duration_ns: int) -> Duration:
    """builtin_interfaces/Duration of nanoseconds."""
    return Duration(sec=duration_ns // NS_PER_S, nanosec=duration_ns % NS_PER_S)


def time_ns(stamp: Time) -> int:
    """Nanoseconds of a builtin_interfaces/Time; 0 for a zero stamp, which is no stamp."""
    return int(stamp.sec) * NS_PER_S + int(stamp.nanosec)


def pose_message(pose: NDArray[np.float64], near_quat_xyzw: ArrayLike | None = None) -> Pose:
    """geometry_msgs/Pose of a homogeneous matrix (4, 4); of q and -q the one nearer to `near_quat_xyzw`."""
    position_m, quat_xyzw = position_quat_from_pose(pose, near_quat_xyzw)
    message = Pose()
    message.position.x, message.position.y, message.position.z = position_m.tolist()
    orientation = message.orientation
    orientation.x, orientation.y, orientation.z, orientation.w = quat_xyzw.tolist()
    return message


def pose_stamped(
    pose: NDArray[np.float64], frame_id: str, stamp_ns: int, near_quat_xyzw: ArrayLike | None = None
) -> PoseStamped:
    """geometry_msgs/PoseStamped of a homogeneous matrix (4, 4); quaternion as in `pose_message`."""
    message = PoseStamped(pose=pose_message(pose, near_quat_xyzw))
    message.header.frame_id = frame_id
    message.header.stamp = time_message(stamp_ns)
    return message


def transform_message(pose: NDArray[np.float64]) -> Transform:
    """geometry_msgs/Transform of a homogeneous matrix (4, 4)."""
    position_m, quat_xyzw = position_quat_from_pose(pose)
    message = Transform()
    message.translation.x, message.translation.y, message.translation.z = position_m.tolist()
    rotation = message.rotation
    rotation.x, rotation.y, rotation.z, rotation.w = quat_xyzw.tolist()
    return message


def pose_from_position_orientation(position: Any, orientation: Any) -> NDArray[np.float64]:
    """Homogeneous matrix (4, 4) of a geometry_msgs/Point (or Vector3) and Quaternion.

    Raises:
        ValueError: the position isn't finite, or the quaternion is zero or not finite.
    """
    position_m = (position.x, position.y, position.z)
    if not np.all(np.isfinite(position_m)):
        raise ValueError(f'a position must be finite, got {position_m}')
    return pose_from_position_quat(position_m, (orientation.x, orientation.y, orientation.z, orientation.w))


def diagnostics_name(node: Node, part: str) -> str:
    """Name of a status of a node's; the namespace tells two nodes of one name apart."""
    return f'{node.get_fully_qualified_name().lstrip("/")}: {part}'


def diagnostic_status(
    name: str, level: bytes, text: str, values: Mapping[str, str] | None = None, hardware_id: str = ''
) -> DiagnosticStatus:
    """diagnostic_msgs/DiagnosticStatus with its values as text."""
    pairs = [KeyValue(key=key, value=value) for key, value in (values or {}).items()]
    return DiagnosticStatus(level=level, name=name, message=text, hardware_id=hardware_id, values=pairs)


def image_message(rgb: NDArray[np.uint8], frame_id: str, stamp_ns: int) -> Image:
    """sensor_msgs/Image, rgb8, of an array (height, width, 3)."""
    height, width, _ = rgb.shape
    message = Image(height=height, width=width, encoding='rgb8', is_bigendian=0, step=3 * width)
    message.header.frame_id = frame_id
    message.header.stamp = time_message(stamp_ns)
    message.data = array.array('B', np.ascontiguousarray(rgb).tobytes())  # bytes would be checked one by one
    return message


def floats(values: ArrayLike) -> array.array[float]:
    """Values as the array type that messages take without checking each element."""
    return array.array('d', np.asarray(values, float).ravel().tolist())


#: Where pip's name of a package is not that of its module.
_PIP_NAMES = {'cv2': 'opencv-python', 'pinocchio': 'pin', 'yaml': 'pyyaml'}


def missing_module(error: ModuleNotFoundError) -> str:
    """One line on a Python module that is not installed: rosdep has no keys for some that the nodes need."""
    module = (error.name or str(error)).partition('.')[0]
    return f'Python module {module!r} is not installed: pip install {_PIP_NAMES.get(module, module)}'


def user_error(error: Exception) -> str:
    """One line on an error that a user can cause, such as a name that is none; '' for one of the program's."""
    if isinstance(error, ModuleNotFoundError):
        return missing_module(error)
    if isinstance(error, NameValidationException):
        return ' '.join(
            line.strip() for line in str(error).splitlines()[:2]
        )  # the rest points at a character
    if isinstance(error, ValueError) and 'unknown substitution' in str(error):
        return _reason(error)  # of a {name} in a topic's; rclpy has no error of its own for it
    return str(error) if isinstance(error, DecoupledPolicyError | ParameterException) else ''


def _reason(error: Exception) -> str:
    """What rcl says, without the lines of its source."""
    return ' '.join(re.sub(r'^failed to [a-z ]+: |, at \S+:\d+', '', str(error)).split())


def spin_main(factory: Callable[[], Node], args: list[str] | None = None) -> int:
    """Create a node, spin it until Ctrl-C, SIGTERM or shutdown, destroy it; return the exit status.

    A node with a method `run(executor)` drives the executor itself. One with a method `wind_down()` is told of Ctrl-C
    and SIGTERM before its context is shut down, on another thread, and has as long as that takes. Arguments that are
    none, and a `user_error`, end the process with one line and status 1.
    """
    logger = get_logger('decoupled_policy_ros')
    try:
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    except (RCLError, UnknownROSArgsError) as error:
        what = 'unknown ' if isinstance(error, UnknownROSArgsError) else ''
        logger.fatal(f'--ros-args: {what}{_reason(error)}')
        return 1
    executor = SingleThreadedExecutor()
    node: Node | None = None
    with shut_down_by_signals(lambda: getattr(node, 'wind_down', lambda: None)()):
        try:
            node = factory()
            executor.add_node(node)
            run = getattr(node, 'run', None)
            if run is not None:
                run(executor)
            else:
                executor.spin()
        except Exception as error:
            if line := user_error(error):
                (node.get_logger() if node is not None else logger).fatal(line)
                return 1
            # The context may be shut down while the node is being made, or the executor waits or takes a message.
            if rclpy.ok():
                raise
        finally:
            if node is not None:
                executor.remove_node(node)
                node.destroy_node()
            rclpy.try_shutdown()
    return 0
