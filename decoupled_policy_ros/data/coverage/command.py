"""`decoupled-policy coverage`: measure, print a table, leave coverage.json and pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from decoupled_policy_ros.data.coverage.coverage import Coverage, CoverageSettings, measure
from decoupled_policy_ros.data.coverage.report import Row, summary_rows, task_rows, write_report
from decoupled_policy_ros.data.coverage.task import TaskNeeds, compare_task
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.robot.description import RobotDescription

REPORT = 'coverage.json'


def run_coverage(
    paths: Sequence[Path],
    robot: RobotDescription,
    out: Path,
    task: Path | None = None,
    settings: CoverageSettings | None = None,
    pictures: bool = True,
    **options: Any,
) -> Coverage:
    """Measure `paths`, and the task beside them; print it all and write it into `out`.

    Args:
        paths: Stage 1 sources.
        robot: the arm that they are about.
        out: folder for coverage.json and the pictures; made if it is missing.
        task: demonstrations of a task to compare with.
        settings: how finely to look.
        pictures: draw them; needs matplotlib.
        options: for datasets among `paths`, see `open_source`; the task is taken whole.

    Raises:
        DatasetError: `out` can't be made; and as `measure`.
        FingerprintMismatch, ConfigError: see `measure`.
    """
    if pictures:  # before the work, in case that there is no matplotlib
        from decoupled_policy_ros.data.coverage.pictures import draw
    console = Console()
    place = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):  # before the work too
        raise DatasetError(f'{out} can not be made: {place} is no folder that can be written to')
    with _progress(console) as count:
        coverage = measure(paths, robot, settings, count, **options)
        needs = compare_task(task, coverage, count) if task is not None else None
    _print(console, coverage, needs, [str(path) for path in paths], str(task))
    out.mkdir(parents=True, exist_ok=True)
    write_report(out / REPORT, coverage, needs)
    written = [REPORT]
    if pictures:
        written += [path.name for path in draw(out, coverage, needs)]
    console.print(f'{escape(str(out))}: {", ".join(written)}', highlight=False, soft_wrap=True)
    return coverage


@contextmanager
def _progress(console: Console) -> Iterator:
    columns = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task('frames', total=None)
        yield lambda frames: progress.advance(bar, frames)


def _print(
    console: Console, coverage: Coverage, needs: TaskNeeds | None, paths: list[str], task: str
) -> None:
    console.print(_table(f'coverage of {", ".join(paths)}', summary_rows(coverage)))
    if needs is not None:
        console.print(_table(f'what {task} needs of it', task_rows(needs)))
        colour = 'yellow' if needs.outside_any else 'green'
        console.print(f'[{colour}]{needs.verdict()}[/]', highlight=False, soft_wrap=True)


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=escape(title), show_header=False, title_justify='left')
    table.add_column(style='bold', no_wrap=True)
    table.add_column(justify='right')
    table.add_column(style='dim')
    for row in rows:
        table.add_row(*map(escape, row))
    return table
