"""policy_node: cameras and joint states in, end-effector commands out, as a lifecycle node.

configure loads the files, refuses what doesn't match, and warms the network up; activate starts to command;
deactivate stops before it returns; cleanup forgets the policy, so that another one can be configured.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.srv import ChangeState
from rclpy.clock import Clock, ClockChange, JumpThreshold, TimeJump
from rclpy.clock_type import ClockType
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from std_srvs.srv import SetBool

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.nodes.clock_watch import ClockWatch
from decoupled_policy_ros.nodes.common import (
    LATCHED,
    SENSOR,
    STATE,
    InvalidHandle,
    RCLError,
    declare_settings,
    diagnostics_name,
    read_robot,
    read_settings,
    spin_main,
)
from decoupled_policy_ros.nodes.cycle_output import CycleOutput
from decoupled_policy_ros.nodes.other_commanders import OtherCommanders
from decoupled_policy_ros.nodes.policy_inputs import Inputs
from decoupled_policy_ros.nodes.policy_outputs import PolicyOutputs, status_message
from decoupled_policy_ros.nodes.policy_settings import PolicySettings, loop_settings, policy_steering
from decoupled_policy_ros.nodes.policy_tasks import PolicyTasks
from decoupled_policy_ros.nodes.transitions import logged
from decoupled_policy_ros.observation.sampler import Sampler
from decoupled_policy_ros.runtime.assembly import join_settings
from decoupled_policy_ros.runtime.cores import read_cores
from decoupled_policy_ros.runtime.cycles import CycleLog
from decoupled_policy_ros.runtime.loop import PolicyLoop
from decoupled_policy_ros.runtime.states import DISABLED, FAILED, FOLLOWING, GAVE_WAY, HOLDING, WAITING

if TYPE_CHECKING:  # it brings torch, which takes seconds: the node is there before it is configured
    from decoupled_policy_ros.policy.policy import Policy
    from decoupled_policy_ros.runtime.engine import Engine

#: How long one thread's Python may keep another's waiting (s). At Python's own 5 ms commands come late by several times
#: that while a task is being loaded.
SWITCH_S = 0.001
SUCCESS = TransitionCallbackReturn.SUCCESS
CLOCK_CHANGES = (ClockChange.ROS_TIME_ACTIVATED, ClockChange.ROS_TIME_DEACTIVATED)


class PolicyNode(LifecycleNode):
    """Runs one task's policy on one robot."""

    def __init__(self, **options: Any) -> None:
        super().__init__('policy_node', **options)
        self.settings = declare_settings(self, PolicySettings)
        self.loop: PolicyLoop | None = None
        self.outputs: PolicyOutputs | None = None
        self._clock_watch = ClockWatch()
        self._all_threads = 0
        self.others = OtherCommanders(self, self._on_other_commander)
        self._status = self.create_publisher(DiagnosticStatus, '~/status', LATCHED)
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', 10)
        self._cycles = CycleOutput(self)
        self.create_service(SetBool, '~/enable', self._on_enable)
        self.tasks = PolicyTasks(self, self._now_ns, self._engine_of, self._publish_diagnostics)
        # Diagnostics go on when simulated time stands still.
        self.create_timer(1.0, self._look_around, clock=Clock(clock_type=ClockType.STEADY_TIME))
        any_step = {'min_forward': Duration(nanoseconds=1), 'min_backward': Duration(nanoseconds=-1)}
        threshold = JumpThreshold(**any_step, on_clock_change=True)
        self._jumps = self.get_clock().create_jump_callback(threshold, post_callback=self._on_time_jump)
        # rclpy raises out of the executor when the requested transition doesn't fit the state.
        self._change_state = self._service_change_state.callback
        self._service_change_state.callback = self._on_change_state
        self._say_state('unconfigured')
        if self.settings.autostart:
            self._autostart = self.create_timer(0.0, self._start_by_itself)

    # --- transitions ----------------------------------------------------------------------------

    @logged
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load robot, backbone and task, check that they belong together, subscribe, and warm up."""
        import torch

        from decoupled_policy_ros.policy.checkpoint import load_policy

        self._go_on()
        settings = self.settings = read_settings(self, PolicySettings)
        if settings.lockstep and not self.get_parameter('use_sim_time').value:
            raise ConfigError('lockstep is for simulated time: set use_sim_time too')
        cores = read_cores(settings.cores)
        self._all_threads = self._all_threads or torch.get_num_threads()  # of a process that was never told
        torch.set_num_threads(settings.threads or len(cores) or self._all_threads)
        robot = read_robot(self, settings.robot, settings.robot_description_timeout_s)
        streaming, joining = loop_settings(settings, cores), join_settings(asdict(settings))
        policy = load_policy(settings.task, robot, settings.backbone or None)
        self._go_on()
        engine = self._engine_of(policy, settings.instruction)
        self.outputs = PolicyOutputs(self, robot, self._status, settings)
        self._cycles.describe(engine, robot, settings, self.outputs)
        log = CycleLog(self._cycles.publish, self._cycles.run)
        steering, joints = policy_steering(robot, settings, self.outputs, self._now_ns, log)
        self.outputs.publish_guard(steering.guard)
        self.others.watch(self.outputs.said())
        qos = STATE if settings.lockstep else SENSOR  # a lost picture would make a simulator wait in vain
        inputs = Inputs(self, robot, policy.contract, qos, self._on_observed, joints)
        self.loop = PolicyLoop(
            engine,
            Sampler(policy.contract, inputs.buffers),
            self.outputs,
            self._now_ns,
            streaming,
            inputs.explain,
            self._on_failure,
            steering,
            log,
            joining,
            self._forget_observed,
        )
        self.outputs.on_lost_goal(self.loop.interrupt)
        self.tasks.follow(engine, inputs, self.loop, settings)
        self._say_state('inactive')
        self.get_logger().info(
            f'task {policy.task.name!r} ({engine.instruction!r}) on backbone {policy.backbone.name!r} for robot '
            f'{robot.name!r}: streams {", ".join(policy.contract.names)}'
        )
        return SUCCESS

    @logged
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin to command."""
        assert self.loop is not None
        super().on_activate(state)
        self.tasks.clear()
        self.loop.start(self.settings.enabled)
        self._on_other_commander(self.others.commanding())
        return SUCCESS

    @logged
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End every command before this returns."""
        assert self.loop is not None
        self.loop.enable(False)  # while it can still say how to come to rest
        self.loop.stop()
        super().on_deactivate(state)
        self._say_state('inactive')
        return SUCCESS

    @logged
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Forget the policy."""
        self._release()
        self._say_state('unconfigured')
        return SUCCESS

    @logged
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End every command and forget the policy."""
        self._release()
        self._say_state('finalized')
        return SUCCESS

    def wind_down(self) -> None:
        """Bring the arm to rest, while commands can still be sent: the process is about to end."""
        if (loop := self.loop) is not None:
            with suppress(RCLError, InvalidHandle):  # the node may be on its way out by itself
                loop.enable(False)

    def give_up(self, reason: str) -> None:
        """Forget the policy because a transition failed; ~/status is latched: it must not keep what was said before."""
        self._release()
        self._say_state(reason, FAILED)

    def _release(self) -> None:
        if self.loop is not None:
            if self.context.ok():  # else nothing can be said any more
                self.wind_down()
            self.loop.stop()
        self.tasks.close()
        if self.outputs is not None:
            self.outputs.close()
        self.others.close()
        self.loop = self.outputs = None

    def _go_on(self) -> None:
        """Raise ExternalShutdownException if Ctrl-C has come: what takes long need not be done any more."""
        if not self.context.ok():
            raise ExternalShutdownException

    def _engine_of(self, policy: Policy, instruction: str) -> Engine:
        """What runs a policy; the first cycle will be as fast as the rest."""
        from decoupled_policy_ros.runtime.engine import Engine

        settings = self.settings
        engine = Engine(
            policy,
            settings.denoising_steps,
            settings.seed,
            settings.device,
            instruction=instruction,
            precision=settings.precision,
            shared_noise=settings.shared_noise,
        )
        engine.warm_up(samples=self.settings.samples)
        return engine

    def _start_by_itself(self) -> None:
        self.destroy_timer(self._autostart)
        if self.trigger_configure() == SUCCESS:
            self.trigger_activate()

    def destroy_node(self) -> None:
        """Stop the threads, then the node."""
        self._release()
        super().destroy_node()

    def _on_change_state(
        self, request: ChangeState.Request, response: ChangeState.Response
    ) -> ChangeState.Response:
        try:
            return self._change_state(request, response)
        except RCLError:
            if not self.context.ok():
                raise  # Ctrl-C came in the middle of it
            transition = request.transition.label or request.transition.id
            self.get_logger().error(f'no transition {transition!r} from state {self.state_label!r}')
            response.success = False
            return response

    # --- what it is asked -----------------------------------------------------------------------

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        if self.loop is None or self.state_label != 'active':
            response.success, response.message = False, f'the node is {self.state_label}: activate it first'
            return response
        others = self.others.commanding()
        if request.data and others and self.settings.other_commanders == 'give_way':
            way_out = 'disable it first, for instance by its ~/enable with false'
            response.success, response.message = False, f'{others}; {way_out}'
            return response
        if not self.loop.enable(request.data):
            reason = f'{self.loop.state}: {self.loop.reason}; deactivate and activate to start again'
            response.success, response.message = False, reason
            return response
        if not request.data:
            self.tasks.clear()  # whoever enables again starts from what was seen since
        response.success, response.message = True, self.loop.state
        return response

    # --- what it hears --------------------------------------------------------------------------

    @property
    def state_label(self) -> str:
        """Lifecycle state: unconfigured, inactive, active, ..."""
        return str(self._state_machine.current_state[1])

    @property
    def inputs(self) -> Inputs | None:
        """What the task that is followed sees by; None before there is one."""
        return self.tasks.inputs

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)

    def _on_observed(self) -> None:
        if self.loop is not None:
            self.loop.notify_observed()

    def _on_time_jump(self, jump: TimeJump) -> None:
        loop = self.loop
        if loop is None:
            return
        back_s, other = -jump.delta.nanoseconds / 1e9, jump.clock_change in CLOCK_CHANGES
        if back_s > 0 or other:
            what = 'use_sim_time was changed' if other else f'the clock went back by {back_s:.3f} s'
            self.get_logger().warning(f'{what}: starting afresh')
            loop.restart()
        loop.notify_ticked()

    def _forget_observed(self) -> None:
        """Forget what was observed before the clock went back: the loop tells, for it sees a wall clock do so too."""
        self.tasks.clear()
        if self.outputs is not None:
            self.outputs.clear()

    def _on_other_commander(self, others: str) -> None:
        if others:
            self.get_logger().warning(others)
        if others and self.loop is not None and self.settings.other_commanders == 'give_way':
            self.loop.enable(False, GAVE_WAY, f'{others}; ~/enable starts again')

    def _on_failure(self, error: Exception) -> None:
        if self.context.ok():  # a command that met Ctrl-C is no failure
            text = ''.join(traceback.format_exception(error))
            self.get_logger().fatal(f'the policy stopped; deactivate and activate to start it again\n{text}')

    # --- what it says ---------------------------------------------------------------------------

    def _say_state(self, reason: str, state: str = DISABLED) -> None:
        """Say what becomes of commands while there is no policy, now and in the diagnostics."""
        self._unfollowed = state, reason
        self._status.publish(status_message(diagnostics_name(self, 'policy'), state, reason))

    def _look_around(self) -> None:
        self._clock_watch.look(self._now_ns())
        self._publish_diagnostics()

    def _publish_diagnostics(self) -> None:
        loop, inputs, outputs = self.loop, self.inputs, self.outputs
        message = DiagnosticArray()
        message.header.stamp = self.get_clock().now().to_msg()
        name, streams = diagnostics_name(self, 'policy'), diagnostics_name(self, 'streams')
        values = {'lifecycle': self.state_label, 'other_commanders': self.others.present()}
        values |= self.tasks.values()
        if loop is None or inputs is None or outputs is None:
            message.status = [status_message(name, *self._unfollowed, values)]
        else:
            state, reason, numbers, ages_s = loop.report()
            if not self.settings.lockstep and state in (FOLLOWING, HOLDING, WAITING):
                state, reason = self._clock_watch.trouble() or (state, reason)
            message.status = [
                status_message(name, state, reason, values | numbers | outputs.values()),
                inputs.status(streams, self._now_ns(), ages_s),
            ]
            if self.state_label == 'active':
                self._status.publish(message.status[0])
        self._diagnostics.publish(message)


def main() -> int:
    """Console entry point."""
    sys.setswitchinterval(SWITCH_S)
    return spin_main(PolicyNode)


if __name__ == '__main__':
    raise SystemExit(main())
