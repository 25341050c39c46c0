"""`decoupled-policy`: one command, whose verbs read like the road from motion to a running policy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
import yaml
from rich.console import Console
from rich.markup import escape

from decoupled_policy_ros.cli_data import convert, coverage
from decoupled_policy_ros.cli_evaluate import evaluate
from decoupled_policy_ros.cli_replay import replay
from decoupled_policy_ros.errors import CheckpointError, ConfigError, DecoupledPolicyError, TrainingError

# Every verb imports what it needs when it runs: `inspect` shall not wait for a simulator, nor need one.

app = tyro.extras.SubcommandApp()

#: Width of a table that goes into a file or a pipe: nothing in it is cut.
WIDE = 1000


@app.command
def train(
    stage: Annotated[Literal['stage1', 'stage2', 'normal'], tyro.conf.Positional],
    config: Annotated[Path, tyro.conf.Positional],
    out: Path,
    set: tuple[str, ...] = (),
) -> None:
    """Train a backbone on motion (stage1), a task on a frozen backbone (stage2), or both at once (normal).

    A run that was interrupted is resumed by the same command.

    Args:
        stage: what to train.
        config: YAML file; see config/training.
        out: folder for checkpoint, weights, loss.png and run.json.
        set: overrides such as optimisation.seed=42.
    """
    from decoupled_policy_ros.training.config import Stage1Config, Stage2Config, load_config
    from decoupled_policy_ros.training.stage1 import train_stage1
    from decoupled_policy_ros.training.stage2 import train_task

    if stage == 'stage1':
        sha256 = train_stage1(load_config(config, Stage1Config, parse_overrides(set)), out)
    else:
        sha256 = train_task(
            load_config(config, Stage2Config, parse_overrides(set)), out, normal=stage == 'normal'
        )
    if sha256:  # only the first of several processes has written something
        Console().print(f'{out}: sha256 {sha256}', soft_wrap=True, markup=False)


def parse_overrides(pairs: tuple[str, ...]) -> dict[str, object]:
    """Values of `key=value` pairs by their dotted key; a value is YAML.

    Raises:
        ConfigError: a pair without `=`, or a value that is not YAML.
    """
    overrides: dict[str, object] = {}
    for pair in pairs:
        key, separator, value = pair.partition('=')
        if not separator:
            raise ConfigError(f'--set takes key=value, such as optimisation.seed=42; got {pair!r}')
        try:
            overrides[key] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:  # ValueError: an impossible date
            raise ConfigError(
                f'--set {key}: {value!r} is not YAML: {" ".join(str(error).split())}'
            ) from error
    return overrides


@app.command
def demos(
    task: tuple[str, ...],
    out: Path,
    episodes: int = 200,
    images: bool = False,
    seed: int = 0,
    workers: int | None = None,
    noise: bool = True,
    robot: str = 'panda_sim',
) -> None:
    """Make demonstrations with the scripted expert in the simulator.

    Args:
        task: lift, stack, stack_green, lift_red, lift_green (two cubes, told apart by the instruction), square, can or
            detour (two equally good ways). Several tasks of one scene go into one dataset.
        out: folder of the new dataset.
        episodes: successful episodes to keep, of each task.
        images: record both cameras, not only the state.
        seed: of the first scene.
        workers: processes; one per core by default.
        noise: start away from home in some episodes and execute some with noise, so that a policy sees recoveries.
        robot: panda_sim, ur5e_sim, iiwa_sim or kinova3_sim.
    """
    from decoupled_policy_ros.sim.demonstrations import make_demonstrations

    made = make_demonstrations(task, episodes, out, images, seed, workers, noise, robot=robot)
    Console().print(str(made), markup=False)


@app.command
def study(
    configs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path = Path('out/studies'),
    seeds: tuple[int, ...] = (),
    workers: int = 1,
    results: Path | None = None,
    document: Path | None = None,
) -> None:
    """Train and evaluate a grid of backbones, recipes, tasks and seeds, and write its tables.

    An interrupted study goes on by the same command; started twice it shares the work.

    Args:
        configs: YAML files, see config/studies; what they have in common is done once.
        out: folder of all runs.
        seeds: only these of the studies' seeds.
        workers: processes, each on one thread; 0 only writes the tables of what is done.
        results: folder for the tables (.md), plots (.png) and raw outcomes (.json); OUT/results by default. Runs whose
            outcomes are there already are not done again.
        document: Markdown file that gets each table between `<!-- study NAME -->` and `<!-- end -->`.
    """
    from decoupled_policy_ros.training.study import load_study, publish, require_place, run_studies

    studies = [load_study(path) for path in configs]
    if document is not None:  # now, and not after a night of training
        for each in studies:
            require_place(document, each.name)
    results = results or out / 'results'
    cells = run_studies(studies, out, seeds or None, workers, results)
    for each in studies:
        text = publish(each, cells[each.name], results, document)
        Console(width=WIDE).print(f'{each.title}\n{text}', markup=False, highlight=False)
    wanted = [
        cell
        for placed in cells.values()
        for place, cell in placed.items()
        if not seeds or place.seed in seeds
    ]
    missing = sum(not cell.done for cell in wanted)
    if missing and workers:
        raise TrainingError(f'{missing} runs are not done; the lines above say which failed')


@app.command
def inspect(
    path: Annotated[Path, tyro.conf.Positional],
    robot: str = 'panda_sim',
    mapping: str | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name='json')] = False,
) -> None:
    """Print what a backbone, task, dataset or recording says of itself.

    Hashes of models are checked, and the kinematics of datasets.

    Args:
        path: a folder, or the file of a dataset; datasets of every kind that training reads.
        robot: the arm that somebody else's dataset is about.
        mapping: name or path of the mapping of somebody else's LeRobot dataset.
        as_json: all of it as JSON; of models that is always so.
    """
    from decoupled_policy_ros.data.readers import summary
    from decoupled_policy_ros.data.readers.opening import KINDS, describe, is_dataset

    if is_dataset(path):
        from decoupled_policy_ros.robot.description import load_robot

        values = describe(path, load_robot(robot), mapping)
        Console().print_json(json.dumps(values)) if as_json else Console().print(
            summary.dataset_table(path, values)
        )
    elif recordings := summary.recordings_in(path):
        _print_recordings(path, recordings, as_json)
    else:
        from decoupled_policy_ros.policy.checkpoint import find_model, read_header

        try:
            folder = path if path.exists() else find_model('tasks', path)
        except CheckpointError:
            raise ConfigError(f'{path} does not exist, and no task of that name is installed') from None
        if not any((folder / f'{kind}.json').is_file() for kind in ('backbone', 'task')):
            raise ConfigError(
                summary.unfinished(folder)
                or f'{path}: no backbone.json or task.json in this folder, and nothing else that can be inspected; '
                f'valid: a backbone, a task, recordings (rosbag2), {KINDS}'
            )
        Console().print_json(json.dumps(read_header(folder)))


def _print_recordings(path: Path, recordings: list[Path], as_json: bool) -> None:
    from decoupled_policy_ros.data.readers import summary

    console = Console()
    single = recordings == [path]
    if as_json:
        values = summary.recording_values if single else summary.recording_or_error
        console.print_json(json.dumps([values(recording) for recording in recordings]))
        return
    console.print(summary.recording_table(path) if single else summary.recordings_table(path, recordings))
    console.print('`decoupled-policy convert` makes a dataset of recordings', highlight=False)


@app.command
def recover(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Make episodes of what a recorder that was killed left unfinished, and count what was lost.

    A truncated MCAP bag, or a finished episode that was cut later, gets a whole copy beside it. Nothing that is being
    recorded is touched.

    Args:
        folder: looked through with all folders below.
    """
    from decoupled_policy_ros.data.bags.recovery import recover as run
    from decoupled_policy_ros.data.bags.recovery import recovery_table

    recoveries = run(folder)
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    if not recoveries:
        console.print(f'{escape(str(folder))}: nothing to recover', soft_wrap=True)
        return
    console.print(recovery_table(recoveries))
    for recovery in recoveries:
        outcome = '; '.join(str(part) for part in (recovery.path, recovery.note) if part)
        console.print(escape(f'{recovery.source}: {outcome}'), soft_wrap=True, highlight=False)
    if any(recovery.failed for recovery in recoveries):
        sys.exit(1)


@app.command
def demo(
    out: Path = Path('out/demo'), episodes: int = 10, task: str = 'lift', sim: str = 'lift', seed: int = 0
) -> None:
    """Simulator and policy node as separate ROS 2 processes: episodes, a table, a video.

    Args:
        out: folder for summary.json, the video, a picture and the logs.
        episodes: number of episodes.
        task: task folder, or a name in models/tasks.
        sim: simulated task: lift, stack, or another one of docs/simulation.md.
        seed: the first scene is that of seed + 1.
    """
    from decoupled_policy_ros.nodes.demo import run_demo

    run_demo(task, episodes, out, sim, seed)


@app.command
def watch(node: str = '', once: bool = False, wait: float = 3.0, svg: Path | None = None) -> None:
    """Show what running nodes say of themselves: states, rates, ages, latencies, what the guard found.

    In a terminal the tables are kept up to date until Ctrl-C; into a file or a pipe goes a line a second.

    Args:
        node: only this node, with its namespace; everybody by default.
        once: print the tables once and end.
        wait: with --once, seconds to wait for the first word.
        svg: with --once, also save the tables as a picture.
    """
    from decoupled_policy_ros.nodes.watch import watch as run

    run(node, once, wait, svg)


app.command(evaluate)
app.command(replay)
app.command(convert)
app.command(coverage)


# The extra that brings a module; what else a verb imports is ROS's, or a dependency of the package itself.
EXTRAS = {
    'accelerate': 'train', 'av': 'sim', 'coal': 'ros', 'matplotlib': 'train', 'mujoco': 'sim', 'pinocchio': 'ros',
    'pydantic': 'train', 'ray': 'cluster', 'rclpy': 'ros', 'robosuite': 'sim', 'sentence_transformers': 'language',
}  # fmt: skip


def main() -> None:
    """Run the command; a user's mistake ends in one line and exit status 2."""
    try:
        app.cli(prog='decoupled-policy')
    except DecoupledPolicyError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        module = (error.name or '').partition('.')[0]
        if module in ('', 'decoupled_policy_ros'):
            raise
        extra = EXTRAS.get(module, 'ros' if module.endswith(('_msgs', '_srvs', '_interfaces')) else '')
        package = f'decoupled_policy_ros[{extra}]' if extra else 'decoupled_policy_ros'
        _fail(f"the Python module {module!r} is not installed; pip install '{package}' brings it")
    except OSError as error:
        _fail(f'{error.filename}: {error.strerror}' if error.filename and error.strerror else str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> None:
    Console(stderr=True).print(f'[bold red]error:[/] {escape(message)}', highlight=False, soft_wrap=True)
    sys.exit(2)


if __name__ == '__main__':
    main()
