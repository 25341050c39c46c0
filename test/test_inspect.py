"""decoupled-policy inspect of datasets, recordings and what is not there; of models see test_training."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from bag_files import INSTRUCTION, Arm, write_bag
from test_convert import SETTINGS, add_episode_file

from decoupled_policy_ros import cli
from decoupled_policy_ros.data.conversion.convert import convert


@pytest.fixture(scope='module')
def recordings(tmp_path_factory):
    """A folder of an episode and of a bag that says nothing of itself."""
    folder = tmp_path_factory.mktemp('recordings')
    add_episode_file(write_bag(folder / 'episode_000000', Arm(seconds=1.0).messages()), success=False)
    write_bag(folder / 'plain', Arm(seconds=1.0).messages())
    return folder


def shown(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setenv('COLUMNS', '200')
    monkeypatch.setattr(sys, 'argv', ['decoupled-policy', 'inspect', *map(str, arguments)])
    cli.main()
    return capsys.readouterr().out


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if name in line)


def test_a_recording_shows_what_is_in_it_and_where_to_go(recordings, monkeypatch, capsys):
    text = shown(monkeypatch, capsys, recordings / 'episode_000000')
    assert INSTRUCTION in row(text, 'instruction') and 'failure' in row(text, 'success')
    assert '100 messages' in row(text, '/joint_states')
    assert 'decoupled-policy convert' in text
    (values,) = json.loads(shown(monkeypatch, capsys, recordings / 'episode_000000', '--json'))
    assert values['success'] is False and values['robot'] == 'panda_sim'
    assert values['topics']['/joint_states'] == 100


def test_a_folder_of_recordings_shows_one_row_each(recordings, monkeypatch, capsys):
    text = shown(monkeypatch, capsys, recordings)
    assert '2 recordings in' in text and 'decoupled-policy convert' in text
    assert 'failure' in row(text, 'episode_000000')
    assert 'not said' in row(text, 'plain') and 'unlabelled' in row(text, 'plain')


def test_a_dataset_shows_the_essentials_and_all_of_it_on_request(recordings, tmp_path, monkeypatch, capsys):
    convert([recordings / 'episode_000000'], tmp_path / 'out', SETTINGS, workers=1)
    text = shown(monkeypatch, capsys, tmp_path / 'out')
    assert 'at 20 Hz' in row(text, 'frames') and INSTRUCTION in row(text, 'instructions')
    assert 'agentview, wrist' in row(text, 'cameras')
    assert '0 success, 1 failure, 0 unlabelled' in row(text, 'labels')
    assert text.count('\n') < 30
    values = json.loads(shown(monkeypatch, capsys, tmp_path / 'out', '--json'))
    assert values['labels'] == {'success': 0, 'failure': 1, 'unlabelled': 0} and 'features' in values


def test_a_folder_with_a_bad_recording_shows_the_others_as_json_too(
    recordings, tmp_path, monkeypatch, capsys
):
    shutil.copytree(recordings, tmp_path / 'all')
    (tmp_path / 'all' / 'plain' / 'metadata.yaml').write_text('')
    good, bad = json.loads(shown(monkeypatch, capsys, tmp_path / 'all', '--json'))
    assert good['topics']['/joint_states'] == 100
    assert bad['recording'].endswith('plain') and 'metadata.yaml is damaged' in bad['error']


def test_what_is_not_finished_or_of_no_kind_is_said_with_what_helps(
    recordings, tmp_path, monkeypatch, capsys
):
    (tmp_path / 'killed' / '.episode_000000.partial').mkdir(parents=True)
    (tmp_path / 'packed').mkdir()
    (tmp_path / 'packed' / 'packed_0.mcap.zstd').touch()
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'notes.txt').write_text('hello')
    recovers = '`decoupled-policy recover` completes '
    for name, reason in (
        ('killed', f'has unfinished episodes only (.episode_000000.partial); {recovers}'),
        ('packed', f'has packed_0.mcap.zstd but no metadata.yaml: the recording was not ended; {recovers}'),
        (
            'empty',
            'nothing else that can be inspected; valid: a backbone, a task, recordings (rosbag2), a LeRobot v3',
        ),
        ('notes.txt', 'nothing else that can be inspected; valid: '),
    ):
        with pytest.raises(SystemExit):
            shown(monkeypatch, capsys, tmp_path / name)
        error = capsys.readouterr().err
        assert reason in error and error.count('\n') == 1


@pytest.mark.parametrize('path', ['nothing', 'nothing/there', '/nothing/there.hdf5'])
def test_what_is_not_there_is_said_in_one_line(path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        shown(monkeypatch, capsys, path)
    error = capsys.readouterr().err
    assert f'{path} does not exist' in error and error.count('\n') == 1
