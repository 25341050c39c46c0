"""How much memory a dataset takes, said before it is read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from decoupled_policy_ros.data.readers.interface import Demonstrations
from decoupled_policy_ros.errors import DatasetError

MEMINFO = Path('/proc/meminfo')


def free_memory() -> int | None:
    """Bytes that a program can have without swapping; None where the system does not say."""
    if not MEMINFO.exists():
        return None
    (line,) = (line for line in MEMINFO.read_text().splitlines() if line.startswith('MemAvailable'))
    return 1024 * int(line.split()[1])


def require_memory(
    dataset: Demonstrations, frames: int, cameras: Iterable[str], size: tuple[int, int] | None
) -> None:
    """Refuse pictures that don't fit into memory, where each process of a run holds all of them.

    Args:
        frames: that are going to be read.
        cameras: the dataset's names.
        size: height and width to which pictures are resized; their own by default.

    Raises:
        DatasetError: they don't fit; what they take and what is free is in the message.
    """
    pictures = [dataset.images(camera, 0, size)[0] for camera in cameras]
    free = free_memory()
    needed = frames * sum(picture.nbytes for picture in pictures) * int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if free is not None and needed > free:
        shapes = ', '.join('x'.join(map(str, picture.shape)) for picture in pictures)
        raise DatasetError(
            f'{dataset.root}: {frames:,} frames with pictures of {shapes} take {needed / 1e9:,.1f} GB of memory, and '
            f'{free / 1e9:,.1f} GB are free; a smaller `image_size`, fewer `cameras`, fewer `episodes` or a larger '
            '`every` need less'
        )
