"""Follows a stream of target poses, from a person or another program, inside the limits of the guard.

Each target is a motion of a single waypoint, to be reached a little later and at rest there, that begins where and
how fast the arm is told to move now. While targets keep coming the next one replaces it on the way; when they stop,
or one is refused, the arm comes to rest.

An arm that is further from where it is told to be than a first target may be from the arm (`join_m`, `join_rad`) does
not follow: somebody moved it by hand, or something holds it. A compliant arm's lag of some centimetres is less. It is
not pulled: the motion comes to rest, and if the arm is still elsewhere then, what was commanded is forgotten and
nothing is commanded until a target near the arm comes.

Nor does it go on where no command could be given for too long, as `runtime.steering` does it: the arm is held at the
last one, and the next target is approached from there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime.guard.guard import Guard, Request, missing_joints, well_formed
from decoupled_policy_ros.runtime.guard.verdict import Finding, GuardStatistics, Outcome
from decoupled_policy_ros.runtime.motion import NS_PER_S, MotionState, Path
from decoupled_policy_ros.runtime.steering import Joints, longest_gap_ns
from decoupled_policy_ros.runtime.stopping import Stop

Array = NDArray[np.float64]


class Follower:
    """Where the arm is told to be, for the latest target.

    Not for several threads at once: one calls it in turn with targets and ticks.

    Args:
        guard: checks every target.
        kinematics: of the arm, for where it is, before the first command and since.
        joints: where the arm is.
        horizon_s: each target is to be reached so much later; longer is smoother and lags more.
        timeout_s: without a new target for so long, the arm comes to rest.
        period_s: of the ticks.
    """

    def __init__(
        self,
        guard: Guard,
        kinematics: Kinematics,
        joints: Joints,
        horizon_s: float,
        timeout_s: float,
        period_s: float,
    ):
        self._guard, self._kinematics, self._joints = guard, kinematics, joints
        self._horizon_ns, self._timeout_ns = round(horizon_s * NS_PER_S), round(timeout_s * NS_PER_S)
        self._longest_ns = longest_gap_ns(round(period_s * NS_PER_S))
        self.statistics = GuardStatistics()
        self.reset()

    def reset(self) -> None:
        """Forget what was commanded: the next target is approached from where the arm is, at rest."""
        self._motion: Path | Stop | None = None
        self._last_ns = self._target_ns = 0
        self.reason = 'no target yet'

    @property
    def started(self) -> bool:
        """Whether anything has been commanded."""
        return self._last_ns > 0

    @property
    def holding(self) -> bool:
        """Whether the arm is coming to rest, or at rest, for a reason."""
        return self._motion is None or isinstance(self._motion, Stop)

    @property
    def at_rest(self) -> bool:
        """Whether the arm has been told to stay where it is: coming to rest is over."""
        return isinstance(self._motion, Stop) and self._last_ns >= self._motion.end_ns

    def target(self, pose_base_ee: Array, now_ns: int) -> Finding | None:
        """Go to a pose (4, 4) from now on; what it is refused for, if it is, and then the arm comes to rest."""
        self._mind_gap(now_ns)
        found = self._go(pose_base_ee, now_ns)
        if found is None:
            self._target_ns, self.reason = now_ns, ''
        return found

    def refuse(self, found: Finding, now_ns: int) -> None:
        """Come to rest, because a target can't be followed."""
        self.statistics.found((found,))
        self.hold(now_ns, str(found))

    def command(self, now_ns: int) -> Array | None:
        """Pose (4, 4) to command now; None as long as nothing has been commanded, or again where that was forgotten."""
        self._mind_gap(now_ns)
        away = self._away(now_ns)
        if now_ns - self._target_ns > self._timeout_ns and not self.holding:
            silence_s = (now_ns - self._target_ns) / NS_PER_S
            self.refuse(Finding('stale', Outcome.REJECT, silence_s, self._timeout_ns / NS_PER_S, 's'), now_ns)
        elif (
            not self.holding and self._guard.settings.needs_joints and self._joints.positions(now_ns) is None
        ):
            self.refuse(missing_joints(self._joints.why_not(now_ns)), now_ns)
        elif away is not None and not self.holding:
            self.refuse(away, now_ns)
        elif away is not None and self.at_rest:
            self.statistics.found((away,))
            self.reset()
            self.reason = str(away)
        elif not self.started and isinstance(self._motion, Path):
            # Afresh: the first command is where the arm is.
            self._go(self._motion.poses_base_ee[-1], now_ns)
        if self._motion is None:
            return None
        self._last_ns = now_ns
        return self._motion.state(now_ns).pose

    def _mind_gap(self, now_ns: int) -> None:
        """Stay at the last command if there was none for too long: the arm is there, and no longer on the way."""
        gap_ns = now_ns - self._last_ns
        if self.started and self._motion is not None and not self.at_rest and gap_ns > self._longest_ns:
            pose = self._motion.state(self._last_ns).pose
            self._motion = Stop.at_rest(pose, now_ns, self._guard.stopping)
            self._last_ns, self.reason = now_ns, f'no command for {gap_ns / NS_PER_S:.3f} s'

    def _go(self, pose_base_ee: Array, now_ns: int) -> Finding | None:
        found = well_formed(pose_base_ee[None]) or self._checked(pose_base_ee, now_ns)
        if found is not None:
            self.refuse(found, now_ns)
        return found

    def _checked(self, pose_base_ee: Array, now_ns: int) -> Finding | None:
        joints_rad = self._joints.positions(now_ns)
        if joints_rad is None:
            return missing_joints(self._joints.why_not(now_ns))
        if away := self._away(now_ns):
            return away
        if self._motion is not None and self.started:
            start_ns = self._last_ns
            start = self._motion.state(start_ns)
        else:  # what has not been commanded yet has no part in it
            start_ns = now_ns
            start = MotionState.at_rest(self._kinematics.forward(joints_rad))
        verdict = self._guard.check(
            Request(
                start,
                start_ns,
                pose_base_ee[None],
                [max(start_ns, now_ns) + self._horizon_ns],
                np.zeros(2),
                joints_rad,
                needed=1,
                unhurried=True,
            )
        )
        if verdict.path is None:
            rejection = verdict.rejection
            assert rejection is not None
            self.statistics.found(f for f in verdict.findings if f is not rejection)
            return rejection
        self.statistics.add(verdict)
        self._motion = verdict.path
        return None

    def _away(self, now_ns: int) -> Finding | None:
        """Whether the arm is too far from where it was told to be last."""
        joints_rad = self._joints.positions(now_ns)
        if self._motion is None or not self.started or joints_rad is None:
            return None
        told, arm = self._motion.state(self._last_ns).pose, self._kinematics.forward(joints_rad)
        return self._guard.apart(told, arm, detail='the way from the arm to the last command')

    def hold(self, now_ns: int, reason: str) -> None:
        """Come to rest, for a reason."""
        self.reason = reason
        if not self.started:
            self._motion = None
        elif isinstance(self._motion, Path):
            self._motion = Stop(
                self._motion, self._last_ns, self._guard.stopping, rests_ns=self._motion.end_ns
            )
