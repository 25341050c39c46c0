"""DP-T: a causal transformer over the waypoints, conditioned in one of seven ways.

Five ways modulate every sublayer (see `residual`). Two give it tokens to attend to, the timestep and each
observation step: cross-attention in every layer, or a prefix before the actions. The frozen part holds no
positions: the conditioning network brings their embeddings, as in the paper's public code.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.policy.backbones.interface import (
    Denoiser,
    Sinusoid,
    Size,
    TimestepProjection,
    full_precision,
)
from decoupled_policy_ros.policy.backbones.modulation import MemoryLayout, ModulationLayout
from decoupled_policy_ros.policy.backbones.residual import RESIDUALS, FeedForward, Residual
from decoupled_policy_ros.robot.poses import ACTION_DIM

TOKEN_MECHANISMS = ('cross_attention', 'prefix')


@dataclass(frozen=True)
class DPTSize(Size):
    """Sizes of a DP-T; the defaults are the paper's, but for its horizon of 10."""

    kind: Literal['dp_t'] = 'dp_t'
    width: int = 256
    hidden: int = 1024
    layers: int = 8
    heads: int = 4
    dropout: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ConfigError(f'backbone.heads must divide width ({self.width}), got {self.heads}')


class Attention(nn.Module):
    """Multi-head attention of tokens (B, T, width) to a source (B, S, width)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, source: Tensor, visible: Tensor | None = None) -> Tensor:
        """(B, T, width); `visible` (T, S) says which tokens of the source each token sees, all by default."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x), *self.key_value(source).chunk(2, -1))
        )
        dropout = self.dropout.p if self.training else 0.0
        with attention_kernel(query):
            mixed = F.scaled_dot_product_attention(query, key, value, visible, dropout)
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))


def attention_kernel(x: Tensor) -> AbstractContextManager:
    """For gradients on a CPU the plain kernel: the fused one's backward pass took over a third of a training step."""
    plain = x.device.type == 'cpu' and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


class Layer(nn.Module):
    """Self-attention, cross-attention where there is a memory for it, perceptron; each within a residual."""

    def __init__(self, size: DPTSize, residual: type[Residual], crossing: bool):
        super().__init__()
        self.attention = Attention(size.width, size.heads, size.dropout)
        self.feed_forward = FeedForward(size.width, size.hidden, size.dropout)
        self.around_attention = residual(size.width)
        self.around_feed_forward = residual(size.width)
        self.crossing = Attention(size.width, size.heads, size.dropout) if crossing else None
        self.around_crossing = Residual(size.width) if crossing else None

    def forward(
        self,
        x: Tensor,
        visible: Tensor,
        memory: Tensor | None,
        modulation: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    ) -> Tensor:
        """X (B, T, width) -> the same; `visible` (T, T), memory (B, n, width)."""
        for_attention, for_feed_forward = modulation
        x = self.around_attention(x, lambda y: self.attention(y, y, visible), *for_attention)
        if self.crossing is not None and self.around_crossing is not None:
            assert memory is not None
            x = self.around_crossing(x, lambda y: self.crossing(y, memory))
        return self.around_feed_forward(x, self.feed_forward, *for_feed_forward)


class DPTBackbone(Denoiser):
    """DP-T.

    Waypoint i is computed from waypoints 0 to i: the attention is causal, with every mechanism. As a prefix the
    memory goes through all layers, sees itself whole, and is seen by all waypoints.
    """

    kind = 'dp_t'
    mechanisms = ('adaln_zero', *(name for name in RESIDUALS if name != 'adaln_zero'), *TOKEN_MECHANISMS)
    Size: ClassVar[type[Size]] = DPTSize

    def __init__(self, size: DPTSize | None = None, mechanism: str | None = None):
        size = size or DPTSize()
        super().__init__(size, mechanism)
        width = size.width
        residual = RESIDUALS.get(self.mechanism, Residual)
        if self.mechanism in TOKEN_MECHANISMS:
            # The token of the timestep goes through the perceptron of the conditioning network instead.
            self.tau = Sinusoid(width)
            self.needs = MemoryLayout(width, size.horizon)
        else:
            self.tau = TimestepProjection(width)
            groups = (residual.slots(width),) * (2 * size.layers)
            self.needs = ModulationLayout(groups, (size.horizon, width))
        self.embed = nn.Linear(ACTION_DIM, width)
        self.layers = nn.ModuleList(
            Layer(size, residual, self.mechanism == 'cross_attention') for _ in range(size.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, ACTION_DIM)

    def forward(self, noisy_actions: Tensor, modulation: Tensor) -> Tensor:
        """Prediction (B, horizon, 10) for normalised noisy actions (B, horizon, 10).

        Args:
            modulation: (B, needs.size), or tokens (B, n + horizon, width), from a conditioning network.
        """
        with full_precision(noisy_actions):
            x = self.embed(noisy_actions.float())
        memory, prefixed = None, 0
        if isinstance(self.needs, MemoryLayout):
            memory, positions = (tokens.contiguous() for tokens in self.needs.split(modulation))
            groups: list[tuple[Tensor, ...]] = [()] * (2 * len(self.layers))
        else:
            positions, groups = self.needs.positions_of(modulation), self.needs.split(modulation)
        x = x + positions
        if self.mechanism == 'prefix':
            assert memory is not None
            x, prefixed = torch.cat([memory.to(x.dtype), x], 1), memory.shape[1]
        visible = causal_mask(self.horizon, prefixed, x.device)
        for layer, *vectors in zip(self.layers, groups[::2], groups[1::2], strict=True):
            x = layer(x, visible, memory, tuple(vectors))
        with full_precision(x):
            return self.head(self.norm(x[:, prefixed:].float()))


def causal_mask(horizon: int, prefixed: int, device: torch.device) -> Tensor:
    """Which of `prefixed` + `horizon` tokens each of them sees: the prefix, and what comes before it."""
    total = prefixed + horizon
    visible = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    visible[:prefixed, :prefixed] = True
    return visible
