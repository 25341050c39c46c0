"""Two equally good ways around an obstacle: which backbones decide for one, and which tear the chunk.

    python bench/two_ways.py --out out/two_ways

Every demonstration carries the hand of the Panda past a post, on its left or on its right, each half of the
time. The policy sees start, goal and post, and nothing that tells which way. A chunk is good when all of it keeps
clear of the post, ends at the goal, and has no jump. The average of the two ways hits the post, and a chunk whose
waypoints decide one by one jumps.

`normal` trains backbone and conditioning together. `decoupled` first trains the backbone in Stage 1 on synthetic
minimum-jerk motion of the Panda, in which there is no post, and freezes it. Each cell is kept in its own folder,
so that the script can be interrupted and run again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from decoupled_policy_ros.policy import Backbone, load_backbone
from decoupled_policy_ros.policy.backbones import BACKBONES
from decoupled_policy_ros.policy.conditioning import Conditioning, conditioning_for
from decoupled_policy_ros.policy.encoders import VectorEncoder
from decoupled_policy_ros.policy.sampling import Sampler
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.training.config import Optimisation, Stage1Config
from decoupled_policy_ros.training.loop import Trainer
from decoupled_policy_ros.training.network import ConditioningConfig, new_backbone
from decoupled_policy_ros.training.runs import diffusion_loss
from decoupled_policy_ros.training.stage1 import train_stage1

HORIZON, CLEARANCE_M, GOAL_TOLERANCE_M = 16, 0.05, 0.02
# Twice the longest step of any demonstration is a jump.
JUMP_M = 0.12
RECIPES = ('normal', 'decoupled')


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        out: folder for the cells.
        backbones: kind, or kind/mechanism.
        recipes: of normal and decoupled.
        seeds: of training; the scenes in which a policy is tried are the same for all.
        size: sizes that all these backbones share, as JSON, e.g. '{"width": 128, "hidden": 512}'.
        stage1_steps, steps: length of training.
        batch_size: of both.
        learning_rate: of both.
        precision: float32, or bfloat16 where the processor has it.
        trials: chunks that each policy is tried with.
        denoising_steps: of each chunk.
        threads: CPU threads.
    """

    out: Path = Path('out/two_ways')
    backbones: tuple[str, ...] = ('dp_mlp', 'dp_mixer')
    recipes: tuple[str, ...] = RECIPES
    seeds: tuple[int, ...] = (0, 42, 420)
    size: str = '{}'
    stage1_steps: int = 3000
    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 3e-4
    precision: str = 'float32'
    trials: int = 500
    denoising_steps: int = 10
    threads: int = 1


def demonstrations(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Observations (count, 6) of start, goal and post in the plane (m), and chunks (count, 16, 10)."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    start = torch.stack([uniform(0.35, 0.40), uniform(-0.05, 0.05)], -1)
    goal = torch.stack([uniform(0.58, 0.63), uniform(-0.05, 0.05)], -1)
    share = uniform(0.4, 0.6)
    post = torch.lerp(start, goal, share[:, None]) + torch.stack([uniform(0, 0), uniform(-0.02, 0.02)], -1)
    side = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    s = torch.linspace(0, 1, HORIZON)
    smooth = s**3 * (10 - 15 * s + 6 * s**2)  # minimum jerk
    path = start[:, None] + smooth[:, None] * (goal - start)[:, None]
    # A bump that is as high over the post as the clearance and the post's own offset ask for.
    on_line = torch.lerp(start, goal, share[:, None])
    height = side * (CLEARANCE_M + uniform(0.025, 0.045)) + (post - on_line)[:, 1]
    bump = torch.exp(-(((path[..., 0] - post[:, None, 0]) / 0.09) ** 2))
    ends = torch.sin(torch.pi * smooth).clamp(min=0)  # brings the bump to nothing at both ends
    path[..., 1] += height[:, None] * bump * ends**0.5
    actions = torch.zeros(count, HORIZON, 10)
    actions[..., :2], actions[..., 2] = path, 0.2
    actions[..., 3], actions[..., 7], actions[..., 9] = 1.0, -1.0, 1.0  # pointing down, closed
    return torch.cat([start, goal, post], -1), actions


def outcomes(observations: Tensor, actions: Tensor) -> dict[str, float]:
    """Shares of chunks that are good, that hit the post, miss the goal or jump, and that go on the left."""
    path, goal, post = actions[..., :2], observations[:, 2:4], observations[:, 4:]
    # Between waypoints too: eight places on each segment.
    share = torch.linspace(0, 1, 9)[:-1, None, None, None]
    along = (path[:, :-1] + share * (path[:, 1:] - path[:, :-1])).transpose(0, 1).flatten(1, 2)
    hit = ((along - post[:, None]).norm(dim=-1) < CLEARANCE_M).any(1)
    missed = (path[:, -1] - goal).norm(dim=-1) > GOAL_TOLERANCE_M
    jump = ((path[:, 1:] - path[:, :-1]).norm(dim=-1) > JUMP_M).any(1)
    nearest = (path[..., 0] - post[:, None, 0]).abs().argmin(1)
    left = path[torch.arange(len(path)), nearest, 1] > post[:, 1]
    shares = {'good': ~(hit | missed | jump), 'hit': hit, 'missed': missed, 'jump': jump, 'left': left}
    return {name: float(share.float().mean()) for name, share in shares.items()}


def optimisation(arguments: Arguments, steps: int, seed: int) -> Optimisation:
    return Optimisation.model_validate(
        {
            'steps': steps,
            'batch_size': arguments.batch_size,
            'learning_rate': arguments.learning_rate,
            'warmup_steps': min(200, steps // 10),
            'precision': arguments.precision,
            'checkpoint_every': 500,
            'seed': seed,
            'threads': arguments.threads,
        }
    )


def starting_backbone(kind: str, recipe: str, seed: int, arguments: Arguments, folder: Path) -> Backbone:
    """An untrained backbone, or one that Stage 1 made of synthetic motion and that is frozen."""
    kind, _, mechanism = kind.partition('/')
    sizes = json.loads(arguments.size) | {'kind': kind}
    conditioning = {'kind': mechanism or BACKBONES[kind].mechanisms[0]}
    robot = load_robot('panda_sim')
    stage1 = Stage1Config.model_validate(
        {
            'name': f'{kind}_two_ways',
            'robot': robot.name,
            'sources': [{'synthetic': 400}],
            'backbone': sizes,
            'conditioning': conditioning,
            'optimisation': optimisation(arguments, arguments.stage1_steps, seed),
        }
    )
    if recipe == 'normal':
        torch.manual_seed(seed)
        fingerprint = Fingerprint.of(robot, stage1.rate_hz)
        chosen = ConditioningConfig.model_validate(conditioning)
        backbone = new_backbone(stage1.backbone, chosen, stage1.objective, fingerprint, stage1.name)
        backbone.normaliser.fit(demonstrations(4096, torch.Generator().manual_seed(0))[1])
        return backbone
    if not (folder / 'backbone.json').is_file():
        train_stage1(stage1, folder)
    return load_backbone(folder)


@torch.inference_mode()
def tried(backbone: Backbone, encoder: nn.Module, conditioning: Conditioning, arguments: Arguments) -> dict:
    """Outcomes of chunks in scenes that no demonstration showed."""
    observations, _ = demonstrations(arguments.trials, torch.Generator().manual_seed(10**6))
    features, denoiser = encoder(observations), backbone.denoiser
    sampler = Sampler(backbone.schedule, arguments.denoising_steps)

    def predict(i: int, x: Tensor) -> Tensor:
        k = torch.full((len(x),), sampler.ks[i])
        return denoiser(x, conditioning(denoiser.tau(k), features))

    noise = torch.randn(len(observations), HORIZON, 10, generator=torch.Generator().manual_seed(7))
    return outcomes(observations, backbone.normaliser.inverse(sampler.run(predict, noise)))


def run_cell(kind: str, recipe: str, seed: int, arguments: Arguments) -> dict:
    """Train and try one cell, unless its result is there."""
    name = kind.replace('/', '_')
    folder = arguments.out / f'{name}_{recipe}_{seed}'
    result_path = folder / 'result.json'
    if result_path.is_file():
        return json.loads(result_path.read_text())
    backbone = starting_backbone(kind, recipe, seed, arguments, arguments.out / f'{name}_stage1_{seed}')
    torch.manual_seed(seed)
    encoder = VectorEncoder(6)
    encoder.normaliser.fit(demonstrations(4096, torch.Generator().manual_seed(0))[0])
    conditioning = conditioning_for(backbone.denoiser, 1, 6)
    learning = nn.ModuleDict({'encoder': encoder, 'conditioning': conditioning})
    if recipe == 'normal':
        learning['backbone'] = backbone

    def loss() -> Tensor:
        seeds = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        observations, actions = demonstrations(arguments.batch_size, seeds)
        return diffusion_loss(backbone, conditioning, actions, encoder(observations))

    settings = {key: str(value) for key, value in asdict(arguments).items() if key not in ('out', 'trials')}
    trainer = Trainer(learning, loss, optimisation(arguments, arguments.steps, seed), folder, settings)
    trainer.run()
    backbone.eval()
    result = {
        'backbone': kind,
        'recipe': recipe,
        'seed': seed,
        'frozen_parameters': sum(p.numel() for p in backbone.parameters()),
        'seconds': trainer.seconds,
        'final_loss': sum(trainer.losses[-100:]) / len(trainer.losses[-100:]),
        **tried(backbone, encoder, conditioning, arguments),
    }
    result_path.write_text(json.dumps(result, indent=1) + '\n')
    return result


def main(arguments: Arguments) -> None:
    """Run all cells, seed by seed, and print the table after each."""
    torch.set_num_threads(arguments.threads)
    reference = outcomes(*demonstrations(2000, torch.Generator().manual_seed(1)))
    cells: list[dict] = []
    for seed in arguments.seeds:
        for kind in arguments.backbones:
            for recipe in arguments.recipes:
                cells.append(run_cell(kind, recipe, seed, arguments))
    columns = ('good', 'hit', 'missed', 'jump', 'left')
    table = Table(title=f'shares of {arguments.trials} chunks')
    for column in ('backbone', 'recipe', 'seed', *columns, 'loss', 'minutes'):
        table.add_column(column, justify='right')
    table.add_row('demonstrations', '', '', *[f'{reference[c]:.2f}' for c in columns], '', '')
    for cell in cells:
        shares = [f'{cell[c]:.2f}' for c in columns]
        rest = [f'{cell["final_loss"]:.4f}', f'{cell["seconds"] / 60:.1f}']
        table.add_row(cell['backbone'], cell['recipe'], str(cell['seed']), *shares, *rest)
    Console(width=120).print(table)
    (arguments.out / 'two_ways.json').write_text(
        json.dumps({'demonstrations': reference, 'cells': cells}, indent=1) + '\n'
    )


if __name__ == '__main__':
    main(tyro.cli(Arguments))
