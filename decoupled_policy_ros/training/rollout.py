"""A policy in the closed loop with simulated arms, through the observation and policy code that the node runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from decoupled_policy_ros.data.datasets.video import VideoWriter
from decoupled_policy_ros.errors import CheckpointError, ConfigError
from decoupled_policy_ros.observation.contract import ObservationContract
from decoupled_policy_ros.policy.checkpoint import find_model, load_policy
from decoupled_policy_ros.robot.description import RobotDescription, load_robot
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.runtime.guard.settings import GuardSettings
from decoupled_policy_ros.runtime.joining import ChunkTiming, JoinSettings
from decoupled_policy_ros.sim.environment import SimRobot
from decoupled_policy_ros.sim.tasks import sim_task
from decoupled_policy_ros.training.scenes import EpisodeResult, Question, Scene

CHECKPOINTS = ('last', 'best')
#: Episodes at a time of a policy that sees no pictures: the network denoises 8 chunks at once in less than five times
#: the time of one. Pictures and their encoders are no faster together, and their arms take several times the memory.
LANES = 8


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
        guard: whether chunks go through the guard, with its defaults for the robot.
        join: how chunks join, and how many are drawn of each observation.
        shared_noise: all waypoints of a chunk are denoised from the same noise; for a backbone that does not mix time.
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
    guard: bool = False
    join: JoinSettings = field(default_factory=JoinSettings)
    shared_noise: bool = False


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


class Arms:
    """Simulated arms of one kind, built when they are first needed, and handed on from one policy to the next."""

    def __init__(self) -> None:
        self._sims: list[SimRobot] = []
        self._kind: tuple[object, ...] = ()

    def get(
        self,
        count: int,
        task: str,
        robot: RobotDescription,
        cameras: Mapping[str, tuple[int, int]],
        rate_hz: float,
    ) -> list[SimRobot]:
        """So many arms; those of another kind are ended first, for each takes some 200 MB."""
        # Every load makes a description anew: what counts is what it says.
        kind = (task, repr(robot), tuple(sorted(cameras.items())), rate_hz)
        if kind != self._kind:
            self.close()
            self._kind = kind
        while len(self._sims) < count:
            self._sims.append(SimRobot(task, robot, cameras, rate_hz=rate_hz))
        return self._sims[:count]

    def close(self) -> None:
        """End the simulators."""
        while self._sims:
            self._sims.pop().close()


class Rollout:
    """A policy in the closed loop with simulated arms, several episodes at a time.

    Episodes go on independently of each other and wait where they need a chunk; the chunks of all of them are then
    denoised in one pass of the network. The scene and the noise of an episode depend on its seed alone.

    Args:
        spec: what to evaluate.
        lanes: at most so many episodes at a time; by default 8, and 1 where the policy sees pictures.
        arms: to take simulators from; its own by default.

    Raises:
        CheckpointError, FingerprintMismatch, ConfigError, SimulationError: a file is missing or damaged, or policy,
            robot and task do not fit together.
    """

    def __init__(self, spec: Evaluation, lanes: int | None = None, arms: Arms | None = None):
        if lanes is not None and lanes < 1:
            raise ConfigError(f'lanes must be at least 1, got {lanes}')
        self.spec = spec
        self.robot = load_robot(spec.robot)
        self.policy = load_policy(checkpoint_folder(spec.policy, spec.checkpoint), self.robot, spec.backbone)
        self.contract: ObservationContract = self.policy.contract
        self.task = sim_task(spec.task)
        instruction = spec.instruction
        if instruction is None and self.policy.task.encoder.language is not None:
            instruction = self.task.instruction
        self.engine = Engine(
            self.policy,
            spec.denoising_steps,
            sampler=spec.sampler,
            instruction=instruction,
            shared_noise=spec.shared_noise,
        )
        own = self.task.steps_at(self.contract.rate_hz)
        self.max_steps = own if spec.max_steps is None else spec.max_steps
        if self.max_steps < 1:
            raise ConfigError(f'max_steps must be at least 1, got {spec.max_steps}')
        self.lanes = lanes or (1 if self.contract.picture_sizes else LANES)
        self.arms = arms or Arms()
        self.scenes = self._scenes(1)  # what does not fit together shows here

    def run(self, seed: int, film: Path | VideoWriter | None = None) -> EpisodeResult:
        """One episode from `seed`, filmed if asked to, see `Scene.episode`."""
        (result,) = self.run_all([seed], {} if film is None else {seed: film})
        return result

    def run_all(
        self, seeds: Iterable[int], films: Mapping[int, Path | VideoWriter] | None = None
    ) -> Iterator[EpisodeResult]:
        """Episodes from these seeds, each as soon as it is finished.

        Args:
            seeds: of the episodes.
            films: what some of them are filmed into.
        """
        waiting, films = deque(seeds), films or {}
        self.scenes = self._scenes(max(1, min(self.lanes, len(waiting))))
        free = list(self.scenes)
        running: list[_Running] = []
        try:
            while waiting or running:
                while waiting and free:
                    seed = waiting.popleft()
                    running.append(_Running(free.pop(), seed, self.max_steps, films.get(seed)))
                going = [episode for episode in running if episode.result is None]
                if going:
                    chunks = self.engine.many(
                        [e.question.observation for e in going],
                        [e.generator for e in going],
                        [e.question.known for e in going],
                        self.spec.join.samples,
                    )
                    for episode, samples in zip(going, chunks, strict=True):
                        episode.go_on(samples)
                for episode in running:
                    if episode.result is not None:
                        free.append(episode.scene)
                        yield episode.result
                running = [episode for episode in running if episode.result is None]
        finally:
            for episode in running:
                episode.moves.close()

    @property
    def sim(self) -> SimRobot:
        """The first of its simulated arms, the only one for one episode at a time."""
        return self.scenes[0].sim

    def close(self) -> None:
        """End the simulators."""
        self.arms.close()

    def _scenes(self, count: int) -> list[Scene]:
        contract = self.contract
        sims = self.arms.get(count, self.task.name, self.robot, contract.picture_sizes, contract.rate_hz)
        guard = GuardSettings() if self.spec.guard else None
        timing = ChunkTiming.of(self.policy)
        return [Scene(sim, self.contract, timing, guard, self.spec.join) for sim in sims]


class _Running:
    """An episode under way: what it asks where it waits for a chunk, in the end its result."""

    question: Question
    result: EpisodeResult | None = None

    def __init__(self, scene: Scene, seed: int, max_steps: int, film: Path | VideoWriter | None):
        self.scene = scene
        self.generator = torch.Generator().manual_seed(seed)
        self.moves = scene.episode(seed, max_steps, film)
        self._move(lambda: next(self.moves))

    def go_on(self, samples: NDArray[np.float64]) -> None:
        """Execute a chunk, one of samples (K, horizon, 10)."""
        self._move(lambda: self.moves.send(samples))

    def _move(self, move: Callable[[], Question]) -> None:
        try:
            self.question = move()
        except StopIteration as end:
            self.result = end.value
