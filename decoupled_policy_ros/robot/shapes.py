"""What an arm takes up of space: capsules on its links, and boxes that it must not enter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.errors import DecoupledPolicyError, RobotDescriptionError
from decoupled_policy_ros.robot.settings import Section

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Capsule:
    """All points within `radius_m` of the line between two points (3,) in the frame of a link."""

    link: str
    from_m: Array
    to_m: Array
    radius_m: float


@dataclass(frozen=True, eq=False)
class Box:
    """A box that the arm must not enter, its edges along the axes of the base frame."""

    name: str
    lower_m: Array
    upper_m: Array


@dataclass(frozen=True, eq=False)
class CollisionDescription:
    """Capsules of the arm, pairs of links that are not looked at, and boxes around it."""

    capsules: tuple[Capsule, ...] = ()
    ignored_pairs: frozenset[frozenset[str]] = frozenset()
    boxes: tuple[Box, ...] = ()


def read_collision(section: Section) -> CollisionDescription:
    """The `collision` block of a robot's file: capsules, ignored_pairs and boxes.

    Raises:
        RobotDescriptionError: a key is unknown or missing, a number out of range, or a pair names no link.
    """
    capsules = tuple(
        _capsule(value, f'{section.where}: capsules[{i}]')
        for i, value in enumerate(_list(section, 'capsules'))
    )
    links = {capsule.link for capsule in capsules}
    pairs = []
    for pair in _list(section, 'ignored_pairs'):
        if not isinstance(pair, list) or len(pair) != 2 or not all(link in links for link in map(str, pair)):
            raise RobotDescriptionError(
                f'{section.where}: ignored_pairs: {pair!r} is not two of the links with capsules: '
                f'{", ".join(sorted(links))}'
            )
        pairs.append(frozenset(pair))
    return CollisionDescription(
        capsules, frozenset(pairs), read_boxes(_list(section, 'boxes'), section.where, section.error)
    )


def read_boxes(
    values: Any, where: str, error: type[DecoupledPolicyError] = RobotDescriptionError
) -> tuple[Box, ...]:
    """Boxes of a list of mappings with name, lower_m and upper_m (base frame).

    Raises:
        error: a value is of another form, or a lower corner is not below its upper one.
    """
    if not isinstance(values, list):
        raise error(f'{where}: boxes must be a list, got {values!r}')
    boxes = []
    for i, value in enumerate(values):
        section = Section(value, f'{where}: boxes[{i}]', ('name', 'lower_m', 'upper_m'), error)
        box = Box(section.text('name'), section.numbers('lower_m', 3), section.numbers('upper_m', 3))
        if np.any(box.lower_m >= box.upper_m):
            raise error(f'{section.where}: lower_m must lie below upper_m, got {value!r}')
        boxes.append(box)
    return tuple(boxes)


def _capsule(value: Any, where: str) -> Capsule:
    section = Section(value, where, ('link', 'from_m', 'to_m', 'radius_m'))
    capsule = Capsule(
        section.text('link'),
        section.numbers('from_m', 3),
        section.numbers('to_m', 3),
        section.number('radius_m'),
    )
    if capsule.radius_m <= 0:
        raise RobotDescriptionError(f'{where}: radius_m must be positive, got {capsule.radius_m}')
    return capsule


def _list(section: Section, key: str) -> list[Any]:
    value = section.get(key) if key in section else []
    if not isinstance(value, list):
        raise RobotDescriptionError(f'{section.where}: {key} must be a list, got {value!r}')
    return value
