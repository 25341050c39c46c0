"""What the policy's loop can be doing, how it streams, and to whom it speaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.runtime.chunks import Chunk

DISABLED, WAITING, FOLLOWING, HOLDING, FAILED = 'disabled', 'waiting', 'following', 'holding', 'failed'
#: Somebody else commands the arm: nothing is said until it is asked for.
GAVE_WAY = 'gave_way'
#: What the arm is told ('output') that means target poses, and that means joint trajectories.
IN_POSES, IN_JOINTS = ('pose', 'both'), ('joint_trajectory', 'both')
#: At rest for so long, for a reason that does not go by itself, that somebody should look.
NEEDS_HELP = 'needs_help'


class Outputs(Protocol):
    """Where commands go."""

    def publish_command(self, pose_base_ee: NDArray[np.float64], stamp_ns: int) -> None:
        """Send a target pose (4, 4)."""

    def publish_gripper(self, state: str) -> None:
        """Send the gripper to 'open' or 'closed'."""

    def publish_chunk(self, chunk: Chunk, others: Sequence[Chunk]) -> None:
        """Show the whole chunk, and the samples that are not followed."""

    def publish_state(self, state: str, reason: str) -> None:
        """Tell what the policy is doing, and why."""


@dataclass(frozen=True)
class LoopSettings:
    """How commands are streamed, and which cores the worker runs on; any where none are named."""

    lockstep: bool
    control_rate_hz: float
    gripper_hysteresis: float
    seed: int
    cores: frozenset[int] = frozenset()

    @property
    def command_period_ns(self) -> int | None:
        """Time from one command to the next; None where time waits for commands."""
        return command_period_ns(self.lockstep, self.control_rate_hz)


def command_period_ns(lockstep: bool, control_rate_hz: float) -> int | None:
    """Time from one command to the next; None where time waits for commands."""
    return None if lockstep else round(1e9 / control_rate_hz)
