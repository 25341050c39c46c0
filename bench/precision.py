"""What bfloat16 changes: success on Lift, and the largest difference of an action along the way.

    MUJOCO_GL=egl python bench/precision.py

The shipped policy in its simulated scene, with either precision and the same seeds. While float32 leads, every chunk is
computed in bfloat16 too, from the same pictures and the same noise.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console

from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.policy.packed import usable_precisions
from decoupled_policy_ros.robot.poses import POSITION, pose_from_action
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.training.rollout import Evaluation, Rollout


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        policy, task: what to evaluate.
        episodes: of each precision.
        json: write the figures here.
    """

    policy: str = 'lift'
    task: str = 'lift'
    episodes: int = 20
    json: Path | None = Path('docs/bench/precision.json')


class Both:
    """Leads with one engine and compares its chunks with those of another."""

    def __init__(self, leading: Engine, other: Engine):
        self._leading, self._other = leading, other
        self.position_mm: list[float] = []
        self.rotation_rad: list[float] = []
        self.gripper_flips = 0

    def many(
        self, observations: list, generators: list[torch.Generator], known: list, samples: int
    ) -> NDArray[np.float64]:
        """Chunks as the leading engine gives them."""
        states = [generator.get_state() for generator in generators]
        others = self._other.many(observations, generators, known, samples)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        chunks = self._leading.many(observations, generators, known, samples)
        for chunk, other in zip(chunks[:, 0], others[:, 0], strict=True):
            self.position_mm.append(1e3 * float(np.linalg.norm((chunk - other)[:, POSITION], axis=-1).max()))
            (a, grip), (b, other_grip) = pose_from_action(chunk), pose_from_action(other)
            trace = np.einsum('tij,tij->t', a[:, :3, :3], b[:, :3, :3])
            self.rotation_rad.append(float(np.arccos(np.clip((trace - 1) / 2, -1, 1)).max()))
            self.gripper_flips += int(np.count_nonzero((grip > 0) != (other_grip > 0)))
        return chunks


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    torch.set_num_threads(1)
    if 'bfloat16' not in usable_precisions(torch.device('cpu')):
        Console().print('this processor does not multiply bfloat16: there is nothing to compare')
        return
    rollout = Rollout(Evaluation(arguments.policy, arguments.task))
    exact, fast = (Engine(rollout.policy, 10, precision=p) for p in ('float32', 'bfloat16'))
    both, seeds = Both(exact, fast), range(arguments.episodes)
    successes = {}
    for name, engine in (('float32', both), ('bfloat16', fast)):
        rollout.engine = engine  # type: ignore[assignment]
        successes[name] = sum(result.success for result in rollout.run_all(seeds))
    rollout.close()
    report = {
        'policy': arguments.policy,
        'torch': torch.__version__,
        'machine': platform.machine(),
        'episodes': arguments.episodes,
        'successes': successes,
        'chunks': len(both.position_mm),
        'position_mm': {q: float(np.percentile(both.position_mm, p)) for q, p in QUANTILES.items()},
        'rotation_mrad': {q: 1e3 * float(np.percentile(both.rotation_rad, p)) for q, p in QUANTILES.items()},
        'gripper_values_of_another_sign': both.gripper_flips,
        'gripper_values': 16 * len(both.position_mm),
    }
    Console().print(report)
    if arguments.json:
        write_json(arguments.json, report)


QUANTILES = {'median': 50, 'p99': 99, 'largest': 100}

if __name__ == '__main__':
    main(tyro.cli(Arguments))
