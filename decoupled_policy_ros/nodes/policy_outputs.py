"""What the policy says: commands to the arm, the whole chunk, and its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from nav_msgs.msg import Path
from numpy.typing import NDArray
from rclpy.lifecycle import LifecycleNode
from rclpy.publisher import Publisher
from trajectory_msgs.msg import MultiDOFJointTrajectory, MultiDOFJointTrajectoryPoint

from decoupled_policy_ros.nodes.commands import CommandPublisher
from decoupled_policy_ros.nodes.common import (
    COMMAND,
    SENSOR,
    STATE,
    RCLError,
    diagnostic_status,
    diagnostics_name,
    duration_message,
    pose_stamped,
    time_message,
    transform_message,
)
from decoupled_policy_ros.nodes.gripper_output import GripperOutput, gripper_output
from decoupled_policy_ros.nodes.joint_output import JointOutput
from decoupled_policy_ros.nodes.other_commanders import Said
from decoupled_policy_ros.nodes.policy_markers import PolicyMarkers
from decoupled_policy_ros.nodes.policy_settings import PolicySettings
from decoupled_policy_ros.nodes.shadow_output import ShadowOutput
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.poses import GRIPPER_CLOSED, GRIPPER_OPEN
from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.guard.guard import Guard
from decoupled_policy_ros.runtime.states import DISABLED, FAILED, FOLLOWING, IN_JOINTS, IN_POSES, NEEDS_HELP

LEVELS = {
    FOLLOWING: DiagnosticStatus.OK, DISABLED: DiagnosticStatus.OK, NEEDS_HELP: DiagnosticStatus.ERROR,
    FAILED: DiagnosticStatus.ERROR,
}  # fmt: skip


def status_message(
    name: str, state: str, reason: str, values: dict[str, str] | None = None
) -> DiagnosticStatus:
    """DiagnosticStatus of a state of the policy; every state but following and disabled is a warning."""
    text = f'{state}: {reason}' if reason else state
    return diagnostic_status(name, LEVELS.get(state, DiagnosticStatus.WARN), text, values)


class PolicyOutputs:
    """Publishers of an active policy; lifecycle publishers, so that they are mute unless the node is active.

    Raises:
        ConfigError: the robot or this machine lacks what the settings ask for, see `JointOutput`, `gripper_output`.
    """

    def __init__(
        self, node: LifecycleNode, robot: RobotDescription, status: Publisher, settings: PolicySettings
    ):
        self._node, self._robot, self._status = node, robot, status
        output = 'none' if settings.shadow else settings.output
        self._gives_way = settings.other_commanders == 'give_way'
        self.shadow: ShadowOutput | None = None
        self.joints: JointOutput | None = None
        self.gripper: GripperOutput | None = None
        self.commands: CommandPublisher | None = None
        self._markers = PolicyMarkers(node, robot)
        self._publishers: list[Publisher] = []
        try:
            if settings.shadow:
                self.shadow = ShadowOutput(node, robot, STATE if settings.lockstep else SENSOR)
            if output in IN_JOINTS:
                self.joints = JointOutput(node, robot, settings.trajectory_action)
            if output != 'none':
                self.gripper = gripper_output(node, robot, settings.gripper)
            if output in IN_POSES:
                poses = self._publisher(PoseStamped, robot.topics['target_pose'])
                self.commands = CommandPublisher(robot, poses, None)
            self._trajectory = self._publisher(MultiDOFJointTrajectory, '~/trajectory')
            self._path = self._publisher(Path, '~/path')
        except Exception:
            self.close()  # a publisher that is left would look like another commander
            raise

    def _publisher(self, kind: type, topic: str) -> Publisher:
        self._publishers.append(self._node.create_lifecycle_publisher(kind, topic, COMMAND))
        return self._publishers[-1]

    def close(self) -> None:
        """Destroy the publishers."""
        for publisher in self._publishers:
            self._node.destroy_lifecycle_publisher(publisher)
        for part in self.parts().values():
            part.close()
        if self.shadow is not None:
            self.shadow.close()
        self._markers.close()

    def on_lost_goal(self, interrupt: Callable[[str, bool], None]) -> None:
        """Have `interrupt` told why the newest goal was not done, and whether to give way to whoever cancelled it."""

        def lost(answer: str, cancelled: bool) -> None:
            gives_way = cancelled and self._gives_way
            interrupt(f'{answer}; ~/enable starts again' if gives_way else answer, gives_way)

        if self.joints is not None and self.joints.goals is not None:
            self.joints.goals.lost = lost

    def clear(self) -> None:
        """Forget what was observed, as after a jump of the clock."""
        if self.shadow is not None:
            self.shadow.divergence.clear()

    def values(self) -> dict[str, str]:
        """For diagnostics: in shadow mode, how far the arm is from where the policy would have taken it."""
        return {} if self.shadow is None else {'shadow': 'true', **self.shadow.divergence.values()}

    def publish_command(self, pose_base_ee: NDArray[np.float64], stamp_ns: int) -> None:
        """Publish the target pose (4, 4), where poses are what the arm is told."""
        if self.shadow is not None:
            self.shadow.commands.publish_pose(pose_base_ee, stamp_ns)
        if self.commands is not None:
            self.commands.publish_pose(pose_base_ee, stamp_ns)

    def said(self) -> list[Said]:
        """What was sent on each topic that commands the arm."""
        poses = [] if self.commands is None else [self.commands.said]
        joints = self.joints.said if self.joints is not None else None
        return poses if joints is None else [*poses, joints]

    def publish_gripper(self, state: str) -> None:
        """Tell the gripper to be 'open' or 'closed'."""
        value = GRIPPER_OPEN if state == 'open' else GRIPPER_CLOSED
        if self.shadow is not None:
            self.shadow.commands.publish_gripper(value)
        if self.gripper is not None:
            self.gripper.send(float(self._robot.gripper.width_from_normalised(value)))

    def parts(self) -> dict[str, JointOutput | GripperOutput]:
        """What there is between the policy and the arm, by the names that it is reported under."""
        parts: dict[str, JointOutput | GripperOutput | None] = {
            'gripper': self.gripper, 'joint_trajectory': self.joints,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}

    def publish_chunk(self, chunk: Chunk, others: Sequence[Chunk]) -> None:
        """Publish the chunk from its observation's stamp on, as a trajectory and as a path; show the other samples."""
        self._trajectory.publish(trajectory_message(chunk, self._robot))
        path = Path()
        path.header.frame_id = self._robot.base_frame
        path.header.stamp = time_message(chunk.observation_stamp_ns)
        path.poses = [
            pose_stamped(chunk.poses_base_ee[i], self._robot.base_frame, chunk.stamps_ns[i])
            for i in chunk.ahead()
        ]
        self._path.publish(path)
        self._markers.show_chunks([chunk, *others])

    def publish_guard(self, guard: Guard | None) -> None:
        """Show what the guard keeps the arm out of."""
        self._markers.show_guard(guard)

    def publish_state(self, state: str, reason: str) -> None:
        """Publish and log a change of state."""
        message = status_message(diagnostics_name(self._node, 'policy'), state, reason)
        try:
            self._status.publish(message)
        except RCLError:
            if self._node.context.ok():
                raise
            return  # Ctrl-C has come, and nothing can be said any more
        # Two calls: rclpy allows one severity for each line that logs.
        if message.level == DiagnosticStatus.OK:
            self._node.get_logger().info(message.message)
        else:
            self._node.get_logger().warning(message.message)


def trajectory_message(chunk: Chunk, robot: RobotDescription) -> MultiDOFJointTrajectory:
    """MultiDOFJointTrajectory of the end effector; its stamp is the observation's, times count from there.

    Waypoints before the observation, one per history frame, are left out.
    """
    message = MultiDOFJointTrajectory(joint_names=[robot.ee_frame])
    message.header.frame_id = robot.base_frame
    message.header.stamp = time_message(chunk.observation_stamp_ns)
    for i in chunk.ahead():
        since_ns = chunk.stamps_ns[i] - chunk.observation_stamp_ns
        point = MultiDOFJointTrajectoryPoint(transforms=[transform_message(chunk.poses_base_ee[i])])
        point.time_from_start = duration_message(since_ns)
        message.points.append(point)
    return message
