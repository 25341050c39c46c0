"""Writes a rosbag2 folder with one MCAP file, so that whoever kills the writer takes less than a second with it.

    bag/bag_0.mcap        chunks of whole messages, each in the hands of the operating system within `flush_s`
    bag/metadata.yaml     written last: a folder without it is not complete

rosbag2's own writer holds messages in a cache and a chunk in memory without a way to have them written, so it can't
keep that promise; the file is the same kind.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from mcap.writer import CompressionType, Writer

import decoupled_policy_ros
from decoupled_policy_ros.data.bags.format import (
    METADATA_FILE,
    METADATA_RECORD,
    OFFERED_QOS,
    PROFILE,
    TYPE_HASH,
    FileSpan,
    OfferedQos,
    TopicCount,
    bag_information,
    metadata_record,
    qos_text,
    write_metadata,
)
from decoupled_policy_ros.data.bags.message_definitions import MessageDefinition, message_definition
from decoupled_policy_ros.errors import ConfigError, DatasetError

COMPRESSIONS = {'none': CompressionType.NONE, 'lz4': CompressionType.LZ4, 'zstd': CompressionType.ZSTD}
LIBRARY = f'decoupled_policy_ros {decoupled_policy_ros.__version__}'
FLUSH_S = 0.25
CHUNK_BYTES = 2**20


class BagWriter:
    """Writes serialised messages as they are.

    Args:
        folder: made if it is missing; may hold no bag.
        name: of the bag, and so of its file `<name>_0.mcap`; the folder's by default.
        compression: of each chunk: none, lz4 or zstd.
        flush_s: longest time that a written message waits in memory for the next call of `write` or `flush_if_due`.

    Raises:
        ConfigError: an unknown compression.
        DatasetError: the folder holds a bag, or can't be written.
    """

    def __init__(
        self, folder: str | Path, name: str | None = None, compression: str = 'none', flush_s: float = FLUSH_S
    ):
        if compression not in COMPRESSIONS:
            raise ConfigError(f'compression {compression!r} is not one of {", ".join(COMPRESSIONS)}')
        self.folder = Path(folder)
        self.path = self.folder / f'{name or self.folder.name}_0.mcap'
        self.custom = {'recorder': LIBRARY}  # custom_data of metadata.yaml
        self.topics: dict[str, TopicCount] = {}
        self.start_ns, self.end_ns = 2**63 - 1, 0  # log times
        self._channels: dict[str, int] = {}
        self._schemas: dict[str, int] = {}
        self._flush_s, self._flushed_at = flush_s, time.monotonic()
        if (self.folder / METADATA_FILE).exists():
            raise DatasetError(f'{self.folder} holds a bag already')
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = _File(self.path)
            self._writer = Writer(
                self._file,  # type: ignore[arg-type]
                chunk_size=CHUNK_BYTES,
                compression=COMPRESSIONS[compression],
            )
            try:
                self._writer.start(PROFILE, LIBRARY)
            except OSError:
                self._file.close()
                raise
        except OSError as error:
            raise DatasetError(f'{self.path} can not be written: {error.strerror or error}') from error

    @property
    def size_bytes(self) -> int:
        """What the operating system has been given so far."""
        return self._file.size

    @property
    def n_messages(self) -> int:
        """Messages of all topics."""
        return sum(topic.messages for topic in self.topics.values())

    def add_topic(
        self,
        topic: str,
        definition: MessageDefinition | str,
        offered: Iterable[OfferedQos] = (),
        type_hash: str = '',
    ) -> None:
        """Register a topic before its first message; a topic that is there already stays as it is.

        Args:
            topic: full name.
            definition: of its type, or the type's name.
            offered: QoS of its publishers.
            type_hash: ROS's hash of the type where the definition has none.

        Raises:
            DatasetError: the type has no definition, the topic was registered with another type, or the disk is full.
        """
        if isinstance(definition, str):
            definition = message_definition(definition)
        if topic in self.topics:
            if self.topics[topic].type_name != definition.type_name:
                raise DatasetError(
                    f'{topic} has type {self.topics[topic].type_name}, not {definition.type_name}'
                )
            return
        metadata = {OFFERED_QOS: qos_text(offered), TYPE_HASH: definition.type_hash or type_hash}
        try:
            if definition.type_name not in self._schemas:
                self._schemas[definition.type_name] = self._writer.register_schema(
                    definition.type_name, 'ros2msg', definition.text.encode()
                )
            schema = self._schemas[definition.type_name]
            self._channels[topic] = self._writer.register_channel(topic, 'cdr', schema, metadata)
        except OSError as error:  # a chunk may have become full
            raise self._failure(error) from error
        self.topics[topic] = TopicCount(topic, definition.type_name, metadata)

    def write(
        self, topic: str, data: bytes, log_time_ns: int, publish_time_ns: int | None = None, sequence: int = 0
    ) -> None:
        """Append one serialised (CDR) message.

        Args:
            topic: as registered.
            data: the message with its encapsulation header.
            log_time_ns: when it was received.
            publish_time_ns: when it was sent, where that is known.
            sequence: the publisher's count of its messages; 0 unknown.

        Raises:
            DatasetError: the disk is full or gone; what was flushed before can be recovered.
        """
        try:
            self._writer.add_message(
                self._channels[topic],
                log_time_ns,
                data,
                log_time_ns if publish_time_ns is None else publish_time_ns,
                sequence & 0xFFFFFFFF,
            )
        except OSError as error:
            raise self._failure(error) from error
        self.topics[topic].messages += 1
        self.start_ns = min(self.start_ns, log_time_ns)
        self.end_ns = max(self.end_ns, log_time_ns)
        self.flush_if_due()

    def flush_if_due(self) -> bool:
        """Flush if the last time is `flush_s` ago; returns whether it was."""
        if time.monotonic() - self._flushed_at < self._flush_s:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Hand everything to the operating system, which keeps it whatever becomes of this process."""
        try:
            self._writer.flush()
        except OSError as error:
            raise self._failure(error) from error
        self._flushed_at = time.monotonic()

    def duplicate(self) -> int:
        """A descriptor of the file, for another thread to sync; the caller closes it."""
        return os.dup(self._file.fileno())

    def close(self, custom: Mapping[str, str] | None = None) -> Path:
        """Finish the file and the folder; returns the folder. `custom` goes to metadata.yaml.

        Raises:
            DatasetError: the disk is full or gone.
        """
        self.custom |= dict(custom or {})
        span = FileSpan(self.path.name, self.start_ns, self.end_ns, self.n_messages)
        information = bag_information(self.topics.values(), [span], self.custom)
        try:
            # Topics without a message are in metadata.yaml and in the summary, as with rosbag2.
            self._writer.flush()
            self._writer.add_metadata(METADATA_RECORD, metadata_record(information))
            self._writer.finish()
            os.fsync(self._file.fileno())
            self._file.close()
            write_metadata(self.folder, information)
        except OSError as error:
            raise self._failure(error) from error
        return self.folder

    def abandon(self) -> None:
        """Close the file and leave it as it is, for `salvage`."""
        self._file.close()

    def _failure(self, error: OSError) -> DatasetError:
        return DatasetError(f'{self.path} can not be written: {error.strerror or error}')

    def __enter__(self) -> BagWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


class _File:
    """A new file without a buffer of its own, locked for as long as its writer lives."""

    def __init__(self, path: Path):
        self.size = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells `recover` that we are alive

    def fileno(self) -> int:
        return self._fd

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            written = os.write(self._fd, rest)
            self.size += written
            rest = rest[written:]
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
