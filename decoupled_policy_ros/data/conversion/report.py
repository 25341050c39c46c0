"""What a conversion kept and what it cut, and why: as JSON, as a picture, and as a table for the terminal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from decoupled_policy_ros.data.conversion.histograms import SKEW, AgeHistograms
from decoupled_policy_ros.data.conversion.plan import Plan
from decoupled_policy_ros.data.datasets.dataset import label_counts
from decoupled_policy_ros.data.picture_text import literal
from decoupled_policy_ros.files import replace_whole, write_json

FOLDER = 'conversion'  # in the dataset
_BAGS_DRAWN = 60
_BAGS_LISTED = 30


def conversion_report(plan: Plan, records: list[dict[str, Any]], failures: dict[str, str]) -> dict[str, Any]:
    """The report: settings, totals, each recording's record, and those that could not be converted."""
    histograms = AgeHistograms(plan.contract)
    cut: Counter[str] = Counter()
    for record in records:
        histograms.merge(record['histograms'])
        cut.update(record['cut'])
    kept = sum(record['frames'] for record in records)
    success = {str(bag.path.resolve()): bag.success for bag in plan.bags}
    labels = [success[record['bag']] for record in records for _ in record['pieces']]
    return {
        'settings': plan.identity(),
        'bags': records,
        'failed': failures,
        'left_out': plan.left_out,
        'totals': {
            'bags': len(records),
            'episodes': sum(len(record['pieces']) for record in records),
            'labels': label_counts(labels),
            'frames': kept,
            'cut': dict(cut.most_common()),
            'cut_share': sum(cut.values()) / max(kept + sum(cut.values()), 1),
            'bag_s': sum(record['bag_s'] for record in records),
            'bag_bytes': sum(record['bag_bytes'] for record in records),
            'worker_s': sum(record['wall_s'] for record in records),
            'measured_gripper_frames': sum(record['measured_gripper_frames'] for record in records),
        },
        'histograms': histograms.to_dict(),
    }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write report.json and report.png into `folder`."""
    write_json(folder / 'report.json', report)
    _draw(folder / 'report.png', report)


def report_table(report: dict[str, Any]) -> Table:
    """Frames kept and cut by recording; only the sums where there are very many."""
    table = Table(title='frames of the grid')
    table.add_column('recording', overflow='fold')
    for column in ('length (s)', 'episodes', 'kept', 'cut'):
        table.add_column(column, justify='right')
    table.add_column('why', overflow='fold')
    bags = report['bags']
    for record in bags if len(bags) <= _BAGS_LISTED else []:
        cut = record['cut']
        table.add_row(
            escape(Path(record['bag']).name),
            f'{record["bag_s"]:.1f}',
            str(len(record['pieces'])),
            str(record['frames']),
            str(sum(cut.values())),
            _reasons(cut),
            style='yellow' if not record['frames'] else None,
        )
    totals = report['totals']
    table.add_section()
    table.add_row(
        f'{totals["bags"]} recordings',
        f'{totals["bag_s"]:.1f}',
        str(totals['episodes']),
        str(totals['frames']),
        str(sum(totals['cut'].values())),
        _reasons(totals['cut']),
        style='bold',
    )
    table.caption = 'episodes: ' + ', '.join(f'{n} {label}' for label, n in totals['labels'].items())
    for name in report['failed']:  # the reason is in the notes: a table cuts long lines
        table.add_row(escape(Path(name).name), '', '', '', '', 'not converted, see below', style='red')
    return table


def failure_lines(failures: dict[str, str]) -> list[str]:
    """Why each recording failed; each line names its recording."""
    return [reason if Path(name).name in reason else f'{name}: {reason}' for name, reason in failures.items()]


def notes(report: dict[str, Any]) -> list[str]:
    """What a user should know besides the table."""
    lines = [*failure_lines(report['failed']), *report['left_out']]
    for record in report['bags']:
        for topic, count in record['topics'].items():
            if count['refused']:
                lines.append(
                    f'{record["bag"]}: {count["refused"]} of {count["received"]} messages of {topic} refused; '
                    f'the last one: {count["last_refusal"]}'
                )
    labels = report['totals']['labels']
    if labels['failure'] or labels['unlabelled']:
        lines.append(
            f'{labels["failure"]} failures and {labels["unlabelled"]} unlabelled are in it; --only-successful leaves '
            f'them out'
        )
    measured = report['totals']['measured_gripper_frames']
    if measured and report['settings']['dataset']['gripper_source'] == 'commanded':
        lines.append(f'{measured} frames before the first gripper command have the measured gripper')
    return lines


def _reasons(cut: dict[str, int]) -> str:
    return ', '.join(f'{reason}: {frames}' for reason, frames in Counter(cut).most_common() if frames)


def _draw(path: Path, report: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    histograms = report['histograms']
    bags = report['bags'][:_BAGS_DRAWN]
    rows = (len(histograms) + 2) // 3
    bars_in = 1.2 + 0.22 * len(bags)
    figure = Figure(figsize=(11, bars_in + 2.4 * rows), layout='constrained')
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(bars_in, 2.4 * rows))[:, 0]
    _draw_frames(top.subplots(), bags, len(report['bags']))
    axes = np.atleast_1d(bottom.subplots(rows, 3)).ravel()
    for axis, (name, entry) in zip(axes, histograms.items(), strict=False):
        edges_ms = np.linspace(0.0, 1e3 * entry['limit_s'], len(entry['counts']) + 1)
        axis.stairs(entry['counts'], edges_ms, fill=True, color='tab:purple' if name == SKEW else 'tab:blue')
        axis.set_yscale('symlog')
        axis.set_xlabel('skew between streams (ms)' if name == SKEW else f'age of {literal(name)} (ms)')
        axis.set_title(
            f'mean {1e3 * entry["mean_s"]:.1f} ms, largest {1e3 * entry["maximum_s"]:.1f} ms, '
            f'limit {1e3 * entry["limit_s"]:.0f} ms',
            fontsize='small',
        )
    for axis in axes[len(histograms) :]:
        axis.set_visible(False)
    partial = path.with_name(f'.{path.name}.part')
    figure.savefig(partial, format='png', dpi=100)
    replace_whole(partial, path)


def _draw_frames(axis: Any, bags: list[dict[str, Any]], total: int) -> None:
    """Stacked bars of the first recordings: kept, then cut by reason."""
    reasons = sorted({reason for record in bags for reason, frames in record['cut'].items() if frames})
    names, positions = [literal(Path(record['bag']).name) for record in bags], np.arange(len(bags))
    left = np.zeros(len(bags))
    for reason in ('kept', *reasons):
        width = np.array(
            [record['frames'] if reason == 'kept' else record['cut'].get(reason, 0) for record in bags], float
        )
        axis.barh(
            positions,
            width,
            left=left,
            label=literal(reason),
            color='tab:green' if reason == 'kept' else None,
        )
        left += width
    axis.set_yticks(positions, names, fontsize='small')
    axis.invert_yaxis()
    axis.set_xlabel('frames of the grid')
    shown = '' if total == len(bags) else f' (the first {len(bags)} of {total} recordings)'
    axis.set_title(f'kept and cut{shown}')
    axis.legend(fontsize='small', loc='upper left', bbox_to_anchor=(1.0, 1.0))
