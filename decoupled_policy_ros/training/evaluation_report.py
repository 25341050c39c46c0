"""What an evaluation found, for people: tables, plots, films of episodes, as Markdown and as one HTML file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from decoupled_policy_ros.files import write_json, write_whole
from decoupled_policy_ros.policy.checkpoint import find_model
from decoupled_policy_ros.training.report import smoothed

Report = Mapping[str, Any]

VIDEOS = 'videos'
TOGETHER = (
    'All policies of a task together, which is right where they differ in their training seed alone, and all tasks of '
    'a benchmark:'
)
COLUMNS = 3
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 68em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .3em .8em; border-bottom: 1px solid #ddd; }
th { text-align: left; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } .films { display: flex; flex-wrap: wrap; gap: 1em; } figure { margin: 0; }
video { width: 320px; border: 4px solid #c83c32; display: block; } .success video { border-color: #3caa50; }
"""


def success_table(rows: Iterable[Report]) -> str:
    """Markdown table of success, one line for each row.

    Args:
        rows: reports of `evaluation.evaluate_all` (one policy in one task), or its summary (several policies in one
            task). Each has task, robot, successes, episodes and wilson_95; policy or policies, mean and deviation
            of their rates, mean_steps_of_successes and torn_chunks are shown where any row has them.
    """
    return _markdown(*_success_cells(list(rows)))


def success_plot(rows: Iterable[Report], path: Path) -> None:
    """Success rates with their Wilson intervals, one panel for each task, a dot for each of several policies.

    Args:
        rows: as for `success_table`.
        path: of the picture; its ending says of what kind.
    """
    rows = list(rows)

    def draw(axes: Axes, mine: list[Report]) -> None:
        for place, row in enumerate(mine):
            low, high = row['wilson_95']
            rate = 100 * row['successes'] / row['episodes']
            axes.barh(place, rate, color='C0', alpha=0.5)
            axes.plot([100 * low, 100 * high], [place, place], color='k')
            axes.plot([100 * r for r in row.get('rates', [])], [place] * len(row.get('rates', [])), 'C1.')
        axes.set_yticks(range(len(mine)), [_label(row, rows) for row in mine])
        axes.set(xlabel='success (%)', xlim=(0, 100), ylim=(len(mine) - 0.5, -0.5))

    _panels(rows, draw, path, height=0.8 + 0.3 * max(_counts(rows)))


def steps_plot(reports: Iterable[Report], path: Path) -> None:
    """Share of the episodes that had succeeded after so many steps, one panel for each task, a line for each policy.

    Args:
        reports: of `evaluation.evaluate_all`, with their results.
        path: of the picture.
    """
    reports = list(reports)

    def draw(axes: Axes, mine: list[Report]) -> None:
        for report in mine:
            steps = sorted(r['steps'] for r in report['results'] if r['success'])
            longest = max(r['steps'] for r in report['results'])
            share = 100 * np.arange(len(steps) + 1) / len(report['results'])
            axes.step([0, *steps, longest], [*share, share[-1]], where='post', label=_label(report, reports))
        axes.set(xlabel='control steps', ylabel='succeeded (%)', ylim=(0, 100), xlim=(0, None))
        axes.legend(fontsize='small')

    _panels(reports, draw, path, height=3.0)


def loss_plot(reports: Iterable[Report], path: Path) -> bool:
    """Training loss of the policies that have a run.json in their folder; whether there was any."""
    curves: dict[str, Any] = {}
    reports = list(reports)
    for report in reports:
        run = find_model('tasks', report['policy']) / 'run.json'
        if run.is_file():
            curves[_label(report, reports)] = json.loads(run.read_text(encoding='utf-8'))['losses']
    if not any(curves.values()):
        return False
    figure = _figure(7, 3.5)
    axes = figure.subplots()
    for name, losses in curves.items():
        axes.semilogy(*smoothed(losses), label=name)
    axes.set(xlabel='training step', ylabel='loss, moving mean')
    axes.legend(fontsize='small')
    _save(figure, path)
    return True


def write_report(evaluation: Report, folder: Path) -> None:
    """Write report.json, report.md, report.html and the plots into a folder; films are expected in its `videos`.

    Args:
        evaluation: of `evaluation.evaluate_all`.
        folder: exists already; see `files.whole_folder`.
    """
    reports = evaluation['reports']
    plots = {'success': 'Success, with 95 % Wilson intervals', 'steps': 'Steps to success'}
    success_plot(reports, folder / 'success.png')
    steps_plot(reports, folder / 'steps.png')
    if loss_plot(reports, folder / 'loss.png'):
        plots['loss'] = 'Training'
    write_json(folder / 'report.json', evaluation)
    write_whole(folder / 'report.md', _document(evaluation, plots).encode())
    write_whole(folder / 'report.html', _page(evaluation, plots, folder).encode())


# --- tables --------------------------------------------------------------------------------------


def _success_cells(rows: list[Report]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of success."""
    columns: dict[str, Callable[[Report], str]] = {
        'task': lambda row: row['task'],
        'robot': lambda row: row['robot'],
        'policy': lambda row: ', '.join(_policies(row)),
        'successes': lambda row: f'{row["successes"]} of {row["episodes"]}',
        'rate': lambda row: f'{100 * row["successes"] / row["episodes"]:.0f} %',
        '95 % interval': lambda row: '{:.0f} to {:.0f} %'.format(*(100 * v for v in row['wilson_95'])),
    }
    if any(row.get('std_of_rates') is not None for row in rows):
        columns['mean ± deviation of the policies'] = _mean_and_deviation
    if any('mean_steps_of_successes' in row for row in rows):
        columns['steps of successes'] = lambda row: _number(row.get('mean_steps_of_successes'), '{:.0f}')
        columns['torn chunks'] = lambda row: _number(row.get('torn_chunks'), '{:.1f} %', 100)
    return list(columns), [[show(row) for show in columns.values()] for row in rows]


def _mean_and_deviation(row: Report) -> str:
    if row.get('std_of_rates') is None:
        return '-'
    return f'{100 * row["mean_of_rates"]:.1f} ± {100 * row["std_of_rates"]:.1f} %'


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return '-' if value is None else form.format(scale * value)


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    cells = [head, ['---'] * len(head), *([cell.replace('|', '\\|') for cell in line] for line in lines)]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in cells) + '\n'


def _html_table(head: list[str], lines: list[list[str]]) -> str:
    def row(tag: str, cells: list[str]) -> str:
        marks = [' class="number"' if tag == 'td' and cell[:1].isdigit() else '' for cell in cells]
        inner = (f'<{tag}{m}>{html.escape(c)}</{tag}>' for m, c in zip(marks, cells, strict=True))
        return f'<tr>{"".join(inner)}</tr>'

    return '<table>' + row('th', head) + ''.join(row('td', line) for line in lines) + '</table>'


def _policies(row: Report) -> Sequence[str]:
    return row['policies'] if 'policies' in row else [row['policy']]


def _label(row: Report, rows: Sequence[Report]) -> str:
    """What tells a row from the others of its task: the last parts of its policies' paths, and the robot."""
    every = {policy for other in rows for policy in _policies(other)}

    def short(policy: str) -> str:
        parts = Path(policy).parts
        for count in range(1, len(parts) + 1):
            name = '/'.join(parts[-count:])
            if sum(f'/{other}'.endswith(f'/{name}') for other in every) <= 1:
                return name
        return policy

    robots = {other['robot'] for other in rows}
    return ', '.join(map(short, _policies(row))) + (f' ({row["robot"]})' if len(robots) > 1 else '')


# --- documents -----------------------------------------------------------------------------------


def _protocol(evaluation: Report) -> list[list[str]]:
    """What was done, one line for each policy and task."""
    return [
        [
            report['task'],
            report['policy'],
            report['checkpoint'],
            report['task_sha256'][:12],
            report['backbone_sha256'][:12],
            f'{report["seed"]} to {report["seed"] + report["episodes"] - 1}',
            ' '.join(filter(None, [str(report['denoising_steps']), report.get('sampler')])),
            report['instruction'] or '-',
        ]
        for report in evaluation['reports']
    ]


PROTOCOL_HEAD = [
    'task', 'policy', 'weights', 'task sha256', 'backbone sha256', 'scenes', 'denoising steps', 'told',
]  # fmt: skip


def _films(report: Report) -> list[tuple[str, str, bool]]:
    """File, caption and success of each filmed episode."""
    results = {result['seed']: result for result in report['results']}
    return [
        (
            f'{VIDEOS}/{film["file"]}',
            f'seed {result["seed"]}: {"success" if result["success"] else "failure"} after {result["steps"]} steps',
            result['success'],
        )
        for film in report.get('films', [])
        for result in [results[film['seed']]]
    ]


def _document(evaluation: Report, plots: Mapping[str, str]) -> str:
    """The report as Markdown."""
    parts = ['# Evaluation\n', success_table(evaluation['reports'])]
    if len(evaluation['summary']) != len(evaluation['reports']):  # then each says something of its own
        parts += [f'{TOGETHER}\n', success_table(evaluation['summary'])]
    parts += [f'## {title}\n\n![{title}]({name}.png)\n' for name, title in plots.items()]
    parts += ['## What was done\n', _markdown(PROTOCOL_HEAD, _protocol(evaluation))]
    filmed = [report for report in evaluation['reports'] if report.get('films')]
    if filmed:
        parts.append('## Episodes\n')
    for report in filmed:
        films = (f'- [{caption}]({file})' for file, caption, _ in _films(report))
        parts.append(f'{report["policy"]} in {report["task"]}:\n\n' + '\n'.join(films) + '\n')
    return '\n'.join(parts)


def _page(evaluation: Report, plots: Mapping[str, str], folder: Path) -> str:
    """The report as HTML, with its pictures in it and its films beside it."""
    parts = ['<h1>Evaluation</h1>', _html_table(*_success_cells(evaluation['reports']))]
    if len(evaluation['summary']) != len(evaluation['reports']):  # then each says something of its own
        parts += [
            f'<p>{TOGETHER}</p>',
            _html_table(*_success_cells(evaluation['summary'])),
        ]
    for name, title in plots.items():
        data = base64.b64encode((folder / f'{name}.png').read_bytes()).decode()
        parts.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{data}">')
    parts += ['<h2>What was done</h2>', _html_table(PROTOCOL_HEAD, _protocol(evaluation))]
    for report in evaluation['reports']:
        if films := _films(report):
            name = html.escape(f'{report["policy"]} in {report["task"]}')
            shown = ''.join(
                f'<figure class="{"success" if success else "failure"}"><video controls preload="none" '
                f'src="{html.escape(file)}"></video><figcaption>{caption}</figcaption></figure>'
                for file, caption, success in films
            )
            parts.append(f'<h2>Episodes: {name}</h2><div class="films">{shown}</div>')
    head = f'<meta charset="utf-8"><title>Evaluation</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


# --- plots ---------------------------------------------------------------------------------------


def _counts(rows: Sequence[Report]) -> list[int]:
    return [sum(row['task'] == task for row in rows) for task in {row['task'] for row in rows}]


def _panels(
    rows: list[Report], draw: Callable[[Axes, list[Report]], None], path: Path, height: float
) -> None:
    """One panel for each task, some of them side by side."""
    tasks = list(dict.fromkeys(row['task'] for row in rows))
    columns = min(COLUMNS, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = _figure(1 + 4 * columns, 0.3 + height * lines)
    grid = figure.subplots(lines, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(tasks):
            axes.set_axis_off()
            continue
        draw(axes, [row for row in rows if row['task'] == tasks[place]])
        axes.set_title(tasks[place])
    _save(figure, path)


def _figure(width_in: float, height_in: float) -> Figure:
    return Figure(figsize=(width_in, height_in), layout='constrained')


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
