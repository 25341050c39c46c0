"""Demonstrations by the scripted expert, made in parallel, kept only where they succeed.

A demonstration that only ever shows the expert's own path teaches nothing about the way back to it. With
`noise`, some episodes begin away from home, and the executed command is the expert's plus a slowly drifting
offset while the expert's own is what gets recorded (Laskey et al., "DART: Noise Injection for Robust Imitation
Learning", CoRL 2017). Episodes depend on the seed and their number alone, not on the number of workers.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.data.datasets.dataset import DatasetSpec, DatasetWriter
from decoupled_policy_ros.data.parallel import start_worker
from decoupled_policy_ros.errors import SimulationError
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.sim.environment import DEFAULT_CAMERAS, SimRobot
from decoupled_policy_ros.sim.expert import Expert
from decoupled_policy_ros.sim.reference import step_towards
from decoupled_policy_ros.sim.tasks import RATE_HZ, sim_task

Array = NDArray[np.float64]

#: Share of the episodes that begin away from home, and that are executed with noise.
PERTURBED_SHARE = 0.5
NOISY_SHARE = 0.5
#: Start offsets, half ranges: metres forward, sideways, up; radians of roll, pitch, yaw.
START_OFFSET = np.array([0.06, 0.08, 0.05, 0.1, 0.1, 0.3])
START_STEPS = 15
#: Noise on the executed command, standard deviations, and the number of steps over which it drifts.
NOISE_STD = np.array([0.006, 0.006, 0.004, 0.02, 0.02, 0.04])
NOISE_STEPS = 8.0

#: Keeps demonstrations' scenes apart from those of an evaluation, which resets with small seeds.
_SEED_SPACE = 0xDE305


@dataclasses.dataclass(frozen=True)
class DemonstrationReport:
    """What came out: episodes kept and failed, frames written, wall time in seconds."""

    episodes: int
    failed: int
    frames: int
    seconds: float

    def __str__(self) -> str:
        attempts = self.episodes + self.failed
        return (
            f'{self.episodes} of {attempts} attempts succeeded and were kept: {self.frames} frames '
            f'in {self.seconds:.0f} s ({self.frames / max(self.seconds, 1e-9):.0f} frames/s)'
        )


def make_demonstrations(
    task: str | Sequence[str],
    episodes: int,
    out: str | Path,
    images: bool = True,
    seed: int = 0,
    workers: int | None = None,
    noise: bool = True,
    quiet: bool = False,
    robot: str = 'panda_sim',
) -> DemonstrationReport:
    """Write `episodes` successful demonstrations of a task as a dataset.

    Args:
        task: a name of `sim.expert.EXPERTS`; or several whose scene is the same, one after the other into the one
            dataset, told apart by the instruction. Each begins with the same scenes.
        episodes: how many of each task to keep; failed attempts are counted and replaced by further ones.
        out: folder of the dataset; must not exist.
        images: with both 84x84 cameras; `observation.object_state` is there either way.
        seed: same seed, same episodes.
        workers: processes; None for one per core. With 1 everything runs in this process.
        noise: start away from home in some episodes and execute some with noise, see the module.
        quiet: no progress bar.
        robot: name in config/robots, or path, of a simulated arm.

    Raises:
        SimulationError: unknown task, tasks of different scenes, a number below 1 or a seed below 0, the simulator
            can't start, or most attempts fail.
        DatasetError: `out` exists.
    """
    tasks = _of_one_scene([task] if isinstance(task, str) else task)
    workers = workers if workers is not None else len(os.sched_getaffinity(0))
    if episodes < 1 or workers < 1:
        raise SimulationError(f'episodes and workers must be at least 1, got {episodes} and {workers}')
    if seed < 0:
        raise SimulationError(f'seed must be at least 0, got {seed}')
    started, failed = time.monotonic(), 0
    cameras = DEFAULT_CAMERAS if images else {}
    columns = [*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn('{task.fields[note]}')]
    vectors = {'object_state': sim_task(tasks[0]).object_state_dim}
    spec = DatasetSpec.of(load_robot(robot), RATE_HZ, cameras, vectors)
    with DatasetWriter(out, spec) as writer, Progress(*columns, disable=quiet) as progress:
        for name in tasks:
            with closing(_attempts((name, robot, cameras), seed, workers, noise)) as attempts:
                bar = progress.add_task(f'demonstrations of {name}', total=episodes, note='')
                failed += _keep(writer, name, episodes, attempts, partial(progress.update, bar))
    return DemonstrationReport(writer.n_episodes, failed, writer.n_frames, time.monotonic() - started)


def _of_one_scene(tasks: Sequence[str]) -> Sequence[str]:
    """The tasks, each of which has an expert and the same environment and objects as the others."""
    for name in tasks:
        Expert(name)  # refuses a task that has none
    scenes = {name: (sim_task(name).environment, sim_task(name).objects) for name in tasks}
    differing = [name for name, scene in scenes.items() if scene != scenes[tasks[0]]]
    if differing or not tasks:
        raise SimulationError(
            f'tasks of one dataset share one scene; {", ".join(differing) or "none"} does not share that of '
            f'{tasks[0] if tasks else "any"}'
        )
    return tasks


def _keep(
    writer: DatasetWriter, task: str, episodes: int, attempts: Iterator[_Attempt], show: Callable[..., None]
) -> int:
    """Add successful attempts until there are `episodes` more; returns how many failed."""
    kept = failed = 0
    while kept < episodes:
        success, frames = next(attempts)
        if success:
            writer.add_episode(sim_task(task).instruction, True, frames)
            kept += 1
        else:
            failed += 1
            if failed > 20 + kept:
                raise SimulationError(f'{task}: {failed} of {failed + kept} attempts failed')
        show(completed=kept, note=f'{failed} failed' if failed else '')
    return failed


def record_episode(
    sim: SimRobot, kinematics: Kinematics, seed: int, noise: bool
) -> tuple[bool, dict[str, Any]]:
    """Reset the scene, let the expert act, and return whether it ends in success, and the frames (T, ...)."""
    rng = np.random.default_rng(seed)
    sim.reset(seed)
    perturbation = _Perturbation(rng, noise)
    perturbation.leave_home(sim)
    expert = Expert(sim.task.name, seed)
    rows: dict[str, list[Any]] = collections.defaultdict(list)
    while True:
        target, gripper = expert.act(sim)
        if expert.done:
            break
        rows['joint_positions'].append(sim.joint_positions)
        rows['object_state'].append(sim.object_state)
        rows['action'].append(poses.action_from_pose(target, gripper))
        for name in sim.cameras:
            rows[f'images.{name}'].append(sim.image(name))
        sim.step(perturbation.executed(target), gripper)
    return sim.success, _frames(sim, kinematics, {name: np.stack(values) for name, values in rows.items()})


def _frames(sim: SimRobot, kinematics: Kinematics, rows: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Columns of a dataset: what was measured, and what follows from the joints by forward kinematics."""
    joints, n_arm = rows['joint_positions'], len(sim.robot.joint_names)
    pose = kinematics.forward_many(joints[:, :n_arm])
    gripper = sim.robot.gripper.normalised(joints[:, n_arm:])
    observed = {f'observation.{name}': value for name, value in rows.items() if name != 'action'}
    return {
        **observed,
        'observation.proprioception': Proprioception(sim.robot, kinematics).many(
            joints
        ),  # as the live node does
        'observation.pose': poses.action_from_pose(pose, gripper),
        'action': rows['action'],
    }


class _Perturbation:
    """What `noise` does to one episode."""

    def __init__(self, rng: np.random.Generator, enabled: bool):
        self._rng = rng
        self._start = enabled and rng.random() < PERTURBED_SHARE
        self._std = NOISE_STD * rng.random() if enabled and rng.random() < NOISY_SHARE else np.zeros(6)
        self._offset = np.zeros(6)

    def leave_home(self, sim: SimRobot) -> None:
        """Move to a random pose near home; nothing is recorded meanwhile."""
        if not self._start:
            return
        pose = sim.pose_base_ee
        goal = _displaced(pose, self._rng.uniform(-START_OFFSET, START_OFFSET))
        for _ in range(START_STEPS):
            pose = step_towards(pose, goal)
            sim.step(pose, -1.0)

    def executed(self, target: Array) -> Array:
        """The command that is sent in place of the expert's: displaced by first-order Gauss-Markov noise."""
        if not self._std.any():
            return target
        keep = np.exp(-1.0 / NOISE_STEPS)
        self._offset = keep * self._offset + np.sqrt(1 - keep**2) * self._std * self._rng.standard_normal(6)
        return _displaced(target, self._offset)


def _displaced(pose: Array, offset: Array) -> Array:
    """Pose moved by metres (3) and turned by a rotation vector (3), both in base axes."""
    rotation = Rotation.from_rotvec(offset[3:]).as_matrix() @ pose[:3, :3]
    return poses.pose_from_position_rotation(pose[:3, 3] + offset[:3], rotation)


def episode_seed(seed: int, index: int) -> int:
    """Seed of the scene and the noise of attempt number `index` (from 0) of a run with `seed`."""
    return int(np.random.SeedSequence([_SEED_SPACE, seed, index]).generate_state(1)[0])


#: Whether it succeeded, and its frames.
_Attempt = tuple[bool, dict[str, Any]]
#: Task, robot, and camera name -> (height, width).
_Scene = tuple[str, str, Mapping[str, tuple[int, int]]]


def _attempts(scene: _Scene, seed: int, workers: int, noise: bool) -> Generator[_Attempt, None, None]:
    """Attempts 0, 1, 2, ... without end, in order."""
    seeds = (episode_seed(seed, index) for index in itertools.count())
    return _here(scene, seeds, noise) if workers == 1 else _elsewhere(scene, seeds, workers, noise)


def _here(scene: _Scene, seeds: Iterator[int], noise: bool) -> Generator[_Attempt, None, None]:
    sim, kinematics = _arm_of(scene)
    with closing(sim):
        for seed in seeds:
            yield record_episode(sim, kinematics, seed, noise)


def _elsewhere(
    scene: _Scene, seeds: Iterator[int], workers: int, noise: bool
) -> Generator[_Attempt, None, None]:
    """Attempts of other processes, a few of them ahead."""
    # Spawned, not forked: OpenGL contexts and thread pools don't survive a fork.
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context('spawn'),
        initializer=start_worker,
        initargs=(os.getpid(), workers),
    )
    waiting: collections.deque[Future] = collections.deque()
    try:
        while True:
            while len(waiting) < workers + 2:
                waiting.append(pool.submit(_attempt, scene, next(seeds), noise))
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise SimulationError(f'a process that makes demonstrations of {scene[0]} died: {error}') from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _arm_of(scene: _Scene) -> tuple[SimRobot, Kinematics]:
    task, robot, cameras = scene
    sim = SimRobot(task, load_robot(robot), cameras)
    return sim, Kinematics(sim.robot)


_worker: dict[str, Any] = {}


def _attempt(scene: _Scene, seed: int, noise: bool) -> tuple[bool, dict[str, Any]]:
    if 'sim' not in _worker:  # of one scene, as is the pool
        _worker['sim'], _worker['kinematics'] = _arm_of(scene)
    return record_episode(_worker['sim'], _worker['kinematics'], seed, noise)
