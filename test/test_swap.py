"""Changes of a running loop, with real engines and threads and a clock that the test sets; what prepares them."""

import gc
import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from test_policy_loop import MS, Stage, wait_for

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.observation.sampler import Sampler
from decoupled_policy_ros.observation.streams import StreamBuffer
from decoupled_policy_ros.policy import Policy, Task, load_task
from decoupled_policy_ros.runtime.background import Background, Job
from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.runtime.states import FAILED, FOLLOWING
from decoupled_policy_ros.runtime.swap import Dropped, SwapTimes, change_instruction, swap_task


class Done:
    """Takes down what has become followed."""

    def __init__(self) -> None:
        self.heard: list[tuple[Engine | None, SwapTimes]] = []

    def __call__(self, engine: Engine | None, times: SwapTimes) -> None:
        self.heard.append((engine, times))


@pytest.fixture
def stage(small_policy) -> Iterator[Stage]:
    stage = Stage(small_policy)
    yield stage
    stage.loop.stop()
    assert stage.failures == []


def other_engine(policy: Policy, folders) -> Engine:
    """Another task on the same backbone."""
    torch.manual_seed(1)
    task = load_task(folders[1], policy.backbone)
    fresh = Task(policy.contract, policy.backbone, {'base_channels': 16, 'keypoints': 8}, 'other', 'go on')
    task.load_state_dict(fresh.state_dict())
    return Engine(Policy(policy.backbone, task, policy.robot), 2)


def swapped(
    stage: Stage, engine: Engine, done: Done, job: Job | None = None, timeout_s: float = 30.0
) -> None:
    sampler = Sampler(engine.policy.contract, stage.buffers)
    job = job or Job(lambda job: None)
    swap_task(
        job, stage.loop, lambda: engine, sampler, lambda name: '', lambda: stage.now_ns, timeout_s, done
    )


def test_a_chunk_of_the_other_task_follows_when_it_would_have_been_due(
    stage,
    small_policy,
    small_policy_folders,
):
    stage.loop.start(enabled=True)
    stage.begin()
    engine, done = other_engine(small_policy, small_policy_folders), Done()
    assert engine.backbone is small_policy.backbone  # it is not loaded again
    swapped(stage, engine, done)
    wait_for(lambda: done.heard)
    assert done.heard[0][0] is engine
    assert 0.0 <= done.heard[0][1].swap_ms < 50.0
    (first,) = stage.outputs.chunks
    while len(stage.outputs.chunks) == 1 and stage.now_ns < first.replan_stamp_ns:
        stamp_ns = stage.tick()
        pose = stage.command(stamp_ns)
        if len(stage.outputs.chunks) == 1:  # until then it goes on along the one under way
            np.testing.assert_allclose(pose, first.sample(stamp_ns)[0], atol=1e-12)
    wait_for(lambda: len(stage.outputs.chunks) == 2)
    second = stage.outputs.chunks[1]
    assert second.observation_stamp_ns <= first.replan_stamp_ns
    frames = {
        s.name: [np.zeros(s.shape, np.uint8 if s.kind == 'image' else np.float32)] * 2 for s in stage.specs
    }
    engine.reset(0, second.observation_stamp_ns)
    expected = Chunk(engine(frames).actions, second.observation_stamp_ns, 20.0)
    shared = len(second) - 1
    np.testing.assert_allclose(second.poses_base_ee[shared], expected.poses_base_ee[shared], atol=1e-9)
    assert stage.loop.report()[0] == FOLLOWING
    assert stage.loop.report()[2]['cycles_missed'] == stage.loop.report()[2]['holds'] == '0'


def test_a_task_that_sees_nothing_is_not_followed(stage, small_policy, small_policy_folders):
    stage.loop.start(enabled=True)
    stage.begin()
    engine, done = other_engine(small_policy, small_policy_folders), Done()
    blind = Sampler(engine.policy.contract, {**stage.buffers, 'wrist': StreamBuffer(4)})
    arguments = (stage.loop, lambda: engine, blind, lambda name: '', lambda: stage.now_ns, 0.1, done)
    with pytest.raises(ConfigError, match=r"within 0\.1 s: stream 'wrist': nothing has arrived"):
        swap_task(Job(lambda job: None), *arguments)
    stage.loop.stop()
    swap_task(Job(lambda job: None), *arguments)  # a loop that stands still needs no observation
    assert done.heard[0][0] is engine


def test_what_nobody_wants_any_more_is_not_followed(stage, small_policy, small_policy_folders):
    engine, done, job = other_engine(small_policy, small_policy_folders), Done(), Job(lambda job: None)
    job.drop()
    with pytest.raises(Dropped):
        swapped(stage, engine, done, job)
    with pytest.raises(Dropped):
        change_instruction(job, stage.loop, '', done)
    assert not done.heard


def test_an_instruction_goes_to_the_engine_that_is_followed_by_then(
    stage, small_policy, small_policy_folders
):
    engine, done = other_engine(small_policy, small_policy_folders), Done()
    swapped(stage, engine, Done())
    change_instruction(Job(lambda job: None), stage.loop, engine.instruction, done)
    assert [followed for followed, _ in done.heard] == [engine]


def test_what_is_dropped_while_its_change_waits_is_told_of(stage, small_policy, small_policy_folders):
    first = stage.loop._planner.engine
    engine, done = other_engine(small_policy, small_policy_folders), Done()
    stage.loop.start(enabled=True)
    stage.begin()
    with stage.loop._lock:  # the worker can't come to it
        for change in (
            lambda job: swapped(stage, engine, done, job),
            lambda job: change_instruction(job, stage.loop, '', done),
        ):
            job = Job(change)
            job.run()
            job.drop()
        assert not done.heard
    wait_for(lambda: len(done.heard) == 2)
    assert [engine for engine, _ in done.heard] == [None, None]
    assert stage.loop._planner.engine is first


def test_an_instruction_takes_the_place_of_a_task_that_waits_for_its_change(
    stage, small_policy, small_policy_folders
):
    """It was said of the task that was followed then, and would have gone to nobody."""
    first, background = stage.loop._planner.engine, Background('jobs')
    swap, told = Done(), Done()
    engine = other_engine(small_policy, small_policy_folders)
    stage.observe()
    stage.tick()
    stage.loop._cycling = True  # as if it were computing a cycle
    background.submit(lambda job: swapped(stage, engine, swap, job))
    wait_for(lambda: len(stage.loop._changes) == 1)
    background.submit(lambda job: change_instruction(job, stage.loop, first.instruction, told))
    wait_for(lambda: len(stage.loop._changes) == 2)
    stage.loop._end_cycles()
    background.close(30)
    assert [followed for followed, _ in swap.heard + told.heard] == [None, first]
    assert stage.loop._planner.engine is first


def test_a_task_that_is_not_followed_any_more_is_freed(stage, small_policy, small_policy_folders):
    stage.loop.start(enabled=True)
    stage.begin()
    followed = []
    for _ in range(3):
        done = Done()
        swapped(stage, other_engine(small_policy, small_policy_folders), done)
        wait_for(lambda done=done: done.heard)
        chunks = len(stage.outputs.chunks)
        while len(stage.outputs.chunks) == chunks:
            stage.command(stage.tick())
            time.sleep(0.01)
        followed.append(weakref.ref(stage.loop.engine))
        del done
    gc.collect()
    assert [engine() is not None for engine in followed] == [False, False, True]


def test_changes_are_made_when_the_loop_stops(stage):
    stage.loop.start(enabled=False)
    made = []
    with stage.loop._lock:  # the worker can't come to it
        stage.loop.between_cycles(lambda: made.append('first'))
        stage.loop.between_cycles(lambda: made.append('second'))
        assert not made
    stage.loop.stop()
    assert made == ['first', 'second']
    stage.loop.between_cycles(lambda: made.append('third'))
    assert made[-1] == 'third'


@pytest.mark.parametrize('thread', ['worker', 'streamer'])
def test_changes_are_made_when_the_loop_has_failed(small_policy, thread):
    stage, made = Stage(small_policy), []
    stage.loop.start(enabled=True)
    try:
        stage.begin()
        if thread == 'worker':
            stage.loop._planner.observe = None
        else:
            stage.outputs.broken = True
        with stage.loop._lock:
            stage.loop.between_cycles(lambda: made.append('first'))
            stage.now_ns += 500 * MS  # and as the threads go on, they fail
            stage.loop.notify_ticked()
        wait_for(lambda: stage.failures and made)
        wait_for(lambda: not stage.loop.cycling)
        stage.loop.between_cycles(lambda: made.append('second'))
        assert made == ['first', 'second'] and stage.loop.report()[0] == FAILED
    finally:
        stage.loop.stop()


def test_the_newest_job_takes_the_place_of_those_before_it():
    background, begun, release, done = Background('jobs'), threading.Event(), threading.Event(), []

    def first(job: Job) -> None:
        begun.set()
        release.wait(30)
        done.append(('first', job.dropped))

    background.submit(first)
    assert begun.wait(30)
    second = background.submit(lambda job: done.append(('second', job.dropped)))
    third = background.submit(lambda job: done.append(('third', job.dropped)))
    release.set()
    wait_for(lambda: len(done) == 2)
    assert done == [('first', True), ('third', False)]
    assert second.overtaken and not third.overtaken
    assert len([t for t in threading.enumerate() if t.name == 'jobs']) == 1
    background.close(30)
    assert not [t for t in threading.enumerate() if t.name == 'jobs']


def test_a_job_that_waits_ends_with_the_background():
    background, waited = Background('jobs'), []
    background.submit(lambda job: waited.append(job.wait(30)))
    began_s = time.monotonic()
    time.sleep(0.05)
    background.close(30)
    assert time.monotonic() - began_s < 10
    assert waited == [True]
