"""A simulated scene as a policy sees it, and an episode in it that stops wherever it needs a chunk."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from decoupled_policy_ros.data.datasets.video import VideoWriter
from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.observation.contract import ObservationContract
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.observation.sampler import Sampler
from decoupled_policy_ros.observation.streams import StreamBuffer
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.robot.poses import GRIPPER_CLOSED, GRIPPER_OPEN
from decoupled_policy_ros.runtime.chunks import Chunk, GripperLatch
from decoupled_policy_ros.runtime.direct import Direct
from decoupled_policy_ros.runtime.guard.guard import Guard
from decoupled_policy_ros.runtime.guard.settings import GuardSettings
from decoupled_policy_ros.runtime.joining import ChunkTiming, Joiner, JoinSettings, Wish
from decoupled_policy_ros.runtime.prefix import Prefix
from decoupled_policy_ros.runtime.steering import ChunkRejected, Guarded, Steering
from decoupled_policy_ros.sim.environment import SimRobot
from decoupled_policy_ros.sim.reference import MAX_STEP_M

#: A chunk is torn where one executed waypoint lies this far from the one before, twice what any demonstration of an
#: expert moves in a step: its waypoints belong to different ways of doing the task.
TORN_STEP_M = 2 * MAX_STEP_M
#: Drawing a frame takes longer than simulating its step, so a film has every other one.
FILM_EVERY = 2
GREEN, RED = (60, 170, 80), (200, 60, 50)

Arrays = dict[str, NDArray]


@dataclass(frozen=True, eq=False)
class Question:
    """What a policy is asked where a chunk is due.

    Attributes:
        observation: arrays (n_obs_steps, ...).
        known: what the chunk shall begin with.
    """

    observation: Arrays
    known: Prefix | None


@dataclass(frozen=True)
class EpisodeResult:
    """Outcome of the episode of one seed, the control steps that it took, and how coherent its chunks were.

    Attributes:
        seed, success, steps: of the episode.
        chunks: predicted.
        torn_chunks: how many of them have a step longer than TORN_STEP_M among what was executed of them.
        largest_step_m: longest such step of all.
        rejected_chunks: refused by the guard, because samples lay too far apart, or because a rotation is none.
        slowed_chunks: made slower by the guard, or because samples lay apart.
    """

    seed: int
    success: bool
    steps: int
    chunks: int = 0
    torn_chunks: int = 0
    largest_step_m: float = 0.0
    rejected_chunks: int = 0
    slowed_chunks: int = 0


def largest_step_m(actions: ArrayLike) -> float:
    """Largest distance (m) between two consecutive positions of a chunk (T, 10); 0 for a single one."""
    positions = np.asarray(actions, float)[:, :3]
    return float(np.linalg.norm(np.diff(positions, axis=0), axis=1).max(initial=0.0))


class Scene:
    """A simulated arm with the streams of an observation contract.

    Args:
        sim: the arm; it may serve other scenes, one after the other.
        contract: what to observe.
        timing: of the policy's chunks.
        guard: settings of the guard that chunks go through; None for none.
        join: how chunks join; by default each is followed as it is predicted.

    Raises:
        ConfigError: the simulator does not measure one of the streams, or measures another number of values.
    """

    def __init__(
        self,
        sim: SimRobot,
        contract: ObservationContract,
        timing: ChunkTiming,
        guard: GuardSettings | None = None,
        join: JoinSettings | None = None,
    ):
        self.sim, self.contract, self.n_execute = sim, contract, timing.n_execute
        self.joiner = Joiner(timing, join or JoinSettings())
        kinematics = Kinematics(sim.robot)
        self.proprioception = Proprioception(sim.robot, kinematics, contract.near_quat_xyzw)
        self.steering: Steering = Direct()
        if guard is not None:
            checks = Guard(sim.robot, guard)
            self.steering = Guarded(checks, kinematics, _Joints(sim), period_ns=None)
        self.buffers = {name: StreamBuffer(2 * contract.n_obs_steps) for name in contract.names}
        self.sampler = Sampler(contract, self.buffers)
        for stream in contract.streams:
            if (
                stream.kind != 'image'
                and (shape := self._measure(stream.name, stream.kind).shape) != stream.shape
            ):
                raise ConfigError(
                    f'the policy observes {stream.name!r} of {stream.shape[0]} values, but in the task '
                    f'{sim.task.name!r} with robot {sim.robot.name!r} it has {shape[0]}: it was trained for another'
                )

    def episode(
        self, seed: int, max_steps: int, film: Path | VideoWriter | None = None
    ) -> Generator[Question, NDArray[np.float64], EpisodeResult]:
        """One episode, until success, a failure that nothing can mend, or the last step.

        Yields a question wherever a chunk is due, and takes the samples (K, horizon, 10) that are the answer.

        Args:
            seed: of the scene.
            max_steps: of control.
            film: a video of it, or the writer of one that has other episodes too.
        """
        with ExitStack() as stack:
            writer = stack.enter_context(self.film(film)) if isinstance(film, Path) else film
            self._start(seed)
            latch, chunk = GripperLatch(), None
            steps_m: list[float] = []
            step = rejected = slowed = 0
            while step < max_steps and not (self.sim.success or self.sim.failed):
                if writer is not None and step % FILM_EVERY == 0:
                    writer.add(self.sim.image('overview'))
                if chunk is None or self.sim.stamp_ns >= chunk.replan_stamp_ns - self._history_ns:
                    self._observe()
                if chunk is None or self.sim.stamp_ns >= chunk.replan_stamp_ns:
                    observation = self.sampler.sample(self.sim.stamp_ns)
                    under_way = self.steering.under_way()
                    wish = self.joiner.wish(observation.stamp_ns, self.sim.stamp_ns, under_way)
                    samples = yield Question(observation.arrays, wish.known)
                    chunk, time_scale, step_m = self._steered(samples, wish)
                    steps_m.append(step_m)
                    rejected += chunk is None
                    slowed += time_scale > 1.0
                pose, gripper = self._command(chunk)
                latch.update(gripper)
                self.sim.step(pose, GRIPPER_CLOSED if latch.state == 'closed' else GRIPPER_OPEN)
                step += 1
            success = self.sim.success
            if writer is not None:
                self._film_outcome(writer, success)
        torn = sum(step_m > TORN_STEP_M for step_m in steps_m)
        largest_m = max(steps_m, default=0.0)
        return EpisodeResult(seed, success, step, len(steps_m), torn, largest_m, rejected, slowed)

    def film(self, path: Path) -> VideoWriter:
        """A writer of a video that runs as fast as the episode does."""
        return VideoWriter(path, self.contract.rate_hz / FILM_EVERY)

    def _film_outcome(self, writer: VideoWriter, success: bool) -> None:
        """The last state for a second in a frame, green for success and red for failure."""
        picture = self.sim.image('overview').copy()
        height, width = picture.shape[:2]
        cv2.rectangle(picture, (0, 0), (width - 1, height - 1), GREEN if success else RED, 8)
        for _ in range(round(self.contract.rate_hz / FILM_EVERY)):
            writer.add(picture)

    def _start(self, seed: int) -> None:
        self.sim.reset(seed)
        self.steering.reset()
        self.joiner.reset()
        for buffer in self.buffers.values():
            buffer.clear()
        # History is observed, never made up: the arm holds still until there is enough of it.
        home = self.sim.pose_base_ee
        for _ in range(self.contract.n_obs_steps - 1):
            self._observe()
            self.sim.step(home, GRIPPER_OPEN)

    def _steered(self, samples: NDArray[np.float64], wish: Wish) -> tuple[Chunk | None, float, float]:
        """The chunk that is followed from now on, None if there is none, by how much it is slower than it was
        predicted, and the largest step (m) of what is executed of it.
        """
        step_m = largest_step_m(samples[0, self._executed])
        try:
            joined = self.joiner.join(samples, wish)
            plan = self.steering.plan(joined.chunk, self.sim.stamp_ns)
        except (ChunkRejected, ValueError):
            # As in the node: a rotation that is none is a fault of this chunk alone.
            return None, 1.0, step_m
        self.steering.adopt(plan)
        self.joiner.followed(joined)
        step_m = largest_step_m(joined.chunk.poses_base_ee[self._executed, :3, 3])
        return joined.chunk, plan.time_scale * joined.slowed, step_m

    def _command(self, chunk: Chunk | None) -> tuple[NDArray[np.float64], float]:
        """Pose (4, 4) and gripper value of now; without a chunk the arm comes to rest, and the gripper stays."""
        if chunk is not None:
            pose, gripper = self.steering.follow(self.sim.stamp_ns)
            return pose, 0.0 if gripper is None else gripper
        held = self.steering.hold(self.sim.stamp_ns)
        return self.sim.pose_base_ee if held is None else held, 0.0

    @property
    def _executed(self) -> slice:
        first = self.contract.n_obs_steps - 1
        return slice(first, first + self.n_execute)

    @property
    def _history_ns(self) -> int:
        return self.contract.offset_ns(self.contract.n_obs_steps - 1)

    def _observe(self) -> None:
        """Push the present state; pictures are drawn only when a chunk is about to need them."""
        for stream in self.contract.streams:
            self.buffers[stream.name].push(self.sim.stamp_ns, self._measure(stream.name, stream.kind))

    def _measure(self, name: str, kind: str) -> NDArray:
        if kind == 'image':
            return self.sim.image(name)
        if kind == 'proprioception':
            return self.proprioception(self.sim.joint_positions)
        if name != 'object_state':
            raise ConfigError(f'the simulator does not measure the vector {name!r}; valid: object_state')
        return self.sim.object_state


class _Joints:
    """Where a simulated arm's joints are: always known."""

    def __init__(self, sim: SimRobot):
        self._sim, self._n = sim, len(sim.robot.joint_names)

    def positions(self, now_ns: int) -> NDArray[np.float64]:
        return self._sim.joint_positions[: self._n]

    def why_not(self, now_ns: int) -> str:
        return ''
