"""Training with every backbone, mechanism and objective: one road for all, and frozen means frozen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import test_training
import torch
import yaml
from test_backbones import SMALL, every_backbone
from test_training import LOOP, losses, task_config

from decoupled_policy_ros.errors import ConfigError, TrainingError
from decoupled_policy_ros.policy import Backbone, load_backbone, load_policy
from decoupled_policy_ros.policy.backbones import DPCBackbone
from decoupled_policy_ros.policy.conditioning import conditioning_for
from decoupled_policy_ros.policy.flow import FlowSchedule
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.training import stage2
from decoupled_policy_ros.training.config import Stage1Config, Stage2Config, load_config
from decoupled_policy_ros.training.loop import Trainer
from decoupled_policy_ros.training.runs import diffusion_loss
from decoupled_policy_ros.training.stage1 import train_stage1
from decoupled_policy_ros.training.stage2 import train_task

demonstrations = test_training.demonstrations

# Strong enough that anything which decays, averages or drops out a frozen weight would show.
HARD_LOOP = LOOP | {'steps': 3, 'weight_decay': 0.5, 'learning_rate': 0.01, 'ema_max': 0.5}


def sizes(kind: str) -> dict:
    return {'kind': kind} | {key: value for key, value in vars(SMALL[kind]).items() if key != 'kind'}


def stage1(out: Path, kind: str, **changes) -> Path:
    values = {
        'name': 'small',
        'robot': 'panda_sim',
        'sources': [{'synthetic': 5}],
        'backbone': sizes(kind),
        'optimisation': LOOP | {'steps': 2},
        **changes,
    }
    train_stage1(Stage1Config.model_validate(values), out)
    return out


@every_backbone
def test_stage1_then_stage2_leaves_every_byte_of_the_backbone(
    kind, mechanism, demonstrations, tmp_path, monkeypatch
):
    folder = stage1(tmp_path / 'backbone', kind, conditioning={'kind': mechanism})
    before = (folder / 'backbone.safetensors').read_bytes()
    weights = load_backbone(folder).state_dict()
    used, trainers = [], []
    original_loss, original_init = diffusion_loss, Trainer.__init__

    def loss(backbone, *rest):
        used.append(backbone)
        assert not any(module.training for module in backbone.modules()), 'dropout is on'
        return original_loss(backbone, *rest)

    def init(trainer, *arguments):
        original_init(trainer, *arguments)
        trainers.append(trainer)

    monkeypatch.setattr(stage2, 'diffusion_loss', loss)
    monkeypatch.setattr(Trainer, '__init__', init)
    train_task(task_config(demonstrations, folder, optimisation=HARD_LOOP), tmp_path / 'task')
    (trainer,) = trainers
    frozen = dict(used[-1].named_parameters())
    assert not {id(p) for p in trainer.parameters} & {id(p) for p in frozen.values()}
    assert all(p.grad is None for p in frozen.values())
    for name, value in used[-1].state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert (folder / 'backbone.safetensors').read_bytes() == before
    policy = load_policy(tmp_path / 'task', load_robot('panda_sim'), folder)
    assert policy.task.conditioning.kind == mechanism
    assert trainer.average.module.state_dict().keys() == policy.task.state_dict().keys()
    assert chunk_of(policy).shape == (16, 10)


def chunk_of(policy) -> np.ndarray:
    contract = policy.contract
    zeros = {s.name: np.zeros((contract.n_obs_steps, *s.shape), np.float32) for s in contract.streams}
    return Engine(policy, steps=2)(zeros).actions


@pytest.mark.parametrize(
    ('kind', 'mechanism'),
    [
        ('dp_mlp', 'adaln_zero'),
        ('dp_mixer', 'film'),
        ('dp_c', 'film'),
        ('dp_t', 'adaln_zero'),
        ('dp_t', 'prefix'),
    ],
)
def test_normal_training_trains_the_backbone_too(kind, mechanism, demonstrations, tmp_path):
    conditioning = {'kind': mechanism}
    config = task_config(demonstrations, sizes(kind), conditioning=conditioning, optimisation=HARD_LOOP)
    train_task(config, tmp_path, normal=True)
    hashes = json.loads((tmp_path / 'run.json').read_text())['backbone_weights_sha256']
    assert hashes['before'] != hashes['after']
    policy = load_policy(tmp_path, load_robot('panda_sim'))
    assert (policy.backbone.denoiser.kind, policy.backbone.denoiser.mechanism) == (kind, mechanism)
    assert chunk_of(policy).shape == (16, 10)


@pytest.mark.parametrize(
    'objective',
    [{'prediction': 'sample'}, {'prediction': 'v'}, {'kind': 'rectified_flow', 'training_steps': 50}],
    ids=['sample', 'v', 'flow'],
)
def test_every_objective_learns_and_is_written_down(objective, tmp_path):
    loop = LOOP | {'steps': 200, 'batch_size': 32, 'learning_rate': 2e-3, 'checkpoint_every': 200}
    folder = stage1(tmp_path, 'dp_mixer', objective=objective, optimisation=loop)
    assert np.mean(losses(folder)[-20:]) < 0.7 * np.mean(losses(folder)[:10])
    assert objective.items() <= load_backbone(folder).schedule.config.to_dict().items()


def test_stage2_takes_the_objective_of_its_backbone(demonstrations, tmp_path, monkeypatch):
    """What it predicts is the velocity eps - x_0, of the noise and the level that it drew."""
    folder = stage1(tmp_path / 'backbone', 'dp_mlp', objective={'kind': 'rectified_flow'})
    noised, predicted = [], []
    add_noise, mse_loss = FlowSchedule.add_noise, torch.nn.functional.mse_loss

    def noising(schedule, x_0, eps, k):
        noised.append(eps - x_0)
        return add_noise(schedule, x_0, eps, k)

    monkeypatch.setattr(FlowSchedule, 'add_noise', noising)
    monkeypatch.setattr(torch.nn.functional, 'mse_loss', lambda a, b: predicted.append(b) or mse_loss(a, b))
    train_task(task_config(demonstrations, folder), tmp_path / 'task')
    assert len(predicted) == LOOP['steps']
    torch.testing.assert_close(predicted, noised, rtol=0, atol=0)


@pytest.mark.parametrize(
    ('chosen', 'message'),
    [
        (
            {'conditioning': {'kind': 'adaln_zero'}},
            r"'adaln_zero', but backbone 'small' was trained with 'film'",
        ),
        ({'objective': {'prediction': 'v'}}, r"'prediction': 'v'.*'small' was trained with .*'epsilon'"),
    ],
    ids=['conditioning', 'objective'],
)
def test_a_choice_that_the_frozen_backbone_contradicts_is_refused(chosen, message, demonstrations, tmp_path):
    folder = stage1(tmp_path / 'backbone', 'dp_mlp')
    with pytest.raises(ConfigError, match=message):
        train_task(task_config(demonstrations, folder, **chosen), tmp_path / 'task')
    same = {'conditioning': {'kind': 'film'}, 'objective': {'prediction': 'epsilon'}}
    train_task(task_config(demonstrations, folder, **same), tmp_path / 'task')


@pytest.mark.parametrize('normal', [True, False])
def test_a_backbone_and_a_recipe_that_do_not_go_together_are_refused(normal, demonstrations, tmp_path):
    backbone = Path('somewhere') if normal else sizes('dp_t')
    with pytest.raises(TrainingError, match='leave it out' if normal else 'stage2 needs `backbone`'):
        train_task(task_config(demonstrations, backbone), tmp_path, normal=normal)


def test_sections_of_a_configuration_choose_kind_mechanism_and_objective(tmp_path):
    path = tmp_path / 'config.yaml'
    sections = {
        'backbone': {'kind': 'dp_c', 'widths': [64, 128]},
        'conditioning': {'kind': 'film'},
        'objective': {'kind': 'rectified_flow', 'training_steps': 20},
    }
    values = {'name': 'x', 'robot': 'r', 'optimisation': {'steps': 1}, **sections}
    path.write_text(yaml.safe_dump(values | {'sources': [{'synthetic': 3}]}))
    first = load_config(path, Stage1Config)
    assert (first.backbone.kind, first.backbone.widths, first.backbone.kernel) == ('dp_c', (64, 128), 5)
    assert first.objective.prediction == 'velocity'
    path.write_text(yaml.safe_dump(values | {'dataset': 'd'}))
    second = load_config(path, Stage2Config)
    assert second.backbone == first.backbone
    assert Stage2Config.model_validate_json(second.model_dump_json()) == second


@pytest.mark.parametrize(
    ('sections', 'message'),
    [
        ('backbone: {kind: dp_x}', r"backbone.*: .*'dp_x'.*'dp_mlp', 'dp_mixer', 'dp_c', 'dp_t'"),
        ('backbone: {kind: dp_t, depth: 3}', r'depth: Unexpected keyword argument \(got 3\)'),
        ('backbone: {kind: dp_t, heads: 3}', r'config.yaml: backbone.heads must divide width'),
        ('backbone: {width: wide}', r"width: .*integer.* \(got 'wide'\)"),
        (
            'backbone: {kind: dp_c}\nconditioning: {kind: prefix}',
            r"conditioning.kind 'prefix' does not exist for 'dp_c'; valid: film",
        ),
        ('objective: {prediction: noise}', r"objective.prediction 'noise' does not exist"),
        ('objective: {steps: 3}', r'objective.steps: Unexpected keyword'),
    ],
)
@pytest.mark.parametrize('config', [Stage1Config, Stage2Config])
def test_sections_that_do_not_fit_are_refused_by_key(config, sections, message, tmp_path):
    path = tmp_path / 'config.yaml'
    source = 'sources: [{synthetic: 3}]' if config is Stage1Config else 'dataset: d'
    path.write_text(f'name: x\nrobot: r\n{source}\noptimisation: {{steps: 1}}\n{sections}\n')
    with pytest.raises(ConfigError, match=message):
        load_config(path, config)


@pytest.mark.slow
def test_a_training_step_of_the_full_size_dp_c_runs():
    """All 244 million parameters, for real: some seconds, and 4.5 GB for weights, gradients and AdamW."""
    torch.manual_seed(0)
    backbone = Backbone(DPCBackbone(), Fingerprint.of(load_robot('panda_sim'), 20.0))
    conditioning = conditioning_for(backbone.denoiser, 2, 137)
    parameters = [*backbone.parameters(), *conditioning.parameters()]
    assert sum(p.numel() for p in parameters) == 243_925_514 + 131_712 + 28_672 * (128 + 274 + 1)
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    before = [p.detach().flatten()[0].clone() for p in parameters]
    loss = diffusion_loss(backbone, conditioning, torch.randn(2, 16, 10), torch.randn(2, 274))
    loss.backward()
    optimiser.step()
    assert 0 < float(loss.detach()) < 100
    assert all(
        not torch.equal(p.detach().flatten()[0], old) for p, old in zip(parameters, before, strict=True)
    )
