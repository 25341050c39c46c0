"""Training on other people's data: Stage 1 from any motion, Stage 2 from any demonstrations."""

from __future__ import annotations

import json
import sys
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from foreign_files import droid_columns, truths, write_lerobot, write_libero, write_robomimic

from decoupled_policy_ros import cli
from decoupled_policy_ros.data.datasets.dataset import DatasetSpec, DatasetWriter
from decoupled_policy_ros.data.motions.motions import demonstration_motions, motion_actions, synth_motions
from decoupled_policy_ros.data.readers.opening import open_demonstrations
from decoupled_policy_ros.errors import ConfigError, DatasetError, FingerprintMismatch
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.policy import load_policy
from decoupled_policy_ros.policy.policy import understood
from decoupled_policy_ros.resources import find
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.training.config import Stage1Config, Stage2Config, load_config
from decoupled_policy_ros.training.runs import identity_of
from decoupled_policy_ros.training.sources import load_demonstrations, load_motion_windows
from decoupled_policy_ros.training.stage1 import train_stage1
from decoupled_policy_ros.training.stage2 import train_task

SMALL = {'width': 32, 'hidden': 64, 'blocks': 2, 'time_width': 16}
LOOP = {'steps': 6, 'batch_size': 4, 'warmup_steps': 2, 'checkpoint_every': 2, 'threads': 1}


@pytest.fixture(scope='module')
def robot():
    return load_robot('panda_sim')


@pytest.fixture(scope='module')
def episodes(robot):
    return truths(robot, 3, size=(90, 120))


@pytest.fixture(scope='module')
def robomimic(episodes, tmp_path_factory):
    return write_robomimic(tmp_path_factory.mktemp('robomimic') / 'image.hdf5', episodes)


@pytest.fixture(scope='module')
def droid(robot, tmp_path_factory):
    made = truths(robot, 3, seed=5, rate_hz=15.0)
    cameras = {c: [e.images for e in made] for c in ('wrist_left', 'exterior_1_left', 'exterior_2_left')}
    columns = [droid_columns(e, np.eye(4)) for e in made]
    return write_lerobot(tmp_path_factory.mktemp('droid') / 'droid', columns, 15, ['x', 'y', 'z'], cameras)


def stage1(*sources, **changes) -> Stage1Config:
    values = {
        'name': 'b',
        'robot': 'panda_sim',
        'sources': list(sources),
        'backbone': SMALL,
        'optimisation': LOOP,
    }
    return Stage1Config.model_validate({**values, **changes})


def stage2(dataset, **changes) -> Stage2Config:
    values = {'name': 't', 'robot': 'panda_sim', 'dataset': str(dataset), 'optimisation': LOOP}
    return Stage2Config.model_validate({**values, **changes})


def test_a_robomimic_file_trains_both_stages(robomimic, episodes, robot, tmp_path):
    train_stage1(stage1({'demonstrations': str(robomimic)}, {'synthetic': 5}), tmp_path / 'b')
    config = stage2(
        robomimic, backbone=str(tmp_path / 'b'), cameras={'overhead': 'agentview', 'wrist': 'wrist'},
        image_size=[80, 84], filter_key='train', encoder={'crop': 72, 'base_channels': 16, 'keypoints': 4},
    )  # fmt: skip
    data = load_demonstrations(config, 16, robot, 20.0)
    assert data.provenance == {'dataset': 'image.hdf5', 'episodes': 2, 'frames': len(data.actions)}
    expected = np.concatenate([e.action_rows for e in episodes[:2]])
    np.testing.assert_allclose(data.actions.numpy(), expected, atol=1e-5)
    assert {name: tuple(values.shape[1:]) for name, values in data.streams.items()} == {
        'overhead': (80, 84, 3), 'wrist': (80, 84, 3), 'proprioception': (9,),
    }  # fmt: skip
    train_task(config, tmp_path / 't')
    policy = load_policy(tmp_path / 't', robot, tmp_path / 'b')
    assert policy.task.instruction == 'Stack_D1'
    assert policy.contract.names == ('overhead', 'wrist', 'proprioception')


def test_only_the_first_episodes_are_read_when_no_more_are_asked_for(robomimic, episodes, robot):
    data = load_demonstrations(stage2(robomimic, cameras=['agentview'], episodes=1), 16, robot, 20.0)
    np.testing.assert_array_equal(data.streams['agentview'].numpy(), episodes[0].images)
    assert len(data.windows) == len(data.actions) == len(episodes[0].joints)


@pytest.mark.parametrize('changes', [{'every': 2}, {'episodes': 11}, {'only_successful': True}])
def test_reading_takes_little_more_memory_than_the_pictures_themselves(changes, robot, tmp_path):
    spec = DatasetSpec.of(robot, 20.0, {'wrist': (120, 160)})
    pictures = np.zeros((20, 120, 160, 3), np.uint8)
    with DatasetWriter(tmp_path / 'd', spec) as writer:
        for motion in synth_motions(robot, 12, 0, 20.0):
            joints = np.column_stack([motion.joint_positions[:20, :7], np.zeros((20, 2))])
            rows = {
                'observation.joint_positions': joints,
                'observation.proprioception': Proprioception(robot, Kinematics(robot)).many(joints),
                'observation.pose': motion.actions[:20],
                'action': motion.actions[:20],
                'observation.images.wrist': pictures,
            }
            writer.add_episode('x', True, rows)
    config = stage2(tmp_path / 'd', cameras=['wrist'], **changes)
    tracemalloc.start()
    try:
        data = load_demonstrations(config, 16, robot, 20.0 / config.every)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * data.streams['wrist'].nbytes


def test_several_instructions_are_refused_until_one_is_chosen(episodes, robot, tmp_path):
    given = [np.tile([0, 0, 0.1, 0, 0, 0.1, -1.0], (len(e.joints), 1)) for e in episodes]
    write_libero(tmp_path / 'a_demo.hdf5', episodes[:1], 'open the drawer', given[:1], True)
    write_libero(tmp_path / 'b_demo.hdf5', episodes[1:], 'close the drawer', given[1:], True)
    with pytest.raises(
        DatasetError,
        match=r"instructions \['open the drawer', 'close the drawer'\]; .* instruction: set `language`",
    ):
        load_demonstrations(stage2(tmp_path), 16, robot, 20.0)
    with pytest.raises(
        DatasetError, match=r"holds the instructions \['open the drawer', 'close the drawer'\]"
    ):
        load_demonstrations(stage2(tmp_path, instruction=' '), 16, robot, 20.0)
    first = load_demonstrations(stage2(tmp_path, episodes=1), 16, robot, 20.0)
    assert first.instructions == ['open the drawer']  # those that are used have one
    data = load_demonstrations(stage2(tmp_path / 'b_demo.hdf5'), 16, robot, 20.0)
    assert data.instructions == ['close the drawer']


def test_episodes_that_did_not_work_out_are_left_out_on_request(robot, tmp_path):
    arrays = []
    with DatasetWriter(tmp_path / 'd', DatasetSpec.of(robot, 20.0)) as writer:
        for motion, success in zip(synth_motions(robot, 4, 0, 20.0), (False, True, None, True), strict=True):
            joints = np.column_stack(
                [motion.joint_positions[:20, :7], np.full((20, 1), 0.02), np.full((20, 1), -0.02)]
            )
            rows = {
                'observation.joint_positions': joints,
                'observation.proprioception': Proprioception(robot, Kinematics(robot)).many(joints),
                'observation.pose': motion.actions[:20],
                'action': motion.actions[:20],
            }
            writer.add_episode(f'task {success}', success, rows)
            arrays.append(rows['action'])
    everything = load_demonstrations(stage2(tmp_path / 'd', instruction='x'), 16, robot, 20.0)
    assert everything.provenance['labels'] == {'success': 2, 'failure': 1, 'unlabelled': 1}
    chosen = load_demonstrations(stage2(tmp_path / 'd', only_successful=True), 16, robot, 20.0)
    assert chosen.instructions == ['task True']
    assert chosen.provenance['labels'] == {'success': 2, 'failure': 0, 'unlabelled': 0}
    np.testing.assert_array_equal(chosen.actions, np.concatenate([arrays[1], arrays[3]]).astype('f'))
    config = stage2(tmp_path / 'd', only_successful=True, every=2)
    assert len(load_demonstrations(config, 16, robot, 10.0).actions) == 20
    assert 'only_successful' not in identity_of(stage2(tmp_path / 'd'))
    assert identity_of(config)['only_successful'] == 'true'


def test_spaces_around_an_instruction_do_not_count(robot, tmp_path):
    columns = [{'state': np.zeros((20, 9)), 'action': np.zeros((20, 7))} for _ in range(2)]
    root = write_lerobot(tmp_path / 'd', columns, 20, ['pick it up\n', ' pick it up'])
    mapping = {
        'source': 'a colleague', 'rate_hz': 20, 'joints': {'column': 'state[0:7]', 'unit': 'rad'},
        'gripper': {'column': 'state[7:9]', 'finger_signs': [1, -1]},
        'action': {'kind': 'joints', 'column': 'action'},
    }  # fmt: skip
    (tmp_path / 'mapping.yaml').write_text(yaml.safe_dump(mapping))
    config = stage2(root, mapping=str(tmp_path / 'mapping.yaml'))
    assert load_demonstrations(config, 16, robot, 20.0).instructions == ['pick it up']
    assert understood('old', ['pick it up\n'], False, 'pick it up ') == 'pick it up'


def test_success_is_not_asked_of_what_has_no_labels(robomimic, robot):
    with pytest.raises(DatasetError, match='does not say which episodes were a success'):
        load_demonstrations(stage2(robomimic, only_successful=True), 16, robot, 20.0)


def test_a_filter_of_hdf5_files_is_refused_elsewhere(droid, robot):
    with pytest.raises(DatasetError, match=r"filter_key 'train' picks .* of an HDF5 file, .*leave it out"):
        load_demonstrations(stage2(droid, filter_key='train', instruction='x'), 16, robot, 15.0)


def test_droid_at_15_hz_becomes_motion_at_20_hz_by_its_joints(droid, robot):
    windows, (source,) = load_motion_windows(stage1({'demonstrations': str(droid)}), robot)
    assert source['rate_hz'] == 15 and source['resampled'] == 'joints interpolated to 20 Hz, poses by FK'
    assert source['motions'] == 3 and source['frames'] == len(windows.actions) == len(windows.joints)
    found = open_demonstrations(droid, robot)
    poses = motion_actions(Kinematics(robot), windows.joints)
    np.testing.assert_allclose(windows.actions, poses, atol=1e-5)
    first = found.column('observation.joint_positions', 0)[:, :7]
    n = int((len(first) - 1) * 20 / 15 + 1e-9) + 1
    time_s = np.arange(n) / 20
    for joint in range(7):
        straight = np.interp(time_s, np.arange(len(first)) / 15, first[:, joint])
        np.testing.assert_allclose(windows.joints[:n, joint], straight, atol=1e-5)
    assert next(len(m) for m in demonstration_motions(found, robot, 20.0)) == n
    assert len(windows.windows) == len(windows.actions)


def test_droid_at_15_hz_is_no_demonstration_for_a_20_hz_policy(droid, robot):
    config = stage2(droid, instruction='put it there')
    with pytest.raises(FingerprintMismatch, match=r'rate_hz: dataset .* has 15\.0, .* has 20\.0'):
        load_demonstrations(config, 16, robot, 20.0)
    assert load_demonstrations(config, 16, robot, 15.0).provenance['episodes'] == 3


def test_every_third_frame_of_60_hz_is_20_hz(robot, tmp_path):
    made = truths(robot, 2, rate_hz=60.0)
    cameras = {c: [e.images for e in made] for c in ('wrist_left', 'exterior_1_left', 'exterior_2_left')}
    root = write_lerobot(
        tmp_path / 'fast', [droid_columns(e, np.eye(4)) for e in made], 60, ['x'] * 2, cameras
    )
    mapping = yaml.safe_load(find('config/datasets/droid_lerobot.yaml').read_text())
    (tmp_path / 'fast.yaml').write_text(yaml.safe_dump({**mapping, 'rate_hz': 60}))
    config = stage2(root, every=3, mapping=str(tmp_path / 'fast.yaml'), cameras=['wrist'])
    data = load_demonstrations(config, 16, robot, 20.0)
    expected = np.concatenate([e.action_rows[::3] for e in made])
    np.testing.assert_allclose(data.actions.numpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(
        data.streams['wrist'].numpy(), np.concatenate([e.images[::3] for e in made])
    )


def test_stage1_reads_joints_and_gripper_only(droid, robot, monkeypatch):
    read: set[str] = set()
    original = pq.ParquetFile.iter_batches

    def watched(file, *arguments, columns, **more):
        read.update(columns)
        return original(file, *arguments, columns=columns, **more)

    config = stage1({'demonstrations': str(droid)})
    monkeypatch.setattr(pq.ParquetFile, 'iter_batches', watched)
    load_motion_windows(config, robot)
    assert read == {'observation.state.joint_position', 'observation.state.gripper_position'}


def test_a_weight_makes_windows_of_a_source_more_frequent(robomimic, droid, robot):
    torch.manual_seed(0)
    sources = {'demonstrations': str(robomimic), 'weight': 3.0}, {'demonstrations': str(droid)}
    windows, provenance = load_motion_windows(stage1(*sources), robot)
    border, total = provenance[0]['frames'], len(windows.actions)
    drawn = torch.cat([windows.draw(500)[:, 0] for _ in range(8)])
    share = float((drawn < border).double().mean())
    assert share == pytest.approx(3 * border / (3 * border + total - border), abs=0.03)
    assert drawn.min() >= 0 and drawn.max() < total
    even, _ = load_motion_windows(
        stage1(*({k: v for k, v in s.items() if k != 'weight'} for s in sources)), robot
    )
    torch.manual_seed(1)
    expected = even.windows.actions(torch.randint(total, (32,)).numpy())
    torch.manual_seed(1)
    np.testing.assert_array_equal(even.draw(32).numpy(), expected)


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        (
            '{synthetic: 3, mapping: droid_lerobot}',
            'mapping and filter_key are for demonstrations, not for synthetic',
        ),
        ('{synthetic: 3, weight: 0}', r'weight: .*greater than 0 \(got 0\)'),
        ('{mapping: droid_lerobot}', r'exactly one of recorded, demonstrations, synthetic; got \[\]'),
    ],
)
def test_sources_that_make_no_sense_are_refused(tmp_path, source, message):
    path = tmp_path / 'stage1.yaml'
    path.write_text(f'{{name: x, robot: r, sources: [{source}], optimisation: {{steps: 1}}}}')
    with pytest.raises(ConfigError, match=message):
        load_config(path, Stage1Config)


def inspected(monkeypatch, capsys, *arguments) -> dict:
    monkeypatch.setattr(sys, 'argv', ['decoupled-policy', 'inspect', '--json', *map(str, arguments)])
    cli.main()
    return json.loads(capsys.readouterr().out)


def test_inspect_says_what_a_dataset_is_and_how_well_it_fits(robomimic, droid, monkeypatch, capsys):
    found = inspected(monkeypatch, capsys, robomimic)
    assert found['conventions']['source'] == 'robomimic / MimicGen HDF5'
    assert found['conventions']['calibration']['residual_m'] < 1e-6
    assert found['cameras'] == ['agentview', 'wrist'] and found['instructions'] == ['Stack_D1']
    assert (found['episodes'], found['rate_hz']) == (3, 20)
    other = inspected(monkeypatch, capsys, droid, '--mapping', 'droid_lerobot', '--robot', 'panda_sim')
    assert other['conventions']['gripper'] == '0 open, 1 closed' and other['frames'] > 100
