"""Cuts a stream of joint states into motions and writes each to a file of its own: idle time stays out.

    moving    ___-------_____---___________________------
    recorded    [-----------------]              [-------
                              |--| idle_time_s

A sample moves when some joint went further than the idle speed allows during the last SPEED_WINDOW_S. A motion
begins one window before its first moving sample and ends with its last one, once nothing has moved for
`idle_time_s`; shorter rests belong to the motion. Samples of a rest are held back until it is known which of
the two it is. A gap between stamps, or a step that no arm can make, ends a motion at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.data.motions.files import SUFFIX, MotionWriter
from decoupled_policy_ros.data.motions.kinematic_residual import ResidualStatistics, pose_residuals
from decoupled_policy_ros.data.motions.motions import AS_RECORDED_HZ, MAX_GAP_S, motion_actions
from decoupled_policy_ros.errors import ConfigError, DatasetError
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.kinematics import Kinematics

Array = NDArray[np.float64]
Stamps = NDArray[np.int64]

SPEED_WINDOW_S = 0.1
CLOCK_JUMP_S = 1.0  # a stamp that lies this far back is a clock that was set back, not a late message
HISTORY_S = 5.0  # of samples kept to compare measured poses with
STEP_MARGIN_RAD = 0.02  # of measurement noise, on top of twice the fastest step
_NS = 1_000_000_000


@dataclass(frozen=True)
class MotionSettings:
    """When the arm counts as moving, and which motions are worth a file."""

    idle_speed_rad_s: float = 0.01
    idle_gripper_speed: float = 0.05  # of the gripper's [-1, 1], per second
    idle_time_s: float = 0.5
    min_motion_s: float = 0.5
    max_gap_s: float = MAX_GAP_S

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ConfigError(f'{field.name} must be positive, got {getattr(self, field.name)}')


@dataclass
class Counters:
    """What became of the samples and motions."""

    samples: int = 0  # accepted, recorded or not
    recorded: int = 0  # on disk or on their way there
    out_of_order: int = 0
    clock_jumps: int = 0
    gaps: int = 0
    steps: int = 0
    files: int = 0
    too_short: int = 0


class MotionRecorder:
    """Takes joint states in blocks and keeps the motions among them in `folder`; not thread-safe.

    Args:
        folder: is made, now and whenever a motion begins; what a killed recorder left in it is not touched, see
            `MotionWriter.recover`.
        robot: whose joints these are.
        settings: thresholds.
    """

    def __init__(self, folder: str | Path, robot: RobotDescription, settings: MotionSettings | None = None):
        self.folder = Path(folder)
        self.settings = settings or MotionSettings()
        self.robot = robot
        self.kinematics = Kinematics(robot)
        self.fingerprint = Fingerprint.of(robot, AS_RECORDED_HZ)
        self.counters = Counters()
        self.residual = ResidualStatistics()
        self._make_folder()
        self._index = 0
        self._writer: MotionWriter | None = None
        # Of poses that may lie in a motion: their stamps, and (P, 2) metres and radians.
        self._unsettled: tuple[Stamps, Array]
        self._reset()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatasetError(f'{self.folder} can not be made: {error}') from error

    @property
    def newest_ns(self) -> int:
        """Stamp of the newest sample since the last cut; far in the past without any."""
        return int(self._history[0][-1]) if len(self._history[0]) else int(np.iinfo(np.int64).min // 2)

    @property
    def recording(self) -> bool:
        """Whether a motion is being written."""
        return self._writer is not None

    def push(self, stamps_ns: Stamps, joints: Array) -> None:
        """Take a block of samples: times (T,), arm joints in rad with the normalised gripper (T, n + 1).

        Samples that are not newer than all before them are left out and counted.

        Raises:
            DatasetError: a file can't be written.
        """
        if not len(stamps_ns):
            return
        back = np.flatnonzero(stamps_ns < self._newest_before(stamps_ns) - round(CLOCK_JUMP_S * _NS))
        if len(back):
            first = int(back[0])
            self.push(stamps_ns[:first], joints[:first])
            self.counters.clock_jumps += 1
            self.finish()
            self.push(stamps_ns[first:], joints[first:])
            return
        newer = stamps_ns > self._newest_before(stamps_ns)
        self.counters.out_of_order += int((~newer).sum())
        stamps_ns, joints = stamps_ns[newer], joints[newer]
        self.counters.samples += len(stamps_ns)
        cuts = self._cuts(stamps_ns, joints)
        for first, end in zip([0, *cuts], [*cuts, len(stamps_ns)], strict=True):
            if first in cuts:
                self.finish()
            if end > first:
                self._push_run(stamps_ns[first:end], joints[first:end])
        self.flush()

    def push_poses(self, pose_stamps_ns: Stamps, poses_base_ee: Array) -> None:
        """Compare measured poses (P, 4, 4) with the joint states pushed before; those too new or old are left out."""
        inside, position_m, rotation_rad = pose_residuals(
            self.kinematics,
            self._history[0],
            self._history[1][:, :-1],
            pose_stamps_ns,
            poses_base_ee,
            self.settings.max_gap_s,
        )
        self.residual.add(position_m, rotation_rad)
        stamps_ns, residuals = self._unsettled
        stamps_ns = np.concatenate([stamps_ns, pose_stamps_ns[inside]])
        residuals = np.concatenate([residuals, np.stack([position_m, rotation_rad], -1)])
        if self._writer is None:  # the motion that may begin goes back to what is held
            held_ns = self._held[0]
            kept = stamps_ns >= (held_ns[0] if len(held_ns) else self.newest_ns)
            stamps_ns, residuals = stamps_ns[kept], residuals[kept]
        self._unsettled = stamps_ns, residuals

    def flush(self) -> None:
        """Hand what is known to belong to the motion to the operating system."""
        if self._writer is not None:
            self._settle_residuals(self._writer)
            self._writer.flush()

    def finish(self) -> None:
        """End the motion, if there is one, and forget what came before: the next sample starts anew."""
        self._end_motion()
        self._reset()

    def abandon(self) -> None:
        """Leave the motion's file as it is, for `MotionWriter.recover`: the disk takes no more."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        self._reset()

    # --- the stream ------------------------------------------------------------------------------

    def _reset(self) -> None:
        width = len(self.robot.joint_names) + 1
        self._history: tuple[Stamps, Array] = (np.empty(0, np.int64), np.empty((0, width)))
        self._unsettled = (np.empty(0, np.int64), np.empty((0, 2)))
        self._held: tuple[Stamps, Array, NDArray[np.bool_]] = (*self._history, np.empty(0, bool))

    def _newest_before(self, stamps_ns: Stamps) -> Stamps:
        """For each sample the newest stamp of all samples before it."""
        return np.maximum.accumulate(np.concatenate([[self.newest_ns], stamps_ns[:-1]]))

    def _cuts(self, stamps_ns: Stamps, joints: Array) -> list[int]:
        """Indices of the samples that can't continue the motion of the sample before."""
        history_ns, history = self._history
        has_history = len(history_ns) > 0
        if has_history:
            stamps_ns, joints = np.append(history_ns[-1], stamps_ns), np.concatenate([history[-1:], joints])
        step_s = np.diff(stamps_ns) / _NS
        gap = step_s > self.settings.max_gap_s
        largest = 2 * self.robot.limits.velocity_rad_s * step_s[:, None] + STEP_MARGIN_RAD
        impossible = np.any(np.abs(np.diff(joints[:, :-1], axis=0)) > largest, axis=-1) & ~gap
        self.counters.gaps += int(gap.sum())
        self.counters.steps += int(impossible.sum())
        return (np.flatnonzero(gap | impossible) + (0 if has_history else 1)).tolist()

    def _push_run(self, stamps_ns: Stamps, joints: Array) -> None:
        window = np.searchsorted(self._history[0], stamps_ns[0] - 2 * round(SPEED_WINDOW_S * _NS))
        history_ns = np.concatenate([self._history[0], stamps_ns])
        history = np.concatenate([self._history[1], joints])
        moving = self._moving(history_ns[window:], history[window:])[-len(stamps_ns) :]
        keep = np.searchsorted(history_ns, history_ns[-1] - round(HISTORY_S * _NS))
        self._history = history_ns[keep:], history[keep:]
        held_ns, held, held_moving = self._held
        self._held = (
            np.concatenate([held_ns, stamps_ns]),
            np.concatenate([held, joints]),
            np.concatenate([held_moving, moving]),
        )
        while self._advance():
            pass

    def _moving(self, stamps_ns: Stamps, joints: Array) -> NDArray[np.bool_]:
        window_ns = round(SPEED_WINDOW_S * _NS)
        reference = np.maximum(np.searchsorted(stamps_ns, stamps_ns - window_ns, side='right') - 1, 0)
        time_s = np.maximum(stamps_ns - stamps_ns[reference], window_ns) / _NS
        speed = np.abs(joints - joints[reference]) / time_s[:, None]
        limits = np.full(joints.shape[1], self.settings.idle_speed_rad_s)
        limits[-1] = self.settings.idle_gripper_speed
        return np.any(speed > limits, axis=-1)

    # --- motions ---------------------------------------------------------------------------------

    def _advance(self) -> bool:
        """Begin, continue or end a motion with the samples held; whether there may be more to do."""
        stamps_ns, _, moving = self._held
        window_ns, idle_ns = round(SPEED_WINDOW_S * _NS), round(self.settings.idle_time_s * _NS)
        if self._writer is None:
            if not moving.any():
                self._drop(np.searchsorted(stamps_ns, stamps_ns[-1] - window_ns) if len(stamps_ns) else 0)
                return False
            start_ns = stamps_ns[int(moving.argmax())]
            self._drop(np.searchsorted(stamps_ns, start_ns - window_ns))
            self._begin_motion(start_ns)
            return True
        rows = np.flatnonzero(moving)
        rests = np.diff(np.append(self._last_moving_ns, stamps_ns[rows])) > idle_ns
        unbroken = rows[: int(rests.argmax())] if rests.any() else rows
        if len(unbroken):
            self._write(int(unbroken[-1]) + 1)
        stamps_ns = self._held[0]
        if len(stamps_ns) and stamps_ns[-1] - self._last_moving_ns > idle_ns:
            self._end_motion()
            return True
        return False

    def _drop(self, count: int | np.intp) -> None:
        stamps_ns, joints, moving = self._held
        self._held = stamps_ns[count:], joints[count:], moving[count:]

    def _begin_motion(self, moving_ns: int) -> None:
        self._make_folder()
        while self._writer is None:
            path = self.folder / f'motion_{self._index:06d}{SUFFIX}'
            self._index += 1
            if not path.exists() and not path.with_name(path.name + '.part').exists():
                self._writer = MotionWriter(path, self.fingerprint)
        self._writer.summarise(robot=self.robot.name, source='recorder')
        self._first_ns, self._last_moving_ns = self._held[0][0], moving_ns
        self._motion_residual = ResidualStatistics()

    def _write(self, count: int) -> None:
        assert self._writer is not None
        stamps_ns, joints, _ = (array[:count] for array in self._held)
        self._writer.append(stamps_ns, joints, motion_actions(self.kinematics, joints))
        self._last_moving_ns = stamps_ns[-1]
        self.counters.recorded += count
        self._drop(count)

    def _end_motion(self) -> None:
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        if self._last_moving_ns - self._first_ns < self.settings.min_motion_s * _NS:
            writer.abort()
            self.counters.too_short += 1
            self.counters.recorded -= writer.n_samples
            return
        self._settle_residuals(writer)
        writer.close()
        self.counters.files += 1

    def _settle_residuals(self, writer: MotionWriter) -> None:
        """Count those residuals whose poses are known to lie in the motion: the end of it is known late."""
        stamps_ns, residuals = self._unsettled
        past = stamps_ns <= self._last_moving_ns
        inside = past & (stamps_ns >= self._first_ns)
        self._motion_residual.add(residuals[inside, 0], residuals[inside, 1])
        self._unsettled = stamps_ns[~past], residuals[~past]
        writer.summarise(**self._motion_residual.summary())

    def report(self) -> dict[str, Any]:
        """All counters and the residual so far."""
        return {
            **{f.name: getattr(self.counters, f.name) for f in fields(self.counters)},
            **self.residual.summary(),
        }
