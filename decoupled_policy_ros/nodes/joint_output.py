"""Motions of the joints as commands for joint_trajectory_controller, on its topic or by its action."""

from __future__ import annotations

from pathlib import PurePosixPath

from rclpy.lifecycle import LifecycleNode
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.nodes.actions import LatestGoal, control_action
from decoupled_policy_ros.nodes.common import COMMAND, duration_message, floats, time_message
from decoupled_policy_ros.nodes.other_commanders import Said
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.runtime.joint_motion import JointMotion


def joint_trajectory_message(motion: JointMotion, robot: RobotDescription) -> JointTrajectory:
    """JointTrajectory of a motion; its stamp is that of the first point, and times count from there."""
    message = JointTrajectory(joint_names=list(robot.joint_names))
    message.header.stamp = time_message(motion.stamps_ns[0])
    message.header.frame_id = robot.base_frame
    for i, stamp_ns in enumerate(motion.stamps_ns):
        point = JointTrajectoryPoint(positions=floats(motion.positions_rad[i]))
        if motion.velocities_rad_s is not None:
            point.velocities = floats(motion.velocities_rad_s[i])
        point.time_from_start = duration_message(stamp_ns - motion.stamps_ns[0])
        message.points.append(point)
    return message


def joint_trajectory_topic(robot: RobotDescription) -> str:
    """Where joint trajectories of a robot go.

    Raises:
        ConfigError: the robot's file does not say.
    """
    if 'joint_trajectory' not in robot.topics:
        raise ConfigError(
            f"robot {robot.name!r} names no topic 'joint_trajectory' in its file; add one, such as "
            f"'arm_controller/joint_trajectory', or command it by output 'pose'"
        )
    return robot.topics['joint_trajectory']


class JointOutput:
    """Sends motions of the joints, each of which replaces the one before.

    Args:
        node: publishes.
        robot: gives joint names and the controller's topic; its action is beside it.
        by_action: send goals of FollowJointTrajectory instead of messages.

    Attributes:
        said: the messages that were sent; None by action.
        goals: where they go by action; None otherwise.

    Raises:
        ConfigError: the robot names no topic, or control_msgs is not installed.
    """

    def __init__(self, node: LifecycleNode, robot: RobotDescription, by_action: bool):
        self._node, self._robot = node, robot
        topic = joint_trajectory_topic(robot)
        self.goals: LatestGoal | None = None
        self.said: Said | None = None
        if by_action:
            self._kind = control_action('FollowJointTrajectory')
            name = str(PurePosixPath(topic).with_name('follow_joint_trajectory'))
            self.goals = LatestGoal.to(node, self._kind, name, keep=False)
        else:
            self.said = Said(node.create_lifecycle_publisher(JointTrajectory, topic, COMMAND))

    def close(self) -> None:
        """Destroy the publisher or the action client."""
        if self.goals is not None:
            self.goals.close()
        if self.said is not None:
            self._node.destroy_lifecycle_publisher(self.said.publisher)

    def send(self, motion: JointMotion) -> None:
        """Send a motion."""
        if not self._node.context.ok():
            return  # on the way out after Ctrl-C nobody hears it: the arm comes to rest at the end of the last one
        message = joint_trajectory_message(motion, self._robot)
        if self.goals is not None:
            self.goals.send(self._kind.Goal(trajectory=message))
        if self.said is not None:
            self.said.publish(message)

    def forget(self) -> None:
        """Motions don't wait."""

    def missing(self) -> str:
        """What is missing to be heard, if that is known."""
        return '' if self.goals is None else self.goals.missing()

    def trouble(self) -> str:
        """What is missing, or what became of the last motion if it was not done."""
        return '' if self.goals is None else self.goals.trouble()
