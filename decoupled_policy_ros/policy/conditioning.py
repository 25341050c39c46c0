"""Conditioning networks A: [tau(k) ; features] -> modulation of every backbone block.

All task knowledge enters here. The network is trained anew for every task, over a frozen backbone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FiLMConditioning(nn.Module):
    """(gamma_l, beta_l) = A_l mish([tau(k) ; c]) + a_l for all blocks l at once.

    mish acts element by element, so the product splits exactly into a half that depends on the diffusion
    step alone and a half that depends on the observation alone:

        A mish([tau ; c]) + a  =  (A_tau mish(tau) + a)  +  A_c mish(c)

    `forward` is the naive way and the reference. `time_half` (one constant table per checkpoint) and
    `feature_half` (one matrix-vector product per control cycle) are the fast way.

    Args:
        time_width: size of tau(k).
        feature_dim: size of c, all observation steps flattened.
        modulation_shape: (blocks, 2, hidden) of the backbone.
    """

    kind = 'film'

    def __init__(self, time_width: int, feature_dim: int, modulation_shape: tuple[int, int, int]):
        super().__init__()
        self.time_width, self.feature_dim = time_width, feature_dim
        self.modulation_shape = tuple(modulation_shape)
        blocks, pair, hidden = self.modulation_shape
        inputs, outputs = time_width + feature_dim, blocks * pair * hidden
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        # gamma starts around one, so that an untrained modulation passes the backbone's signal through.
        bias = torch.zeros(blocks, pair, hidden)
        bias[:, 0] = 1.0
        self.bias = nn.Parameter(bias.flatten())

    def forward(self, tau: Tensor, features: Tensor) -> Tensor:
        """Modulation (B, blocks, 2, hidden) from tau(k) (B, time_width) and features (B, feature_dim)."""
        flat = F.linear(F.mish(torch.cat([tau, features], -1)), self.weight, self.bias)
        return flat.unflatten(-1, self.modulation_shape)

    def time_half(self, tau: Tensor) -> Tensor:
        """The part of the modulation that depends on the diffusion step: (K, blocks, 2, hidden)."""
        flat = F.linear(F.mish(tau), self.weight[:, : self.time_width], self.bias)
        return flat.unflatten(-1, self.modulation_shape)

    def feature_half(self, features: Tensor) -> Tensor:
        """The part of the modulation that depends on the observation: (B, blocks, 2, hidden)."""
        flat = F.linear(F.mish(features), self.weight[:, self.time_width :])
        return flat.unflatten(-1, self.modulation_shape)


CONDITIONINGS = {FiLMConditioning.kind: FiLMConditioning}
