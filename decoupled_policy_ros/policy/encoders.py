"""Observation encoders E: the streams of an observation contract -> one feature vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.policy.normalisation import VectorNormaliser


def replace_batch_norm(module: nn.Module, channels_per_group: int = 16) -> nn.Module:
    """Replace every BatchNorm by GroupNorm: batch statistics and EMA weights don't belong together."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = child.num_features // channels_per_group
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        else:
            replace_batch_norm(child, channels_per_group)
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
    """ResNet-18 with GroupNorm and a spatial softmax; 64 features an image.

    Args:
        crop: side of the square crop (pixels): random in training, the same for all steps of a sample,
            central in evaluation.
        base_channels: channels after the stem; 64 is the usual width, and must be a multiple of 16.
        keypoints: attention maps of the spatial softmax.
    """

    def __init__(self, crop: int = 76, base_channels: int = 64, keypoints: int = 32, feature_dim: int = 64):
        super().__init__()
        self.crop = crop
        channels = [base_channels * 2**i for i in range(4)]
        config = ResNetConfig(
            embedding_size=base_channels, hidden_sizes=channels, depths=[2, 2, 2, 2], layer_type='basic'
        )
        # Channels last is what the CPU's convolutions are fastest in.
        self.trunk = replace_batch_norm(ResNetModel(config)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.pool = SpatialSoftmax(channels[-1], keypoints)
        self.project = nn.Linear(2 * keypoints, feature_dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, steps, H, W, 3) uint8 -> (B, steps, features)."""
        batch, steps = images.shape[:2]
        pixels = self._cropped(images).flatten(0, 1).permute(0, 3, 1, 2)
        pixels = (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        maps = self.trunk(pixels).last_hidden_state
        return self.project(self.pool(maps)).unflatten(0, (batch, steps))

    def _cropped(self, images: Tensor) -> Tensor:
        batch, _, height, width = images.shape[:4]
        if not self.training:
            y, x = (height - self.crop) // 2, (width - self.crop) // 2
            return images[:, :, y : y + self.crop, x : x + self.crop]
        top = torch.randint(height - self.crop + 1, (batch, 1, 1), device=images.device)
        left = torch.randint(width - self.crop + 1, (batch, 1, 1), device=images.device)
        rows = top + torch.arange(self.crop, device=images.device)[:, None]
        columns = left + torch.arange(self.crop, device=images.device)
        sample = torch.arange(batch, device=images.device)[:, None, None]
        return images.transpose(0, 1)[:, sample, rows, columns].transpose(0, 1)


class VectorEncoder(nn.Module):
    """A vector stream enters as it is, normalised: (B, steps, n) -> (B, steps, n) float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.normaliser = VectorNormaliser(dim)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.normaliser(vectors.float())


class ObservationEncoder(nn.Module):
    """All streams of a contract, encoded one by one and concatenated per step, then over the steps.

    The order is the contract's. With two cameras (64 each) and proprioception (9), two steps: 274.

    Raises:
        ConfigError: the crop is larger than an image.
    """

    def __init__(
        self, contract: ObservationContract, crop: int = 76, base_channels: int = 64, keypoints: int = 32
    ):
        super().__init__()
        self.config = {'crop': crop, 'base_channels': base_channels, 'keypoints': keypoints}
        self.contract = contract
        self.streams = nn.ModuleDict({s.name: self._encoder_of(s) for s in contract.streams})

    def _encoder_of(self, stream: StreamSpec) -> nn.Module:
        if stream.kind != 'image':
            return VectorEncoder(stream.shape[0])
        side = min(stream.shape[:2])
        if self.config['crop'] > side:
            raise ConfigError(
                f'encoder.crop is {self.config["crop"]} pixels, but images of {stream.name!r} are '
                f'{stream.shape[0]}x{stream.shape[1]}; valid: 1 to {side}'
            )
        return ImageEncoder(**self.config)

    @property
    def feature_dim(self) -> int:
        per_step = sum(64 if s.kind == 'image' else math.prod(s.shape) for s in self.contract.streams)
        return per_step * self.contract.n_obs_steps

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        """Features (B, feature_dim) of a dict of (B, n_obs_steps, ...) tensors, images uint8."""
        per_step = [encoder(observation[name]) for name, encoder in self.streams.items()]
        return torch.cat([features.float() for features in per_step], -1).flatten(1)
