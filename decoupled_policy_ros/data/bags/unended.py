"""Folders of recording files that lack their metadata.yaml, as a killed recorder leaves them, and what helps."""

from __future__ import annotations

import os
from pathlib import Path

from decoupled_policy_ros.data.bags.format import MAGIC, METADATA_FILE

SUFFIXES = ('.mcap', '.db3')
#: Of an MCAP file that rosbag2 has packed as a whole, once it was full.
PACKED_SUFFIX = '.zstd'
PACKED = f'.mcap{PACKED_SUFFIX}'
RECOVERED_SUFFIX = '_recovered'


def recording_files(folder: Path, *suffixes: str) -> list[Path]:
    """Files of recordings in a folder, in their order: bag_10.mcap comes after bag_9.mcap."""
    endings = suffixes or SUFFIXES
    files = [path for path in folder.iterdir() if path.name.endswith(endings) and path.is_file()]
    return sorted(files, key=_number)


def has_end(path: Path) -> bool:
    """Whether an MCAP file ends as a whole one does."""
    with path.open('rb') as file:
        file.seek(-min(len(MAGIC), path.stat().st_size), os.SEEK_END)
        return file.tell() > len(MAGIC) and file.read() == MAGIC


def unpacked_name(path: Path) -> str:
    """Name of a file once it is unpacked."""
    return path.name.removesuffix(PACKED_SUFFIX)


def is_one_recording(folder: Path, files: list[Path]) -> bool:
    """Whether the files are named as those of one recording: <folder>_0.mcap, <folder>_1.mcap ..., or <folder>.mcap."""
    stems = [_stem(path) for path in files]
    return stems in ([folder.name], [f'{folder.name}_{i}' for i in range(len(files))])


def unended(folder: Path) -> str:
    """Why a folder with recording files is no bag, and what makes one of it; '' where it has none, or is a bag.

    Raises:
        OSError: the folder or a file in it can't be read.
    """
    files = [] if (folder / METADATA_FILE).is_file() else recording_files(folder, *SUFFIXES, PACKED)
    if not files:
        return ''
    if any(path.suffix == '.db3' for path in files):
        way = f'`ros2 bag reindex -s sqlite3 {folder}` writes it'
    elif is_one_recording(folder, files) or any(map(_awaits_recovery, files)):
        way = '`decoupled-policy recover` completes it'
    else:
        way = f'give the files themselves, or make one recording of them: `ros2 bag reindex -s mcap {folder}`'
    names = ', '.join(path.name for path in files)
    return f'{folder} has {names} but no {METADATA_FILE}: the recording was not ended; {way}'


def _awaits_recovery(path: Path) -> bool:
    """Whether a file is cut and nothing was made of it yet."""
    recovered = path.with_name(path.stem + RECOVERED_SUFFIX)
    return path.suffix == '.mcap' and not has_end(path) and not recovered.exists()


def _stem(path: Path) -> str:
    return Path(unpacked_name(path)).stem


def _number(path: Path) -> tuple[int, str]:
    number = _stem(path).rpartition('_')[2]
    return (int(number) if number.isdigit() else -1, path.name)
