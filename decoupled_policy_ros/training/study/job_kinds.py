"""The jobs of a study: demonstrations, a backbone from motion, and a cell, each in a folder of its own.

The name of a folder says by which settings it is made; what it is made of, demonstrations and a backbone that go by
their names, can be made anew under the same names. So a folder says how many demonstrations and which finished
backbone, in its `made_of.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decoupled_policy_ros.errors import CheckpointError, ConfigError
from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.policy.checkpoint import find_model, load_backbone
from decoupled_policy_ros.policy.model_files import read_header_alone
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.sim.benchmarks import Protocol
from decoupled_policy_ros.sim.tasks import sim_task
from decoupled_policy_ros.training.config import Stage1Config, Stage2Config
from decoupled_policy_ros.training.evaluation import Evaluation, counted, evaluate_all, require_unchanged
from decoupled_policy_ros.training.loop import final_loss
from decoupled_policy_ros.training.rollout import checkpoint_folder
from decoupled_policy_ros.training.stage1 import train_stage1
from decoupled_policy_ros.training.stage2 import train_task

EVALUATION, OUTCOME, MADE_OF, LOG = 'evaluation.json', 'outcome.json', 'made_of.json', 'log.txt'


@dataclass(frozen=True)
class DemonstrationsJob:
    """Demonstrations of a task, or of several in one scene, by the scripted expert: so many episodes of each."""

    folder: Path
    tasks: tuple[str, ...]
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
        pictures, said = bool(found['cameras']), {sim_task(task).instruction for task in self.tasks}
        episodes = self.episodes * len(self.tasks)
        if found['episodes'] != episodes or self.images > pictures or set(found['instructions']) != said:
            raise ConfigError(
                f'{self.folder} holds {found["episodes"]} demonstrations of {", ".join(found["instructions"])!r} '
                f'with{"" if pictures else "out"} pictures, and {self} ({", ".join(sorted(said))!r}) are wanted; '
                'name another folder'
            )

    def __str__(self) -> str:
        pictures = ' with pictures' if self.images else ''
        return f'{self.episodes} demonstrations of {" and of ".join(self.tasks)} by {self.robot}{pictures}'

    def run(self) -> str:
        """Make them; what came out, in words."""
        from decoupled_policy_ros.sim.demonstrations import make_demonstrations

        return str(
            make_demonstrations(
                self.tasks, self.episodes, self.folder, self.images, workers=1, quiet=True, robot=self.robot
            )
        )


@dataclass(frozen=True)
class Stage1Job:
    """A backbone, from motion."""

    folder: Path
    config: Stage1Config
    #: How many the study makes, by their folders; those of others can't be told.
    demonstrations: Mapping[str, int] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Folders that other jobs may still be making."""
        return tuple(s.demonstrations for s in self.config.sources if s.demonstrations is not None)

    @property
    def done(self) -> bool:
        made_of = {'demonstrations': self.demonstrations}
        return (self.folder / 'backbone.json').exists() and _agree(_read(self.folder / MADE_OF), made_of)

    def run(self) -> str:
        """Train it; what came out, in words."""
        _begin(self.folder, {'demonstrations': dict(self.demonstrations)})
        return f'sha256 {train_stage1(self.config, self.folder)}'


@dataclass(frozen=True)
class Cell:
    """One policy: a task or several, a backbone, a recipe and a seed, trained and evaluated."""

    folder: Path
    config: Stage2Config
    train: str
    tasks: tuple[str, ...]
    rollouts: Protocol
    max_steps: int | None = None
    demonstrations: int | None = None
    stage1_demonstrations: Mapping[str, int] = field(default_factory=dict)
    finished_backbone: bool = False  # it is named, and no study trains it

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Folders that other jobs may still be making."""
        frozen = self.config.backbone
        return (self.config.dataset, *([Path(frozen)] if isinstance(frozen, str) else []))

    @property
    def done(self) -> bool:
        outcome = self.outcome
        return bool(outcome) and self._is_of_this_run(outcome)

    @property
    def outcome(self) -> dict[str, Any]:
        """What a finished cell has to say; nothing before."""
        return _read(self.folder / OUTCOME)

    def take(self, outcome: dict[str, Any]) -> None:
        """Count as finished if this is the outcome of the same run, on another machine or long ago."""
        if not self.done and outcome.get('run') == self.folder.name and self._is_of_this_run(outcome):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / OUTCOME, outcome)

    def _is_of_this_run(self, outcome: dict[str, Any]) -> bool:
        """Whether an outcome is of these demonstrations and this backbone, as far as is known: names are used again."""
        wanted = self._counts
        if self.finished_backbone:
            with suppress(CheckpointError):  # it may have been there then
                wanted['backbone_sha256'] = _sha256(self._named_backbone())
        return _agree(outcome, wanted)

    @property
    def _counts(self) -> dict[str, Any]:
        counts = {'demonstrations': self.demonstrations, 'stage1_demonstrations': self.stage1_demonstrations}
        return {key: value for key, value in counts.items() if value}

    def _named_backbone(self) -> Path:
        return find_model('backbones', str(self.config.backbone))

    def run(self) -> str:
        """Train and evaluate it; what came out, in words."""
        frozen = self._named_backbone() if isinstance(self.config.backbone, str) else None
        made_of = {} if frozen is None else {'backbone_sha256': _sha256(frozen)}
        _begin(self.folder, self._counts | made_of)
        if not (self.folder / 'run.json').exists():  # the last that training writes
            train_task(self.config, self.folder, normal=self.train == 'normal')
        specs = [
            Evaluation(
                str(self.folder),
                task,
                None if frozen is None else str(frozen),
                self.config.robot,
                self.rollouts.denoising_steps,
                self.max_steps,
                checkpoint=self.rollouts.checkpoint,
                sampler=self.rollouts.sampler,
            )
            for task in self.tasks
        ]
        evaluation = evaluate_all(specs, self.rollouts.episodes, self.rollouts.seed, workers=1)
        require_unchanged(evaluation['reports'])
        write_json(self.folder / EVALUATION, evaluation if len(specs) > 1 else evaluation['reports'][0])
        trained = checkpoint_folder(str(self.folder), self.rollouts.checkpoint)
        outcome = self._outcome(evaluation['reports'], frozen or trained / 'backbone')
        write_json(self.folder / OUTCOME, outcome)
        return f'{outcome["successes"]} of {outcome["episodes"]} episodes succeeded'

    def _outcome(self, reports: Sequence[dict[str, Any]], backbone: Path) -> dict[str, Any]:
        """Its evaluation with every episode of all its tasks, and of its training what a table needs."""
        run = json.loads((self.folder / 'run.json').read_text())
        return {
            'run': self.folder.name,
            **self._counts,
            **_pooled(reports),
            'trained_parameters': run['trained_parameters'],
            'backbone_parameters': sum(p.numel() for p in load_backbone(backbone).parameters()),
            'training_seconds': run['seconds'],
            'computed_in': run.get('computed_in', []),
            'final_loss': final_loss(run['losses']),
            'task_sha256': run['task_sha256'],
            'backbone_sha256': run['backbone_sha256'],
        }


def _pooled(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Reports of one policy in its tasks as one; where there are several, each episode says of which it is."""
    results = [
        result if len(reports) == 1 else {'task': report['task'], **result}
        for report in reports
        for result in report['results']
    ]
    return {**counted(results), 'results': results}


def _begin(folder: Path, made_of: dict[str, Any]) -> None:
    """Say in a job's folder what it is made of, and remove what was made there of anything else."""
    found = _read(folder / MADE_OF) or _read(folder / OUTCOME)
    if not _agree(found, made_of):
        before = {key: found.get(key) for key in made_of}
        print(f'{folder} is begun anew: it was made of {before}, and is to be made of {made_of}')
        # What says so goes last, so that nobody who is interrupted here takes the rest for the new one's.
        others = [entry for entry in folder.iterdir() if entry.name not in (LOG, MADE_OF, OUTCOME)]
        for entry in others:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (folder / OUTCOME).unlink(missing_ok=True)
    write_json(folder / MADE_OF, made_of)


def _sha256(backbone: Path) -> str:
    """Of a backbone's file. It is asked for every few seconds, so its weights are not read: training does that."""
    return read_header_alone(backbone, 'backbone')['sha256']


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:  # another process may just be removing it
        return {}


def _agree(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether something is made of what is wanted, as far as both are known."""
    return all(
        _agree(found[key], value) if isinstance(value, Mapping) else found[key] == value
        for key, value in wanted.items()
        if key in found
    )


Job = DemonstrationsJob | Stage1Job | Cell
