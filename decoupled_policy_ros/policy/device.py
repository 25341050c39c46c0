"""The device on which a network runs, and what it can do."""

from __future__ import annotations

import torch

from decoupled_policy_ros.errors import ConfigError


def usable_device(name: str) -> torch.device:
    """The device of this name, after a number went there and came back.

    Raises:
        ConfigError: no such device here; those that there are are named.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        valid = ['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))]
        reason = str(error).split('\n')[0]
        raise ConfigError(
            f'device {name!r} is not usable here ({reason}); valid: {", ".join(valid)}'
        ) from error
    return device


def name_of(device: torch.device) -> str:
    """What a reader of a file has to know of where its numbers were computed: `cpu`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else str(device)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it: without them bfloat16 is many times slower than float32."""
    if device.type == 'cpu':
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
