"""Products and convolutions whose weights are laid out for the processor once, by oneDNN, which comes with PyTorch.

`torch.nn.Linear` has its matrix laid out anew in every product; with the 16 rows of a chunk that costs as much as the
product does. A single image's convolution goes to a slow library on one thread. Here both happen at construction.

In bfloat16 weights and what they are multiplied with are bfloat16, sums are float32: half of the memory to read, and
twice the products a cycle on processors that have instructions for it (AVX512-BF16, AMX).
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.policy.device import multiplies_bfloat16

PRECISIONS = {'float32': torch.float32, 'bfloat16': torch.bfloat16}


def usable_precision(name: str, device: torch.device) -> torch.dtype:
    """The type that weights are multiplied in.

    Raises:
        ConfigError: no such precision, or not on this device or processor.
    """
    if name not in PRECISIONS:
        raise ConfigError(f'precision {name!r} does not exist; valid: {", ".join(PRECISIONS)}')
    if name == 'bfloat16':
        if not packs_on(device):
            raise ConfigError(f"precision 'bfloat16' is for device cpu, not {device.type}; valid: float32")
        if name not in usable_precisions(device):
            raise ConfigError("precision 'bfloat16' is not usable on this processor; valid: float32")
    return PRECISIONS[name]


def usable_precisions(device: torch.device) -> dict[str, torch.dtype]:
    """All that `usable_precision` lets pass."""
    rounded = packs_on(device) and multiplies_bfloat16(device)
    return {name: dtype for name, dtype in PRECISIONS.items() if name == 'float32' or rounded}


def packs_on(device: torch.device) -> bool:
    """Whether weights can be laid out for this device."""
    return device.type == 'cpu' and torch.backends.mkldnn.is_available()


class PackedLinear:
    """W x + b for x (..., in), with W laid out beforehand.

    Args:
        weight: (out, in).
        bias: (out,), or None.
        rows: how many x there usually are.
        dtype: that x is multiplied in; results have it too.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, dtype: torch.dtype):
        weight = weight.detach().to(dtype).contiguous()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self._bias = None if bias is None else bias.detach().to(dtype)
        self._dtype = dtype
        self._run: Any = torch.ops.mkldnn._linear_pointwise.default
        self._run_and_add: Any = torch.ops.mkldnn._linear_pointwise.binary

    @classmethod
    def of(cls, linear: nn.Linear, rows: int, dtype: torch.dtype) -> PackedLinear:
        """That of a layer."""
        return cls(linear.weight, linear.bias, rows, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        x = x if x.dtype == self._dtype else x.to(self._dtype)
        return self._run(x, self._weight, self._bias, 'none', [], None)

    def gelu(self, x: Tensor) -> Tensor:
        """Gelu(W x + b)."""
        x = x if x.dtype == self._dtype else x.to(self._dtype)
        return self._run(x, self._weight, self._bias, 'gelu', [], 'none')

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """W x + b + residual, of the residual's type; where that is the products' own, x has to have it too."""
        if residual.dtype != self._dtype:
            return residual + self(x)
        return self._run_and_add(x, residual, self._weight, self._bias, 'add')


class PackedConv2d(nn.Module):
    """A convolution with its weights laid out for inputs of one size.

    Args:
        size: (B, C, H, W) of the input.
    """

    def __init__(self, conv: nn.Conv2d, size: torch.Size, dtype: torch.dtype):
        super().__init__()
        self._way = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        weight = conv.weight.detach().to(dtype)
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._way, list(size))
        self._bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        self._dtype = dtype
        self._run: Any = torch.ops.mkldnn._convolution_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, h, w), both laid out with the channels last."""
        return self._run(x.to(self._dtype), self._weight, self._bias, *self._way, 'none', [], None)


@torch.inference_mode()
def with_packed_convolutions(module: nn.Module, example: Tensor, dtype: torch.dtype) -> nn.Module:
    """A copy of a module, for inference, whose convolutions are laid out for inputs like the example."""
    module = deepcopy(module).eval()
    sizes: dict[str, torch.Size] = {}
    hooks = [
        child.register_forward_hook(lambda _, inputs, __, name=name: sizes.update({name: inputs[0].shape}))
        for name, child in module.named_modules()
        if isinstance(child, nn.Conv2d)
    ]
    module(example)
    for hook in hooks:
        hook.remove()
    for name, size in sizes.items():
        parent, _, child = name.rpartition('.')
        conv = module.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        setattr(module.get_submodule(parent), child, PackedConv2d(conv, size, dtype))
    return module
