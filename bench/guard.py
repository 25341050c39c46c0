"""How long the guard takes for a chunk, beside the policy cycle that the chunk came from, in one run.

    python bench/guard.py                                                           (make bench)

Chunks are those of the shipped policy along episodes in the simulator, with all that they disagree about, checked
against everything: inverse kinematics of each waypoint, collisions, limits, and slowed down. A tame chunk is a
straight line that no rule objects to. Checks and cycles alternate, so that a machine whose speed drifts slows both.
Times are the processor's: what else runs on the machine does not count.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime.guard.guard import Guard, Request
from decoupled_policy_ros.runtime.guard.verdict import Verdict
from decoupled_policy_ros.runtime.motion import NS_PER_S, MotionState
from decoupled_policy_ros.runtime.steering import ChunkRejected
from decoupled_policy_ros.training.rollout import Evaluation, Rollout
from decoupled_policy_ros.training.scenes import Scene


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        policy: task folder or name.
        task: simulated task.
        episodes: from which chunks are taken.
        scenes, draws: how many scenes' first chunks are drawn, how often, to see how many are rejected.
        json: write the figures here.
    """

    policy: str = 'lift'
    task: str = 'lift'
    episodes: int = 4
    scenes: int = 20
    draws: int = 20
    json: Path | None = Path('docs/bench/guard.json')


class Recording(Guard):
    """A guard that keeps what it was asked, and what it said."""

    requests: list[Request]
    verdicts: list[Verdict]

    def check(self, request: Request) -> Verdict:
        verdict = super().check(request)
        self.requests.append(request)
        self.verdicts.append(verdict)
        return verdict


def tame(guard: Guard, kinematics: Kinematics, home_rad: NDArray[np.float64]) -> Request:
    """Sixteen waypoints along x at 0.1 m/s from a motion that does so already."""
    home = kinematics.forward(home_rad)
    way = np.tile(home, (16, 1, 1))
    way[:, 0, 3] += 0.005 * np.arange(1, 17)
    start = MotionState(home, np.array([0.1, 0.0, 0.0]), np.zeros(3))
    stamps = [NS_PER_S + 50_000_000 * (i + 1) for i in range(16)]
    return Request(start, NS_PER_S, way, stamps, np.zeros(17), home_rad, needed=8)


def took_ms(run) -> float:
    start = time.thread_time()
    run()
    return 1e3 * (time.thread_time() - start)


def play(rollout: Rollout, scene: Scene, seed: int) -> bool:
    """One episode; whether it succeeded."""
    moves = scene.episode(seed, rollout.max_steps)
    rollout.engine.reset(seed)
    try:
        question = next(moves)
        while True:
            question = moves.send(rollout.engine(question.observation).samples)
    except StopIteration as end:
        return bool(end.value.success)


def rejected_first_chunks(rollout: Rollout, scene: Scene, arguments: Arguments) -> int:
    """How many of all first chunks of episodes the guard rejects, so many drawn in each of so many scenes."""
    rejected = 0
    for seed in range(1, arguments.scenes + 1):
        moves = scene.episode(seed, rollout.max_steps)
        question, stamp_ns = next(moves), scene.sim.stamp_ns
        wish = scene.joiner.wish(stamp_ns, stamp_ns, None)
        for draw in range(arguments.draws):
            rollout.engine.reset(seed, draw)
            joined = scene.joiner.join(rollout.engine(question.observation).samples, wish)
            try:
                scene.steering.plan(joined.chunk, stamp_ns)
            except ChunkRejected:
                rejected += 1
        moves.close()
    return rejected


def measure(arguments: Arguments) -> dict:
    """Median and 99th percentile of a check and of a cycle's stages, ms."""
    rollout = Rollout(Evaluation(arguments.policy, arguments.task, guard=True))
    (scene,) = rollout.scenes
    guard = Recording(rollout.robot)
    guard.requests, guard.verdicts = [], []
    scene.steering.guard = guard
    successes = sum(play(rollout, scene, 100_000 + i) for i in range(arguments.episodes))
    observation = {
        s.name: np.zeros(
            (rollout.contract.n_obs_steps, *s.shape), np.uint8 if s.kind == 'image' else np.float32
        )
        for s in rollout.contract.streams
    }
    wanted, line = guard.requests, tame(guard, Kinematics(rollout.robot), rollout.robot.home_rad)
    plain = Guard(rollout.robot)
    plain.check(line)
    checks, tames, denoising, cycles = [], [], [], []
    for request in wanted:
        checks.append(took_ms(lambda request=request: plain.check(request)))
        tames.append(took_ms(lambda: plain.check(line)))
        start = time.thread_time()
        prediction = rollout.engine(observation)
        cycles.append(1e3 * (time.thread_time() - start))
        denoising.append(cycles[-1] * prediction.timings_ms['denoise'] / prediction.timings_ms['total'])
    outcomes: dict[str, int] = {}
    for verdict in guard.verdicts:
        for name in {finding.outcome.value for finding in verdict.findings} or {'pass'}:
            outcomes[name] = outcomes.get(name, 0) + 1
    scene.steering.guard = plain
    rejected = rejected_first_chunks(rollout, scene, arguments)
    rollout.close()
    return {
        'policy': arguments.policy,
        'task': arguments.task,
        'machine': platform.machine(),
        'waypoints': 16,
        'chunks': len(wanted),
        'episodes': arguments.episodes,
        'successes': successes,
        'outcomes': outcomes,
        'first_chunks': arguments.scenes * arguments.draws,
        'rejected_first_chunks': rejected,
        'largest_time_scale_p50': statistics.median(v.time_scale for v in guard.verdicts),
        'check_ms_p50': statistics.median(checks),
        'check_ms_p99': float(np.percentile(checks, 99)),
        'tame_check_ms_p50': statistics.median(tames),
        'denoise_ms_p50': statistics.median(denoising),
        'cycle_ms_p50': statistics.median(cycles),
        'check_over_denoise': statistics.median(c / d for c, d in zip(checks, denoising, strict=True)),
        'tame_over_denoise': statistics.median(c / d for c, d in zip(tames, denoising, strict=True)),
    }


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    torch.set_num_threads(1)
    report = measure(arguments)
    print(json.dumps(report, indent=1))
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
