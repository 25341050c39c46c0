"""teleop_node: an operator's device in, the same commands as a policy's out.

    keyboard, gamepad, SpaceMouse, leader pose -> intent -> target pose within limits -> target_pose, gripper_command

Nothing is commanded before the arm's state is there and the deadman was pressed, and nothing any more once the
state is too old. In between commands never pause: while the deadman is released the target stands still and is
commanded on. Buttons and keys also call the episode recorder's services.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from rclpy.clock import Clock, JumpThreshold, TimeJump
from rclpy.clock_type import ClockType
from rclpy.duration import Duration
from rclpy.node import Node
from std_msgs.msg import Float64
from std_srvs.srv import SetBool

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.nodes.commands import CommandPublisher
from decoupled_policy_ros.nodes.common import (
    COMMAND,
    LATCHED,
    declare_settings,
    diagnostic_status,
    diagnostics_name,
    read_robot,
    spin_main,
)
from decoupled_policy_ros.nodes.other_commanders import OtherCommanders
from decoupled_policy_ros.nodes.teleop_episodes import EpisodeClient
from decoupled_policy_ros.nodes.teleop_inputs import ArmInput, DeviceInput, streamed_device
from decoupled_policy_ros.nodes.teleop_settings import TeleopSettings
from decoupled_policy_ros.teleop.integrator import MotionLimits
from decoupled_policy_ros.teleop.keyboard import KeyboardDevice
from decoupled_policy_ros.teleop.mapping import EPISODE_ACTIONS, load_mapping
from decoupled_policy_ros.teleop.teleoperator import WAITING, Teleoperator
from decoupled_policy_ros.teleop.terminal import Terminal, help_text, require_terminal

#: How often keys are read and buttons' actions are asked for (s, wall): also while simulated time stands still.
SERVE_S = 0.02
#: Longest time (s) that coming to rest is given where the process is to end.
REST_S = 2.0


class TeleopNode(Node):
    """Lets one operator move one arm."""

    def __init__(self, **options: Any) -> None:
        super().__init__('teleop_node', **options)
        self.terminal: Terminal | None = None
        settings = self.settings = declare_settings(self, TeleopSettings)
        self._sim_time = bool(self.get_parameter('use_sim_time').value)
        if settings.lockstep and not self._sim_time:
            raise ConfigError('lockstep is for simulated time: set use_sim_time too')
        if settings.device == 'keyboard':
            require_terminal()
        mapping = load_mapping(settings.mapping, settings.device)
        self.robot = read_robot(self, settings.robot, settings.robot_description_timeout_s)
        self.arm = ArmInput(self, self.robot, settings.use_current_pose, settings.state_timeout_s)
        self.keyboard: KeyboardDevice | None = None
        self.device_input: DeviceInput | None = None
        if settings.device == 'keyboard':
            device: Any = KeyboardDevice(mapping)
            self.keyboard = device
        else:
            device = streamed_device(mapping, settings.device_timeout_s)
            self.device_input = DeviceInput(self, device, self._now_ns)
        limits = MotionLimits.of(
            self.robot,
            settings.limit_fraction,
            (mapping.linear_m_s, mapping.angular_rad_s),
            (settings.linear_acceleration_m_s2, settings.angular_acceleration_rad_s2),
            (settings.max_lead_m, settings.max_lead_rad),
        )
        self.teleop = Teleoperator(device, limits, settings.state_timeout_s, self.arm.missing)
        self.teleop.enable(settings.enabled)
        self.episodes = EpisodeClient(self, settings.recorder, self._on_recording, self._clear_line)
        self._make_topics()
        self._tick_ns = self._commanded_ns = 0
        self._ends, self._rests = threading.Event(), threading.Event()
        self._quits_s: float | None = None  # by the steady clock, at the latest
        self._said: str | None = None
        self._make_timers()
        if self.keyboard is not None:
            self.terminal = Terminal()  # last: nothing after it can fail and leave the terminal changed
            self.terminal.say(help_text(self.keyboard.keys))
        self.get_logger().info(
            f'{settings.device} ({mapping.name}) moves {self.robot.name}: at most {limits.linear_m_s:g} m/s, '
            f'{limits.angular_rad_s:g} rad/s'
        )

    def _make_topics(self) -> None:
        topics = self.robot.topics
        self._commands = CommandPublisher(
            self.robot,
            self.create_publisher(PoseStamped, topics['target_pose'], COMMAND),
            self.create_publisher(Float64, topics['gripper_command'], COMMAND),
        )
        self._others = OtherCommanders(self, self.get_logger().warning)
        self._others.watch([self._commands.said])
        self._status = self.create_publisher(DiagnosticStatus, '~/status', LATCHED)
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', 10)
        self.create_service(SetBool, '~/enable', self._on_enable)

    def _make_timers(self) -> None:
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        any_step = {'min_forward': Duration(nanoseconds=1), 'min_backward': Duration(nanoseconds=-1)}
        threshold = JumpThreshold(**any_step, on_clock_change=True)
        self._jumps = self.get_clock().create_jump_callback(threshold, post_callback=self._on_time_jump)
        self._ticked = self.create_guard_condition(self._tick)
        if not self.settings.lockstep:
            # A wall clock that is set back must not silence the commands until it has caught up.
            clock = None if self._sim_time else steady
            self.create_timer(1.0 / self.settings.control_rate_hz, self._tick, clock=clock)
        self.create_timer(SERVE_S, self._serve, clock=steady)
        self.create_timer(1.0, self._report, clock=steady)

    # --- commands -------------------------------------------------------------------------------

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)

    def _on_time_jump(self, jump: TimeJump) -> None:
        if self.settings.lockstep:
            self._ticked.trigger()  # the executor calls _tick: nothing is commanded from inside the clock

    def _tick(self) -> None:
        """Command once for each time of the clock."""
        now_ns = self._now_ns()
        if now_ns in (self._commanded_ns, 0):
            return
        if now_ns < self._tick_ns:
            self.get_logger().warning(
                f'the clock went back by {(self._tick_ns - now_ns) * 1e-9:.3f} s: starting afresh'
            )
            self.teleop.restart()
            self.arm.forget()
        self._tick_ns = now_ns
        command = self.teleop.tick(now_ns, self.arm.state())
        if command is not None:
            if command.gripper is not None:
                self._commands.publish_gripper(command.gripper)
            self._commands.publish_pose(command.pose_base_ee, now_ns)
            self._commanded_ns = now_ns
        self._say_state()

    def _on_recording(self) -> None:
        """Repeat the gripper's command, so that an episode's own recording holds the one in force."""
        value = self.teleop.device.gripper.value
        if self.teleop.commanding and value is not None:
            self._commands.publish_gripper(value)

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self.teleop.enable(request.data)
        self._say_state()
        response.success, response.message = True, self.teleop.state
        return response

    def wind_down(self) -> None:
        """Bring the target to rest while commands can still be sent: the process is about to end."""
        self._rests.clear()
        self._ends.set()  # for the next look: the teleoperator is not for several threads
        self._rests.wait(REST_S)

    def _quit(self) -> None:
        """End the process once the target has come to rest, and soon anyway: a simulated clock may stand still."""
        self._ends.set()
        self._quits_s = time.monotonic() + REST_S

    # --- operator -------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Read keys, pass on what was pressed, show what is going on."""
        self._end()
        if self.keyboard is not None and self.terminal is not None:
            keys = self.terminal.read_keys()
            if keys is None:
                if self._quits_s is None:
                    self.get_logger().error('the terminal is gone: ending')
                    self._quit()
                return
            for key in keys:
                self.keyboard.press(key, self._now_ns())
        pressed = self.teleop.device.pressed
        while pressed:
            self._do(pressed.popleft())
        self.episodes.poll()
        if self._sim_time and (self.settings.lockstep or not self.teleop.commanding):
            self._tick()  # a simulator that stands still and waits for a command gets its first one
        if self.terminal is not None:
            self.terminal.show(self._line())

    def _end(self) -> None:
        """Come to rest if the process is to end, and say when it may."""
        if not self._ends.is_set():
            return
        if self.teleop.enabled:
            self.teleop.enable(False)
        if not self.teleop.commanding:
            self._rests.set()
        if self._quits_s is not None and (self._rests.is_set() or time.monotonic() > self._quits_s):
            self.context.try_shutdown()

    def _do(self, action: str) -> None:
        if action in EPISODE_ACTIONS:
            self.episodes.request(action)
        elif action == 'quit':
            self._quit()
        elif action == 'help' and self.terminal is not None and self.keyboard is not None:
            self.terminal.say(help_text(self.keyboard.keys))

    def _clear_line(self) -> None:
        if self.terminal is not None:
            self.terminal.clear()

    def _line(self) -> str:
        """Status line of the terminal."""
        teleop = self.teleop
        parts = [f'{teleop.state}: {teleop.reason}' if teleop.reason else teleop.state]
        if teleop.commanding:
            x, y, z = teleop.integrator.pose[:3, 3]
            parts.append(f'target {x:.3f} {y:.3f} {z:.3f} m')
        gripper = teleop.device.gripper.value
        if gripper is not None:
            parts.append('gripper closed' if gripper > 0.0 else 'gripper open')
        if self.keyboard is not None:
            parts.append(f'speed {self.keyboard.speed:.0%}')
        return ' | '.join([*parts, self.episodes.line])

    # --- diagnostics ----------------------------------------------------------------------------

    def _say_state(self) -> None:
        """Publish and log a change of state."""
        if self.teleop.state == self._said:
            return
        self._said = self.teleop.state
        message = self._status_message(self._values())
        self._status.publish(message)
        if self.terminal is not None:
            return  # its status line shows it
        # Two calls: rclpy allows one severity for each line that logs.
        if message.level == DiagnosticStatus.OK:
            self.get_logger().info(message.message)
        else:
            self.get_logger().warning(message.message)

    def _status_message(self, values: dict[str, str]) -> DiagnosticStatus:
        teleop = self.teleop
        others = self._others.commanding() if teleop.commanding else ''
        bad = teleop.state == WAITING or (teleop.enabled and teleop.silent) or others
        reason = '; '.join(filter(None, (teleop.reason, others)))
        return diagnostic_status(
            diagnostics_name(self, 'teleoperation'),
            DiagnosticStatus.WARN if bad else DiagnosticStatus.OK,
            f'{teleop.state}: {reason}' if reason else teleop.state,
            values,
            self.robot.name,
        )

    def _report(self) -> None:
        if self._now_ns() == 0 and self.teleop.enabled:
            self.teleop.reason = 'nothing on /clock'
        status = self._status_message(self._values())
        self._status.publish(status)
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)

    def _values(self) -> dict[str, str]:
        teleop, refusals = self.teleop, self.device_input.refusals if self.device_input else None
        lead_m, lead_rad = teleop.lead()
        gripper = teleop.device.gripper.value
        return {
            'state': teleop.state,
            'device': self.settings.device,
            'mapping': teleop.device.mapping.name,
            'commands': str(teleop.commands),
            'restarts': str(teleop.restarts),
            'lead_m': f'{lead_m:.4f}',
            'lead_rad': f'{lead_rad:.4f}',
            'gripper': 'unknown' if gripper is None else f'{gripper:.2f}',
            'refused': str(refusals.count if refusals else 0),
            'last_refusal': refusals.last if refusals else '',
            'refused_states': str(self.arm.refusals.count),
            'last_refused_state': self.arm.refusals.last,
            'other_commanders': self._others.present(),
            'recorder': self.episodes.line,
            'last_action': self.episodes.outcome,
        }

    def destroy_node(self) -> None:
        """Give the terminal back, then end the node."""
        if self.terminal is not None:
            self.terminal.close()
        super().destroy_node()


def main() -> int:
    """Console entry point."""
    return spin_main(TeleopNode)


if __name__ == '__main__':
    raise SystemExit(main())
