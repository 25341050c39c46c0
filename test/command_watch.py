"""Listens to every command of the nodes that a test or a soak starts, and says what breaks a limit.

Commands are looked at in the order in which they were sent, whatever topic they came on: a node that says that it is
disabled, or waits, begins a new motion afterwards, from where the arm is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from limits_checker import JointChecker, LimitsChecker
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from spun_node import SpunNode
from std_msgs.msg import Float64
from trajectory_msgs.msg import JointTrajectory

from decoupled_policy_ros.errors import MessageError
from decoupled_policy_ros.nodes.common import time_ns
from decoupled_policy_ros.observation.messages import pose_from_message
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.poses import GRIPPER_CLOSED, GRIPPER_OPEN
from decoupled_policy_ros.runtime.joint_motion import JointMotion

EVERYTHING = QoSProfile(depth=2000, reliability=ReliabilityPolicy.RELIABLE)
STATUS = QoSProfile(
    depth=100, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)
#: After these a motion begins anew.
PAUSED = ('disabled', 'waiting', 'ready', 'failed', 'gave_way')
#: Nothing more is on the way once nothing has come for so long (s).
QUIET_S = 0.1


@dataclass
class Arm:
    """What one namespace's arm is told, and who looks at it."""

    robot: RobotDescription
    guarded: bool
    poses: LimitsChecker
    joints: JointChecker
    said: list[tuple[int, str, Any]] = field(default_factory=list)  # when it was sent, kind, message
    strange: list[str] = field(default_factory=list)

    def take(self, kind: str, message: Any) -> None:
        """Look at one message."""
        if kind == 'status':
            if message.message.startswith(PAUSED):
                self.poses.restart()
                self.joints.restart()
        elif kind == 'gripper':
            widths = [self.robot.gripper.width_from_normalised(v) for v in (GRIPPER_OPEN, GRIPPER_CLOSED)]
            if not min(widths) - 1e-9 <= message.data <= max(widths) + 1e-9:
                self.strange.append(f'gripper width {message.data}, its range is {sorted(widths)}')
        elif kind == 'joints':
            self.joints.add(tuple(message.joint_names), _motion(message))
        else:
            try:
                pose = pose_from_message(message, self.robot.base_frame)
            except MessageError as error:
                self.strange.append(str(error))
                return
            self.poses.add(time_ns(message.header.stamp), pose)

    def breaches(self) -> list[str]:
        """What broke a limit since the last call; without the guard only what is no command at all."""
        found, self.strange = self.strange, []
        for checker in (self.poses, self.joints):
            found += checker.breaches if self.guarded else [b for b in checker.breaches if 'finite' in b]
            checker.breaches.clear()
        return found


def _motion(message: JointTrajectory) -> JointMotion:
    start_ns = time_ns(message.header.stamp)
    velocities = [point.velocities for point in message.points]
    return JointMotion(
        [start_ns + time_ns(point.time_from_start) for point in message.points],
        np.array([point.positions for point in message.points], float),
        np.array(velocities, float) if all(len(v) for v in velocities) else None,
    )


class CommandWatch(SpunNode):
    """Subscribes to whatever `listen` names.

    Args:
        running: whether any of the nodes that it looks at runs; else a test itself says what is said on their topics.
    """

    def __init__(self, running: Callable[[], bool] = lambda: True) -> None:
        super().__init__('command_watch')
        self._running = running
        self._lock = threading.Lock()
        self._arms: dict[str, Arm] = {}
        self._heard: set[str] = set()
        self._heard_s = 0.0
        self.spin_in_background()

    def listen(self, namespace: str, node: str, robot: RobotDescription, guarded: bool) -> None:
        """Look at the commands in a namespace from now on, and at the status of the node that gives them."""
        namespace = f'/{namespace.strip("/")}'.rstrip('/')
        with self._lock:
            arm = self._arms.get(namespace)
            if arm is None or arm.robot.name != robot.name:
                checkers = LimitsChecker.of(robot.limits), JointChecker(robot)
                arm = self._arms[namespace] = Arm(robot, guarded, *checkers)
            arm.guarded = guarded
        topics = [
            (PoseStamped, robot.topics['target_pose'], 'pose', EVERYTHING),
            (Float64, robot.topics['gripper_command'], 'gripper', EVERYTHING),
            (DiagnosticStatus, f'{node}/status', 'status', STATUS),
        ]
        if 'joint_trajectory' in robot.topics:
            topics.append((JointTrajectory, robot.topics['joint_trajectory'], 'joints', EVERYTHING))
        for message_type, topic, kind, qos in topics:
            name = f'{namespace}/{topic}'
            if name not in self._heard:
                self._heard.add(name)
                take = partial(self._take, namespace, kind)
                self.create_subscription(message_type, name, lambda m, i, t=take: t(m, i), qos)

    def _take(self, namespace: str, kind: str, message: Any, info: Any) -> None:
        if not self._running():
            return
        with self._lock:
            self._heard_s = time.monotonic()
            self._arms[namespace].said.append((info['source_timestamp'], kind, message))

    def breaches(self) -> list[str]:
        """What broke a limit since the last call; while commands go on, the last moments are kept for the next one."""
        deadline = time.monotonic() + 5 * QUIET_S
        while time.monotonic() < min(deadline, self._heard_s + QUIET_S):
            time.sleep(0.02)
        found = []
        with self._lock:
            for namespace, arm in self._arms.items():
                said = sorted(arm.said, key=lambda what: what[0])
                settled = time.time_ns() - int(QUIET_S * 1e9)
                arm.said = [what for what in said if what[0] > settled]
                for _, kind, message in said[: len(said) - len(arm.said)]:
                    arm.take(kind, message)
                found += [f'{namespace or "/"}: {breach}' for breach in arm.breaches()]
        return found

    def counts(self, namespace: str = '') -> tuple[int, int]:
        """Poses and joint trajectories looked at so far."""
        arm = self._arms[namespace]
        return arm.poses.count, arm.joints.count

    def largest(self, namespace: str = '') -> dict[str, float]:
        """The largest of each quantity so far."""
        arm = self._arms[namespace]
        return arm.poses.largest | arm.joints.largest
