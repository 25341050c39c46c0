"""What the guard looks at, and how strictly: defaults, a YAML file, and the limits that hold in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.robot.description import Limits, RobotDescription
from decoupled_policy_ros.robot.settings import Section
from decoupled_policy_ros.robot.shapes import Box, read_boxes
from decoupled_policy_ros.runtime.stopping import StoppingLimits

Array = NDArray[np.float64]

#: Rules that can be left out. A motion that is not finite, not rigid, or already over is rejected in any case.
RULES = (
    'workspace', 'join', 'linear_velocity', 'linear_acceleration', 'linear_jerk', 'angular_velocity',
    'angular_acceleration', 'angular_jerk', 'reach', 'joint_position', 'continuity', 'joint_velocity',
    'joint_acceleration', 'joint_jerk', 'singularity', 'self_collision', 'boxes',
)  # fmt: skip

#: Rules that need the joints: without them no inverse kinematics is computed, and no joint state asked for.
JOINT_RULES = frozenset(RULES[8:])

#: Left out unless asked for. A target pose leads a compliant arm by centimetres and turns more sharply than the arm
#: does: the accelerations of joints that would follow it exactly are not the arm's. They are for joint commands.
IGNORED = frozenset(('joint_acceleration', 'joint_jerk'))

#: How hard to brake where the robot names no limit: gently, m/s^2 and rad/s^2.
BRAKE_M_S2, BRAKE_RAD_S2 = 2.0, 5.0

_SCALAR_LIMITS = (
    'ee_linear_velocity_m_s', 'ee_linear_acceleration_m_s2', 'ee_linear_jerk_m_s3', 'ee_angular_velocity_rad_s',
    'ee_angular_acceleration_rad_s2', 'ee_angular_jerk_rad_s3',
)  # fmt: skip
_JOINT_LIMITS = ('velocity_rad_s', 'acceleration_rad_s2', 'jerk_rad_s3')


@dataclass(frozen=True, eq=False)
class GuardSettings:
    """How strict the guard is.

    Attributes:
        ignored_rules: rules that are left out; by default those of the joints' acceleration and jerk, see `IGNORED`.
        limit_scale: share of the robot's velocities, accelerations and jerks that is used, in (0, 1]; that of the
            velocities that depend on the joints' positions, too.
        max_time_scale: slower than this a motion is rejected instead.
        join_m, join_rad: largest way from where the arm is told to be to the first waypoint, and for a stream of
            targets from the arm as measured to where it is told to be.
        continuity_rad: largest change of a joint from one waypoint to the next, and largest difference between
            the joints as measured and as the last command asks for them.
        singularity_slow: smallest singular value of the Jacobian (m and rad alike) below which the motion slows down
            in proportion.
        singularity_floor: below which it is rejected, unless it leads away from the singularity.
        collision_margin_m: distance that the arm's links keep from each other and from boxes.
        joint_state_max_age_s: where the joints were longer ago is no longer known.
        boxes: what the arm must not enter, apart from the robot's own boxes.
        workspace_m: (2, 3) corners that replace the robot's.
        overrides: limits that replace the robot's, by their names in its file.
    """

    ignored_rules: frozenset[str] = IGNORED
    limit_scale: float = 1.0
    max_time_scale: float = 10.0
    join_m: float = 0.15
    join_rad: float = 1.0
    continuity_rad: float = 1.0
    singularity_slow: float = 0.03
    singularity_floor: float = 0.003
    collision_margin_m: float = 0.005
    joint_state_max_age_s: float = 0.2
    boxes: tuple[Box, ...] = ()
    workspace_m: Array | None = None
    overrides: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.ignored_rules) - set(RULES))
        if unknown:
            raise ConfigError(f'guard: no rule {", ".join(unknown)} to leave out; rules: {", ".join(RULES)}')
        self._require('limit_scale', 0.0 < self.limit_scale <= 1.0, 'in (0, 1]')
        self._require('max_time_scale', self.max_time_scale >= 1.0, 'at least 1')
        for name in ('join_m', 'join_rad', 'continuity_rad', 'singularity_slow', 'joint_state_max_age_s'):
            self._require(name, getattr(self, name) > 0.0, 'positive')
        self._require(
            'singularity_floor',
            0.0 <= self.singularity_floor <= self.singularity_slow,
            f'in [0, singularity_slow = {self.singularity_slow}]',
        )
        self._require('collision_margin_m', 0.0 <= self.collision_margin_m <= 0.5, 'in [0, 0.5]')

    def _require(self, name: str, valid: bool, what: str) -> None:
        if not valid:  # a NaN is never valid
            raise ConfigError(f'guard: {name} must be {what}, got {getattr(self, name)}')

    def looks_at(self, rule: str) -> bool:
        """Whether a rule is on."""
        return rule not in self.ignored_rules

    @property
    def needs_joints(self) -> bool:
        """Whether any rule that is on needs inverse kinematics."""
        return not self.ignored_rules >= JOINT_RULES

    def limits(self, robot: RobotDescription) -> Limits:
        """The limits that hold: the robot's, replaced and scaled as these settings say.

        Raises:
            ConfigError: an override is no number, not positive, or of the wrong size.
        """
        n = len(robot.joint_names)
        section = Section(
            self.overrides or {}, 'guard: limits', (*_SCALAR_LIMITS, *_JOINT_LIMITS), ConfigError
        )
        values: dict[str, Any] = {
            name: getattr(robot.limits, name) for name in (*_SCALAR_LIMITS, *_JOINT_LIMITS)
        }
        values |= {name: section.number(name) for name in _SCALAR_LIMITS if name in section}
        values |= {name: section.numbers(name, n) for name in _JOINT_LIMITS if name in section}
        for name, value in values.items():
            if value is not None and np.any(np.asarray(value) <= 0):
                raise ConfigError(f'{section.where}: {name} must be positive, got {value}')
        scaled: Any = {
            name: None if value is None else self.limit_scale * value for name, value in values.items()
        }
        braking = robot.limits.braking
        if braking is not None:
            scaled['braking'] = braking.scaled(self.limit_scale)
        workspace_m = robot.limits.workspace_m if self.workspace_m is None else self.workspace_m
        return replace(robot.limits, workspace_m=workspace_m, **scaled)

    def stopping(self, robot: RobotDescription) -> StoppingLimits:
        """How to come to rest: as hard as the limits allow."""
        limits = self.limits(robot)
        linear, angular = limits.ee_linear_acceleration_m_s2, limits.ee_angular_acceleration_rad_s2
        return StoppingLimits(
            BRAKE_M_S2 if linear is None else linear,
            BRAKE_RAD_S2 if angular is None else angular,
            limits.ee_linear_jerk_m_s3,
            limits.ee_angular_jerk_rad_s3,
        )


DEFAULTS = GuardSettings()


def read_guard_file(path: str | Path) -> str:
    """What is in a file with the guard's settings.

    Raises:
        ConfigError: no such file, or it is not readable.
    """
    try:
        return Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f'guard settings {path}: {error}') from error


def read_guard_settings(path: str | Path, defaults: GuardSettings = DEFAULTS) -> GuardSettings:
    """Settings from a YAML file; what it leaves out keeps its default.

    Raises:
        ConfigError: no such file, an unknown key or rule, or a value that is out of range.
    """
    try:
        values = yaml.safe_load(read_guard_file(path))
    except yaml.YAMLError as error:
        raise ConfigError(f'guard settings {path}: {error}') from error
    return guard_settings({} if values is None else values, Path(path).name, defaults)


def guard_settings(values: Any, where: str, defaults: GuardSettings = DEFAULTS) -> GuardSettings:
    """Settings from a mapping with the names of `GuardSettings`' fields, `limits` for overrides.

    Raises:
        ConfigError: see `read_guard_settings`.
    """
    numbers = [field.name for field in fields(GuardSettings) if field.type == 'float']
    section = Section(
        values, where, (*numbers, 'ignored_rules', 'boxes', 'workspace_m', 'limits'), ConfigError
    )
    chosen: dict[str, Any] = {name: section.number(name) for name in numbers if name in section}
    if 'ignored_rules' in section:
        given = section.get('ignored_rules')
        chosen['ignored_rules'] = frozenset(() if given == [] else section.names('ignored_rules'))
    if 'boxes' in section:
        chosen['boxes'] = read_boxes(section.get('boxes'), where, ConfigError)
    if 'workspace_m' in section:
        corners = section.section('workspace_m', ('lower', 'upper'))
        chosen['workspace_m'] = np.stack([corners.numbers('lower', 3), corners.numbers('upper', 3)])
        if np.any(chosen['workspace_m'][0] >= chosen['workspace_m'][1]):
            raise ConfigError(f'{where}: workspace_m: lower must lie below upper')
    if 'limits' in section:
        given = section.get('limits')
        given = {} if given is None else given
        chosen['overrides'] = {**(defaults.overrides or {}), **given} if isinstance(given, Mapping) else given
    return replace(defaults, **chosen)
