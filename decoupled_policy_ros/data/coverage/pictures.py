"""Coverage as pictures: workspace.png, joints.png, speeds.png, directions.png."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from decoupled_policy_ros.data.coverage.bins import DIRECTION_NAMES, Histogram, SphereBins
from decoupled_policy_ros.data.coverage.coverage import Coverage
from decoupled_policy_ros.data.coverage.report import QUANTILES, share_of_range, share_of_reachable
from decoupled_policy_ros.data.coverage.task import AXES, TaskNeeds
from decoupled_policy_ros.data.picture_text import literal
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.files import replace_whole

COLOURS = colormaps['viridis']
BAR, LIMIT, TASK, QUIET = '#31688e', '#c0392b', '#e67e22', '0.55'
_DPI = 130
_MARGIN_M = 0.08


def draw(folder: Path, coverage: Coverage, task: TaskNeeds | None = None) -> list[Path]:
    """Draw all pictures into `folder`; returns their paths.

    Raises:
        DatasetError: a picture can't be written.
    """
    pictures: dict[str, Callable[[Figure, Coverage, TaskNeeds | None], None]] = {
        'workspace': _workspace,
        'joints': _joints,
        'speeds': _speeds,
        'directions': _directions,
    }
    sizes = {'workspace': (15, 5.6), 'joints': (10, 7), 'speeds': (12, 4.6), 'directions': (12, 8)}
    paths = []
    for name, picture in pictures.items():
        # Without pyplot: it would choose a display, and keep figures in a list of its own.
        figure = Figure(figsize=sizes[name], layout='constrained')
        FigureCanvasAgg(figure)
        picture(figure, coverage, task)
        path = folder / f'{name}.png'
        partial = path.with_name(f'.{path.name}.part')
        try:
            figure.savefig(partial, format='png', dpi=_DPI)
            replace_whole(partial, path)
        except OSError as error:
            raise DatasetError(f'{path} can not be written: {error}') from error
        paths.append(path)
    return paths


def _workspace(figure: Figure, coverage: Coverage, task: TaskNeeds | None) -> None:
    """The three projections: visits, the box, what is reachable, Stage 1's range, and the task's positions."""
    figure.suptitle(
        f'{_sources(coverage)}: {coverage.visited.mean():.1%} of the voxels of the workspace were visited, '
        f'{share_of_reachable(coverage):.1%} of the reachable ones'
    )
    visits = [coverage.grid.visits.sum(axis) for axis in (2, 1, 0)]
    norm = LogNorm(1, max(max(v.max() for v in visits), 2))
    panels = figure.subplots(1, 3)
    for axes, (across, up, along), counts in zip(
        panels, ((0, 1, 2), (0, 2, 1), (1, 2, 0)), visits, strict=True
    ):
        mesh = _projection(axes, coverage, (across, up, along), counts, norm)
        if task is not None:
            points = task.own.points.rows
            axes.plot(
                points[:, across], points[:, up], ',', color=TASK, alpha=0.6, label='commanded by the task'
            )
    figure.colorbar(mesh, ax=list(panels), label='frames in a column of voxels', shrink=0.8, pad=0.01)
    handles, labels = panels[0].get_legend_handles_labels()
    if task is not None:  # a pixel would not be seen in the legend
        handles[-1] = Patch(color=TASK)
    figure.legend(handles, labels, loc='outside lower center', ncols=len(labels), frameon=False)


def _projection(
    axes: Axes, coverage: Coverage, plane: tuple[int, int, int], counts: np.ndarray, norm: LogNorm
) -> Any:
    """Visits summed along one axis of the box; `plane` is the axis to the right, the one up, and that one."""
    across, up, along = plane
    grid, (lower, upper) = coverage.grid, coverage.grid.box_m
    edges = [lower[i] + np.arange(grid.shape[i] + 1) * grid.sizes_m[i] for i in (across, up)]
    mesh = axes.pcolormesh(*edges, np.ma.masked_equal(counts, 0).T, cmap=COLOURS, norm=norm)
    reachable = np.asarray(coverage.reachable.any(along))
    low, high = coverage.position_range_m
    _box(axes, lower, upper, across, up, color='k', linewidth=3, alpha=0.6, label='workspace box')
    _outline(axes, edges[0], edges[1], reachable)
    _box(
        axes, low, high, across, up, color=LIMIT, linewidth=1.2, linestyle='--', label='range of Stage 1',
    )  # fmt: skip
    axes.set(
        xlabel=f'{AXES[across]} (m)', ylabel=f'{AXES[up]} (m)', aspect='equal',
        xlim=_span(lower, upper, low, high, across), ylim=_span(lower, upper, low, high, up),
        title=('from above', 'from the side', 'from the front')[2 - along],
    )  # fmt: skip
    axes.set_facecolor('0.97')
    return mesh


def _outline(axes: Axes, x_edges: np.ndarray, y_edges: np.ndarray, inside: np.ndarray) -> None:
    """Line around the cells (columns, rows) that are `inside`; a cell outside the grid isn't."""
    padded = np.pad(inside, 1)
    upright = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    level = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    xs = [(x_edges[i], x_edges[i], np.nan) for i, _ in upright]
    ys = [(y_edges[j], y_edges[j + 1], np.nan) for _, j in upright]
    xs += [(x_edges[i], x_edges[i + 1], np.nan) for i, _ in level]
    ys += [(y_edges[j], y_edges[j], np.nan) for _, j in level]
    axes.plot(np.ravel(xs), np.ravel(ys), color='#2ecc71', linewidth=1.5, label='reachable voxels')


def _box(axes: Axes, lower: np.ndarray, upper: np.ndarray, across: int, up: int, **style: Any) -> None:
    label = style.pop('label')
    axes.plot([], [], label=label, **style)  # a line in the legend, not a filled patch
    size = upper - lower
    axes.add_patch(Rectangle((lower[across], lower[up]), size[across], size[up], fill=False, **style))


def _span(lower: np.ndarray, upper: np.ndarray, low: np.ndarray, high: np.ndarray, axis: int) -> tuple:
    return min(lower[axis], low[axis]) - _MARGIN_M, max(upper[axis], high[axis]) + _MARGIN_M


def _joints(figure: Figure, coverage: Coverage, task: TaskNeeds | None) -> None:
    """One strip per joint from its lower to its upper limit, dark where it was, and the gripper's."""
    note = 'dotted: home; shaded: from lowest to highest' + ('; orange: the task' if task is not None else '')
    figure.suptitle(f'{_sources(coverage)}: how much of each joint was used\n{note}', fontsize=11)
    names = [*coverage.robot.joint_names, 'gripper']
    histograms = [*coverage.joints_rad, coverage.gripper]
    panels = figure.subplots(len(names), 1)
    homes = [*np.degrees(coverage.robot.home_rad), None]
    needs = [*task.own.joints_rad, task.own.gripper] if task is not None else [None] * len(names)
    for axes, name, histogram, home, needed in zip(panels, names, histograms, homes, needs, strict=True):
        scale = 1.0 if name == 'gripper' else 180 / np.pi
        edges = histogram.edges * scale
        share = histogram.counts / max(histogram.total, 1)
        axes.stairs(share, edges, fill=True, color=BAR)
        axes.axvspan(histogram.minimum * scale, histogram.maximum * scale, color=BAR, alpha=0.12, linewidth=0)
        if home is not None:
            axes.axvline(home, color='k', linewidth=1, linestyle=':')
        if needed is not None and needed.total:
            axes.plot(
                [needed.minimum * scale, needed.maximum * scale], [0, 0], color=TASK, linewidth=5,
                solid_capstyle='butt', clip_on=False,
            )  # fmt: skip
        axes.set(xlim=(edges[0], edges[-1]), ylim=(0, None), yticks=[])
        axes.spines[['top', 'right', 'left']].set_visible(False)
        axes.set_ylabel(name, rotation=0, ha='right', va='center')
        axes.text(
            1.01, 0.5, _joint_text(histogram), transform=axes.transAxes, va='center', fontsize=9, color='0.25'
        )
        axes.tick_params(labelsize=8)
    panels[-1].set_xlabel('joints in degrees between their limits, gripper from -1 open to +1 closed')


def _joint_text(histogram: Histogram) -> str:
    beyond = (histogram.below + histogram.above) / max(histogram.total, 1)
    return f'{share_of_range(histogram):.0%} of range' + (f'\n{beyond:.1%} beyond' if beyond else '')


def _speeds(figure: Figure, coverage: Coverage, task: TaskNeeds | None) -> None:
    """Speeds of the end effector and of the joints against the robot's limits."""
    figure.suptitle(f'{_sources(coverage)}: speeds')
    linear, angular, joints = figure.subplots(1, 3)
    limits, own = coverage.robot.limits, task.own if task is not None else Coverage(coverage.robot)
    _speed(linear, coverage.linear_m_s, limits.ee_linear_velocity_m_s, own.linear_m_s)
    linear.set(title='end effector, linear', xlabel='m/s', ylabel='share of the steps')
    _speed(angular, coverage.angular_rad_s, limits.ee_angular_velocity_rad_s, own.angular_rad_s)
    angular.set(title='end effector, angular', xlabel='rad/s')
    names = coverage.robot.joint_names
    for i, histogram in enumerate(coverage.joint_speeds_rad_s):
        if not histogram.total:
            continue
        limit = limits.velocity_rad_s[i]
        for q, colour, label in (
            (1.0, '#b5cde1', 'highest'),
            (0.99, '#6b9ac4', '99 %'),
            (0.5, BAR, 'median'),
        ):
            joints.barh(i, histogram.quantile(q) / limit, 0.75, color=colour, label=None if i else label)
    joints.axvline(1, color=LIMIT, linewidth=1.5)
    joints.set(title='joints', xlabel='share of the speed limit', yticks=range(len(names)), yticklabels=names)
    joints.invert_yaxis()
    if coverage.shares.steps:
        joints.legend(frameon=False, fontsize=8, loc='upper center', bbox_to_anchor=(0.5, -0.12), ncols=3)
    for axes in (linear, angular, joints):
        axes.spines[['top', 'right']].set_visible(False)


def _speed(axes: Axes, histogram: Histogram, limit: float, needed: Histogram) -> None:
    if not histogram.total:
        axes.text(0.5, 0.5, 'no steps', transform=axes.transAxes, ha='center')
        return
    # Four bins of the count to one of the picture.
    edges = histogram.edges[::4]
    axes.stairs(histogram.counts.reshape(-1, 4).sum(1) / histogram.total, edges, fill=True, color=BAR)
    if needed.total:
        axes.stairs(
            needed.counts.reshape(-1, 4).sum(1) / needed.total, edges, color=TASK, linewidth=1.5, label='task'
        )
    axes.axvline(limit, color=LIMIT, linewidth=1.5, label=f'limit {limit:g}')
    for q, style in zip(QUANTILES, (':', '--', '-'), strict=True):
        value = histogram.quantile(q)
        axes.axvline(value, color='k', linestyle=style, linewidth=0.9, label=f'{100 * q:.0f} %: {value:.2f}')
    axes.set(yscale='log', xlim=(0, edges[-1]))
    axes.legend(frameon=False, fontsize=8)


def _directions(figure: Figure, coverage: Coverage, task: TaskNeeds | None) -> None:
    """Where the end effector went to and where the tool pointed: maps of equal area, and the tool's tilt."""
    figure.suptitle(f'{_sources(coverage)}: directions')
    (motion, named), (tool, tilt) = figure.subplots(2, 2, width_ratios=(1.7, 1))
    _sphere(figure, motion, coverage.directions, 'direction of motion')
    counts = np.array(list(coverage.directions.named.values())) / max(
        sum(coverage.directions.named.values()), 1
    )
    named.barh(list(DIRECTION_NAMES), counts, color=BAR)
    named.invert_yaxis()
    named.axvline(1 / 6, color=QUIET, linestyle=':', label='all alike')
    named.set(title='nearest axis of the base', xlabel='share of the moving steps')
    _sphere(figure, tool, coverage.approaches, "direction of the tool's axis")
    _tilts(tilt, coverage.tilt_deg, BAR, 'Stage 1', fill=True)
    if task is not None:
        own = task.own.directions.named
        shares = np.array(list(own.values())) / max(sum(own.values()), 1)
        named.barh(
            list(DIRECTION_NAMES),
            shares,
            fill=False,
            edgecolor=TASK,
            linewidth=1.5,
            label='commanded by the task',
        )
        _tilts(tilt, task.own.tilt_deg, TASK, 'task', fill=False)
    tilt.set(title='tilt of the tool from straight down', xlabel='degrees', ylabel='share of the frames')
    tilt.set_xlim(0, min(180, 1.5 * coverage.tilt_deg.maximum + 10))
    for axes in (named, tilt):
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(frameon=False, fontsize=8)


def _tilts(axes: Axes, histogram: Histogram, colour: str, label: str, fill: bool) -> None:
    shares = histogram.counts / max(histogram.total, 1)
    axes.stairs(shares, histogram.edges, fill=fill, color=colour, label=label, linewidth=1.5)


def _sphere(figure: Figure, axes: Axes, sphere: SphereBins, title: str) -> None:
    """Lambert's cylindrical map: azimuth to the right, height up, every bin of equal area."""
    bands, strips = sphere.counts.shape
    total = max(int(sphere.counts.sum()), 1)
    mesh = axes.pcolormesh(
        np.linspace(-180, 180, strips + 1),
        np.linspace(-1, 1, bands + 1),
        np.ma.masked_equal(sphere.counts, 0) * (sphere.counts.size / total),
        cmap=COLOURS,
        norm=LogNorm(0.01, max(sphere.counts.max() * sphere.counts.size / total, 0.1)),
        edgecolors='0.85',
        linewidth=0.4,
    )
    axes.set(
        title=f'{title}: {sphere.share_visited:.0%} of the sphere',
        xlabel='azimuth in the base frame (°): 0 is +x, 90 is +y', xticks=range(-180, 181, 90),
        yticks=(-1, 0, 1), yticklabels=('-z', 'level', '+z'),
    )  # fmt: skip
    axes.set_facecolor('0.97')
    figure.colorbar(mesh, ax=axes, label='density, 1 is uniform')


def _sources(coverage: Coverage) -> str:
    names = [Path(source['path']).name for source in coverage.sources] or [coverage.robot.name]
    return literal(', '.join(names if len(names) <= 3 else [*names[:3], f'and {len(names) - 3} more']))
