"""Stage 2 (a task on a frozen backbone) and normal training (both at once)."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from decoupled_policy_ros.errors import TrainingError
from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.policy.checkpoint import find_model, load_backbone, save_backbone, save_task
from decoupled_policy_ros.policy.encoders import ImageEncoder, VectorEncoder
from decoupled_policy_ros.policy.language import INSTRUCTION, InstructionEncoder
from decoupled_policy_ros.policy.policy import Backbone, Task
from decoupled_policy_ros.robot.description import RobotDescription, load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.robot.poses import POSITION
from decoupled_policy_ros.training.config import Stage2Config
from decoupled_policy_ros.training.loop import Trainer
from decoupled_policy_ros.training.network import DEFAULT_BACKBONE, new_backbone, require_as_chosen
from decoupled_policy_ros.training.report import write_report
from decoupled_policy_ros.training.runs import (
    data_sha256,
    diffusion_loss,
    identity_of,
    prepare,
    provenance_of,
    weights_sha256,
)
from decoupled_policy_ros.training.sources import (
    DemonstrationWindows,
    load_demonstrations,
    open_dataset,
)
from decoupled_policy_ros.training.validation import HeldOut, Rollouts, Validator, Write

RANGE_TOLERANCE_M = 1e-3


def train_task(config: Stage2Config, out: Path, normal: bool = False) -> str:
    """Train a task on a frozen backbone (Stage 2), or both together from nothing (normal).

    Returns:
        sha256 of the task written to `out`; '' in all but the first of several processes. The backbone of a normal
        or random-frozen run is written to `out`/backbone, and the best weights with `validation` to `out`/best.

    Raises:
        TrainingError: the frozen backbone's bytes changed, none was named, or a demonstration was commanded to
            positions that it can't express.
        FingerprintMismatch: backbone, dataset and robot differ in kinematics or rate.
    """
    robot = load_robot(config.robot)
    config = config.model_copy(update={'optimisation': prepare(config.optimisation)})
    optimisation = config.optimisation
    torch.manual_seed(optimisation.seed)
    backbone = _starting_backbone(config, robot, normal)
    data = load_demonstrations(config, backbone.denoiser.horizon, robot, backbone.fingerprint.rate_hz)
    if backbone.sha256 is None:
        backbone.normaliser.fit(data.actions)
    _require_within_reach(backbone, data.actions, config)
    task = _new_task(config, backbone, data, robot)
    before = weights_sha256(backbone)
    module = nn.ModuleDict({'task': task, 'backbone': backbone}) if normal else task
    module.to(optimisation.device)
    backbone.to(optimisation.device)
    content = data_sha256({**data.streams, 'action': data.actions})
    identity = identity_of(
        config, normal=str(normal), backbone=before, data_sha256=content, episodes_sha256=data.episodes_sha256
    )
    if task.encoder.language is not None:
        identity['sentence_model'] = str(task.encoder.language.config['sha256'])
    files = _Files(config, task, backbone, 'normal' if normal else 'stage2', data.provenance)
    loss = _task_loss(task, backbone, data, config)
    draw = partial(data.draw, optimisation.batch_size)
    trainer = Trainer(module, lambda: loss(draw()), optimisation, out, identity, task.encoder)
    write = partial(files.write_copy, trainer=trainer)
    trainer.validator = _validator(config, data, backbone, out, loss, write)
    trainer.run()
    after = weights_sha256(backbone)
    if not normal and after != before:
        raise TrainingError(f'the frozen backbone changed: {before} before, {after} after')
    if not trainer.is_main:
        return ''
    sha256 = files.write(out, trainer)
    hashes = {'before': before, 'after': after}
    result = {'task_sha256': sha256, 'backbone_sha256': backbone.sha256, 'backbone_weights_sha256': hashes}
    write_report(out, files.stage, config, trainer, result)
    return sha256


@dataclass
class _Files:
    """What is written of a task: itself, and its backbone where that has no file of its own."""

    config: Stage2Config
    task: Task
    backbone: Backbone
    stage: str
    data: dict

    def write_copy(self, folder: Path, note: dict[str, object], trainer: Trainer) -> None:
        """Write copies of all: what writing sets is not set in what is still trained."""
        copied = replace(self, task=deepcopy(self.task), backbone=deepcopy(self.backbone))
        copied.write(folder, trainer, note)

    def write(self, folder: Path, trainer: Trainer, note: dict[str, object] | None = None) -> str:
        """Write all; returns the task's sha256."""
        task, backbone = self.task, self.backbone
        task.provenance = provenance_of(self.stage, self.data, trainer)
        if note:
            task.provenance['validation'] = note
        if backbone.sha256 is None:
            random = {'stage': 'none: random weights', 'seed': self.config.optimisation.seed}
            backbone.provenance = task.provenance if self.stage == 'normal' else random
            task.backbone_sha256 = save_backbone(folder / 'backbone', backbone.cpu())
        return save_task(folder, task.cpu(), self.config.storage)


def _validator(
    config: Stage2Config,
    data: DemonstrationWindows,
    backbone: Backbone,
    out: Path,
    loss: Callable[[Tensor], Tensor],
    write: Write,
) -> Validator | None:
    """What the section `validation` asks for; takes the demonstrations that it holds out from the others."""
    validation = config.validation
    if validation is None:
        return None
    if validation.held_out is None:
        return Rollouts(config, validation, backbone.schedule.config.training_steps, out, write)
    windows = data.hold_out(validation.held_out)
    data.provenance['held_out'] = len(data.held_out)
    return HeldOut(validation, out, write, windows, loss, config.optimisation.batch_size)


def _starting_backbone(config: Stage2Config, robot: RobotDescription, normal: bool) -> Backbone:
    """The backbone to train a task on: frozen, from its file or random; or a new one that learns too."""
    if normal and config.random_backbone:
        raise TrainingError(
            'random_backbone freezes a backbone, and normal training trains it: leave it out, or train stage2'
        )
    if not normal and not config.random_backbone:
        if not isinstance(config.backbone, str):
            raise TrainingError(
                f'stage2 needs `backbone`, a folder or a name in models/backbones, got {config.backbone}; or '
                '`random_backbone: true` for one that saw no Stage 1'
            )
        backbone = load_backbone(find_model('backbones', config.backbone))
        backbone.fingerprint.require_equal(
            Fingerprint.of(robot, backbone.fingerprint.rate_hz),
            what=f'backbone {backbone.name!r}',
            other_what=f'robot {robot.name!r}',
        )
        require_as_chosen(backbone, config.conditioning, config.objective)
        return backbone
    if isinstance(config.backbone, str):
        raise TrainingError(
            f'backbone {config.backbone!r} has no use in normal or random-backbone training; give the kind and '
            'sizes of a new one, or leave it out'
        )
    fingerprint = Fingerprint.of(robot, open_dataset(config, robot).rate_hz)
    name = f'{config.name}_{"normal" if normal else "random"}'
    size = config.backbone or DEFAULT_BACKBONE
    backbone = new_backbone(size, config.conditioning, config.objective, fingerprint, name)
    return backbone if normal else backbone.freeze()


def _require_within_reach(backbone: Backbone, actions: Tensor, config: Stage2Config) -> None:
    """Sampling clips to the backbone's position range: what lies outside could be learned, but not done."""
    lower_m, upper_m = map(torch.tensor, backbone.normaliser.position_range_m)
    low_m, high_m = actions[:, POSITION].amin(0), actions[:, POSITION].amax(0)
    if (low_m < lower_m - RANGE_TOLERANCE_M).any() or (high_m > upper_m + RANGE_TOLERANCE_M).any():
        demonstrated, known = (
            ', '.join(
                f'{axis} {low:.3f}..{high:.3f}' for axis, low, high in zip('xyz', lows, highs, strict=True)
            )
            for lows, highs in ((low_m.tolist(), high_m.tolist()), (lower_m.tolist(), upper_m.tolist()))
        )
        raise TrainingError(
            f'{config.dataset} commands positions of {demonstrated} m, outside the {known} m that backbone '
            f'{backbone.name!r} can express; train the backbone on motion that covers them, or with position_range_m'
        )


def _new_task(
    config: Stage2Config, backbone: Backbone, data: DemonstrationWindows, robot: RobotDescription
) -> Task:
    contract = _contract_of(config, data.streams, backbone.fingerprint.rate_hz, robot)
    encoder = config.encoder.model_dump(exclude={'weights'})
    encoder['pretrained'] = config.encoder.weights is not None
    language = None
    if config.language is not None:
        language = InstructionEncoder.of(
            data.instructions, config.language.model, config.language.feature_dim
        )
    task = Task(
        contract, backbone, encoder, config.name, data.instructions[0], config.n_execute, language=language
    )
    for name, stream in task.encoder.streams.items():
        if isinstance(stream, VectorEncoder):
            stream.normaliser.fit(data.streams[name])
        elif isinstance(stream, ImageEncoder) and config.encoder.weights is not None:
            stream.load_weights(config.encoder.weights)
    return task


def _contract_of(
    config: Stage2Config, streams: dict[str, Tensor], rate_hz: float, robot: RobotDescription
) -> ObservationContract:
    """The observation contract that these demonstrations imply: what the policy must see when it runs."""

    def spec(name: str) -> StreamSpec:
        kind = (
            'image' if name in config.cameras else 'proprioception' if name == 'proprioception' else 'vector'
        )
        return StreamSpec(name, kind, tuple(streams[name].shape[1:]), config.max_age_s)

    near_quat_xyzw = None
    if 'proprioception' in streams:
        near_quat_xyzw = tuple(Proprioception(robot, Kinematics(robot)).near_quat_xyzw.tolist())
    specs = tuple(spec(name) for name in streams)
    return ObservationContract(rate_hz, config.n_obs_steps, specs, config.max_skew_s, near_quat_xyzw)


def _task_loss(
    task: Task, backbone: Backbone, data: DemonstrationWindows, config: Stage2Config
) -> Callable[[Tensor], Tensor]:
    """Prediction error of windows (B,) as a function of their numbers."""
    device, language = config.optimisation.device, task.encoder.language

    def loss(windows: Tensor) -> Tensor:
        frames, action_frames, instructions = data.at(windows)
        observation = {name: values[frames].to(device) for name, values in data.streams.items()}
        if language is not None:
            observation[INSTRUCTION] = language.embeddings[instructions.to(device)]
        features = task.encoder(observation)
        actions = data.actions[action_frames].to(device)
        return diffusion_loss(backbone, task.conditioning, actions, features, config.noise_samples)

    return loss
