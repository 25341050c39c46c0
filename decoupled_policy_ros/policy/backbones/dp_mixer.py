"""DP-Mixer: DP-MLP in which each block looks at the whole chunk first, for a tenth more work.

DP-MLP moves output i by input i alone, so two waypoints of one chunk can decide for two different ways to do the
task. Here every block begins with a second, small perceptron, along time instead of along the channels (Tolstikhin
et al. 2021). It is a residual branch with a modulation of its own on both sides, so that a task can adjust what a
frozen backbone mixes, and how much of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from decoupled_policy_ros.policy.backbones.dp_mlp import DPMLPBackbone, PerceptronSize
from decoupled_policy_ros.policy.backbones.interface import Size
from decoupled_policy_ros.policy.backbones.modulation import Slot
from decoupled_policy_ros.policy.backbones.residual import AdaLNZero, FeedForward


@dataclass(frozen=True)
class DPMixerSize(PerceptronSize):
    """Sizes of a DP-Mixer: those of DP-MLP, and the hidden width of the perceptron along time.

    Attributes:
        mixing: that width.
    """

    kind: Literal['dp_mixer'] = 'dp_mixer'
    mixing: int = 64


class TimeMixing(FeedForward):
    """W2 gelu(W1 x) along time: every channel's 16 waypoints by the same two matrices."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, horizon, width) -> the same."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class MixerBlock(nn.Module):
    """x <- x + alpha * Mix((1 + gamma) * LN0(x) + beta), and then a block of DP-MLP.

    Dropout is for the channels alone: a channel that is dropped at one waypoint would reach all of them.
    """

    def __init__(self, size: DPMixerSize, channels: nn.Module):
        super().__init__()
        self.residual = AdaLNZero(size.width)
        self.mixing = TimeMixing(size.horizon, size.mixing, dropout=0.0)
        self.channels = channels

    @staticmethod
    def slots(width: int) -> tuple[Slot, ...]:
        """Gamma, beta and alpha of the mixing; those of the other block follow."""
        return AdaLNZero.slots(width)

    def forward(self, x: Tensor, *modulation: Tensor) -> Tensor:
        """X (B, horizon, width), gamma, beta and alpha (B, width), and the vectors of DP-MLP's block."""
        gamma, beta, alpha, *rest = modulation
        return self.channels(self.residual(x, self.mixing, gamma, beta, alpha), *rest)


class DPMixerBackbone(DPMLPBackbone):
    """DP-MLP's blocks with a mixing of the waypoints before each; modulated in the same ways, and mixing too."""

    kind = 'dp_mixer'
    mixes_time = True
    Size: ClassVar[type[Size]] = DPMixerSize

    def __init__(self, size: PerceptronSize | None = None, mechanism: str | None = None):
        super().__init__(size or DPMixerSize(), mechanism)

    def _block(self, size: Any) -> nn.Module:
        return MixerBlock(size, super()._block(size))

    def _slots(self, size: Any) -> tuple[Slot, ...]:
        return MixerBlock.slots(size.width) + super()._slots(size)
