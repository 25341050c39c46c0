"""Stack from low-dimensional state: normal, decoupled and random-frozen training, three seeds, one table.

    python bench/stack_evidence.py --out out/evidence            (make evidence)

Trains and evaluates every cell that is not there yet, so that it can be interrupted and run again, and
writes docs/evidence/stack_state.json and the table in docs/evidence/stack_state.md.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro

from decoupled_policy_ros.training.config import Stage2Config, load_config
from decoupled_policy_ros.training.evaluation import Evaluation, evaluate, wilson_interval
from decoupled_policy_ros.training.stage2 import train_task

ROOT = Path(__file__).resolve().parent.parent
RECIPES: dict[str, dict[str, object]] = {
    'normal': {'backbone': None},
    'decoupled': {},
    'random-frozen': {'backbone': None, 'random_backbone': True},
}
SEEDS = (0, 42, 420)


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        out: folder for the runs.
        episodes: rollouts a cell.
        threads: CPU threads of training.
        workers: processes of evaluation.
        recipes: which of normal, decoupled, random-frozen.
        seeds: training seeds.
    """

    out: Path = Path('out/evidence')
    episodes: int = 50
    threads: int | None = None
    workers: int | None = None
    recipes: tuple[str, ...] = tuple(RECIPES)
    seeds: tuple[int, ...] = SEEDS


def run_cell(recipe: str, seed: int, arguments: Arguments) -> dict:
    """Train and evaluate one cell, unless its report is there."""
    folder = arguments.out / f'{recipe}_{seed}'
    report_path = folder / 'evaluation.json'
    if not report_path.exists():
        overrides = {**RECIPES[recipe], 'optimisation.seed': seed, 'optimisation.threads': arguments.threads}
        config = load_config(ROOT / 'config/training/stack_state.yaml', Stage2Config, overrides)
        if not (folder / 'task.json').exists():
            train_task(config, folder, normal=recipe == 'normal')
        backbone = folder / 'backbone'
        spec = Evaluation(str(folder), 'stack', str(backbone if backbone.is_dir() else config.backbone))
        # The same scenes for every cell, whatever its training seed.
        evaluate(spec, arguments.episodes, 0, arguments.workers, report_path)
    report = json.loads(report_path.read_text())
    run = json.loads((folder / 'run.json').read_text())
    return {
        'recipe': recipe,
        'seed': seed,
        'successes': report['successes'],
        'episodes': report['episodes'],
        'wilson_95': report['wilson_95'],
        'trained_parameters': run['trained_parameters'],
        'training_seconds': run['seconds'],
        'final_loss': statistics.mean(run['losses'][-100:]),
        'backbone_sha256': run['backbone_sha256'],
        'results': report['results'],
    }


def table(cells: list[dict]) -> str:
    """Markdown table: a row per recipe, a column per seed, pooled rate with its interval."""
    seeds = sorted({cell['seed'] for cell in cells})
    head = [
        'recipe',
        'trained parameters',
        *[f'seed {seed}' for seed in seeds],
        'all',
        '95 % interval (Wilson)',
    ]
    rows = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    for recipe in RECIPES:
        mine = {cell['seed']: cell for cell in cells if cell['recipe'] == recipe}
        if not mine:
            continue
        successes, trials = (
            sum(c['successes'] for c in mine.values()),
            sum(c['episodes'] for c in mine.values()),
        )
        low, high = wilson_interval(successes, trials)
        each = [f'{mine[s]["successes"]} / {mine[s]["episodes"]}' if s in mine else '-' for s in seeds]
        parameters = next(iter(mine.values()))['trained_parameters']
        rows.append(
            '| '
            + ' | '.join(
                [recipe, f'{parameters:,}', *each, f'{successes / trials:.0%}', f'{low:.0%} to {high:.0%}']
            )
            + ' |'
        )
    return '\n'.join(rows) + '\n'


def main(arguments: Arguments) -> None:
    """Run all cells, seed by seed, and write the table after each."""
    docs, cells = ROOT / 'docs' / 'evidence', []
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            cells.append(run_cell(recipe, seed, arguments))
            docs.mkdir(parents=True, exist_ok=True)
            (docs / 'stack_state.json').write_text(json.dumps(cells, indent=1) + '\n')
            (docs / 'stack_state.md').write_text(table(cells))
    print(table(cells))


if __name__ == '__main__':
    main(tyro.cli(Arguments))
