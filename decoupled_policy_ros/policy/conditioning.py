"""Conditioning networks A: [tau(k) ; features] -> what the backbone is conditioned with.

All task knowledge enters here. The network is trained anew for every task, over a frozen backbone. There are
two: one whose output splits into a timestep half and an observation half, and one whose output does not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled_policy_ros.policy.backbones.interface import Denoiser
from decoupled_policy_ros.policy.backbones.modulation import MemoryLayout, ModulationLayout
from decoupled_policy_ros.policy.packed import PackedLinear

POSITION_SCALE = 0.02  # of position embeddings before training


class Conditioning(nn.Module, ABC):
    """What both have in common.

    Attributes:
        kind: the mechanism, one of the backbone's: 'film', 'adaln_zero', 'cross_attention', ...
        feature_dim: size of the features, all observation steps flattened.
    """

    def __init__(self, kind: str, feature_dim: int, positions: tuple[int, int] | None):
        super().__init__()
        self.kind, self.feature_dim = kind, feature_dim
        # Of the waypoints; None where the backbone has its own.
        self.positions = nn.Parameter(POSITION_SCALE * torch.randn(*positions)) if positions else None

    @abstractmethod
    def forward(self, tau: Tensor, features: Tensor) -> Tensor:
        """What the backbone takes, from tau(k) (B, time_width) and features (B, feature_dim).

        This is the naive way and the reference.
        """

    def over_steps(self, tau: Tensor, packed: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
        """A function from features (B, feature_dim) to what the backbone takes in all steps, (K, B, ...).

        Args:
            tau: (K, time_width), of all denoising steps.
            packed: lay the weights of the observation's half out for products in this type, see `policy.packed`.
        """
        return lambda features: self(
            tau.repeat_interleave(len(features), 0), features.repeat(len(tau), 1)
        ).unflatten(0, (len(tau), len(features)))


class SplitConditioning(Conditioning):
    """One affine map of mish([tau ; c]) for the modulation of all layers at once.

    mish acts element by element, so the product splits exactly into a half that depends on the diffusion
    step alone and a half that depends on the observation alone:

        A mish([tau ; c]) + a  =  (A_tau mish(tau) + a)  +  A_c mish(c)

    `time_half` is one constant table per checkpoint, `feature_half` one matrix-vector product per control
    cycle, for any number of denoising steps.

    Args:
        kind: the mechanism.
        time_width: size of tau(k).
        feature_dim: size of c, all observation steps flattened.
        layout: what the backbone asks for.
    """

    def __init__(self, kind: str, time_width: int, feature_dim: int, layout: ModulationLayout):
        super().__init__(kind, feature_dim, layout.positions)
        self.time_width, self.layout = time_width, layout
        start, inputs = layout.start(), time_width + feature_dim
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(len(start), inputs).uniform_(-bound, bound))
        with torch.no_grad():
            self.weight[layout.closed()] = 0
        # An untrained modulation passes the backbone's signal through.
        self.bias = nn.Parameter(start)

    def forward(self, tau: Tensor, features: Tensor) -> Tensor:
        """Modulation (B, layout.size) from tau(k) (B, time_width) and features (B, feature_dim)."""
        return self._whole(F.linear(F.mish(torch.cat([tau, features], -1)), self.weight, self.bias))

    def time_half(self, tau: Tensor) -> Tensor:
        """The part of the modulation that depends on the diffusion step, and its constants: (K, layout.size)."""
        return self._whole(F.linear(F.mish(tau), self.weight[:, : self.time_width], self.bias))

    def feature_half(self, features: Tensor, product: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The part of the modulation that depends on the observation: (B, layout.size).

        Args:
            features: (B, feature_dim).
            product: with the features' columns of the weight, where it is not to be done anew.
        """
        c = F.mish(features)
        half = F.linear(c, self.weight[:, self.time_width :]) if product is None else product(c).to(c.dtype)
        return F.pad(half, (0, self.layout.constants)) if self.layout.constants else half

    def over_steps(self, tau: Tensor, packed: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
        table = self.time_half(tau)[:, None]
        product = None
        if packed is not None:
            product = PackedLinear(self.weight[:, self.time_width :], None, 1, packed)
        return lambda features: table + self.feature_half(features, product)

    def _whole(self, modulation: Tensor) -> Tensor:
        """The same with the constants at its end."""
        if self.positions is None:
            return modulation
        constants = self.positions.flatten().to(modulation.dtype).expand(len(modulation), -1)
        return torch.cat([modulation, constants], -1)


class TokenConditioning(Conditioning):
    """A memory of one token for the timestep and one for each observation step, for attention to read.

    It has no halves. The backbone weighs all tokens against each other in one softmax, whose denominator holds
    the timestep's term and the observation's terms together; a softmax of a sum is not the sum of two
    softmaxes. So the backbone's attention to the memory is computed anew in every denoising step. What can be
    kept over a cycle are the features.

    Args:
        kind: the mechanism.
        steps, step_dim: observation steps and features of each.
        layout: what the backbone asks for; the sinusoids of the timestep are as wide as its tokens.
    """

    def __init__(self, kind: str, steps: int, step_dim: int, layout: MemoryLayout):
        width = layout.width
        super().__init__(kind, steps * step_dim, (layout.horizon, width))
        self.steps = steps
        self.observe = nn.Linear(step_dim, width)
        self.places = nn.Parameter(POSITION_SCALE * torch.randn(1 + steps, width))
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))

    def forward(self, tau: Tensor, features: Tensor) -> Tensor:
        """Memory and position embeddings (B, 1 + steps + horizon, width)."""
        observed = self.observe(features.unflatten(-1, (self.steps, -1)))
        memory = self.layers(torch.cat([tau[:, None].to(observed.dtype), observed], 1) + self.places)
        assert self.positions is not None
        return torch.cat([memory, self.positions.to(memory.dtype).expand(len(memory), -1, -1)], 1)


def conditioning_for(denoiser: Denoiser, steps: int, step_dim: int) -> Conditioning:
    """A new conditioning network of the backbone's mechanism, for `steps` observation steps of `step_dim` features."""
    if isinstance(denoiser.needs, MemoryLayout):
        return TokenConditioning(denoiser.mechanism, steps, step_dim, denoiser.needs)
    return SplitConditioning(denoiser.mechanism, denoiser.tau.width, steps * step_dim, denoiser.needs)
