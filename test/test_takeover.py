"""The loop with an engine that takes its time on the node's clock: chunks are there when they are due, and join."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from test_policy_loop import MS, PERIOD_NS, START_NS, Outputs, Stage, wait_for

from decoupled_policy_ros.observation.sampler import Sampler
from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.runtime.joining import JoinSettings
from decoupled_policy_ros.runtime.loop import PolicyLoop
from decoupled_policy_ros.runtime.selection import SpreadLimits
from decoupled_policy_ros.runtime.states import HOLDING, NEEDS_HELP, WAITING, LoopSettings

STEP_NS = 10 * MS


class SlowEngine(Engine):
    """Answers so much later on the stage's clock, and not before it is let go."""

    def __init__(self, policy, stage: SlowStage):
        super().__init__(policy, 2)
        self._stage = stage
        self.latency_ns, self.free = 100 * MS, threading.Event()
        self.free.set()
        self.asked_ns: int | None = None
        self.prefixes = []

    def __call__(self, observation, known=None, samples=1):
        begin_ns = self._stage.now_ns
        self.prefixes.append(known)
        prediction = super().__call__(observation, known, samples)
        self.asked_ns = begin_ns
        wait_for(lambda: not self.waiting)
        self.asked_ns = None
        return prediction

    @property
    def waiting(self) -> bool:
        """Whether it has computed what it shall answer later."""
        asked_ns = self.asked_ns
        if asked_ns is None:
            return False
        return self._stage.now_ns < asked_ns + self.latency_ns or not self.free.is_set()


class SlowStage(Stage):
    """Commands at 50 Hz, time in steps of 10 ms that wait for whatever is being computed in earnest."""

    def __init__(self, policy, join: JoinSettings) -> None:
        super().__init__(policy)
        self.outputs = Outputs()
        self.engine = SlowEngine(policy, self)
        self.loop = PolicyLoop(
            self.engine,
            Sampler(policy.contract, self.buffers),
            self.outputs,
            lambda: self.now_ns,
            LoopSettings(lockstep=False, control_rate_hz=50.0, gripper_hysteresis=0.2, seed=0),
            lambda name: '',
            self.failures.append,
            join=join,
        )
        self.plans, plan = 0, self.loop._plan

        def counted() -> bool:
            chunk_came = plan()
            self.plans += 1
            return chunk_came

        self.loop._plan = counted

    def run(self, seconds: float) -> None:
        """Let time pass, with a frame every 50 ms."""
        end_ns = self.now_ns + round(seconds * 1e9)
        while self.now_ns < end_ns:
            self.now_ns += STEP_NS
            plans = self.plans
            if (self.now_ns - START_NS) % PERIOD_NS == 0:
                self.observe()
            self.loop.notify_ticked()
            time.sleep(0.003)
            # The worker has seen this time: it finds nothing to do, or its engine waits for a later one.
            wait_for(lambda plans=plans: self.engine.waiting or self.plans > plans)

    def value(self, name: str) -> float:
        return float(self.loop.report()[2][name])


@pytest.fixture
def make(small_policy) -> Iterator:
    stages = []

    def stage(**settings) -> SlowStage:
        stages.append(SlowStage(small_policy, JoinSettings(**settings)))
        stages[-1].loop.start(enabled=True)
        return stages[-1]

    yield stage
    for stage in stages:
        stage.engine.free.set()
        stage.engine.latency_ns = 0
        stage.loop.stop()
        assert stage.failures == []


def test_chunks_are_requested_so_much_ahead_that_none_is_late(make):
    stage = make(inpaint=True)
    stage.run(3.0)  # what a cycle takes is known by then
    assert 110 <= stage.value('requested_ahead_ms') <= 200
    bridged, chunks = stage.value('bridged_ticks'), len(stage.outputs.chunks)
    stage.run(3.0)
    assert stage.value('bridged_ticks') - bridged <= 3  # of 150; a quantile is exceeded now and then
    assert stage.value('holds') == stage.value('cycles_missed') == 0
    assert len(stage.outputs.chunks) >= chunks + 7
    for before, after in list(pairwise(stage.outputs.chunks))[-5:]:
        # The newest frame that was there when it had to be requested, and followed from when it was reckoned with.
        assert after.observation_stamp_ns < before.replan_stamp_ns
        assert after.observation_stamp_ns < after.begins_ns <= before.replan_stamp_ns + STEP_NS


def test_what_will_have_been_executed_is_in_painted_and_commands_go_on_from_it(make):
    stage = make(inpaint=True)
    stage.run(5.0)
    assert stage.engine.prefixes[0] is None  # from rest there is nothing to go on from
    chunks, commands = stage.outputs.chunks, stage.outputs.commands
    assert len(chunks) > 10
    for before, after in list(pairwise(chunks))[-5:]:
        executed = [i for i in range(16) if after.stamps_ns[i] < after.begins_ns]
        assert 2 <= len(executed) <= 6
        for i in executed[1:]:  # the first may lie before the motion before began
            expected = current(chunks, after.stamps_ns[i], before).sample(after.stamps_ns[i])[0]
            np.testing.assert_allclose(after.poses_base_ee[i], expected, atol=1e-5)
    at_its_time = [
        np.array_equal(pose, [c for c in chunks if c.begins_ns <= stamp_ns][-1].sample(stamp_ns)[0])
        for stamp_ns, pose in commands[-100:]
    ]
    assert sum(at_its_time) >= 95  # a quantile is exceeded now and then


def current(chunks: list[Chunk], stamp_ns: int, newest: Chunk) -> Chunk:
    """The chunk that was followed at a time, of those up to the newest."""
    return [c for c in chunks[: chunks.index(newest) + 1] if c.begins_ns <= stamp_ns][-1]


def test_without_in_painting_chunks_are_there_in_time_too_and_jump(make):
    stage = make()
    stage.run(4.0)
    bridged = stage.value('bridged_ticks')
    stage.run(2.0)
    assert stage.value('bridged_ticks') - bridged <= 3 and set(stage.engine.prefixes) == {None}
    before, after = stage.outputs.chunks[-2:]
    apart = before.sample(after.begins_ns)[0] - after.sample(after.begins_ns)[0]
    assert np.abs(apart[:3, 3]).max() > 1e-3


def test_a_chunk_that_never_comes_is_bridged_and_then_held(make):
    stage = make(inpaint=True)
    stage.run(3.0)
    stage.engine.free.clear()
    stage.run(0.5)
    assert stage.value('bridged_ticks') > 0
    stage.run(1.0)
    assert stage.loop.report()[:2] == (HOLDING, 'the next chunk is late')
    assert stage.value('underruns') == 1
    stage.engine.free.set()
    # All waypoints of that chunk have passed; one from a newer frame is followed.
    stage.run(1.5)
    assert stage.loop.report()[0] == 'following'


def test_samples_that_disagree_are_held_against_and_help_is_asked_for(make):
    stage = make(samples=4, spread=SpreadLimits(hold_m=1e-4, help_s=0.5))
    stage.run(0.4)
    state, reason = stage.loop.report()[:2]
    assert state == WAITING and 'the 4 samples lie' in reason and 'limit 0.0001 m' in reason
    stage.run(1.5)
    state, reason = stage.loop.report()[:2]
    assert state == NEEDS_HELP and 'please help' in reason
    assert stage.outputs.commands == [] and stage.value('spread_m') > 1e-4
    assert [state for state, _ in stage.outputs.states].count(NEEDS_HELP) == 1


def test_samples_that_disagree_are_followed_more_slowly(make):
    stage = make(samples=4, spread=SpreadLimits(slow_m=1e-4))
    stage.run(1.0)
    assert stage.value('spread_slowed') == 4.0
    chunk = stage.outputs.chunks[-1]
    steps_ns = np.diff([stamp for stamp in chunk.stamps_ns if stamp > chunk.begins_ns + PERIOD_NS])
    assert set(steps_ns) == {4 * PERIOD_NS}
