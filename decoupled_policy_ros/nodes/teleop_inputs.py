"""What teleop_node hears: the arm's measured state, and the operator's device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseStamped, Twist
from numpy.typing import NDArray
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import JointState, Joy
from std_msgs.msg import Bool

from decoupled_policy_ros.errors import MessageError
from decoupled_policy_ros.nodes.common import SENSOR
from decoupled_policy_ros.observation.messages import (
    joint_positions_from_message,
    pose_from_message,
    stamp_ns,
)
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.teleop.devices import AxesDevice, LeaderDevice, StreamedDevice
from decoupled_policy_ros.teleop.mapping import Mapping
from decoupled_policy_ros.teleop.teleoperator import ArmState

# Any publisher is heard, and no press is lost while a callback runs: spacenav sends a thousand messages a second.
DEVICE = QoSProfile(
    reliability=ReliabilityPolicy.BEST_EFFORT,
    durability=DurabilityPolicy.VOLATILE,
    history=HistoryPolicy.KEEP_LAST,
    depth=200,
)


class Refusals:
    """Counts what was refused and remembers the last reason."""

    def __init__(self, node: Node):
        self._node = node
        self.count = 0
        self.last = ''

    def guard(self, topic: str, take: Callable[[Any], None]) -> Callable[[Any], None]:
        """Return a callback that says and counts what `take` refuses."""

        def callback(message: Any) -> None:
            try:
                take(message)
            except MessageError as error:
                self.count += 1
                self.last = f'{topic}: {error}'
                self._node.get_logger().warning(f'refused: {self.last}', throttle_duration_sec=2.0)

        return callback


class ArmInput:
    """The arm's newest measured state.

    The pose is `current_pose` while that is as fresh as the joint states, within half the age at which a state is too
    old; otherwise forward kinematics gives it.
    """

    def __init__(self, node: Node, robot: RobotDescription, use_current_pose: bool, timeout_s: float):
        self.refusals = Refusals(node)
        self._robot, self._kinematics = robot, Kinematics(robot)
        self._behind_ns = round(timeout_s * 1e9) // 2
        self._topics = [robot.topics['joint_states']]
        self.forget()
        self._subscribe(node, JointState, self._topics[0], self._on_joints)
        if use_current_pose:
            self._topics.append(robot.topics['current_pose'])
            self._subscribe(node, PoseStamped, self._topics[1], self._on_pose)

    def _subscribe(self, node: Node, kind: type, topic: str, take: Callable[[Any], None]) -> None:
        node.create_subscription(kind, topic, self.refusals.guard(topic, take), SENSOR)

    def forget(self) -> None:
        """Forget what was measured, as after a jump of the clock."""
        self._joints: tuple[int, NDArray[np.float64]] | None = None
        self._pose: tuple[int, NDArray[np.float64]] | None = None
        self._gripper: float | None = None

    def missing(self) -> str:
        """What to say while there is no state."""
        return f'nothing on {" or ".join(self._topics)}'

    def state(self) -> ArmState | None:
        """The newest state, or None before the first one."""
        joints, pose = self._joints, self._pose
        if pose is not None and (joints is None or joints[0] - pose[0] <= self._behind_ns):
            return ArmState(*pose, self._gripper)
        if joints is None:
            return None
        return ArmState(joints[0], self._kinematics.forward(joints[1]), self._gripper)

    def _on_joints(self, message: JointState) -> None:
        robot = self._robot
        stamp = stamp_ns(message.header.stamp)
        self._joints = stamp, joint_positions_from_message(message, robot.joint_names)
        # An arm's own joint states need not hold the gripper's.
        if set(robot.gripper.joint_names) <= set(message.name):
            fingers = joint_positions_from_message(message, robot.gripper.joint_names)
            self._gripper = float(robot.gripper.normalised(fingers))

    def _on_pose(self, message: PoseStamped) -> None:
        self._pose = (
            stamp_ns(message.header.stamp),
            pose_from_message(message, *self._robot.base_frames),
        )


class DeviceInput:
    """Subscriptions of a device that speaks through topics."""

    def __init__(self, node: Node, device: StreamedDevice, now_ns: Callable[[], int]):
        self.refusals = Refusals(node)
        self._node, self._now_ns = node, now_ns
        mapping = device.mapping
        if isinstance(device, LeaderDevice):
            self._subscribe(PoseStamped, mapping.topic, self._leader(device))
        elif isinstance(device, AxesDevice) and mapping.device == 'twist':
            self._subscribe(Twist, mapping.topic, self._twist(device))
        elif isinstance(device, AxesDevice):
            self._subscribe(Joy, mapping.topic, self._joy(device))
        if mapping.buttons_topic and mapping.device != 'joy':
            self._subscribe(Joy, mapping.buttons_topic, self._buttons(device))
        if mapping.deadman is not None and mapping.deadman.kind == 'topic':
            self._subscribe(Bool, '~/deadman', lambda m: device.on_deadman(m.data, now_ns()))

    def _subscribe(self, kind: type, topic: str, take: Callable[[Any], None]) -> None:
        self._node.create_subscription(kind, topic, self.refusals.guard(topic, take), DEVICE)

    def _joy(self, device: AxesDevice) -> Callable[[Joy], None]:
        return lambda message: device.on_joy(message.axes, message.buttons, self._now_ns())

    def _buttons(self, device: StreamedDevice) -> Callable[[Joy], None]:
        return lambda message: device.on_buttons(message.axes, message.buttons, self._now_ns())

    def _twist(self, device: AxesDevice) -> Callable[[Twist], None]:
        def take(message: Twist) -> None:
            linear, angular = message.linear, message.angular
            values = (linear.x, linear.y, linear.z, angular.x, angular.y, angular.z)
            device.on_twist(values, self._now_ns())

        return take

    def _leader(self, device: LeaderDevice) -> Callable[[PoseStamped], None]:
        return lambda message: device.on_pose(
            pose_from_message(message), stamp_ns(message.header.stamp), self._now_ns()
        )


def streamed_device(mapping: Mapping, timeout_s: float) -> StreamedDevice:
    """Device of a mapping whose device speaks through topics."""
    kind = LeaderDevice if mapping.device == 'leader_pose' else AxesDevice
    return kind(mapping, timeout_s)
