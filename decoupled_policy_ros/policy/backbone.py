"""The denoising backbone: eps = f(x_k ; modulation), shared by every task and frozen after Stage 1.

The backbone never sees an observation. It owns the timestep projection tau (diffusion step -> learned
embedding), because tau is frozen with it, and receives everything else as a modulation tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled_policy_ros.robot.poses import ACTION_DIM


class TimestepProjection(nn.Module):
    """tau(k): sinusoidal features of the diffusion step, then a two-layer perceptron."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))

    def forward(self, k: Tensor) -> Tensor:
        """Embeddings (B, width) of integer diffusion steps (B,)."""
        half = self.width // 2
        frequency = torch.exp(torch.arange(half, device=k.device) * (-math.log(10_000) / (half - 1)))
        angle = k[:, None].float() * frequency
        return self.layers(torch.cat([angle.sin(), angle.cos()], -1))


class ModulatedBlock(nn.Module):
    """x <- LayerNorm(x + W2 (gamma * gelu(W1 x + b1) + beta) + b2), the same weights at every position."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """X (B, T, width), gamma and beta (B, hidden) -> (B, T, width)."""
        h = torch.addcmul(beta[:, None], gamma[:, None], F.gelu(self.expand(x)))
        return self.norm(x + self.dropout(self.contract(h)))


class DPMLPBackbone(nn.Module):
    """DP-MLP: a residual MLP applied to each of the 16 positions, modulated by FiLM in every block.

    Nothing mixes the positions: output i depends on input i and the modulation only, and all coherence
    within a chunk comes from the modulation. Each position has an input embedding of its own.

    Args:
        horizon: waypoints in a chunk.
        width, hidden, blocks: sizes; the defaults are the paper's (4,256,778 parameters, and 525,568 in
            the timestep projection).
        dropout: active in training only; a frozen backbone is in eval mode.
    """

    kind = 'dp_mlp'

    def __init__(
        self,
        horizon: int = 16,
        width: int = 256,
        hidden: int = 1024,
        blocks: int = 8,
        dropout: float = 0.1,
        time_width: int = 256,
    ):
        super().__init__()
        self.config = {
            'horizon': horizon,
            'width': width,
            'hidden': hidden,
            'blocks': blocks,
            'dropout': dropout,
            'time_width': time_width,
        }
        self.horizon, self.hidden, self.time_width = horizon, hidden, time_width
        self.n_blocks = blocks
        self.tau = TimestepProjection(time_width)
        # One (10 -> width) embedding per position; the scale is nn.Linear's own.
        bound = 1 / math.sqrt(ACTION_DIM)
        self.embed_weight = nn.Parameter(torch.empty(horizon, ACTION_DIM, width).uniform_(-bound, bound))
        self.embed_bias = nn.Parameter(torch.empty(horizon, width).uniform_(-bound, bound))
        self.blocks = nn.ModuleList(ModulatedBlock(width, hidden, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, ACTION_DIM)

    @property
    def modulation_shape(self) -> tuple[int, int, int]:
        """(blocks, 2, hidden): gamma and beta of every block."""
        return self.n_blocks, 2, self.hidden

    def forward(self, noisy_actions: Tensor, modulation: Tensor) -> Tensor:
        """Predicted noise (B, horizon, 10) of normalised noisy actions (B, horizon, 10).

        Args:
            modulation: (B, blocks, 2, hidden), from a conditioning network.
        """
        # In float32 even under autocast: at the last denoising steps the noise is finer than bfloat16.
        with torch.autocast(noisy_actions.device.type, enabled=False):
            x = torch.einsum('bti,tio->bto', noisy_actions.float(), self.embed_weight) + self.embed_bias
        gammas, betas = modulation.unbind(2)
        for i, block in enumerate(self.blocks):
            x = block(x, gammas[:, i], betas[:, i])
        with torch.autocast(noisy_actions.device.type, enabled=False):
            return self.head(self.norm(x.float()))


BACKBONES = {DPMLPBackbone.kind: DPMLPBackbone}
