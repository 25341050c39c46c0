"""The file of a study: what is common to all its runs, and the axes along which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.sim.benchmarks import Protocol, common_protocol
from decoupled_policy_ros.training.config import read_mapping, validated

Values = dict[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra='forbid', frozen=True)


class Choice(_Strict):
    """One value of an axis: what it changes in the configurations of Stage 1 and of the task.

    Attributes:
        stage1, stage2: merged into the common ones, section by section.
    """

    stage1: Values = {}
    stage2: Values = {}


class StudyTask(Choice):
    """A simulated task and its demonstrations.

    Attributes:
        task: of the simulator, or several that one policy does, told apart by the instruction; the name of a benchmark
            stands for all of its tasks. The key of this entry by default.
        dataset: folder of the demonstrations.
        demonstrations: so many of each task are made by the scripted expert where the folder is missing.
        images: make them with both cameras.
        robot: that does the task.
        words: values for `{word}` in any text of the configurations, besides {dataset} and {task}.
    """

    task: str | list[str] | None = Field(default=None, min_length=1)
    dataset: Path
    demonstrations: PositiveInt | None = None
    images: bool = False
    robot: str = 'panda_sim'
    words: dict[str, str] = {}


class StudyMotion(_Strict):
    """Motion for Stage 1 that no task of the study is trained on: so many demonstrations, by the scripted expert."""

    task: str
    robot: str = 'panda_sim'
    episodes: PositiveInt


class StudyBackbone(Choice):
    """A backbone and how it is conditioned; the sections of a training configuration."""

    backbone: Values | None = None
    conditioning: Values | None = None
    objective: Values | None = None


class Recipe(Choice):
    """How a policy is trained.

    Attributes:
        train: decoupled (Stage 1, then Stage 2 on the frozen backbone; no Stage 1 where `stage2` names a finished
            backbone), normal (both together), random (Stage 2 on a
            frozen backbone that saw no Stage 1).
    """

    train: Literal['decoupled', 'normal', 'random']


class Rollouts(_Strict):
    """How each policy is evaluated; all policies see the same scenes.

    What is left out is as the task is usually evaluated, see `sim.benchmarks`.

    Attributes:
        episodes, seed: scenes seed, seed + 1, ...
        max_steps: of an episode; the task's own limit by default.
        checkpoint: last, or best of those that were validated on the way.
    """

    episodes: PositiveInt | None = None
    seed: int | None = None
    denoising_steps: PositiveInt | None = None
    max_steps: PositiveInt | None = None
    sampler: str | None = None
    checkpoint: Literal['last', 'best'] | None = None

    def of(self, tasks: Sequence[str]) -> Protocol:
        """How the policies of simulated tasks are evaluated.

        Raises:
            SimulationError, ConfigError: see `sim.benchmarks.common_protocol`.
        """
        return replace(common_protocol(tasks), **self.model_dump(exclude={'max_steps'}, exclude_none=True))


class StudyConfig(_Strict):
    """A grid: every task with every backbone, recipe and seed.

    Attributes:
        name: of the tables and of the study's files.
        title: above the table.
        motions: folder -> demonstrations that are made where they are missing, for sources of Stage 1.
        stage1, stage2: what all training configurations have in common; see config/training.
    """

    name: str = Field(pattern=r'^[A-Za-z0-9_-]+$')
    title: str
    motions: dict[Path, StudyMotion] = {}
    tasks: dict[str, StudyTask] = Field(min_length=1)
    backbones: dict[str, StudyBackbone] = Field(min_length=1)
    recipes: dict[str, Recipe] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    rollouts: Rollouts = Rollouts()
    stage1: Values = {}
    stage2: Values = {}


def load_study(path: Path | str) -> StudyConfig:
    """Read a study; its key `extends` names a file beside it with what it has in common with others.

    Raises:
        ConfigError: not readable, an unknown key, a missing key or a value out of range; all are named.
    """
    values = read_mapping(path)
    if 'extends' in values:
        base = values.pop('extends')
        if not isinstance(base, str):
            raise ConfigError(f'{path}: extends must be the name of a file beside it, got {base!r}')
        values = merged(read_mapping(Path(path).parent / base), values)
    return validated(values, StudyConfig, str(path))


def merged(*parts: Values) -> Values:
    """Sections of later parts over those of earlier ones; all else is replaced as a whole, and None removes it."""
    result: Values = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return {key: value for key, value in result.items() if value is not None}


def filled(value: Any, words: dict[str, str]) -> Any:
    """`value` with each {word} of its texts replaced, however deep they lie.

    Raises:
        ConfigError: a word that is not there.
    """
    if isinstance(value, dict):
        return {key: filled(item, words) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, words) for item in value]
    if not isinstance(value, str):
        return value
    try:
        return value.format_map(words)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(
            f'{value!r} names a word that is not there; valid: {", ".join(f"{{{w}}}" for w in sorted(words))}'
        ) from error
