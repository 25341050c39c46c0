"""What the simulated arm was told: the latest pose or trajectory and the gripper, checked and in time.

Joint trajectories are taken as joint_trajectory_controller takes them: interpolated between their points, cubic where
there are velocities, and replaced by a newer one from its own times on; until its first point the way leads there from
where the arm was told to be when it arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseStamped
from numpy.typing import NDArray
from std_msgs.msg import Float64
from trajectory_msgs.msg import JointTrajectory, MultiDOFJointTrajectory

from decoupled_policy_ros.nodes.common import pose_from_position_orientation, time_ns
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.robot.poses import GRIPPER_OPEN
from decoupled_policy_ros.runtime.chunks import interpolate_waypoints
from decoupled_policy_ros.runtime.joint_motion import JointMotion

Array = NDArray[np.float64]


class Commands:
    """Target of the arm and of its gripper. Whatever arrives last, a pose or a trajectory of either kind, counts.

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
        self._kinematics = Kinematics(robot)
        self.refused = 0
        self.reset(np.eye(4), 0)

    def reset(self, pose_base_ee: Array, stamp_ns: int) -> None:
        """Hold a pose, gripper open, and ignore what was stamped before."""
        self._stamps_ns: Sequence[int] = [stamp_ns]
        self._waypoints = np.asarray(pose_base_ee, float)[None]
        self._joints: JointMotion | None = None
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
        if self._joints is not None:
            return self._kinematics.forward(self._joints.at(within)[0]), self._gripper
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
        self._joints = None
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
        self._joints = None
        self._take(stamps_ns, waypoints, stamped=start_ns > 0)

    def on_joint_trajectory(self, message: JointTrajectory) -> None:
        """Take a trajectory of all joints of the arm, in any order."""
        start_ns = time_ns(message.header.stamp)
        if not self._accepts(message.header.frame_id, start_ns):
            return
        try:
            motion = joint_motion(message, self._robot.joint_names, start_ns or self._now_ns())
        except ValueError as error:
            self._refuse(f'joint trajectory: {error}')
            return
        if motion.stamps_ns[-1] < self._now_ns():
            self._refuse(f'joint trajectory: its end at {motion.stamps_ns[-1] / 1e9:.3f} s is past')
            return
        self._joints = self._led_to(motion)
        self._take(self._joints.stamps_ns, self._waypoints, stamped=start_ns > 0)

    def on_gripper(self, message: Float64) -> None:
        """Take an opening width in metres."""
        if not np.isfinite(message.data):
            self._refuse(f'gripper width {message.data}')
            return
        self._gripper = float(self._robot.gripper.normalised_from_width(message.data))

    def _led_to(self, motion: JointMotion) -> JointMotion:
        """A motion with the way to its first point, from where the joints were told to be."""
        now_ns = self._now_ns()
        if self._joints is None or now_ns >= motion.stamps_ns[0]:
            return motion
        positions, velocities = self._joints.at(now_ns)
        rates = motion.velocities_rad_s
        return JointMotion(
            [now_ns, *motion.stamps_ns],
            np.concatenate([positions[None], motion.positions_rad]),
            None if rates is None else np.concatenate([velocities[None], rates]),
        )

    def _take(self, stamps_ns: Sequence[int], waypoints: Array, stamped: bool) -> None:
        self._stamps_ns, self._waypoints = stamps_ns, waypoints
        self._engaged = stamped
        self.received += 1

    def _accepts(self, frame_id: str, stamp_ns: int) -> bool:
        valid = self._robot.base_frames
        if frame_id not in ('', *valid):
            self._refuse(f'command in frame {frame_id!r}, valid: {", ".join(map(repr, valid))}')
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


def joint_motion(message: JointTrajectory, joint_names: tuple[str, ...], start_ns: int) -> JointMotion:
    """The motion of a message that begins at a stamp, joints in the order of `joint_names`.

    Raises:
        ValueError: other joints, no points, a number too many, too few or not finite, or times that do not increase.
    """
    names, points = list(message.joint_names), list(message.points)
    if sorted(names) != sorted(joint_names) or not points:
        raise ValueError(f'{len(points)} points of {names}, valid: at least one of {list(joint_names)}')
    order = [names.index(name) for name in joint_names]
    shape = (len(points), len(names))
    positions = np.array([point.positions for point in points], float)
    rates = np.array([point.velocities for point in points], float)
    if positions.shape != shape or (rates.size and rates.shape != shape):
        raise ValueError('each point needs one position for each joint, and each or none one velocity')
    if not np.isfinite(positions).all() or not np.isfinite(rates).all():
        raise ValueError('a position or velocity is not finite')
    stamps_ns = [start_ns + time_ns(point.time_from_start) for point in points]
    if np.any(np.diff(stamps_ns) <= 0):
        raise ValueError('times from start must increase')
    return JointMotion(stamps_ns, positions[:, order], rates[:, order] if rates.size else None)
