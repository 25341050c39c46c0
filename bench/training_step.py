"""One training step beside the paper's public code: the same batch, sizes, precision and threads, in one run.

    python bench/training_step.py --theirs path/to/DecoupledActionExpert --json docs/bench/training_step.json

`--theirs` is a checkout of https://github.com/jianzhou0420/DecoupledActionExpert, whose policies need einops,
torchvision and diffusers; without it our own rows are measured alone. Their step is what their trainer does: loss,
gradients, AdamW, EMA. Ours is `Trainer._step`. Both take turns, and each is compared with the other of the same
round. Seconds are those of the processor, so that what else runs on the machine counts for little. Theirs gets its
pictures cropped and as floats, as its data loader's workers leave them; ours crops and converts within the step.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.policy import Backbone
from decoupled_policy_ros.policy.backbones import BACKBONES, DPCSize, DPMLPSize
from decoupled_policy_ros.policy.policy import Task
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.training.config import Optimisation
from decoupled_policy_ros.training.loop import Trainer
from decoupled_policy_ros.training.runs import diffusion_loss

CAMERAS, SIDE, CROP, STEPS, HORIZON = ('agentview', 'wrist'), 84, 76, 2, 16
PROPRIOCEPTION, OBJECTS = 9, 23
Step = Callable[[], None]


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        theirs: their checkout; None to measure ours alone.
        rows: recipe/backbone/observations/precision of each row.
        widths: of DP-C; MimicGen's are 512 1024 2048, and need 5 GB on either side.
        batch_size: of a step.
        rounds: measured steps of each side, after a first.
        threads: CPU threads.
        json: write the figures here.
    """

    theirs: Path | None = None
    rows: tuple[str, ...] = (
        'decoupled/dp_mlp/state/bfloat16',
        'decoupled/dp_mlp/state/float32',
        'normal/dp_mlp/state/bfloat16',
        'normal/dp_mlp/state/float32',
        'normal/dp_c/state/bfloat16',
        'decoupled/dp_mlp/images/bfloat16',
    )
    widths: tuple[int, ...] = (256, 512, 1024)
    batch_size: int = 64
    rounds: int = 9
    threads: int = 1
    json: Path | None = None


@dataclass(frozen=True)
class Batch:
    """What both sides learn from: pictures (B, 2, 84, 84, 3) uint8, vectors (B, 2, n), actions (B, 16, 10)."""

    pictures: dict[str, Tensor]
    vectors: dict[str, Tensor]
    actions: Tensor

    @classmethod
    def random(cls, size: int, images: bool) -> Batch:
        shape = (size, STEPS, SIDE, SIDE, 3)
        pictures = {c: torch.randint(0, 256, shape, dtype=torch.uint8) for c in CAMERAS} if images else {}
        vectors = {'proprioception': torch.rand(size, STEPS, PROPRIOCEPTION)}
        if not images:
            vectors['object_state'] = torch.rand(size, STEPS, OBJECTS)
        return cls(pictures, vectors, torch.rand(size, HORIZON, 10) * 2 - 1)


def our_step(arguments: Arguments, kind: str, batch: Batch, frozen: bool, precision: str) -> tuple[Step, int]:
    """Our step, and how many parameters it trains."""
    size = DPCSize(widths=arguments.widths) if kind == 'dp_c' else DPMLPSize()
    backbone = Backbone(BACKBONES[kind](size), Fingerprint.of(load_robot('panda_sim'), 20.0))
    streams = [StreamSpec(name, 'image', (SIDE, SIDE, 3), 0.2) for name in batch.pictures]
    streams += [StreamSpec(name, 'vector', tuple(v.shape[2:]), 0.2) for name, v in batch.vectors.items()]
    task = Task(ObservationContract(20.0, STEPS, tuple(streams), 0.1), backbone, {'crop': CROP})
    module: nn.Module = task if frozen else nn.ModuleDict({'task': task, 'backbone': backbone})
    if frozen:
        backbone.freeze()
    observation = {**batch.pictures, **batch.vectors}

    def loss() -> Tensor:
        return diffusion_loss(backbone, task.conditioning, batch.actions, task.encoder(observation))

    options = Optimisation(steps=10**6, warmup_steps=1, precision=precision, threads=arguments.threads)
    trainer = Trainer(module, loss, options, Path(tempfile.mkdtemp()), {})
    module.train()
    numbers = iter(range(10**6))
    return lambda: trainer._step(next(numbers)), sum(p.numel() for p in trainer.parameters)


def their_step(
    arguments: Arguments, kind: str, batch: Batch, frozen: bool, precision: str
) -> tuple[Step, int]:
    """Their step, and how many parameters it trains; settings are those of their configurations."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from vlaworkspace.model.DecoupledActionHead.diffusion.ema_model import EMAModel

    noise = DDPMScheduler(100, beta_schedule='squaredcos_cap_v2', prediction_type='epsilon')
    shapes = {name: {'shape': [3, SIDE, SIDE], 'type': 'rgb'} for name in batch.pictures}
    shapes |= {name: {'shape': [v.shape[-1]], 'type': 'low_dim'} for name, v in batch.vectors.items()}
    common = {
        'shape_meta': {'obs': shapes, 'action': {'shape': [10]}},
        'noise_scheduler': noise,
        'horizon': HORIZON,
        'n_action_steps': 8,
        'n_obs_steps': STEPS,
        'crop_shape': (CROP, CROP),
        'obs_encoder_group_norm': True,
    }
    with redirect_stdout(StringIO()):
        if kind == 'dp_c':
            from vlaworkspace.policy.dah_dp_c import DiffusionUnetHybridImagePolicy

            widths = list(arguments.widths)
            policy = DiffusionUnetHybridImagePolicy(**common, diffusion_step_embed_dim=128, down_dims=widths)
        else:
            from vlaworkspace.policy.dah_dp_mlp import DiffusionMLPHybridImagePolicy

            sizes = {'n_layer': 8, 'n_emb': 256, 'p_drop_attn': 0.1, 'parallel_input_emb': True}
            policy = DiffusionMLPHybridImagePolicy(**common, **sizes)
    if frozen:  # all whose shapes don't depend on the observation
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad_('cond_encoder' in name)
    policy.train()
    average = EMAModel(deepcopy(policy), power=0.75)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=1e-3, betas=(0.95, 0.999))
    schedule = policy.get_scheduler(optimiser, 10**6)
    corner = (SIDE - CROP) // 2
    area = slice(corner, corner + CROP)
    pictures = {
        c: v[:, :, area, area].permute(0, 1, 4, 2, 3).float() / 127.5 - 1 for c, v in batch.pictures.items()
    }
    given = {
        'obs': {**{c: v.contiguous() for c, v in pictures.items()}, **batch.vectors},
        'action': batch.actions,
    }

    def step() -> None:
        with (
            torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'),
            redirect_stdout(StringIO()),
        ):
            loss = policy.compute_loss(given)
        loss.detach().item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        average.step(policy)

    return step, sum(p.numel() for p in policy.parameters() if p.requires_grad)


def measure(arguments: Arguments, row: str) -> dict:
    """Seconds of a step of either side, and their ratio."""
    recipe, kind, observations, precision = row.split('/')
    torch.manual_seed(0)
    batch = Batch.random(arguments.batch_size, observations == 'images')
    sides = {'ours': our_step} | ({'theirs': their_step} if arguments.theirs else {})
    made = {
        name: side(arguments, kind, batch, recipe == 'decoupled', precision) for name, side in sides.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(arguments.rounds + 1):
        for name, (step, _) in made.items():
            start = time.process_time()
            step()
            if number:
                seconds[name].append(time.process_time() - start)
    result: dict = {'row': row, 'trained_parameters': {name: count for name, (_, count) in made.items()}}
    result['processor_s'] = {name: statistics.median(values) for name, values in seconds.items()}
    if arguments.theirs:
        ratios = sorted(b / a for a, b in zip(seconds['ours'], seconds['theirs'], strict=True))
        result['theirs_to_ours'] = {'median': statistics.median(ratios), 'range': [ratios[0], ratios[-1]]}
    return result


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    if arguments.theirs is not None:
        sys.path.insert(0, str(arguments.theirs.resolve() / 'src'))
    torch.set_num_threads(arguments.threads)
    table = Table(title=f'a training step, batch {arguments.batch_size}, {arguments.threads} thread(s)')
    table.add_column('recipe / backbone / observations / precision')
    for column in ('ours ms', 'theirs ms', 'theirs / ours', 'range'):
        table.add_column(column, justify='right')
    rows = [measure(arguments, row) for row in arguments.rows]
    for row in rows:
        cells = [f'{1e3 * row["processor_s"][side]:.0f}' for side in row['processor_s']]
        if arguments.theirs:
            low, high = row['theirs_to_ours']['range']
            cells += [f'{row["theirs_to_ours"]["median"]:.2f}', f'{low:.2f} to {high:.2f}']
        table.add_row(row['row'], *cells)
    Console(width=120).print(table)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            'batch_size': arguments.batch_size,
            'rounds': arguments.rounds,
            'threads': arguments.threads,
            'widths_of_dp_c': arguments.widths,
            'torch': torch.__version__,
            'machine': platform.machine(),
            'rows': rows,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main(tyro.cli(Arguments))
