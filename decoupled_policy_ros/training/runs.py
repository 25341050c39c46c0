"""What every training run has in common: loss, the identity that a checkpoint is resumed by, provenance.

Loss in Stage 1, Stage 2 and normal training:  E || y - f(x_k ; A([tau(k) ; c])) ||^2, where y is the noise (Ho et
al. 2020, eq. 14) or what else the backbone's schedule says.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import decoupled_policy_ros
from decoupled_policy_ros.policy.conditioning import Conditioning
from decoupled_policy_ros.policy.device import usable_device
from decoupled_policy_ros.policy.policy import Backbone
from decoupled_policy_ros.training.config import Optimisation, Stage1Config, Stage2Config
from decoupled_policy_ros.training.loop import Trainer, final_loss
from decoupled_policy_ros.training.processes import device_of_process, require_trackers

#: Settings that are younger than many a checkpoint: left out of a run's identity where nobody chose otherwise.
YOUNGER = {
    'only_successful': False,
    'language': None,
    'trunk': 'resnet18',
    'weights': None,
    'step_dim': None,
    'validation': None,
    'clip': None,
    'encoder_weight_decay': None,
}
HASHED_BYTES = 2**24


def diffusion_loss(
    backbone: Backbone, conditioning: Conditioning, actions: Tensor, features: Tensor, samples: int = 1
) -> Tensor:
    """Prediction error of a batch; `samples` noise levels are drawn for each of its elements.

    Args:
        actions: (B, horizon, 10) in metres; features: (B, feature_dim).
    """
    x_0 = backbone.normaliser(actions).repeat(samples, 1, 1)
    k = torch.randint(backbone.schedule.config.training_steps, (len(x_0),), device=x_0.device)
    eps = torch.randn_like(x_0)
    x_k = backbone.schedule.add_noise(x_0, eps, k)
    denoiser = backbone.denoiser
    modulation = conditioning(denoiser.tau(k), features.repeat(samples, 1))
    target = backbone.schedule.target(x_0, eps, k)
    return nn.functional.mse_loss(denoiser(x_k, modulation).float(), target)


def weights_sha256(module: nn.Module) -> str:
    """Hash of all parameters and buffers, byte for byte."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def prepare(config: Optimisation) -> Optimisation:
    """Take the threads that are asked for; refuse a device or tracker that is not there.

    Returns:
        The same with this process's own GPU, where several processes train together.
    """
    config = config.model_copy(update={'device': device_of_process(config.device)})
    usable_device(config.device)
    require_trackers(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return config


def identity_of(config: Stage1Config | Stage2Config, **more: str) -> dict[str, str]:
    """All settings that change what is computed: a checkpoint made with others is not resumed."""
    settings = json.loads(config.model_dump_json())
    loop = settings.pop('optimisation')
    for section in (settings, loop, settings.get('encoder', {})):
        for key in [key for key in section if key in YOUNGER and section[key] == YOUNGER[key]]:
            section.pop(key)
    # These don't change what is computed; the trainer knows what `accumulate` comes to over all processes.
    for key in ('device', 'threads', 'checkpoint_every', 'trackers', 'accumulate'):
        loop.pop(key)
    return {key: json.dumps(value) for key, value in {**settings, **loop}.items()} | more


def data_sha256(arrays: Mapping[str, Tensor | NDArray]) -> str:
    """Hash of what is trained on: whole arrays of up to 16 MiB, of larger ones so many rows, evenly over their length.

    A dataset that changed under the same path is noticed by it.
    """
    digest = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        rows = np.asarray(values)
        digest.update(f'{name} {rows.dtype} {rows.shape}'.encode())
        few = max(1, HASHED_BYTES // max(1, rows[:1].nbytes))
        digest.update(np.ascontiguousarray(rows[:: max(1, len(rows) // few)]).tobytes())
    return digest.hexdigest()


def provenance_of(stage: str, data: dict, trainer: Trainer) -> dict:
    """For the file of a backbone or task: where it came from."""
    versions = {'python': platform.python_version(), 'decoupled_policy_ros': decoupled_policy_ros.__version__}
    versions |= {package: importlib.metadata.version(package) for package in ('torch', 'numpy')}
    config = trainer.config
    return {
        'stage': stage,
        'data': data,
        'steps': config.steps,
        'batch_size': trainer.batch_size,
        'seed': config.seed,
        'computed_in': trainer.computed_in,
        'final_loss': final_loss(trainer.losses),
        'versions': versions,
    }
