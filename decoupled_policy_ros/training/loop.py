"""The training loop that all stages share: AdamW, EMA, checkpoints, exact resume.

Step s seeds the random generator with (seed, s) and draws everything from it: batch, noise, diffusion
steps, crops, dropout. So a run that was killed and resumed has the same losses as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from decoupled_policy_ros.errors import TrainingError
from decoupled_policy_ros.training.config import Optimisation

CHECKPOINT = 'checkpoint.safetensors'


def ema_decay(updates: int, power: float, maximum: float) -> float:
    """EMA decay after so many updates: 1 - (1 + n)^-power, at most `maximum`; 0 at the start."""
    return min(maximum, 1 - (1 + updates) ** -power)


def learning_rate(step: int, config: Optimisation) -> float:
    """Linear warm-up, then a cosine down to zero at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


class Trainer:
    """Trains `module` on `loss`, and leaves it with its EMA weights.

    Args:
        module: everything that learns, and nothing else: a frozen backbone is not part of it.
        loss: computes a scalar for a fresh random batch; called once a step.
        folder: where the checkpoint is kept; a checkpoint found there is resumed.
        identity: settings that a checkpoint must have been made with, so that no other run is resumed.

    Raises:
        TrainingError: the checkpoint belongs to another configuration or is damaged, a loss is not finite, or a
            checkpoint can't be written.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[], Tensor],
        config: Optimisation,
        folder: Path,
        identity: dict[str, str],
    ):
        self.module, self.loss, self.config, self.folder, self.identity = (
            module,
            loss,
            config,
            folder,
            identity,
        )
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,  # the update itself then takes a fifth of the time on a CPU
        )
        self.average = AveragedModel(module, multi_avg_fn=self._average)
        self.losses: list[float] = []
        self.seconds = 0.0
        if (folder / CHECKPOINT).exists():
            self._resume()

    def _average(self, averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        decay = ema_decay(int(count), self.config.ema_power, self.config.ema_max)
        torch._foreach_lerp_(list(averaged), list(current), 1 - decay)

    def run(self) -> None:
        """Train from the last checkpoint to the last step."""
        self.folder.mkdir(
            parents=True, exist_ok=True
        )  # now, so that a folder that can't be made is not found late
        self.module.train()
        config, first = self.config, len(self.losses)
        started, before = time.monotonic(), self.seconds
        columns = (
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn('loss {task.fields[loss]}'),
        )
        with Progress(*columns, refresh_per_second=1) as progress:
            bar = progress.add_task(self.folder.name, total=config.steps, completed=first, loss='')
            for step in range(first, config.steps):
                self._step(step)
                self.seconds = before + time.monotonic() - started
                recent = self.losses[-50:]
                progress.update(bar, completed=step + 1, loss=f'{sum(recent) / len(recent):.4f}')
                if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                    self._save()
        self.module.load_state_dict(self.average.module.state_dict())
        self.module.eval()

    def _step(self, step: int) -> None:
        torch.manual_seed(self.config.seed * 1_000_003 + step)
        for group in self.optimiser.param_groups:
            group['lr'] = learning_rate(step, self.config)
        device = torch.device(self.config.device).type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.precision == 'bfloat16'):
            loss = self.loss()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f'the loss of step {step} is {value}; lower the learning rate '
                f'({self.config.learning_rate}) or look for bad data'
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.average.update_parameters(self.module)
        self.losses.append(value)

    def _save(self) -> None:
        tensors = {f'module.{k}': v for k, v in self.module.state_dict().items()}
        tensors |= {f'average.{k}': v for k, v in self.average.state_dict().items()}
        for i, state in self.optimiser.state_dict()['state'].items():
            tensors |= {f'optimiser.{i}.{k}': v for k, v in state.items()}
        tensors['losses'] = torch.tensor(self.losses, dtype=torch.float64)
        # The average starts as a copy that may share nothing, but buffers can be views: save plain copies.
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        partial = self.folder / f'{CHECKPOINT}.part'
        metadata = {'identity': json.dumps(self.identity), 'seconds': repr(self.seconds)}
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:  # its writer's name for a full disk
            raise TrainingError(f"{partial} can't be written: {error}") from error
        os.replace(partial, self.folder / CHECKPOINT)

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        try:
            with safe_open(path, 'pt') as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise TrainingError(f'{path} is damaged ({error}); delete it to start again') from error
        found = json.loads(metadata['identity'])
        differing = [
            f'{key}: {found.get(key)} there, {self.identity.get(key)} here'
            for key in sorted(found.keys() | self.identity.keys())
            if found.get(key) != self.identity.get(key)
        ]
        if differing:
            raise TrainingError(
                f'{path} belongs to another run ({"; ".join(differing)}); use another output folder'
            )
        self.losses = tensors.pop('losses').tolist()
        self.seconds = json.loads(metadata['seconds'])
        parts: dict[str, dict[str, Tensor]] = {'module': {}, 'average': {}, 'optimiser': {}}
        for key, value in tensors.items():
            part, name = key.split('.', 1)
            parts[part][name] = value
        self.module.load_state_dict(parts['module'])
        self.average.load_state_dict(parts['average'])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in parts['optimiser'].items():
            index, name = key.split('.')
            state.setdefault(int(index), {})[name] = value
        self.optimiser.load_state_dict(
            {'state': state, 'param_groups': self.optimiser.state_dict()['param_groups']}
        )
