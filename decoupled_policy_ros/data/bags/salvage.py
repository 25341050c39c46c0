"""Makes a whole MCAP file of a truncated one, in place: keeps what is intact, cuts the rest, writes the end anew.

    header | chunk, its index | chunk, its index | ... | torn chunk     what was left
    header | chunk, its index | chunk, its index | ... | chunk, its index | summary     what it becomes

A torn chunk keeps its intact messages where it is not compressed. Nothing is moved, so that this takes no second
copy of many gigabytes, and may be killed and repeated at any point. Checksums of all chunks are verified; at the
first damaged record the file is cut. `recovery` keeps a copy of what may be left behind it.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import yaml
from mcap.data_stream import ReadDataStream
from mcap.opcode import Opcode
from mcap.records import Channel, Chunk, ChunkIndex, Message, MessageIndex, Metadata, Schema
from mcap.stream_reader import get_chunk_data_stream

from decoupled_policy_ros.data.bags.format import MAGIC, METADATA_RECORD, OFFERED_QOS, TopicCount
from decoupled_policy_ros.errors import DatasetError

RECORD_HEAD = struct.Struct('<BQ')
#: Of a chunk without compression, what stands before its records: times, size, checksum, '', length.
CHUNK_HEAD = struct.Struct('<QQQIIQ')
#: Of a message index: channel, bytes of pairs.
INDEX_HEAD = struct.Struct('<HI')
#: Length of the record that ends the messages: a checksum.
DATA_END_BYTES = 4
#: Of a message: channel, sequence, times. Then comes what was sent, which CDR never begins as zstd does.
_MESSAGE_HEAD_BYTES = 22
_ZSTD_MAGIC = b'\x28\xb5\x2f\xfd'
#: Longer than any record that a recorder writes; a length beyond it is damage.
_MAX_RECORD_BYTES = 2**32


@dataclass
class Block:
    """A chunk, or one message outside of any chunk."""

    end: int  # where the file is cut if this is the last one
    counts: Counter[int]
    start_ns: int
    end_ns: int
    chunk: ChunkIndex | None = None
    #: (log time, offset in the chunk) by channel, as long as the file has no index of this chunk.
    entries: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    #: The chunk's new beginning, where its end is missing.
    new_head: bytes = b''


@dataclass
class Scan:
    """What is intact in a file."""

    size: int
    blocks: list[Block] = field(default_factory=list)
    schemas: dict[int, Schema] = field(default_factory=dict)
    channels: dict[int, Channel] = field(default_factory=dict)
    kept_end: int = 0  # of the last intact record
    data_is_complete: bool = False  # the writer had come to the end of its messages
    metadata: str = ''  # the copy of metadata.yaml that the file has
    damage: str = ''  # what is wrong after kept_end, where the file does not just end there
    packed: set[bool] = field(default_factory=set)  # whether messages are compressed one by one, with zstd

    @property
    def lost_bytes(self) -> int:
        """Bytes after the last intact message or record; the summary of a complete file is not lost."""
        return 0 if self.data_is_complete else self.size - self.kept_end

    @property
    def counts(self) -> Counter[int]:
        """Intact messages by channel id."""
        return sum((block.counts for block in self.blocks), Counter())

    @property
    def span_ns(self) -> tuple[int, int]:
        """Log times of the first and the last message; (0, 0) without any."""
        if not self.blocks:
            return 0, 0
        return min(block.start_ns for block in self.blocks), max(block.end_ns for block in self.blocks)

    def topics(self) -> list[TopicCount]:
        """Topics with their types and counts."""
        counts = self.counts
        return [
            TopicCount(
                channel.topic,
                self.schemas[channel.schema_id].name if channel.schema_id in self.schemas else '',
                channel.metadata,
                counts[channel.id],
                channel.message_encoding,
            )
            for channel in self.channels.values()
        ]

    def drop_last_block(self) -> None:
        """Give up the last chunk, for want of space."""
        self.blocks.pop()
        self.kept_end = self.blocks[-1].end
        self.data_is_complete = False


def scan_mcap(path: str | Path) -> Scan:
    """Read a file up to its first damaged or missing record.

    Raises:
        DatasetError: the file can't be read.
    """
    try:
        with open(path, 'rb') as file:
            return _scan(file)
    except OSError as error:
        raise DatasetError(f'{path} can not be read: {error.strerror or error}') from error


def _scan(file: BinaryIO) -> Scan:
    found = Scan(size=os.fstat(file.fileno()).st_size)
    if file.read(len(MAGIC)) != MAGIC:
        found.damage = 'it does not begin as an MCAP file does'
        return found
    found.kept_end = len(MAGIC)
    try:
        while (record := _read_record(file)) is not None:
            opcode, body, is_whole = record
            if opcode == Opcode.DATA_END:
                if is_whole and len(body) != DATA_END_BYTES:
                    raise ValueError(f'an end of {len(body)} bytes')
                found.data_is_complete = is_whole
                break
            if not is_whole:
                if opcode == Opcode.CHUNK:
                    _keep_torn_chunk(found, body)
                break
            _keep(found, opcode, body)
            found.kept_end += RECORD_HEAD.size + len(body)
            if found.blocks:
                found.blocks[-1].end = found.kept_end
    except OSError:
        raise
    except Exception as error:  # whatever damaged bytes make mcap and the decompressors stumble over
        found.damage = f'{type(error).__name__} {error}'.strip()
    return found


def _read_record(file: BinaryIO) -> tuple[int, bytes, bool] | None:
    """Opcode and body of the next record, and whether the body is all there; None at the end.

    Raises:
        ValueError: no record is that long.
    """
    head = file.read(RECORD_HEAD.size)
    if len(head) < RECORD_HEAD.size:
        return None
    opcode, length = RECORD_HEAD.unpack(head)
    if length > _MAX_RECORD_BYTES:
        raise ValueError(f'a record of {length} bytes')
    body = file.read(length)
    if len(body) < length and (told := _told_length(opcode, body)) not in (None, length):
        raise ValueError(f'a record of {length} bytes that says it has {told}')
    return opcode, body, len(body) == length


def _told_length(opcode: int, body: bytes) -> int | None:
    """Length of a record that is torn by what stands in it: by another one its head is damaged, and more may follow."""
    if opcode == Opcode.MESSAGE_INDEX and len(body) >= INDEX_HEAD.size:
        return INDEX_HEAD.size + int(INDEX_HEAD.unpack_from(body)[1])
    if opcode == Opcode.CHUNK and len(body) >= CHUNK_HEAD.size:
        records = CHUNK_HEAD.size - 8 + int(CHUNK_HEAD.unpack_from(body)[4])
        if len(body) >= records + 8:
            return records + 8 + int.from_bytes(body[records : records + 8], 'little')
    return None


def _keep(found: Scan, opcode: int, body: bytes) -> None:
    """Take note of a whole record.

    Raises:
        ValueError, KeyError, struct.error, ...: it is damaged.
    """
    stream = ReadDataStream(io.BytesIO(body))
    if opcode == Opcode.CHUNK:
        chunk = Chunk.read(stream)
        records, size = get_chunk_data_stream(chunk, validate_crc=True)
        _keep_chunk(found, chunk, records.read(size), len(body))
    elif opcode == Opcode.MESSAGE_INDEX:
        index = MessageIndex.read(stream)
        if not index.records:  # some writers index channels that say nothing in a chunk
            return
        block = found.blocks[-1]
        if block.chunk is None or index.channel_id not in block.entries:
            raise ValueError('a message index of no chunk')
        block.chunk.message_index_offsets[index.channel_id] = found.kept_end
        block.chunk.message_index_length += RECORD_HEAD.size + len(body)
        del block.entries[index.channel_id]
    elif opcode == Opcode.MESSAGE:
        message = Message.read(stream, len(body))
        counts = Counter({found.channels[message.channel_id].id: 1})
        found.blocks.append(Block(0, counts, message.log_time, message.log_time))
        found.packed.add(message.data.startswith(_ZSTD_MAGIC))
    elif opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
        _register(found, opcode, stream)
    elif opcode == Opcode.METADATA:
        record = Metadata.read(stream)
        if record.name == METADATA_RECORD:
            found.metadata = record.metadata.get('serialized_metadata', '')
    elif opcode not in (Opcode.HEADER, Opcode.ATTACHMENT):
        raise ValueError(f'record {opcode} among the messages')


def _register(found: Scan, opcode: int, stream: ReadDataStream) -> None:
    if opcode == Opcode.SCHEMA:
        schema = Schema.read(stream)
        found.schemas.setdefault(schema.id, schema)
    else:
        channel = Channel.read(stream)
        if channel.id not in found.channels:
            yaml.safe_load(channel.metadata.get(OFFERED_QOS, ''))  # metadata.yaml is going to repeat it
            found.channels[channel.id] = channel


def _keep_chunk(found: Scan, chunk: Chunk, data: bytes, body_length: int) -> int:
    """Take note of a chunk's records; returns the length of the whole ones at the beginning of `data`."""
    entries: dict[int, list[tuple[int, int]]] = {}
    position = 0
    while len(data) >= position + RECORD_HEAD.size:
        opcode, length = RECORD_HEAD.unpack_from(data, position)
        body = data[position + RECORD_HEAD.size : position + RECORD_HEAD.size + length]
        if len(body) < length:
            break
        if opcode == Opcode.MESSAGE:
            channel_id, _, log_time = struct.unpack_from('<HIQ', body)
            if channel_id not in found.channels:
                raise KeyError(channel_id)
            entries.setdefault(channel_id, []).append((log_time, position))
            found.packed.add(body.startswith(_ZSTD_MAGIC, _MESSAGE_HEAD_BYTES))
        else:
            _register(found, opcode, ReadDataStream(io.BytesIO(body)))
        position += RECORD_HEAD.size + length
    times = [log_time for channel in entries.values() for log_time, _ in channel]
    if times:
        index = ChunkIndex(
            chunk_length=RECORD_HEAD.size + body_length,
            chunk_start_offset=found.kept_end,
            compression=chunk.compression,
            compressed_size=len(chunk.data),
            message_end_time=max(times),
            message_index_length=0,
            message_index_offsets={},
            message_start_time=min(times),
            uncompressed_size=len(data),
        )
        counts = Counter({channel_id: len(channel) for channel_id, channel in entries.items()})
        found.blocks.append(Block(0, counts, min(times), max(times), index, entries))
    return position


def _keep_torn_chunk(found: Scan, body: bytes) -> None:
    """Intact messages of a chunk whose end is missing, where it is not compressed."""
    if len(body) < CHUNK_HEAD.size or CHUNK_HEAD.unpack_from(body)[4] != 0:
        return
    data = body[CHUNK_HEAD.size :]
    chunk = Chunk('', data, 0, 0, 0, len(data))
    before = len(found.blocks)
    length = _keep_chunk(found, chunk, data, 0)
    if len(found.blocks) == before:
        return
    block = found.blocks[-1]
    assert block.chunk is not None
    body_length = CHUNK_HEAD.size + length
    block.chunk.chunk_length = RECORD_HEAD.size + body_length
    block.chunk.compressed_size = block.chunk.uncompressed_size = length
    checksum = zlib.crc32(data[:length])
    block.new_head = RECORD_HEAD.pack(Opcode.CHUNK, body_length) + CHUNK_HEAD.pack(
        block.start_ns, block.end_ns, length, checksum, 0, length
    )
    found.kept_end += RECORD_HEAD.size + body_length
    block.end = found.kept_end
