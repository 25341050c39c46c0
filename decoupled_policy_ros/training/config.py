"""Training configurations: YAML files, validated field by field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.policy.schedule import ScheduleConfig
from decoupled_policy_ros.training.network import (
    DEFAULT_BACKBONE,
    BackboneNameOrSize,
    BackboneSize,
    ConditioningConfig,
    require_mechanism,
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra='forbid', frozen=True)


#: Share of what was there that an average keeps at each update.
Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimisation(_Strict):
    """The loop: AdamW, cosine schedule after a warm-up, EMA.

    Defaults are what the paper trains a task on its MLP or transformer with, but for `encoder_weight_decay`, which is
    1e-6 there. Its U-Net decays by 1e-6 throughout, and its Stage 1 has batches of 256.
    """

    steps: PositiveInt
    batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-4
    betas: tuple[Decay, Decay] = (0.95, 0.999)
    weight_decay: float = Field(default=1e-3, ge=0)
    encoder_weight_decay: float | None = Field(
        default=None, ge=0, description='of the observation encoders; as all else by default'
    )
    warmup_steps: int = Field(default=500, ge=0)
    ema_power: PositiveFloat = 0.75
    ema_max: Decay = 0.9999
    precision: Literal['float32', 'bfloat16'] = 'float32'
    checkpoint_every: PositiveInt = 500
    accumulate: PositiveInt = Field(
        default=1, description='batches whose gradients are averaged for an update, in every process'
    )
    clip: PositiveFloat | None = Field(default=None, description='largest norm of the gradient')
    seed: int = Field(default=0, ge=0, lt=2**32)
    device: str = 'cpu'
    threads: int | None = Field(default=None, gt=0, description='CPU threads; all by default')
    trackers: list[Literal['tensorboard', 'wandb']] = Field(
        default=[], description='what logs losses and scores, in files of its own in the output folder'
    )


class ValidationConfig(_Strict):
    """Which weights are the best; exactly one of task and held_out."""

    every: PositiveInt = Field(description='steps between two validations')
    task: str | list[str] | None = Field(
        default=None,
        min_length=1,
        description='simulated task, a benchmark, or several: the best succeed most often',
    )
    episodes: PositiveInt = Field(default=20, description='of each simulated task')
    held_out: float | None = Field(
        default=None, gt=0, lt=1, description='share of the demonstrations: the best predict these best'
    )
    seed: int = Field(default=0, ge=0, le=10**6, description='of scenes, or of noise and diffusion steps')

    @model_validator(mode='after')
    def _exactly_one(self) -> ValidationConfig:
        if (self.task is None) == (self.held_out is None):
            raise ValueError('validation has exactly one of task (rollouts) and held_out (prediction error)')
        return self


class MotionSource(_Strict):
    """One source of Stage 1 pairs; exactly one of recorded, demonstrations, synthetic."""

    recorded: Path | None = Field(default=None, description='folder of the kinematics recorder')
    demonstrations: Path | None = Field(
        default=None, description='dataset of any kind; its achieved poses are used'
    )
    synthetic: PositiveInt | None = Field(default=None, description='number of minimum-jerk joint paths')
    robot: str | None = Field(
        default=None, description="the arm that moved, where it is another than the backbone's"
    )
    mapping: str | None = Field(
        default=None, description="what the columns of somebody's LeRobot dataset mean"
    )
    filter_key: str | None = Field(default=None, description='only these demonstrations of an HDF5 file')
    weight: PositiveFloat | None = Field(
        default=None, description='how often its windows are drawn, beside 1 for those of other sources'
    )

    @model_validator(mode='after')
    def _exactly_one(self) -> MotionSource:
        given = [key for key in ('recorded', 'demonstrations', 'synthetic') if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f'a source has exactly one of recorded, demonstrations, synthetic; got {given}')
        if self.demonstrations is None and (self.mapping or self.filter_key):
            raise ValueError(f'mapping and filter_key are for demonstrations, not for {given[0]}')
        return self


class Stage1Config(_Strict):
    """Observation-free pretraining of a backbone on motion."""

    name: str
    robot: str
    rate_hz: PositiveFloat = 20.0
    sources: list[MotionSource] = Field(min_length=1)
    backbone: BackboneSize = DEFAULT_BACKBONE
    conditioning: ConditioningConfig | None = Field(default=None, description="the backbone's own by default")
    objective: ScheduleConfig = ScheduleConfig()
    position_range_m: tuple[tuple[float, float, float], tuple[float, float, float]] | None = Field(
        default=None,
        description='lowest and highest x, y, z that tasks may command, where the motion goes less far',
    )
    condition: Literal['joint_positions', 'poses', 'none'] = Field(
        default='joint_positions',
        description='joint-conditioned, self-conditioned (on the poses that are the target), unconditional',
    )
    optimisation: Optimisation

    @model_validator(mode='after')
    def _conditioning_fits(self) -> Stage1Config:
        require_mechanism(self.backbone, self.conditioning)
        return self

    @model_validator(mode='after')
    def _nothing_is_encoded(self) -> Stage1Config:
        if self.optimisation.encoder_weight_decay is not None:
            raise ValueError(
                'optimisation.encoder_weight_decay has no use in stage1: nothing is observed there'
            )
        return self

    @field_validator('position_range_m')
    @classmethod
    def _lowest_first(cls, value: tuple[tuple[float, ...], ...] | None) -> Any:
        if value is not None and not all(low < high for low, high in zip(*value, strict=True)):
            raise ValueError(
                'position_range_m is [lowest x, y, z], [highest x, y, z], each lower than the other'
            )
        return value


class EncoderConfig(_Strict):
    """Of each camera: trunk, width and crop; of each step: whether an MLP brings its streams together."""

    crop: PositiveInt = 76
    base_channels: int = Field(
        default=64, multiple_of=16, gt=0, description='of the trunk; a half is 32, a quarter 16'
    )
    keypoints: PositiveInt = 32
    trunk: Literal['resnet18', 'resnet50'] = 'resnet18'
    weights: str | None = Field(
        default=None, description="ImageNet weights: folder or hub name of transformers' ResNet"
    )
    step_dim: PositiveInt | None = Field(
        default=None, description='features of a step after an MLP; 512 in the paper with LIBERO'
    )


class LanguageConfig(_Strict):
    """How a policy's instructions are told apart."""

    model: str = Field(
        description='a sentence-transformers model: folder, name in models/language, or hub name'
    )
    feature_dim: PositiveInt = 64


class Stage2Config(_Strict):
    """A task on a backbone: frozen (stage2), or trained along with it (normal)."""

    name: str
    robot: str
    dataset: Path = Field(description='of any kind that can be read, see docs/data.md')
    mapping: str | None = Field(
        default=None, description="what the columns of somebody's LeRobot dataset mean"
    )
    filter_key: str | None = Field(default=None, description='only these demonstrations of an HDF5 file')
    only_successful: bool = Field(
        default=False, description='leave out episodes that are not labelled a success'
    )
    every: PositiveInt = Field(default=1, description='use every so manieth frame: 3 makes 20 Hz of 60 Hz')
    backbone: BackboneNameOrSize | None = Field(
        default=None,
        description='stage2: folder or name of a frozen one; normal and random: kind and sizes of a new one',
    )
    conditioning: ConditioningConfig | None = Field(
        default=None, description="as the frozen backbone's, or the new one's own by default"
    )
    objective: ScheduleConfig | None = Field(
        default=None, description="as the frozen backbone's, or noise prediction by default"
    )
    random_backbone: bool = Field(
        default=False, description='freeze a backbone that saw no Stage 1: the control'
    )
    cameras: list[str] | dict[str, str] = Field(
        default=[], description="names of cameras, or our name -> the dataset's"
    )
    image_size: tuple[PositiveInt, PositiveInt] | None = Field(
        default=None, description='height, width to which pictures are resized as they are read'
    )
    vectors: list[str] = ['proprioception']
    instruction: str | None = Field(default=None, description="the dataset's by default")
    language: LanguageConfig | None = Field(
        default=None, description='one policy for all instructions of the dataset'
    )
    n_obs_steps: PositiveInt = 2
    n_execute: PositiveInt = 8
    max_age_s: PositiveFloat = 0.2
    max_skew_s: PositiveFloat = 0.1
    encoder: EncoderConfig = EncoderConfig()
    noise_samples: PositiveInt = Field(
        default=1, description='diffusion steps drawn for each encoded observation'
    )
    storage: Literal['float32', 'float16'] = 'float32'
    episodes: PositiveInt | None = Field(default=None, description='use only the first so many')
    validation: ValidationConfig | None = Field(
        default=None, description='keep the best weights too, in the subfolder best'
    )
    optimisation: Optimisation

    @model_validator(mode='after')
    def _fits_together(self) -> Stage2Config:
        if self.validation is not None and self.validation.every > self.optimisation.steps:
            raise ValueError(
                f'validation.every {self.validation.every} is more than the {self.optimisation.steps} steps of the '
                'optimisation: no weights would ever be validated'
            )
        if self.instruction is not None and self.language is not None:
            raise ValueError(
                '`instruction` makes all instructions one, `language` tells them apart: leave one out'
            )
        if self.backbone is not None and not isinstance(self.backbone, str):
            require_mechanism(self.backbone, self.conditioning)
        return self


C = TypeVar('C', bound=BaseModel)


def read_mapping(path: Path | str) -> dict:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: not readable, or no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or an impossible date
        raise ConfigError(f"{path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f'{path} must hold a mapping, got {type(values).__name__}')
    return values


def load_config(path: Path | str, kind: type[C], overrides: dict[str, object] | None = None) -> C:
    """Read a YAML file into `kind`.

    Args:
        overrides: values for dotted keys, such as {'optimisation.seed': 42}.

    Raises:
        ConfigError: not readable, an unknown key, a missing key or a value out of range; all are named.
    """
    values = read_mapping(path)
    for dotted, value in (overrides or {}).items():
        _override(values, dotted, value)
    return validated(values, kind, str(path))


def validated(values: dict, kind: type[C], what: str) -> C:
    """`values` as a `kind`; `what` says in an error where they come from.

    Raises:
        ConfigError: an unknown key, a missing key or a value out of range; all are named.
    """
    try:
        return kind.model_validate(values)
    except ConfigError as error:  # of a backbone's sizes or an objective, which check themselves
        raise ConfigError(f'{what}: {error}') from error
    except ValidationError as error:
        problems = '; '.join(
            f'{".".join(map(str, e["loc"])) or "file"}: {e["msg"]} (got {e["input"]!r})'
            for e in error.errors()
        )
        raise ConfigError(f'{what}: {problems}') from error


def _override(values: dict, dotted: str, value: object) -> None:
    *parents, key = dotted.split('.')
    section = values
    for depth, parent in enumerate(parents, 1):
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(
                f'{dotted}: {".".join(parents[:depth])} is no section with keys but {section!r}; '
                'only keys of sections can be overridden'
            )
    section[key] = value
