"""Backbone + Task + Robot = Policy: three objects with three lifetimes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from decoupled_policy_ros.errors import CheckpointError, ConfigError
from decoupled_policy_ros.observation.contract import ObservationContract
from decoupled_policy_ros.policy.backbones import Denoiser
from decoupled_policy_ros.policy.conditioning import conditioning_for
from decoupled_policy_ros.policy.diffusion import NoiseSchedule
from decoupled_policy_ros.policy.encoders import ObservationEncoder
from decoupled_policy_ros.policy.language import INSTRUCTION, InstructionEncoder, checked_instruction
from decoupled_policy_ros.policy.normalisation import ActionNormaliser
from decoupled_policy_ros.policy.sampling import Sampler
from decoupled_policy_ros.policy.schedule import Schedule
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.fingerprint import Fingerprint


def understood(
    task: str, instructions: Sequence[str], has_language: bool, instruction: str | None = None
) -> str:
    """The instruction that a task would follow: the only one where none is given.

    Args:
        task: its name, for messages.
        instructions: that it was trained on.
        has_language: it can make sense of others too.
        instruction: the one that is asked for.

    Raises:
        ConfigError: none is given and there are several, or it is none that the task understands.
    """
    instructions = [known.strip() for known in instructions]  # older files have them as they were written
    if not instruction:
        if len(instructions) > 1:
            valid = ', '.join(map(repr, instructions))
            raise ConfigError(f'task {task!r} has several instructions, say which to follow: {valid}')
        return instructions[0]
    text = checked_instruction(instruction)
    if not has_language and instructions[0] and text != instructions[0]:
        raise ConfigError(f'instruction {text!r} is not what the task was trained on: {instructions[0]!r}')
    return text


class Backbone(nn.Module):
    """What all tasks of an arm share: denoiser, timestep projection, schedule, action statistics.

    Attributes:
        fingerprint: the kinematics that Stage 1 was trained on.
        provenance: data, steps, seed and versions, as written in the file.
        sha256: identity of the saved file; None for one that was never saved.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        fingerprint: Fingerprint,
        schedule: Schedule | None = None,
        name: str = 'backbone',
        provenance: dict | None = None,
    ):
        super().__init__()
        self.denoiser = denoiser
        self.normaliser = ActionNormaliser()
        self.fingerprint = fingerprint
        self.schedule: Schedule = schedule or NoiseSchedule()
        self.name = name
        self.provenance = provenance or {}
        self.sha256: str | None = None

    def freeze(self) -> Backbone:
        """No gradients and no dropout: freezing alone would leave dropout on."""
        self.requires_grad_(False)
        return self.eval()


class Task(nn.Module):
    """What one skill adds to a backbone: encoders, conditioning, instruction, observation contract.

    Args:
        instruction: the only one, of a task without language.
        language: where several instructions are told apart; they are its own.

    Attributes:
        instruction: the one that is followed where none is given; empty where there are several.
        instructions: all that it was trained on.
        backbone_name, backbone_sha256: the only backbone that this task fits.
        sha256: identity of the saved file; None for one that was never saved.

    Raises:
        ConfigError: the backbone's chunks are too short for what is to be executed of them.
    """

    def __init__(
        self,
        contract: ObservationContract,
        backbone: Backbone,
        encoder: dict | None = None,
        name: str = 'task',
        instruction: str = '',
        n_execute: int = 8,
        provenance: dict | None = None,
        language: InstructionEncoder | None = None,
    ):
        super().__init__()
        longest = backbone.denoiser.horizon - (contract.n_obs_steps - 1)
        if not 1 <= n_execute <= longest:
            raise ConfigError(
                f'n_execute is {n_execute}, but of chunks of {backbone.denoiser.horizon} waypoints that begin with '
                f'{contract.n_obs_steps} observation steps 1 to {longest} can be executed'
            )
        self.contract = contract
        self.encoder = ObservationEncoder(contract, **(encoder or {}), language=language)
        self.conditioning = conditioning_for(
            backbone.denoiser, contract.n_obs_steps, self.encoder.feature_dim // contract.n_obs_steps
        )
        self.name = name
        self.instructions = (instruction,) if language is None else language.instructions
        self.instruction = self.instructions[0] if len(self.instructions) == 1 else ''
        self.n_execute = n_execute
        self.backbone_name = backbone.name
        self.backbone_sha256 = backbone.sha256
        self.fingerprint = backbone.fingerprint
        self.provenance = provenance or {}
        self.sha256: str | None = None

    def understood(self, instruction: str | None = None) -> str:
        """The instruction to follow: the only one where none is given.

        Raises:
            ConfigError: none is given and there are several, or it is none that this task understands.
        """
        return understood(self.name, self.instructions, self.encoder.language is not None, instruction)

    def spoken(self, instruction: str | None = None) -> dict[str, Tensor]:
        """What an instruction adds to an observation: its embedding (1, dim); nothing in a task without language.

        Raises:
            ConfigError: see `understood`, and `InstructionEncoder.embedding` for one that it was not trained on.
        """
        text = self.understood(instruction)
        if self.encoder.language is None:
            return {}
        return {INSTRUCTION: self.encoder.language.embedding(text)[None]}

    def modulation(self, tau: Tensor, observation: dict[str, Tensor]) -> Tensor:
        """Naive modulation (B, ...) of timestep embeddings (B, w) and observations."""
        return self.conditioning(tau, self.encoder(observation))


@dataclass
class Policy:
    """A matching backbone, task and robot.

    Raises:
        CheckpointError: the task was trained on another backbone; both hashes are in the message.
        FingerprintMismatch: backbone and robot differ in kinematics; both values are in the message.
    """

    backbone: Backbone
    task: Task
    robot: RobotDescription
    contract: ObservationContract = field(init=False)
    n_execute: int = field(init=False)

    def __post_init__(self) -> None:
        if self.task.backbone_sha256 != self.backbone.sha256:
            raise CheckpointError(
                f'task {self.task.name!r} was trained on backbone {self.task.backbone_name!r} with sha256 '
                f'{self.task.backbone_sha256}, but backbone {self.backbone.name!r} has {self.backbone.sha256}'
            )
        self.contract, self.n_execute = self.task.contract, self.task.n_execute
        expected = Fingerprint.of(self.robot, self.contract.rate_hz)
        self.backbone.fingerprint.require_equal(
            expected, what=f'backbone {self.backbone.name!r}', other_what=f'robot {self.robot.name!r}'
        )
        self.backbone.freeze()
        self.task.requires_grad_(False)
        self.task.eval()

    @torch.inference_mode()
    def predict_naive(
        self,
        observation: dict[str, Tensor],
        noise: Tensor,
        steps: int,
        sampler: str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Reference chunk (B, horizon, 10): all of the network in every denoising step, nothing cached.

        Args:
            observation: dict of (B, n_obs_steps, ...) tensors; with language `Task.spoken` besides.
            noise: (B, horizon, 10), standard normal.
            steps: denoising steps.
            sampler, generator: see `Sampler`.
        """
        denoiser, reverse = self.backbone.denoiser, Sampler(self.backbone.schedule, steps, sampler)

        def predict(i: int, x: Tensor) -> Tensor:
            tau = denoiser.tau(torch.full((len(x),), reverse.ks[i], device=x.device))
            return denoiser(x, self.task.modulation(tau, observation))

        return self.backbone.normaliser.inverse(reverse.run(predict, noise, generator))
