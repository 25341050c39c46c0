"""Files have their name only once they are on the disk: a power cut leaves no empty one."""

import os

import pytest
from test_dataset_writing import frames_of, spec_of

from decoupled_policy_ros.data.bags.writer import BagWriter
from decoupled_policy_ros.data.datasets.writer import DatasetWriter
from decoupled_policy_ros.files import replace_whole, whole_folder, write_json, write_whole


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
