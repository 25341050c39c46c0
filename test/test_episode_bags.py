"""Bags as they are written, truncated and repaired, read back by rosbags and by mcap's own reader."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcap._chunk_builder import ChunkBuilder
from mcap.reader import make_reader
from mcap.records import MessageIndex
from mcap.writer import CompressionType, Writer
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from decoupled_policy_ros.data.bags import writer as bag_writer
from decoupled_policy_ros.data.bags.format import MAGIC, OFFERED_QOS, OfferedQos, bag_information, qos_text
from decoupled_policy_ros.data.bags.message_definitions import message_definition
from decoupled_policy_ros.data.bags.repair import repair_bag
from decoupled_policy_ros.data.bags.salvage import scan_mcap
from decoupled_policy_ros.data.bags.stamp_watch import StampWatch, header_stamp_ns
from decoupled_policy_ros.data.bags.writer import BagWriter
from decoupled_policy_ros.errors import ConfigError, DatasetError

TOPICS = {'/arm/joint_states': 'sensor_msgs/msg/JointState', '/gripper_command': 'std_msgs/msg/Float64'}
START_NS = 1_700_000_000_000_000_000
#: What the tests use to make chunks end within a few messages.
SMALL_CHUNK_BYTES = 3000

messages = st.lists(
    st.tuples(
        st.sampled_from(list(TOPICS)),
        st.integers(0, 10**9),
        st.binary(max_size=400),
        st.integers(0, 2**32 - 1),
    ),
    min_size=1,
    max_size=60,
)
fresh = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_bag(folder, entries, compression='none', **options):
    with BagWriter(folder, compression=compression, **options) as writer:
        for topic, kind in TOPICS.items():
            writer.add_topic(topic, kind, [OfferedQos()])
        for topic, offset_ns, data, sequence in entries:
            writer.write(topic, data, START_NS + offset_ns, START_NS + offset_ns - 1000, sequence)
    return writer.path


def read_bag(folder):
    """Messages of a bag as rosbags sees them: (topic, log time, data)."""
    with Reader(folder) as reader:
        found = [(connection.topic, stamp, bytes(data)) for connection, stamp, data in reader.messages()]
        assert reader.message_count == len(found)
        assert {c.topic: c.msgcount for c in reader.connections} == {
            topic: sum(entry[0] == topic for entry in found)
            for topic in {c.topic for c in reader.connections}
        }
    return found


def read_mcap(path):
    """The same by mcap's reader, all checksums verified."""
    with open(path, 'rb') as file:
        reader = make_reader(file, validate_crcs=True)
        found = [(channel.topic, m.log_time, m.data, m.sequence) for _, channel, m in reader.iter_messages()]
        assert reader.get_summary().statistics.message_count == len(found)
    return found


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(bag_writer, 'CHUNK_BYTES', SMALL_CHUNK_BYTES)


@pytest.fixture
def numbered_bag(tmp_path, small_chunks):
    """Path of a whole MCAP file of 240 messages in many chunks, and its messages in their order."""
    entries = [
        (list(TOPICS)[i % 3 == 0], i * 1_000_000, b'message' + i.to_bytes(4, 'little') + b'.' * (i % 100), i)
        for i in range(240)
    ]
    return write_bag(tmp_path / 'whole', entries), [
        (topic, START_NS + offset, data) for topic, offset, data, _ in entries
    ]


# --- message definitions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name',
    [
        'sensor_msgs/msg/Image', 'sensor_msgs/msg/JointState', 'sensor_msgs/msg/CameraInfo', 'std_msgs/msg/Float64',
        'sensor_msgs/msg/PointCloud2', 'geometry_msgs/msg/PoseStamped', 'diagnostic_msgs/msg/DiagnosticArray',
        'trajectory_msgs/msg/MultiDOFJointTrajectory', 'rcl_interfaces/msg/ParameterDescriptor',
    ],
)  # fmt: skip
def test_a_definition_has_all_that_its_type_is_made_of(name):
    definition = message_definition(name)
    store = get_typestore(Stores.EMPTY)
    store.register(get_types_from_msg(definition.text, name))
    assert store.hash_rihs01(name) == definition.type_hash  # ROS's own hash, from the installed description


def test_types_that_begin_with_a_header_are_known():
    assert message_definition('sensor_msgs/msg/JointState').has_header
    assert not message_definition('std_msgs/msg/Float64').has_header
    assert not message_definition('diagnostic_msgs/msg/DiagnosticStatus').has_header


@pytest.mark.parametrize(
    'name', ['none_such_msgs/msg/Thing', 'sensor_msgs/msg/NoneSuch', 'sensor_msgs/Image', '']
)
def test_a_type_without_a_definition_is_refused_by_name(name):
    with pytest.raises(DatasetError, match=repr(name) if '/msg/' not in name else name):
        message_definition(name)


def test_a_common_type_that_is_not_installed_has_a_definition_all_the_same(tmp_path):
    code = (
        'from decoupled_policy_ros.data.bags.message_definitions import message_definition as d; import json;'
        "x = d('sensor_msgs/msg/JointState'); print(json.dumps([x.type_hash, x.has_header]))"
    )
    environment = {**os.environ, 'AMENT_PREFIX_PATH': str(tmp_path)}
    printed = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert json.loads(printed) == [message_definition('sensor_msgs/msg/JointState').type_hash, True]


# --- writing --------------------------------------------------------------------------------------


@fresh
@given(entries=messages, compression=st.sampled_from(['none', 'lz4', 'zstd']))
def test_what_is_written_is_what_rosbags_and_mcap_read(entries, compression, small_chunks, tmp_path):
    shutil.rmtree(tmp_path / 'bag', ignore_errors=True)
    path = write_bag(tmp_path / 'bag', entries, compression)
    expected = sorted((topic, START_NS + offset, data) for topic, offset, data, _ in entries)
    assert sorted(read_bag(tmp_path / 'bag')) == expected
    read = read_mcap(path)
    assert sorted(entry[:3] for entry in read) == expected
    assert sorted(entry[3] for entry in read) == sorted(entry[3] for entry in entries)


def test_the_file_is_what_rosbag2s_plugin_writes_and_expects(tmp_path):
    offered = [
        OfferedQos(),
        OfferedQos('best_effort', 'transient_local', 'keep_last', 5, lifespan_ns=1_500_000_000),
    ]
    with BagWriter(tmp_path / 'bag') as writer:
        writer.add_topic('/joint_states', 'sensor_msgs/msg/JointState', offered)
        writer.add_topic('/silent', 'std_msgs/msg/Float64')
        writer.write('/joint_states', b'\0\1\0\0' + bytes(40), START_NS, START_NS - 5, 7)
    assert sorted(path.name for path in (tmp_path / 'bag').iterdir()) == ['bag_0.mcap', 'metadata.yaml']
    text = (tmp_path / 'bag/metadata.yaml').read_text()
    assert '&' not in text  # no anchors
    information = yaml.safe_load(text)['rosbag2_bagfile_information']
    assert information['version'] == 9
    assert information['storage_identifier'] == 'mcap'
    assert information['relative_file_paths'] == ['bag_0.mcap'] == [f['path'] for f in information['files']]
    assert (information['compression_format'], information['compression_mode']) == ('', '')
    joints, silent = (entry['topic_metadata'] for entry in information['topics_with_message_count'])
    assert [profile['reliability'] for profile in joints['offered_qos_profiles']] == [
        'reliable',
        'best_effort',
    ]
    assert joints['offered_qos_profiles'][0]['deadline'] == {'sec': 9223372036, 'nsec': 854775807}
    assert joints['offered_qos_profiles'][1]['lifespan'] == {'sec': 1, 'nsec': 500_000_000}
    assert silent['offered_qos_profiles'] == []
    assert joints['type_description_hash'].startswith('RIHS01_')

    with open(tmp_path / 'bag/bag_0.mcap', 'rb') as file:
        reader = make_reader(file)
        summary = reader.get_summary()
        assert reader.get_header().profile == 'ros2'
        channel = next(c for c in summary.channels.values() if c.topic == '/joint_states')
        assert channel.message_encoding == 'cdr'
        assert yaml.safe_load(channel.metadata['offered_qos_profiles']) == joints['offered_qos_profiles']
        assert channel.metadata['topic_type_hash'] == joints['type_description_hash']
        schema = summary.schemas[channel.schema_id]
        assert (schema.name, schema.encoding) == ('sensor_msgs/msg/JointState', 'ros2msg')
        assert schema.data.decode() == message_definition(schema.name).text
        (record,) = reader.iter_metadata()
        assert record.name == 'rosbag2'
        assert yaml.safe_load(record.metadata['serialized_metadata']) == information
        assert all(index.message_index_offsets for index in summary.chunk_indexes)
        (message,) = [m for _, _, m in reader.iter_messages()]
        assert (message.log_time, message.publish_time, message.sequence) == (START_NS, START_NS - 5, 7)


def test_whatever_was_flushed_is_on_the_disk_before_the_writer_ends(tmp_path):
    writer = BagWriter(tmp_path / 'bag', flush_s=0.0)
    writer.add_topic('/x', 'std_msgs/msg/Float64')
    for count in range(1, 20):
        writer.write('/x', bytes(12), START_NS + count)
        assert sum(scan_mcap(writer.path).counts.values()) == count
        assert not (tmp_path / 'bag/metadata.yaml').exists()
    writer.close()
    assert len(read_bag(tmp_path / 'bag')) == 19


def test_what_can_not_be_written_is_refused(tmp_path):
    write_bag(tmp_path / 'bag', [])
    with pytest.raises(DatasetError, match='holds a bag already'):
        BagWriter(tmp_path / 'bag')
    with pytest.raises(ConfigError, match="'gzip' is not one of none, lz4, zstd"):
        BagWriter(tmp_path / 'other', compression='gzip')
    (tmp_path / 'file').touch()
    with pytest.raises(DatasetError, match='can not be written: Not a directory'):
        BagWriter(tmp_path / 'file' / 'bag')
    with BagWriter(tmp_path / 'typed') as writer:
        writer.add_topic('/x', 'std_msgs/msg/Float64')
        with pytest.raises(DatasetError, match=r'/x has type std_msgs/msg/Float64, not std_msgs/msg/String'):
            writer.add_topic('/x', 'std_msgs/msg/String')


# --- truncated and damaged files ------------------------------------------------------------------


def repaired(tmp_path, content, name='cut_0.mcap'):
    """Repair a file of that content; returns its messages, or None where nothing could be saved."""
    folder = tmp_path / 'cut'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).write_bytes(content)
    try:
        repair = repair_bag([folder / name], {})
    except DatasetError:
        assert [path.name for path in folder.iterdir()] == [name]
        return None
    found = read_bag(folder)
    assert sorted(entry[:3] for entry in read_mcap(folder / name)) == sorted(found)
    assert repair.n_messages == len(found)
    return found


@pytest.mark.parametrize('compression', ['none', 'zstd'])
def test_a_file_cut_anywhere_keeps_what_came_before(compression, tmp_path, numbered_bag):
    path, whole = numbered_bag
    if compression != 'none':
        entries = [(topic, stamp - START_NS, data, 0) for topic, stamp, data in whole]
        path = write_bag(tmp_path / 'other', entries, compression)
    content = path.read_bytes()
    chunks = [block.chunk.chunk_start_offset for block in scan_mcap(path).blocks]
    assert len(chunks) > 5

    @fresh
    @given(cut=st.integers(0, len(content)))
    def check(cut):
        found = repaired(tmp_path, content[:cut]) or []
        assert found == whole[: len(found)]
        # Of an uncompressed chunk nothing that is there is lost; of a compressed one what came before it is saved.
        first_missing = whole[len(found)][2] if len(found) < len(whole) else None
        if compression == 'none' and first_missing is not None:
            assert content.find(first_missing) + len(first_missing) > cut
        if compression != 'none':
            complete = sum(start < cut for start in chunks[1:])
            assert len(found) >= sum(
                sum(block.counts.values()) for block in scan_mcap(path).blocks[:complete]
            )

    check()
    assert repaired(tmp_path, content) == whole


def test_a_damaged_byte_costs_what_follows_and_nothing_before(tmp_path, numbered_bag):
    path, whole = numbered_bag
    content = path.read_bytes()
    scan = scan_mcap(path)
    middle = scan.blocks[len(scan.blocks) // 2]
    position = middle.chunk.chunk_start_offset + 200
    damaged = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
    before = sum(sum(block.counts.values()) for block in scan.blocks[: len(scan.blocks) // 2])
    assert repaired(tmp_path, damaged) == whole[:before]


@pytest.mark.parametrize('compression', ['none', 'zstd', 'lz4', 'no chunks'])
def test_damage_anywhere_ends_what_is_kept_and_nothing_else(compression, tmp_path, numbered_bag):
    path, whole = numbered_bag
    entries = [(topic, stamp - START_NS, data, 0) for topic, stamp, data in whole[:40]]
    if compression == 'no chunks':
        path = write_without_chunks(tmp_path / 'plain.mcap')
    else:
        path = write_bag(tmp_path / 'other', entries, compression)
    content, scan = path.read_bytes(), scan_mcap(path)
    for position in range(len(MAGIC), scan.kept_end, 29):
        for damage in (b'\xff' * 8, bytes(8)):
            path.write_bytes(content[:position] + damage + content[position + 8 :])
            found = scan_mcap(path)
            bag_information(found.topics(), [], {})  # what is damaged is not in metadata.yaml either
            intact = [block.counts for block in scan.blocks if block.end <= position]
            assert [block.counts for block in found.blocks[: len(intact)]] == intact


def test_repairing_twice_or_a_whole_file_changes_nothing(tmp_path, numbered_bag):
    path, whole = numbered_bag
    for content in (path.read_bytes(), path.read_bytes()[:20_000]):
        first = repaired(tmp_path, content)
        again = (tmp_path / 'cut' / 'cut_0.mcap').read_bytes()
        assert repaired(tmp_path, again) == first
        assert first == whole[: len(first)]


@pytest.mark.parametrize('content', [b'', b'\x89MCAP0\r\n', b'not an mcap file at all'])
def test_a_file_without_one_message_is_left_as_it_is(tmp_path, content):
    assert repaired(tmp_path, content) is None
    assert (tmp_path / 'cut' / 'cut_0.mcap').read_bytes() == content


def test_an_index_without_entries_costs_no_chunk(tmp_path, monkeypatch):
    """Go's writer indexes every channel that it has met in every chunk, also where it says nothing."""
    reset = ChunkBuilder.reset

    def reset_keeping_channels(builder):
        channels = list(builder.message_indices)
        reset(builder)
        builder.message_indices = {channel: MessageIndex(channel, []) for channel in channels}

    monkeypatch.setattr(ChunkBuilder, 'reset', reset_keeping_channels)
    path = tmp_path / 'go.mcap'
    with open(path, 'wb') as file:
        writer = Writer(file, chunk_size=200, compression=CompressionType.NONE)
        writer.start('ros2', 'mcap go v1.7.0')
        schema = writer.register_schema('std_msgs/msg/Float64', 'ros2msg', b'float64 data\n')
        often, once = (
            writer.register_channel(topic, 'cdr', schema, {OFFERED_QOS: ''}) for topic in ('/often', '/once')
        )
        writer.add_message(once, START_NS, bytes(12), START_NS)
        for i in range(200):
            writer.add_message(often, START_NS + i, i.to_bytes(12, 'little'), START_NS + i)
        writer.finish()
    monkeypatch.undo()
    scan, content = scan_mcap(path), path.read_bytes()
    assert (scan.damage, sum(scan.counts.values())) == ('', 201)
    found = repaired(tmp_path, content[: int(0.7 * len(content))])
    assert [stamp for topic, stamp, _ in found if topic == '/often'] == list(
        range(START_NS, START_NS + len(found) - 1)
    )
    assert len(found) > 130


def write_without_chunks(path):
    """As rosbag2 does with the preset `fastwrite`; nothing in there has a checksum."""
    with open(path, 'wb') as file:
        writer = Writer(file, use_chunking=False, compression=CompressionType.NONE)
        writer.start('ros2', 'another recorder')
        schema = writer.register_schema('std_msgs/msg/Float64', 'ros2msg', b'float64 data\n')
        channel = writer.register_channel('/x', 'cdr', schema, {OFFERED_QOS: qos_text([OfferedQos()])})
        for i in range(50):
            writer.add_message(channel, START_NS + i, i.to_bytes(12, 'little'), START_NS + i)
    return path


def test_a_file_without_chunks_is_repaired_too(tmp_path):
    content = write_without_chunks(tmp_path / 'plain.mcap').read_bytes()
    whole = [('/x', START_NS + i, i.to_bytes(12, 'little')) for i in range(50)]
    assert repaired(tmp_path, content) == whole
    assert repaired(tmp_path, content[:-1]) == whole[:-1]
    assert repaired(tmp_path, content[: len(content) // 2]) == whole[: len(read_bag(Path(tmp_path / 'cut')))]


# --- header stamps --------------------------------------------------------------------------------


def stamped(stamp_ns, order='little'):
    sec, nanosec = divmod(stamp_ns, 10**9)
    head = b'\0\1\0\0' if order == 'little' else b'\0\0\0\0'
    return head + sec.to_bytes(4, order) + nanosec.to_bytes(4, order) + bytes(20)


@given(stamp_ns=st.integers(0, 2**31 * 10**9 - 1), order=st.sampled_from(['little', 'big']))
def test_a_stamp_is_read_from_the_first_bytes(stamp_ns, order):
    assert header_stamp_ns(stamped(stamp_ns, order)) == stamp_ns


def test_gaps_zero_stamps_and_stamps_that_go_back_are_counted():
    watch = StampWatch()
    steps = [10**7] * 50
    steps[20] = 3 * 10**7  # two messages are missing
    steps[40] = -(10**7)
    stamp_ns = START_NS
    for step_ns in steps:
        watch.see(stamped(stamp_ns))
        stamp_ns += step_ns
    watch.see(stamped(0))
    watch.see(b'\0\1\0\0')
    assert watch.report() == {
        'zero_stamps': 2,
        'stamps_out_of_order': 1,
        'stamp_gaps': 1,
        'largest_stamp_step_s': 0.03,
    }
