"""A model as two files: safetensors weights with a JSON header beside them.

The header holds the hash of the weights, and a hash of itself, which is the file's identity: a changed
byte in either file is refused. Loading reads numbers and text; it executes nothing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from decoupled_policy_ros.errors import CheckpointError
from decoupled_policy_ros.files import write_json, write_whole

FORMAT_VERSION = 1


def write_model(folder: Path, kind: str, header: dict[str, Any], state: dict[str, Tensor]) -> str:
    """Write `folder`/`kind`.{json,safetensors}; returns the file's sha256."""
    data = save_safetensors({name: value.detach().cpu().contiguous() for name, value in state.items()})
    header = {
        'format': f'decoupled_policy_ros/{kind}',
        'version': FORMAT_VERSION,
        **header,
        'weights_sha256': hashlib.sha256(data).hexdigest(),
    }
    header['sha256'] = identity(header)
    # A pair that is torn between these two lines fails its hash.
    write_whole(folder / f'{kind}.safetensors', data)
    write_json(folder / f'{kind}.json', header, indent=2)
    return header['sha256']


def identity(header: dict[str, Any]) -> str:
    """The sha256 of a header but for the one that it states."""
    content = {key: value for key, value in header.items() if key != 'sha256'}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_model(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and weights of `folder`/`kind`.{json,safetensors}.

    Raises:
        CheckpointError: a file is missing, truncated, altered or of another kind.
    """
    header, data = _read_json(folder, kind), _bytes(folder / f'{kind}.safetensors')
    _require_sha256(folder, kind, 'weights', header.get('weights_sha256'), hashlib.sha256(data).hexdigest())
    _require_sha256(folder, kind, 'header', header.get('sha256'), identity(header))
    try:
        return header, load_safetensors(data)
    except SafetensorError as error:
        raise CheckpointError(f'{folder}/{kind}.safetensors is not valid: {error}') from error


def read_header_alone(folder: Path, kind: str) -> dict[str, Any]:
    """The header, when its weights are there: they are not read, so they may be broken still.

    Raises:
        CheckpointError: a file is missing, or the header is altered or of another kind.
    """
    header = _read_json(folder, kind)
    _require_sha256(folder, kind, 'header', header.get('sha256'), identity(header))
    if not (folder / f'{kind}.safetensors').is_file():
        raise CheckpointError(f'{folder}: {kind}.safetensors is missing')
    return header


def _read_json(folder: Path, kind: str) -> dict[str, Any]:
    file = folder / f'{kind}.json'
    try:
        header = json.loads(_bytes(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error
    expected = (f'decoupled_policy_ros/{kind}', FORMAT_VERSION)
    found = (header.get('format'), header.get('version')) if isinstance(header, dict) else None
    if found != expected:
        raise CheckpointError(f'{file}: format and version are {found}, expected {expected}')
    return header


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f'{file.parent}: {file.name} is missing') from error
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error


def _require_sha256(folder: Path, kind: str, what: str, stated: object, actual: str) -> None:
    if stated != actual:
        raise CheckpointError(
            f'{folder}: the {what} of this {kind} were changed or truncated: '
            f'sha256 is {actual}, the header states {stated}'
        )
