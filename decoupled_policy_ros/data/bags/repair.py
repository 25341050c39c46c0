"""Writes the end that a truncated MCAP file lacks, and the metadata.yaml that makes its folder a bag."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mcap.data_stream import RecordBuilder
from mcap.opcode import Opcode
from mcap.records import DataEnd, Footer, MessageIndex, Metadata, MetadataIndex, Statistics, SummaryOffset

from decoupled_policy_ros.data.bags.format import (
    INFORMATION,
    MAGIC,
    METADATA_RECORD,
    FileSpan,
    TopicCount,
    bag_information,
    metadata_record,
    write_metadata,
)
from decoupled_policy_ros.data.bags.salvage import RECORD_HEAD, Scan, scan_mcap
from decoupled_policy_ros.errors import DatasetError

#: Of metadata.yaml, what can't be told from the messages.
_COPIED = ('compression_format', 'compression_mode', 'custom_data', 'ros_distro')
_NO_SPACE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


@dataclass(frozen=True)
class Repair:
    """What was saved of a bag: messages by topic, log times, and how many bytes were cut off."""

    messages: dict[str, int]
    types: dict[str, str]
    start_ns: int
    end_ns: int
    lost_bytes: int

    @property
    def n_messages(self) -> int:
        """Messages of all topics."""
        return sum(self.messages.values())


def repair_bag(
    paths: Sequence[Path], custom: Mapping[str, str], kept: Mapping[str, Any] | None = None
) -> Repair:
    """Make whole MCAP files of those at `paths`, and of their folder a bag; a file that is whole stays so.

    Where the disk has no room for the end of a file, its last chunks are given up until it has.

    Args:
        paths: the MCAP files of one folder, in their order.
        custom: custom_data of metadata.yaml, beside that of `kept`.
        kept: of the bag's old metadata, see `kept_metadata`.

    Raises:
        DatasetError: a file has no intact message (it is left as it is), or the disk is full or gone.
    """
    kept = kept or {}
    kept = {**kept, 'custom_data': {**kept.get('custom_data', {}), **custom}}
    scans = {path: _repair_file(path, kept) for path in paths}
    try:
        write_metadata(paths[0].parent, _information(scans, kept))
    except OSError as error:
        raise DatasetError(f'{paths[0].parent} can not be finished: {error.strerror or error}') from error
    topics = _topics(scans.values())
    return Repair(
        {topic.name: topic.messages for topic in topics},
        {topic.name: topic.type_name for topic in topics},
        min(scan.span_ns[0] for scan in scans.values()),
        max(scan.span_ns[1] for scan in scans.values()),
        sum(scan.lost_bytes for scan in scans.values()),
    )


def rebuild_metadata(scans: Mapping[Path, Scan]) -> dict[str, int]:
    """Write metadata.yaml of a bag whose MCAP files are whole, by what is in them; returns messages by topic.

    What only metadata.yaml says is taken from the copy of it that the last file has.

    Raises:
        OSError: the disk is full or gone.
    """
    path, last = list(scans.items())[-1]
    write_metadata(path.parent, _information(scans, kept_metadata(last.metadata)))
    return {topic.name: topic.messages for topic in _topics(scans.values())}


def kept_metadata(text: str | bytes) -> dict[str, Any]:
    """What can't be told from the messages, by metadata.yaml or a file's copy of it; {} where it can't be read."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    information = found.get(INFORMATION, found) if isinstance(found, dict) else None
    if not isinstance(information, dict):
        return {}
    kept = {key: information[key] for key in _COPIED if information.get(key)}
    if not isinstance(kept.get('custom_data', {}), dict):
        del kept['custom_data']
    if str(kept.get('compression_mode')).upper() == 'FILE':  # files are unpacked before they are repaired
        kept.pop('compression_format', None)
        del kept['compression_mode']
    return kept


def _information(scans: Mapping[Path, Scan], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Content of metadata.yaml by what is in the files, and what is kept of the old one."""
    files = [FileSpan(path.name, *scan.span_ns, sum(scan.counts.values())) for path, scan in scans.items()]
    found = bag_information(_topics(scans.values()), files, {})
    if set().union(*(scan.packed for scan in scans.values())) == {True}:
        found |= {'compression_format': 'zstd', 'compression_mode': 'MESSAGE'}
    return found | dict(kept)


def _topics(scans: Iterable[Scan]) -> list[TopicCount]:
    """Topics of a bag's files, each once."""
    topics: dict[str, TopicCount] = {}
    for topic in (topic for scan in scans for topic in scan.topics()):
        topic.messages += topics[topic.name].messages if topic.name in topics else 0
        topics[topic.name] = topic
    return list(topics.values())


def _repair_file(path: Path, kept: Mapping[str, Any]) -> Scan:
    """Finish one file; returns what it holds now."""
    scan = scan_mcap(path)
    while scan.blocks:
        try:
            _write_end(path, scan, _information({path: scan}, kept))
            return scan
        except OSError as error:
            if error.errno not in _NO_SPACE or len(scan.blocks) == 1:
                raise DatasetError(f'{path} can not be finished: {error.strerror or error}') from error
            scan.drop_last_block()
    raise DatasetError(f'{path} holds no intact message: nothing to save')


def _write_end(path: Path, scan: Scan, information: Mapping[str, Any]) -> None:
    """Cut what is damaged and append indexes, summary and footer."""
    builder, metadata = RecordBuilder(), RecordBuilder()
    _write_message_index(builder, scan)
    Metadata(METADATA_RECORD, metadata_record(information)).write(metadata)
    metadata_start = scan.kept_end + builder.count
    metadata_length = metadata.count
    builder.write(metadata.end())
    DataEnd(0).write(builder)
    end = builder.end()
    end += _summary(
        scan, scan.kept_end + len(end), MetadataIndex(metadata_start, metadata_length, METADATA_RECORD)
    )
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.ftruncate(file, scan.kept_end)
        last = scan.blocks[-1]
        if last.new_head and last.chunk is not None:
            os.pwrite(file, last.new_head, last.chunk.chunk_start_offset)
        position, rest = scan.kept_end, memoryview(end)
        while rest:
            written = os.pwrite(file, rest, position)
            position, rest = position + written, rest[written:]
        os.fsync(file)
    except OSError:
        os.ftruncate(file, scan.kept_end)
        raise
    finally:
        os.close(file)


def _write_message_index(builder: RecordBuilder, scan: Scan) -> None:
    """Index of the last chunk, where the file has none or not all of it."""
    last = scan.blocks[-1]
    if last.chunk is None:
        return
    for channel_id, records in last.entries.items():
        last.chunk.message_index_offsets[channel_id] = scan.kept_end + builder.count
        before = builder.count
        MessageIndex(channel_id, records).write(builder)
        last.chunk.message_index_length += builder.count - before


def _summary(scan: Scan, start: int, metadata_index: MetadataIndex) -> bytes:
    """Summary section, its offsets, footer and magic, for a summary that begins at `start`."""
    counts = scan.counts
    start_ns, end_ns = scan.span_ns
    statistics = Statistics(
        attachment_count=0,
        channel_count=len(scan.channels),
        channel_message_counts=dict(counts),
        chunk_count=sum(block.chunk is not None for block in scan.blocks),
        message_count=sum(counts.values()),
        message_end_time=end_ns,
        message_start_time=start_ns,
        metadata_count=1,
        schema_count=len(scan.schemas),
    )
    groups: list[tuple[Opcode, list[Any]]] = [
        (Opcode.SCHEMA, list(scan.schemas.values())),
        (Opcode.CHANNEL, list(scan.channels.values())),
        (Opcode.STATISTICS, [statistics]),
        (Opcode.CHUNK_INDEX, [block.chunk for block in scan.blocks if block.chunk is not None]),
        (Opcode.METADATA_INDEX, [metadata_index]),
    ]
    builder, offsets = RecordBuilder(), []
    for opcode, records in groups:
        group_start = builder.count
        for record in records:
            record.write(builder)
        if records:
            offsets.append(SummaryOffset(opcode, start + group_start, builder.count - group_start))
    offsets_start = start + builder.count
    for offset in offsets:
        offset.write(builder)
    summary = builder.end()
    checksum = zlib.crc32(summary)
    head = (
        RECORD_HEAD.pack(Opcode.FOOTER, 20)
        + start.to_bytes(8, 'little')
        + offsets_start.to_bytes(8, 'little')
    )
    Footer(start, offsets_start, zlib.crc32(head, checksum)).write(builder)
    return summary + builder.end() + MAGIC
