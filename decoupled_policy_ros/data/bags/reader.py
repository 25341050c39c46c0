"""Reads rosbag2 recordings without ROS: MCAP and SQLite, plain or compressed, in one file or many, of any length.

Messages come in the order in which they were received (log order), one by one, so a bag of hours takes no more
memory than one of seconds. Types are read from the bag's own definitions; standard messages are known where an
older bag has none.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from rosbags.interfaces import Connection, MessageDefinitionFormat
from rosbags.rosbag2 import Reader
from rosbags.rosbag2.storage_mcap import McapReader
from rosbags.rosbag2.storage_sqlite3 import Sqlite3Reader
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from decoupled_policy_ros.data.bags.format import INFORMATION, METADATA_FILE
from decoupled_policy_ros.data.bags.unended import SUFFIXES, recording_files, unended
from decoupled_policy_ros.errors import DatasetError, MessageError

#: A recording's own clock may be this much out of order (s): writers with several threads do that.
LOG_SLACK_S = 0.5


@dataclass(frozen=True)
class BagTopic:
    """One topic of a bag; `message_type` is '' where publishers of several types shared it."""

    name: str
    message_type: str
    count: int


@dataclass(frozen=True)
class BagMessage:
    """One message as it was logged; `decode` makes an object of it, with the fields of its type."""

    topic: str
    log_ns: int
    data: bytes
    _bag: Bag

    def decode(self) -> Any:
        """The message.

        Raises:
            MessageError: its bytes are not what its type says.
        """
        return self._bag.decode(self.topic, self.data)


@dataclass(frozen=True)
class BagSummary:
    """What metadata.yaml says: seconds from first to last message, and messages by topic."""

    duration_s: float
    counts: dict[str, int]


def bag_summary(path: Path) -> BagSummary:
    """Length and topics of a recording, without opening the files of a folder.

    Raises:
        DatasetError: it is no bag or can't be read.
    """
    _require_bag(path)
    if path.is_file():
        with Bag(path) as bag:
            return BagSummary(bag.duration_s, {topic.name: topic.count for topic in bag.topics.values()})
    try:
        information = yaml.safe_load((path / METADATA_FILE).read_bytes())[INFORMATION]
        counts = {
            entry['topic_metadata']['name']: int(entry['message_count'])
            for entry in information['topics_with_message_count']
        }
        return BagSummary(information['duration']['nanoseconds'] * 1e-9, counts)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f'{path / METADATA_FILE} is damaged: {error!r}; `decoupled-policy recover` writes that of MCAP files anew'
        ) from error


def is_bag(path: Path) -> bool:
    """Whether this is a rosbag2 folder or a single file of one."""
    return (path / METADATA_FILE).is_file() if path.is_dir() else path.suffix in SUFFIXES and path.is_file()


class Bag:
    """A rosbag2 folder, or a single .mcap or .db3 file, open for reading; a context manager.

    A bag whose files are compressed as a whole is unpacked into the temporary folder first.

    Raises:
        DatasetError: it is no bag, is truncated or damaged, has an unknown storage, or was recorded with a clock
            that went back; the message says what to do where something can be done.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        _require_bag(self.path)
        try:
            self._reader = Reader(self.path)
            self._reader.open()
        except Exception as error:  # whatever a damaged file makes rosbags stumble over
            raise self._unreadable(error) from error
        try:
            self.topics = {topic.name: topic for topic in self._topics()}
            self.start_ns, self.end_ns = self._reader.start_time, self._reader.end_time
            self._require_forward_clock()
        except BaseException:
            self.close()
            raise
        self._connections = {topic: self._connections_of(topic) for topic in self.topics}
        self._stores: dict[str, Typestore] = {}

    @property
    def duration_s(self) -> float:
        """Seconds from the first message to the last."""
        return max(self.end_ns - self.start_ns, 0) * 1e-9 if self.n_messages else 0.0

    @property
    def n_messages(self) -> int:
        """Messages of all topics."""
        return sum(topic.count for topic in self.topics.values())

    def require(self, name: str, message_type: str) -> BagTopic:
        """The topic of that name and type.

        Raises:
            DatasetError: it is not there (the message lists those that are), has another type, or no message.
        """
        topic = self.topics.get(name)
        if topic is None:
            there = ', '.join(f'{t.name} ({t.message_type})' for t in self.topics.values()) or 'none'
            raise DatasetError(f'{self.path} has no topic {name}; its topics: {there}')
        if topic.message_type != message_type:
            found = topic.message_type or 'several types'
            raise DatasetError(f'{self.path}: topic {name} is of type {found}, expected {message_type}')
        if topic.count == 0:
            raise DatasetError(f'{self.path}: topic {name} is there, but without a single message')
        return topic

    def messages(self, topics: Collection[str]) -> Iterator[BagMessage]:
        """The messages of these topics, in log order.

        Raises:
            DatasetError: the file is damaged, or holds fewer messages than it says.
        """
        connections = [c for topic in topics for c in self._connections[topic]]
        if not connections:  # no connections would mean all of them
            return
        left = {topic: self.topics[topic].count for topic in topics}
        source = self._reader.messages(connections)
        while True:
            try:
                connection, log_ns, data = next(source)
            except StopIteration:
                break
            except Exception as error:  # as above
                raise self._unreadable(error) from error
            left[connection.topic] -= 1
            yield BagMessage(connection.topic, log_ns, data, self)
        lost = {topic: count for topic, count in left.items() if count > 0}
        if lost:
            raise DatasetError(
                f'{self.path} announces more messages than it holds: '
                + ', '.join(
                    f'{topic}: {count} of {self.topics[topic].count} missing' for topic, count in lost.items()
                )
            )

    def decode(self, topic: str, data: bytes) -> Any:
        """The message object of a topic's serialised bytes.

        Raises:
            MessageError: the bytes are not what the type says.
        """
        message_type = self.topics[topic].message_type
        if topic not in self._stores:
            self._stores[topic] = self._typestore(topic)
        try:
            return self._stores[topic].deserialize_cdr(data, message_type)
        except Exception as error:  # bytes of any kind can be in there
            raise MessageError(f'{len(data)} bytes that are no {message_type}: {error!r}') from error

    def close(self) -> None:
        """Close the files."""
        if self._reader.is_open:
            self._reader.close()

    def __enter__(self) -> Bag:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _topics(self) -> list[BagTopic]:
        return [
            BagTopic(name, info.msgtype or '', info.msgcount) for name, info in self._reader.topics.items()
        ]

    def _connections_of(self, topic: str) -> list[Connection]:
        return [c for c in self._reader.connections if c.topic == topic]

    def _typestore(self, topic: str) -> Typestore:
        """The bag's own definition of a topic's type; Jazzy's where it has none."""
        message_type = self.topics[topic].message_type
        definition = next(
            (c.msgdef for c in self._connections[topic] if c.msgdef.format != MessageDefinitionFormat.NONE),
            None,
        )
        if definition is None:
            store = get_typestore(Stores.ROS2_JAZZY)
            if message_type not in store.types:
                raise DatasetError(
                    f'{self.path}: topic {topic} is of type {message_type}, which the bag does not define'
                )
            return store
        try:
            if definition.format == MessageDefinitionFormat.MSG:
                types = get_types_from_msg(definition.data, message_type)
            else:
                types = {}
                for part in definition.data.split('=' * 80 + '\n'):
                    types |= get_types_from_idl(part.split('\n', 1)[1] if part.startswith('IDL: ') else part)
            store = get_typestore(Stores.EMPTY)
            store.register(types)
        except Exception as error:  # a parser's failure on foreign text
            raise DatasetError(
                f'{self.path}: the definition of {message_type} can not be read: {error}'
            ) from error
        return store

    def _require_forward_clock(self) -> None:
        """Messages are read by log time: before and after a jump back they would be mixed.

        A topic that was only written later than others, as a latched one that was found late, is none. Topics are
        told apart where something goes back at all, for that is a look at every chunk.
        """
        storages = getattr(self._reader.storage, 'storages', [self._reader.storage])
        try:
            jump = _jump_back_ns(storages, by_topic=False) and _jump_back_ns(storages, by_topic=True)
        except Exception as error:  # whatever a damaged index leads to
            raise self._unreadable(error) from error
        if jump:
            raise DatasetError(
                f'{self.path}: the clock of the recording goes back, from {jump[0] * 1e-9:.3f} s to '
                f'{jump[1] * 1e-9:.3f} s: what was recorded before and after can not be told apart'
            )

    def _unreadable(self, error: Exception) -> DatasetError:
        reason = ' '.join(str(error).split()) or repr(error)
        if 'not supported' in reason or METADATA_FILE in reason or 'metadata' in reason:
            return DatasetError(f'{self.path} can not be read as a rosbag2 recording: {reason}')
        way = '`decoupled-policy recover` saves what is there of an MCAP recording that was cut short'
        if any(path.suffix == '.db3' for path in self._files()):
            way = 'of an SQLite file, `sqlite3 FILE .recover` may save what is there'
        return DatasetError(f'{self.path} is truncated or damaged ({reason}); {way}')

    def _files(self) -> list[Path]:
        return recording_files(self.path) if self.path.is_dir() else [self.path]


def _require_bag(path: Path) -> None:
    if not path.exists():
        raise DatasetError(f'{path} does not exist; expected a rosbag2 folder, or an .mcap or .db3 file')
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DatasetError(f'{path} is no bag: expected a rosbag2 folder, or an .mcap or .db3 file')
        return
    if (path / METADATA_FILE).is_file():
        return
    try:
        reason = unended(path)
    except OSError as error:
        raise DatasetError(f'{path} can not be read: {error.strerror or error}') from error
    raise DatasetError(
        reason or f'{path} is no bag: a rosbag2 folder has a {METADATA_FILE} and .mcap or .db3 files'
    )


def _jump_back_ns(storages: Iterable[object], by_topic: bool) -> tuple[int, int] | None:
    """Log times before and after the first jump back; None without any."""
    latest_ns: dict[str, int] = {}
    for storage in storages:
        for topic, start_ns, end_ns in _spans_ns(storage, by_topic):
            before_ns = latest_ns.get(topic, 0)
            if start_ns < before_ns - LOG_SLACK_S * 1e9:
                return before_ns, start_ns
            latest_ns[topic] = max(before_ns, end_ns)
    return None


def _spans_ns(storage: object, by_topic: bool) -> Iterator[tuple[str, int, int]]:
    """Topic ('' all together), first and last log time of each stretch of a file, in the order of writing."""
    if isinstance(storage, McapReader):
        for chunk in sorted(storage.chunks, key=lambda chunk: chunk.chunk_start_offset):
            if chunk.message_index_offsets and not by_topic:
                yield '', chunk.message_start_time, chunk.message_end_time
            elif by_topic:
                for channel, offset in chunk.message_index_offsets.items():
                    if stamps := _indexed_ns(storage, offset):  # some writers index channels that say nothing
                        yield storage.channels[channel].topic, min(stamps), max(stamps)
    elif isinstance(storage, Sqlite3Reader) and storage.dbconn is not None:
        for topic, stamp in storage.dbconn.execute(
            'SELECT topics.name, timestamp FROM messages JOIN topics ON topic_id = topics.id ORDER BY messages.id'
        ):
            yield topic if by_topic else '', stamp, stamp


def _indexed_ns(storage: McapReader, offset: int) -> tuple[int, ...]:
    """Log times in the MessageIndex record at an offset: op code, length, channel, bytes of pairs, (time, offset)."""
    assert storage.bio is not None
    storage.bio.seek(offset + 1 + 8 + 2)
    (size,) = struct.unpack('<I', storage.bio.read(4))
    return struct.unpack(f'<{size // 8}Q', storage.bio.read(size))[::2]
