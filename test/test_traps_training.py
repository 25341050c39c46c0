"""Mistakes that others made in training: each is refused, or can't happen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from written_motion import near_home, write_demonstrations

from decoupled_policy_ros.data.motions.motions import MotionWriter
from decoupled_policy_ros.errors import ConfigError, FingerprintMismatch
from decoupled_policy_ros.policy import load_backbone, load_policy, save_backbone
from decoupled_policy_ros.policy.backbones import DPMLPSize
from decoupled_policy_ros.policy.encoders import TRUNKS, ImageEncoder
from decoupled_policy_ros.policy.normalisation import ActionNormaliser
from decoupled_policy_ros.robot.description import RobotDescription, load_robot, robot_file
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.training.config import Optimisation, Stage1Config, Stage2Config
from decoupled_policy_ros.training.loop import Trainer
from decoupled_policy_ros.training.sources import load_motion_windows
from decoupled_policy_ros.training.stage1 import train_stage1
from decoupled_policy_ros.training.stage2 import train_task

LOOP = {'steps': 3, 'batch_size': 4, 'warmup_steps': 1, 'checkpoint_every': 3, 'threads': 1}
OURS = Fingerprint.of(load_robot('panda_sim'), 20.0)


def turned_tool(folder: Path) -> RobotDescription:
    """The same arm; its tool is turned by 90 degrees, as the hand is against the simulator's grip site."""
    values = yaml.safe_load(robot_file('panda_sim').read_text())
    values['frames']['tool']['quat_xyzw'] = [0.0, 0.0, 0.0, 1.0]
    (folder / 'turned.yaml').write_text(yaml.safe_dump(values))
    return load_robot(folder / 'turned.yaml')


def other_joint_order(folder: Path) -> RobotDescription:
    """The same arm; its joints are counted from the hand."""
    values = yaml.safe_load(robot_file('panda_sim').read_text())
    for section, keys in (
        ('arm', ('joint_names', 'home_rad')),
        ('limits', ('lower_rad', 'upper_rad', 'velocity_rad_s', 'acceleration_rad_s2')),
    ):
        for key in keys:
            values[section][key].reverse()
    (folder / 'order.yaml').write_text(yaml.safe_dump(values))
    return load_robot(folder / 'order.yaml')


@pytest.fixture(
    params=['another frame', 'another joint order', 'another rotation form'],
    ids=lambda name: name.removeprefix('another '),
)
def foreign(request, tmp_path) -> tuple[Fingerprint, str]:
    """What a file says of how it is written, and the field in which that is not ours."""
    if request.param == 'another frame':
        return Fingerprint.of(turned_tool(tmp_path), 20.0), 'description_sha256'
    if request.param == 'another joint order':
        return Fingerprint.of(other_joint_order(tmp_path), 20.0), 'joint_names'
    return replace(OURS, rotation_convention='rot6d_rows'), 'rotation_convention'


@pytest.fixture
def demonstrations(tmp_path) -> Path:
    robot = load_robot('panda_sim')
    return write_demonstrations(tmp_path / 'demos', robot, [near_home(robot, 0.1)] * 2)


def stage1(source: dict) -> Stage1Config:
    values = {'name': 'b', 'robot': 'panda_sim', 'sources': [source], 'optimisation': LOOP}
    return Stage1Config.model_validate(
        {**values, 'backbone': {'width': 32, 'hidden': 64, 'blocks': 2, 'time_width': 16}}
    )


def stage2(dataset: Path, backbone: Path) -> Stage2Config:
    values = {'name': 't', 'robot': 'panda_sim', 'dataset': str(dataset), 'backbone': str(backbone)}
    return Stage2Config.model_validate({**values, 'optimisation': LOOP})


def rewritten(dataset: Path, fingerprint: Fingerprint) -> Path:
    """The dataset, saying that it is written as `fingerprint` says."""
    path = dataset / 'meta' / 'info.json'
    info = json.loads(path.read_text())
    info['decoupled_policy']['fingerprint'] = fingerprint.to_dict()
    path.write_text(json.dumps(info))
    return dataset


def test_stage1_refuses_demonstrations_written_in_another_way(foreign, demonstrations):
    fingerprint, field = foreign
    source = {'demonstrations': str(rewritten(demonstrations, fingerprint))}
    with pytest.raises(FingerprintMismatch, match=field):
        load_motion_windows(stage1(source), load_robot('panda_sim'))


def test_stage1_refuses_recordings_written_in_another_way(foreign, tmp_path):
    fingerprint, field = foreign
    motion = near_home(load_robot('panda_sim'), 0.1)
    (tmp_path / 'motions').mkdir()
    with MotionWriter(tmp_path / 'motions' / 'one.arrow', fingerprint) as writer:
        writer.append(motion.stamps_ns, motion.joint_positions, motion.actions)
    with pytest.raises(FingerprintMismatch, match=field):
        load_motion_windows(stage1({'recorded': str(tmp_path / 'motions')}), load_robot('panda_sim'))


def test_stage2_refuses_a_dataset_written_in_another_way_than_its_backbone(
    foreign, demonstrations, small_backbone, tmp_path
):
    fingerprint, field = foreign
    save_backbone(tmp_path / 'b', small_backbone)
    config = stage2(rewritten(demonstrations, fingerprint), tmp_path / 'b')
    with pytest.raises(FingerprintMismatch, match=field):
        train_task(config, tmp_path / 't')


def test_stage2_refuses_a_backbone_written_in_another_way_than_its_dataset(
    foreign, demonstrations, small_backbone, tmp_path
):
    small_backbone.fingerprint, field = foreign
    save_backbone(tmp_path / 'b', small_backbone)
    with pytest.raises(FingerprintMismatch, match=field):
        train_task(stage2(demonstrations, tmp_path / 'b'), tmp_path / 't')


@pytest.mark.parametrize('make', [turned_tool, other_joint_order])
def test_a_policy_refuses_a_robot_that_moves_in_another_way_than_its_backbone(
    make, small_policy_folders, tmp_path
):
    with pytest.raises(FingerprintMismatch, match='description_sha256'):
        load_policy(small_policy_folders[1], make(tmp_path), small_policy_folders[0])


def test_stage2_normalises_by_the_statistics_in_the_backbones_file(demonstrations, tmp_path, monkeypatch):
    """The demonstrations fill a hundredth of what Stage 1 saw; that changes no scale, in training or after."""
    robot = load_robot('panda_sim')
    wide = write_demonstrations(tmp_path / 'wide', robot, [near_home(robot, 0.9)])
    train_stage1(stage1({'demonstrations': str(wide)}), tmp_path / 'b')
    kept = load_backbone(tmp_path / 'b').normaliser
    assert torch.equal(kept.scale[3:], torch.ones(7)) and not kept.offset[3:].any()  # positions alone
    used, original = [], ActionNormaliser.forward

    def watched(normaliser: ActionNormaliser, actions: torch.Tensor) -> torch.Tensor:
        used.append((normaliser.scale.clone(), normaliser.offset.clone()))
        return original(normaliser, actions)

    monkeypatch.setattr(ActionNormaliser, 'forward', watched)
    train_task(stage2(demonstrations, tmp_path / 'b'), tmp_path / 't')
    assert len(used) == LOOP['steps']
    for scale, offset in used:
        assert torch.equal(scale, kept.scale) and torch.equal(offset, kept.offset)
    deployed = load_policy(tmp_path / 't', robot, tmp_path / 'b').backbone.normaliser
    assert torch.equal(deployed.scale, kept.scale) and torch.equal(deployed.offset, kept.offset)
    fitted = ActionNormaliser()
    fitted.fit(near_home(robot, 0.1).actions)
    assert (fitted.scale[1] / kept.scale[1] > 5).item()  # what it would have been


class Partly(nn.Module):
    """A part that learns, a part that is frozen, and buffers that training changes: a count and a statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.learns, self.frozen = nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.register_buffer('count', torch.zeros((), dtype=torch.int64))
        self.register_buffer('mean', torch.zeros(8))

    def loss(self) -> torch.Tensor:
        output = self.learns(self.frozen(torch.randn(4, 8)))
        self.count += 1
        self.mean.lerp_(output.detach().mean(0), 0.1)
        return output.square().mean()


def test_the_average_holds_frozen_weights_and_buffers_verbatim(tmp_path):
    """An average of equal numbers is not always that number again, and half a count is no count."""
    torch.manual_seed(0)
    module = Partly()
    before = {name: value.clone() for name, value in module.frozen.state_dict().items()}
    loop = Optimisation(steps=50, learning_rate=0.01, weight_decay=0.5, warmup_steps=1, ema_max=0.7)
    trainer = Trainer(module, module.loss, loop, tmp_path, {})
    last = {}
    original = trainer._step

    def step(number: int) -> None:
        original(number)
        last.update({name: value.clone() for name, value in module.state_dict().items()})

    trainer._step = step
    trainer.run()
    for name, value in before.items():
        assert torch.equal(module.frozen.state_dict()[name], value), name
    assert module.count == 50 and module.count.dtype == torch.int64
    assert torch.equal(module.mean, last['mean'])
    assert not torch.equal(module.learns.weight, last['learns.weight'])  # that is the average


def test_weights_that_are_loaded_before_training_are_those_of_the_average(tmp_path):
    """The copy is made when the trainer is, so what was frozen before then is what it holds."""
    module = Partly()
    module.frozen.load_state_dict({'weight': torch.full((8, 8), 0.1), 'bias': torch.full((8,), 0.3)})
    trainer = Trainer(module, module.loss, Optimisation(steps=2), tmp_path, {})
    average = {k: v for k, v in trainer.average.module.state_dict().items() if k.startswith('frozen.')}
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in average.items())
    assert not any(
        p.requires_grad for name, p in trainer.average.module.named_parameters() if 'frozen' in name
    )


def test_frozen_is_without_gradient_and_without_dropout(small_backbone):
    small_backbone.requires_grad_(True).train()
    small_backbone.freeze()
    assert not any(p.requires_grad for p in small_backbone.parameters())
    dropouts = [m for m in small_backbone.modules() if isinstance(m, nn.Dropout)]
    assert dropouts and not any(m.training for m in small_backbone.modules())


@pytest.mark.parametrize(('recipe', 'learns'), [('frozen', False), ('random', False), ('normal', True)])
def test_a_backbones_dropout_is_on_where_it_learns_and_nowhere_else(
    recipe, learns, demonstrations, small_backbone, tmp_path, monkeypatch
):
    """The trap: trained beside a backbone that drops a tenth of its units, a task runs on one that drops none."""
    config = stage2(demonstrations, tmp_path / 'b').model_copy(update={'random_backbone': recipe == 'random'})
    if recipe == 'frozen':
        save_backbone(tmp_path / 'b', small_backbone)
    else:
        config = config.model_copy(update={'backbone': DPMLPSize(width=32, hidden=64, blocks=2)})
    on, original = [], nn.Dropout.forward

    def watched(dropout: nn.Dropout, values: torch.Tensor) -> torch.Tensor:
        on.append(dropout.training)
        return original(dropout, values)

    monkeypatch.setattr(nn.Dropout, 'forward', watched)
    train_task(config, tmp_path / 't', normal=recipe == 'normal')
    assert set(on) == {learns}


@pytest.mark.parametrize('steps', [0, 101, 1000])
def test_a_policy_with_more_denoising_than_training_steps_is_refused(small_policy, steps):
    with pytest.raises(ConfigError, match=rf'denoising steps must be in 1\.\.100 .*got {steps}'):
        Engine(small_policy, steps)


@pytest.mark.parametrize('pretrained', [False, True])
@pytest.mark.parametrize('trunk', TRUNKS)
def test_no_encoder_follows_the_statistics_of_a_batch(trunk, pretrained):
    """A BatchNorm's statistics are of the weights as they were, not of their average: actions drift, the loss falls."""
    torch.manual_seed(0)
    encoder = ImageEncoder(crop=32, base_channels=16, keypoints=4, trunk=trunk, pretrained=pretrained).train()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
    images = torch.randint(256, (3, 1, 32, 32, 3), dtype=torch.uint8)
    buffers = {name: value.clone() for name, value in encoder.named_buffers()}
    with torch.no_grad():
        together, alone = encoder(images), encoder(images[1:2])
        torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(encoder.eval()(images), together, rtol=1e-3, atol=1e-4)
    for name, value in encoder.named_buffers():
        assert torch.equal(value, buffers[name]), name
