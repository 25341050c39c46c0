"""What a rosbag2 folder with one MCAP file says of itself: topics, offered QoS, metadata.yaml.

Written as rosbag2 writes version 9 of it (ros2/rosbag2: rosbag2_storage's yaml.hpp and qos.cpp, the MCAP plugin's
mcap_storage.cpp), so that `ros2 bag` reads these bags.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from decoupled_policy_ros.files import write_whole

METADATA_FILE = 'metadata.yaml'
METADATA_VERSION = 9
#: The one key of metadata.yaml, which holds everything.
INFORMATION = 'rosbag2_bagfile_information'
PROFILE = 'ros2'
MAGIC = b'\x89MCAP0\r\n'
#: Keys of a channel's metadata.
OFFERED_QOS, TYPE_HASH = 'offered_qos_profiles', 'topic_type_hash'
#: The metadata record that repeats metadata.yaml inside the file.
METADATA_RECORD = 'rosbag2'

_INFINITE_NS = 2**63 - 1


@dataclass(frozen=True)
class OfferedQos:
    """QoS of one publisher, in rmw's words; durations in ns."""

    reliability: str = 'reliable'
    durability: str = 'volatile'
    history: str = 'unknown'  # DDS does not tell
    depth: int = 0
    deadline_ns: int = _INFINITE_NS
    lifespan_ns: int = _INFINITE_NS
    liveliness: str = 'automatic'
    liveliness_lease_ns: int = _INFINITE_NS

    def to_dict(self) -> dict[str, Any]:
        """As rosbag2 writes it."""
        return {
            'history': self.history,
            'depth': self.depth,
            'reliability': self.reliability,
            'durability': self.durability,
            'deadline': _duration(self.deadline_ns),
            'lifespan': _duration(self.lifespan_ns),
            'liveliness': self.liveliness,
            'liveliness_lease_duration': _duration(self.liveliness_lease_ns),
            'avoid_ros_namespace_conventions': False,
        }


def _duration(nanoseconds: int) -> dict[str, int]:
    sec, nsec = divmod(nanoseconds, 1_000_000_000)
    return {'sec': sec, 'nsec': nsec}


def qos_text(offered: Iterable[OfferedQos]) -> str:
    """Profiles of a topic's publishers as a channel's metadata holds them."""
    return dump_yaml([qos.to_dict() for qos in offered])


def dump_yaml(value: Any) -> str:
    """YAML in block style, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes out equal parts each time: metadata.yaml has no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@dataclass
class TopicCount:
    """One topic of a bag and how many messages of it there are."""

    name: str
    type_name: str
    channel_metadata: Mapping[str, str]
    messages: int = 0
    serialization: str = 'cdr'

    def to_dict(self) -> dict[str, Any]:
        """As metadata.yaml lists it."""
        return {
            'topic_metadata': {
                'name': self.name,
                'type': self.type_name,
                'serialization_format': self.serialization,
                'offered_qos_profiles': yaml.safe_load(self.channel_metadata.get(OFFERED_QOS, '')) or [],
                'type_description_hash': self.channel_metadata.get(TYPE_HASH, ''),
            },
            'message_count': self.messages,
        }


@dataclass(frozen=True)
class FileSpan:
    """One file of a bag: its name, the log times of its first and last message, and how many there are."""

    name: str
    start_ns: int
    end_ns: int
    messages: int

    def to_dict(self) -> dict[str, Any]:
        """As metadata.yaml lists it."""
        return {
            'path': self.name,
            'starting_time': {'nanoseconds_since_epoch': self.start_ns if self.messages else 0},
            'duration': {'nanoseconds': self.end_ns - self.start_ns if self.messages else 0},
            'message_count': self.messages,
        }


def bag_information(
    topics: Iterable[TopicCount], files: Sequence[FileSpan], custom: Mapping[str, str]
) -> dict[str, Any]:
    """Content of metadata.yaml below its one key."""
    filled = [file for file in files if file.messages]
    start_ns = min((file.start_ns for file in filled), default=0)
    end_ns = max((file.end_ns for file in filled), default=0)
    return {
        'version': METADATA_VERSION,
        'storage_identifier': 'mcap',
        'duration': {'nanoseconds': end_ns - start_ns},
        'starting_time': {'nanoseconds_since_epoch': start_ns},
        'message_count': sum(file.messages for file in files),
        'topics_with_message_count': [topic.to_dict() for topic in topics],
        'compression_format': '',
        'compression_mode': '',
        'relative_file_paths': [file.name for file in files],
        'files': [file.to_dict() for file in files],
        'custom_data': dict(custom),
        'ros_distro': 'unknown',
    }


def metadata_record(information: Mapping[str, Any]) -> dict[str, str]:
    """Values of the metadata record that repeats metadata.yaml inside the MCAP file."""
    return {'serialized_metadata': dump_yaml(dict(information))}


def write_metadata(folder: Path, information: Mapping[str, Any]) -> None:
    """Write metadata.yaml, which makes the folder a bag; the last thing that a writer does."""
    text = dump_yaml({INFORMATION: dict(information)})
    write_whole(folder / METADATA_FILE, text.encode())
