"""The policy's threads with a guard: real chunks of a network, a clock that the test sets, every command looked at."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from limits_checker import LimitsChecker
from test_policy_loop import PERIOD_NS, START_NS, Stage, wait_for
from told_policy import circle, save_told_policy

from decoupled_policy_ros.observation.sampler import Sampler
from decoupled_policy_ros.policy.checkpoint import load_policy
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime.dependent import Dependent
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.runtime.guard.guard import Guard
from decoupled_policy_ros.runtime.guard.settings import JOINT_RULES, GuardSettings
from decoupled_policy_ros.runtime.guard.verdict import Finding, Outcome, Verdict
from decoupled_policy_ros.runtime.joint_steering import InJoints
from decoupled_policy_ros.runtime.loop import PolicyLoop
from decoupled_policy_ros.runtime.states import (
    DISABLED,
    FAILED,
    FOLLOWING,
    GAVE_WAY,
    HOLDING,
    WAITING,
    LoopSettings,
    command_period_ns,
)
from decoupled_policy_ros.runtime.steering import Guarded

ROBOT = load_robot('panda_sim')
#: An untrained network points anywhere: what is left are the rules that slow it down.
LENIENT = GuardSettings(ignored_rules=JOINT_RULES | {'join', 'workspace'}, max_time_scale=1e3)


class Home:
    """Joints at home, unless they are not known."""

    known = True

    def positions(self, now_ns: int):
        return ROBOT.home_rad if self.known else None

    def why_not(self, now_ns: int) -> str:
        return 'nobody knows'


class BreakableEngine(Engine):
    """An engine whose device may be `lost`."""

    lost = False

    def __call__(self, observation, known=None, samples=1):
        if self.lost:
            raise RuntimeError('the device is lost')
        return super().__call__(observation, known, samples)


class Gripper:
    """A part that has something `waiting` to be heard."""

    waiting = False

    def missing(self) -> str:
        return ''

    def trouble(self) -> str:
        return 'a width waits' if self.waiting else ''

    def forget(self) -> None:
        self.waiting = False


class GuardedStage(Stage):
    """A loop in real time at 20 commands a second, with a guard; `in_joints` too if need be."""

    in_joints = lockstep = False
    arm = Home

    def __init__(self, policy, settings: GuardSettings) -> None:
        super().__init__(policy)
        self.gripper = Gripper()
        self.joints, self.engine, self.motions = self.arm(), BreakableEngine(policy, 2), []
        period_ns = command_period_ns(self.lockstep, 20.0)
        guarded = Guarded(Guard(ROBOT, settings), Kinematics(ROBOT), self.joints, period_ns)
        steering = (
            InJoints(guarded, ROBOT, self.joints, self.motions.append, lambda: self.now_ns, self.lockstep)
            if self.in_joints
            else guarded
        )
        self.loop = PolicyLoop(
            self.engine,
            Sampler(policy.contract, self.buffers),
            self.outputs,
            lambda: self.now_ns,
            LoopSettings(self.lockstep, control_rate_hz=20.0, gripper_hysteresis=0.2, seed=0),
            lambda name: '',
            self.failures.append,
            Dependent(steering, {'gripper': self.gripper}, hold=False),
        )

    def tick(self, skip: tuple[str, ...] = ()) -> int:
        time.sleep(0.02)  # a clock that runs away from the worker leaves nothing of a chunk
        return super().tick(skip)


@pytest.fixture
def make(small_policy) -> Iterator:
    stages = []

    def stage(settings: GuardSettings, policy=small_policy) -> GuardedStage:
        stages.append(GuardedStage(policy, settings))
        return stages[-1]

    yield stage
    for stage in stages:
        stage.loop.stop()
        assert stage.failures == []


def test_every_command_of_an_untrained_network_keeps_the_limits(make):
    stage = make(LENIENT)
    stage.loop.start(enabled=True)
    stage.begin()
    while len(stage.outputs.chunks) < 3:
        stage.command(stage.tick())
    limits = ROBOT.limits
    checker = LimitsChecker(limits.ee_linear_velocity_m_s, limits.ee_linear_acceleration_m_s2)
    for stamp_ns, pose in stage.outputs.commands:
        checker.add(stamp_ns, pose)
    checker.require_none()
    values = stage.loop.report()[2]
    assert int(values['guard_checked']) >= 3 and int(values['guard_time_scale_linear_acceleration']) >= 1


def test_the_first_command_is_where_the_arm_is_however_long_the_first_check_took(make):
    stage = make(LENIENT)
    guard, starts_ns, ended_ns = stage.loop._steering.guard, [], []
    check = guard.check

    def slow(request) -> Verdict:
        verdict = check(request)
        if not starts_ns:
            stage.now_ns += 2 * PERIOD_NS
        starts_ns.append(request.start_ns)
        ended_ns.append(stage.now_ns)
        return verdict

    guard.check = slow
    stage.loop.start(enabled=True)
    stage.observe()
    stage.tick()
    wait_for(lambda: stage.outputs.chunks)
    home = Kinematics(ROBOT).forward(ROBOT.home_rad)
    wait_for(lambda: stage.outputs.commands)
    for _ in range(40):  # the path begins as much later as checks take here
        if abs(stage.command(stage.tick()) - home).max() > 1e-3:
            break
    (_, first), *_, (_, last) = stage.outputs.commands
    np.testing.assert_allclose(first, home, atol=1e-9)
    assert abs(last - home).max() > 1e-3
    assert starts_ns[0] < ended_ns[0] < starts_ns[1]


def test_a_clock_that_was_set_forward_holds_the_arm_at_its_last_command_and_begins_anew(tmp_path, make):
    stage = make(GuardSettings(), load_policy(save_told_policy(tmp_path, circle()), ROBOT))
    stage.loop.start(enabled=True)
    stage.begin()
    last = [stage.command(stage.tick()) for _ in range(4)][-1]
    stage.now_ns += 250_000_000
    np.testing.assert_allclose(stage.command(stage.tick()), last, atol=1e-9)
    assert stage.loop.report()[2]['holds'] == '1'
    chunks = len(stage.outputs.chunks)
    while len(stage.outputs.chunks) == chunks or stage.loop.report()[0] != FOLLOWING:
        stage.command(stage.tick())
    checker = LimitsChecker(ROBOT.limits.ee_linear_velocity_m_s, ROBOT.limits.ee_linear_acceleration_m_s2)
    for number, (_, pose) in enumerate(
        stage.outputs.commands
    ):  # as the arm hears them, whatever the clock says
        checker.add(START_NS + number * PERIOD_NS, pose)
    checker.require_none()


def test_a_rejected_chunk_is_said_and_tried_again_with_the_next_frame(make):
    stage = make(GuardSettings())
    stage.joints.known = False
    stage.loop.start(enabled=True)
    stage.observe()
    stage.tick()
    wait_for(lambda: stage.loop.report()[2]['rejected_chunks'] == '1')
    for rejected in ('2', '3'):  # once for each frame, not again and again
        stage.tick()
        wait_for(lambda: 'joint_state: nobody knows' in stage.loop.report()[1])
        wait_for(lambda rejected=rejected: stage.loop.report()[2]['rejected_chunks'] == rejected)
    assert stage.loop.report()[0] == WAITING and not stage.outputs.commands
    assert stage.now_ns == START_NS + 150_000_000


def test_a_rejection_on_the_way_brings_the_arm_to_rest_until_a_chunk_is_accepted(tmp_path, make):
    stage = make(GuardSettings(), load_policy(save_told_policy(tmp_path, circle()), ROBOT))
    stage.loop.start(enabled=True)
    stage.begin()
    stage.joints.known = False
    while stage.loop.report()[0] != HOLDING:
        stage.command(stage.tick())
        wait_for(lambda: stage.loop.report()[0] in (FOLLOWING, HOLDING))
    assert 'nobody knows' in stage.loop.report()[1]
    held = [stage.command(stage.tick()) for _ in range(12)]
    assert abs(held[-1] - held[-2]).max() == 0.0  # at rest
    stage.joints.known = True
    chunks = len(stage.outputs.chunks)
    stage.tick()
    wait_for(lambda: len(stage.outputs.chunks) > chunks)
    stage.command(stage.tick())
    wait_for(lambda: stage.loop.report()[0] == FOLLOWING)
    checker = LimitsChecker(ROBOT.limits.ee_linear_velocity_m_s, ROBOT.limits.ee_linear_acceleration_m_s2)
    for stamp_ns, pose in stage.outputs.commands:
        checker.add(stamp_ns, pose)
    checker.require_none()


class RunningStage(GuardedStage):
    """Its clock goes by itself once `runs_from_s` is set."""

    runs_from_s: float | None = None
    stands_ns = START_NS

    @property
    def now_ns(self) -> int:
        runs_s = 0.0 if self.runs_from_s is None else time.monotonic() - self.runs_from_s
        return self.stands_ns + round(1e9 * runs_s)

    @now_ns.setter
    def now_ns(self, now_ns: int) -> None:
        self.stands_ns = now_ns


def test_where_the_network_fails_the_arm_comes_to_rest_before_commands_end(small_policy):
    stage = RunningStage(small_policy, LENIENT)
    stage.loop.start(enabled=True)
    try:
        stage.begin()
        (chunk,) = stage.outputs.chunks
        while stage.now_ns + PERIOD_NS < chunk.replan_stamp_ns:
            stage.command(stage.tick())
        stage.gripper.waiting = True
        assert stage.loop.report()[2]['gripper'] == 'a width waits'
        stage.engine.lost, stage.runs_from_s = True, time.monotonic()
        while stage.loop.report()[0] != FAILED:
            stage.observe()
            stage.loop.notify_ticked()
            time.sleep(0.01)
        assert stage.loop.report()[1] == 'RuntimeError: the device is lost'
        assert stage.loop.report()[2]['gripper'] == 'ready'  # what nobody has heard is not said any more
        (failure,) = wait_for(lambda: stage.failures)
        assert str(failure) == 'the device is lost'
    finally:
        stage.loop.stop()
    poses = [pose for _, pose in stage.outputs.commands]
    np.testing.assert_array_equal(poses[-1], poses[-2])  # at rest
    assert not np.array_equal(poses[-2], poses[-3])
    checker = LimitsChecker(ROBOT.limits.ee_linear_velocity_m_s, ROBOT.limits.ee_linear_acceleration_m_s2)
    for stamp_ns, pose in stage.outputs.commands:
        checker.add(stamp_ns, pose)
    checker.require_none()


@pytest.mark.parametrize('later', [DISABLED, GAVE_WAY])
def test_two_that_disable_it_at_once_let_it_come_to_rest_unless_it_gives_way(tmp_path, later):
    """Ctrl-C on one thread, a service or a lifecycle transition on another."""
    stage = RunningStage(load_policy(save_told_policy(tmp_path, circle(0.03)), ROBOT), GuardSettings())
    stage.loop.start(enabled=True)
    try:
        stage.begin()
        for _ in range(4):
            stage.command(stage.tick())
        moving = [pose for _, pose in stage.outputs.commands[-2:]]
        assert np.linalg.norm((moving[1] - moving[0])[:3, 3]) > 1e-3
        begun, stage.runs_from_s = len(stage.outputs.commands), time.monotonic()
        first = threading.Thread(target=stage.loop.enable, args=(False,))
        first.start()
        wait_for(lambda: len(stage.outputs.commands) > begun)
        assert stage.loop.enable(False, later, 'both')
        first.join()
        assert stage.loop.report()[:2] == (later, 'both')
    finally:
        stage.loop.stop()
    poses = [pose for _, pose in stage.outputs.commands]
    if later == DISABLED:
        np.testing.assert_array_equal(poses[-1], poses[-2])  # at rest


class JointStage(GuardedStage):
    """The arm is told how to move its joints."""

    in_joints = True


@pytest.fixture
def moving(tmp_path) -> Iterator[JointStage]:
    """It has been told one motion, and is in the middle of it."""
    stage = JointStage(load_policy(save_told_policy(tmp_path, circle()), ROBOT), GuardSettings())
    stage.loop.interrupt('of a run before', gives_way=True)  # forgotten: whoever starts again means it
    stage.loop.start(enabled=True)
    try:
        stage.begin()
        for _ in range(3):
            stage.command(stage.tick())
        (motion,) = stage.motions
        assert motion.at(stage.now_ns)[1].any()
        yield stage
    finally:
        stage.loop.stop()


@pytest.mark.parametrize(('state', 'last_words'), [(DISABLED, 1), (GAVE_WAY, 0)])
def test_whoever_gives_way_sends_no_trajectory_any_more(moving, state, last_words):
    assert moving.loop.enable(False, state, 'another one commands')
    assert len(moving.motions) == 1 + last_words
    assert moving.loop.report()[0] == state


@pytest.mark.parametrize('gives_way', [False, True])
def test_an_arm_that_did_not_do_the_newest_goal_is_not_taken_to_have_done_it(moving, gives_way):
    """A controller that gives a goal up, or is told to, holds the arm where it is: here it has never left home."""
    (motion,) = moving.motions
    assert np.abs(motion.at(moving.now_ns)[0] - ROBOT.home_rad).max() > 1e-3
    moving.loop.interrupt('the controller gave the goal up', gives_way)
    if gives_way:
        wait_for(lambda: moving.loop.report()[0] == GAVE_WAY)
        assert moving.loop.report()[1] == 'the controller gave the goal up'
        for _ in range(3):
            moving.tick()
        assert moving.motions == [motion]
        assert moving.loop.enable(True)
    wait_for(lambda: moving.tick() and len(moving.motions) > 1)
    np.testing.assert_allclose(moving.motions[1].positions_rad[0], ROBOT.home_rad, atol=1e-9)
    assert (WAITING, 'the controller gave the goal up') in moving.outputs.states or gives_way


class StampedAhead(GuardedStage):
    """Its streams are stamped by a clock that is ahead."""

    def observe(self, skip: tuple[str, ...] = (), ahead_ns: int = 60_000_000) -> None:
        super().observe(skip, ahead_ns)


def test_streams_of_a_clock_that_is_ahead_are_followed_like_others(small_policy):
    stage = StampedAhead(small_policy, LENIENT)
    stage.loop.start(enabled=True)
    try:
        stage.observe()
        wait_for(lambda: stage.tick() and stage.loop.report()[0] == FOLLOWING)
        for _ in range(20):
            now_ns = stage.tick()
            assert stage.command(now_ns) is not None
            assert all(chunk.observation_stamp_ns <= now_ns for chunk in stage.outputs.chunks)
        assert len(stage.outputs.chunks) > 1
        assert HOLDING not in [state for state, _ in stage.outputs.states]
    finally:
        stage.loop.stop()


class SinceTheReset(Home):
    """Joints at home since a time, as where the scene was put back: nothing is known of earlier ones."""

    def positions(self, now_ns: int):
        return super().positions(now_ns) if now_ns >= START_NS + PERIOD_NS else None


class LockstepStage(GuardedStage):
    """Time waits for the commands, so what is shown is shown once."""

    lockstep = True
    arm = SinceTheReset


def test_where_the_clock_is_heard_after_the_frames_it_is_waited_for(small_policy):
    stage = LockstepStage(small_policy, LENIENT)
    stage.loop.start(enabled=True)
    try:
        stage.observe()
        stage.observe(ahead_ns=PERIOD_NS)
        time.sleep(0.3)  # long enough for a chunk
        assert stage.loop.report()[2]['rejected_chunks'] == '0' and not stage.outputs.commands
        stage.now_ns += PERIOD_NS
        stage.loop.notify_ticked()
        stage.command(stage.now_ns)
        assert stage.loop.report()[0] == FOLLOWING
    finally:
        stage.loop.stop()


class RefusingOnce(LockstepStage):
    """Its first chunk is rejected."""

    arm = Home

    def __init__(self, policy, settings: GuardSettings) -> None:
        super().__init__(policy, settings)
        check = self.loop._steering.guard.check
        rejections = iter([Verdict(None, (Finding('reach', Outcome.REJECT, 1.0, 0.0, 'm'),))])
        self.loop._steering.guard.check = lambda request: next(rejections, None) or check(request)


@pytest.mark.parametrize('in_joints', [False, True])
def test_where_time_waits_a_first_chunk_that_is_rejected_lets_it_go_on(tmp_path, in_joints):
    policy = load_policy(save_told_policy(tmp_path, circle()), ROBOT)
    stage = type('Stage', (RefusingOnce,), {'in_joints': in_joints})(policy, GuardSettings())
    stage.loop.start(enabled=True)
    try:
        stage.observe()
        held = stage.command(stage.tick())
        np.testing.assert_allclose(held, Kinematics(ROBOT).forward(ROBOT.home_rad), atol=1e-9)
        assert stage.loop.report()[0] == HOLDING and 'reach' in stage.loop.report()[1]
        for motion in stage.motions:
            assert np.abs(motion.positions_rad - ROBOT.home_rad).max() < 1e-6
        assert bool(stage.motions) == in_joints
        stage.command(stage.tick())
        assert stage.loop.report()[:2] == (FOLLOWING, '')
        assert stage.loop.report()[2]['rejected_chunks'] == '1'
    finally:
        stage.loop.stop()
