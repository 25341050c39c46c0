"""Verbs of `decoupled-policy` about data."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.observation.contract import ObservationContract


@dataclass(frozen=True)
class ConvertOptions:
    """How recordings are converted.

    Attributes:
        action: what the actions are: the commanded pose in force, or the next achieved one.
        images: PNG keeps every bit, video is far smaller.
        on_gap: cut a recording where a stream is missing, too old or skewed, or refuse it. Nothing is filled.
        min_frames: pieces shorter than this are left out.
        rate_hz: frames per second.
        size: height and width of every camera.
        cameras: names of the cameras to take.
        max_age_s: oldest sample of a frame (s).
        max_skew_s: largest distance in time between the samples of a frame (s).
        max_command_age_s: longest time that a commanded pose is in force (s).
        trim_idle: leave out the arm's standing still at the beginning and the end of each piece.
        instruction: what was done, in words; instead of what the recordings say.
        success: label of the recordings that have none.
        only_successful: leave out recordings that are not labelled a success.
        namespace: of the robot's topics in the recordings.
    """

    action: Literal['commanded', 'achieved'] | None = None
    images: Literal['png', 'h264', 'av1'] = 'png'
    on_gap: Literal['cut', 'refuse'] = 'cut'
    min_frames: int = 16
    rate_hz: Annotated[float | None, tyro.conf.arg(name='rate')] = None
    size: tuple[int, int] | None = None
    cameras: tuple[str, ...] | None = None
    max_age_s: Annotated[float | None, tyro.conf.arg(name='max-age')] = None
    max_skew_s: Annotated[float | None, tyro.conf.arg(name='max-skew')] = None
    max_command_age_s: Annotated[float, tyro.conf.arg(name='max-command-age')] = 0.5
    trim_idle: bool = False
    instruction: str | None = None
    success: bool | None = None
    only_successful: bool = False
    namespace: str = ''


def convert(
    bags: Annotated[tuple[Path, ...], tyro.conf.Positional],
    robot: str,
    out: Path,
    options: Annotated[ConvertOptions, tyro.conf.arg(name='')],
    policy: str | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
    ray: str | None = None,
) -> None:
    """Convert recordings (rosbag2, MCAP or SQLite) into a dataset in LeRobot v3 layout.

    A run that was interrupted is resumed by the same command. Rate, streams and limits are the recordings' own
    (episode.json) unless options say otherwise, and 20 Hz with all cameras at 84 x 84 where they say nothing.

    Args:
        bags: rosbag2 folders, single .mcap or .db3 files, or folders of recordings.
        robot: robot description.
        out: folder of the new dataset.
        options: how.
        policy: task folder, or a name in models/tasks, whose observation contract is taken.
        skip_bad: leave out recordings that can't be converted, or lack the commanded poses that others have.
        workers: processes; one per core by default.
        ray: address of a Ray cluster whose machines share this file system; local for one on this machine.
    """
    from decoupled_policy_ros.data.conversion.convert import convert as run
    from decoupled_policy_ros.data.conversion.plan import ConvertSettings

    settings = ConvertSettings(robot, contract_of(policy) if policy else None, **asdict(options))
    report = run(bags, out, settings, workers, ray, skip_bad, Console())
    totals = report['totals']
    Console().print(
        f'{out}: {totals["episodes"]} episodes, {totals["frames"]} frames; see {out}/conversion',
        soft_wrap=True,
        markup=False,
    )


def contract_of(policy: str) -> ObservationContract:
    """Observation contract of a task given by folder or name.

    Raises:
        CheckpointError: no model there, or its files were changed.
        ConfigError: it is a backbone.
    """
    from decoupled_policy_ros.policy.checkpoint import find_model, read_header

    header = read_header(find_model('tasks', policy))
    if 'contract' not in header:
        raise ConfigError(f'{policy} is no task: its header has no observation contract')
    return ObservationContract.from_dict(header['contract'])


def coverage(
    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional],
    robot: str,
    out: Path = Path('out/coverage'),
    task: Path | None = None,
    voxel_m: float = 0.05,
    rate_hz: float = 20.0,
    reach_samples: int = 1_000_000,
    mapping: str | None = None,
    filter_key: str | None = None,
    every: int = 1,
    pictures: bool = True,
    publish: bool = False,
) -> None:
    """Show what Stage 1 motions cover, before a backbone is trained on them, and whether a task fits in.

    Args:
        datasets: folders of motion files, or datasets of any kind; several count together.
        robot: robot description.
        out: folder for coverage.json and the pictures.
        task: demonstrations of a task, to be compared with what is covered.
        voxel_m: longest edge of the voxels that the workspace is cut into.
        rate_hz: rate at which recordings are resampled; the policy's.
        reach_samples: at most so many joint configurations are tried to see what can be reached.
        mapping: name or file of a mapping, for LeRobot datasets that others wrote; by default the one that fits.
        filter_key: of HDF5 files, the demonstrations of one of their masks.
        every: of datasets, keep every n-th frame only.
        pictures: draw pictures.
        publish: afterwards publish a point cloud and markers for RViz, until Ctrl-C.
    """
    from decoupled_policy_ros.data.coverage.command import run_coverage
    from decoupled_policy_ros.data.coverage.coverage import CoverageSettings
    from decoupled_policy_ros.robot.description import load_robot

    if not datasets:
        raise ConfigError('coverage takes at least one folder of motion files or dataset')
    if publish:  # before the work, in case that there is no ROS
        from decoupled_policy_ros.nodes.coverage_node import publish as run
    settings = CoverageSettings(voxel_m=voxel_m, rate_hz=rate_hz, reach_samples=reach_samples)
    options = {'mapping': mapping, 'filter_key': filter_key, 'every': every}
    measured = run_coverage(datasets, load_robot(robot), out, task, settings, pictures, **options)
    if publish:
        sys.exit(run(measured, datasets, robot))
