"""Stage 1's three conditions: joint positions, the poses themselves, nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from decoupled_policy_ros.data.datasets.windows import Windows
from decoupled_policy_ros.data.motions.motions import motion_actions
from decoupled_policy_ros.policy import load_backbone
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.training import stage1
from decoupled_policy_ros.training.config import Stage1Config
from decoupled_policy_ros.training.sources import MotionWindows

VALUES = {
    'name': 'small',
    'robot': 'panda_sim',
    'sources': [{'synthetic': 3}],
    'backbone': {'width': 32, 'hidden': 64, 'blocks': 2, 'time_width': 16},
    'optimisation': {'steps': 3, 'batch_size': 4, 'warmup_steps': 1, 'threads': 1},
}


def test_the_condition_is_what_its_name_says():
    rng = np.random.default_rng(0)
    joints, actions = (rng.normal(size=(20, n)).astype(np.float32) for n in (8, 10))
    windows = MotionWindows(joints, actions, Windows(np.array([20]), 16, 1))
    assert np.array_equal(stage1._conditions('joint_positions', windows), joints)
    assert np.array_equal(stage1._conditions('poses', windows), actions)
    nothing = stage1._conditions('none', windows)
    assert nothing.shape == (20, 1) and not nothing.any()


@pytest.mark.parametrize('condition', ['joint_positions', 'poses', 'none'])
def test_each_condition_trains_a_backbone(condition, tmp_path, monkeypatch):
    seen, given = [], []
    original = stage1.diffusion_loss

    class Watched(stage1.VectorEncoder):
        def forward(self, vectors):
            given.append(vectors)
            return super().forward(vectors)

    monkeypatch.setattr(stage1, 'VectorEncoder', Watched)

    def watched(backbone, conditioning, actions, features):
        seen.append((actions, features))
        return original(backbone, conditioning, actions, features)

    monkeypatch.setattr(stage1, 'diffusion_loss', watched)
    stage1.train_stage1(Stage1Config.model_validate(VALUES | {'condition': condition}), tmp_path)
    backbone = load_backbone(tmp_path)
    assert backbone.provenance['data']['condition'] == condition
    actions, features = seen[0]
    if condition == 'none':  # says nothing of the window
        assert torch.equal(features, features[:1].expand_as(features))
        assert not given[0].any()
    else:  # each window's own, not another one's
        assert len(features.unique(dim=0)) == len(actions.unique(dim=0)) > 1
        expected = given[0]
        if condition == 'joint_positions':
            kinematics = Kinematics(load_robot('panda_sim'))
            expected = torch.from_numpy(motion_actions(kinematics, given[0].reshape(-1, 8).double()))
        torch.testing.assert_close(actions, expected.reshape(actions.shape).float(), atol=1e-5, rtol=0)
    assert features.shape[1] == 16 * {'joint_positions': 8, 'poses': 10, 'none': 1}[condition]


def test_an_unknown_condition_is_refused():
    with pytest.raises(ValidationError, match='joint_positions'):
        Stage1Config.model_validate(VALUES | {'condition': 'vision'})


def test_a_backbone_can_express_more_than_the_motion_that_it_saw(tmp_path):
    narrow, wide = tmp_path / 'narrow', tmp_path / 'wide'
    stage1.train_stage1(Stage1Config.model_validate(VALUES), narrow)
    lower, upper = load_backbone(narrow).normaliser.position_range_m
    # Further to one side than the motion went, and less far to the other: the range grows, and never shrinks.
    stated = [[lower[0] - 0.1, lower[1], lower[2] + 0.01], [upper[0], upper[1] + 0.2, upper[2]]]
    stage1.train_stage1(Stage1Config.model_validate(VALUES | {'position_range_m': stated}), wide)
    found = load_backbone(wide).normaliser.position_range_m
    np.testing.assert_allclose(found[0], [stated[0][0], lower[1], lower[2]], atol=1e-6)
    np.testing.assert_allclose(found[1], stated[1], atol=1e-6)


def test_a_position_range_states_the_lowest_first():
    with pytest.raises(ValidationError, match='lowest'):
        Stage1Config.model_validate(VALUES | {'position_range_m': [[1, 1, 1], [0, 0, 0]]})
