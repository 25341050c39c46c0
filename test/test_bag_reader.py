"""Reading rosbag2 files of every kind, and what a file that is none leads to."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from bag_files import (
    GRIPPER,
    IMAGES,
    JOINTS,
    MS,
    START_NS,
    STORE,
    Arm,
    gripper,
    join_bags,
    joints,
    kind,
    write_bag,
)
from mcap.reader import make_reader
from rosbags.typesys import get_types_from_msg

from decoupled_policy_ros.data.bags.reader import Bag, bag_summary
from decoupled_policy_ros.data.bags.writer import BagWriter
from decoupled_policy_ros.errors import DatasetError, MessageError

ARM = Arm(seconds=1.0)
TOPICS = [JOINTS, *IMAGES.values(), GRIPPER]


def written(folder: Path, storage: str, compression: str) -> Path:
    """A bag of `ARM`, as the name says."""
    logged = ARM.messages()
    if compression == 'split':
        half = len(logged) // 2
        parts = [
            write_bag(folder / name, part, storage)
            for name, part in (('a', logged[:half]), ('b', logged[half:]))
        ]
        return join_bags(folder / 'bag', parts)
    bag = write_bag(folder / 'bag', logged, storage, '' if compression == 'single file' else compression)
    return next(bag.glob('bag.*')) if compression == 'single file' else bag


KINDS = [
    (storage, compression)
    for storage in ('mcap', 'sqlite3')
    for compression in ('', 'message', 'file', 'storage', 'split', 'single file')
    if (storage, compression) != ('sqlite3', 'storage')
]


@pytest.mark.parametrize(('storage', 'compression'), KINDS)
def test_every_kind_of_file_holds_the_same_messages(tmp_path, storage, compression):
    expected = [(t, topic, message) for t, topic, message in ARM.messages() if topic in TOPICS]
    with Bag(written(tmp_path, storage, compression)) as bag:
        found = list(bag.messages(TOPICS))
        assert [(m.log_ns, m.topic) for m in found] == [(t, topic) for t, topic, _ in expected]
        for message, (_, _, original) in zip(found, expected, strict=True):
            decoded = message.decode()
            for name in ('position', 'data'):
                if hasattr(original, name):
                    np.testing.assert_array_equal(getattr(decoded, name), getattr(original, name))
        assert bag.topics[JOINTS].message_type == 'sensor_msgs/msg/JointState'
        assert bag.topics[JOINTS].count == 100
        assert bag.duration_s == pytest.approx((expected[-1][0] - expected[0][0]) * 1e-9)


def our_recording(folder: Path, count: int) -> Path:
    """Joint states, one a millisecond, as the episode recorder writes them."""
    with BagWriter(folder) as writer:
        writer.add_topic(JOINTS, 'sensor_msgs/msg/JointState')
        for k in range(count):
            data = STORE.serialize_cdr(joints(START_NS + k * MS), 'sensor_msgs/msg/JointState')
            writer.write(JOINTS, bytes(data), START_NS + k * MS)
    return folder


def test_our_own_recordings_are_read(tmp_path):
    with Bag(our_recording(tmp_path / 'bag', 50)) as bag:
        messages = list(bag.messages([JOINTS]))
        assert [m.log_ns for m in messages] == [START_NS + k * MS for k in range(50)]
        np.testing.assert_array_equal(messages[7].decode().position, joints(START_NS + 7 * MS).position)


def test_the_summary_agrees_with_the_open_bag(tmp_path):
    path = written(tmp_path, 'mcap', '')
    for place in (path, next(path.glob('*.mcap'))):
        summary = bag_summary(place)
        with Bag(place) as bag:
            assert summary.counts == {name: topic.count for name, topic in bag.topics.items()}
            assert summary.duration_s == pytest.approx(bag.duration_s, abs=1e-6)


def test_a_type_that_nobody_knows_is_read_from_the_bag(tmp_path):
    STORE.register(get_types_from_msg('std_msgs/Header header\nfloat64[] forces', 'lab_msgs/msg/Skin'))
    skin = kind('lab_msgs/msg/Skin')(joints(START_NS).header, np.array([1.5, -2.5]))
    path = write_bag(tmp_path / 'bag', [(START_NS, '/skin', skin)])
    with Bag(path) as bag:
        (message,) = bag.messages(['/skin'])
        assert bag.topics['/skin'].message_type == 'lab_msgs/msg/Skin'
        np.testing.assert_array_equal(message.decode().forces, [1.5, -2.5])


def test_bytes_that_are_not_the_type_are_a_refused_message(tmp_path):
    with BagWriter(tmp_path / 'bag') as writer:
        writer.add_topic(JOINTS, 'sensor_msgs/msg/JointState')
        writer.write(JOINTS, b'\x00\x01\x00\x00\xff\xff\xff\xff', START_NS)
    with Bag(tmp_path / 'bag') as bag:
        (message,) = bag.messages([JOINTS])
        with pytest.raises(MessageError, match=r'8 bytes that are no sensor_msgs/msg/JointState'):
            message.decode()


def test_a_topic_that_is_not_there_is_named_beside_those_that_are(tmp_path):
    path = write_bag(
        tmp_path / 'bag', [(START_NS, JOINTS, joints(START_NS)), (START_NS, GRIPPER, gripper(0.0))]
    )
    with Bag(path) as bag:
        with pytest.raises(
            DatasetError, match=r'no topic /wrist/image_raw; its topics: .*/joint_states \(sensor'
        ):
            bag.require('/wrist/image_raw', 'sensor_msgs/msg/Image')
        with pytest.raises(
            DatasetError, match=r'/joint_states is of type sensor_msgs/msg/JointState, expected std'
        ):
            bag.require(JOINTS, 'std_msgs/msg/Float64')


def no_folder(path: Path) -> Path:
    return path / 'nothing'


def no_bag(path: Path) -> Path:
    (path / 'notes.txt').write_text('none')
    return path / 'notes.txt'


def empty_folder(path: Path) -> Path:
    (path / 'empty').mkdir()
    return path / 'empty'


def truncated(path: Path) -> Path:
    bag = written(path, 'mcap', '')
    file = next(bag.glob('*.mcap'))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return bag


def truncated_database(path: Path) -> Path:
    bag = written(path, 'sqlite3', '')
    file = next(bag.glob('*.db3'))
    file.write_bytes(file.read_bytes()[:5000])
    return bag


def not_ended(path: Path) -> Path:
    bag = written(path, 'mcap', '')
    (bag / 'metadata.yaml').unlink()
    return bag


def database_not_ended(path: Path) -> Path:
    bag = written(path, 'sqlite3', '')
    (bag / 'metadata.yaml').unlink()
    return bag


def other_storage(path: Path) -> Path:
    bag = written(path, 'mcap', '')
    metadata = bag / 'metadata.yaml'
    metadata.write_text(metadata.read_text().replace('storage_identifier: mcap', 'storage_identifier: tape'))
    return bag


def file_gone(path: Path) -> Path:
    bag = written(path, 'mcap', '')
    next(bag.glob('*.mcap')).unlink()
    return bag


@pytest.mark.parametrize(
    ('make', 'reason'),
    [
        (no_folder, r'nothing does not exist; expected a rosbag2 folder'),
        (no_bag, r'notes\.txt is no bag'),
        (empty_folder, r'empty is no bag: a rosbag2 folder has a metadata\.yaml'),
        (truncated, r'truncated or damaged .*`decoupled-policy recover`'),
        (truncated_database, r'truncated or damaged .*`sqlite3 FILE \.recover`'),
        (database_not_ended, r'not ended; `ros2 bag reindex -s sqlite3 .*bag` writes it'),
        (not_ended, r'no metadata\.yaml: the recording was not ended; `decoupled-policy recover`'),
        (other_storage, r"'tape' not supported"),
        (file_gone, r'files are missing'),
    ],
)
def test_what_is_no_bag_is_refused_with_a_reason(tmp_path, make, reason):
    path = make(tmp_path)
    with pytest.raises(DatasetError, match=reason):
        Bag(path)


def test_damage_in_the_middle_ends_the_reading_with_a_reason(tmp_path):
    path = our_recording(tmp_path / 'bag', 20_000)
    file = next(path.glob('*.mcap'))
    with file.open('rb') as opened:
        chunks = make_reader(opened).get_summary().chunk_indexes
    middle = chunks[len(chunks) // 2]  # its messages: what lies between chunks is read without a check
    content = bytearray(file.read_bytes())
    content[middle.chunk_start_offset + middle.chunk_length // 2] ^= 0xFF
    file.write_bytes(content)
    with Bag(path) as bag, pytest.raises(DatasetError, match='damaged'):
        list(bag.messages([JOINTS]))


@pytest.mark.parametrize('storage', ['mcap', 'sqlite3'])
def test_a_recording_whose_clock_goes_back_is_refused(tmp_path, storage):
    first = [(START_NS + k * 10 * MS, JOINTS, joints(START_NS + k * 10 * MS)) for k in range(500)]
    parts = [write_bag(tmp_path / 'a', first, storage), write_bag(tmp_path / 'b', first[:200], storage)]
    with pytest.raises(
        DatasetError, match=r'clock of the recording goes back, from 1700000004\.990 s to 17000000'
    ):
        Bag(join_bags(tmp_path / 'bag', parts))


@pytest.mark.parametrize('storage', ['mcap', 'sqlite3'])
@pytest.mark.parametrize('goes_back', [False, True])
def test_a_topic_that_was_written_late_is_read_in_its_place_and_one_that_goes_back_is_not(
    tmp_path, storage, goes_back
):
    logged = [(START_NS + k * 10 * MS, JOINTS, joints(START_NS + k * 10 * MS)) for k in range(500)]
    late = [(START_NS + k * 10 * MS, GRIPPER, gripper(0.01 * k)) for k in range(3)]
    if goes_back:
        logged = [logged[0], (late[2][0] + 600 * MS, GRIPPER, late[2][2]), *logged[1:]]
    parts = [write_bag(tmp_path / 'a', logged, storage), write_bag(tmp_path / 'b', late, storage)]
    path = join_bags(tmp_path / 'bag', parts)
    if goes_back:
        with pytest.raises(DatasetError, match=r'goes back, from 1700000000\.620 s to 1700000000\.000 s'):
            Bag(path)
        return
    with Bag(path) as bag:
        assert [m.log_ns for m in bag.messages([GRIPPER])] == [t for t, _, _ in late]


def test_a_latched_message_that_was_written_late_is_read_in_its_place(tmp_path):
    times_ns = [START_NS + k * 10 * MS for k in range(200)]
    with BagWriter(tmp_path / 'bag') as writer:
        for topic in ('/a', '/latched'):
            writer.add_topic(topic, 'std_msgs/msg/Float64')
        for k, time_ns in enumerate(times_ns):
            if k == 100:
                writer.flush()
                writer.write('/latched', bytes(12), START_NS + 1)
            writer.write('/a', bytes(12), time_ns)
    with Bag(tmp_path / 'bag') as bag:
        found = [(m.topic, m.log_ns) for m in bag.messages(['/a', '/latched'])]
    assert found == [('/a', times_ns[0]), ('/latched', START_NS + 1), *(('/a', t) for t in times_ns[1:])]


def test_a_bag_leaves_no_temporary_files(tmp_path, monkeypatch):
    path = written(tmp_path, 'mcap', 'file')
    (tmp_path / 'tmp').mkdir()
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'tmp'))
    with Bag(path) as bag:
        assert sum(1 for _ in bag.messages([JOINTS])) == 100
        assert any((tmp_path / 'tmp').iterdir())
    assert not any((tmp_path / 'tmp').iterdir())
    shutil.rmtree(path)
