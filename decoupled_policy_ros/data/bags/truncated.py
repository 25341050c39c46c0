"""Bags that were cut: another recorder's, finished episodes, and the separate files of a folder of recordings."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zstandard

from decoupled_policy_ros.data.bags.episodes import EPISODE_FILE
from decoupled_policy_ros.data.bags.format import METADATA_FILE
from decoupled_policy_ros.data.bags.reader import bag_summary
from decoupled_policy_ros.data.bags.recovered import (
    DAMAGED_SUFFIX,
    Recovery,
    damage_of,
    header_of_bag,
    recovered_header,
)
from decoupled_policy_ros.data.bags.repair import kept_metadata, rebuild_metadata, repair_bag
from decoupled_policy_ros.data.bags.salvage import Scan, scan_mcap
from decoupled_policy_ros.data.bags.unended import (
    PACKED,
    RECOVERED_SUFFIX,
    has_end,
    is_one_recording,
    recording_files,
    unpacked_name,
)
from decoupled_policy_ros.data.bags.writer import LIBRARY
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.files import write_json

_BLOCK_BYTES = 2**20
#: Of a packed file, what says how long it is once unpacked.
_FRAME_HEAD_BYTES = 18


def recordings_in(folder: Path) -> list[Path]:
    """A folder with MCAP files, where they are one recording; each of the files where they are several."""
    files = recording_files(folder, '.mcap', PACKED)
    if (folder / METADATA_FILE).is_file() or len(files) == 1 or is_one_recording(folder, files):
        return [folder]
    return [path for path in files if path.suffix == '.mcap']


def recover_bag(source: Path) -> Recovery | None:
    """Make a bag beside a folder or a file that is cut; None where that is done, or there is nothing to do.

    Raises:
        DatasetError: a file can't be read, unpacked or written, or the disk has no room for a copy.
        OSError: the same of the folder.
    """
    is_file = source.is_file()
    target = source.with_name((source.stem if is_file else source.name) + RECOVERED_SUFFIX)
    files = [source] if is_file else recording_files(source, '.mcap', PACKED)
    # A recorder that is killed while it packs a file leaves it beside what it has packed of it.
    files = [path for path in files if path.suffix == '.mcap' or path.with_suffix('') not in files]
    plain = [path for path in files if path.suffix == '.mcap']
    whole = all(map(has_end, plain))
    if target.exists() or (whole and (is_file or not _lacks_metadata(source, files))):
        return None  # done before, or nothing to do
    if any(_is_being_written(path) for path in files):
        return Recovery(source, None, 'a recorder is writing it: left alone')
    if whole and plain == files:
        scans = {path: scan_mcap(path) for path in files}
        if not any(scan.lost_bytes for scan in scans.values()):
            return _rebuild_metadata(source, scans)
    needed = sum(map(_unpacked_bytes, files))
    free = shutil.disk_usage(source).free
    if free < needed + 2**20:
        raise DatasetError(
            f'{source}: a copy takes {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are left'
        )
    hidden = source.with_name(f'.{target.name}.partial')
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    try:
        recovery = _repair_copies(source, files, hidden, target)
        if recovery.path is not None:
            os.rename(hidden, target)
        return recovery
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _repair_copies(source: Path, files: list[Path], hidden: Path, target: Path) -> Recovery:
    """Fill `hidden` with what becomes `target`; where nothing can be saved, the result has no path."""
    for path in files:
        _copy(path, hidden / unpacked_name(path))
    scans = {copy: scan_mcap(copy) for copy in (hidden / unpacked_name(path) for path in files)}
    found_bytes = sum(scan.size for scan in scans.values())
    copies = [copy for copy, scan in scans.items() if scan.blocks]
    if not copies:
        damage = '; '.join(damage_of(copy, scan) for copy, scan in scans.items())
        return Recovery(source, None, f'not one message is intact: {damage}', lost_bytes=found_bytes)
    custom = {'recorder': LIBRARY, 'recovered_from': source.name}
    repair = repair_bag(copies, custom, _old_metadata(source, scans))
    lost_bytes = repair.lost_bytes
    for copy in scans.keys() - set(copies):
        lost_bytes += scans[copy].size
        copy.unlink()
    header, note = header_of_bag(source)
    damaged = [damage_of(copy, scan) for copy, scan in scans.items() if scan.damage]
    note = '; '.join(filter(None, (note, *damaged)))
    topics: dict[str, Any] = header.get('topics', {})
    received = {name: int(topic['received']) for name, topic in topics.items() if 'received' in topic}
    done = Recovery(source, target, note, repair.messages, received, lost_bytes)
    if header:
        write_json(hidden / EPISODE_FILE, recovered_header(header, topics, repair, done, found_bytes))
    return done


def _old_metadata(source: Path, scans: Mapping[Path, Scan]) -> dict[str, Any]:
    """What is kept of metadata.yaml, or else of the last copy of it that a file has."""
    path = source / METADATA_FILE
    kept = kept_metadata(path.read_bytes()) if path.is_file() else {}
    for scan in reversed(list(scans.values())):
        kept = kept or kept_metadata(scan.metadata)
    return kept


def _unpacked_bytes(path: Path) -> int:
    """Size of a file once it is unpacked; at least that, where it does not say."""
    size = path.stat().st_size
    if path.suffix == '.mcap':
        return size
    with path.open('rb') as file:
        head = file.read(_FRAME_HEAD_BYTES)
    try:
        return max(size, zstandard.frame_content_size(head))
    except zstandard.ZstdError:
        return size


def _copy(path: Path, copy: Path) -> None:
    """Copy a file; a packed one is unpacked.

    Raises:
        DatasetError: it can't be unpacked.
    """
    if path.suffix == '.mcap':
        shutil.copyfile(path, copy)
        return
    unpacker = zstandard.ZstdDecompressor().decompressobj()
    try:
        with path.open('rb') as packed, copy.open('wb') as file:
            while not unpacker.eof and (block := packed.read(_BLOCK_BYTES)):
                file.write(unpacker.decompress(block))
        reason = '' if unpacker.eof else 'it is cut short'
    except zstandard.ZstdError as error:
        reason = str(error)
    if reason:
        raise DatasetError(
            f'{path} can not be unpacked: {reason}; nothing is made of the files beside it without it. Move it '
            f'away to recover those'
        )


def _lacks_metadata(folder: Path, files: list[Path]) -> bool:
    """Whether metadata.yaml says nothing, as after a power cut, or is missing beside the files of one recording."""
    if not (folder / METADATA_FILE).is_file():
        return is_one_recording(folder, files)
    try:
        bag_summary(folder)
    except DatasetError:
        return True
    return False


def _rebuild_metadata(folder: Path, scans: Mapping[Path, Scan]) -> Recovery:
    note = f'{METADATA_FILE} was missing and is written anew'
    if (folder / METADATA_FILE).is_file():
        damaged = folder / f'{METADATA_FILE}{DAMAGED_SUFFIX}'
        shutil.copyfile(folder / METADATA_FILE, damaged)
        note = f'{METADATA_FILE} was damaged and is written anew; what it was is kept in {damaged.name}'
    saved = rebuild_metadata(scans)
    return Recovery(folder, folder, note, saved)


def _is_being_written(path: Path) -> bool:
    """Whether any process has the file open for writing, where the system tells."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False  # somebody else's file, or a file system without leases
    finally:
        os.close(descriptor)
    return False
