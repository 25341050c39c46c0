"""What an arm may do: limits of joints and of the end effector, as its maker publishes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from decoupled_policy_ros.errors import RobotDescriptionError
from decoupled_policy_ros.robot.settings import Section

Array = NDArray[np.float64]

_BRAKING_KEYS = ('offset_rad_s', 'deceleration_rad_s2', 'lower_rad', 'upper_rad')
_POSITIVE = (
    'velocity_rad_s', 'acceleration_rad_s2', 'jerk_rad_s3', 'ee_linear_velocity_m_s', 'ee_linear_acceleration_m_s2',
    'ee_linear_jerk_m_s3', 'ee_angular_velocity_rad_s', 'ee_angular_acceleration_rad_s2', 'ee_angular_jerk_rad_s3',
)  # fmt: skip


#: Share of its velocity with which a joint may creep where braking before the end of its range would allow it none.
CREEP_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class BrakingLimits:
    """Joint speed that falls towards the ends of the range, so that a joint can always stop before them.

    At position q a joint may move up at most at sqrt(deceleration (upper - q)) - offset and down at most at
    sqrt(deceleration (q - lower)) - offset, both at least 0. All arrays (n,).
    """

    offset_rad_s: Array
    deceleration_rad_s2: Array
    lower_rad: Array
    upper_rad: Array

    def upwards(self, positions_rad: Array) -> Array:
        """Largest speed (..., n) towards the upper end at positions (..., n)."""
        return self._speed(self.upper_rad - positions_rad)

    def downwards(self, positions_rad: Array) -> Array:
        """Largest speed (..., n) towards the lower end at positions (..., n)."""
        return self._speed(positions_rad - self.lower_rad)

    def scaled(self, share: float) -> BrakingLimits:
        """With this share of every speed, at the same positions."""
        return replace(
            self,
            offset_rad_s=share * self.offset_rad_s,
            deceleration_rad_s2=share**2 * self.deceleration_rad_s2,
        )

    def _speed(self, left_rad: Array) -> Array:
        return np.maximum(
            np.sqrt(np.maximum(self.deceleration_rad_s2 * left_rad, 0.0)) - self.offset_rad_s, 0.0
        )


@dataclass(frozen=True, eq=False)
class Limits:
    """What the arm may do. Joint arrays have shape (n,), in the order of the arm's joint names.

    What may be left out of a robot's file is None then: there is no such limit.
    """

    lower_rad: Array
    upper_rad: Array
    velocity_rad_s: Array
    acceleration_rad_s2: Array
    workspace_m: Array  # (2, 3): lowest and highest corner of a box in the base frame
    ee_linear_velocity_m_s: float
    ee_angular_velocity_rad_s: float
    jerk_rad_s3: Array | None = None
    ee_linear_acceleration_m_s2: float | None = None
    ee_linear_jerk_m_s3: float | None = None
    ee_angular_acceleration_rad_s2: float | None = None
    ee_angular_jerk_rad_s3: float | None = None
    braking: BrakingLimits | None = None

    def velocity_towards(self, positions_rad: ArrayLike, directions: ArrayLike) -> Array:
        """Largest joint speed (..., n) at positions (..., n), moving in the directions' signs (..., n)."""
        positions = np.asarray(positions_rad, float)
        fastest = np.broadcast_to(self.velocity_rad_s, positions.shape)
        if self.braking is None:
            return fastest
        up = np.asarray(directions) > 0
        return np.minimum(
            fastest, np.where(up, self.braking.upwards(positions), self.braking.downwards(positions))
        )


def read_limits(section: Section, n: int) -> Limits:
    """Limits of an arm with n joints.

    Raises:
        RobotDescriptionError: a limit is missing, of the wrong size, not positive, or a lower one above an upper one.
    """
    corners = section.section('workspace_m', ('lower', 'upper'))
    workspace_m = np.stack([corners.numbers('lower', 3), corners.numbers('upper', 3)])
    workspace_m.setflags(write=False)
    optional = {
        key: section.number(key)
        for key in (
            'ee_linear_acceleration_m_s2', 'ee_linear_jerk_m_s3', 'ee_angular_acceleration_rad_s2',
            'ee_angular_jerk_rad_s3',
        )
        if key in section
    }  # fmt: skip
    limits = Limits(
        lower_rad=section.numbers('lower_rad', n),
        upper_rad=section.numbers('upper_rad', n),
        velocity_rad_s=section.numbers('velocity_rad_s', n),
        acceleration_rad_s2=section.numbers('acceleration_rad_s2', n),
        workspace_m=workspace_m,
        ee_linear_velocity_m_s=section.number('ee_linear_velocity_m_s'),
        ee_angular_velocity_rad_s=section.number('ee_angular_velocity_rad_s'),
        jerk_rad_s3=section.numbers('jerk_rad_s3', n) if 'jerk_rad_s3' in section else None,
        braking=_braking(section.section('braking', _BRAKING_KEYS), n) if 'braking' in section else None,
        **optional,
    )
    _require_below(limits.lower_rad, limits.upper_rad, f'{section.where}: lower_rad and upper_rad')
    _require_below(workspace_m[0], workspace_m[1], f'{section.where}: workspace_m')
    for key in _POSITIVE:
        value = getattr(limits, key)
        if value is not None and np.any(np.asarray(value) <= 0):
            raise RobotDescriptionError(f'{section.where}: {key} must be positive, got {section.get(key)!r}')
    return limits


def _braking(section: Section, n: int) -> BrakingLimits:
    braking = BrakingLimits(**{key: section.numbers(key, n) for key in _BRAKING_KEYS})
    _require_below(braking.lower_rad, braking.upper_rad, section.where)
    if np.any(braking.deceleration_rad_s2 <= 0):
        raise RobotDescriptionError(
            f'{section.where}: deceleration_rad_s2 must be positive, got {braking.deceleration_rad_s2.tolist()}'
        )
    if np.any(braking.offset_rad_s < 0):
        raise RobotDescriptionError(
            f'{section.where}: offset_rad_s is taken off the speed and must be at least 0, '
            f'got {braking.offset_rad_s.tolist()}'
        )
    return braking


def _require_below(lower: Array, upper: Array, where: str) -> None:
    if np.any(wrong := lower >= upper):
        i = int(np.argmax(wrong))
        raise RobotDescriptionError(
            f'{where}: each lower limit must lie below its upper limit; number {i + 1} has {lower[i]} and {upper[i]}'
        )
