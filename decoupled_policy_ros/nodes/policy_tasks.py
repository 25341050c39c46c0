"""Which task policy_node follows, and how that changes while it runs: by the parameter `task`, and by instructions.

A request is refused at once where the header of the task's file already says that it can't be followed. Otherwise it
is loaded in a thread, and what has become of it is taken note of by the executor's thread, as everything else here.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

from rcl_interfaces.msg import SetParametersResult
from rclpy.lifecycle import LifecycleNode
from rclpy.parameter import Parameter
from std_msgs.msg import String

from decoupled_policy_ros.errors import ConfigError, DecoupledPolicyError
from decoupled_policy_ros.nodes.common import require_choices
from decoupled_policy_ros.nodes.policy_inputs import Inputs
from decoupled_policy_ros.nodes.policy_settings import PolicySettings
from decoupled_policy_ros.nodes.task_requests import (
    LIVE,
    Followed,
    Outcome,
    Request,
    requested,
    spoken_request,
)
from decoupled_policy_ros.observation.sampler import Sampler
from decoupled_policy_ros.runtime.background import Background, Job
from decoupled_policy_ros.runtime.exchange import Exchangeable
from decoupled_policy_ros.runtime.swap import Dropped, SwapTimes, change_instruction, swap_task

if TYPE_CHECKING:  # it brings torch, which takes seconds: the node is there before it is configured
    from decoupled_policy_ros.policy.policy import Policy
    from decoupled_policy_ros.runtime.engine import Engine

#: How long to wait for the thread at the end (s): a sentence model that is being loaded can't be interrupted.
CLOSE_S = 5.0


class PolicyTasks:
    """Takes requests from the parameters and from `~/instruction`.

    Args:
        node: has the parameters.
        now_ns: its clock.
        engine_of: an engine for a policy and an instruction, warmed up.
        report: called when there is something new in `values`.
    """

    def __init__(
        self,
        node: LifecycleNode,
        now_ns: Callable[[], int],
        engine_of: Callable[[Policy, str], Engine],
        report: Callable[[], None],
    ):
        self._node, self._now_ns, self._engine_of, self._report = node, now_ns, engine_of, report
        self._followed: Followed | None = None
        self._background: Background | None = None
        self._pending: tuple[Job, Request, Inputs | None] | None = None
        self._candidates: list[Inputs] = []
        self._outcomes: deque[Outcome] = deque()
        self._examined: Request | None = None
        self._setting = False
        self._say, self._times, self._swaps = 'none', SwapTimes(), 0
        self._refused_tasks = self._refused_instructions = 0
        self._noticed = node.create_guard_condition(self._notice)
        node.add_on_set_parameters_callback(self._examine)
        node.add_post_set_parameters_callback(self._begin_examined)
        node.create_subscription(String, '~/instruction', self._on_instruction, 10)

    # --- what is followed -----------------------------------------------------------------------

    def follow(self, engine: Engine, inputs: Inputs, loop: Exchangeable, settings: PolicySettings) -> None:
        """Begin with what configure has loaded."""
        self._followed = Followed(engine, inputs, loop, settings.task, settings.instruction)
        self._timeout_s = settings.task_timeout_s
        self._background = Background('policy_tasks')
        self._say = 'none'

    @property
    def inputs(self) -> Inputs | None:
        """What the task that is followed sees by."""
        return self._followed.inputs if self._followed is not None else None

    @property
    def instruction(self) -> str:
        """The instruction that is followed; empty before there is a policy."""
        return self._followed.engine.instruction if self._followed is not None else ''

    def clear(self) -> None:
        """Forget what was observed, for the task that is followed and for the one that is being loaded."""
        for inputs in self._all_inputs():
            inputs.clear()

    def close(self) -> None:
        """Drop what is being loaded, and unsubscribe."""
        if self._background is not None:
            self._background.close(CLOSE_S)
        for inputs in self._all_inputs():
            inputs.close()
        self._candidates.clear()
        self._outcomes.clear()
        self._followed = self._background = self._pending = None

    def values(self) -> dict[str, str]:
        """For diagnostics: the task, its instruction, what has become of the last request, and what it took."""
        task = self._followed.task if self._followed is not None else ''
        return {
            'task': task,
            'instruction': self.instruction,
            'refused_instructions': str(self._refused_instructions),
            'refused_tasks': str(self._refused_tasks),
            'task_swap': self._say,
            'task_swaps': str(self._swaps),
            'task_load_ms': f'{self._times.load_ms:.1f}',
            'task_wait_ms': f'{self._times.wait_ms:.1f}',
            'task_swap_ms': f'{self._times.swap_ms:.3f}',
        }

    # --- what is asked for ----------------------------------------------------------------------

    def _examine(self, parameters: list[Parameter]) -> SetParametersResult:
        """Whether parameters may be set: quick, for the executor waits."""
        ours = {field.name for field in fields(PolicySettings)}
        values = {parameter.name: parameter.value for parameter in parameters if parameter.name in ours}
        if not self._setting:
            self._notice()  # it is examined beside what is followed now
        self._examined = None
        try:
            require_choices(PolicySettings, values)
        except ConfigError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if self._followed is None or self._setting or not values:
            return SetParametersResult(successful=True)
        fixed = sorted(values.keys() - set(LIVE))
        if fixed:
            state = self._node.state_label  # type: ignore[attr-defined]
            reason = f'{", ".join(fixed)}: read by configure, and the node is {state}; clean up first'
            return SetParametersResult(successful=False, reason=reason)
        try:
            self._examined = requested(values, self._followed.engine)
        except (DecoupledPolicyError, OSError, TypeError, ValueError) as error:
            self._refuse('task' in values, str(error))
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _begin_examined(self, _: list[Parameter]) -> None:
        request, self._examined = self._examined, None
        if request is not None:
            self._begin(request)

    def _on_instruction(self, message: String) -> None:
        self._notice()
        if self._followed is None:
            return
        try:
            if self._pending is not None and self._pending[1].task is not None:
                raise ConfigError(f'{self._pending[1]} is being loaded: say it again when that is followed')
            request = spoken_request(message.data, self._followed.engine)
        except ConfigError as error:
            self._refuse(False, str(error))
            return
        if request.instruction != self.instruction or self._pending is not None:
            self._begin(request)

    # --- how it is done -------------------------------------------------------------------------

    def _begin(self, request: Request) -> None:
        """Load what was asked for, in place of anything that is being loaded."""
        followed, background = self._followed, self._background
        assert followed is not None and background is not None
        inputs = None
        if request.contract is not None:
            inputs = followed.inputs.succeeded_by(request.contract)  # it listens from now on
            self._candidates.append(inputs)
        job = background.submit(lambda job: self._work(job, request, followed, inputs))
        before, self._pending = self._pending, (job, request, inputs)
        if before is not None and before[0].overtaken and before[2] is not None:
            self._candidates.remove(before[2])  # no outcome will tell of it
            before[2].close(self._all_inputs())
        self._say = f'loading {request}'
        if inputs is not None:
            self._report()

    def _work(self, job: Job, request: Request, followed: Followed, inputs: Inputs | None) -> None:
        """In the background."""
        outcome = Outcome(job, followed, request, inputs)

        def done(engine: Engine | None, times: SwapTimes) -> None:
            outcome.engine, outcome.times = engine, times
            self._hand_in(outcome)

        def load() -> Engine:
            return self._engine_of(request.load(followed.engine.policy), request.instruction)

        try:
            if inputs is None or request.contract is None:
                change_instruction(job, followed.loop, request.instruction, done)
            else:
                sampler = Sampler(request.contract, inputs.buffers)
                swap_task(
                    job, followed.loop, load, sampler, inputs.explain, self._now_ns, self._timeout_s, done
                )
            return
        except Dropped:
            pass
        except DecoupledPolicyError as error:
            outcome.refusal = str(error)
        except Exception as error:  # a thread would die in silence
            outcome.refusal = f'{type(error).__name__}: {error}'
            self._node.get_logger().error(f'{request}: {traceback.format_exc()}')
        self._hand_in(outcome)

    def _hand_in(self, outcome: Outcome) -> None:
        if outcome.followed is self._followed:  # otherwise the node has been cleaned up meanwhile
            self._outcomes.append(outcome)
            self._noticed.trigger()

    def _notice(self) -> None:
        """Take note of what the background has done."""
        while self._outcomes:
            outcome = self._outcomes.popleft()
            if outcome.followed is self._followed:
                self._take(outcome, outcome.followed)

    def _take(self, outcome: Outcome, followed: Followed) -> None:
        newest = self._pending is not None and self._pending[0] is outcome.job
        if newest:
            self._pending = None
        if outcome.inputs in self._candidates:
            self._candidates.remove(outcome.inputs)
        left = outcome.inputs
        if outcome.engine is not None and outcome.times is not None:
            followed.engine, followed.instruction = outcome.engine, outcome.request.instruction
            if outcome.inputs is not None and outcome.request.task is not None:
                followed.inputs, left = outcome.inputs, followed.inputs
                followed.task = outcome.request.task
            self._times, self._swaps = outcome.times, self._swaps + 1
        if left is not None:
            left.close(self._all_inputs())
        if outcome.refusal:
            self._refuse(outcome.request.task is not None, outcome.refusal)
        elif outcome.engine is not None and newest:
            self._tell(f'following {outcome.request}')
        if newest:
            self._set_parameters(followed)

    def _set_parameters(self, followed: Followed) -> None:
        """Let the parameters say what is followed."""
        values = {'task': followed.task, 'instruction': followed.instruction}
        changed = [
            Parameter(name, value=value)
            for name, value in values.items()
            if self._node.get_parameter(name).value != value
        ]
        self._setting = True
        try:
            if changed:
                self._node.set_parameters(changed)
        finally:
            self._setting = False

    def _all_inputs(self) -> list[Inputs]:
        return [*self._candidates, *([self._followed.inputs] if self._followed is not None else [])]

    def _refuse(self, is_task: bool, reason: str) -> None:
        self._say = f'refused: {reason}'
        if is_task:
            self._refused_tasks += 1
            self._node.get_logger().warning(f'task refused: {reason}')
            self._report()
        else:  # many may come: the next diagnostics tell
            self._refused_instructions += 1
            self._node.get_logger().warning(f'instruction refused: {reason}', throttle_duration_sec=2.0)

    def _tell(self, what: str) -> None:
        self._node.get_logger().info(what)
        self._say = what
        self._report()
