"""Shadow mode: a policy runs while somebody else moves the arm, and says how far apart the two are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseStamped
from numpy.typing import NDArray
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64, Float64MultiArray, MultiArrayDimension, MultiArrayLayout

from decoupled_policy_ros.errors import MessageError
from decoupled_policy_ros.nodes.commands import CommandPublisher
from decoupled_policy_ros.nodes.common import COMMAND, NS_PER_S, floats
from decoupled_policy_ros.nodes.joint_states import refuse_the_future
from decoupled_policy_ros.observation.messages import joint_positions_from_message, stamp_ns
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.runtime.divergence import Compared, Divergence

#: Columns of `~/divergence`.
COLUMNS = ('stamp_s', 'position_m', 'rotation_rad', 'gripper_agrees')

#: How far ahead of the clock a joint state may be stamped (s): it would bar those that come after it.
MAX_AHEAD_S = 0.2


class ShadowOutput:
    """What the arm would have been told, on topics that no controller listens to, and the divergence.

    `~/shadow/target_pose` and `~/shadow/gripper_command` are as `target_pose` and `gripper_command`. `~/divergence` has
    a row for each waypoint of a chunk, with `COLUMNS`, once the arm has passed the last of them.

    Args:
        node: publishes while it is active.
        robot: gives names, and the topic of the joint states.
        qos: of the joint states.
    """

    def __init__(self, node: LifecycleNode, robot: RobotDescription, qos: QoSProfile):
        self._node, self._robot = node, robot
        self.divergence = Divergence(robot)
        self._pose = node.create_lifecycle_publisher(PoseStamped, '~/shadow/target_pose', COMMAND)
        self._gripper = node.create_lifecycle_publisher(Float64, '~/shadow/gripper_command', COMMAND)
        self._rows = node.create_lifecycle_publisher(Float64MultiArray, '~/divergence', COMMAND)
        self.commands = CommandPublisher(robot, self._pose, self._gripper)
        self._joint_states = node.create_subscription(
            JointState, robot.topics['joint_states'], self._take, qos
        )

    def close(self) -> None:
        """Unsubscribe, and destroy the publishers."""
        self._node.destroy_subscription(self._joint_states)
        for publisher in (self._pose, self._gripper, self._rows):
            self._node.destroy_lifecycle_publisher(publisher)

    def _take(self, message: JointState) -> None:
        try:
            refuse_the_future(self._node, message, MAX_AHEAD_S)
            stamp, (arm, gripper) = stamp_ns(message.header.stamp), self._positions(message)
        except MessageError:
            return  # the policy's own stream says what is wrong with it
        for compared in self.divergence.measured(stamp, arm, gripper):
            self._rows.publish(divergence_message(compared))

    def _positions(self, message: JointState) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Joints of the arm, and those of the gripper if the message has them."""
        arm = joint_positions_from_message(message, self._robot.joint_names)
        fingers = self._robot.gripper.joint_names
        known = set(fingers) <= set(message.name)
        return arm, joint_positions_from_message(message, fingers) if known else None


def divergence_message(compared: Compared) -> Float64MultiArray:
    """A chunk's rows, one for each waypoint from the observation's stamp on; NaN where nobody knows."""
    stamps_s = np.asarray(compared.stamps_ns) / NS_PER_S
    rows = np.column_stack([stamps_s, compared.position_m, compared.rotation_rad, compared.gripper_agrees])
    sizes: dict[str, Any] = {'waypoints': len(rows), ', '.join(COLUMNS): len(COLUMNS)}
    strides = [math.prod(list(sizes.values())[i:]) for i in range(len(sizes))]
    dimensions = [
        MultiArrayDimension(label=label, size=size, stride=stride)
        for (label, size), stride in zip(sizes.items(), strides, strict=True)
    ]
    return Float64MultiArray(layout=MultiArrayLayout(dim=dimensions), data=floats(rows))
