"""The training loop that all stages share: AdamW, EMA, checkpoints, exact resume, validation.

Step s seeds the random generator with (seed, s, d) and draws everything from it: batch, noise, diffusion steps,
crops, dropout. So a run that was killed and resumed has the same losses as one that was not. d counts the draws of
one update, over its accumulated batches and over the processes: two processes compute what one computes that
accumulates two batches.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from decoupled_policy_ros.errors import TrainingError
from decoupled_policy_ros.files import replace_whole
from decoupled_policy_ros.policy.device import multiplies_bfloat16, name_of
from decoupled_policy_ros.training.config import Optimisation
from decoupled_policy_ros.training.processes import accelerator_for, finish_trackers, start_trackers
from decoupled_policy_ros.training.validation import Validator

CHECKPOINT = 'checkpoint.safetensors'
DRAWS_APART = 2_654_435_761  # of 2^32, all that a CPU's generator takes of a seed


def ema_decay(updates: int, power: float, maximum: float) -> float:
    """EMA decay after so many updates: 1 - (1 + n)^-power, at most `maximum`; 0 at the start."""
    return min(maximum, 1 - (1 + updates) ** -power)


def learning_rate(step: int, config: Optimisation) -> float:
    """Linear warm-up, then a cosine down to zero at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def final_loss(losses: Sequence[float]) -> float | None:
    """Mean of the last hundred; None before the first."""
    last = losses[-100:]
    return round(sum(last) / len(last), 6) if last else None


def _groups(
    parameters: list[nn.Parameter], encoder: nn.Module | None, config: Optimisation
) -> list[dict[str, Any]]:
    """What AdamW treats alike: everything, or the encoder and the rest."""
    if encoder is None or config.encoder_weight_decay is None:
        return [{'params': parameters}]
    encoding = [p for p in encoder.parameters() if p.requires_grad]
    theirs = {id(p) for p in encoding}
    rest = [p for p in parameters if id(p) not in theirs]
    return [{'params': rest}, {'params': encoding, 'weight_decay': config.encoder_weight_decay}]


class Objective(nn.Module):
    """A module and its loss as one module whose forward pass is the loss: accelerate can spread that over processes."""

    def __init__(self, module: nn.Module, loss: Callable[[], Tensor], config: Optimisation):
        super().__init__()
        self.module, self.loss = module, loss
        device = torch.device(config.device)
        self.device_type = device.type
        self.autocast = config.precision == 'bfloat16' and multiplies_bfloat16(device)

    def forward(self) -> Tensor:
        """The loss of a fresh random batch."""
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast):
            return self.loss()


class Trainer:
    """Trains `module` on `loss`, and leaves it with its EMA weights.

    Args:
        module: everything that learns, and nothing else: a frozen backbone is not part of it.
        loss: computes a scalar for a fresh random batch; called once a step, or `accumulate` times.
        folder: where the checkpoint is kept; a checkpoint found there is resumed. All processes have to see it.
        identity: settings that a checkpoint must have been made with, so that no other run is resumed.
        encoder: the part of the module that may have a weight decay of its own.

    Attributes:
        validator: scores the EMA weights on the first process, where one is set.
        is_main: whether this is the first process, the only one that writes files.
        batch_size: of an update, over all processes.
        computed_in: device and precision of all that trained: the same settings give other numbers in another one.
        scores: (step, score) of each validation.

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
        encoder: nn.Module | None = None,
    ):
        self.module, self.loss, self.config, self.folder = module, loss, config, folder
        self.validator: Validator | None = None
        self.accelerator = accelerator_for(config, folder)
        self.is_main: bool = self.accelerator.is_main_process
        draws = config.accumulate * self.accelerator.num_processes
        self.batch_size = config.batch_size * draws
        # Together these are what an update is computed from, so that their product is what resuming needs.
        self.identity = identity | ({'accumulate': str(draws)} if draws > 1 else {})
        objective = Objective(module, loss, config)
        self.autocast = objective.autocast
        self.objective = self.accelerator.prepare_model(objective)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            _groups(self.parameters, encoder, config),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,  # the update itself then takes a fifth of the time on a CPU
        )
        self.average = AveragedModel(module, multi_avg_fn=self._average)
        self.losses: list[float] = []
        self.computed_in: list[str] = []
        self.scores: list[tuple[int, float]] = []
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
        if self.validator is not None and self.is_main:
            self.validator.prepare()
        self.module.train()
        start_trackers(self.accelerator, self.identity, self.folder)
        config, first = self.config, len(self.losses)
        precision = 'bfloat16' if self.autocast else 'float32'
        here = f'{name_of(torch.device(config.device))}, {precision}'
        if first < config.steps and here not in self.computed_in:
            self.computed_in.append(here)
        started, before = time.monotonic(), self.seconds
        columns = (
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn('loss {task.fields[loss]}'),
        )
        try:
            with Progress(*columns, refresh_per_second=1, disable=not self.is_main) as progress:
                bar = progress.add_task(self.folder.name, total=config.steps, completed=first, loss='')
                for step in range(first, config.steps):
                    self._step(step)
                    if self.validator is not None and (step + 1) % self.validator.every == 0:
                        self._validate(step + 1, self.validator)
                    self.seconds = before + time.monotonic() - started
                    recent = self.losses[-50:]
                    progress.update(bar, completed=step + 1, loss=f'{sum(recent) / len(recent):.4f}')
                    if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                        self._save()
        finally:
            finish_trackers(self.accelerator)
            if self.validator is not None:
                self.validator.close()
        self.module.load_state_dict(self.average.module.state_dict())
        self.module.eval()

    def _step(self, step: int) -> None:
        config, accelerator = self.config, self.accelerator
        for group in self.optimiser.param_groups:
            group['lr'] = learning_rate(step, config)
        self.optimiser.zero_grad(set_to_none=True)
        value = self._gradients(step)
        if not math.isfinite(value):
            raise TrainingError(
                f'the loss of step {step} is {value}; lower the learning rate '
                f'({config.learning_rate}) or look for bad data'
            )
        if config.clip is not None:
            accelerator.clip_grad_norm_(self.parameters, config.clip)
        self.optimiser.step()
        self.average.update_parameters(self.module)
        self.losses.append(value)
        if accelerator.trackers:
            accelerator.log({'loss': value, 'learning_rate': learning_rate(step, config)}, step=step + 1)

    def _gradients(self, step: int) -> float:
        """Accumulate the gradients of a step; its loss, over all processes."""
        config, accelerator = self.config, self.accelerator
        losses = []
        for batch in range(config.accumulate):
            draw = batch * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(config.seed * 1_000_003 + step + draw * DRAWS_APART)
            last = batch + 1 == config.accumulate  # with which the gradients of all processes come together
            with nullcontext() if last else accelerator.no_sync(self.objective):
                loss = self.objective()
                accelerator.backward(loss / config.accumulate)
            losses.append(loss.detach())
        return float(accelerator.reduce(torch.stack(losses).mean(), 'mean'))

    def _validate(self, step: int, validator: Validator) -> None:
        """Score the EMA weights, keep them if they are the best so far, and go on with the others."""
        if self.is_main:
            current = {name: value.clone() for name, value in self.module.state_dict().items()}
            self.module.load_state_dict(self.average.module.state_dict())
            self.module.eval()
            score = validator.score()
            if validator.is_best(score, [earlier for _, earlier in self.scores]):
                validator.keep(step, score)
            self.module.load_state_dict(current)
            self.module.train()
            self.scores.append((step, score))
            self.accelerator.log({'score': score}, step=step)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        if not self.is_main:
            return
        tensors = {f'module.{k}': v for k, v in self.module.state_dict().items()}
        tensors |= {f'average.{k}': v for k, v in self.average.state_dict().items()}
        for i, state in self.optimiser.state_dict()['state'].items():
            tensors |= {f'optimiser.{i}.{k}': v for k, v in state.items()}
        tensors['losses'] = torch.tensor(self.losses, dtype=torch.float64)
        # The average starts as a copy that may share nothing, but buffers can be views: save plain copies.
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        partial = self.folder / f'{CHECKPOINT}.part'
        metadata = {
            'identity': json.dumps(self.identity),
            'seconds': repr(self.seconds),
            'scores': json.dumps(self.scores),
            'computed_in': json.dumps(self.computed_in),
        }
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:  # its writer's name for a full disk
            raise TrainingError(f"{partial} can't be written: {error}") from error
        replace_whole(partial, self.folder / CHECKPOINT)

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        try:
            with safe_open(path, 'pt') as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise TrainingError(f'{path} is damaged ({error}); delete it to start again') from error
        self._require_same_run(path, json.loads(metadata['identity']))
        self.losses = tensors.pop('losses').tolist()
        self.seconds = json.loads(metadata['seconds'])
        self.computed_in = json.loads(metadata.get('computed_in', '[]'))
        self.scores = [(step, score) for step, score in json.loads(metadata.get('scores', '[]'))]
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

    def _require_same_run(self, path: Path, found: dict[str, str]) -> None:
        # Older checkpoints don't know their data, or not all of it.
        unknown = {'data_sha256', 'episodes_sha256'} - found.keys()
        here = {key: value for key, value in self.identity.items() if key not in unknown}
        differing = [
            f'{key}: {found.get(key)} there, {here.get(key)} here'
            for key in sorted(found.keys() | here.keys())
            if found.get(key) != here.get(key)
        ]
        if differing:
            raise TrainingError(
                f'{path} belongs to another run ({"; ".join(differing)}); use another output folder'
            )
