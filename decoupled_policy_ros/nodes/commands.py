"""What an arm is told, by a policy and by an operator alike: a streamed target pose and gripper widths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from rclpy.publisher import Publisher
from std_msgs.msg import Float64

from decoupled_policy_ros.nodes.common import pose_stamped
from decoupled_policy_ros.nodes.other_commanders import Said
from decoupled_policy_ros.robot.description import RobotDescription


class CommandPublisher:
    """Publishes the two kinds of command; a gripper's goes out before the pose that it belongs to.

    Args:
        robot: gives the base frame and the gripper's range.
        target_pose: publisher of geometry_msgs/PoseStamped.
        gripper: publisher of std_msgs/Float64, an opening width in metres; None where grippers are told by others.

    Attributes:
        said: the poses that were sent.
    """

    def __init__(self, robot: RobotDescription, target_pose: Publisher, gripper: Publisher | None):
        self._robot, self.said, self._gripper = robot, Said(target_pose), gripper
        self.quat_xyzw: tuple[float, float, float, float] | None = None  # of the last target pose

    def publish_pose(self, pose_base_ee: NDArray[np.float64], stamp_ns: int) -> None:
        """Publish the target pose (4, 4); its quaternion never changes sign from one command to the next."""
        message = pose_stamped(pose_base_ee, self._robot.base_frame, stamp_ns, self.quat_xyzw)
        q = message.pose.orientation
        self.quat_xyzw = (q.x, q.y, q.z, q.w)
        self.said.publish(message)

    def publish_gripper(self, value: float) -> None:
        """Publish the opening width, in metres, for a gripper value in [-1 open, +1 closed]."""
        assert self._gripper is not None
        self._gripper.publish(Float64(data=float(self._robot.gripper.width_from_normalised(value))))
