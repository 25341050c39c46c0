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
from typing import Any

from decoupled_policy_ros.errors import CheckpointError, ConfigError, DecoupledPolicyError
from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.policy.checkpoint import find_model, load_backbone, read_header
from decoupled_policy_ros.policy.sampling import Sampler, make_schedule
from decoupled_policy_ros.policy.schedule import ScheduleConfig
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.sim.benchmarks import OWN_PROTOCOL, Protocol, protocol
from decoupled_policy_ros.training.config import Stage1Config, Stage2Config, validated
from decoupled_policy_ros.training.evaluation import Evaluation, evaluate
from decoupled_policy_ros.training.network import DEFAULT_BACKBONE
from decoupled_policy_ros.training.rollout import checkpoint_folder
from decoupled_policy_ros.training.stage1 import train_stage1
from decoupled_policy_ros.training.stage2 import train_task
from decoupled_policy_ros.training.study.config import (
    StudyBackbone,
    StudyConfig,
    StudyTask,
    Values,
    filled,
    merged,
)

EVALUATION, OUTCOME = 'evaluation.json', 'outcome.json'
# These change nothing of what is asked for, so they may differ from one machine to the next; another device draws other
# random numbers.
FREE_SETTINGS = ('device', 'threads', 'checkpoint_every', 'trackers')


@dataclass(frozen=True)
class DemonstrationsJob:
    """Demonstrations of a task, by the scripted expert."""

    folder: Path
    task: str
    episodes: int
    robot: str
    images: bool = False
    inputs: tuple[Path, ...] = ()

    @property
    def done(self) -> bool:
        return self.folder.exists()

    def require_wanted(self) -> None:
        """Look at what is in the folder.

        Raises:
            ConfigError: other demonstrations than these.
            DatasetError, FingerprintMismatch: no dataset, or one of another arm.
        """
        from decoupled_policy_ros.data.readers.opening import describe

        found = describe(self.folder, load_robot(self.robot))
        pictures = any('.images.' in feature for feature in found['features'])
        if found['total_episodes'] != self.episodes or self.images > pictures:
            raise ConfigError(
                f'{self.folder} holds {found["total_episodes"]} demonstrations with{"" if pictures else "out"} '
                f'pictures, and {self} are wanted; name another folder'
            )

    def __str__(self) -> str:
        pictures = ' with pictures' if self.images else ''
        return f'{self.episodes} demonstrations of {self.task} by {self.robot}{pictures}'

    def run(self) -> str:
        """Make them; what came out, in words."""
        from decoupled_policy_ros.sim.demonstrations import make_demonstrations

        return str(
            make_demonstrations(
                self.task, self.episodes, self.folder, self.images, workers=1, quiet=True, robot=self.robot
            )
        )


@dataclass(frozen=True)
class Stage1Job:
    """A backbone, from motion."""

    folder: Path
    config: Stage1Config

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Folders that other jobs may still be making."""
        return tuple(s.demonstrations for s in self.config.sources if s.demonstrations is not None)

    @property
    def done(self) -> bool:
        return (self.folder / 'backbone.json').exists()

    def run(self) -> str:
        """Train it; what came out, in words."""
        return f'sha256 {train_stage1(self.config, self.folder)}'


@dataclass(frozen=True)
class Cell:
    """One policy: a task, a backbone, a recipe and a seed, trained and evaluated."""

    folder: Path
    config: Stage2Config
    train: str
    task: str
    rollouts: Protocol
    max_steps: int | None = None
    demonstrations: int | None = None
    finished_backbone: bool = False  # it is named, and no study trains it

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Folders that other jobs may still be making."""
        frozen = self.config.backbone
        return (self.config.dataset, *([Path(frozen)] if isinstance(frozen, str) else []))

    @property
    def done(self) -> bool:
        return (self.folder / OUTCOME).exists() and self._is_of_this_run(self.outcome)

    @property
    def outcome(self) -> dict[str, Any]:
        """What a finished cell has to say."""
        return json.loads((self.folder / OUTCOME).read_text())

    def take(self, outcome: dict[str, Any]) -> None:
        """Count as finished if this is the outcome of the same run, on another machine or long ago."""
        if not self.done and outcome.get('run') == self.folder.name and self._is_of_this_run(outcome):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / OUTCOME, outcome)

    def _is_of_this_run(self, outcome: dict[str, Any]) -> bool:
        """Whether an outcome is of these demonstrations and this backbone, as far as is known: names are used again."""
        if outcome.get('demonstrations', self.demonstrations) != self.demonstrations:
            return False
        if not self.finished_backbone:
            return True
        try:
            frozen = find_model('backbones', str(self.config.backbone))
        except CheckpointError:
            return True
        return bool(outcome.get('backbone_sha256') == read_header(frozen)['sha256'])

    def run(self) -> str:
        """Train and evaluate it; what came out, in words."""
        if not (self.folder / 'run.json').exists():  # the last that training writes
            train_task(self.config, self.folder, normal=self.train == 'normal')
        frozen = self.config.backbone
        spec = Evaluation(
            str(self.folder),
            self.task,
            str(find_model('backbones', frozen)) if isinstance(frozen, str) else None,
            self.config.robot,
            self.rollouts.denoising_steps,
            self.max_steps,
            checkpoint=self.rollouts.checkpoint,
            sampler=self.rollouts.sampler,
        )
        report = evaluate(spec, self.rollouts.episodes, self.rollouts.seed, 1, self.folder / EVALUATION)
        trained = checkpoint_folder(str(self.folder), self.rollouts.checkpoint)
        backbone = find_model('backbones', frozen) if isinstance(frozen, str) else trained / 'backbone'
        write_json(self.folder / OUTCOME, self._outcome(report, backbone))
        return f'{report["successes"]} of {report["episodes"]} episodes succeeded'

    def _outcome(self, report: dict[str, Any], backbone: Path) -> dict[str, Any]:
        """Its evaluation with every episode, and of its training what a table needs."""
        run = json.loads((self.folder / 'run.json').read_text())
        last = run['losses'][-100:]
        return {
            'run': self.folder.name,
            **({} if self.demonstrations is None else {'demonstrations': self.demonstrations}),
            **{key: report[key] for key in ('successes', 'episodes', 'wilson_95', 'torn_chunks', 'results')},
            'trained_parameters': run['trained_parameters'],
            'backbone_parameters': sum(p.numel() for p in load_backbone(backbone).parameters()),
            'training_seconds': run['seconds'],
            'final_loss': round(sum(last) / len(last), 5),
            'task_sha256': run['task_sha256'],
            'backbone_sha256': run['backbone_sha256'],
        }


Job = DemonstrationsJob | Stage1Job | Cell


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
        folder: DemonstrationsJob(folder, motion.task, motion.episodes, motion.robot)
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
    simulated = task.task or place.task
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
        needed.append(_stage1_job(filled(of_stage1, words), where, out))
        values['backbone'] = str(needed[-1].folder)
    elif recipe.train != 'decoupled':
        values = merged(values, network, {'random_backbone': recipe.train == 'random'})
    values = filled(values, words)
    default = {'backbone': DEFAULT_BACKBONE.kind}
    kinds = [network[key].get('kind', default.get(key)) for key in network if key != 'objective']
    kind = '-'.join(filter(None, kinds)) or 'given'
    with _at(where):
        rollouts = study.rollouts.of(simulated)
    asked = asdict(rollouts) | {'max_steps': study.rollouts.max_steps}
    unusual = {key: value for key, value in asked.items() if value != getattr(OWN_PROTOCOL, key, None)}
    settings = {'train': recipe.train, 'task': simulated, 'rollouts': unusual, **values}
    folder = out / 'cells' / f'{place.task}-{kind}-{recipe.train}-{place.seed}-{_hash(settings)}'
    config = validated(values, Stage2Config, where)
    finished = isinstance(config.backbone, str) and not any(isinstance(job, Stage1Job) for job in needed)
    cell = Cell(
        folder,
        config,
        recipe.train,
        simulated,
        rollouts,
        study.rollouts.max_steps,
        task.demonstrations,
        finished,
    )
    with _at(where):
        _require_evaluable(
            cell, next((job.config.objective for job in needed if isinstance(job, Stage1Job)), None)
        )
    return [*needed, cell]


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Say where in the grid an error is."""
    try:
        yield
    except DecoupledPolicyError as error:
        raise ConfigError(f'{where}: {error}') from error


def _require_evaluable(cell: Cell, of_stage1: ScheduleConfig | None) -> None:
    """Refuse now what an evaluation would refuse once the policy is trained."""
    validation, rollouts, frozen = cell.config.validation, cell.rollouts, cell.config.backbone
    if validation is not None and validation.task is not None:
        protocol(validation.task)
    if rollouts.checkpoint == 'best' and validation is None:
        raise ConfigError(
            'the best weights are evaluated, but stage2 has no section `validation` to find them by'
        )
    objective = of_stage1 or cell.config.objective or ScheduleConfig()
    if cell.finished_backbone:
        with suppress(CheckpointError):  # it may still be made
            objective = ScheduleConfig(**read_header(find_model('backbones', str(frozen)))['schedule'])
    Sampler(make_schedule(objective), rollouts.denoising_steps, rollouts.sampler)


def _stage1_job(values: Values, where: str, out: Path) -> Stage1Job:
    kind = values.get('backbone', {}).get('kind', DEFAULT_BACKBONE.kind)
    name = f'{kind}-{_hash(values)}'
    return Stage1Job(out / 'stage1' / name, validated({**values, 'name': name}, Stage1Config, where))


def _hash(values: Values) -> str:
    """Of what is stated, not of what it defaults to: a later version's new options leave old runs alone.

    A backbone counts by its name, which is a hash if a study trained it, and not by where the folder of runs lies.
    """
    loop = {k: v for k, v in values.get('optimisation', {}).items() if k not in FREE_SETTINGS}
    backbone = values.get('backbone')
    named = {'backbone': Path(backbone).name} if isinstance(backbone, str) else {}
    text = json.dumps({**values, 'optimisation': loop, **named}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
