"""What a study found: a table, a plot, the raw outcomes, and all of it in a document."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.files import write_json, write_whole
from decoupled_policy_ros.training.evaluation import wilson_interval
from decoupled_policy_ros.training.evaluation_report import success_plot
from decoupled_policy_ros.training.study.config import StudyConfig
from decoupled_policy_ros.training.study.job_kinds import Cell
from decoupled_policy_ros.training.study.jobs import Place


@dataclass(frozen=True)
class Row:
    """All seeds of one task, backbone and recipe.

    Attributes:
        outcomes: by seed; None for a cell that is not done.
    """

    task: str
    backbone: str
    recipe: str
    outcomes: dict[int, dict[str, Any] | None]

    @property
    def done(self) -> list[dict[str, Any]]:
        return [outcome for outcome in self.outcomes.values() if outcome is not None]

    @property
    def successes(self) -> int:
        return sum(outcome['successes'] for outcome in self.done)

    @property
    def episodes(self) -> int:
        return sum(outcome['episodes'] for outcome in self.done)

    @property
    def rates(self) -> list[float]:
        """Of each seed."""
        return [outcome['successes'] / outcome['episodes'] for outcome in self.done]


def rows_of(study: StudyConfig, cells: dict[Place, Cell]) -> list[Row]:
    """The rows of a study's table, in the order of its axes."""
    return [
        Row(task, backbone, recipe, outcomes)
        for task in study.tasks
        for backbone in study.backbones
        for recipe in study.recipes
        if (
            outcomes := {
                place.seed: cell.outcome if cell.done else None
                for place, cell in cells.items()
                if (place.task, place.backbone, place.recipe) == (task, backbone, recipe)
            }
        )
    ]


def publish(study: StudyConfig, cells: dict[Place, Cell], folder: Path, document: Path | None) -> str:
    """Write a study's results, those that others wrote meanwhile among them, and its table into a document.

    Returns:
        The Markdown.

    Raises:
        ConfigError: as `read_results` and `insert_table`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / '.lock'):
        read_results(cells, folder / f'{study.name}.json')
        text = write_results(study, cells, folder)
        if document is not None:
            insert_table(document, study.name, text)
    return text


def write_results(study: StudyConfig, cells: dict[Place, Cell], folder: Path) -> str:
    """Write `folder`/NAME.json with every episode, NAME.png and NAME.md.

    Returns:
        The Markdown.
    """
    rows = rows_of(study, cells)
    raw = {
        'study': study.model_dump(mode='json', exclude_defaults=True),
        'rows': [
            {'task': row.task, 'backbone': row.backbone, 'recipe': row.recipe, 'seeds': row.outcomes}
            for row in rows
        ],
    }
    write_json(folder / f'{study.name}.json', raw, indent=None)
    text = table(study, rows)
    if done := [row for row in rows if row.done]:
        success_plot([_summary(row, study) for row in done], folder / f'{study.name}.png')
    write_whole(folder / f'{study.name}.md', text.encode())
    return text


def read_results(cells: dict[Place, Cell], path: Path) -> None:
    """Give the cells their outcomes from raw results of `write_results`, as far as there are any of the same runs.

    Raises:
        ConfigError: not such a file.
    """
    if not path.exists():
        return
    try:
        rows = json.loads(path.read_text())['rows']
        outcomes = [outcome for row in rows for outcome in row['seeds'].values() if outcome is not None]
        runs = {cell.folder.name: cell for cell in cells.values()}
        for outcome in outcomes:
            if (cell := runs.get(outcome['run'])) is not None:  # whatever its row is called now
                cell.take(outcome)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{path} holds no results of a study ({error}); move it away to start anew'
        ) from error


def table(study: StudyConfig, rows: list[Row]) -> str:
    """Markdown: a row for each task, backbone and recipe, a column for each seed, all seeds with their interval."""
    seeds = sorted({seed for row in rows for seed in row.outcomes})
    head = ['task', 'backbone', 'recipe', 'frozen or shared / task parameters', *(f'seed {s}' for s in seeds)]
    head += ['mean ± std', 'all, 95 % interval', 'torn chunks', 'last loss']
    lines = [head, ['---'] * len(head), *(_line(row, seeds) for row in rows)]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def _line(row: Row, seeds: list[int]) -> list[str]:
    def cell(seed: int) -> str:
        outcome = row.outcomes.get(seed)
        return f'{outcome["successes"]}/{outcome["episodes"]}' if outcome else '-'

    names = [row.task, row.backbone, row.recipe]
    if not row.done:
        return [*names, '-', *map(cell, seeds), '-', '-', '-', '-']
    backbone = row.done[0]['backbone_parameters']
    normal = row.done[0]['trained_parameters']
    low, high = wilson_interval(row.successes, row.episodes)
    deviation = f' ± {100 * np.std(row.rates, ddof=1):.1f}' if len(row.rates) > 1 else ''
    return [
        *names,
        f'{backbone / 1e6:.2f} M / {normal / 1e6:.2f} M',
        *map(cell, seeds),
        f'{100 * np.mean(row.rates):.1f}{deviation}',
        f'{row.successes}/{row.episodes}, {100 * low:.0f} to {100 * high:.0f} %',
        f'{np.mean([outcome["torn_chunks"] for outcome in row.done]):.1%}',
        f'{np.mean([outcome["final_loss"] for outcome in row.done]):.4f}',
    ]


def _summary(row: Row, study: StudyConfig) -> dict[str, Any]:
    """As one row of an evaluation's summary."""
    return {
        'task': row.task,
        'robot': study.tasks[row.task].robot,
        'policy': f'{row.backbone}, {row.recipe}',
        'successes': row.successes,
        'episodes': row.episodes,
        'wilson_95': wilson_interval(row.successes, row.episodes),
        'rates': row.rates,
    }


def insert_table(document: Path, name: str, text: str) -> None:
    """Put a table into a document, between `<!-- study NAME -->` and `<!-- end -->`.

    Raises:
        ConfigError: no such document, or no such place in it.
    """
    place, content = _place_in(document, name)
    write_whole(document, place.sub(lambda found: f'{found[1]}{text}{found[2]}', content).encode())


def require_place(document: Path, name: str) -> None:
    """Refuse a document that has no place for a study's table.

    Raises:
        ConfigError: see `insert_table`.
    """
    _place_in(document, name)


def _place_in(document: Path, name: str) -> tuple[re.Pattern[str], str]:
    """What finds the place of a study's table, and the document."""
    try:
        content = document.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f'{document} can not be read: {error}') from error
    inside = r'(?:(?!<!-- study ).)*?'  # no other study's place
    place = re.compile(rf'(<!-- study {re.escape(name)} -->\n){inside}(<!-- end -->)', re.DOTALL)
    if not place.search(content):
        raise ConfigError(
            f'{document} has no lines `<!-- study {name} -->` and `<!-- end -->` to put a table between'
        )
    return place, content
