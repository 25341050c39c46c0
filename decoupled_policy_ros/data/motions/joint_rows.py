"""Joint state messages to the rows that Stage 1 keeps: arm joints and the normalised gripper, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.errors import MessageError
from decoupled_policy_ros.observation.messages import joint_positions_from_message, stamp_ns
from decoupled_policy_ros.robot.description import RobotDescription

Array = NDArray[np.float64]
Stamps = NDArray[np.int64]

MAX_GRIPPER_AGE_S = 0.5  # Franka's gripper reports at 15 Hz
GRIPPER_MEMORY_S = 30.0  # arm states may come this much later than the gripper's


class JointRows:
    """Turns joint states into rows (n + 1,); what can't be turned is left out, counted and explained.

    Args:
        robot: whose joints are looked for.
        gripper_apart: the gripper's joints come in messages of their own; each arm state then takes the latest
            gripper state at or before its stamp, and is rejected where that is missing or old.
    """

    def __init__(self, robot: RobotDescription, gripper_apart: bool = False):
        self.robot = robot
        self.rejected: Counter[str] = Counter()
        self.foreign = 0  # states of other joints altogether: another robot's, or the other half of this one
        self.last_rejection = ''
        self._apart = gripper_apart
        self._names = robot.joint_names if gripper_apart else robot.all_joint_names
        self._gripper: tuple[Stamps, Array] = (np.empty(0, np.int64), np.empty(0))  # as they came

    def rows(self, messages: Iterable[Any], gripper_messages: Iterable[Any] = ()) -> tuple[Stamps, Array]:
        """Stamps (T,) and rows (T, n + 1) of the messages that are sound."""
        arm_joints = len(self.robot.joint_names)
        stamps, positions = self._collect(messages, self._names)
        if not self._apart:
            gripper = self.robot.gripper.normalised(positions[:, arm_joints:])
            return stamps, np.concatenate([positions[:, :arm_joints], gripper[:, None]], -1)
        new_stamps, new_positions = self._collect(gripper_messages, self.robot.gripper.joint_names)
        gripper_stamps = np.concatenate([self._gripper[0], new_stamps])
        gripper = np.concatenate([self._gripper[1], self.robot.gripper.normalised(new_positions)])
        self._remember(gripper_stamps, gripper)
        order = np.argsort(gripper_stamps, kind='stable')
        gripper_stamps, gripper = gripper_stamps[order], gripper[order]
        index = np.searchsorted(gripper_stamps, stamps, side='right') - 1
        age_s = np.full(len(stamps), np.inf)
        known = index >= 0
        age_s[known] = (stamps[known] - gripper_stamps[index[known]]) / 1e9
        fresh = age_s <= MAX_GRIPPER_AGE_S
        if not fresh.all():
            self._reject(
                'gripper',
                int((~fresh).sum()),
                f'no gripper state within {MAX_GRIPPER_AGE_S} s before an arm state',
            )
        return stamps[fresh], np.concatenate([positions[fresh], gripper[index[fresh]][:, None]], -1)

    def _remember(self, stamps: Stamps, values: Array) -> None:
        """Keep the gripper states that later arm states may ask for; none from before its clock was set back."""
        jumps = np.flatnonzero(np.diff(stamps) < -MAX_GRIPPER_AGE_S * 1e9)
        since = int(jumps[-1]) + 1 if len(jumps) else 0
        stamps, values = stamps[since:], values[since:]
        kept = stamps >= stamps.max(initial=0) - GRIPPER_MEMORY_S * 1e9
        self._gripper = stamps[kept], values[kept]

    def _collect(self, messages: Iterable[Any], names: tuple[str, ...]) -> tuple[Stamps, Array]:
        stamps, positions = [], []
        for message in messages:
            if set(names).isdisjoint(message.name):
                self.foreign += 1
                continue
            try:
                stamp = stamp_ns(message.header.stamp)
            except MessageError as error:
                self._reject('unstamped', 1, str(error))
                continue
            try:
                positions.append(joint_positions_from_message(message, names))
                stamps.append(stamp)
            except MessageError as error:
                self._reject('joints', 1, str(error))
        return np.array(stamps, np.int64), np.array(positions, float).reshape(len(stamps), len(names))

    def _reject(self, reason: str, count: int, explanation: str) -> None:
        self.rejected[reason] += count
        self.last_rejection = explanation
