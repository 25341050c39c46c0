"""The policy's two threads with a real engine, a clock that the test sets, and a list in place of the topics."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from decoupled_policy_ros.errors import InferenceError
from decoupled_policy_ros.observation.sampler import Sampler
from decoupled_policy_ros.observation.streams import StreamBuffer
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.cycles import FOLLOW, CycleLog, Start, Ticks, decisions_from_text
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.runtime.guard.guard import Guard
from decoupled_policy_ros.runtime.loop import PolicyLoop
from decoupled_policy_ros.runtime.states import (
    DISABLED,
    FAILED,
    FOLLOWING,
    GAVE_WAY,
    HOLDING,
    WAITING,
    LoopSettings,
)
from decoupled_policy_ros.runtime.steering import Guarded

ROBOT = load_robot('panda_sim')
MS = 1_000_000
PERIOD_NS = 50 * MS
START_NS = 1_000_000 * MS
TIMEOUT_S = 30.0


class Outputs:
    """Keeps what the loop says; `broken` stands for a middleware that has gone."""

    def __init__(self) -> None:
        self.commands: list[tuple[int, NDArray[np.float64]]] = []
        self.chunks: list[Chunk] = []
        self.states: list[tuple[str, str]] = []
        self.broken = False

    def publish_command(self, pose_base_ee: NDArray[np.float64], stamp_ns: int) -> None:
        if self.broken:
            raise RuntimeError('the publisher is gone')
        self.commands.append((stamp_ns, pose_base_ee))

    def publish_gripper(self, state: str) -> None:
        assert state in ('open', 'closed')

    def publish_chunk(self, chunk: Chunk, others: Sequence[Chunk]) -> None:
        self.chunks.append(chunk)

    def publish_state(self, state: str, reason: str) -> None:
        self.states.append((state, reason))


class Stage:
    """A loop in real time at 20 commands a second, so that each tick of the test's clock is one command."""

    def __init__(self, policy, cores: frozenset[int] = frozenset(), steering=None, lockstep=False) -> None:
        self.now_ns = START_NS
        self.outputs = Outputs()
        self.failures: list[Exception] = []
        self.logged: list[str] = []
        self.buffers = {spec.name: StreamBuffer(64) for spec in policy.contract.streams}
        self.specs = policy.contract.streams
        self.loop = PolicyLoop(
            Engine(policy, 2),
            Sampler(policy.contract, self.buffers),
            self.outputs,
            lambda: self.now_ns,
            LoopSettings(
                lockstep=lockstep, control_rate_hz=20.0, gripper_hysteresis=0.2, seed=0, cores=cores
            ),
            lambda name: '',
            self.failures.append,
            steering,
            log=CycleLog(self.logged.append),
        )

    def observe(self, skip: tuple[str, ...] = (), ahead_ns: int = 0) -> None:
        """A sample on each stream, of now or of what the clock doesn't show yet."""
        for spec in self.specs:
            if spec.name not in skip:
                dtype = np.uint8 if spec.kind == 'image' else np.float32
                self.buffers[spec.name].push(self.now_ns + ahead_ns, np.zeros(spec.shape, dtype))
        self.loop.notify_observed()

    def tick(self, skip: tuple[str, ...] = ()) -> int:
        """Let 50 ms pass and show what there is to see."""
        self.now_ns += PERIOD_NS
        self.observe(skip)
        self.loop.notify_ticked()
        return self.now_ns

    def command(self, stamp_ns: int) -> NDArray[np.float64]:
        """The command of a time, waited for."""
        return wait_for(lambda: [pose for stamp, pose in list(self.outputs.commands) if stamp == stamp_ns])[0]

    def begin(self) -> int:
        """Observe until there is a chunk, and follow it to its second waypoint; returns the chunk's stamp."""
        self.observe()
        stamp_ns = self.tick()
        wait_for(lambda: [c for c in self.outputs.chunks if c.observation_stamp_ns == stamp_ns])
        self.command(self.tick())
        return stamp_ns


def wait_for(condition: Callable):
    """Wait for something true and return it."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (result := condition()):
        assert time.monotonic() < deadline, 'waited in vain'
        time.sleep(0.002)
    return result


@pytest.fixture
def stage(small_policy) -> Iterator[Stage]:
    stage = Stage(small_policy)
    yield stage
    stage.loop.stop()
    assert not [t for t in threading.enumerate() if t.name.startswith('policy_')]


def test_a_failed_loop_stays_failed_until_it_is_started_again(stage):
    stage.loop.start(enabled=True)
    stage.begin()
    stage.outputs.broken = True
    stage.tick()
    wait_for(lambda: stage.failures)
    assert stage.loop.report()[:2] == (FAILED, 'RuntimeError: the publisher is gone')
    assert stage.loop.enable(True) is False
    assert stage.loop.enable(False) is False
    stage.loop.restart()
    assert stage.loop.report()[0] == FAILED
    assert stage.outputs.states[-1][0] == FAILED
    stage.loop.stop()
    stage.outputs.broken = False
    stage.loop.start(enabled=True)
    assert (WAITING, 'no observation yet') in stage.outputs.states[-2:]
    stage.observe()
    stage.tick()
    wait_for(lambda: len(stage.outputs.chunks) > 1)
    stage.command(stage.tick())
    assert stage.loop.report()[0] == FOLLOWING


def test_what_was_decided_before_a_failure_is_written_down(stage):
    stage.loop.start(enabled=True)
    stage.begin()
    stage.outputs.broken = True
    stage.tick()
    wait_for(lambda: stage.failures)
    decisions = [decision for text in stage.logged for decision in decisions_from_text(text)[1]]
    commanded_ns = [stamp_ns for stamp_ns, _ in stage.outputs.commands]
    assert commanded_ns and decisions[-2] == Ticks(FOLLOW, commanded_ns)
    assert isinstance(decisions[-1], Start)


def test_to_enable_what_is_enabled_already_changes_nothing(stage):
    stage.loop.start(enabled=True)
    first_ns = stage.begin()
    states = list(stage.outputs.states)
    assert stage.loop.enable(True) is True
    (chunk,) = stage.outputs.chunks
    for _ in range(3):
        stamp_ns = stage.tick()
        np.testing.assert_array_equal(stage.command(stamp_ns), chunk.sample(stamp_ns)[0])
    assert [c.observation_stamp_ns for c in stage.outputs.chunks] == [first_ns]
    assert stage.outputs.states == states and stage.loop.report()[0] == FOLLOWING


def test_what_is_disabled_does_not_give_way(stage):
    stage.loop.start(enabled=False)
    assert stage.loop.enable(False, GAVE_WAY, 'somebody commands')
    assert stage.loop.report()[0] == DISABLED
    assert stage.loop.enable(True) and stage.loop.enable(False, GAVE_WAY, 'somebody commands')
    assert stage.loop.enable(False, GAVE_WAY, 'another one commands')
    assert stage.loop.report()[:2] == (GAVE_WAY, 'another one commands')


def test_a_stopped_loop_is_disabled_and_can_not_be_enabled(stage):
    stage.loop.start(enabled=True)
    stage.begin()
    assert stage.loop.report()[0] == FOLLOWING
    stage.loop.stop()
    assert stage.loop.report()[:2] == (DISABLED, 'inactive')
    assert stage.loop.enable(True) is False
    assert stage.loop.report()[0] == DISABLED


def test_statistics_count_since_activation(stage):
    stage.loop.start(enabled=True)
    stage.begin()
    assert int(stage.loop.report()[2]['commands']) >= 1
    stage.loop.stop()
    stage.loop.start(enabled=False)
    _, _, values, ages_s = stage.loop.report()
    assert (values['cycles'], values['commands']) == ('0', '0')
    assert ages_s == {}
    assert not [name for name in values if name.startswith(('refusals_', 'latency_'))]


def test_where_the_frame_due_now_is_late_the_next_chunk_starts_from_the_newest_one(stage):
    stage.loop.start(enabled=True)
    stage.begin()
    (chunk,) = stage.outputs.chunks
    while stage.now_ns + PERIOD_NS < chunk.replan_stamp_ns:
        stage.command(stage.tick())
    newest_ns = stage.now_ns
    # No further frame comes, but the newest one is younger than its limit of 0.2 s.
    stage.command(stage.tick(skip=('wrist',)))
    wait_for(lambda: len(stage.outputs.chunks) > 1)
    stage.command(stage.tick(skip=('wrist',)))
    assert [c.observation_stamp_ns for c in stage.outputs.chunks[1:]] == [newest_ns]
    assert stage.loop.report()[0] == FOLLOWING
    assert stage.loop.report()[2]['cycles_missed'] == '0'


def test_a_stale_stream_is_held_against_though_the_chunk_has_waypoints_left(stage):
    stage.loop.start(enabled=True)
    stage.begin()
    (chunk,) = stage.outputs.chunks
    while stage.now_ns + PERIOD_NS < chunk.replan_stamp_ns:
        stage.command(stage.tick(skip=('wrist',) if stage.now_ns > START_NS + 3 * PERIOD_NS else ()))
    held = stage.command(stage.now_ns)
    np.testing.assert_array_equal(held, chunk.sample(stage.now_ns)[0])
    stage.now_ns += PERIOD_NS  # the next chunk is due and the picture is older than 0.2 s
    stage.observe(skip=('wrist',))
    wait_for(lambda: stage.loop.report()[0] == HOLDING)
    reason = stage.loop.report()[1]
    assert "stream 'wrist' is" in reason and 'limit 0.2 s' in reason
    assert stage.now_ns < chunk.end_stamp_ns
    for _ in range(3):
        np.testing.assert_array_equal(stage.command(stage.tick(skip=('wrist',)))[:3], held[:3])
    # It recovers by itself, with a chunk from an observation since.
    back_ns = stage.tick()
    stage.tick()
    wait_for(lambda: len(stage.outputs.chunks) == 2)
    assert stage.outputs.chunks[1].observation_stamp_ns > back_ns
    stamp_ns = stage.tick()
    np.testing.assert_array_equal(stage.command(stamp_ns), stage.outputs.chunks[1].sample(stamp_ns)[0])
    assert stage.loop.report()[0] == FOLLOWING


def test_a_clock_that_is_set_back_is_a_fresh_start(stage):
    stage.loop.start(enabled=True)
    stage.begin()
    stage.now_ns -= START_NS // 2
    wait_for(lambda: stage.loop.report()[0] == WAITING)
    stage.outputs.commands.clear()
    first_ns = stage.begin()
    assert [chunk.observation_stamp_ns for chunk in stage.outputs.chunks][1:] == [first_ns]
    assert {stamp_ns for stamp_ns, _ in stage.outputs.commands} == {first_ns + PERIOD_NS}


class AtHome:
    """Joints that stay where they are."""

    def positions(self, now_ns: int) -> NDArray[np.float64]:
        return ROBOT.home_rad

    def why_not(self, now_ns: int) -> str:
        return ''


def test_refusals_that_come_late_while_time_goes_on_by_itself_are_answered(small_policy):
    """A simulator that nobody commands does not wait, not in lockstep either, until it hears a first command."""
    kinematics = Kinematics(ROBOT)
    steering = Guarded(Guard(ROBOT), kinematics, AtHome(), period_ns=None)
    stage = Stage(small_policy, steering=steering, lockstep=True)

    def refuse(*_):
        if not stage.outputs.commands:
            stage.tick()
        raise InferenceError('this one leads nowhere')

    stage.loop._planner.predict = refuse
    stage.loop.start(enabled=True)
    try:
        stage.observe()
        stage.tick()
        ((_, pose),) = wait_for(lambda: list(stage.outputs.commands))
        np.testing.assert_allclose(pose, kinematics.forward(ROBOT.home_rad), atol=1e-9)
        assert stage.loop.report()[:2] == (HOLDING, 'this one leads nowhere')
    finally:
        stage.loop.stop()


def test_the_pictures_of_the_next_observation_are_encoded_as_they_come(small_policy):
    stage = Stage(small_policy)
    engine, encoded = stage.loop._planner.engine, []
    encode = engine.features._encode
    engine.features._encode = lambda name, pictures, **how: (
        encoded.extend(id(picture) for picture in pictures) or encode(name, pictures, **how)
    )

    def newest(name: str) -> int:
        return id(stage.buffers[name].latest()[1])

    stage.loop.start(enabled=True)
    try:
        stage.begin()
        (chunk,) = stage.outputs.chunks
        frames = {}
        while stage.now_ns + 2 * PERIOD_NS < chunk.replan_stamp_ns:
            stage.command(stage.tick())
            frames[stage.now_ns] = newest('wrist')
        last_ns = stage.now_ns
        wait_for(lambda: newest('wrist') in encoded and newest('agentview') in encoded)
        # Frames that no observation will hold have not been.
        assert not [ns for ns, picture in frames.items() if picture in encoded and ns < last_ns]
        stage.now_ns += PERIOD_NS
        stage.observe(skip=('agentview',))  # the other camera and the joints are late
        wait_for(lambda: newest('wrist') in encoded)
        assert len(stage.outputs.chunks) == 1
        before = len(encoded)
        stage.observe(skip=('wrist', 'proprioception'))
        stage.now_ns += PERIOD_NS  # now the next chunk is due, and starts from the newest frame that is there
        stage.loop.notify_ticked()
        wait_for(lambda: len(stage.outputs.chunks) == 2)
        assert len(encoded) == before + 1  # all others were ready
    finally:
        stage.loop.stop()


def test_the_worker_runs_on_the_cores_that_it_is_given(small_policy):
    core = min(os.sched_getaffinity(0))
    stage = Stage(small_policy, cores=frozenset({core}))
    stage.loop.start(enabled=True)
    try:
        (worker,) = [t for t in threading.enumerate() if t.name == 'policy_worker']
        wait_for(lambda: os.sched_getaffinity(worker.native_id) == {core})
        stage.begin()
    finally:
        stage.loop.stop()
