"""Opening and closing the gripper: goals of GripperCommand, or opening widths on a topic."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from rclpy.lifecycle import LifecycleNode
from std_msgs.msg import Float64

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.nodes.actions import LatestGoal, control_action
from decoupled_policy_ros.nodes.common import COMMAND
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.gripper import GripperAction

#: How a gripper is told: 'auto' takes the action where the robot names one and control_msgs is installed.
WAYS = ('auto', 'action', 'topic')


class GripperOutput(Protocol):
    """Tells a gripper how wide to be, and never waits for it."""

    def send(self, width_m: float) -> None:
        """Go to an opening width."""

    def missing(self) -> str:
        """What is missing to be heard, if that is known."""

    def trouble(self) -> str:
        """What is missing, or what became of the last command if it was not done."""

    def forget(self) -> None:
        """Say no more of a command that nobody has heard yet."""

    def close(self) -> None:
        """Destroy what it publishes with."""


class GripperTopic:
    """Opening widths in metres on the robot's topic gripper_command; any thread may call it.

    Edges only are commanded, so one that nobody would hear waits until somebody listens, unless a newer one comes.
    """

    def __init__(self, node: LifecycleNode, robot: RobotDescription):
        self._node, self._topic = node, robot.topics['gripper_command']
        self._publisher = node.create_lifecycle_publisher(Float64, self._topic, COMMAND)
        self._lock = threading.Lock()
        self._waiting: float | None = None

    def send(self, width_m: float) -> None:
        """Publish a width, now or as soon as somebody listens."""
        with self._lock:
            self._waiting = width_m
        self.missing()

    def missing(self) -> str:
        """Whether nobody listens; publishes a width that has been waiting."""
        with self._lock:
            if not self._publisher.get_subscription_count():
                return f'nobody listens on {self._topic}'
            if self._waiting is not None:
                self._publisher.publish(Float64(data=self._waiting))
                self._waiting = None
            return ''

    def trouble(self) -> str:
        """Whether nobody listens: more a topic does not tell."""
        return self.missing()

    def forget(self) -> None:
        """Drop a width that is waiting."""
        with self._lock:
            self._waiting = None

    def close(self) -> None:
        """Destroy the publisher."""
        self._node.destroy_lifecycle_publisher(self._publisher)


class GripperGoals:
    """Goals of control_msgs/action/GripperCommand.

    Args:
        kind: that action type.
        goals: takes the goals to the server.
        action: what the gripper understands by a position.
    """

    def __init__(self, kind: Any, goals: LatestGoal, action: GripperAction):
        self._kind, self._goals, self._action = kind, goals, action

    def send(self, width_m: float) -> None:
        """Send a goal; it waits for the server if there is none yet."""
        goal = self._kind.Goal()
        goal.command.position = self._action.position_m(width_m)
        goal.command.max_effort = self._action.max_effort_n
        self._goals.send(goal)

    def missing(self) -> str:
        """Whether the server is there."""
        return self._goals.missing()

    def trouble(self) -> str:
        """Whether the server is there and has done what it was told."""
        return self._goals.trouble()

    def forget(self) -> None:
        """Drop a goal that is waiting for the server."""
        self._goals.forget()

    def close(self) -> None:
        """Destroy the action client."""
        self._goals.close()


def gripper_output(node: LifecycleNode, robot: RobotDescription, way: str) -> GripperOutput:
    """What tells a robot's gripper, one of `WAYS`.

    Raises:
        ConfigError: the action is asked for, and the robot names none or control_msgs is not installed.
    """
    action = robot.gripper_action
    if way == 'action' and action is None:
        raise ConfigError(f"robot {robot.name!r} names no action of its gripper: 'gripper: action: name'")
    if way == 'topic' or action is None:
        return GripperTopic(node, robot)
    try:
        kind = control_action('GripperCommand')
    except ConfigError as error:
        if way == 'action':
            raise
        topic = robot.topics['gripper_command']
        node.get_logger().warning(f'{error}; the gripper is commanded on {topic} instead')
        return GripperTopic(node, robot)
    return GripperGoals(kind, LatestGoal.to(node, kind, action.name, keep=True), action)
