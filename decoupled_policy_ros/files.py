"""Files that have their name only when they are complete."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path`, replacing what was there; whoever looks sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.part')
    partial.write_bytes(content)
    os.replace(partial, path)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write `value` as JSON in the same way."""
    write_whole(path, (json.dumps(value, indent=indent) + '\n').encode())
