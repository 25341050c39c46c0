"""command_guard_node: between anybody's target_pose and the arm.

target_pose_in   geometry_msgs/PoseStamped      where somebody wants the end effector to be
joint_states     sensor_msgs/JointState         where the arm is
target_pose      geometry_msgs/PoseStamped      where it is told to be, inside all limits
~/status         diagnostic_msgs/DiagnosticStatus   latched: following or holding, and why
~/guard_markers  visualization_msgs/MarkerArray     latched: workspace and boxes
~/enable         std_srvs/SetBool               false: come to rest, and then command nothing
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from rclpy.clock import Clock, JumpThreshold, TimeJump
from rclpy.clock_type import ClockType
from rclpy.duration import Duration
from rclpy.node import Node
from std_srvs.srv import SetBool
from visualization_msgs.msg import MarkerArray

from decoupled_policy_ros.errors import ConfigError, MessageError
from decoupled_policy_ros.nodes.commands import CommandPublisher
from decoupled_policy_ros.nodes.common import (
    ANYBODYS,
    COMMAND,
    LATCHED,
    SENSOR,
    declare_settings,
    diagnostic_status,
    diagnostics_name,
    parameter,
    read_robot,
    resolve_topic,
    spin_main,
    time_ns,
)
from decoupled_policy_ros.nodes.joint_states import JointStates
from decoupled_policy_ros.nodes.other_commanders import OtherCommanders
from decoupled_policy_ros.nodes.policy_markers import guard_markers
from decoupled_policy_ros.observation.messages import pose_from_message
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime.follower import Follower
from decoupled_policy_ros.runtime.guard.guard import Guard
from decoupled_policy_ros.runtime.guard.settings import GuardSettings, read_guard_settings
from decoupled_policy_ros.runtime.guard.verdict import Finding, Outcome

FOLLOWING, HOLDING, WAITING, DISABLED = 'following', 'holding', 'waiting', 'disabled'

#: Longest time (s) that coming to rest is given where the process is to end: the clock may stand still.
REST_S = 1.0


@dataclass(frozen=True)
class CommandGuardSettings:
    """Parameters of the node."""

    robot: str = parameter('panda_sim', 'name in config/robots or path of a YAML file')
    guard_file: str = parameter(
        '', "YAML file with the guard's settings; what it leaves out keeps its default"
    )
    input_topic: str = parameter('target_pose_in', 'topic of the targets to check')
    control_rate_hz: float = parameter(50.0, 'rate of target_pose (Hz)', floating=(1.0, 1000.0))
    horizon_s: float = parameter(
        0.05,
        'a target is to be reached so much later (s); longer is smoother and lags more',
        floating=(0.005, 1.0),
    )
    target_timeout_s: float = parameter(
        0.2,
        'age of a target, and silence since the last one, from which on the arm comes to rest (s)',
        floating=(0.01, 10.0),
    )
    enabled: bool = parameter(True, 'follow targets from the beginning; otherwise ~/enable is waited for')
    robot_description_timeout_s: float = parameter(
        3.0,
        'how long to wait for the URDF where the robot names a topic for it (s)',
        floating=(0.0, 60.0),
    )


class CommandGuardNode(Node):
    """Checks a stream of target poses and passes on what keeps the limits of one robot."""

    def __init__(self, **options: Any) -> None:
        super().__init__('command_guard_node', **options)
        settings = declare_settings(self, CommandGuardSettings)
        self.robot = read_robot(self, settings.robot, settings.robot_description_timeout_s)
        checks = read_guard_settings(settings.guard_file) if settings.guard_file else GuardSettings()
        self._timeout_s = settings.target_timeout_s
        self._joints = JointStates(self.robot, checks.joint_state_max_age_s)
        guard = Guard(self.robot, checks)
        self.follower = Follower(
            guard,
            Kinematics(self.robot),
            self._joints,
            settings.horizon_s,
            settings.target_timeout_s,
            1.0 / settings.control_rate_hz,
        )
        self._enabled, self._state, self._seen_ns = settings.enabled, '', 0
        self._ends, self._rests = threading.Event(), threading.Event()
        self._status = self.create_publisher(DiagnosticStatus, '~/status', LATCHED)
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', 10)
        self._markers = self.create_publisher(MarkerArray, '~/guard_markers', LATCHED)
        self._markers.publish(guard_markers(guard, self.robot.base_frame))
        commands = self.create_publisher(PoseStamped, self.robot.topics['target_pose'], COMMAND)
        self._commands = CommandPublisher(self.robot, commands, None)
        self._others = OtherCommanders(self, self.get_logger().warning)
        self._others.watch([self._commands.said])
        self._joints.subscribe(self, SENSOR)
        if resolve_topic(self, settings.input_topic) == commands.topic_name:
            raise ConfigError(
                f'input_topic: {settings.input_topic!r} is {commands.topic_name}, on which this node commands the arm; '
                'targets have to come on another one'
            )
        self.create_subscription(PoseStamped, settings.input_topic, self._on_target, ANYBODYS)
        self.create_service(SetBool, '~/enable', self._on_enable)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        # A wall clock that is set back must not silence the commands until it has caught up.
        clock = None if self.get_parameter('use_sim_time').value else steady
        self.create_timer(1.0 / settings.control_rate_hz, self._tick, clock=clock)
        self.create_timer(1.0, self._publish_diagnostics, clock=steady)
        backwards = JumpThreshold(
            min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=True
        )
        self._jumps = self.get_clock().create_jump_callback(backwards, post_callback=self._on_time_jump)
        self._say()

    # --- what it hears --------------------------------------------------------------------------

    def _on_target(self, message: PoseStamped) -> None:
        now_ns = self._now_ns()
        if not self._enabled or now_ns == 0:
            return
        found = self._unusable(message, now_ns)
        if found is not None:
            self.follower.refuse(found, now_ns)
        else:
            self.follower.target(pose_from_message(message, *self.robot.base_frames), now_ns)
        self._say()

    def _unusable(self, message: PoseStamped, now_ns: int) -> Finding | None:
        """What is wrong with a message, before anybody looks at where it would lead."""
        stamp_ns = time_ns(message.header.stamp)
        age_s = (now_ns - stamp_ns) * 1e-9
        if message.header.frame_id not in self.robot.base_frames:
            valid = ' or '.join(map(repr, self.robot.base_frames))
            frame = f'frame {message.header.frame_id!r}, expected {valid}'
            return Finding('frame', Outcome.REJECT, detail=frame)
        if stamp_ns == 0:
            return Finding('stale', Outcome.REJECT, detail='the target has no stamp')
        if abs(age_s) > self._timeout_s:
            return Finding('stale', Outcome.REJECT, age_s, self._timeout_s, 's', detail='the target')
        try:
            pose_from_message(message)
        except (MessageError, ValueError) as error:
            return Finding('finite', Outcome.REJECT, detail=str(error))
        return None

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        now_ns = self._now_ns()
        if not request.data:
            self._disable(now_ns)
        self._enabled = request.data
        response.success, response.message = True, 'enabled' if request.data else 'disabled'
        self._say()
        return response

    def _disable(self, now_ns: int) -> None:
        if self._enabled:
            self.follower.hold(now_ns, 'disabled')
        self._enabled = False

    def wind_down(self) -> None:
        """Bring the arm to rest while commands can still be sent: the process is about to end."""
        self._rests.clear()
        self._ends.set()  # for the next tick: the follower is not for several threads
        self._rests.wait(REST_S)

    def _on_time_jump(self, jump: TimeJump) -> None:
        self.get_logger().warning(
            f'the clock jumped by {jump.delta.nanoseconds * 1e-9:.3f} s: starting afresh'
        )
        self._restart()

    # --- what it says ---------------------------------------------------------------------------

    def _tick(self) -> None:
        now_ns = self._now_ns()
        if 0 < now_ns < self._seen_ns:
            self._restart()  # a wall clock that was set back: nobody else would tell
        self._seen_ns = now_ns
        if self._ends.is_set():
            self._disable(now_ns)
        rested = self.follower.at_rest  # and is said to be so once more
        pose = self.follower.command(now_ns) if now_ns > 0 else None
        if pose is not None:
            self._commands.publish_pose(pose, now_ns)
        if not self._enabled and rested:
            self.follower.reset()  # who enables it again begins where the arm is then, which may be elsewhere
        if not self._enabled and not self.follower.started:
            self._rests.set()
        self._say()

    def _restart(self) -> None:
        self._seen_ns = 0
        self._joints.clear()
        self.follower.reset()
        self._say()  # before a next target is followed: it begins a new motion

    def _say(self) -> None:
        """Publish and log the state when it changes."""
        if not self._enabled:
            state = DISABLED
        elif not self.follower.started:
            state = WAITING
        else:
            state = HOLDING if self.follower.holding else FOLLOWING
        if state == self._state:
            return
        self._state = state
        message = self._message()
        self._status.publish(message)
        # Two calls: rclpy allows one severity for each line that logs.
        if message.level == DiagnosticStatus.OK:
            self.get_logger().info(message.message)
        else:
            self.get_logger().warning(message.message)

    def _message(self) -> DiagnosticStatus:
        calm = self._state in (FOLLOWING, DISABLED)
        reason = '' if calm else self.follower.reason
        others = self._others.commanding() if self.follower.started and self._enabled else ''
        reason = '; '.join(filter(None, (reason, others)))
        text = f'{self._state}: {reason}' if reason else self._state
        level = DiagnosticStatus.OK if calm and not others else DiagnosticStatus.WARN
        values = self.follower.statistics.values() | {'other_commanders': self._others.present()}
        return diagnostic_status(diagnostics_name(self, 'guard'), level, text, values)

    def _publish_diagnostics(self) -> None:
        message = DiagnosticArray(status=[self._message()])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)
        self._status.publish(message.status[0])

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


def main() -> int:
    """Console entry point."""
    return spin_main(CommandGuardNode)


if __name__ == '__main__':
    raise SystemExit(main())
