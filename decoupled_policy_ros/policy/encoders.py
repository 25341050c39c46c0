"""Observation encoders E: the streams of an observation contract -> one feature vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.policy.language import INSTRUCTION, InstructionEncoder
from decoupled_policy_ros.policy.normalisation import VectorNormaliser

if TYPE_CHECKING:
    from transformers import ResNetConfig

#: Mean and deviation of ImageNet's pixels in [0, 1], which weights trained on it expect.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Trunk:
    """A ResNet: blocks of each of its four stages, how much wider their outputs are, and features of an image."""

    layer_type: str
    depths: tuple[int, int, int, int]
    expansion: int
    feature_dim: int

    def config(self, base_channels: int) -> ResNetConfig:
        """Of a trunk with so many channels after the stem."""
        from transformers import (
            ResNetConfig,
        )  # here, for its import takes a third as long as all that a node imports

        return ResNetConfig(
            embedding_size=base_channels,
            hidden_sizes=[base_channels * self.expansion * 2**i for i in range(4)],
            depths=list(self.depths),
            layer_type=self.layer_type,
        )


TRUNKS = {
    'resnet18': Trunk('basic', (2, 2, 2, 2), 1, 64),
    'resnet50': Trunk('bottleneck', (3, 4, 6, 3), 4, 512),
}


def replace_batch_norm(module: nn.Module, channels_per_group: int = 16) -> nn.Module:
    """Replace every BatchNorm by GroupNorm: batch statistics and EMA weights don't belong together."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = child.num_features // channels_per_group
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        else:
            replace_batch_norm(child, channels_per_group)
    return module


class FrozenBatchNorm(nn.Module):
    """A trained BatchNorm as the fixed affine map that it is in evaluation, (B, C, h, w) -> the same.

    Nothing in it learns, follows a batch or differs between training, evaluation and an average of the weights.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        self.register_buffer('scale', scale)
        self.register_buffer('shift', norm.bias.detach() - norm.running_mean * scale)

    def forward(self, features: Tensor) -> Tensor:
        scale, shift = (v.to(features.dtype)[:, None, None] for v in (self.scale, self.shift))
        return features * scale + shift


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm by what it does in evaluation; for a trunk that was trained with it."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm(child))
        else:
            freeze_batch_norm(child)
    return module


class SpatialSoftmax(nn.Module):
    """Expected image coordinates in [-1, 1] of `keypoints` learned attention maps: (B, C, h, w) -> (B, 2 n)."""

    def __init__(self, channels: int, keypoints: int):
        super().__init__()
        self.maps = nn.Conv2d(channels, keypoints, 1)

    def forward(self, features: Tensor) -> Tensor:
        maps = self.maps(features)
        height, width = maps.shape[-2:]
        attention = maps.flatten(2).float().softmax(-1)
        y = torch.linspace(-1, 1, height, device=maps.device)
        x = torch.linspace(-1, 1, width, device=maps.device)
        grid = torch.stack([x.repeat(height), y.repeat_interleave(width)], -1)
        return (attention @ grid).flatten(1)


class ImageEncoder(nn.Module):
    """A ResNet and one vector of features for each image.

    ResNet-18 ends in a spatial softmax and 64 features, ResNet-50 in the mean over the image and 512.

    Args:
        crop: side of the square crop (pixels): random in training, the same for all steps of a sample,
            central in evaluation.
        base_channels: channels after the stem; 64 is the usual width, and must be a multiple of 16.
        keypoints: attention maps of the spatial softmax.
        trunk: 'resnet18' or 'resnet50'.
        pretrained: made for weights that were trained on ImageNet, see `load_weights`: pixels scaled as there, and
            their BatchNorm frozen. Without, GroupNorm.
    """

    def __init__(
        self,
        crop: int = 76,
        base_channels: int = 64,
        keypoints: int = 32,
        trunk: str = 'resnet18',
        pretrained: bool = False,
    ):
        from transformers import ResNetModel

        super().__init__()
        self.crop, self.pretrained, self.feature_dim = crop, pretrained, TRUNKS[trunk].feature_dim
        config = TRUNKS[trunk].config(base_channels)
        channels = config.hidden_sizes[-1]
        replace = freeze_batch_norm if pretrained else replace_batch_norm
        # Channels last is what the CPU's convolutions are fastest in.
        self.trunk = replace(ResNetModel(config)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if trunk == 'resnet18':
            self.pool: nn.Module = SpatialSoftmax(channels, keypoints)
            channels = 2 * keypoints
        else:
            self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.project = nn.Linear(channels, self.feature_dim)

    def load_weights(self, name: str) -> None:
        """Start from a trunk of transformers' ResNet, such as microsoft/resnet-50.

        Args:
            name: folder, or name on the Hugging Face Hub.

        Raises:
            ConfigError: no such model, or one of another shape.
        """
        from transformers import ResNetModel

        try:
            theirs = freeze_batch_norm(ResNetModel.from_pretrained(name))
            self.trunk.load_state_dict(theirs.state_dict())
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"encoder.weights: {name!r} can't be loaded: {' '.join(str(error).split())[:300]}"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """(B, steps, H, W, 3) uint8 -> (B, steps, features)."""
        batch, steps = images.shape[:2]
        pixels = self._cropped(images).flatten(0, 1).permute(0, 3, 1, 2)
        pixels = self._scaled(pixels.float()).contiguous(memory_format=torch.channels_last)
        maps = self.trunk(pixels).last_hidden_state
        # Of convolutions in another precision the mean over the image has that one, too.
        features = self.pool(maps).to(self.project.weight.dtype)
        return self.project(features).unflatten(0, (batch, steps))

    def _scaled(self, pixels: Tensor) -> Tensor:
        if not self.pretrained:
            return pixels / 127.5 - 1
        mean, deviation = (torch.tensor(v, device=pixels.device)[:, None, None] for v in IMAGENET)
        return (pixels / 255 - mean) / deviation

    def _cropped(self, images: Tensor) -> Tensor:
        batch, _, height, width = images.shape[:4]
        if not self.training:
            y, x = (height - self.crop) // 2, (width - self.crop) // 2
            return images[:, :, y : y + self.crop, x : x + self.crop]
        tops = torch.randint(height - self.crop + 1, (batch,)).tolist()
        lefts = torch.randint(width - self.crop + 1, (batch,)).tolist()
        # Slices are copied row by row, where one index over the batch would gather pixels: 30 times slower on a CPU.
        crops = [
            sample[:, y : y + self.crop, x : x + self.crop]
            for sample, y, x in zip(images, tops, lefts, strict=True)
        ]
        return torch.stack(crops)


class VectorEncoder(nn.Module):
    """A vector stream enters as it is, normalised: (B, steps, n) -> (B, steps, n) float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.feature_dim = dim
        self.normaliser = VectorNormaliser(dim)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.normaliser(vectors.float())


class ObservationEncoder(nn.Module):
    """All streams of a contract, encoded one by one and concatenated per step, then over the steps.

    The order is the contract's, the instruction comes last. With two cameras (64 each) and proprioception (9), two
    steps: 274.

    Args:
        crop, base_channels, keypoints, trunk, pretrained: of each camera's `ImageEncoder`.
        step_dim: features of a step after an MLP over all its streams; None for the streams' features themselves.
        language: embeds the instruction, which is then a stream of every observation; None for a policy of a single
            instruction.

    Raises:
        ConfigError: the crop is larger than an image, or a stream has the instruction's name.
    """

    def __init__(
        self,
        contract: ObservationContract,
        crop: int = 76,
        base_channels: int = 64,
        keypoints: int = 32,
        trunk: str = 'resnet18',
        pretrained: bool = False,
        step_dim: int | None = None,
        language: InstructionEncoder | None = None,
    ):
        super().__init__()
        self._images: dict[str, Any] = {
            'crop': crop, 'base_channels': base_channels, 'keypoints': keypoints, 'trunk': trunk,
            'pretrained': pretrained,
        }  # fmt: skip
        self.config = {**self._images, 'step_dim': step_dim}
        if language is not None and INSTRUCTION in contract.names:
            raise ConfigError(f'{INSTRUCTION!r} is the name of the instruction, and of no other stream')
        self.contract = contract
        self.streams = nn.ModuleDict({s.name: self._encoder_of(s) for s in contract.streams})
        self.language = language
        width = sum(self._width(encoder) for encoder in self.streams.values())
        width += language.feature_dim if language is not None else 0
        self.step: nn.Module | None = None
        if step_dim is not None:
            self.step = nn.Sequential(nn.Linear(width, step_dim), nn.GELU(), nn.Linear(step_dim, step_dim))
        self.feature_dim = (step_dim or width) * contract.n_obs_steps

    def _encoder_of(self, stream: StreamSpec) -> ImageEncoder | VectorEncoder:
        if stream.kind != 'image':
            return VectorEncoder(stream.shape[0])
        side = min(stream.shape[:2])
        if self._images['crop'] > side:
            raise ConfigError(
                f'encoder.crop is {self._images["crop"]} pixels, but images of {stream.name!r} are '
                f'{stream.shape[0]}x{stream.shape[1]}; valid: 1 to {side}'
            )
        return ImageEncoder(**self._images)

    @staticmethod
    def _width(encoder: nn.Module) -> int:
        assert isinstance(encoder, ImageEncoder | VectorEncoder)
        return encoder.feature_dim

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        """Features (B, feature_dim) of a dict of (B, n_obs_steps, ...) tensors, images uint8.

        With language, `observation['instruction']` holds embeddings (B, dim), or one (1, dim) for all of them.
        """
        encoded = {name: encoder(observation[name]) for name, encoder in self.streams.items()}
        return self.join(encoded, observation.get(INSTRUCTION))

    def join(self, encoded: Mapping[str, Tensor], spoken: Tensor | None) -> Tensor:
        """Features (B, feature_dim) of the streams' own (B, n_obs_steps, n) and the instruction's embedding."""
        per_step = [encoded[name].float() for name in self.streams]
        if self.language is not None:
            assert spoken is not None
            told = self.language(spoken).float()
            per_step.append(told[:, None].expand(*per_step[0].shape[:2], -1))
        features = torch.cat(per_step, -1)
        if self.step is not None:
            features = self.step(features).float()
        return features.flatten(1)
