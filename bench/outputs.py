"""Poses against joint trajectories: the same episodes by either output, and what finding the joints costs.

    python bench/outputs.py                                                         (make bench)

Either way the simulated arm's Cartesian controller does the work; by joints it is led by the end effector of the joint
trajectories that a controller would be sent, with the settings that policy_node's guard has for that output. Times are
the processor's, of one thread, per chunk, beside those of the policy cycle that the chunk came from.
"""

from __future__ import annotations

import json
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
from decoupled_policy_ros.runtime.assembly import default_guard
from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.guard.guard import Guard
from decoupled_policy_ros.runtime.joint_motion import JointMotion
from decoupled_policy_ros.runtime.joint_steering import InJoints
from decoupled_policy_ros.runtime.steering import Guarded, Plan
from decoupled_policy_ros.sim.environment import SimRobot
from decoupled_policy_ros.training.rollout import Evaluation, Rollout


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        policy: task folder or name.
        task: simulated task.
        episodes: by each output.
        json: write the figures here.
    """

    policy: str = 'lift'
    task: str = 'lift'
    episodes: int = 10
    json: Path | None = Path('docs/bench/outputs.json')


class Where:
    """The simulated arm's joints."""

    def __init__(self, sim: SimRobot):
        self._sim = sim

    def positions(self, _now_ns: int) -> NDArray[np.float64]:
        return self._sim.joint_positions[: len(self._sim.robot.joint_names)]

    def why_not(self, _now_ns: int) -> str:
        return ''


class Timed(Guarded):
    """A guarded steering that tells how long its last plan took."""

    plan_ms = 0.0

    def plan(self, chunk: Chunk, now_ns: int) -> Plan:
        start = time.thread_time()
        plan = super().plan(chunk, now_ns)
        self.plan_ms = 1e3 * (time.thread_time() - start)
        return plan


class ByJoints(InJoints):
    """Steering whose poses are those of the joint trajectories that it sends."""

    def __init__(self, sim: SimRobot, guard: Guard):
        self._forward = Kinematics(sim.robot).forward
        self.sent: JointMotion | None = None
        self.guarded = Timed(guard, Kinematics(sim.robot), Where(sim), period_ns=None)
        self.guard_ms: list[float] = []
        self.joints_ms: list[float] = []
        self.points: list[int] = []
        self.away_m = 0.0
        super().__init__(self.guarded, sim.robot, Where(sim), self._send, lambda: sim.stamp_ns, lockstep=True)

    def _send(self, motion: JointMotion) -> None:
        self.sent = motion

    def plan(self, chunk: Chunk, now_ns: int) -> Plan:
        start = time.thread_time()
        plan = super().plan(chunk, now_ns)
        self.guard_ms.append(self.guarded.plan_ms)
        self.joints_ms.append(1e3 * (time.thread_time() - start) - self.guarded.plan_ms)
        self.points.append(len(plan.joints.stamps_ns))  # type: ignore[attr-defined]
        return plan

    def follow(self, now_ns: int) -> tuple[NDArray[np.float64], float]:
        pose, gripper = super().follow(now_ns)
        assert self.sent is not None
        led = self._forward(self.sent.at(now_ns)[0])
        self.away_m = max(self.away_m, float(np.linalg.norm(led[:3, 3] - pose[:3, 3])))
        return led, gripper

    def hold(self, now_ns: int) -> NDArray[np.float64] | None:
        pose = super().hold(now_ns)
        return pose if pose is None or self.sent is None else self._forward(self.sent.at(now_ns)[0])


def play(rollout: Rollout, episodes: int) -> tuple[int, list[int], int, list[float]]:
    """Successes, steps of each episode, rejected chunks, and the processor time of each cycle (ms)."""
    (scene,) = rollout.scenes
    successes, steps, rejected, cycles = 0, [], 0, []
    for i in range(episodes):
        moves = scene.episode(100_000 + i, rollout.max_steps)
        rollout.engine.reset(100_000 + i)
        try:
            question = next(moves)
            while True:
                start = time.thread_time()
                samples = rollout.engine(question.observation).samples
                cycles.append(1e3 * (time.thread_time() - start))
                question = moves.send(samples)
        except StopIteration as end:
            successes += bool(end.value.success)
            steps.append(end.value.steps)
            rejected += end.value.rejected_chunks
    return successes, steps, rejected, cycles


def measure(arguments: Arguments) -> dict:
    """Both outputs, one after the other, on the same scenes."""
    rollout = Rollout(Evaluation(arguments.policy, arguments.task, guard=True))
    (scene,) = rollout.scenes
    report: dict = {'policy': arguments.policy, 'task': arguments.task, 'episodes': arguments.episodes}
    successes, steps, rejected, _ = play(rollout, arguments.episodes)
    report['pose'] = {
        'successes': successes, 'steps_p50': statistics.median(steps), 'rejected_chunks': rejected,
    }  # fmt: skip
    scene.steering = steering = ByJoints(scene.sim, Guard(rollout.robot, default_guard(rollout.robot, True)))
    successes, steps, rejected, cycles = play(rollout, arguments.episodes)
    joints_ms, cycle_ms = statistics.median(steering.joints_ms), statistics.median(cycles)
    report['joint_trajectory'] = {
        'successes': successes, 'steps_p50': statistics.median(steps), 'rejected_chunks': rejected,
        'largest_time_scale': steering.guarded.statistics.largest_time_scale,
        'points_p50': statistics.median(steering.points),
        'from_path_mm_max': 1e3 * steering.away_m,
        'guard_ms_p50': statistics.median(steering.guard_ms),
        'joints_ms_p50': joints_ms, 'joints_ms_p99': float(np.percentile(steering.joints_ms, 99)),
        'cycle_ms_p50': cycle_ms, 'joints_over_cycle': joints_ms / cycle_ms,
    }  # fmt: skip
    rollout.close()
    return report


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    torch.set_num_threads(1)
    report = measure(arguments)
    print(json.dumps(report, indent=1))
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
