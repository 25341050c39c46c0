"""Backbone and task files: safetensors weights with a JSON header beside them.

    models/backbones/<name>/  backbone.json  backbone.safetensors
    models/tasks/<name>/      task.json      task.safetensors

The header holds the hash of the weights, and a hash of itself, which is the file's identity: a changed
byte in either file is refused. Loading reads numbers and text; it executes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from decoupled_policy_ros.errors import CheckpointError, ConfigError
from decoupled_policy_ros.files import write_json, write_whole
from decoupled_policy_ros.observation.contract import ObservationContract
from decoupled_policy_ros.policy.backbones import BACKBONES, Denoiser
from decoupled_policy_ros.policy.language import InstructionEncoder
from decoupled_policy_ros.policy.policy import Backbone, Policy, Task
from decoupled_policy_ros.policy.sampling import make_schedule
from decoupled_policy_ros.policy.schedule import ScheduleConfig
from decoupled_policy_ros.resources import find
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.fingerprint import Fingerprint

FORMAT_VERSION = 1
T = TypeVar('T')
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
    backbone.sha256 = _write(Path(folder), 'backbone', header, backbone.state_dict())
    return backbone.sha256


def save_task(folder: Path | str, task: Task, storage: str = 'float32') -> str:
    """Write `folder`/task.{json,safetensors}; returns the file's sha256.

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
    return _write(Path(folder), 'task', header, weights)


def load_backbone(folder: Path | str) -> Backbone:
    """Read a backbone, frozen.

    Raises:
        CheckpointError: missing, truncated or altered file, unknown kind, missing or foreign keys.
    """
    folder = Path(folder)
    header, weights = _read(folder, 'backbone')

    def build() -> Backbone:
        kind = _kind(header['network']['kind'])
        # Files that state no conditioning are from the time when there was FiLM only.
        mechanism = header.get('conditioning', {'kind': 'film'})['kind']
        denoiser = kind(kind.Size(**header['network']), mechanism)
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


def load_task(folder: Path | str, backbone: Backbone) -> Task:
    """Read a task over its backbone.

    Raises:
        CheckpointError: as for `load_backbone`, and when the task belongs to another backbone.
    """
    folder = Path(folder)
    header, weights = _read(folder, 'task')

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
            header['instruction'],
            header['n_execute'],
            header['provenance'],
            InstructionEncoder(**header['language']) if header.get('language') else None,
        )
        task.backbone_name, task.backbone_sha256 = header['backbone']['name'], header['backbone']['sha256']
        task.fingerprint = Fingerprint.from_dict(header['fingerprint'])
        return task

    if header.get('backbone', {}).get('sha256') != backbone.sha256:
        raise CheckpointError(
            f'{folder}: trained on backbone {header.get("backbone")}, but the backbone given is '
            f'{backbone.name!r} with sha256 {backbone.sha256}'
        )
    task = _build(folder, build)
    task.fingerprint.require_equal(
        backbone.fingerprint, what=f'task {task.name!r}', other_what=f'backbone {backbone.name!r}'
    )
    _fill(task, weights, folder)
    return task


def load_policy(task: Path | str, robot: RobotDescription, backbone: Path | str | None = None) -> Policy:
    """Read a task and its backbone and match both against the robot.

    Args:
        task: folder of a task, or the name of one in models/tasks.
        backbone: folder or name; by default the one in the task's own folder (normal training leaves it there),
            otherwise the one that the task names, beside it or in models/backbones.

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
    header, _ = _read(task_folder, 'task')
    name = _build(task_folder, lambda: str(header['backbone']['name']))
    beside = task_folder.parent.parent / 'backbones' / name
    return beside if beside.is_dir() else name


def find_model(kind: str, name: Path | str) -> Path:
    """Folder of a model: `name` itself where it is a folder, otherwise models/<kind>/<name>."""
    if Path(name).is_dir():
        return Path(name).resolve()
    try:
        return find(f'models/{kind}/{name}')
    except ConfigError as error:
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
            return _read(folder, kind)[0]
    raise CheckpointError(f'{folder}: no backbone.json or task.json in this folder')


def _write(folder: Path, kind: str, header: dict[str, Any], state: dict[str, Tensor]) -> str:
    data = save_safetensors({name: value.detach().cpu().contiguous() for name, value in state.items()})
    header = {
        'format': f'decoupled_policy_ros/{kind}',
        'version': FORMAT_VERSION,
        **header,
        'weights_sha256': hashlib.sha256(data).hexdigest(),
    }
    header['sha256'] = _identity(header)
    # A pair that is torn between these two lines fails its hash.
    write_whole(folder / f'{kind}.safetensors', data)
    write_json(folder / f'{kind}.json', header, indent=2)
    return header['sha256']


def _identity(header: dict[str, Any]) -> str:
    content = {key: value for key, value in header.items() if key != 'sha256'}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        header = json.loads((folder / f'{kind}.json').read_bytes())
        data = (folder / f'{kind}.safetensors').read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f'{folder}: {Path(error.filename).name} is missing') from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder}/{kind}.json can't be read: {error}") from error
    expected = (f'decoupled_policy_ros/{kind}', FORMAT_VERSION)
    found = (header.get('format'), header.get('version')) if isinstance(header, dict) else None
    if found != expected:
        raise CheckpointError(f'{folder}/{kind}.json: format and version are {found}, expected {expected}')
    for what, stated, actual in (
        ('weights', header.get('weights_sha256'), hashlib.sha256(data).hexdigest()),
        ('header', header.get('sha256'), _identity(header)),
    ):
        if stated != actual:
            raise CheckpointError(
                f'{folder}: the {what} of this {kind} were changed or truncated: '
                f'sha256 is {actual}, the header states {stated}'
            )
    try:
        return header, load_safetensors(data)
    except SafetensorError as error:
        raise CheckpointError(f'{folder}/{kind}.safetensors is not valid: {error}') from error


def _kind(kind: str) -> type[Denoiser]:
    if kind not in BACKBONES:
        raise CheckpointError(f'unknown backbone kind {kind!r}; valid: {", ".join(BACKBONES)}')
    return BACKBONES[kind]


def _build(folder: Path, build: Callable[[], T]) -> T:
    try:
        return build()
    except (KeyError, TypeError, ValueError, ConfigError) as error:
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
