"""Reads a nested YAML mapping key by key and refuses what it doesn't know, naming the place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.errors import DecoupledPolicyError, RobotDescriptionError


class Section:
    """One mapping of a file, with the path to it for messages.

    Every method raises `error` (a robot file's by default) with the place, the value and what would be valid.
    """

    def __init__(
        self,
        values: Any,
        where: str,
        keys: Iterable[str],
        error: type[DecoupledPolicyError] = RobotDescriptionError,
    ):
        self.where, self.error = where, error
        if not isinstance(values, Mapping):
            raise self.error(f'{where}: expected a mapping, got {values!r}')
        valid = sorted(keys)
        unknown = sorted(str(key) for key in values if key not in valid)
        if unknown:
            raise self.error(f'{where}: unknown key {", ".join(unknown)}; valid keys: {", ".join(valid)}')
        self._values = values

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def get(self, key: str) -> Any:
        if key not in self._values:
            raise self.error(
                f'{self.where}: missing key {key!r}; present: {", ".join(map(str, self._values)) or "none"}'
            )
        return self._values[key]

    def section(self, key: str, keys: Iterable[str]) -> Section:
        return Section(self.get(key), f'{self.where}: {key}', keys, self.error)

    def text(self, key: str, default: str | None = None) -> str:
        value = default if default is not None and key not in self else self.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(f'{self.where}: {key} must be text, got {value!r}')
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f'{self.where}: {key} must be true or false, got {value!r}')
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
            raise self.error(f'{self.where}: {key} must be a list of names, got {value!r}')
        if len(set(value)) != len(value):
            raise self.error(f'{self.where}: {key} has a name twice: {value!r}')
        return tuple(value)

    def number(self, key: str) -> float:
        value = self.get(key)
        number = _number(value)
        if not np.isfinite(number):
            raise self.error(f'{self.where}: {key} must be a finite number, got {value!r}')
        return number

    def numbers(self, key: str, length: int) -> NDArray[np.float64]:
        value = self.get(key)
        array = np.array(
            [_number(item) for item in value] if isinstance(value, list | tuple | np.ndarray) else np.nan
        )
        if array.shape != (length,) or not np.all(np.isfinite(array)):
            raise self.error(f'{self.where}: {key} must be {length} finite numbers, got {value!r}')
        array.setflags(write=False)
        return array


def _number(value: Any) -> float:
    """What YAML takes for text, too: 4.5e3 has no sign in its exponent; NaN of anything else."""
    if isinstance(value, bool) or not isinstance(value, Real | str):
        return np.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return np.nan
