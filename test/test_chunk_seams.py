"""Where one chunk ends and the next begins, without a guard: with in-painting and without.

Without, a chunk is predicted without knowing the one before it, so the two may disagree about where the arm should be.
Within a chunk a command moves no further than its waypoints do in that time; from one chunk to the next it moves by
what the two disagree, on top of that. Nothing is blended and nothing is limited there. With in-painting they agree
about what has been executed, and disagree less about what comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
from test_policy_loop import PERIOD_NS, Stage, wait_for

from decoupled_policy_ros.observation.sampler import Sampler
from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.runtime.joining import JoinSettings
from decoupled_policy_ros.runtime.loop import PolicyLoop
from decoupled_policy_ros.runtime.states import LoopSettings

COMMANDS_PER_FRAME = 4
CHUNKS = 4


@pytest.fixture
def make(small_policy) -> Iterator[Callable[[JoinSettings], Stage]]:
    """Loops for which time waits, so that each command comes from the chunk that is due."""
    stages: list[Stage] = []

    def stage(join: JoinSettings) -> Stage:
        stages.append(waiting_stage(small_policy, join))
        return stages[-1]

    yield stage
    for stage in stages:
        stage.loop.stop()


def waiting_stage(small_policy, join: JoinSettings) -> Stage:
    stage = Stage(small_policy)
    stage.loop = PolicyLoop(
        Engine(small_policy, 2),
        Sampler(small_policy.contract, stage.buffers),
        stage.outputs,
        lambda: stage.now_ns,
        LoopSettings(lockstep=True, control_rate_hz=80.0, gripper_hysteresis=0.2, seed=0),
        lambda name: '',
        stage.failures.append,
        join=join,
    )
    return stage


def follow(stage: Stage) -> list[tuple[int, np.ndarray]]:
    """All commands of the first `CHUNKS` chunks, at four times the rate of the waypoints."""
    stage.loop.start(enabled=True)
    stage.observe()
    while len(stage.outputs.commands) < CHUNKS * 8 * COMMANDS_PER_FRAME:
        stage.now_ns += PERIOD_NS // COMMANDS_PER_FRAME
        if stage.now_ns % PERIOD_NS == 0:
            stage.observe()
        stage.loop.notify_ticked()
        if stage.now_ns % PERIOD_NS == 0 or stage.outputs.commands:
            wait_for(lambda: stage.failures or [c for c in stage.outputs.commands if c[0] == stage.now_ns])
    assert not stage.failures
    return stage.outputs.commands


def moved_m(pose_a: np.ndarray, pose_b: np.ndarray) -> float:
    return float(np.linalg.norm(pose_b[:3, 3] - pose_a[:3, 3]))


def test_commands_jump_from_chunk_to_chunk_by_what_these_disagree_and_nowhere_else(make):
    stage = make(JoinSettings())
    commands = follow(stage)
    chunks = stage.outputs.chunks
    assert [b.observation_stamp_ns - a.observation_stamp_ns for a, b in pairwise(chunks)] == [
        8 * PERIOD_NS
    ] * (CHUNKS - 1)

    def current(stamp_ns: int) -> Chunk:
        return [c for c in chunks if c.observation_stamp_ns <= stamp_ns][-1]

    seams = 0
    for (before_ns, before), (stamp_ns, pose) in pairwise(commands):
        chunk = current(stamp_ns)
        np.testing.assert_array_equal(pose, chunk.sample(stamp_ns)[0])  # the chunk's own, not a mixture
        waypoints = chunk.poses_base_ee[chunk.first - 1 : chunk.first + 9]
        within_m = max(moved_m(a, b) for a, b in pairwise(waypoints)) / COMMANDS_PER_FRAME
        disagreement_m = moved_m(before, chunk.sample(before_ns)[0])
        assert moved_m(before, pose) <= within_m + disagreement_m + 1e-12
        if current(before_ns) is chunk:
            assert disagreement_m == 0
        else:
            seams += 1
            assert disagreement_m > 1e-4  # an untrained network; blended, the command would lie in between
    assert seams == CHUNKS - 1


def disagreements_m(stage: Stage) -> list[float]:
    """How far each chunk is from where the one before it led, at the last command before it."""
    commands, chunks = follow(stage), stage.outputs.chunks
    last = [[(ns, pose) for ns, pose in commands if ns < c.observation_stamp_ns][-1] for c in chunks[1:]]
    return [moved_m(pose, c.sample(ns)[0]) for (ns, pose), c in zip(last, chunks[1:], strict=True)]


def test_in_painted_chunks_begin_with_what_was_executed_and_disagree_less_about_the_rest(make):
    stage = make(JoinSettings(inpaint=True, blend=4))
    joined = disagreements_m(stage)
    for before, after in pairwise(stage.outputs.chunks):
        executed_ns = after.stamps_ns[0]
        np.testing.assert_allclose(after.poses_base_ee[0], before.sample(executed_ns)[0], atol=1e-5)
    apart = disagreements_m(make(JoinSettings()))
    # The noise of a chunk comes of seed and stamp, so the free part is the same: four fifths of it are given up.
    assert max(joined) < 0.4 * max(apart)
    assert sum(joined) < 0.4 * sum(apart)


def test_in_painting_is_decided_by_seed_and_stamps_alone(make):
    one, other = (follow(make(JoinSettings(inpaint=True, samples=3))) for _ in range(2))
    assert len(one) >= CHUNKS * 8 * COMMANDS_PER_FRAME
    for (stamp_ns, pose), (other_ns, other_pose) in zip(one, other, strict=True):
        assert stamp_ns == other_ns
        np.testing.assert_array_equal(pose, other_pose)
