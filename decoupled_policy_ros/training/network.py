"""The sections `backbone`, `conditioning` and `objective` of a training configuration, and what they build."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Tag

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.policy.backbones import (
    BACKBONES,
    DPCSize,
    DPMixerSize,
    DPMLPSize,
    DPTSize,
)
from decoupled_policy_ros.policy.policy import Backbone
from decoupled_policy_ros.policy.sampling import make_schedule
from decoupled_policy_ros.policy.schedule import ScheduleConfig
from decoupled_policy_ros.robot.fingerprint import Fingerprint

#: The one that a configuration gets which states none: docs/evidence.md compares it with the others.
DEFAULT_BACKBONE = DPMixerSize()


def _kind_of(value: Any) -> str:
    """The kind that a `backbone` section states, in YAML or as a size; the default where it states none."""
    return value.get('kind', DEFAULT_BACKBONE.kind) if isinstance(value, dict) else getattr(value, 'kind', '')


def _name_or_size(value: Any) -> str:
    return 'name' if isinstance(value, str | Path) else 'size'


AnySize = DPMLPSize | DPMixerSize | DPCSize | DPTSize
# The sizes of a backbone are the same dataclasses that its file is written from: one list of what there is.
BackboneSize = Annotated[
    Annotated[DPMLPSize, Tag('dp_mlp')]
    | Annotated[DPMixerSize, Tag('dp_mixer')]
    | Annotated[DPCSize, Tag('dp_c')]
    | Annotated[DPTSize, Tag('dp_t')],
    Discriminator(_kind_of),
]
BackboneNameOrSize = Annotated[
    Annotated[str, Tag('name')] | Annotated[BackboneSize, Tag('size')], Discriminator(_name_or_size)
]


class ConditioningConfig(BaseModel):
    """How the backbone is conditioned; which mechanisms there are depends on the backbone."""

    model_config = ConfigDict(extra='forbid', frozen=True)

    kind: str


class NetworkConfig(BaseModel):
    """The three sections, where they stand by themselves; what is left out is chosen by whoever trains."""

    model_config = ConfigDict(extra='forbid', frozen=True)

    backbone: BackboneSize | None = None
    conditioning: ConditioningConfig | None = None
    objective: ScheduleConfig | None = None


def require_mechanism(backbone: AnySize, conditioning: ConditioningConfig | None) -> None:
    """Raise ConfigError where this backbone can't be conditioned that way."""
    valid = BACKBONES[backbone.kind].mechanisms
    if conditioning is not None and conditioning.kind not in valid:
        raise ConfigError(
            f'conditioning.kind {conditioning.kind!r} does not exist for {backbone.kind!r}; '
            f'valid: {", ".join(valid)}'
        )


def new_backbone(
    size: AnySize,
    conditioning: ConditioningConfig | None,
    objective: ScheduleConfig | None,
    fingerprint: Fingerprint,
    name: str,
) -> Backbone:
    """An untrained backbone; its own first mechanism and noise prediction where nothing is chosen."""
    denoiser = BACKBONES[size.kind](size, conditioning.kind if conditioning else None)
    return Backbone(denoiser, fingerprint, make_schedule(objective or ScheduleConfig()), name)


def require_as_chosen(
    backbone: Backbone, conditioning: ConditioningConfig | None, objective: ScheduleConfig | None
) -> None:
    """Raise ConfigError where a finished backbone has another conditioning or objective than the chosen ones."""
    mechanism, schedule = backbone.denoiser.mechanism, backbone.schedule.config
    if conditioning is not None and conditioning.kind != mechanism:
        raise ConfigError(
            f'conditioning.kind is {conditioning.kind!r}, but backbone {backbone.name!r} was trained with {mechanism!r}'
        )
    if objective is not None and objective != schedule:
        raise ConfigError(
            f'objective is {objective.to_dict()}, but backbone {backbone.name!r} was trained with {schedule.to_dict()}'
        )
