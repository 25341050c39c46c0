"""Encoders at the paper's sizes and their traps: ResNet-50, weights from ImageNet, an MLP for each step."""

from __future__ import annotations

import copy

import pytest
import test_training
import torch
from test_training import LOOP, task_config
from torch.optim.swa_utils import AveragedModel
from transformers import ResNetModel

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.policy import Task, load_policy, packed, save_backbone, save_task
from decoupled_policy_ros.policy.encoders import TRUNKS, FrozenBatchNorm, ImageEncoder, ObservationEncoder
from decoupled_policy_ros.policy.language import INSTRUCTION, InstructionEncoder
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.training.config import EncoderConfig
from decoupled_policy_ros.training.runs import diffusion_loss
from decoupled_policy_ros.training.stage2 import train_task

demonstrations = test_training.demonstrations
backbone = test_training.backbone

SMALL = {'crop': 28, 'base_channels': 16, 'trunk': 'resnet50'}
CAMERA = StreamSpec('wrist', 'image', (32, 32, 3), 0.2)
STATE = StreamSpec('proprioception', 'vector', (8,), 0.2)
CONTRACT = ObservationContract(20.0, 2, (CAMERA, STATE), 0.1)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A small ResNet-50 as its folder, with statistics as if it had been trained."""
    torch.manual_seed(0)
    trunk = ResNetModel(TRUNKS['resnet50'].config(16))
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    folder = tmp_path_factory.mktemp('resnet') / 'resnet50'
    trunk.save_pretrained(folder)
    return folder


class RoundedConv2d(torch.nn.Module):
    """A convolution as packed ones are: in another precision, which its result has too. This one runs anywhere."""

    def __init__(self, conv: torch.nn.Conv2d, size: torch.Size, dtype: torch.dtype):
        super().__init__()
        self.conv, self.dtype = copy.deepcopy(conv).to(dtype), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.to(self.dtype))


def images(batch: int = 3) -> torch.Tensor:
    return torch.randint(256, (batch, 2, 32, 32, 3), dtype=torch.uint8)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_papers_libero_encoder_has_its_sizes():
    """Two cameras to 512 each, 8 of proprioception, 768 of DistilBERT, per step to 512; two steps make 1024."""
    cameras = [StreamSpec(name, 'image', (128, 128, 3), 0.2) for name in ('agentview', 'wrist')]
    contract = ObservationContract(20.0, 2, (*cameras, STATE), 0.1)
    with torch.device('meta'):
        language = InstructionEncoder(['a', 'b'], 'distilbert-base-uncased', '', 768, feature_dim=768)
        encoder = ObservationEncoder(contract, trunk='resnet50', crop=112, step_dim=512, language=language)
    # torchvision's and transformers' ResNet-50 have 25,557,032 with 2,049,000 of the classifier.
    assert [count(encoder.streams[c.name].trunk) for c in cameras] == [23_508_032] * 2
    assert [count(encoder.streams[c.name].project) for c in cameras] == [2048 * 512 + 512] * 2
    assert count(encoder.step) == (512 + 512 + 8 + 768) * 512 + 512 + 512 * 512 + 512
    assert encoder.feature_dim == 1024
    # Ours besides: an instruction goes through a layer that starts at zero, see docs/training.md.
    assert count(language.project) == 768 * 768 + 768
    assert count(encoder) == sum(
        count(part) for part in (*encoder.streams.values(), language.project, encoder.step)
    )


def test_the_mlp_of_a_step_sees_that_step_only_and_is_the_same_for_all():
    torch.manual_seed(0)
    encoder = ObservationEncoder(ObservationContract(20.0, 2, (STATE,), 0.1), step_dim=24)
    first = torch.randn(1, 1, 8).expand(-1, 2, -1)
    changed = first.clone()
    changed[:, 1] += 1
    before, after = (encoder({'proprioception': x}).unflatten(1, (2, 24))[0] for x in (first, changed))
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
    torch.testing.assert_close(before[0], before[1])


def test_pretrained_weights_compute_what_they_did_and_stay_in_step(weights):
    """The trap: statistics of a BatchNorm that follow a batch, or that an average of the weights leaves behind."""
    encoder = ImageEncoder(**SMALL, pretrained=True)
    encoder.load_weights(str(weights))
    theirs = ResNetModel.from_pretrained(weights).eval()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        expected = theirs(pixels).last_hidden_state
        torch.testing.assert_close(
            encoder.train().trunk(pixels).last_hidden_state, expected, rtol=1e-3, atol=1e-4
        )
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
    average = AveragedModel(encoder)
    buffers = copy.deepcopy(dict(encoder.trunk.named_buffers()))
    optimiser = torch.optim.SGD(encoder.parameters(), 1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        encoder(images()).square().mean().backward()
        optimiser.step()
        average.update_parameters(encoder)
    norms = [m for m in encoder.modules() if isinstance(m, FrozenBatchNorm)]
    assert len(norms) == 53
    for trunk in (encoder.trunk, average.module.trunk):
        for name, value in trunk.named_buffers():
            assert torch.equal(value, buffers[name]), name
    assert not torch.equal(
        encoder.trunk.embedder.embedder.convolution.weight, theirs.embedder.embedder.convolution.weight
    )


@pytest.mark.parametrize('pretrained', [False, True])
def test_an_image_means_the_same_beside_others_in_training_as_alone_in_evaluation(pretrained):
    encoder = ImageEncoder(crop=32, base_channels=16, trunk='resnet50', pretrained=pretrained)
    batch = images()
    with torch.inference_mode():
        together, alone = encoder.train()(batch), encoder.eval()(batch[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-4)


def test_weights_of_another_shape_or_from_nowhere_are_refused(weights, tmp_path):
    with pytest.raises(ConfigError, match=r"encoder.weights: '.*' can't be loaded: .*size mismatch"):
        ImageEncoder(crop=28, base_channels=32, trunk='resnet50', pretrained=True).load_weights(str(weights))
    with pytest.raises(ConfigError, match=r"encoder.weights: '.*nothing' can't be loaded"):
        ImageEncoder(**SMALL, pretrained=True).load_weights(str(tmp_path / 'nothing'))


@pytest.mark.parametrize('pretrained', [False, True])
def test_a_policy_on_resnet50_trains_a_step_and_comes_back_without_the_weights(
    small_backbone, weights, tmp_path, pretrained
):
    save_backbone(tmp_path / 'backbones' / 'small', small_backbone)
    options = {**SMALL, 'pretrained': pretrained, 'step_dim': 32}
    language = InstructionEncoder(['left', 'right'], 'any', '0', 4, 8)
    task = Task(CONTRACT, small_backbone, options, 'deep', language=language).train()
    if pretrained:
        task.encoder.streams['wrist'].load_weights(str(weights))
    optimiser = torch.optim.AdamW(task.parameters(), 1e-3)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    observation = {'wrist': images(2), 'proprioception': torch.randn(2, 2, 8), INSTRUCTION: torch.randn(2, 4)}
    features = task.encoder(observation)
    assert features.shape == (2, 64)
    diffusion_loss(small_backbone, task.conditioning, torch.zeros(2, 16, 10), features).backward()
    optimiser.step()
    still = [name for name, p in task.named_parameters() if torch.equal(p, before[name])]
    assert still == []
    save_task(tmp_path / 'tasks' / 'deep', task.eval())
    again = load_policy(tmp_path / 'tasks' / 'deep', load_robot('panda_sim'))
    with torch.inference_mode():
        torch.testing.assert_close(again.task.encoder(observation), task.encoder(observation), rtol=0, atol=0)
    seen = {'wrist': images(1)[0].numpy(), 'proprioception': torch.randn(2, 8).numpy()}
    assert Engine(again, steps=2, instruction='right')(seen).actions.shape == (16, 10)


def test_a_task_is_trained_from_the_weights_that_its_configuration_names(
    demonstrations, backbone, weights, tmp_path
):
    encoder = SMALL | {'weights': str(weights)}
    loop = LOOP | {'steps': 1, 'learning_rate': 1e-12, 'weight_decay': 0.0}
    config = task_config(demonstrations, backbone, cameras=['wrist'], encoder=encoder, optimisation=loop)
    train_task(config, tmp_path)
    trained = load_policy(tmp_path, load_robot('panda_sim'), backbone).task.encoder.streams['wrist'].trunk
    theirs = ImageEncoder(**SMALL, pretrained=True)
    theirs.load_weights(str(weights))
    expected = theirs.trunk.state_dict()
    assert expected.keys() == trained.state_dict().keys()
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9, msg=name)


def test_an_encoder_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match='resnet18'):
        EncoderConfig(trunk='resnet34')


@pytest.mark.parametrize('trunk', ['resnet18', 'resnet50'])
@pytest.mark.parametrize('pretrained', [False, True])
def test_either_trunk_takes_convolutions_in_bfloat16(trunk, pretrained, monkeypatch):
    monkeypatch.setattr(packed, 'PackedConv2d', RoundedConv2d)
    torch.manual_seed(0)
    encoder = ImageEncoder(crop=28, base_channels=16, keypoints=4, trunk=trunk, pretrained=pretrained).eval()
    pixels = images(1)
    rounded = packed.with_packed_convolutions(encoder, pixels, torch.bfloat16)
    with torch.inference_mode():
        exact, near = encoder(pixels), rounded(pixels)
    assert any(isinstance(module, RoundedConv2d) for module in rounded.modules())
    assert near.dtype == torch.float32
    assert (near - exact).norm() < 0.5 * exact.norm()


@pytest.mark.parametrize('trunk', ['resnet18', 'resnet50'])
def test_either_trunk_learns_under_autocast(trunk):
    encoder = ImageEncoder(crop=28, base_channels=16, keypoints=4, trunk=trunk).train()
    with torch.autocast('cpu', torch.bfloat16):
        features = encoder(images(2))
    features.float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())
