"""The recorder's own thread: takes what the callbacks collected, computes, and writes, a few times a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from decoupled_policy_ros.data.motions.files import MotionWriter
from decoupled_policy_ros.data.motions.joint_rows import JointRows
from decoupled_policy_ros.data.motions.recorder import MotionRecorder
from decoupled_policy_ros.errors import DatasetError, MessageError
from decoupled_policy_ros.files import free_mb
from decoupled_policy_ros.observation.messages import pose_from_message, stamp_ns

PERIOD_S = 0.2
SILENCE_S = 2.0  # without a sample, after which a motion is over
RETRY_S = 5.0  # after a failed write
POSE_WAIT_S = 2.0  # for the joint states around a pose; by then its clock is another one
PIECE_NS = 100_000_000  # so much of the joint states at once

Take = Callable[[], list[Any]]


class RecorderWorker:
    """Drives a `MotionRecorder` in a thread of its own.

    Args:
        recorder: writes the motions.
        rows: turns messages into samples.
        take_states: gives the joint states since the last call.
        take_gripper: gives the gripper's joint states, or nothing.
        take_poses: gives the measured poses, or nothing.
        min_free_mb: with less space on the disk nothing is recorded.
        say: told once whenever recording stops or goes on.
    """

    def __init__(
        self,
        recorder: MotionRecorder,
        rows: JointRows,
        take_states: Take,
        take_gripper: Take,
        take_poses: Take,
        min_free_mb: float,
        say: Callable[[str], None],
    ):
        self.recorder, self.rows = recorder, rows
        self.stopped = ''  # why nothing is recorded
        self.unrecorded = 0  # samples that came meanwhile
        self.rejected_poses = 0
        self.last_pose_rejection = ''
        self.failure: Exception | None = None
        self._take_states, self._take_gripper, self._take_poses = take_states, take_gripper, take_poses
        self._min_free_mb, self._say = min_free_mb, say
        self._heard_at = self._failed_at = -np.inf
        self._waiting_poses: list[tuple[int, np.ndarray, float]] = []  # and when they were heard
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name='recorder', daemon=True)

    @property
    def free_mb(self) -> float:
        """Space left where the files go."""
        return free_mb(self.recorder.folder)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Take what is left, finish the motion and end the thread."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._end.wait(PERIOD_S):
                self._tick()
            self._tick()
            self._guarded(self.recorder.finish)
        except Exception as error:  # it must not die in silence: the node asks for `failure`
            self.failure = error

    def _tick(self) -> None:
        self._hear_poses()
        stamps_ns, joints = self.rows.rows(self._take_states(), self._take_gripper())
        self._watch_disk()
        if self.stopped:
            self.unrecorded += len(stamps_ns)
            self._waiting_poses.clear()  # what they would be compared with is not taken
            return
        if len(stamps_ns):
            self._heard_at = time.monotonic()
            # After a while without processor time there is much at once, and a motion must not end before the poses
            # inside of it have been compared.
            borders = np.flatnonzero(np.diff(stamps_ns // PIECE_NS)) + 1
            for piece in np.split(np.arange(len(stamps_ns)), borders):
                if self.stopped:
                    self.unrecorded += len(piece)
                    continue
                self._guarded(partial(self.recorder.push, stamps_ns[piece], joints[piece]))
                self._compare_poses()
            return
        self._compare_poses()
        if time.monotonic() - self._heard_at > SILENCE_S:
            self._guarded(self.recorder.finish)

    def _hear_poses(self) -> None:
        now_s = time.monotonic()
        for message in self._take_poses():
            try:
                pose = pose_from_message(message, *self.recorder.robot.base_frames)
                self._waiting_poses.append((stamp_ns(message.header.stamp), pose, now_s))
            except MessageError as error:
                self.rejected_poses += 1
                self.last_pose_rejection = str(error)

    def _compare_poses(self) -> None:
        """Compare the poses that joint states are known on both sides of: of two topics one may be far behind."""
        newest_ns, since_s = self.recorder.newest_ns, time.monotonic() - POSE_WAIT_S
        ready = [(stamp, pose) for stamp, pose, _ in self._waiting_poses if stamp <= newest_ns]
        self._waiting_poses = [
            waiting for waiting in self._waiting_poses if waiting[0] > newest_ns and waiting[2] >= since_s
        ]
        if ready:
            self.recorder.push_poses(
                np.array([stamp for stamp, _ in ready]), np.stack([pose for _, pose in ready])
            )

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except DatasetError as error:
            self._failed_at = time.monotonic()
            self.recorder.abandon()
            self._stop_recording(str(error))

    def _require_folder(self) -> None:
        if self.recorder.recording and not self.recorder.folder.is_dir():
            raise DatasetError(f'{self.recorder.folder} is gone')

    def _watch_disk(self) -> None:
        self._guarded(self._require_folder)
        left_mb = self.free_mb
        if not self.stopped and left_mb < self._min_free_mb:
            self._guarded(self.recorder.finish)
            self._stop_recording(f'{left_mb:.0f} MB left on the disk, min_free_mb is {self._min_free_mb:.0f}')
        elif (
            self.stopped
            and left_mb > 1.1 * self._min_free_mb
            and time.monotonic() - self._failed_at > RETRY_S
        ):
            self.stopped = ''
            self._guarded(self._recover)
            if not self.stopped:
                self._say(f'recording goes on: {left_mb:.0f} MB left on the disk')

    def _stop_recording(self, reason: str) -> None:
        self.stopped = self.stopped or reason
        self._say(f'recording stopped: {reason}')

    def _recover(self) -> None:
        for recovery in MotionWriter.recover(self.recorder.folder):
            self._say(f'{recovery.part.name} was left when the recording stopped: {recovery}')
