"""A policy in the closed loop with a simulated arm, through the observation and policy code that the node runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from decoupled_policy_ros.data.datasets.video import VideoWriter
from decoupled_policy_ros.errors import CheckpointError, ConfigError
from decoupled_policy_ros.observation.contract import ObservationContract
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.observation.sampler import Sampler
from decoupled_policy_ros.observation.streams import StreamBuffer
from decoupled_policy_ros.policy.checkpoint import find_model, load_policy
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.robot.poses import GRIPPER_CLOSED, GRIPPER_OPEN
from decoupled_policy_ros.runtime.chunks import Chunk, GripperLatch
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.sim.environment import SimRobot
from decoupled_policy_ros.sim.reference import MAX_STEP_M
from decoupled_policy_ros.sim.tasks import sim_task

CHECKPOINTS = ('last', 'best')
#: A chunk is torn where one executed waypoint lies this far from the one before, twice what any demonstration of an
#: expert moves in a step: its waypoints belong to different ways of doing the task.
TORN_STEP_M = 2 * MAX_STEP_M


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate; plain values, so that it can be sent to another process.

    Attributes:
        policy: task folder, or a name in models/tasks.
        task: simulated task, see `sim.tasks` and `sim.benchmarks`.
        backbone: folder or name; None for the one that the policy names.
        robot: name in config/robots, or path, of a simulated arm.
        denoising_steps: of each chunk.
        max_steps: of an episode; None for the task's own limit.
        checkpoint: 'last' for the weights in the folder itself, 'best' for those in its subfolder `best`.
        sampler: one that the backbone's schedule has; None for its first.
        instruction: what the policy is told; None for the simulated task's own where the policy has language, and
            for the policy's only one where it has not.
    """

    policy: str
    task: str
    backbone: str | None = None
    robot: str = 'panda_sim'
    denoising_steps: int = 10
    max_steps: int | None = None
    checkpoint: str = 'last'
    sampler: str | None = None
    instruction: str | None = None


@dataclass(frozen=True)
class EpisodeResult:
    """Outcome of the episode of one seed, the control steps that it took, and how coherent its chunks were.

    Attributes:
        seed, success, steps: of the episode.
        chunks: predicted.
        torn_chunks: how many of them have a step longer than TORN_STEP_M among what was executed of them.
        largest_step_m: longest such step of all.
    """

    seed: int
    success: bool
    steps: int
    chunks: int = 0
    torn_chunks: int = 0
    largest_step_m: float = 0.0


def checkpoint_folder(policy: str, checkpoint: str) -> Path:
    """Folder of the weights to evaluate.

    Raises:
        ConfigError: `checkpoint` is neither 'last' nor 'best'.
        CheckpointError: no such policy, or it has no best weights.
    """
    if checkpoint not in CHECKPOINTS:
        raise ConfigError(f'checkpoint must be one of {", ".join(CHECKPOINTS)}, got {checkpoint!r}')
    folder = find_model('tasks', policy)
    if checkpoint == 'last':
        return folder
    if not (folder / 'best' / 'task.json').is_file():
        raise CheckpointError(
            f'{folder} has no folder best with a task.json: only its last weights were kept'
        )
    return folder / 'best'


def largest_step_m(actions: ArrayLike) -> float:
    """Largest distance (m) between two consecutive positions of a chunk (T, 10); 0 for a single one."""
    positions = np.asarray(actions, float)[:, :3]
    return float(np.linalg.norm(np.diff(positions, axis=0), axis=1).max(initial=0.0))


class Rollout:
    """A policy in the closed loop with a simulated arm."""

    def __init__(self, spec: Evaluation):
        robot = load_robot(spec.robot)
        policy = load_policy(checkpoint_folder(spec.policy, spec.checkpoint), robot, spec.backbone)
        self.contract: ObservationContract = policy.contract
        self.n_execute = policy.n_execute
        instruction = spec.instruction
        if instruction is None and policy.task.encoder.language is not None:
            instruction = sim_task(spec.task).instruction
        self.engine = Engine(policy, spec.denoising_steps, sampler=spec.sampler, instruction=instruction)
        cameras = {s.name: (s.shape[0], s.shape[1]) for s in self.contract.streams if s.kind == 'image'}
        self.max_steps = spec.max_steps or sim_task(spec.task).max_steps
        self.sim = SimRobot(spec.task, robot, cameras, rate_hz=self.contract.rate_hz)
        self.proprioception = Proprioception(robot, Kinematics(robot))
        self.buffers = {name: StreamBuffer(2 * self.contract.n_obs_steps) for name in self.contract.names}
        self.sampler = Sampler(self.contract, self.buffers)

    def run(self, seed: int, video: VideoWriter | None = None) -> EpisodeResult:
        """One episode from `seed`, until success, a failure that nothing can mend, or the last step."""
        self._start(seed)
        latch, chunk = GripperLatch(), None
        steps_m: list[float] = []
        step = 0
        while step < self.max_steps and not (self.sim.success or self.sim.failed):
            if video is not None:
                video.add(self.sim.image('overview'))
            if chunk is None or self.sim.stamp_ns >= chunk.replan_stamp_ns - self._history_ns:
                self._observe()
            if chunk is None or self.sim.stamp_ns >= chunk.replan_stamp_ns:
                chunk, step_m = self._plan()
                steps_m.append(step_m)
            pose, gripper = chunk.sample(self.sim.stamp_ns)
            latch.update(gripper)
            self.sim.step(pose, GRIPPER_CLOSED if latch.state == 'closed' else GRIPPER_OPEN)
            step += 1
        torn = sum(step_m > TORN_STEP_M for step_m in steps_m)
        return EpisodeResult(seed, self.sim.success, step, len(steps_m), torn, max(steps_m, default=0.0))

    def close(self) -> None:
        """End the simulator."""
        self.sim.close()

    def _start(self, seed: int) -> None:
        self.sim.reset(seed)
        self.engine.reset(seed)
        for buffer in self.buffers.values():
            buffer.clear()
        # History is observed, never made up: the arm holds still until there is enough of it.
        home = self.sim.pose_base_ee
        for _ in range(self.contract.n_obs_steps - 1):
            self._observe()
            self.sim.step(home, GRIPPER_OPEN)

    def _plan(self) -> tuple[Chunk, float]:
        """The next chunk, and the largest step (m) among its waypoints that are executed."""
        observation = self.sampler.sample(self.sim.stamp_ns)
        actions = self.engine(observation.arrays).actions
        chunk = Chunk(
            actions, observation.stamp_ns, self.contract.rate_hz, self.contract.n_obs_steps, self.n_execute
        )
        first = self.contract.n_obs_steps - 1
        return chunk, largest_step_m(actions[first : first + self.n_execute])

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
