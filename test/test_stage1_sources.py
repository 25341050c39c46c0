"""Stage 1 from every kind of motion, through the command line as users start it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from decoupled_policy_ros.data.datasets.dataset import DatasetSpec, DatasetWriter
from decoupled_policy_ros.data.motions.motions import Motion, motion_actions, synth_motions
from decoupled_policy_ros.errors import FingerprintMismatch, TrainingError
from decoupled_policy_ros.observation.proprioception import Proprioception
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


def near_home(robot: RobotDescription, reach_rad: float) -> Motion:
    """Two seconds in which the first joint swings about home and the gripper opens and closes."""
    time_s = np.arange(40) / 20
    joints = np.tile(np.append(robot.home_rad, 0.0), (len(time_s), 1))
    joints[:, 0] += reach_rad * np.sin(3 * time_s)
    joints[:, -1] = np.sin(4 * time_s)
    actions = motion_actions(Kinematics(robot), joints)
    fingerprint = Fingerprint.of(robot, 20.0)
    return Motion((time_s * 1e9).astype(np.int64), joints.astype('f'), actions.astype('f'), fingerprint)


def write_demonstrations(root: Path, robot: RobotDescription, motions: list[Motion]) -> Path:
    """A dataset in which the arm was commanded where it went."""
    proprioception = Proprioception(robot, Kinematics(robot))
    with DatasetWriter(root, DatasetSpec.of(robot, 20.0)) as writer:
        for motion in motions:
            width_m = robot.gripper.width_from_normalised(motion.joint_positions[:, -1].astype(float))
            joints = np.column_stack(
                [motion.joint_positions[:, :-1], robot.gripper.joint_positions(width_m)]
            ).astype(float)
            rows = {
                'observation.joint_positions': joints,
                'observation.proprioception': proprioception.many(joints),
                'observation.pose': motion.actions,
                'action': motion.actions,
            }
            writer.add_episode('swing', True, rows)
    return root


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
