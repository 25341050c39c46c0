"""Demonstrations in our conventions from a foreign source.

Poses are those of our own forward kinematics of the file's joint positions. Its own poses serve to calibrate the
constant frames and to check (see `calibration`), its commands become ours by the same frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.data.readers.calibration import Calibration, calibrate, require_near
from decoupled_policy_ros.data.readers.conventions import Conventions, rotation_matrices
from decoupled_policy_ros.data.readers.interface import Array, Rows, Source
from decoupled_policy_ros.data.readers.osc import OscPose
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.observation.image import fit_image
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.kinematics import Kinematics

JOINTS, PROPRIOCEPTION, POSE = (
    'observation.joint_positions', 'observation.proprioception', 'observation.pose',
)  # fmt: skip
ACTION = 'action'

_CALIBRATION_EPISODES = 25
_CALIBRATION_FRAMES = 2000
_GRIPPER_LAG_S = 0.4  # from a command to a gripper that has visibly moved
_COMMAND_ROWS = {
    'pose': ('command_position', 'command_rotation'),
    'osc_pose': ('command_osc',),
    'osc_delta': ('command_osc',),
    'joints': ('command_joints',),
    'next_pose': (),
}


class Converted:
    """Demonstrations whose rows are read from `source` and converted as they are asked for.

    Args:
        source: the files.
        robot: our robot, whose joints the file's are.
        osc: the controller whose goals the actions are, and the turn (3, 3) from the file's measured tool to the
            controller's site; for the action kinds osc_pose and osc_delta.

    Raises:
        DatasetError: the file's poses are not those of this arm, or its commands are not near them.
    """

    def __init__(self, source: Source, robot: RobotDescription, osc: tuple[OscPose, Array] | None = None):
        self.root, self.tasks, self.cameras = source.root, source.tasks, source.cameras
        self._conventions: Conventions = source.conventions
        self.rate_hz = source.conventions.rate_hz
        self._source, self._robot, self._osc = source, robot, osc
        self._kinematics = Kinematics(robot)
        self._proprioception = Proprioception(robot, self._kinematics)
        # The pose after the last one is not there to stand for a command.
        self._kept = source.lengths - (1 if self._conventions.action == 'next_pose' else 0)
        if np.any(self._kept < 1):
            short = int(np.argmax(self._kept < 1))
            raise DatasetError(
                f'{self.root}: episode {short} has {source.lengths[short]} frames, too few to be read'
            )
        self.lengths = self._kept.astype(np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)
        self.calibration = self._calibrate()

    @property
    def conventions(self) -> dict[str, Any]:
        """How the files are written, and the constant frames that were found."""
        found = {} if self.calibration is None else {'calibration': self.calibration.to_dict()}
        return self._conventions.to_dict() | found

    @property
    def n_episodes(self) -> int:
        """Number of episodes."""
        return len(self.lengths)

    @property
    def n_frames(self) -> int:
        """Number of frames of all episodes."""
        return int(self.lengths.sum())

    @property
    def columns(self) -> list[str]:
        """Names of the columns that can be read."""
        action = [] if self._conventions.action == 'none' else [ACTION]
        return [
            JOINTS,
            PROPRIOCEPTION,
            POSE,
            *action,
            *(f'observation.{name}' for name in self._source.vectors),
        ]

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Our robot's at this rate: that the file is about this arm has been checked by its poses."""
        return Fingerprint.of(self._robot, self.rate_hz)

    def task_of(self, episode: int) -> str:
        """Instruction of an episode."""
        return self._source.task_of(self._checked(episode))

    def column(self, name: str, episode: int | None = None) -> NDArray[np.float32]:
        """Rows (N, dim) of one column, of all episodes one after the other or of one.

        Raises:
            DatasetError: no such column, or rows that can't be converted.
        """
        self._known(name)
        if episode is not None:
            rows = self._source.read(self._checked(episode), self._needed([name]))
            return self._converted(name, rows, episode)
        filled, first = None, 0
        for rows in self.stream([name]):
            part = rows[name]
            if filled is None:
                filled = np.empty((self.n_frames, *part.shape[1:]), np.float32)
            filled[first : first + len(part)] = part
            first += len(part)
        assert filled is not None  # there is at least one episode
        return filled

    def stream(self, names: Sequence[str]) -> Iterator[Rows]:
        """Rows of the columns `names` of all episodes in their order, one episode after the other."""
        for name in names:
            self._known(name)
        for episode, rows in enumerate(self._source.stream(self._needed(names))):
            yield {name: self._converted(name, rows, episode) for name in names}

    def images(
        self, camera: str, episode: int | None = None, size: tuple[int, int] | None = None
    ) -> NDArray[np.uint8]:
        """Images (N, H, W, 3) RGB, upright, of all episodes or of one; resized to `size` (H, W)."""
        if camera not in self.cameras:
            raise DatasetError(f'{self.root} has no camera {camera!r}; it has {sorted(self.cameras)}')
        episodes = range(self.n_episodes) if episode is None else [self._checked(episode)]
        out, first = None, 0
        for index in episodes:
            end = first + int(self.lengths[index])
            for row, picture in zip(range(first, end), self._source.images(camera, index), strict=False):
                fitted = picture if size is None else fit_image(picture, size)
                if out is None:
                    out = np.empty((int(self.lengths[list(episodes)].sum()), *fitted.shape), np.uint8)
                out[row] = fitted
                first = row + 1
            if first != end:
                raise DatasetError(f'{self.root}: camera {camera!r} has too few pictures in episode {index}')
        assert out is not None  # episodes are not empty
        return out

    def _known(self, name: str) -> None:
        if name not in self.columns:
            raise DatasetError(f'{self.root} has no column {name!r}; it has {sorted(self.columns)}')

    def _checked(self, episode: int) -> int:
        if not 0 <= episode < self.n_episodes:
            raise DatasetError(f'{self.root} has no episode {episode}; it has 0 to {self.n_episodes - 1}')
        return episode

    def _needed(self, names: Sequence[str]) -> list[str]:
        """Rows of the source from which the columns `names` are made."""
        needed: dict[str, None] = {}
        for name in names:
            if name in (JOINTS, PROPRIOCEPTION, POSE):
                needed |= dict.fromkeys(['joints', 'gripper'])
            elif name == ACTION:
                kind = self._conventions.action
                needed |= dict.fromkeys(['joints', 'gripper'] if kind in ('osc_delta', 'next_pose') else [])
                needed |= dict.fromkeys(_COMMAND_ROWS[kind])
                needed |= dict.fromkeys(
                    ['command_gripper'] if self._conventions.gripper_command else ['gripper']
                )
            else:
                needed[f'vector.{name.removeprefix("observation.")}'] = None
        return list(needed)

    def _converted(self, name: str, rows: Rows, episode: int) -> NDArray[np.float32]:
        where = f'{self.root}, episode {episode}'
        values: NDArray[Any]
        if name == ACTION:
            values = poses.action_from_pose(self._commands(rows), self._gripper_commands(rows, where))
        elif name == POSE:
            values = poses.action_from_pose(self._forward(rows['joints']), self._gripper(rows, where))
        elif name in (JOINTS, PROPRIOCEPTION):
            joints = np.concatenate([self._arm(rows['joints']), self._fingers(rows, where)], -1)
            values = self._proprioception.many(joints) if name == PROPRIOCEPTION else joints
        else:
            values = rows[f'vector.{name.removeprefix("observation.")}']
        if len(values) < self._kept[episode]:  # the rows of the next episode would take their place
            raise DatasetError(f'{where}: {name} has {len(values)} rows for {self._kept[episode]} frames')
        return np.asarray(values[: self._kept[episode]], np.float32)

    def _arm(self, joints: NDArray[Any]) -> Array:
        rows, n = np.asarray(joints, float), len(self._robot.joint_names)
        if rows.ndim != 2 or rows.shape[1] != n or not np.all(np.isfinite(rows)):
            raise DatasetError(
                f'{self.root}: joint positions of shape {rows.shape}, '
                f'{np.count_nonzero(~np.isfinite(rows))} of them not finite; '
                f'robot {self._robot.name!r} has {n} joints: {", ".join(self._robot.joint_names)}'
            )
        return rows

    def _forward(self, joints: NDArray[Any]) -> Array:
        return self._kinematics.forward_many(self._arm(joints))

    def _fingers(self, rows: Rows, where: str) -> Array:
        return self._source.gripper.to_fingers(
            rows['gripper'], self._robot.gripper, f'{where}: measured gripper'
        )

    def _gripper(self, rows: Rows, where: str) -> Array:
        return self._robot.gripper.normalised(self._fingers(rows, where))

    def _gripper_commands(self, rows: Rows, where: str) -> Array:
        if self._conventions.gripper_command:
            return self._source.gripper_command.to_value(
                rows['command_gripper'], f'{where}: commanded gripper'
            )
        measured = self._gripper(rows, where)
        return np.append(measured[1:], measured[-1:])

    def _commands(self, rows: Rows) -> Array:
        """Commanded pose_base_ee (T, 4, 4)."""
        kind = self._conventions.action
        if kind == 'next_pose':
            achieved = self._forward(rows['joints'])
            return np.concatenate([achieved[1:], achieved[-1:]])
        if kind == 'joints':
            return self._forward(rows['command_joints'])
        assert self.calibration is not None  # __init__ refuses poses that nothing can be checked with
        if kind == 'pose':
            turns = rotation_matrices(rows['command_rotation'], self._conventions.rotation)
            return self.calibration.to_ours(
                poses.pose_from_position_rotation(rows['command_position'], turns)
            )
        assert self._osc is not None
        controller, turn = self._osc
        tool_site = poses.pose_from_position_rotation(np.zeros(3), turn)
        ee_site = self.calibration.pose_ee_tool @ tool_site
        base = self.calibration.pose_frame_base
        site = base @ self._forward(rows['joints']) @ ee_site if kind == 'osc_delta' else np.empty((0, 4, 4))
        goals = controller.goals(rows['command_osc'], site)
        return poses.inverse(base) @ goals @ poses.inverse(ee_site)

    def _calibrate(self) -> Calibration | None:
        """Calibrate and check with a sample of episodes spread over the whole dataset."""
        self.calibration = None
        kind, where = self._conventions.action, f'{self.root} ({self._conventions.source})'
        if not self._source.has_poses and kind not in ('joints', 'next_pose', 'none'):
            raise DatasetError(
                f'{where}: holds no measured poses, without which its commanded poses have no known frame'
            )
        measured = ['position', 'rotation'] if self._source.has_poses else []
        commanded = self._needed([ACTION]) if kind != 'none' else []
        names = list(dict.fromkeys(['joints', 'gripper', *measured, *commanded]))
        chosen = np.unique(np.linspace(0, self.n_episodes - 1, _CALIBRATION_EPISODES).astype(int))
        sample = [self._source.read(int(episode), names) for episode in chosen]
        if measured:
            stride = max(1, int(self.lengths[chosen].sum()) // _CALIBRATION_FRAMES)
            rows = {
                name: np.concatenate([episode[name][::stride] for episode in sample])
                for name in ['joints', *measured]
            }
            turns = rotation_matrices(rows['rotation'], self._conventions.rotation)
            theirs = poses.pose_from_position_rotation(rows['position'], turns)
            in_base = self._conventions.pose_frame == 'base'
            self.calibration = calibrate(self._forward(rows['joints']), theirs, in_base, where)
        if commanded:
            self._check_commands(sample, where)
        return self.calibration

    def _check_commands(self, sample: list[Rows], where: str) -> None:
        """Commands lie near the poses that follow, and a gripper moves the way it is told."""
        lag = max(1, round(_GRIPPER_LAG_S * self.rate_hz))
        commanded, achieved, told, moved = [], [], [], []
        for rows in sample:
            commanded.append(self._commands(rows)[:-1])
            achieved.append(self._forward(rows['joints'])[1:])
            told.append(self._gripper_commands(rows, where)[:-lag])
            moved.append(self._gripper(rows, where)[lag:])
        require_near(np.concatenate(commanded), np.concatenate(achieved), where)
        command, measured = np.concatenate(told), np.concatenate(moved)
        if len(command) > 1 and min(command.std(), measured.std()) > 0.1:
            correlation = float(np.corrcoef(command, measured)[0, 1])
            if correlation < -0.3:
                raise DatasetError(
                    f'{where}: the gripper closes when it is told to open (correlation {correlation:.2f} of commanded '
                    f'and measured values): {self._conventions.gripper_command!r} commanded against '
                    f'{self._conventions.gripper!r} measured can not both be right'
                )
