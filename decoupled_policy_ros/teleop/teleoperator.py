"""From a device's intent to one command per tick: who may move the arm, from where, and when nobody may.

    disabled   nothing is commanded, because somebody said so
    waiting    nothing is commanded, for the arm's state is not there or too old
    ready      nothing is commanded yet: the deadman starts it, at the measured pose
    moving     the target follows the device
    holding    the deadman is released or the device silent, or commands are to end: the target stops within its
               acceleration and is commanded on, in the last case until it stands

After `disabled`, `waiting` or a jump of the clock the deadman must be seen released before it counts again, and the
target starts anew where the arm is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.teleop.devices import Device, Intent
from decoupled_policy_ros.teleop.gripper import standing_command
from decoupled_policy_ros.teleop.integrator import MotionLimits, TargetIntegrator

Array = NDArray[np.float64]

DISABLED, WAITING, READY, MOVING, HOLDING = 'disabled', 'waiting', 'ready', 'moving', 'holding'
COMING_TO_REST = 'coming to rest'


@dataclass(frozen=True, eq=False)
class ArmState:
    """The arm as measured: stamp, end-effector pose (4, 4) and gripper in [-1 open, +1 closed], None if unknown."""

    stamp_ns: int
    pose_base_ee: Array
    gripper: float | None


@dataclass(frozen=True, eq=False)
class Command:
    """What to publish for one tick; the gripper value first, and only when there is one."""

    pose_base_ee: Array
    gripper: float | None


class Teleoperator:
    """Makes one command per tick, or none.

    Args:
        device: what the operator holds.
        limits: of the target.
        state_timeout_s: age of the arm's state from which on nothing is commanded.
        missing: tells what is missing while there is no state of the arm at all.
    """

    def __init__(
        self, device: Device, limits: MotionLimits, state_timeout_s: float, missing: Callable[[], str]
    ):
        self.device = device
        self.integrator = TargetIntegrator(limits)
        self.state, self.reason = WAITING, ''
        self.silent = False
        self.commands = self.restarts = 0
        self.enabled = True
        self._state_timeout_ns = round(state_timeout_s * 1e9)
        self._missing = missing
        self._arm: ArmState | None = None
        self._tick_ns = 0
        self._commanding = self._armed = self._ending = False

    @property
    def commanding(self) -> bool:
        """Whether commands go out."""
        return self._commanding

    def enable(self, enabled: bool) -> None:
        """Let commands through, once the deadman is pressed; or none any more, once the target has come to rest.

        What is enabled already goes on as it is.
        """
        if enabled and self.enabled:
            return
        self.enabled = enabled
        if self._commanding and not self.integrator.at_rest:
            self._ending = True
            self.state, self.reason = HOLDING, COMING_TO_REST
        else:
            self._stop()
            self.state, self.reason = (WAITING, '') if enabled else (DISABLED, '')

    def restart(self) -> None:
        """Begin anew, as after a jump of the clock."""
        self._stop()
        self.device.forget()
        self._arm, self._tick_ns = None, 0

    def lead(self) -> tuple[float, float]:
        """Metres and radians from the measured pose to the target; zero while nothing is commanded."""
        if self._arm is None or not self._commanding:
            return 0.0, 0.0
        return self.integrator.lead(self._arm.pose_base_ee)

    def tick(self, now_ns: int, arm: ArmState | None) -> Command | None:
        """The command for a time of the node's clock, with the arm's newest state; times must increase."""
        dt_s = (now_ns - self._tick_ns) * 1e-9 if self._tick_ns else 0.0
        self._tick_ns = now_ns
        trouble = self._trouble(now_ns, arm)
        if self._ending and self.integrator.at_rest:
            self._stop()
        if trouble or not (self.enabled or self._ending):
            self._stop()
            self.device.gripper.drop()
            self.state, self.reason = (DISABLED, '') if not self.enabled else (WAITING, trouble)
            return None
        assert arm is not None
        target = self.integrator.pose if self._commanding else arm.pose_base_ee
        intent = self.device.intent(now_ns, target)
        self.silent = intent.silent
        if not intent.engaged:
            self._armed = self._armed or not intent.silent
        if not self._commanding:
            if not (intent.engaged and self._armed):
                self.device.gripper.drop()
                self.state, self.reason = READY, intent.reason or 'release the deadman first'
                return None
            return self._start(arm)
        return self._go_on(dt_s, intent, arm)

    def _trouble(self, now_ns: int, arm: ArmState | None) -> str:
        """Why the arm's state can't be relied on; empty if it can."""
        last, self._arm = self._arm, arm
        if arm is None:
            return self._missing()
        age_ns = now_ns - arm.stamp_ns
        if abs(age_ns) > self._state_timeout_ns:
            when = f'{age_ns * 1e-9:.2f} s old' if age_ns > 0 else f'{-age_ns * 1e-9:.2f} s in the future'
            return f"the arm's state is {when}, limit {self._state_timeout_ns * 1e-9:g} s"
        if self._commanding and last is not None and arm.stamp_ns - last.stamp_ns > self._state_timeout_ns:
            gap_s = (arm.stamp_ns - last.stamp_ns) * 1e-9
            return f"the arm's state was gone for {gap_s:.2f} s"
        return ''

    def _start(self, arm: ArmState) -> Command:
        """First command: exactly where the arm is, and what its gripper does already."""
        self._commanding = True
        self.integrator.start(arm.pose_base_ee)
        self.state, self.reason = MOVING, ''
        gripper = self.device.gripper
        gripper.sync(None if arm.gripper is None else standing_command(arm.gripper))
        gripper.take()
        self.commands += 1
        return Command(arm.pose_base_ee.copy(), gripper.value)

    def _go_on(self, dt_s: float, intent: Intent, arm: ArmState) -> Command:
        if self._ending or not intent.engaged:
            pose = self.integrator.step(dt_s, np.zeros(6), arm.pose_base_ee)
            self.state, self.reason = HOLDING, COMING_TO_REST if self._ending else intent.reason
        elif intent.goal is not None:
            pose = self.integrator.step_towards(dt_s, intent.goal, arm.pose_base_ee)
            self.state, self.reason = MOVING, self._bounds()
        else:
            pose = self.integrator.step(dt_s, self._in_base(intent.twist), arm.pose_base_ee)
            self.state, self.reason = MOVING, self._bounds()
        self.commands += 1
        return Command(pose, self.device.gripper.take())

    def _in_base(self, twist: Array) -> Array:
        if self.device.mapping.frame == 'base':
            return twist
        rotation = self.integrator.pose[:3, :3]
        return np.concatenate([rotation @ twist[:3], rotation @ twist[3:]])

    def _bounds(self) -> str:
        outside_m = self.integrator.outside_m()
        if outside_m > 0.0:
            return f'{outside_m:.3f} m outside the workspace: only the way back in is free'
        names = {'workspace': 'at the edge of the workspace', 'lead': 'the arm does not keep up'}
        return ', '.join(names[name] for name in sorted(self.integrator.bounded))

    def _stop(self) -> None:
        if self._commanding:
            self.restarts += 1
        self._commanding = self._armed = self._ending = False
