"""Files have their name only once they are on the disk: a power cut leaves no empty one."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_dataset_writing import frames_of, spec_of

from decoupled_policy_ros.data.bags.writer import BagWriter
from decoupled_policy_ros.data.datasets.writer import DatasetWriter
from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.files import replace_whole, require_file_name, whole_folder, write_json, write_whole


def bag(folder):
    with BagWriter(folder) as writer:
        writer.add_topic('/x', 'std_msgs/msg/Float64')
        writer.write('/x', bytes(12), 1)


def checkpoint(folder):
    (folder / 'part').write_bytes(b'weights')
    replace_whole(folder / 'part', folder / 'checkpoint')


def dataset(folder):
    with DatasetWriter(folder / 'set', spec_of()) as writer:
        writer.add_episode('lift', True, frames_of(0, 5))


def report(folder):
    with whole_folder(folder / 'report') as partial:
        (partial / 'plots').mkdir()
        (partial / 'plots' / 'plot.png').write_bytes(b'plot')


@pytest.mark.parametrize(
    'write',
    [
        lambda folder: write_whole(folder / 'file', b'content'),
        lambda folder: write_json(folder / 'file.json', {}),
        checkpoint,
        report,
        bag,
        dataset,
    ],
)
def test_what_gets_its_name_is_on_the_disk(write, tmp_path, monkeypatch):
    synced: dict[int, int] = {}  # inode -> size that is on the disk
    named = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def sync(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size

    def check(give_name):
        def checked(source, target):
            files = [path for path in source.rglob('*') if path.is_file()] if source.is_dir() else [source]
            missing = [path for path in files if synced.get(path.stat().st_ino) != path.stat().st_size]
            give_name(source, target)
            if (
                not target.relative_to(tmp_path).parts[0].startswith('.')
            ):  # nothing in a hidden folder has its final name
                assert missing == []
                named.append(target)

        return checked

    monkeypatch.setattr(os, 'fsync', sync)
    monkeypatch.setattr(os, 'replace', check(replace))
    monkeypatch.setattr(os, 'rename', check(rename))
    write(tmp_path)
    assert named
    assert all(path.parent.stat().st_ino in synced for path in named)  # and so are the names


def test_two_that_write_the_same_file_do_not_meet(tmp_path):
    """As two studies do that read the same results."""
    file, content = tmp_path / 'outcome.json', list(range(500))
    write_json(file, content)
    with ThreadPoolExecutor(8) as pool:
        writing = [pool.submit(write_json, file, content) for _ in range(200)]
        while not all(one.done() for one in writing):
            assert json.loads(file.read_text()) == content
    assert [one.exception() for one in writing] == [None] * 200
    assert [path.name for path in tmp_path.iterdir()] == ['outcome.json']


def test_a_file_that_can_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'fsync', lambda _: (_ for _ in ()).throw(OSError('No space left on device')))
    with pytest.raises(OSError, match='No space'):
        write_whole(tmp_path / 'file', b'content')
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_not_be_written_to_is_found_out_in_time():
    with pytest.raises(ConfigError, match=r'/proc/report.json can not be written'):
        require_file_name(Path('/proc/report.json'))
