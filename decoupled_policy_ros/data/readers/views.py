"""Demonstrations made of others: several files as one, every n-th frame of a faster one, and recordings of motion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.data.motions.motions import Motion
from decoupled_policy_ros.data.readers.conventions import Conventions
from decoupled_policy_ros.data.readers.converted import ACTION, JOINTS, POSE
from decoupled_policy_ros.data.readers.interface import Demonstrations, Rows, fingers_from_width
from decoupled_policy_ros.data.readers.streaming import stream_columns
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.poses import GRIPPER

#: What the conventions say of actions that are the next pose: others' datasets, and ours.
ACHIEVED_ACTIONS = ('next_pose', 'absolute pose_base_ee, achieved')


def in_one(parts: Iterable[NDArray[Any]], rows: int) -> NDArray[Any]:
    """Parts one after the other in an array of so many rows; what is in memory beside it is a part, not all of them."""
    whole, first = None, 0
    for part in parts:
        if whole is None:
            whole = np.empty((rows, *part.shape[1:]), part.dtype)
        whole[first : first + len(part)] = part
        first += len(part)
    assert whole is not None and first == rows
    return whole


class _Episodes:
    """What follows from lengths alone."""

    root: Path
    tasks: list[str]
    lengths: NDArray[np.int64]

    def _place(self, lengths: Sequence[int] | NDArray[np.int64]) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)

    @property
    def n_episodes(self) -> int:
        """Number of episodes."""
        return len(self.lengths)

    @property
    def n_frames(self) -> int:
        """Number of frames of all episodes."""
        return int(self.lengths.sum())

    def _checked(self, episode: int) -> int:
        if not 0 <= episode < self.n_episodes:
            raise DatasetError(f'{self.root} has no episode {episode}; it has 0 to {self.n_episodes - 1}')
        return episode


class Joined(_Episodes):
    """Several demonstrations one after the other, such as the files of a folder; each keeps its own calibration.

    Raises:
        DatasetError: they differ in rate.
        FingerprintMismatch: they differ in kinematics.
    """

    def __init__(self, root: Path, parts: Sequence[Demonstrations]):
        self.root, self.parts = root, list(parts)
        first = self.parts[0]
        self.fingerprint, self.rate_hz = first.fingerprint, first.rate_hz
        self.conventions = first.conventions
        for part in self.parts:
            if part.rate_hz != first.rate_hz:
                raise DatasetError(
                    f'{part.root} has {part.rate_hz:g} Hz, {first.root} has {first.rate_hz:g} Hz'
                )
            part.fingerprint.require_equal(first.fingerprint, str(part.root), str(first.root))
        self.tasks = list(dict.fromkeys(task for part in self.parts for task in part.tasks))
        self.cameras = [c for c in first.cameras if all(c in part.cameras for part in self.parts)]
        self._ends = np.cumsum([part.n_episodes for part in self.parts])
        self._place(np.concatenate([part.lengths for part in self.parts]))

    def task_of(self, episode: int) -> str:
        """Instruction of an episode."""
        part, index = self._part(episode)
        return part.task_of(index)

    def column(self, name: str, episode: int | None = None) -> NDArray[Any]:
        """Rows (N, ...) of one column, of all episodes one after the other or of one."""
        if episode is None:
            return np.concatenate([part.column(name) for part in self.parts])
        part, index = self._part(episode)
        return part.column(name, index)

    def stream(self, names: Sequence[str]) -> Iterator[Rows]:
        """Rows of the columns `names`, one episode after the other."""
        for part in self.parts:
            yield from stream_columns(part, names)

    def images(
        self, camera: str, episode: int | None = None, size: tuple[int, int] | None = None
    ) -> NDArray[np.uint8]:
        """Images (N, H, W, 3) RGB of all episodes or of one."""
        if episode is None:
            return in_one((self.images(camera, e, size) for e in range(self.n_episodes)), self.n_frames)
        part, index = self._part(episode)
        return part.images(camera, index, size)

    def _part(self, episode: int) -> tuple[Demonstrations, int]:
        which = int(np.searchsorted(self._ends, self._checked(episode), side='right'))
        return self.parts[which], episode - int(self._ends[which] - self.parts[which].n_episodes)


class Decimated(_Episodes):
    """Every n-th frame: exact, no value is made up. An action is the command in force from that frame on.

    Where the pose of the next frame stands for the command, it is that of the next frame that is kept, and so is the
    gripper of any action without a command for it; after the last frame it stays as it is. A gripper that was commanded
    keeps its command: fingers that an object stops never measure what they were told.

    Raises:
        DatasetError: n is less than 1, or an episode would have no frames left.
    """

    def __init__(self, faster: Demonstrations, n: int):
        if n < 1:
            raise DatasetError(f'every n-th frame: n must be at least 1, got {n}')
        self.root, self.tasks, self.cameras = faster.root, faster.tasks, faster.cameras
        self.rate_hz = faster.rate_hz / n
        self.fingerprint = replace(faster.fingerprint, rate_hz=self.rate_hz)
        self.conventions = faster.conventions
        self.labels = labels_of(faster)
        self._faster, self._n = faster, n
        conventions = faster.conventions
        self._achieved = conventions.get('action') in ACHIEVED_ACTIONS
        # As our datasets say it, and others' mappings.
        commanded = conventions.get('gripper_source') == 'commanded' or conventions.get('gripper_command')
        self._gripper_commanded = bool(commanded)
        lengths = -(-faster.lengths // n) - (1 if self._achieved else 0)
        if np.any(lengths < 1):
            raise DatasetError(
                f'{self.root}: episode {int(np.argmax(lengths < 1))} has too few frames for every {n}th'
            )
        self._place(lengths)

    def task_of(self, episode: int) -> str:
        """Instruction of an episode."""
        return self._faster.task_of(episode)

    def column(self, name: str, episode: int | None = None) -> NDArray[Any]:
        """Rows (N, ...) of one column, of all episodes one after the other or of one."""
        if episode is not None:
            checked = self._checked(episode)
            rows = {source: self._faster.column(source, checked) for source in self._sources(name)}
            return self._kept(name, rows, checked)
        return np.concatenate([rows[name] for rows in self.stream([name])])

    def stream(self, names: Sequence[str]) -> Iterator[Rows]:
        """Rows of the columns `names`, one episode after the other."""
        wanted = list(dict.fromkeys(source for name in names for source in self._sources(name)))
        for episode, rows in enumerate(stream_columns(self._faster, wanted)):
            yield {name: self._kept(name, rows, episode) for name in names}

    def images(
        self, camera: str, episode: int | None = None, size: tuple[int, int] | None = None
    ) -> NDArray[np.uint8]:
        """Images (N, H, W, 3) RGB of all episodes or of one."""
        if episode is None:
            return in_one((self.images(camera, e, size) for e in range(self.n_episodes)), self.n_frames)
        images = self._faster.images(camera, self._checked(episode), size)
        return images[:: self._n][: self.lengths[episode]].copy()  # a view would keep all of them in memory

    def _sources(self, name: str) -> list[str]:
        """Columns of the faster dataset that a column is made of."""
        if name != ACTION:
            return [name]
        if self._achieved:
            return [POSE, ACTION] if self._gripper_commanded else [POSE]
        return [ACTION] if self._gripper_commanded else [POSE, ACTION]

    def _kept(self, name: str, rows: Rows, episode: int) -> NDArray[Any]:
        kept = {source: values[:: self._n] for source, values in rows.items()}
        length, told = self.lengths[episode], self._gripper_commanded
        if name != ACTION or (told and not self._achieved):
            return kept[name][:length]
        following = np.concatenate([kept[POSE][1:], kept[POSE][-1:]])[:length]
        if self._achieved and not told:
            return following
        actions = (following if self._achieved else kept[ACTION]).copy()
        actions[:, GRIPPER] = (kept[ACTION][:length] if told else following)[:, GRIPPER]
        return actions


class Chosen(_Episodes):
    """Some of the episodes, in the order given."""

    def __init__(self, whole: Demonstrations, episodes: Sequence[int]):
        self.root, self.cameras = whole.root, whole.cameras
        self.rate_hz, self.fingerprint = whole.rate_hz, whole.fingerprint
        self.conventions = whole.conventions
        labels = labels_of(whole)
        self.labels = None if labels is None else [labels[episode] for episode in episodes]
        self._whole, self._chosen = whole, list(episodes)
        self.tasks = list(dict.fromkeys(whole.task_of(episode) for episode in episodes))
        self._place([int(whole.lengths[episode]) for episode in episodes])

    def task_of(self, episode: int) -> str:
        """Instruction of an episode."""
        return self._whole.task_of(self._chosen[self._checked(episode)])

    def column(self, name: str, episode: int | None = None) -> NDArray[Any]:
        """Rows (N, ...) of one column, of all episodes one after the other or of one."""
        if episode is not None:
            return self._whole.column(name, self._chosen[self._checked(episode)])
        return np.concatenate([self._whole.column(name, chosen) for chosen in self._chosen])

    def images(
        self, camera: str, episode: int | None = None, size: tuple[int, int] | None = None
    ) -> NDArray[np.uint8]:
        """Images (N, H, W, 3) RGB of all episodes or of one."""
        if episode is None:
            return in_one((self.images(camera, e, size) for e in range(self.n_episodes)), self.n_frames)
        return self._whole.images(camera, self._chosen[self._checked(episode)], size)


def labels_of(found: Demonstrations) -> list[bool | None] | None:
    """Whether each episode worked out, None where nobody said; None for a dataset without such labels."""
    return getattr(found, 'labels', None)


def only_successful(found: Demonstrations) -> Chosen:
    """The episodes that are labelled a success.

    Raises:
        DatasetError: the dataset has no labels, or none is a success.
    """
    labels = labels_of(found)
    if labels is None:
        raise DatasetError(
            f'{found.root} does not say which episodes were a success; leave out only_successful'
        )
    successes = [episode for episode, label in enumerate(labels) if label is True]
    if not successes:
        raise DatasetError(f'{found.root}: none of {len(labels)} episodes is labelled a success')
    return Chosen(found, successes)


class Recorded(_Episodes):
    """Recordings of the kinematics recorder: joints and poses, neither commands nor pictures."""

    cameras: list[str]

    def __init__(self, root: Path, motions: Sequence[Motion], robot: RobotDescription, rate_hz: float):
        self.root, self.tasks, self.cameras, self.rate_hz = root, [''], [], float(rate_hz)
        self.fingerprint = Fingerprint.of(robot, rate_hz)
        for motion in motions:
            motion.fingerprint.require_equal(
                self.fingerprint, str(root), f'robot {robot.name!r} at {rate_hz} Hz'
            )
        self.conventions = Conventions(
            'Stage 1 motion files', 'base', self.fingerprint.rotation_convention,
            'the end effector of the robot description', '-1 open, +1 closed', '', 'none', self.rate_hz,
        ).to_dict()  # fmt: skip
        self._motions, self._gripper = list(motions), robot.gripper
        self._place([len(motion) for motion in self._motions])

    def task_of(self, episode: int) -> str:
        """Nothing was asked for."""
        return self.tasks[0]

    def column(self, name: str, episode: int | None = None) -> NDArray[np.float32]:
        """Rows (N, dim) of observation.joint_positions or observation.pose."""
        if name not in (JOINTS, POSE):
            raise DatasetError(
                f'{self.root} has no column {name!r}; a recording of motion has {[JOINTS, POSE]}'
            )
        motions = self._motions if episode is None else [self._motions[self._checked(episode)]]
        if name == POSE:
            return np.concatenate([motion.actions for motion in motions])
        joints = np.concatenate([motion.joint_positions for motion in motions])
        fingers = fingers_from_width(self._gripper.width_from_normalised(joints[:, -1]), self._gripper)
        return np.concatenate([joints[:, :-1], fingers.astype(np.float32)], -1)

    def images(
        self, camera: str, episode: int | None = None, size: tuple[int, int] | None = None
    ) -> NDArray[np.uint8]:
        """None, ever.

        Raises:
            DatasetError: always.
        """
        raise DatasetError(f'{self.root} has no camera {camera!r}; a recording of motion has none')
