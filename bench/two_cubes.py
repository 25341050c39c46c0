"""One policy, one scene, two tasks: which cube goes onto which, by what the policy is told.

    decoupled-policy train stage2 config/training/two_cubes.yaml --out out/two_cubes
    python bench/two_cubes.py --policy out/two_cubes

Each instruction is said in the same scenes. An episode ends when either cube stands on the other, so that it tells
which task was done: the one that was said, the other one, or none. So each row is at once the right instruction for
the one task and the wrong one for the other. Episodes that are in the report already are not run again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.policy.checkpoint import read_header
from decoupled_policy_ros.sim.environment import SimRobot
from decoupled_policy_ros.sim.tasks import LIFTED_M, TASKS
from decoupled_policy_ros.training.evaluation import wilson_interval
from decoupled_policy_ros.training.rollout import Evaluation, Rollout

CUBES = {'stack': ('cube_a', 'cube_b'), 'stack_green': ('cube_b', 'cube_a')}  # which goes onto which
#: What is said, and the task that is meant. The first two are what the policy was trained on.
SAID = {
    TASKS['stack'].instruction: 'stack',
    TASKS['stack_green'].instruction: 'stack_green',
    'put the red block on top of the green block': 'stack',
    'put the green block on top of the red block': 'stack_green',
    'place red on green': 'stack',
    'place green on red': 'stack_green',
}


class Either:
    """Whether either task is done; remembers which, and which cube left the table first."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Before an episode."""
        self.done: str | None = None
        self.lifted: str | None = None

    def __call__(self, sim: SimRobot) -> bool:
        poses = sim.object_poses()
        for task, (upper, lower) in CUBES.items():
            if poses[upper][2, 3] > sim.table_height_m + LIFTED_M:
                self.lifted = self.lifted or task
                if sim.touching(upper, lower) and not sim.holding(upper):
                    self.done = task
        return self.done is not None


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        policy: folder of the policy.
        episodes: of each instruction, seeded 0, 1, ...
        said: how many of the instructions above, from the first on.
        json: the report, with each episode.
    """

    policy: Path = Path('out/two_cubes')
    episodes: int = 50
    said: int = len(SAID)
    json: Path = Path('docs/evidence/language.json')


def episodes_of(rollout: Rollout, either: Either, seeds: range, known: list[dict]) -> Iterator[dict]:
    """Results by seed, those that are known first."""
    yield from known
    for seed in seeds[len(known) :]:
        either.forget()
        result = rollout.run(seed)
        yield {'seed': seed, 'done': either.done, 'first_lifted': either.lifted, 'steps': result.steps}


def row_of(said: str, policy: dict, results: list[dict]) -> dict:
    """What came of an instruction."""
    meant = SAID[said]
    other = next(task for task in CUBES if task != meant)
    counts = {
        f'{what}_{whose}': sum(result[key] == task for result in results)
        for what, key in (('done', 'done'), ('lifted_first', 'first_lifted'))
        for whose, task in (('meant', meant), ('other', other), ('none', None))
    }
    return {
        'said': said,
        'trained_on': said in policy['language']['instructions'],
        'meant': meant,
        'episodes': len(results),
        **counts,
        **{
            f'wilson_95_done_{whose}': wilson_interval(counts[f'done_{whose}'], len(results))
            for whose in ('meant', 'other')
        },
        'results': results,
    }


def main(arguments: Arguments) -> None:
    """Run what is missing of the report; it is written after each instruction."""
    torch.set_num_threads(1)
    policy = read_header(arguments.policy)
    kept = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {}
    if kept.get('task_sha256') != policy['sha256']:
        kept = {}
    rows: dict[str, dict] = {row['said']: row for row in kept.get('rows', [])}
    either = Either()
    TASKS['either'] = dataclasses.replace(TASKS['stack'], name='either', success=either)
    for said in list(SAID)[: arguments.said]:
        known = rows.get(said, {}).get('results', [])[: arguments.episodes]
        if len(known) < arguments.episodes:
            rollout = Rollout(Evaluation(str(arguments.policy), 'either', instruction=said))
            results = list(episodes_of(rollout, either, range(arguments.episodes), known))
            rollout.close()
            rows[said] = row_of(said, policy, results)
            write_json(
                arguments.json,
                {
                    'policy': policy['name'],
                    'task_sha256': policy['sha256'],
                    'backbone': policy['backbone'],
                    'sentence_model': policy['language']['model'],
                    'steps': policy['provenance']['steps'],
                    'batch_size': policy['provenance']['batch_size'],
                    'rows': list(rows.values()),
                },
            )
        row = rows[said]
        print(
            f'| {said} | {row["done_meant"]} / {row["episodes"]} | {row["done_other"]} | {row["done_none"]} '
            f'| {row["lifted_first_meant"]} | {row["lifted_first_other"]} |',
            flush=True,
        )


if __name__ == '__main__':
    main(tyro.cli(Arguments))
