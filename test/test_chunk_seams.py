"""Where one chunk ends and the next begins: what the runtime of today does there, and what it leaves to the policy.

A chunk is predicted without knowing the one before it, so the two may disagree about where the arm should be. The
runtime follows the new one from its observation's stamp on. Within a chunk a command moves no further than its
waypoints do in that time; from one chunk to the next it moves by what the two disagree, on top of that. Nothing is
blended and nothing is limited there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from test_policy_loop import PERIOD_NS, Stage, wait_for

from decoupled_policy_ros.observation.sampler import Sampler
from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.runtime.loop import PolicyLoop
from decoupled_policy_ros.runtime.states import LoopSettings

COMMANDS_PER_FRAME = 4
CHUNKS = 4


@pytest.fixture
def stage(small_policy) -> Iterator[Stage]:
    """A loop for which time waits, so that each command comes from the chunk that is due."""
    stage = Stage(small_policy)
    stage.loop = PolicyLoop(
        Engine(small_policy, 2),
        Sampler(small_policy.contract, stage.buffers),
        stage.outputs,
        lambda: stage.now_ns,
        LoopSettings(lockstep=True, control_rate_hz=80.0, gripper_hysteresis=0.2, seed=0),
        lambda name: '',
        stage.failures.append,
    )
    yield stage
    stage.loop.stop()


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


def test_commands_jump_from_chunk_to_chunk_by_what_these_disagree_and_nowhere_else(stage):
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
