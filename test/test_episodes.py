"""Episodes on disk: their lifecycle, what a killed process leaves, what a full disk does, and `recover`."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
import yaml
import zstandard
from bag_files import JOINTS, Arm, write_bag
from mcap.opcode import Opcode
from mcap.writer import CompressionType, Writer
from rosbags.rosbag2 import Reader

from decoupled_policy_ros.cli import main as command
from decoupled_policy_ros.data.bags.episodes import PROGRESS_FILE, EpisodeStore, read_episode
from decoupled_policy_ros.data.bags.format import METADATA_FILE
from decoupled_policy_ros.data.bags.reader import Bag, bag_summary
from decoupled_policy_ros.data.bags.recovery import recover
from decoupled_policy_ros.data.bags.repair import repair_bag
from decoupled_policy_ros.data.bags.salvage import scan_mcap
from decoupled_policy_ros.data.bags.writer import BagWriter
from decoupled_policy_ros.data.conversion.recordings import expand
from decoupled_policy_ros.errors import DatasetError

START_NS = 1_700_000_000_000_000_000
HEADER = {'instruction': 'lift the cube', 'started_ns': START_NS}
TOPIC = '/gripper_command'
MESSAGE_BYTES = 100_000

# Writes an episode of `count` messages to the folder, says so, and waits to be killed.
CHILD = """
import json, sys, time
from decoupled_policy_ros.data.bags.episodes import EpisodeStore
folder, count = sys.argv[1], int(sys.argv[2])
episode = EpisodeStore(folder).begin({'instruction': 'lift', 'started_ns': 1_700_000_000_000_000_000})
episode.bag.add_topic('/gripper_command', 'std_msgs/msg/Float64')
for i in range(count):
    episode.bag.write('/gripper_command', i.to_bytes(100, 'little'), 1_700_000_000_000_000_000 + i)
episode.bag.flush()
for i in range(3):  # received, but not handed over before the end
    episode.bag.write('/gripper_command', bytes(100), 1_700_000_000_000_000_000 + count + i)
topic = {'type': 'std_msgs/msg/Float64', 'received': count + 3, 'written': count, 'lost_by_dds': 0}
episode.note_progress('lift the red cube', {'/gripper_command': topic})
print('ready', flush=True)
time.sleep(600)
"""


def start_child(folder, count):
    child = subprocess.Popen(
        [sys.executable, '-c', CHILD, folder, str(count)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == 'ready\n'
    return child


def kill(child):
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


@contextmanager
def running_child(folder, count):
    child = start_child(folder, count)
    try:
        yield child
    finally:
        kill(child)


def killed_child(folder, count):
    with running_child(folder, count):
        pass


def write_messages(episode, count, size=20):
    episode.bag.add_topic(TOPIC, 'std_msgs/msg/Float64')
    for i in range(count):
        episode.bag.write(TOPIC, i.to_bytes(size, 'little'), START_NS + i)


def read_numbers(folder):
    """What the messages of a bag count."""
    with Reader(folder) as reader:
        return [int.from_bytes(bytes(data), 'little') for _, _, data in reader.messages()]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def store(tmp_path):
    return EpisodeStore(tmp_path / 'episodes')


def test_an_episode_has_its_name_when_it_is_complete_and_not_before(store):
    episode = store.begin(HEADER)
    write_messages(episode, 10)
    assert names(store.folder) == ['.episode_000000.partial']
    assert store.episodes() == store.abandoned() == []
    path = episode.finish(success=True, ended_ns=START_NS + 9)
    assert store.episodes() == [path] == [store.folder / 'episode_000000']
    assert names(path) == ['episode.json', 'episode_000000_0.mcap', 'metadata.yaml']
    assert read_numbers(path) == list(range(10))
    assert read_episode(path) == {'format': 1, **HEADER, 'success': True, 'ended_ns': START_NS + 9}


def test_numbers_go_on_after_the_highest(store):
    for expected in (0, 1):
        episode = store.begin(HEADER)
        assert episode.number == expected
        write_messages(episode, 1)
        episode.finish()
    running, other = store.begin(HEADER), EpisodeStore(store.folder).begin(HEADER)
    assert (running.number, other.number) == (2, 3)
    running.discard()
    other.discard()
    store.set_aside(store.folder / 'episode_000001')
    assert names(store.folder) == ['.discarded', 'episode_000000']
    assert store.next_number() == 1


def test_what_is_set_aside_is_kept_whole_replaces_nothing_and_is_seen_by_nobody(store):
    for count in (1, 2, 3):
        episode = store.begin(HEADER)
        write_messages(episode, count)
        path = store.set_aside(episode.finish())
        assert read_numbers(path) == list(range(count))
    discarded = store.folder / '.discarded'
    assert names(discarded) == ['episode_000000', 'episode_000000_2', 'episode_000000_3']
    (mcap,) = (discarded / 'episode_000000').glob('*.mcap')
    os.truncate(mcap, mcap.stat().st_size - 10)
    assert recover(store.folder) == store.episodes() == store.abandoned() == []
    episode = store.begin(HEADER)
    write_messages(episode, 1)
    path = episode.finish()
    assert expand([store.folder]) == ([path], [])


def test_an_episode_without_a_message_is_not_kept(store):
    episode = store.begin(HEADER)
    episode.bag.add_topic(TOPIC, 'std_msgs/msg/Float64')
    with pytest.raises(DatasetError, match='episode_000000: not one message was recorded'):
        episode.finish()
    assert names(store.folder) == []


def test_an_episode_that_can_not_be_removed_is_named_and_let_go(store, monkeypatch):
    busy = Mock(side_effect=OSError(errno.ENOTEMPTY, 'Directory not empty'))
    for count, folder in ((1, '.episode_000000.partial'), (0, '.episode_000001.partial')):
        episode = store.begin(HEADER)
        write_messages(episode, count)
        with monkeypatch.context() as patch:
            patch.setattr('decoupled_policy_ros.data.bags.episodes.shutil.rmtree', busy)
            with pytest.raises(DatasetError, match=f'{folder} can not be removed: Directory not empty'):
                episode.discard() if count else episode.finish()
        assert store.abandoned()[-1] == store.folder / folder  # nobody holds it any more
    episode = store.begin(HEADER)
    assert episode.number == 2
    episode.discard()


@pytest.mark.parametrize(
    'place', ['episodes.write_json', 'episodes._reserve', 'episodes.BagWriter', 'writer.Writer.start']
)
def test_an_episode_that_can_not_begin_leaves_nothing_open(store, monkeypatch, place):
    monkeypatch.setattr(
        f'decoupled_policy_ros.data.bags.{place}', Mock(side_effect=OSError(errno.ENOSPC, 'No space left'))
    )
    before = len(os.listdir('/proc/self/fd'))
    for _ in range(3):
        with pytest.raises(DatasetError, match=r'can not be written: .*No space left'):
            store.begin(HEADER)
    assert (len(os.listdir('/proc/self/fd')), names(store.folder)) == (before, [])


def test_a_folder_that_can_not_be_used_is_refused(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(DatasetError, match='file/episodes can not be made: Not a directory'):
        EpisodeStore(tmp_path / 'file' / 'episodes')


def test_a_sidecar_of_another_format_is_refused(store):
    episode = store.begin(HEADER)
    write_messages(episode, 1)
    path = episode.finish()
    for content, complaint in (('{"format": 2}', 'format 2 is not 1'), ('[]', 'format'), ('{', 'damaged')):
        (path / 'episode.json').write_text(content)
        with pytest.raises(DatasetError, match=complaint):
            read_episode(path)
    (path / 'episode.json').unlink()
    assert read_episode(path) is None


# --- killed ---------------------------------------------------------------------------------------


def test_what_a_killed_recorder_leaves_becomes_an_episode_with_its_losses_counted(store):
    killed_child(store.folder, 1000)
    assert names(store.folder) == ['.episode_000000.partial']
    assert store.abandoned() == [store.folder / '.episode_000000.partial']
    (recovery,) = recover(store.folder)
    assert recovery.path == store.folder / 'episode_000000'
    assert names(recovery.path) == ['episode.json', 'episode_000000_0.mcap', 'metadata.yaml']
    assert read_numbers(recovery.path) == list(range(1000))
    assert (recovery.saved, recovery.received, recovery.lost_messages) == ({TOPIC: 1000}, {TOPIC: 1003}, 3)
    header = read_episode(recovery.path)
    assert header['success'] is None
    assert header['instruction'] == 'lift the red cube'
    assert header['ended_ns'] == START_NS + 999
    assert header['topics'][TOPIC] == {
        'type': 'std_msgs/msg/Float64', 'received': 1003, 'written': 1000, 'lost_by_dds': 0,
    }  # fmt: skip
    assert header['recovered']['messages'] == {TOPIC: {'received': 1003, 'saved': 1000, 'lost': 3}}
    assert recover(store.folder) == []
    assert names(store.folder) == ['episode_000000']


def test_the_end_of_a_file_that_was_cut_is_counted_in_bytes(store):
    killed_child(store.folder, 1000)
    (path,) = store.folder.glob('.*/*.mcap')
    os.truncate(path, path.stat().st_size // 2)
    (recovery,) = recover(store.folder.parent)  # found below, too
    saved = recovery.saved[TOPIC]
    assert 300 < saved < 700
    assert read_numbers(recovery.path) == list(range(saved))
    assert recovery.lost(TOPIC) == 1003 - saved
    assert 0 < recovery.lost_bytes < 200


def test_what_a_living_recorder_writes_is_left_alone(store):
    with running_child(store.folder, 10):
        assert store.abandoned() == []
        (recovery,) = recover(store.folder)
        assert recovery.path is None
        assert 'left alone' in recovery.note
        assert names(store.folder) == ['.episode_000000.partial']
    (recovery,) = recover(store.folder)
    assert read_numbers(recovery.path) == list(range(10))


def test_a_partial_episode_without_a_message_is_removed(store):
    killed_child(store.folder, 0)
    (recovery,) = recover(store.folder)
    assert (recovery.path, names(store.folder)) == (None, [])
    assert 'not one message' in recovery.note


def partial_episode(store, chunks=6):
    """What a recorder that was killed leaves: its folder, its file, and where each chunk of 100 messages begins."""
    episode = store.begin(HEADER)
    episode.bag.add_topic(TOPIC, 'std_msgs/msg/Float64')
    for i in range(100 * chunks):
        episode.bag.write(TOPIC, i.to_bytes(20, 'little'), START_NS + i)
        if i % 100 == 99:
            episode.bag.flush()
    episode._release()
    return episode.bag.path, [block.chunk.chunk_start_offset for block in scan_mcap(episode.bag.path).blocks]


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize('damage', ['first chunk', 'magic', 'length'])
def test_a_damaged_episode_of_which_nothing_can_be_read_is_kept_and_named(store, damage):
    path, chunks = partial_episode(store)
    flip(path, {'first chunk': chunks[0] + 500, 'magic': 0, 'length': chunks[0] + 8}[damage])
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    for _ in range(2):
        (recovery,) = recover(store.folder)
        assert recovery.path is None
        assert 'not one message is intact, episode_000000_0.mcap is damaged at byte' in recovery.note
        assert 'kept as it is' in recovery.note
        assert recovery.lost_bytes > 5 * (chunks[1] - chunks[0])
        assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_what_follows_damage_is_kept_beside_what_was_saved(store):
    path, chunks = partial_episode(store)
    flip(path, chunks[2] + 500)
    content = path.read_bytes()
    (recovery,) = recover(store.folder)
    assert read_numbers(recovery.path) == list(range(200))
    assert f'damaged at byte {chunks[2]} (CRCValidationError crc' in recovery.note
    assert 'what follows is kept in episode_000000_0.mcap.rest' in recovery.note
    assert (recovery.path / 'episode_000000_0.mcap.rest').read_bytes() == content[chunks[2] :]
    assert recover(store.folder) == []


def test_a_full_disk_leaves_no_half_copy_of_what_follows_damage(store):
    path, chunks = partial_episode(store)
    flip(path, chunks[2] + 500)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with file_size_limit(path.parent, len(path.read_bytes()) - chunks[2] - 1) as reason:
        (recovery,) = recover(store.folder)
    assert recovery.failed and f'.mcap.rest can not be written: {reason}' in recovery.note
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    (recovery,) = recover(store.folder)  # once there is room
    assert read_numbers(recovery.path) == list(range(200))


@pytest.mark.parametrize('what', ['length of a chunk', 'length of an index', 'kind of an index'])
def test_a_flipped_bit_that_looks_like_the_end_of_the_file_costs_no_chunk(store, what):
    path, chunks = partial_episode(store)
    content = bytearray(path.read_bytes())
    head = chunks[2]
    if 'index' in what:
        head += 9 + int.from_bytes(content[head + 1 : head + 9], 'little')
        assert content[head] == Opcode.MESSAGE_INDEX
    if what.startswith('kind'):
        content[head] = Opcode.DATA_END
    else:
        content[head + 4] ^= 0x10  # beyond the end of the file, but no more than a record may have
    path.write_bytes(content)
    (recovery,) = recover(store.folder)
    saved = read_numbers(recovery.path)
    assert saved == list(range(len(saved))) and len(saved) >= 200
    rest = (recovery.path / 'episode_000000_0.mcap.rest').read_bytes()
    assert bytes(content[chunks[3] :]) in rest and 'what follows is kept in' in recovery.note


@pytest.mark.parametrize('text', ['{"topics": {"/x": {}}}', '{"topics": null}', '[]'])
def test_an_odd_note_of_its_progress_keeps_no_episode_from_being_recovered(store, text):
    path, _ = partial_episode(store)
    (path.parent / PROGRESS_FILE).write_text(text)
    partial_episode(store)
    assert [read_numbers(recovery.path) for recovery in recover(store.folder)] == [list(range(600))] * 2


def test_one_that_can_not_be_recovered_does_not_keep_the_others_from_it(store, capsys, monkeypatch):
    for _ in range(3):
        partial_episode(store)

    def repair(paths, custom):
        if 'episode_000001' in paths[0].name:
            raise DatasetError(f'{paths[0]} can not be finished: No space left on device')
        return repair_bag(paths, custom)

    monkeypatch.setattr('decoupled_policy_ros.data.bags.recovery.repair_bag', repair)
    monkeypatch.setattr(sys, 'argv', ['decoupled-policy', 'recover', str(store.folder)])
    with pytest.raises(SystemExit, match='1'):
        command()
    assert 'not recovered: ' in (printed := capsys.readouterr().out)
    assert 'No space left on device' in printed
    assert names(store.folder) == ['.episode_000001.partial', 'episode_000000', 'episode_000002']
    monkeypatch.undo()
    (recovery,) = recover(store.folder)
    assert read_numbers(recovery.path) == list(range(600))


@pytest.mark.parametrize('content', [b'', bytes(500), b'rosbag2_bagfile_information:\n  version: 9\n'])
def test_metadata_that_says_nothing_is_written_anew(store, content):
    """As a power cut leaves it."""
    episode = store.begin(HEADER)
    write_messages(episode, 50)
    path = episode.finish()
    whole, mcap = (path / METADATA_FILE).read_bytes(), next(path.glob('*.mcap')).read_bytes()
    (path / METADATA_FILE).write_bytes(content)
    with pytest.raises(DatasetError, match=r'metadata.yaml is damaged: .*`decoupled-policy recover` writes'):
        bag_summary(path)
    (recovery,) = recover(store.folder)
    assert (recovery.path, recovery.saved) == (path, {TOPIC: 50})
    assert 'written anew' in recovery.note
    assert (path / METADATA_FILE).read_bytes() == whole
    assert (path / 'metadata.yaml.damaged').read_bytes() == content
    assert next(path.glob('*.mcap')).read_bytes() == mcap
    assert recover(store.folder) == []


def test_an_episode_file_that_a_power_cut_emptied_does_not_cost_the_episode(store):
    path, _ = partial_episode(store)
    (path.parent / 'episode.json').write_bytes(b'')
    (recovery,) = recover(store.folder)
    assert read_numbers(recovery.path) == list(range(600))
    assert 'episode.json is damaged' in recovery.note
    assert read_episode(recovery.path) is None
    assert (recovery.path / 'episode.json.damaged').exists()


def test_the_verb_prints_what_was_lost_and_then_that_nothing_is_left(store, capsys, monkeypatch):
    killed_child(store.folder, 500)
    monkeypatch.setenv('COLUMNS', '200')
    for expected in (['/gripper_command', '503', '500', '3', 'episode_000000'], ['nothing to recover']):
        monkeypatch.setattr(sys, 'argv', ['decoupled-policy', 'recover', str(store.folder)])
        command()
        printed = capsys.readouterr().out
        assert [text for text in expected if text not in printed] == []
    monkeypatch.setattr(sys, 'argv', ['decoupled-policy', 'recover', str(store.folder / 'none')])
    with pytest.raises(SystemExit):
        command()
    assert 'is no folder' in capsys.readouterr().err


def test_names_with_brackets_are_printed_as_they_are(tmp_path, capsys, monkeypatch):
    folder = tmp_path / '[red] cup[' / ']'  # [/] ends a style that was never begun
    folder.mkdir(parents=True)
    foreign_bag(folder / 'run [bold]1')
    for text in ('run [bold]1_recovered', '[red] cup[/]: nothing to recover'):
        monkeypatch.setattr(sys, 'argv', ['decoupled-policy', 'recover', str(folder)])
        command()
        printed = capsys.readouterr().out
        assert text in printed


def test_what_the_verb_prints_into_a_pipe_is_not_cut(tmp_path, capsys, monkeypatch):
    folder = tmp_path / ('a_folder_with_a_long_name' * 3) / ('a_bag_with_a_long_name' * 3)
    folder.parent.mkdir()
    monkeypatch.setenv('COLUMNS', '60')
    foreign_bag(folder)
    for title in ('recovered', 'nothing recovered'):
        monkeypatch.setattr(sys, 'argv', ['decoupled-policy', 'recover', str(tmp_path)])
        command()
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        assert lines[0] == title
        assert any(folder.name in line and TOPIC in line for line in lines) == (title == 'recovered')
        shutil.rmtree(f'{folder}_recovered', ignore_errors=True)
        (folder / f'{folder.name}_0.mcap').write_bytes(b'')


# --- bags of other recorders ----------------------------------------------------------------------


def foreign_bag(folder, files=1):
    """What `ros2 bag record` leaves when it is killed: MCAP files without an end, the last one torn."""
    folder.mkdir()
    for number in range(files):
        with open(folder / f'{folder.name}_{number}.mcap', 'wb') as file:
            writer = Writer(file, chunk_size=1000, compression=CompressionType.NONE)
            writer.start('ros2', 'libmcap 1.3.1')
            schema = writer.register_schema('std_msgs/msg/Float64', 'ros2msg', b'float64 data\n')
            channel = writer.register_channel(TOPIC, 'cdr', schema, {'offered_qos_profiles': ''})
            for i in range(100):
                count = 100 * number + i
                writer.add_message(channel, START_NS + count, count.to_bytes(12, 'little'), START_NS + count)
            if number < files - 1:
                writer.finish()
            else:
                writer.flush()
                os.truncate(folder / f'{folder.name}_{number}.mcap', file.tell() - 1500)


def test_a_truncated_bag_of_another_recorder_gets_a_whole_copy_beside_it(tmp_path):
    foreign_bag(tmp_path / 'bag', files=12)  # bag_10 comes after bag_9
    before = {path.name: path.read_bytes() for path in (tmp_path / 'bag').iterdir()}
    (recovery,) = recover(tmp_path / 'bag')
    assert recovery.path == tmp_path / 'bag_recovered'
    found = read_numbers(recovery.path)
    assert found == list(range(len(found)))
    assert 1150 < len(found) < 1200
    assert recovery.saved == {TOPIC: len(found)}
    assert (recovery.path / METADATA_FILE).is_file()
    assert {path.name: path.read_bytes() for path in (tmp_path / 'bag').iterdir()} == before
    assert recover(tmp_path / 'bag') == []


@pytest.mark.parametrize('with_metadata', [True, False])
def test_a_finished_episode_that_was_cut_later_keeps_what_its_sidecar_says(store, with_metadata):
    episode = store.begin({**HEADER, 'robot': {'name': 'panda_sim'}})
    write_messages(episode, 1000)
    topics = {TOPIC: {'type': 'std_msgs/msg/Float64', 'received': 1000, 'written': 1000, 'lost_by_dds': 0}}
    path = episode.finish(success=True, ended_ns=START_NS + 2000, topics=topics)
    header = read_episode(path)
    (mcap,) = path.glob('*.mcap')
    os.truncate(mcap, scan_mcap(mcap).kept_end // 2)
    bytes_left = mcap.stat().st_size
    if not with_metadata:
        (path / METADATA_FILE).unlink()
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    (recovery,) = recover(store.folder)
    assert recovery.path == store.folder / 'episode_000000_recovered'
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    saved = recovery.saved[TOPIC]
    assert 300 < saved < 700
    assert read_numbers(recovery.path) == list(range(saved))
    assert read_episode(recovery.path) == header | {
        'ended_ns': START_NS + saved - 1,
        'topics': {TOPIC: topics[TOPIC] | {'written': saved}},
        'recovered': {
            'from': 'episode_000000',
            'bytes_found': bytes_left,
            'lost_bytes': recovery.lost_bytes,
            'lost_messages': 1000 - saved,
            'messages': {TOPIC: {'received': 1000, 'saved': saved, 'lost': 1000 - saved}},
        },
    }
    assert recover(store.folder) == []
    assert names(store.folder) == ['episode_000000', 'episode_000000_recovered']


def test_a_cut_bag_is_saved_without_a_sidecar_that_is_damaged(tmp_path):
    foreign_bag(tmp_path / 'bag')
    (tmp_path / 'bag' / 'episode.json').write_text('{')
    (recovery,) = recover(tmp_path)
    assert names(recovery.path) == ['bag_0.mcap', 'metadata.yaml']
    assert 'left out: ' in recovery.note
    assert 'episode.json is damaged' in recovery.note


def test_a_bag_that_is_still_being_written_is_left_alone(tmp_path):
    writer = BagWriter(tmp_path / 'bag')
    writer.add_topic(TOPIC, 'std_msgs/msg/Float64')
    writer.write(TOPIC, bytes(12), START_NS)
    writer.flush()
    (recovery,) = recover(tmp_path)
    assert (recovery.path, names(tmp_path)) == (None, ['bag'])
    assert 'left alone' in recovery.note
    writer.close()
    assert recover(tmp_path) == []  # it is whole


def whole_bag(folder):
    with BagWriter(folder) as writer:
        writer.add_topic(TOPIC, 'std_msgs/msg/Float64')
        writer.write(TOPIC, bytes(12), START_NS)
    return folder


def test_metadata_that_are_missing_beside_the_files_of_one_recording_are_written(tmp_path):
    folder = whole_bag(tmp_path / 'run.mcap')  # as of `ros2 bag record -o run.mcap`
    expected = bag_summary(folder)
    (folder / METADATA_FILE).unlink()
    with pytest.raises(
        DatasetError, match='the recording was not ended; `decoupled-policy recover` completes it'
    ):
        bag_summary(folder)
    (recovery,) = recover(tmp_path)
    assert (recovery.path, recovery.saved) == (folder, {TOPIC: 1})
    assert recovery.note == 'metadata.yaml was missing and is written anew'
    assert names(folder) == ['metadata.yaml', 'run.mcap_0.mcap']
    assert bag_summary(folder) == expected and recover(tmp_path) == []


def test_whole_files_of_other_names_are_left_alone(tmp_path):
    folder = whole_bag(tmp_path / 'bag')
    (folder / METADATA_FILE).unlink()
    (folder / 'bag_0.mcap').rename(folder / 'monday.mcap')
    assert (recover(tmp_path), names(tmp_path)) == ([], ['bag'])
    with pytest.raises(DatasetError, match=r'give the files themselves, or .*`ros2 bag reindex -s mcap '):
        bag_summary(folder)


def test_a_cut_bag_says_where_it_is_damaged(tmp_path):
    foreign_bag(tmp_path / 'bag')
    (file,) = (tmp_path / 'bag').iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (recovery,) = recover(tmp_path)
    assert recovery.path is not None and 'bag_0.mcap is damaged at byte ' in recovery.note


def in_folder(folder, stems, torn):
    """Recordings as files of one folder, of those `torn` the end is missing."""
    folder.mkdir()
    for stem in stems:
        bag = write_bag(folder / 'bag', Arm(seconds=0.3).messages())
        (file,) = bag.glob('*.mcap')
        shutil.move(file, folder / f'{stem}.mcap')
        shutil.rmtree(bag)
        if stem in torn:
            os.truncate(folder / f'{stem}.mcap', (folder / f'{stem}.mcap').stat().st_size - 3000)
    return folder


def test_separate_recordings_of_one_folder_are_not_made_one(tmp_path):
    folder = in_folder(tmp_path / 'day', ['a', 'b', 'c', 'd'], torn='cd')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DatasetError, match='`decoupled-policy recover` completes it'):
        bag_summary(folder)
    recoveries = recover(tmp_path)
    assert [recovery.path for recovery in recoveries] == [folder / 'c_recovered', folder / 'd_recovered']
    assert names(folder) == ['a.mcap', 'b.mcap', 'c.mcap', 'c_recovered', 'd.mcap', 'd_recovered']
    assert {name: (folder / name).read_bytes() for name in before} == before
    for recovery in recoveries:
        assert names(recovery.path) == [f'{recovery.path.name[0]}.mcap', 'metadata.yaml']
        assert 0 < sum(recovery.saved.values()) <= len(Arm(seconds=0.3).messages())
    assert recover(tmp_path) == []
    with pytest.raises(DatasetError, match='give the files themselves'):
        bag_summary(folder)


@pytest.mark.parametrize('metadata', ['as it was', 'missing'])
def test_a_cut_bag_of_compressed_messages_can_be_read(metadata, tmp_path):
    folder = write_bag(tmp_path / 'bag', Arm(seconds=1.0).messages(), compression='message')
    path = folder / METADATA_FILE
    content = yaml.safe_load(path.read_text())
    content['rosbag2_bagfile_information'] |= {'custom_data': {'operator': 'kim'}, 'ros_distro': 'jazzy'}
    path.write_text(yaml.safe_dump(content))
    if metadata == 'missing':
        path.unlink()
    (file,) = folder.glob('*.mcap')
    os.truncate(file, file.stat().st_size - 3000)
    (recovery,) = recover(tmp_path)
    with Bag(recovery.path) as bag:
        stamps = [message.decode().header.stamp for message in bag.messages([JOINTS])]
    assert len(stamps) == recovery.saved[JOINTS] > 0
    found = yaml.safe_load((recovery.path / METADATA_FILE).read_text())['rosbag2_bagfile_information']
    if metadata == 'as it was':
        assert found['ros_distro'] == 'jazzy' and found['custom_data']['operator'] == 'kim'
    assert found['custom_data']['recovered_from'] == 'bag'
    assert (found['compression_format'], found['compression_mode'].upper()) == ('zstd', 'MESSAGE')


def packed_bag(folder):
    """What a recorder that packs each file once it is full leaves when it is killed in the second one."""
    foreign_bag(folder, files=2)
    first = folder / f'{folder.name}_0.mcap'
    packed = first.with_name(f'{first.name}.zstd')
    packed.write_bytes(zstandard.ZstdCompressor().compress(first.read_bytes()))
    first.unlink()
    return packed


def test_files_that_were_packed_are_saved_with_the_one_that_was_being_written(tmp_path):
    packed_bag(tmp_path / 'bag')
    (recovery,) = recover(tmp_path)
    assert names(recovery.path) == ['bag_0.mcap', 'bag_1.mcap', 'metadata.yaml']
    found = read_numbers(recovery.path)
    assert found == list(range(len(found))) and 150 < len(found) < 200
    assert recover(tmp_path) == [] and names(tmp_path / 'bag') == ['bag_0.mcap.zstd', 'bag_1.mcap']


def test_a_packed_file_that_can_not_be_unpacked_is_named_and_nothing_is_made_of_the_rest(tmp_path):
    packed = packed_bag(tmp_path / 'bag')
    os.truncate(packed, packed.stat().st_size - 20)
    (recovery,) = recover(tmp_path)
    assert recovery.failed and 'bag_0.mcap.zstd can not be unpacked: it is cut short' in recovery.note
    assert names(tmp_path) == ['bag']


def test_packed_files_alone_are_a_recording_too(tmp_path):
    packed_bag(tmp_path / 'bag')
    (tmp_path / 'bag' / 'bag_1.mcap').unlink()
    with pytest.raises(
        DatasetError, match=r'bag_0.mcap.zstd but no .*`decoupled-policy recover` completes it'
    ):
        bag_summary(tmp_path / 'bag')
    (recovery,) = recover(tmp_path)
    assert read_numbers(recovery.path) == list(range(100))
    finished = write_bag(tmp_path / 'finished', Arm(seconds=0.3).messages(), compression='file')
    assert recover(finished) == []


def test_what_is_left_out_of_a_folder_of_recordings_is_said_with_what_helps(tmp_path):
    for name in (
        'a.mcap',
        'killed',
        'cut',
        'database',
        'day2/c',
    ):  # a folder's own name says nothing of what it is
        whole_bag(tmp_path / name)
    (tmp_path / 'killed' / METADATA_FILE).unlink()
    (tmp_path / 'database' / METADATA_FILE).unlink()
    (tmp_path / 'database' / 'database_0.mcap').rename(tmp_path / 'database' / 'database_0.db3')
    (mcap,) = (tmp_path / 'cut').glob('*.mcap')
    os.truncate(mcap, mcap.stat().st_size - 100)
    assert [recovery.path.name for recovery in recover(tmp_path / 'cut')] == ['cut_recovered']
    found, left_out = expand([tmp_path])
    assert [path.name for path in found] == ['a.mcap', 'cut_recovered']
    for line, name, reason in zip(
        left_out,
        ('cut', 'database', 'day2', 'killed'),
        ('what could be read of it is in cut_recovered', '`ros2 bag reindex -s sqlite3 ', 'give it too',
         '`decoupled-policy recover` completes it'),
        strict=True,
    ):  # fmt: skip
        assert line.startswith(str(tmp_path / name)) and reason in line
    shutil.rmtree(tmp_path / 'a.mcap')
    shutil.rmtree(tmp_path / 'cut')
    shutil.rmtree(tmp_path / 'cut_recovered')
    with pytest.raises(DatasetError, match=r'has none in it; .*database.* -s sqlite3'):
        expand([tmp_path])


def test_nothing_is_made_of_a_bag_without_a_message(tmp_path):
    (tmp_path / 'bag').mkdir()
    (tmp_path / 'bag' / 'bag_0.mcap').write_bytes(b'\x89MCAP0\r\n')
    (recovery,) = recover(tmp_path)
    assert (recovery.path, names(tmp_path)) == (None, ['bag'])


# --- full disk ------------------------------------------------------------------------------------

LIMIT_BYTES = 25 * 2**20


@contextmanager
def file_size_limit(folder, limit_bytes=LIMIT_BYTES):
    """Have the kernel refuse to let any file of this process grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield 'File too large'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_file_system(folder):
    """Have the folder on a file system of its own, which is as small as that."""
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={LIMIT_BYTES}', 'tmpfs', folder]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield 'No space left on device'
    finally:
        subprocess.run(['umount', '-l', folder], check=True)


def limits():
    """Both where this process may mount a file system, the first otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_file_system(folder):
                return [file_size_limit, small_file_system]
        except (subprocess.CalledProcessError, FileNotFoundError):
            return [file_size_limit]


def write_for_ever(episode):
    for count in range(10_000):
        episode.bag.write(TOPIC, count.to_bytes(MESSAGE_BYTES, 'little'), START_NS + count)


@pytest.mark.parametrize('limit', limits())
def test_a_disk_that_takes_no_more_leaves_an_episode_of_what_it_took(limit, tmp_path):
    with limit(tmp_path) as complaint:
        store = EpisodeStore(tmp_path)
        episode = store.begin(HEADER)
        write_messages(episode, 0)
        with pytest.raises(DatasetError, match=complaint) as error:
            write_for_ever(episode)
        path = episode.finish(stopped=str(error.value))
        found = read_numbers(path)
        assert found == list(range(len(found)))
        # Lost are the torn chunk, one that made room for the end, and the reserve.
        assert LIMIT_BYTES - len(found) * MESSAGE_BYTES < 4 * 2**21
        assert (path / 'episode_000000_0.mcap').stat().st_size <= LIMIT_BYTES
        assert read_episode(path)['stopped'] == str(error.value)
        assert names(tmp_path) == ['episode_000000']
        if limit is small_file_system:  # fill it up: nothing half-made stays behind
            with open(tmp_path / 'filler', 'wb') as filler, pytest.raises(OSError, match=complaint):
                filler.write(bytes(LIMIT_BYTES))
            with pytest.raises(DatasetError, match=complaint):
                store.begin(HEADER)
            assert names(tmp_path) == ['episode_000000', 'filler']


def test_the_progress_is_whole_whenever_it_is_read(store):
    episode = store.begin(HEADER)
    for received in (1, 1000, 3):
        episode.note_progress('lift', {TOPIC: {'received': received}})
        progress = json.loads((episode.folder / 'progress.json').read_bytes())
        assert progress['topics'][TOPIC]['received'] == received
    episode.discard()
