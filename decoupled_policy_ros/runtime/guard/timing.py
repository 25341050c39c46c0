"""How fast a path may be travelled: where it breaks a limit, its segments are made longer until it doesn't.

All that moves is looked at in one array: position (3), rotation (3) and the joints (n), as steps from one waypoint to
the next. On the lines of a `runtime.motion.Path` nothing accelerates, so the speeds are those of the lines; a corner
in which the velocity changes by dv and that takes 2 b has the acceleration dv / 2 b, and the jerk dv / 2 b^2 if that
acceleration rises and falls over the corner's halves. With the widest corners that fit, b is half a segment: these are
then the second and third differences of the waypoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.robot.description import Limits
from decoupled_policy_ros.robot.limits import CREEP_SHARE
from decoupled_policy_ros.runtime.guard.joints import JointPath
from decoupled_policy_ros.runtime.guard.settings import GuardSettings
from decoupled_policy_ros.runtime.motion import slopes, widest_corners

Array = NDArray[np.float64]

#: Order of the derivative that each limit is one of, and thereby the power with which slowing down helps.
ORDERS = {'velocity': 1, 'acceleration': 2, 'jerk': 3}
#: Share of a limit that is used: rotation vectors do not add up exactly like numbers.
HEADROOM = {'linear': 1.0, 'angular': 0.96, 'joint': 1.0}
#: A limit that is kept but for rounding.
KEPT = 1.0 + 1e-9
_MAX_ROUNDS = 60
_BISECTIONS = 8
_TURNS = 4


@dataclass(frozen=True, eq=False)
class Moving:
    """Steps (n, 6 + joints) along a path, the velocity (6 + joints,) at its start, and the limits that hold.

    `limits` maps a rule's name to what its values are measured against: a number for the norm of position or
    rotation, an array (joints,) or (n, joints) for the joints one by one.
    """

    steps: Array
    start: Array
    limits: dict[str, float | Array]


def motion_limits(
    limits: Limits, settings: GuardSettings, joints: JointPath | None
) -> dict[str, float | Array]:
    """Limits of a path by rule; the joints' where it is known what they do."""
    table: dict[str, float | Array | None] = {
        'linear_velocity': limits.ee_linear_velocity_m_s,
        'linear_acceleration': limits.ee_linear_acceleration_m_s2,
        'linear_jerk': limits.ee_linear_jerk_m_s3,
        'angular_velocity': limits.ee_angular_velocity_rad_s,
        'angular_acceleration': limits.ee_angular_acceleration_rad_s2,
        'angular_jerk': limits.ee_angular_jerk_rad_s3,
    }
    if joints is not None:
        points_rad = joints.joints_rad
        directions = np.diff(points_rad, axis=0)
        fastest = [limits.velocity_towards(q, directions) for q in (points_rad[:-1], points_rad[1:])]
        slowest = joints.least(np.minimum(*fastest))
        # Near an end of its range a joint must still be able to creep up to it.
        table['joint_velocity'] = np.maximum(slowest, CREEP_SHARE * limits.velocity_rad_s)
        table['joint_acceleration'] = limits.acceleration_rad_s2
        table['joint_jerk'] = limits.jerk_rad_s3
    return {rule: limit for rule, limit in table.items() if limit is not None and settings.looks_at(rule)}


def ratios(moving: Moving, durations_s: Array, at_rest: bool) -> dict[str, Array]:
    """What each segment reaches of each limit, (n,) by rule: above 1 it breaks it.

    Args:
        moving: the path.
        durations_s: (n,) of its segments.
        at_rest: whether it comes to rest at the last waypoint; else it goes on from there.
    """
    lines = slopes(moving.steps, durations_s, moving.start)
    changes, halves = np.diff(lines, axis=0), widest_corners(durations_s)
    if not at_rest:
        changes[-1] = 0.0
    shares = {}
    for rule, limit in moving.limits.items():
        what, _, derivative = rule.partition('_')
        if derivative == 'velocity':
            share = _share(what, lines[1:-1], limit)
        else:
            corner = _share(what, changes, limit) / (2 * halves ** (ORDERS[derivative] - 1))
            share = np.maximum(corner[:-1], corner[1:])
        shares[rule] = share / HEADROOM[what]
    return shares


def corners(moving: Moving, durations_s: Array, turn_s: float | None = None) -> Array:
    """Half the time (n + 1,) that each corner has to take for the limits to hold; 0 where none is limited."""
    changes = np.diff(slopes(moving.steps, durations_s, moving.start, turn_s), axis=0)
    needed: Array = np.zeros(len(changes))
    for rule, limit in moving.limits.items():
        what, _, derivative = rule.partition('_')
        if derivative != 'velocity':
            share = _share(what, changes, limit) / HEADROOM[what] / 2
            needed = np.maximum(needed, share ** (1 / (ORDERS[derivative] - 1)))
    return needed


def rounding(moving: Moving, durations_s: Array) -> tuple[Array, float]:
    """How a path is rounded: half the time (n + 1,) of each corner, and the time (s) of the first one.

    That is so soon that the path begins with it: a motion that turned later would not have turned yet when the next one
    replaces it, and would go on meanwhile as the one before. The velocity after it then lies between the one at the
    start and the one after a corner at a quarter of the first segment. Where that is too fast, or the corner after it
    has too much to turn, the first one is later, and at a quarter all limits are known to hold.
    """
    latest_s, widest_s = float(durations_s[0]) / 4, widest_corners(durations_s)
    halves_s = corners(moving, durations_s)
    soonest_s = float(halves_s[0])
    for _ in range(_TURNS):  # the sooner it turns, the less it has to
        soonest_s = float(corners(moving, durations_s, soonest_s)[0])
    for turn_s in np.linspace(soonest_s, latest_s, _TURNS)[:-1].tolist():
        sooner_s = corners(moving, durations_s, turn_s)
        line = slopes(moving.steps, durations_s, moving.start, turn_s)[1:2]
        keeps = sooner_s[0] <= turn_s * KEPT and (sooner_s[1:] <= widest_s[1:]).all()
        if keeps and _too_fast(moving, line) <= KEPT:
            return np.concatenate([[turn_s], sooner_s[1:]]), turn_s
    return halves_s, latest_s


def _too_fast(moving: Moving, line: Array) -> float:
    """What the velocity (1, 6 + joints) on the first segment reaches of the limits of velocity."""
    shares = [0.0]
    for rule, limit in moving.limits.items():
        what, _, derivative = rule.partition('_')
        if derivative == 'velocity':
            first = limit[:1] if isinstance(limit, np.ndarray) and limit.ndim == 2 else limit
            shares.append(float(_share(what, line, first)[0]) / HEADROOM[what])
    return max(shares)


def stretch(moving: Moving, durations_s: Array, at_rest: bool, least: Array, largest: float) -> Array | None:
    """Factors (n,) for the durations with which every limit holds; None if one above `largest` is needed.

    A segment is made longer by what it breaks its limits by, and no more: uniformly, if all break them alike. The way
    stays the same.

    Args:
        moving: the path.
        durations_s: (n,) meant for its segments.
        at_rest: see `ratios`.
        least: (n,) factors to begin with.
        largest: factor.
    """
    factors: Array = least.copy()
    for round_ in range(_MAX_ROUNDS):
        if factors.max() > largest:
            return None
        needed = _needed(moving, factors * durations_s, at_rest)
        if needed.max() <= KEPT:
            return _tightened(moving, durations_s, at_rest, least[0], factors)
        # A segment alone can't help itself where its neighbours arrive too fast.
        if round_ > _MAX_ROUNDS // 2:
            needed[1:] = np.maximum(needed[1:], np.sqrt(needed[:-1]))
            needed[:-1] = np.maximum(needed[:-1], np.sqrt(needed[1:]))
        factors = factors * np.where(needed > 1.0, needed * 1.001, 1.0)
    return None


def _needed(moving: Moving, durations_s: Array, at_rest: bool) -> Array:
    """Factor (n,) by which each segment should take longer, at least 1."""
    needed: Array = np.ones(len(durations_s))
    for rule, share in ratios(moving, durations_s, at_rest).items():
        needed = np.maximum(needed, share ** (1 / ORDERS[rule.rpartition('_')[2]]))
    return needed


def _tightened(moving: Moving, durations_s: Array, at_rest: bool, least: float, factors: Array) -> Array:
    """The factors with the smallest first one that keeps the limits: slowing down does not change the velocity with
    which a path begins, so that the first segment may have been made longer than it has to be.
    """
    low, high = float(least), float(factors[0])
    if high > low:
        for _ in range(_BISECTIONS):
            middle = np.concatenate([[(low + high) / 2], factors[1:]])
            if _needed(moving, middle * durations_s, at_rest).max() <= KEPT:
                high = float(middle[0])
            else:
                low = float(middle[0])
    return np.concatenate([[high], factors[1:]])


def _share(what: str, values: Array, limit: float | Array) -> Array:
    """Norm or largest joint of values (m, 6 + joints) over the limit, (m,)."""
    if what == 'joint':
        return (np.abs(values[:, 6:]) / limit).max(1)
    part = values[:, :3] if what == 'linear' else values[:, 3:6]
    return np.sqrt((part * part).sum(-1)) / limit
