"""What a chunk begins with: the motion that will have been executed by the time that it takes over.

A chunk is computed while the arm moves on. The waypoints of the new chunk that lie before it takes over will have been
executed from the old one, whatever the new one says of them; they are known, and pinned in the denoising loop. Those
after them are free in the end, but drawn towards what the arm would do otherwise, less and less:

    weight   1 |--------.
               |         '.
               |           '.
             0 |             '--------------------
                 executed | blend |  free

A backbone that mixes time then continues the pinned waypoints by itself. DP-MLP does not mix it: there the weights
after the pinned ones are all that makes the chunk join the motion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.runtime.motion import UnderWay

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Prefix:
    """Waypoints that a chunk shall agree with.

    Attributes:
        actions: (horizon, 10) in metres, see `robot.poses`.
        weight: (horizon,) in [0, 1]; 1 for what will have been executed, 0 for what is free.
    """

    actions: Array
    weight: Array


def prefix_of(under_way: UnderWay, stamps_ns: Sequence[int], takeover_ns: int, blend: int) -> Prefix:
    """The motion under way at the waypoints of a new chunk, and how much of it the chunk is held to.

    Args:
        under_way: what the arm was and will be told to do.
        stamps_ns: (horizon,) of the new chunk's waypoints.
        takeover_ns: from here on the new chunk is followed: what lies before is pinned.
        blend: waypoints from there on over which the weight falls to zero, evenly; less where the motion under way
            ends before.
    """
    stamps = np.asarray(stamps_ns, np.int64)
    executed = int(np.searchsorted(stamps, takeover_ns))
    falling = 1.0 - (np.arange(len(stamps)) - executed + 1) / (blend + 1)
    weight = np.where(stamps < takeover_ns, 1.0, np.clip(falling, 0.0, 1.0))
    weight[stamps > max(under_way.end_ns, takeover_ns - 1)] = 0.0
    waypoints = np.stack([under_way.state(stamp).pose for stamp in stamps_ns])
    # Where the gripper is left as it is, nothing is known of it: half way between open and closed.
    gripper = [under_way.gripper(stamp) or 0.0 for stamp in stamps_ns]
    return Prefix(poses.action_from_pose(waypoints, gripper), weight)
