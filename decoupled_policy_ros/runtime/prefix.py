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

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
