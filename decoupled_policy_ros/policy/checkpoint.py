"""Backbones and tasks as files: what is written of each, and what has to match when it is read.

    models/backbones/<name>/  backbone.json  backbone.safetensors
    models/tasks/<name>/      task.json      task.safetensors

How such a pair of files is written and verified is in `model_files`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from decoupled_policy_ros.errors import CheckpointError, ConfigError
from decoupled_policy_ros.observation.contract import ObservationContract
from decoupled_policy_ros.policy.backbones import BACKBONES, Denoiser
from decoupled_policy_ros.policy.language import InstructionEncoder
from decoupled_policy_ros.policy.model_files import read_header_alone, read_model, write_model
from decoupled_policy_ros.policy.policy import Backbone, Policy, Task
from decoupled_policy_ros.policy.sampling import make_schedule
from decoupled_policy_ros.policy.schedule import ScheduleConfig
from decoupled_policy_ros.resources import find
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.fingerprint import Fingerprint

T = TypeVar('T')
#: Longest name or path of a model, in characters.
MAX_NAME = 1000
STORAGE = {'float32': torch.float32, 'float16': torch.float16}


def save_backbone(folder: Path | str, backbone: Backbone) -> str:
    """Write `folder`/backbone.{json,safetensors}; returns (and sets) the backbone's sha256."""
    header = {
        'name': backbone.name,
        'network': {'kind': backbone.denoiser.kind, **backbone.denoiser.config},
        'conditioning': {'kind': backbone.denoiser.mechanism},
        'schedule': backbone.schedule.config.to_dict(),
        'action': {'normalised': 'positions', 'position_range_m': backbone.normaliser.position_range_m},
        'fingerprint': backbone.fingerprint.to_dict(),
        'provenance': backbone.provenance,
    }
    backbone.sha256 = write_model(Path(folder), 'backbone', header, backbone.state_dict())
    return backbone.sha256


def save_task(folder: Path | str, task: Task, storage: str = 'float32') -> str:
    """Write `folder`/task.{json,safetensors}; returns (and sets) the task's sha256.

    Args:
        storage: 'float32', or 'float16' to halve the file; statistics, embeddings, biases and norms stay float32.
    """
    if task.backbone_sha256 is None:
        raise CheckpointError(
            f'task {task.name!r} can be saved only after its backbone was: it holds its hash'
        )
    buffers = {name for name, _ in task.named_buffers()}
    weights = {
        name: value.to(STORAGE[storage]) if value.dim() > 1 and name not in buffers else value
        for name, value in task.state_dict().items()
    }
    language = task.encoder.language
    header = {
        'name': task.name,
        'instruction': task.instruction,
        'backbone': {'name': task.backbone_name, 'sha256': task.backbone_sha256},
        'encoder': task.encoder.config,
        'language': language and {'instructions': language.instructions, **language.config},
        'conditioning': {'kind': task.conditioning.kind},
        'contract': task.contract.to_dict(),
        'n_execute': task.n_execute,
        'fingerprint': task.fingerprint.to_dict(),
        'storage': storage,
        'provenance': task.provenance,
    }
    task.sha256 = write_model(Path(folder), 'task', header, weights)
    return task.sha256


def load_backbone(folder: Path | str) -> Backbone:
    """Read a backbone, frozen.

    Raises:
        CheckpointError: missing, truncated or altered file, unknown kind, missing or foreign keys.
    """
    folder = Path(folder)
    header, weights = read_model(folder, 'backbone')

    def build() -> Backbone:
        kind = _kind(header['network']['kind'])
        denoiser = kind(kind.Size(**header['network']), conditioning_in(header)['kind'])
        schedule = make_schedule(ScheduleConfig(**header['schedule']))
        return Backbone(
            denoiser,
            Fingerprint.from_dict(header['fingerprint']),
            schedule,
            header['name'],
            header['provenance'],
        )

    backbone = _build(folder, build)
    _fill(backbone, weights, folder)
    backbone.sha256 = header['sha256']
    return backbone.freeze()


def conditioning_in(header: dict[str, Any]) -> dict[str, Any]:
    """How a backbone is conditioned, by its header: one that states nothing is from the time of FiLM only."""
    return header.get('conditioning', {'kind': 'film'})


def load_task(folder: Path | str, backbone: Backbone) -> Task:
    """Read a task over its backbone.

    Raises:
        CheckpointError: as for `load_backbone`, and when the task belongs to another backbone.
    """
    folder = Path(folder)
    header, weights = read_model(folder, 'task')

    def build() -> Task:
        mechanism, expected = header['conditioning']['kind'], backbone.denoiser.mechanism
        if mechanism != expected:
            raise CheckpointError(
                f'{folder}: conditions by {mechanism!r}, but backbone {backbone.name!r} is conditioned by {expected!r}'
            )
        task = Task(
            ObservationContract.from_dict(header['contract']),
            backbone,
            header['encoder'],
            header['name'],
            _instruction(header),
            header['n_execute'],
            header['provenance'],
            InstructionEncoder(**header['language']) if header.get('language') else None,
        )
        task.backbone_name, task.backbone_sha256 = header['backbone']['name'], header['backbone']['sha256']
        task.fingerprint = Fingerprint.from_dict(header['fingerprint'])
        return task

    _require_backbone(folder, header, backbone)
    task = _build(folder, build)
    task.fingerprint.require_equal(
        backbone.fingerprint, what=f'task {task.name!r}', other_what=f'backbone {backbone.name!r}'
    )
    _fill(task, weights, folder)
    task.sha256 = header['sha256']
    return task


@dataclass(frozen=True)
class TaskSummary:
    """What the header of a task says of it, before its weights are read.

    Attributes:
        folder: where it is.
        name, instructions, contract: as of the `Task`.
        has_language: other instructions than its own can be understood.
    """

    folder: Path
    name: str
    instructions: tuple[str, ...]
    has_language: bool
    contract: ObservationContract


def summarise_task(task: Path | str, backbone: Backbone) -> TaskSummary:
    """What a task is, by its header alone, if it fits a backbone; takes milliseconds.

    Args:
        task: folder of a task, or the name of one in models/tasks.
        backbone: that it is to be followed on.

    Raises:
        CheckpointError: not a task, an altered header, missing weights, or a task of another backbone.
        FingerprintMismatch: it is for another arm.
    """
    folder = find_model('tasks', task)
    header = read_header_alone(folder, 'task')

    def build() -> tuple[Fingerprint, TaskSummary]:
        language = header.get('language')
        spoken = _instruction(header)
        instructions = tuple(language['instructions']) if language else (spoken,)
        contract = ObservationContract.from_dict(header['contract'])
        summary = TaskSummary(folder, header['name'], instructions, bool(language), contract)
        return Fingerprint.from_dict(header['fingerprint']), summary

    fingerprint, summary = _build(folder, build)
    # An arm of another kind has another backbone too, but it is the arm that one wants to read of.
    fingerprint.require_equal(
        backbone.fingerprint, what=f'task {summary.name!r}', other_what=f'backbone {backbone.name!r}'
    )
    _require_backbone(folder, header, backbone)
    return summary


def load_policy(task: Path | str, robot: RobotDescription, backbone: Path | str | None = None) -> Policy:
    """Read a task and its backbone and match both against the robot.

    Args:
        task: folder of a task, or the name of one in models/tasks.
        backbone: folder or name; by default the one in the task's own folder (normal training leaves it there),
            otherwise the one that the task names, beside it (`../../backbones`, of best weights the same as of the last
            ones) or in models/backbones.

    Raises:
        CheckpointError, FingerprintMismatch: not a task; see `load_backbone`, `load_task`, `Policy`.
    """
    task_folder = find_model('tasks', task)
    if not (task_folder / 'task.json').is_file() and (task_folder / 'backbone.json').is_file():
        raise CheckpointError(
            f'{task_folder} is a backbone; a policy is given by a task, a folder with a task.json'
        )
    if backbone is None:
        backbone = _backbone_of(task_folder)
    loaded = load_backbone(find_model('backbones', backbone))
    return Policy(loaded, load_task(task_folder, loaded), robot)


def _backbone_of(task_folder: Path) -> Path | str:
    own = task_folder / 'backbone'
    if (own / 'backbone.json').is_file():
        return own
    header = read_header_alone(task_folder, 'task')
    name = _build(task_folder, lambda: str(header['backbone']['name']))
    # A task's best weights lie in a folder of their own in the task's.
    tasks = [task_folder.parent, *([task_folder.parent.parent] if task_folder.name == 'best' else [])]
    beside = [folder.parent / 'backbones' / name for folder in tasks]
    return next((folder for folder in beside if folder.is_dir()), name)


def _require_backbone(folder: Path, header: dict[str, Any], backbone: Backbone) -> None:
    stated = header.get('backbone')
    if not isinstance(stated, dict) or stated.get('sha256') != backbone.sha256:
        raise CheckpointError(
            f'{folder}: trained on backbone {stated}, but the backbone given is '
            f'{backbone.name!r} with sha256 {backbone.sha256}'
        )


def find_model(kind: str, name: Path | str) -> Path:
    """Folder of a model: `name` itself where it is a folder, otherwise models/<kind>/<name>."""
    if len(str(name)) > MAX_NAME:
        raise CheckpointError(f'the name of a model has at most {MAX_NAME} characters, got {len(str(name))}')
    try:
        if (folder := Path(name).expanduser()).is_dir():
            return folder.resolve()
        return find(f'models/{kind}/{name}')
    except (ConfigError, OSError, RuntimeError) as error:  # the last of a ~name that is nobody's
        raise CheckpointError(
            f'{str(name)!r} is neither a folder nor a model that is installed: {error}'
        ) from error


def read_header(folder: Path | str) -> dict[str, Any]:
    """The verified header of a backbone or task folder.

    Raises:
        CheckpointError: no model there, or one of the two files was changed.
    """
    folder = Path(folder)
    for kind in ('backbone', 'task'):
        if (folder / f'{kind}.json').is_file():
            return read_model(folder, kind)[0]
    raise CheckpointError(f'{folder}: no backbone.json or task.json in this folder')


def _kind(kind: str) -> type[Denoiser]:
    if kind not in BACKBONES:
        raise CheckpointError(f'unknown backbone kind {kind!r}; valid: {", ".join(BACKBONES)}')
    return BACKBONES[kind]


def _instruction(header: dict[str, Any]) -> str:
    instruction = header['instruction']
    if not isinstance(instruction, str):
        raise ValueError(f'instruction is no text: {instruction!r}')
    return instruction


def _build(folder: Path, build: Callable[[], T]) -> T:
    try:
        return build()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f'{folder}: the header does not describe a model: {error!r}') from error


def _fill(module: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    expected = module.state_dict()
    missing, foreign = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or foreign:
        raise CheckpointError(f'{folder}: missing weights {missing}, unknown weights {foreign}')
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            raise CheckpointError(
                f'{folder}: {name} has shape {tuple(value.shape)}, expected {tuple(expected[name].shape)}'
            )
    module.load_state_dict({name: value.to(expected[name].dtype) for name, value in weights.items()})
