"""What happens where one chunk ends and the next begins, in rollouts, with each way of joining them.

    python bench/seams.py --policy lift --task lift                                   (make bench)
    python bench/seams.py --policy out/stack --task stack --label 'DP-MLP from state'

Commands at 20 Hz, as the simulated arm gets them. At a join is the first command of a chunk that goes on from another
one: the velocity changes there by |v_j - v_(j-1)|, and the jerk is |p_(j+1) - 3 p_j + 3 p_(j-1) - p_(j-2)| / dt^3.
Everywhere else is within a chunk. The scenes are the same for every way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.joining import JoinSettings
from decoupled_policy_ros.runtime.motion import UnderWay
from decoupled_policy_ros.runtime.steering import Plan, Steering
from decoupled_policy_ros.training.evaluation import wilson_interval
from decoupled_policy_ros.training.rollout import Evaluation, Rollout
from decoupled_policy_ros.training.scenes import EpisodeResult

Array = NDArray[np.float64]

WAYS = {
    'as predicted': JoinSettings(),
    'ensemble': JoinSettings(ensemble=0.01),
    '8 samples': JoinSettings(samples=8),
    'in-painting': JoinSettings(inpaint=True),
    'in-painting, 8 samples': JoinSettings(inpaint=True, samples=8),
}
#: The same with one noise for all waypoints of a chunk.
SHARED = ', shared noise'


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        policy: task folder or name.
        task: simulated task.
        label: name of the policy in the report; its own by default.
        ways: of joining, all by default; with ', shared noise' at the end all waypoints of a chunk get the same noise.
        blends: values of blend to try besides, with in-painting.
        episodes: of each way, seeded first_seed, first_seed + 1, ...
        first_seed: of the scenes.
        json: rows of this policy and task are replaced in this file.
    """

    policy: str = 'lift'
    task: str = 'lift'
    label: str = ''
    ways: tuple[str, ...] = tuple(WAYS)
    blends: tuple[int, ...] = ()
    episodes: int = 20
    first_seed: int = 200_000
    json: Path | None = Path('docs/bench/seams.json')


class Watched:
    """Steering of a scene, of which every command and every join is kept.

    Args:
        steering: decides.
    """

    def __init__(self, steering: Steering):
        self._steering = steering
        self.episodes: list[tuple[list[Array], list[int]]] = []

    def reset(self) -> None:
        self._steering.reset()
        self.episodes.append(([], []))

    def under_way(self) -> UnderWay | None:
        return self._steering.under_way()

    def plan(self, chunk: Chunk, now_ns: int) -> Plan:
        return self._steering.plan(chunk, now_ns)

    def adopt(self, plan: Plan) -> bool:
        poses, joins = self.episodes[-1]
        if self._steering.under_way() is not None:
            joins.append(len(poses))
        return self._steering.adopt(plan)

    def follow(self, now_ns: int) -> tuple[Array, float]:
        pose, gripper = self._steering.follow(now_ns)
        self.episodes[-1][0].append(pose)
        return pose, gripper

    def hold(self, now_ns: int) -> Array | None:
        pose = self._steering.hold(now_ns)
        if pose is not None:
            self.episodes[-1][0].append(pose)
        return pose


def changes(episodes: list[tuple[list[Array], list[int]]], dt_s: float) -> dict[str, Any]:
    """Changes of velocity (m/s, rad/s) and jerks (m/s3), at joins and within chunks: median and 95th percentile."""
    kept: dict[str, list[float]] = {}
    for poses, joins in episodes:
        if len(poses) < 4:
            continue
        positions = np.array([pose[:3, 3] for pose in poses])
        turns = [Rotation.from_matrix(b[:3, :3] @ a[:3, :3].T).as_rotvec() for a, b in pairwise(poses)]
        found = {
            'velocity_m_s': np.linalg.norm(np.diff(positions, 2, axis=0), axis=1) / dt_s,
            'angular_rad_s': np.linalg.norm(np.diff(turns, axis=0), axis=1) / dt_s,
            'jerk_m_s3': np.linalg.norm(np.diff(positions, 3, axis=0), axis=1) / dt_s**3,
        }
        for name, values in found.items():
            # The value at index i is of commands i .. i + 2, the last of which is the join; of i .. i + 3 for jerks.
            for i, value in enumerate(values):
                where = 'join' if i + 2 in joins else 'within'
                kept.setdefault(f'{where}_{name}', []).append(float(value))
    return {
        f'{name}_p{percent}': round(float(np.percentile(values, percent)), 4)
        for name, values in kept.items()
        for percent in (50, 95)
    }


def measured(arguments: Arguments, way: str, join: JoinSettings, guard: bool) -> dict[str, Any]:
    """One row: success, what the guard did, and the joins."""
    shared = way.endswith(SHARED)
    spec = Evaluation(arguments.policy, arguments.task, guard=guard, join=join, shared_noise=shared)
    rollout = Rollout(spec)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.episodes)
    watched: list[Watched] = []
    scenes = rollout._scenes

    def watching(count: int) -> list[Any]:
        made = scenes(count)
        for scene in made:
            scene.steering = Watched(scene.steering)  # type: ignore[assignment]
            watched.append(scene.steering)  # type: ignore[arg-type]
        return made

    rollout._scenes = watching  # type: ignore[method-assign]
    try:
        results: list[EpisodeResult] = list(rollout.run_all(seeds))
    finally:
        rollout.close()
    good = [result.steps for result in results if result.success]
    return {
        'task': arguments.task,
        'policy': arguments.label or arguments.policy,
        'way': way,
        'join': asdict(join),
        'guard': guard,
        'episodes': len(results),
        'first_seed': arguments.first_seed,
        'successes': len(good),
        'wilson_95': wilson_interval(len(good), len(results)),
        'mean_steps_of_successes': round(float(np.mean(good)), 1) if good else None,
        'chunks': sum(result.chunks for result in results),
        'slowed_chunks': sum(result.slowed_chunks for result in results),
        'rejected_chunks': sum(result.rejected_chunks for result in results),
        **changes([episode for one in watched for episode in one.episodes], 1 / rollout.contract.rate_hz),
    }


def rows(arguments: Arguments) -> Iterator[dict[str, Any]]:
    """A row for each way, without and with the guard."""
    ways = {way: WAYS[way.removesuffix(SHARED)] for way in arguments.ways}
    ways |= {f'in-painting, blend {n}': JoinSettings(inpaint=True, blend=n) for n in arguments.blends}
    for way, join in ways.items():
        for guard in (False, True):
            yield measured(arguments, way, join, guard)


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    torch.set_num_threads(1)
    done: list[dict[str, Any]] = []
    for row in rows(arguments):
        print(json.dumps({k: v for k, v in row.items() if k != 'join'}), flush=True)
        done.append(row)
        if arguments.json:
            _save(arguments.json, done)


def _save(path: Path, done: list[dict[str, Any]]) -> None:
    """Write rows in the place of those of the same policy, task and way."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row['task'], row['policy'], row['way'], row['guard']

    before = json.loads(path.read_text()) if path.is_file() else []
    new = {key(row) for row in done}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([row for row in before if key(row) not in new] + done, indent=1) + '\n')


if __name__ == '__main__':
    main(tyro.cli(Arguments))
