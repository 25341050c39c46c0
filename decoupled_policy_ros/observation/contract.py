"""The observation contract: which streams a task needs, at which rate, how old and how far apart they may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from decoupled_policy_ros.errors import ConfigError

KINDS = ('image', 'proprioception', 'vector')


@dataclass(frozen=True)
class StreamSpec:
    """One stream of an observation.

    `kind` is 'image' (shape (H, W, 3), uint8 RGB), 'proprioception' or 'vector' (shape (n,)). A sample older
    than `max_age_s` at the time that it stands for is refused.

    Raises:
        ConfigError: a field is out of range; the message names the stream and what would be valid.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    max_age_s: float

    def __post_init__(self) -> None:
        where = f'stream {self.name!r}'
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f'a stream needs a name, got {self.name!r}')
        if self.kind not in KINDS:
            raise ConfigError(f'{where}: kind {self.kind!r} is not one of {", ".join(KINDS)}')
        if not all(_is_count(size) for size in self.shape):
            raise ConfigError(f'{where}: shape must be positive whole numbers, got {self.shape!r}')
        is_image = len(self.shape) == 3 and self.shape[2] == 3
        if not (is_image if self.kind == 'image' else len(self.shape) == 1):
            wanted = '(H, W, 3)' if self.kind == 'image' else '(n,)'
            raise ConfigError(f'{where}: the shape of kind {self.kind} is {wanted}, got {self.shape!r}')
        if not _is_positive(self.max_age_s):
            raise ConfigError(f'{where}: max_age_s must be a positive number, got {self.max_age_s!r}')


@dataclass(frozen=True)
class ObservationContract:
    """What one observation consists of: `n_obs_steps` frames at `rate_hz`, each with every stream.

    The samples of one frame may lie at most `max_skew_s` apart. Of the two quaternions of a rotation the one
    nearer to `near_quat_xyzw` is seen; None, as in files older than this field: to that of the robot's home.

    Raises:
        ConfigError: a field is out of range, no stream is given, or a name comes twice.
    """

    rate_hz: float
    n_obs_steps: int
    streams: tuple[StreamSpec, ...]
    max_skew_s: float
    near_quat_xyzw: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise ConfigError unless every field is in range; run on construction."""
        for name in ('rate_hz', 'max_skew_s'):
            if not _is_positive(getattr(self, name)):
                raise ConfigError(
                    f'observation contract: {name} must be positive, got {getattr(self, name)!r}'
                )
        if not _is_count(self.n_obs_steps):
            raise ConfigError(
                f'observation contract: n_obs_steps must be a positive whole number, got {self.n_obs_steps!r}'
            )
        names = self.names
        if not names or len(set(names)) != len(names):
            raise ConfigError(
                f'observation contract: stream names must be given and differ, got {list(names)}'
            )
        near = self.near_quat_xyzw
        if near is not None and not _is_unit_quaternion(near):
            raise ConfigError(
                f'observation contract: near_quat_xyzw must be four numbers of norm 1, or null, got {near!r}'
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the streams, in their order."""
        return tuple(spec.name for spec in self.streams)

    @property
    def picture_sizes(self) -> dict[str, tuple[int, int]]:
        """Height and width of each camera's pictures."""
        return {spec.name: (spec.shape[0], spec.shape[1]) for spec in self.streams if spec.kind == 'image'}

    def stream(self, name: str) -> StreamSpec:
        """The stream of that name.

        Raises:
            ConfigError: there is none; the message lists the names.
        """
        for spec in self.streams:
            if spec.name == name:
                return spec
        raise ConfigError(f'no stream {name!r} in the observation contract; it has {", ".join(self.names)}')

    def offset_ns(self, frames: int) -> int:
        """Nanoseconds that `frames` frames take at this rate."""
        return round(frames * 1e9 / self.rate_hz)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values; inverse of `from_dict`."""
        streams = [{**asdict(spec), 'shape': list(spec.shape)} for spec in self.streams]
        return {**asdict(self), 'streams': streams}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ObservationContract:
        """From `to_dict`'s values, checked.

        Raises:
            ConfigError: a key is unknown or missing, or a value is out of range.
        """
        if isinstance(values, Mapping):
            values = {'near_quat_xyzw': None, **values}
        values = _fields_of(cls, values, 'observation contract')
        near = values['near_quat_xyzw']
        if isinstance(near, list):
            values['near_quat_xyzw'] = tuple(near)
        if not isinstance(values['streams'], (list, tuple)):
            raise ConfigError(f'observation contract: streams must be a list, got {values["streams"]!r}')
        return cls(**{**values, 'streams': tuple(_stream_from_dict(stream) for stream in values['streams'])})


def _stream_from_dict(values: Mapping[str, Any]) -> StreamSpec:
    values = _fields_of(StreamSpec, values, 'stream')
    if not isinstance(values['shape'], (list, tuple)):
        raise ConfigError(f'stream {values["name"]!r}: shape must be a list, got {values["shape"]!r}')
    return StreamSpec(**{**values, 'shape': tuple(values['shape'])})


def _fields_of(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    valid = [field.name for field in fields(cls)]
    if not isinstance(values, Mapping) or set(values) != set(valid):
        raise ConfigError(f'{where}: needs the keys {", ".join(valid)}, got {values!r}')
    return dict(values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_unit_quaternion(values: Any) -> bool:
    numbers = isinstance(values, tuple) and all(type(value) in (int, float) for value in values)
    return numbers and len(values) == 4 and abs(math.hypot(*values) - 1.0) < 1e-6  # false for nan


def _is_positive(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )
