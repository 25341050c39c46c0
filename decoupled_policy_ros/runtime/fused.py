"""The denoising network as it runs in the loop: DP-MLP and DP-Mixer in few passes over memory.

The same sums as `DPMLPBackbone.forward` in another order of rounding. What differs: weights are laid out once; gelu and
the residual sum belong to the products before them; the modulation of all denoising steps is taken apart before the
first one, into memory that is reserved once; the samples of one observation share its modulation, and each product
has the rows of all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled_policy_ros.policy.backbones import Denoiser, DPMLPBackbone
from decoupled_policy_ros.policy.backbones.dp_mixer import MixerBlock
from decoupled_policy_ros.policy.backbones.dp_mlp import AdaLNZeroBlock, FiLMBlock
from decoupled_policy_ros.policy.packed import PackedLinear

#: The network's output for step number i and noisy actions (N, horizon, 10).
Step = Callable[[int, Tensor], Tensor]


class Network(Protocol):
    """A denoiser, ready for cycles of a fixed number of steps."""

    def begin(self, modulation: Tensor) -> Step:
        """The steps of one cycle.

        Args:
            modulation: (K, B, ...) of all K steps and B observations. The actions that the steps take are those of B
                observations after each other, of each the same number of samples.
        """


class PlainNetwork:
    """Any backbone, as it is."""

    def __init__(self, denoiser: Denoiser):
        self._denoiser = denoiser

    def begin(self, modulation: Tensor) -> Step:
        """See `Network`."""

        def step(i: int, x: Tensor) -> Tensor:
            samples = len(x) // modulation.shape[1]
            return self._denoiser(x, modulation[i].repeat_interleave(samples, 0))

        return step


class FusedNetwork:
    """A DP-MLP or DP-Mixer on a CPU that oneDNN knows.

    Args:
        denoiser: the network; its weights are copied.
        steps: denoising steps.
        dtype: see `policy.packed`. The residual stream, norms, embedding and head are float32 in any case.
    """

    def __init__(self, denoiser: DPMLPBackbone, steps: int, dtype: torch.dtype):
        size = denoiser.config
        self._horizon, self._width, self._dtype = size['horizon'], size['width'], dtype
        self._embed_weight = denoiser.embed_weight.detach()
        self._embed_bias = denoiser.embed_bias.detach()[:, None]
        self._norm, self._head = denoiser.norm, denoiser.head
        self._blocks = [_fused(block, self._horizon, dtype) for block in denoiser.blocks]
        self._layout = denoiser.needs
        ones = [torch.full((slot.size,), float(n in block.scales))
                for block, group in zip(self._blocks, self._layout.groups, strict=True)
                for n, slot in enumerate(group)]  # fmt: skip
        self._ones = torch.cat(ones)
        # Of a single observation, which is what a cycle has: reserved, and taken apart, once.
        self._single = self._reserve(torch.Size((steps, 1, self._layout.size)))

    def begin(self, modulation: Tensor) -> Step:
        """See `Network`; a cycle ends where the next one begins."""
        single = modulation.shape[1] == 1
        exact, rounded, vectors = self._single if single else self._reserve(modulation.shape)
        torch.add(modulation, self._ones, out=exact)
        if rounded is not exact:
            rounded.copy_(exact)
        return lambda i, x: self._step(x, vectors[i])

    def _reserve(self, shape: torch.Size) -> tuple[Tensor, Tensor, list[list[list[Tensor]]]]:
        """Memory of a modulation (K, B, size), exact and rounded, and its vectors (B, 1, n) by step, block and slot."""
        exact = torch.empty(shape)
        rounded = exact if self._dtype == exact.dtype else torch.empty(shape, dtype=self._dtype)
        split = self._layout.split
        vectors = [
            [
                [(r if n in block.hidden else e)[:, None] for n, (e, r) in enumerate(zip(*pair, strict=True))]
                for block, *pair in zip(self._blocks, split(of_exact), split(of_rounded), strict=True)
            ]
            for of_exact, of_rounded in zip(exact, rounded, strict=True)
        ]
        return exact, rounded, vectors

    def _step(self, noisy_actions: Tensor, vectors: Sequence[Sequence[Tensor]]) -> Tensor:
        observations = len(vectors[0][0])
        x = torch.baddbmm(self._embed_bias, noisy_actions.transpose(0, 1), self._embed_weight)
        x = x.transpose(0, 1).reshape(observations, -1, self._width)
        for block, modulation in zip(self._blocks, vectors, strict=True):
            x = block(x, *modulation)
        return self._head(_normed(self._norm, x)).view(noisy_actions.shape)


class _Fused(ABC):
    """A block: x (B, rows, width) and its vectors (B, 1, size) -> (B, rows, width).

    Attributes:
        scales: numbers of the vectors that scale by 1 more than they say; the 1 is added for all steps at once.
        hidden: numbers of the vectors that belong to what is multiplied next, and have its type.
    """

    scales: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()

    @abstractmethod
    def __call__(self, x: Tensor, *modulation: Tensor) -> Tensor: ...


class _FusedFiLM(_Fused):
    hidden = (0, 1)

    def __init__(self, block: FiLMBlock, rows: int, dtype: torch.dtype):
        self._expand = PackedLinear.of(block.expand, rows, dtype)
        self._contract = PackedLinear.of(block.contract, rows, dtype)
        self._norm = block.norm

    def __call__(self, x: Tensor, *modulation: Tensor) -> Tensor:
        gamma, beta = modulation
        h = torch.addcmul(beta, gamma, self._expand.gelu(x))
        return _normed(self._norm, self._contract.plus(h, x))


class _FusedAdaLNZero(_Fused):
    scales = (0,)

    def __init__(self, block: AdaLNZeroBlock, rows: int, dtype: torch.dtype):
        self._expand = PackedLinear.of(block.expand, rows, dtype)
        self._contract = PackedLinear.of(block.contract, rows, dtype)
        self._norm = block.residual.norm

    def __call__(self, x: Tensor, *modulation: Tensor) -> Tensor:
        scale, beta, alpha = modulation
        h = self._expand.gelu(torch.addcmul(beta, scale, _normed(self._norm, x)))
        return torch.addcmul(x, alpha, self._contract(h).to(x.dtype))


class _FusedMixer(_Fused):
    """The mixing is a product from the left with matrices of 64 x 16 and 16 x 64, without turning x over; float32."""

    def __init__(self, block: MixerBlock, channels: _Fused):
        self._norm, self._channels = block.residual.norm, channels
        self._horizon = block.mixing.expand.in_features
        self._expand, self._expand_bias = _left(block.mixing.expand)
        self._contract, self._contract_bias = _left(block.mixing.contract)
        self.scales = (0, *(3 + n for n in channels.scales))
        self.hidden = tuple(3 + n for n in channels.hidden)

    def __call__(self, x: Tensor, *modulation: Tensor) -> Tensor:
        scale, beta, alpha, *rest = modulation
        y = torch.addcmul(beta, scale, _normed(self._norm, x)).view(-1, self._horizon, x.shape[-1])
        h = F.gelu(torch.baddbmm(self._expand_bias, self._expand.expand(len(y), -1, -1), y))
        y = torch.baddbmm(self._contract_bias, self._contract.expand(len(y), -1, -1), h)
        return self._channels(torch.addcmul(x, alpha, y.view(x.shape)), *rest)


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """What the layer does, without what a module's call costs beside so little work."""
    return torch.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, False)


def _left(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out, 1) of a layer along time."""
    return linear.weight.detach(), linear.bias.detach()[:, None]


def _fused(block: nn.Module, rows: int, dtype: torch.dtype) -> _Fused:
    if isinstance(block, MixerBlock):
        return _FusedMixer(block, _fused(block.channels, rows, dtype))
    if isinstance(block, AdaLNZeroBlock):
        return _FusedAdaLNZero(block, rows, dtype)
    assert isinstance(block, FiLMBlock)
    return _FusedFiLM(block, rows, dtype)
