"""Several chunks for one observation: which of them goes on from what the arm is doing, and how far apart they are.

What K samples agree about the policy knows; where they lie apart it does not, or there are several ways. The one that
is followed is the one that continues the motion under way best, in position and velocity where it takes over. How far
the samples lie apart decides whether it is followed at its own speed, more slowly, or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.runtime.motion import NS_PER_S, UnderWay
from decoupled_policy_ros.runtime.steering import ChunkRejected

Array = NDArray[np.float64]

#: A turn of one radian counts as much as this way (m): that of the fingertips about the wrist.
LEVER_M = 0.1
#: No chunk is made slower than this many times: what would have to be is a reason to hold.
SLOWEST = 4.0


class SamplesDisagree(ChunkRejected):
    """The samples of one observation lie too far apart to follow any of them.

    Attributes:
        needs_help: they have done so for so long that somebody should look.
    """

    def __init__(self, message: str, needs_help: bool):
        super().__init__(message)
        self.needs_help = needs_help


@dataclass(frozen=True)
class SpreadLimits:
    """What is done about samples that lie apart; 0 switches one off.

    Attributes:
        slow_m: above this spread a chunk is followed more slowly, in proportion.
        hold_m: above this spread no chunk is followed.
        help_s: somebody is asked for help when that has been so for this long.

    Raises:
        ConfigError: a limit is negative or not a number, or holding begins before slowing down.
    """

    slow_m: float = 0.0
    hold_m: float = 0.0
    help_s: float = 5.0

    def __post_init__(self) -> None:
        for name in ('slow_m', 'hold_m', 'help_s'):
            value = getattr(self, name)
            if not 0.0 <= value < np.inf:
                raise ConfigError(f'spread_{name} must be 0 (off) or positive, got {value}')
        if 0.0 < self.hold_m < self.slow_m:
            raise ConfigError(
                f'spread_hold_m {self.hold_m:g} must not be below spread_slow_m {self.slow_m:g}: '
                'what is held is not slowed down before'
            )

    def slowing(self, spread_m: float) -> float:
        """How many times slower a chunk is to be followed, from 1 to SLOWEST."""
        if self.slow_m == 0.0:
            return 1.0
        return min(max(spread_m / self.slow_m, 1.0), SLOWEST)

    def holds(self, spread_m: float) -> bool:
        """Whether no chunk is to be followed."""
        return 0.0 < self.hold_m < spread_m


def spread_m(positions_m: Array) -> float:
    """How far apart samples (K, n, 3) are where they are farthest: the root mean square distance from their mean."""
    apart = positions_m - positions_m.mean(0)
    return float(np.sqrt((apart**2).sum(-1).mean(0)).max(initial=0.0))


def most_typical(positions_m: Array) -> int:
    """Index of the sample (K, n, 3) with the least sum of distances to the others, the first of several."""
    apart = np.linalg.norm(positions_m[:, None] - positions_m[None], axis=-1)
    return int(np.argmin(apart.sum((1, 2))))


def join_errors_m(poses_base_ee: Array, stamps_ns: Sequence[int], under_way: UnderWay, join_ns: int) -> Array:
    """How far samples are from continuing a motion, (K,): differences of pose, and of velocity over one waypoint.

    Args:
        poses_base_ee: (K, n, 4, 4) waypoints of each sample.
        stamps_ns: (n,) of the waypoints.
        under_way: the motion.
        join_ns: where it is left.
    """
    after = int(np.clip(np.searchsorted(stamps_ns, join_ns, side='right'), 1, len(stamps_ns) - 1))
    begin_ns, end_ns = stamps_ns[after - 1], stamps_ns[after]
    fraction, period_s = (join_ns - begin_ns) / (end_ns - begin_ns), (end_ns - begin_ns) / NS_PER_S
    state = under_way.state(join_ns)
    errors = []
    for before, way in zip(poses_base_ee[:, after - 1], poses_base_ee[:, after], strict=True):
        pose = poses.interpolate(before, way, fraction)
        linear = (way[:3, 3] - before[:3, 3]) / period_s
        angular = Rotation.from_matrix(way[:3, :3] @ before[:3, :3].T).as_rotvec() / period_s
        turned = Rotation.from_matrix(state.pose[:3, :3].T @ pose[:3, :3]).magnitude()
        errors.append(
            np.linalg.norm(pose[:3, 3] - state.pose[:3, 3])
            + LEVER_M * turned
            + period_s * np.linalg.norm(linear - state.linear_m_s)
            + LEVER_M * period_s * np.linalg.norm(angular - state.angular_rad_s)
        )
    return np.array(errors)
