"""Stage 1 from every kind of motion, through the command line as users start it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from foreign_files import droid_columns, truths, write_lerobot, write_robomimic
from written_motion import near_home, write_demonstrations

from decoupled_policy_ros import cli
from decoupled_policy_ros.data.motions.motions import motion_actions, synth_motions
from decoupled_policy_ros.data.motions.recorder import MotionRecorder
from decoupled_policy_ros.errors import FingerprintMismatch, TrainingError
from decoupled_policy_ros.policy import load_backbone, load_policy
from decoupled_policy_ros.robot.description import RobotDescription, load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.training.config import Stage1Config, Stage2Config
from decoupled_policy_ros.training.sources import load_motion_windows
from decoupled_policy_ros.training.stage1 import train_stage1
from decoupled_policy_ros.training.stage2 import train_task

SMALL = {'width': 32, 'hidden': 64, 'blocks': 2, 'time_width': 16}
LOOP = {'steps': 4, 'batch_size': 4, 'warmup_steps': 2, 'checkpoint_every': 2, 'threads': 1}


@pytest.fixture(scope='module')
def panda() -> RobotDescription:
    return load_robot('panda_sim')


@pytest.fixture(scope='module')
def ur5e() -> RobotDescription:
    return load_robot('ur5e_sim')


@pytest.fixture(scope='module')
def of_ur5e(ur5e, tmp_path_factory) -> Path:
    motions = synth_motions(ur5e, 6, 0, 20.0)
    return write_demonstrations(tmp_path_factory.mktemp('ur5e') / 'demos', ur5e, motions)


@pytest.fixture(scope='module')
def of_panda(panda, tmp_path_factory) -> Path:
    return write_demonstrations(
        tmp_path_factory.mktemp('panda') / 'demos', panda, [near_home(panda, 0.1)] * 2
    )


def stage1(*sources: dict, **changes) -> Stage1Config:
    values = {'name': 'b', 'robot': 'panda_sim', 'sources': list(sources), 'backbone': SMALL}
    return Stage1Config.model_validate({**values, 'optimisation': LOOP, **changes})


def stage2(dataset: Path, backbone: Path) -> Stage2Config:
    return Stage2Config.model_validate(
        {
            'name': 't',
            'robot': 'panda_sim',
            'dataset': str(dataset),
            'backbone': str(backbone),
            'optimisation': LOOP,
        }
    )


def test_motion_of_another_arm_makes_a_backbone_for_this_one(panda, ur5e, of_ur5e, of_panda, tmp_path):
    """The file is for the Panda, says that a UR5e moved, and a Panda's task trains and loads on it."""
    train_stage1(stage1({'demonstrations': str(of_ur5e), 'robot': 'ur5e_sim'}), tmp_path / 'b')
    backbone = load_backbone(tmp_path / 'b')
    assert backbone.fingerprint == Fingerprint.of(panda, 20.0)
    (source,) = backbone.provenance['data']['sources']
    assert source['robot'] == 'ur5e_sim'
    assert Fingerprint.from_dict(source['fingerprint']) == Fingerprint.of(ur5e, 20.0)
    train_task(stage2(of_panda, tmp_path / 'b'), tmp_path / 't')
    policy = load_policy(tmp_path / 't', panda, tmp_path / 'b')
    assert policy.robot.name == 'panda_sim'
    with pytest.raises(FingerprintMismatch):
        load_policy(tmp_path / 't', ur5e, tmp_path / 'b')


def test_a_backbone_of_another_arms_motion_covers_where_that_arm_went_only(panda, ur5e, of_panda, tmp_path):
    small = write_demonstrations(tmp_path / 'small', ur5e, [near_home(ur5e, 0.05)])
    train_stage1(stage1({'demonstrations': str(small), 'robot': 'ur5e_sim'}), tmp_path / 'b')
    lower_m, upper_m = load_backbone(tmp_path / 'b').normaliser.position_range_m
    went = near_home(ur5e, 0.05).actions[:, :3]
    np.testing.assert_allclose((lower_m[1], upper_m[1]), (went[:, 1].min(), went[:, 1].max()), atol=1e-4)
    with pytest.raises(TrainingError, match=r"outside the .* m that backbone 'b' can express"):
        train_task(stage2(of_panda, tmp_path / 'b'), tmp_path / 't')


def test_arms_with_other_joints_have_columns_of_their_own(panda, ur5e, of_ur5e):
    """A UR5e's third joint is not a Panda's, and its six are not told apart from seven by a zero."""
    sources = {'synthetic': 2}, {'demonstrations': str(of_ur5e), 'robot': 'ur5e_sim'}, {'synthetic': 1}
    windows, provenance = load_motion_windows(stage1(*sources), panda)
    ends = np.cumsum([source['frames'] for source in provenance])
    of_the_panda = np.ones(ends[-1], bool)
    of_the_panda[ends[0] : ends[1]] = False
    assert windows.joints.shape == (ends[-1], 8 + 7)
    for moved, robot, own, others in (
        (of_the_panda, panda, slice(0, 8), slice(8, 15)),
        (~of_the_panda, ur5e, slice(8, 15), slice(0, 8)),
    ):
        expected = motion_actions(Kinematics(robot), windows.joints[moved, own])
        np.testing.assert_allclose(windows.actions[moved], expected, atol=1e-5)
        assert not windows.joints[moved, others].any()
    assert ['fingerprint' in source for source in provenance] == [False, True, False]


def test_the_backbones_own_arm_may_be_named_too(panda):
    named, _ = load_motion_windows(stage1({'synthetic': 2, 'robot': 'panda_sim'}, {'synthetic': 1}), panda)
    plain, _ = load_motion_windows(stage1({'synthetic': 2}, {'synthetic': 1}), panda)
    np.testing.assert_array_equal(named.joints, plain.joints)


@pytest.mark.parametrize(
    ('said', 'really'), [(None, 'ur5e_base'), ('iiwa_sim', 'ur5e_base')], ids=['not said', 'said wrongly']
)
def test_motion_of_an_arm_that_it_is_not_said_to_be_of_is_refused(panda, of_ur5e, said, really):
    with pytest.raises(
        FingerprintMismatch, match=f'base_frame: .* has {really!r}, robot {said or "panda_sim"!r}'
    ):
        load_motion_windows(stage1({'demonstrations': str(of_ur5e), 'robot': said}), panda)


# --- every kind of motion, from its files to the backbone ------------------------------------------


def recording(folder: Path, robot: RobotDescription) -> Path:
    """Two seconds as kinematics_recorder_node keeps them."""
    motion = near_home(robot, 0.2)
    recorder = MotionRecorder(folder, robot)
    recorder.push(motion.stamps_ns, motion.joint_positions.astype(float))
    recorder.finish()
    return folder


def droid_lerobot(root: Path, robot: RobotDescription) -> Path:
    """DROID's LeRobot port: 15 Hz, poses of a point on the hand, a gripper that counts up as it closes."""
    made = truths(robot, 2, seed=5, rate_hz=15.0)
    cameras = {c: [e.images for e in made] for c in ('wrist_left', 'exterior_1_left', 'exterior_2_left')}
    return write_lerobot(root, [droid_columns(e, np.eye(4)) for e in made], 15, ['x', 'y'], cameras)


@pytest.fixture
def droid_rlds(panda, tmp_path, monkeypatch) -> Path:
    """DROID's own files. Reading their bytes is tensorflow_datasets' part, of which this is the one call in use."""
    made = [droid_columns(e, np.eye(4)) for e in truths(panda, 2, seed=5, rate_hz=15.0)]
    groups = {'observation': 'observation.state.', 'action_dict': 'action.'}

    def step(columns: dict[str, np.ndarray], k: int) -> dict:
        found = {
            group: {name.removeprefix(start): c[k] for name, c in columns.items() if name.startswith(start)}
            for group, start in groups.items()
        }
        return {**found, 'language_instruction': b'move the cup'}

    def as_dataset(split: str, **how: object) -> list[dict]:
        assert split == 'train' and how['shuffle_files'] is False
        return [
            {
                'steps': SimpleNamespace(
                    as_numpy_iterator=lambda c=c: (
                        step(c, k) for k in range(len(c['action.gripper_position']))
                    )
                )
            }
            for c in made
        ]

    tfds = ModuleType('tensorflow_datasets')
    tfds.decode = SimpleNamespace(SkipDecoding=object)
    tfds.ReadConfig = SimpleNamespace
    tfds.builder_from_directory = lambda path: SimpleNamespace(as_dataset=as_dataset)
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', tfds)
    (tmp_path / 'droid').mkdir()
    (tmp_path / 'droid' / 'droid-train.tfrecord-00000-of-00001').touch()
    return tmp_path / 'droid'


SOURCES: dict[str, Callable[..., list[dict]]] = {
    "the task's own motion": lambda make: [{'demonstrations': make('of_panda')}],
    'what the recorder kept': lambda make: [{'recorded': make('recording')}],
    'motion of other tasks': lambda make: [
        {'demonstrations': make('robomimic')},
        {'demonstrations': make('of_panda')},
    ],
    'synthetic minimum-jerk': lambda make: [{'synthetic': 5}],
    'another arm': lambda make: [{'demonstrations': make('of_ur5e'), 'robot': 'ur5e_sim'}],
    'synthetic motion of another arm': lambda make: [{'synthetic': 5, 'robot': 'iiwa_sim'}],
    'DROID as LeRobot': lambda make: [{'demonstrations': make('droid_lerobot')}],
    'DROID as RLDS': lambda make: [{'demonstrations': make('droid_rlds')}],
    'a weighted mixture': lambda make: [
        {'demonstrations': make('of_ur5e'), 'robot': 'ur5e_sim', 'weight': 2.0},
        {'recorded': make('recording')},
        {'demonstrations': make('droid_lerobot'), 'weight': 0.5},
        {'synthetic': 3},
    ],
}


@pytest.mark.parametrize('kind', SOURCES)
def test_every_source_trains_a_backbone_that_names_it(kind, panda, tmp_path, request, monkeypatch):
    writers = {
        'recording': lambda: recording(tmp_path / 'motions', panda),
        'robomimic': lambda: write_robomimic(tmp_path / 'demo.hdf5', truths(panda, 2)),
        'droid_lerobot': lambda: droid_lerobot(tmp_path / 'lerobot', panda),
    }

    def make(name: str) -> str:
        return str(writers[name]() if name in writers else request.getfixturevalue(name))

    sources, out = SOURCES[kind](make), tmp_path / 'b'
    config = {'name': 'b', 'robot': 'panda_sim', 'sources': sources, 'backbone': SMALL, 'optimisation': LOOP}
    (tmp_path / 'stage1.yaml').write_text(yaml.safe_dump(config))
    monkeypatch.setattr(
        sys, 'argv', ['x', 'train', 'stage1', str(tmp_path / 'stage1.yaml'), '--out', str(out)]
    )
    cli.main()
    backbone = load_backbone(out)
    found = backbone.provenance['data']['sources']
    assert all(given.items() <= there.items() for given, there in zip(sources, found, strict=True))
    assert all(there['frames'] > 16 and there['motions'] > 0 for there in found)
    losses = json.loads((out / 'run.json').read_text())['losses']
    assert len(losses) == LOOP['steps'] and np.isfinite(losses).all()
    lower_m, upper_m = backbone.normaliser.position_range_m
    assert 0 < min(np.subtract(upper_m, lower_m)) and max(np.abs([lower_m, upper_m]).ravel()) < 1.2
    assert backbone.fingerprint == Fingerprint.of(panda, 20.0)


def test_both_forms_of_droid_are_the_same_motion(panda, droid_rlds, tmp_path):
    both = [droid_rlds, droid_lerobot(tmp_path / 'lerobot', panda)]
    rlds, lerobot = (load_motion_windows(stage1({'demonstrations': str(root)}), panda)[0] for root in both)
    np.testing.assert_allclose(rlds.joints, lerobot.joints, atol=1e-6)
    np.testing.assert_allclose(rlds.actions, lerobot.actions, atol=1e-6)


def test_weights_hold_across_arms(panda):
    """A window of the arm that weighs three times as much is drawn three times as often."""
    torch.manual_seed(0)
    sources = {'synthetic': 4, 'robot': 'ur5e_sim', 'weight': 3.0}, {'synthetic': 4}
    windows, provenance = load_motion_windows(stage1(*sources), panda)
    border, total = provenance[0]['frames'], len(windows.actions)
    share = 3 * border / (3 * border + total - border)
    drawn = np.concatenate([windows.draw(500)[:, 0].numpy() for _ in range(8)])
    assert np.mean(drawn < border) == pytest.approx(share, abs=0.04)
