"""What a study has to do: demonstrations, backbones of Stage 1, and cells, each once for all studies.

A job's folder carries a hash of the settings that it was made with, so the same run in two studies is one run, and
a run whose settings were changed is another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from decoupled_policy_ros.errors import CheckpointError, ConfigError, DecoupledPolicyError
from decoupled_policy_ros.policy.checkpoint import conditioning_in, find_model
from decoupled_policy_ros.policy.model_files import read_header_alone
from decoupled_policy_ros.policy.sampling import Sampler, make_schedule
from decoupled_policy_ros.policy.schedule import ScheduleConfig
from decoupled_policy_ros.sim.benchmarks import OWN_PROTOCOL, expanded, protocol, require_scenes
from decoupled_policy_ros.training.config import Stage1Config, Stage2Config, validated
from decoupled_policy_ros.training.network import DEFAULT_BACKBONE, NetworkConfig
from decoupled_policy_ros.training.study.config import (
    StudyBackbone,
    StudyConfig,
    StudyTask,
    Values,
    filled,
    merged,
)
from decoupled_policy_ros.training.study.job_kinds import Cell, DemonstrationsJob, Job, Stage1Job

# These change nothing of what is asked for, so they may differ from one machine to the next; another device draws other
# random numbers.
FREE_SETTINGS = ('device', 'threads', 'checkpoint_every', 'trackers')


@dataclass(frozen=True)
class Place:
    """Where a cell stands in a study's table."""

    task: str
    backbone: str
    recipe: str
    seed: int


def plan(
    study: StudyConfig, out: Path, seeds: Sequence[int] | None = None
) -> tuple[list[Job], dict[Place, Cell]]:
    """Everything that a study needs, in an order in which each job comes after those that it waits for.

    Seeds come one after the other, so that there is a whole table early.

    Args:
        out: folder of all runs; those of other studies in it are used.
        seeds: only these of the study's.

    Raises:
        ConfigError: a configuration that can't be trained, or two different runs that can't be told apart; the place in
            the grid is named.
    """
    jobs: dict[Path, Job] = {
        folder: DemonstrationsJob(folder, (motion.task,), motion.episodes, motion.robot)
        for folder, motion in study.motions.items()
    }
    cells: dict[Place, Cell] = {}
    for seed in seeds or study.seeds:
        for task_name, task in study.tasks.items():
            for backbone_name, backbone in study.backbones.items():
                for recipe_name in study.recipes:
                    place = Place(task_name, backbone_name, recipe_name, seed)
                    needed = _cell(study, place, task, backbone, out)
                    require_same(jobs, needed, f'study {study.name}, {task_name} / {backbone_name}')
                    jobs.update({job.folder: job for job in needed if job.folder not in jobs})
                    cell = needed[-1]
                    assert isinstance(cell, Cell)
                    cells[place] = cell
    return list(jobs.values()), cells


def require_same(jobs: Mapping[Path, Job], needed: Sequence[Job], where: str) -> None:
    """A folder is made once, so all that ask for it must ask for the same."""
    for job in needed:
        other = jobs.get(job.folder, job)
        if isinstance(job, DemonstrationsJob) and job != other:
            raise ConfigError(
                f'{where}: {job.folder} is to hold {job} here and {other} elsewhere; name another folder'
            )
        if isinstance(job, Cell) and isinstance(other, Cell) and job.config.backbone != other.config.backbone:
            raise ConfigError(
                f'{where}: a backbone counts by the name of its folder, and {other.config.backbone} and '
                f'{job.config.backbone} have the same'
            )


def _cell(study: StudyConfig, place: Place, task: StudyTask, backbone: StudyBackbone, out: Path) -> list[Job]:
    """The jobs of one place of the grid; the cell is the last."""
    recipe = study.recipes[place.recipe]
    choices = (task, backbone, recipe)
    asked_for = task.task or place.task
    simulated = expanded(asked_for)
    if len(set(simulated)) < len(simulated):
        raise ConfigError(f'study {study.name}, {place.task}: task names one twice: {", ".join(simulated)}')
    words = {'dataset': str(task.dataset), 'task': place.task, **task.words}
    where = f'study {study.name}, {place.task} / {place.backbone} / {place.recipe}'
    network = backbone.model_dump(include={'backbone', 'conditioning', 'objective'}, exclude_none=True)
    needed: list[Job] = []
    if task.demonstrations is not None:
        needed.append(
            DemonstrationsJob(task.dataset, simulated, task.demonstrations, task.robot, task.images)
        )
    common = {'robot': task.robot}
    values = merged(common, {'dataset': str(task.dataset)}, study.stage2, *(c.stage2 for c in choices))
    values = merged(values, {'name': place.task, 'optimisation': {'seed': place.seed}})
    if recipe.train == 'decoupled' and not isinstance(values.get('backbone'), str):
        of_stage1 = merged(common, study.stage1, *(c.stage1 for c in choices), network)
        needed.append(_stage1_job(study, filled(of_stage1, words), where, out))
        values['backbone'] = str(needed[-1].folder)
    elif recipe.train != 'decoupled':
        values = merged(values, network, {'random_backbone': recipe.train == 'random'})
    values = filled(values, words)
    config = validated(values, Stage2Config, where)
    default = {'backbone': DEFAULT_BACKBONE.kind}
    kinds = [network[key].get('kind', default.get(key)) for key in network if key != 'objective']
    kind = '-'.join(filter(None, kinds)) or 'given'
    with _at(where):
        rollouts = study.rollouts.of(simulated)
    asked = asdict(rollouts) | {'max_steps': study.rollouts.max_steps}
    unusual = {key: value for key, value in asked.items() if value != getattr(OWN_PROTOCOL, key, None)}
    named = asked_for if len(simulated) > 1 else simulated[0]
    settings = {'train': recipe.train, 'task': named, 'rollouts': unusual, **values}
    folder = out / 'cells' / f'{place.task}-{kind}-{recipe.train}-{place.seed}-{_hash(settings)}'
    stage1 = next((job for job in needed if isinstance(job, Stage1Job)), None)
    cell = Cell(
        folder,
        config,
        recipe.train,
        simulated,
        rollouts,
        study.rollouts.max_steps,
        task.demonstrations,
        {} if stage1 is None else stage1.demonstrations,
        isinstance(config.backbone, str) and stage1 is None,
    )
    with _at(where):
        _require_evaluable(cell, filled(network, words), None if stage1 is None else stage1.config.objective)
    return [*needed, cell]


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Say where in the grid an error is."""
    try:
        yield
    except DecoupledPolicyError as error:
        raise ConfigError(f'{where}: {error}') from error


def _require_evaluable(cell: Cell, network: Values, of_stage1: ScheduleConfig | None) -> None:
    """Refuse now what an evaluation would refuse once the policy is trained, and a backbone that is another's."""
    validation, rollouts, frozen = cell.config.validation, cell.rollouts, cell.config.backbone
    if validation is not None and validation.task is not None:
        for task in expanded(validation.task):
            protocol(task)
    if rollouts.checkpoint == 'best' and validation is None:
        raise ConfigError(
            'the best weights are evaluated, but stage2 has no section `validation` to find them by'
        )
    objective = of_stage1 or cell.config.objective or ScheduleConfig()
    if cell.finished_backbone:
        with suppress(CheckpointError):  # it may still be made
            header = read_header_alone(find_model('backbones', str(frozen)), 'backbone')
            objective = ScheduleConfig(**header['schedule'])
            _require_chosen(network, header)
    for task in cell.tasks:
        require_scenes(task, range(rollouts.seed, rollouts.seed + rollouts.episodes))
    Sampler(make_schedule(objective), rollouts.denoising_steps, rollouts.sampler)


def _require_chosen(network: Values, header: Values) -> None:
    """Refuse a finished backbone that is not what the row of the table is called after."""
    chosen = validated(network, NetworkConfig, 'its row')
    size = {} if chosen.backbone is None else {'kind': chosen.backbone.kind, **asdict(chosen.backbone)}
    stated = {'backbone': size, 'conditioning': network.get('conditioning', {})}
    finished = {'backbone': header['network'], 'conditioning': conditioning_in(header)}
    for name, found in finished.items():
        for key in network.get(name, {}):
            ours, theirs = stated[name][key], found.get(key)
            if (list(ours) if isinstance(ours, tuple) else ours) != theirs:
                raise ConfigError(
                    f'{name}.{key} is {ours!r}, but the finished backbone {header["name"]!r} has {theirs!r}'
                )
    schedule = ScheduleConfig(**header['schedule'])
    objective = chosen.objective or schedule
    if objective != schedule:
        raise ConfigError(
            f'objective is {objective.to_dict()}, but the finished backbone {header["name"]!r} has {schedule.to_dict()}'
        )


def _stage1_job(study: StudyConfig, values: Values, where: str, out: Path) -> Stage1Job:
    config = validated({**values, 'name': 'a study names it'}, Stage1Config, where)
    name = f'{config.backbone.kind}-{_hash(values)}'
    config = config.model_copy(update={'name': name})
    made = {task.dataset: task.demonstrations for task in study.tasks.values()}
    made |= {folder: motion.episodes for folder, motion in study.motions.items()}
    counts = {str(s.demonstrations): made.get(s.demonstrations) for s in config.sources if s.demonstrations}
    return Stage1Job(out / 'stage1' / name, config, {path: n for path, n in counts.items() if n is not None})


def _hash(values: Values) -> str:
    """Of what is stated, not of what it defaults to: a later version's new options leave old runs alone.

    A backbone counts by its name, which is a hash if a study trained it, and not by where the folder of runs lies.
    """
    loop = {k: v for k, v in values.get('optimisation', {}).items() if k not in FREE_SETTINGS}
    backbone = values.get('backbone')
    named = {'backbone': Path(backbone).name} if isinstance(backbone, str) else {}
    text = json.dumps({**values, 'optimisation': loop, **named}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
