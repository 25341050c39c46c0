"""Steering of an arm that needs others, such as an action server: what is missing is reported, and may stop it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.guard.guard import Guard
from decoupled_policy_ros.runtime.motion import UnderWay
from decoupled_policy_ros.runtime.steering import ChunkRejected, Plan, Steering


class Part(Protocol):
    """Something that the arm is commanded through."""

    def missing(self) -> str:
        """What is missing for it to work, or nothing."""

    def trouble(self) -> str:
        """What is missing, or went wrong."""

    def forget(self) -> None:
        """Say no more of what was commanded and could not be said yet."""


class Dependent:
    """Steering that refuses chunks as long as a part is missing, or only says so.

    Args:
        steering: decides everything else.
        parts: by the names that they are reported under.
        hold: refuse chunks, so that the arm comes to rest.
    """

    def __init__(self, steering: Steering, parts: Mapping[str, Part], hold: bool):
        self._steering, self._parts, self._hold = steering, parts, hold

    @property
    def guard(self) -> Guard | None:
        """What checks the chunks, if anything does."""
        return self._steering.guard

    def plan(self, chunk: Chunk, now_ns: int) -> Plan:
        """What the steering plans; raises ChunkRejected where it does, and where a part is missing."""
        missing = [f'{name}: {text}' for name, part in self._parts.items() if (text := part.missing())]
        if missing and self._hold:
            raise ChunkRejected('; '.join(missing))
        return self._steering.plan(chunk, now_ns)

    def adopt(self, plan: Plan) -> bool:
        """Follow a plan."""
        return self._steering.adopt(plan)

    def under_way(self) -> UnderWay | None:
        """What the arm does if nothing new comes."""
        return self._steering.under_way()

    def follow(self, now_ns: int) -> tuple[NDArray[np.float64], float | None]:
        """Pose (4, 4) and gripper value for a time."""
        return self._steering.follow(now_ns)

    def hold(self, now_ns: int, begin: bool = False) -> NDArray[np.float64] | None:
        """Pose (4, 4) for a time at which nothing new is known."""
        return self._steering.hold(now_ns, begin)

    def missed_s(self, now_ns: int) -> float:
        """For how long (s) no command was given, if that is too long."""
        return self._steering.missed_s(now_ns)

    def reset(self, silently: bool = False) -> None:
        """Forget what was commanded."""
        self._steering.reset(silently)
        for part in self._parts.values():
            part.forget()

    def values(self) -> dict[str, str]:
        """What the steering reports, and the trouble with each part."""
        return self._steering.values() | {
            name: part.trouble() or 'ready' for name, part in self._parts.items()
        }
