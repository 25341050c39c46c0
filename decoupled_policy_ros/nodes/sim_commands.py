"""What the simulated arm was told: the latest pose or trajectory and the gripper, checked and in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseStamped
from numpy.typing import NDArray
from std_msgs.msg import Float64
from trajectory_msgs.msg import MultiDOFJointTrajectory

from decoupled_policy_ros.nodes.common import pose_from_position_orientation, time_ns
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.poses import GRIPPER_OPEN
from decoupled_policy_ros.runtime.chunks import interpolate_waypoints

Array = NDArray[np.float64]


class Commands:
    """Target of the arm and of its gripper. Whatever arrives last, a pose or a trajectory, counts.

    A command is refused, counted and logged when it isn't finite, names another frame, or was stamped before the
    last reset. A pose without a stamp is followed, but nobody waits for the next one; a trajectory without one
    starts when it arrives, as trajectory_msgs has it.

    Args:
        robot: gives frames and the gripper's range.
        logger: told of what is refused.
        now_ns: the simulator's time.
    """

    def __init__(self, robot: RobotDescription, logger: Any, now_ns: Callable[[], int]):
        self._robot, self._logger, self._now_ns = robot, logger, now_ns
        self.refused = 0
        self.reset(np.eye(4), 0)

    def reset(self, pose_base_ee: Array, stamp_ns: int) -> None:
        """Hold a pose, gripper open, and ignore what was stamped before."""
        self._stamps_ns = [stamp_ns]
        self._waypoints = np.asarray(pose_base_ee, float)[None]
        self._gripper = GRIPPER_OPEN
        self._reset_ns = stamp_ns
        self._engaged = False
        self.received = 0

    def covers(self, stamp_ns: int) -> bool:
        """Return whether a command for this stamp or a later one has arrived."""
        return self.received > 0 and self._stamps_ns[-1] >= stamp_ns

    def take_engaged(self) -> bool:
        """Return whether a stamped command came since the last call: somebody commands."""
        engaged, self._engaged = self._engaged, False
        return engaged

    def at(self, stamp_ns: int) -> tuple[Array, float]:
        """Pose (4, 4) in the base frame and gripper value for a time; past the last waypoint that one is held."""
        within = int(np.clip(stamp_ns, self._stamps_ns[0], self._stamps_ns[-1]))
        return interpolate_waypoints(self._stamps_ns, self._waypoints, within), self._gripper

    def on_pose(self, message: PoseStamped) -> None:
        """Take a target pose."""
        stamp_ns = time_ns(message.header.stamp)
        if not self._accepts(message.header.frame_id, stamp_ns):
            return
        try:
            pose = pose_from_position_orientation(message.pose.position, message.pose.orientation)
        except ValueError as error:
            self._refuse(f'target pose: {error}')
            return
        self._take([stamp_ns], pose[None], stamped=stamp_ns > 0)

    def on_trajectory(self, message: MultiDOFJointTrajectory) -> None:
        """Take a trajectory of one frame, the end effector's; it is followed by stamp."""
        start_ns = time_ns(message.header.stamp)
        if not self._accepts(message.header.frame_id, start_ns):
            return
        if list(message.joint_names) != [self._robot.ee_frame] or not message.points:
            self._refuse(f'trajectory of {list(message.joint_names)}, valid: [{self._robot.ee_frame!r}]')
            return
        stamps_ns = [
            (start_ns or self._now_ns()) + time_ns(point.time_from_start) for point in message.points
        ]
        try:
            transforms = [point.transforms[0] for point in message.points]
            waypoints = np.stack(
                [pose_from_position_orientation(t.translation, t.rotation) for t in transforms]
            )
        except (ValueError, IndexError) as error:
            self._refuse(f'trajectory: {error}')
            return
        if np.any(np.diff(stamps_ns) <= 0):
            self._refuse('trajectory: times from start must increase')
            return
        self._take(stamps_ns, waypoints, stamped=start_ns > 0)

    def on_gripper(self, message: Float64) -> None:
        """Take an opening width in metres."""
        if not np.isfinite(message.data):
            self._refuse(f'gripper width {message.data}')
            return
        self._gripper = float(self._robot.gripper.normalised_from_width(message.data))

    def _take(self, stamps_ns: list[int], waypoints: Array, stamped: bool) -> None:
        self._stamps_ns, self._waypoints = stamps_ns, waypoints
        self._engaged = stamped
        self.received += 1

    def _accepts(self, frame_id: str, stamp_ns: int) -> bool:
        if frame_id not in ('', self._robot.base_frame):
            self._refuse(f'command in frame {frame_id!r}, valid: {self._robot.base_frame!r}')
            return False
        if 0 < stamp_ns < self._reset_ns:
            self._refuse(
                f'command for {stamp_ns / 1e9:.2f} s, before the reset at {self._reset_ns / 1e9:.2f} s'
            )
            return False
        return True

    def _refuse(self, reason: str) -> None:
        self.refused += 1
        self._logger.warning(f'refused: {reason}', throttle_duration_sec=1.0)
