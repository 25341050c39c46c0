"""DP-MLP: a residual perceptron applied to each waypoint by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled_policy_ros.policy.backbones.interface import (
    Denoiser,
    Size,
    TimestepProjection,
    full_precision,
)
from decoupled_policy_ros.policy.backbones.modulation import ModulationLayout, Slot
from decoupled_policy_ros.policy.backbones.residual import AdaLNZero
from decoupled_policy_ros.robot.poses import ACTION_DIM


class MLPBlock(nn.Module):
    """What the blocks share: W1 to the hidden width, gelu, W2 back."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def hidden(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, hidden)."""
        return F.gelu(self.expand(x))


class FiLMBlock(MLPBlock):
    """x <- LayerNorm(x + W2 (gamma * gelu(W1 x + b1) + beta) + b2): gamma and beta act on the hidden layer."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__(width, hidden, dropout)
        self.norm = nn.LayerNorm(width)

    @staticmethod
    def slots(width: int, hidden: int) -> tuple[Slot, ...]:
        """Gamma and beta."""
        return Slot(hidden, 1.0), Slot(hidden)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """X (B, T, width), gamma and beta (B, hidden) -> (B, T, width)."""
        h = torch.addcmul(beta[:, None], gamma[:, None], self.hidden(x))
        return self.norm(x + self.dropout(self.contract(h)))


class AdaLNZeroBlock(MLPBlock):
    """x <- x + alpha * W2 gelu(W1 ((1 + gamma) * LN0(x) + beta)): the modulation acts on the block's ends."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__(width, hidden, dropout)
        self.residual = AdaLNZero(width)

    @staticmethod
    def slots(width: int, hidden: int) -> tuple[Slot, ...]:
        """Gamma, beta and alpha."""
        return AdaLNZero.slots(width)

    def forward(self, x: Tensor, *modulation: Tensor) -> Tensor:
        """X (B, T, width), gamma, beta and alpha (B, width) -> (B, T, width)."""
        return self.residual(x, lambda y: self.dropout(self.contract(self.hidden(y))), *modulation)


BLOCKS: dict[str, type[FiLMBlock | AdaLNZeroBlock]] = {'film': FiLMBlock, 'adaln_zero': AdaLNZeroBlock}


@dataclass(frozen=True)
class PerceptronSize(Size):
    """What DP-MLP and DP-Mixer have in common."""

    width: int = 256
    hidden: int = 1024
    blocks: int = 8
    dropout: float = 0.1
    time_width: int = 256


@dataclass(frozen=True)
class DPMLPSize(PerceptronSize):
    """Sizes of a DP-MLP; the defaults are the paper's (4,256,778 parameters, and 525,568 in tau)."""

    kind: Literal['dp_mlp'] = 'dp_mlp'


class DPMLPBackbone(Denoiser):
    """DP-MLP: a residual MLP applied to each of the 16 positions, modulated in every block.

    Nothing mixes the positions: output i depends on input i and the modulation only, and all coherence
    within a chunk comes from the modulation. Each position has an input embedding of its own.
    """

    kind = 'dp_mlp'
    mechanisms = tuple(BLOCKS)
    mixes_time = False
    Size: ClassVar[type[Size]] = DPMLPSize

    def __init__(self, size: PerceptronSize | None = None, mechanism: str | None = None):
        size = size or DPMLPSize()
        super().__init__(size, mechanism)
        width = size.width
        self.tau = TimestepProjection(size.time_width)
        # One (10 -> width) embedding per position; the scale is nn.Linear's own.
        bound = 1 / math.sqrt(ACTION_DIM)
        self.embed_weight = nn.Parameter(torch.empty(size.horizon, ACTION_DIM, width).uniform_(-bound, bound))
        self.embed_bias = nn.Parameter(torch.empty(size.horizon, width).uniform_(-bound, bound))
        self.blocks = nn.ModuleList(self._block(size) for _ in range(size.blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, ACTION_DIM)
        self.needs: ModulationLayout = ModulationLayout((self._slots(size),) * size.blocks)

    def _block(self, size: Any) -> nn.Module:
        """One block, of which forward takes x (B, horizon, width) and the vectors of its slots."""
        return BLOCKS[self.mechanism](size.width, size.hidden, size.dropout)

    def _slots(self, size: Any) -> tuple[Slot, ...]:
        """What a block asks for."""
        return BLOCKS[self.mechanism].slots(size.width, size.hidden)

    def forward(self, noisy_actions: Tensor, modulation: Tensor) -> Tensor:
        """Prediction (B, horizon, 10) for normalised noisy actions (B, horizon, 10).

        Args:
            modulation: (B, needs.size), from a conditioning network.
        """
        with full_precision(noisy_actions):
            x = torch.einsum('bti,tio->bto', noisy_actions.float(), self.embed_weight) + self.embed_bias
        x = x.contiguous()  # else a frozen layer's weights are copied once for each element of the batch
        for block, vectors in zip(self.blocks, self.needs.split(modulation), strict=True):
            x = block(x, *vectors)
        with full_precision(x):
            return self.head(self.norm(x.float()))
