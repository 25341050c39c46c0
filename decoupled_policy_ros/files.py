"""Files and folders that have their name only when they are complete and on the disk, whatever becomes of the power."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from decoupled_policy_ros.errors import ConfigError


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path`, replacing what was there; whoever looks sees the old file or the new one.

    Others may write the same file at the same time: one of them is the last.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.{secrets.token_hex(4)}.part')
    try:
        partial.write_bytes(content)
        replace_whole(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def require_file_name(path: Path) -> None:
    """Find out before hours of work whether a file can be written here in the end; makes its folder.

    Raises:
        ConfigError: a folder has that name, or its own folder can't be made or written to.
    """
    if path.is_dir():
        raise ConfigError(f'{path} is a folder; name a file')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f'{path} can not be written: {error}') from error


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write `value` as JSON in the same way."""
    write_whole(path, (json.dumps(value, indent=indent) + '\n').encode())


def replace_whole(partial: Path, path: Path) -> None:
    """Give a complete file its name, replacing what was there, once it is on the disk: a power cut takes neither."""
    _sync(partial)
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where its file system can."""
    with suppress(OSError):
        _sync(folder)


def sync_tree(folder: Path) -> None:
    """Have all that is below a folder on the disk, before the folder gets its final name."""
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root, name))
        sync_folder(Path(root))


def free_mb(folder: Path) -> float:
    """Space left (MiB) on the disk that a folder is on, or will be on once it is made; 0 where no disk tells."""
    for place in (folder, *folder.parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free / 2**20
    return 0.0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, beside `path`, which gets that name when the block ends; after an error nothing is left.

    Raises:
        ConfigError: there is something at `path`, before or after.
    """
    if os.path.lexists(path):
        raise ConfigError(f'{path} exists already: give a new folder, or remove it first')
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f'.{path.name}-', dir=path.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        sync_tree(partial)
        try:
            os.rename(partial, path)
        except OSError as error:
            raise ConfigError(f'{path} came to exist meanwhile: {error.strerror}') from error
        sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    """Permissions that new files don't get; it can only be read by setting it."""
    umask = os.umask(0o022)
    os.umask(umask)
    return umask
