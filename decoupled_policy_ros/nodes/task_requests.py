"""What may be asked of a policy that is running, and what it takes to do it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.nodes.policy_inputs import Inputs
from decoupled_policy_ros.observation.contract import ObservationContract
from decoupled_policy_ros.observation.sources import stream_sources
from decoupled_policy_ros.runtime.background import Job
from decoupled_policy_ros.runtime.exchange import Exchangeable
from decoupled_policy_ros.runtime.swap import SwapTimes

if TYPE_CHECKING:  # it brings torch, which takes seconds: the node is there before it is configured
    from decoupled_policy_ros.policy.policy import Policy
    from decoupled_policy_ros.runtime.engine import Engine

#: Parameters that may be set while a policy is loaded.
LIVE = ('task', 'instruction')


@dataclass(frozen=True)
class Request:
    """What somebody asked for.

    Attributes:
        task: value of the parameter; None for another instruction to the task that is followed.
        instruction: what to do; empty for the only instruction of a task.
        contract: of the task.
    """

    task: str | None
    instruction: str
    contract: ObservationContract | None = None

    def __str__(self) -> str:
        return f'instruction {self.instruction!r}' if self.task is None else f'task {self.task!r}'

    def load(self, policy: Policy) -> Policy:
        """The task on the backbone and the robot that a policy has in use: neither is read again.

        Raises:
            DecoupledPolicyError: it can't be followed.
        """
        from decoupled_policy_ros.policy.checkpoint import find_model, load_task

        assert self.task is not None
        task = load_task(find_model('tasks', self.task), policy.backbone)
        if task.contract != self.contract:
            raise ConfigError(f'{self} was replaced while it was being loaded; ask for it again')
        return type(policy)(policy.backbone, task, policy.robot)


@dataclass
class Followed:
    """What is followed, and the values of the parameters that stand for it."""

    engine: Engine
    inputs: Inputs
    loop: Exchangeable
    task: str
    instruction: str


@dataclass
class Outcome:
    """What has become of a request: followed, with what it took, or refused for a reason, or neither.

    `followed` is what the node had been configured with when it was made: it is of no interest to any later one.
    """

    job: Job
    followed: Followed
    request: Request
    inputs: Inputs | None
    engine: Engine | None = None
    times: SwapTimes | None = None
    refusal: str = ''


def requested(values: Mapping[str, Any], engine: Engine) -> Request:
    """What values of `LIVE` parameters ask for, of a node that follows an engine; takes milliseconds.

    Raises:
        DecoupledPolicyError: it can be seen without reading weights that it can't be followed.
    """
    from decoupled_policy_ros.policy.checkpoint import summarise_task
    from decoupled_policy_ros.policy.policy import understood

    policy = engine.policy
    if 'task' not in values:
        policy.task.understood(values['instruction'])
        return Request(None, values['instruction'])
    summary = summarise_task(values['task'], policy.backbone)
    instruction = values.get('instruction')
    if instruction is None:
        # Where one of several has to be said, go on with the same words if they are among them.
        same = len(summary.instructions) > 1 and engine.instruction in summary.instructions
        instruction = engine.instruction if same else ''
    understood(summary.name, summary.instructions, summary.has_language, instruction)
    stream_sources(policy.robot, summary.contract)
    return Request(values['task'], instruction, summary.contract)


def spoken_request(text: str, engine: Engine) -> Request:
    """What a text on `~/instruction` asks for.

    Raises:
        ConfigError: it is empty, too long, or none that the task understands.
    """
    from decoupled_policy_ros.policy.language import checked_instruction

    return Request(None, engine.policy.task.understood(checked_instruction(text)))
