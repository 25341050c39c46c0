"""A policy's loop with real threads, and its log played in this process: joints, stops, a stream that is silent."""

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_policy_loop import START_NS, Stage, wait_for
from told_policy import circle, save_told_policy

from decoupled_policy_ros.errors import InferenceError
from decoupled_policy_ros.observation.sampler import Observation, Sampler
from decoupled_policy_ros.policy.checkpoint import load_policy
from decoupled_policy_ros.replay import messages
from decoupled_policy_ros.replay.player import Player, Skill
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.runtime.assembly import assembled_steering
from decoupled_policy_ros.runtime.cycles import Cycle, CycleLog, Start, Ticks, decisions_from_text
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.runtime.guard.settings import GuardSettings
from decoupled_policy_ros.runtime.guard.verdict import Finding, Outcome, Verdict
from decoupled_policy_ros.runtime.joining import ChunkTiming, Joiner, JoinSettings
from decoupled_policy_ros.runtime.joint_motion import JointMotion
from decoupled_policy_ros.runtime.loop import PolicyLoop
from decoupled_policy_ros.runtime.shadow import FromArm
from decoupled_policy_ros.runtime.states import GAVE_WAY, LoopSettings, command_period_ns
from decoupled_policy_ros.runtime.steering import Guarded

ROBOT = load_robot('panda_sim')
SEED, STEPS, RATE_HZ, HYSTERESIS = 7, 2, 20.0, 0.2
JOIN = JoinSettings()


def joints_rad(stamp_ns: int) -> NDArray[np.float64]:
    """Where the arm is: it sways about home."""
    return ROBOT.home_rad + 0.01 * np.sin(2e-9 * stamp_ns + np.arange(7))


class Swaying:
    """Joint states at 100 Hz."""

    def at(self, now_ns: int):
        stamp_ns = now_ns // 10_000_000 * 10_000_000
        return stamp_ns, joints_rad(stamp_ns)

    def why_not(self, now_ns: int) -> str:
        return ''


class Standing(Swaying):
    """The same arm before it is told anything, heard once."""

    def at(self, now_ns: int):
        return super().at(START_NS)


class JointStage(Stage):
    """A loop with the guard that commands joints too, or shadows, and takes down what it decides."""

    def __init__(
        self,
        policy,
        shadow: bool,
        join: JoinSettings = JOIN,
        lockstep: bool = False,
        refusals: int = 0,
        arm: type[Swaying] = Swaying,
    ) -> None:
        super().__init__(policy)
        self.lockstep = lockstep
        self.join = join
        self.shadow = shadow
        self.texts: list[str] = []
        self.motions: list[JointMotion] = []
        log = CycleLog(self.texts.append, lambda: {'quat_xyzw': None})
        clock = log.clock(lambda: self.now_ns)
        joints = log.joints(arm())
        steering = assembled_steering(
            ROBOT,
            GuardSettings(),
            joints,
            command_period_ns(lockstep, RATE_HZ),
            None if shadow else self.motions.append,
            clock,
            FromArm if shadow else Guarded,
        )
        check = steering.guard.check
        findings = [Finding('reach', Outcome.REJECT, 1.0, 0.0, 'm')] * refusals
        steering.guard.check = lambda r: Verdict(None, (findings.pop(),)) if findings else check(r)
        self.loop = PolicyLoop(
            Engine(policy, STEPS),
            Sampler(policy.contract, self.buffers),
            self.outputs,
            lambda: self.now_ns,
            LoopSettings(lockstep, control_rate_hz=RATE_HZ, gripper_hysteresis=HYSTERESIS, seed=SEED),
            lambda name: '',
            self.failures.append,
            steering,
            log,
            join,
        )

    def run(self, ticks: int, skip: tuple[str, ...] = ()) -> None:
        """Let time pass, about as fast as it does, a command each."""
        for _ in range(ticks):
            self.command(self.tick(skip))
            time.sleep(0.04)

    def run_on(self) -> None:
        """Let time pass until there is another chunk, however long the worker takes for it."""
        chunks = len(self.outputs.chunks)
        for _ in range(1000):
            if len(self.outputs.chunks) > chunks:
                return
            self.run(1)
        raise AssertionError('no other chunk')

    def enable(self, enabled: bool) -> None:
        assert self.loop.enable(enabled)

    def begin_anew(self) -> None:
        """Enable, and go on until there are commands."""
        chunks = len(self.outputs.chunks)
        self.enable(True)
        self.tick()
        wait_for(lambda: len(self.outputs.chunks) > chunks)
        self.command(self.tick())


class Broken(Engine):
    """An engine whose first chunks are refused, as those that are not finite."""

    def __init__(self, policy, refusals: int) -> None:
        super().__init__(policy, STEPS)
        self.refusals = refusals

    def __call__(self, *arguments, **options):
        if self.refusals:
            self.refusals -= 1
            raise InferenceError('the chunk is not finite')
        return super().__call__(*arguments, **options)


class Seen:
    """What the stage has shown, by the stamps in the log."""

    def __init__(self, stage: JointStage, policy) -> None:
        self._sampler = Sampler(policy.contract, stage.buffers)

    def observation(self, cycle: Cycle) -> Observation:
        observation = self._sampler.sample(cycle.stamp_ns)
        assert {n: list(stamps) for n, stamps in observation.stamps_ns.items()} == cycle.samples_ns
        return observation

    def start(self, part: int) -> None:
        """All is at hand from the beginning."""

    def joints(self, stamp_ns: int):
        return joints_rad(stamp_ns)


@pytest.fixture
def task(tmp_path) -> Path:
    return save_told_policy(tmp_path, circle())


@pytest.fixture(params=[False, True], ids=['commanded', 'shadowed'])
def stage(task, request) -> Iterator[JointStage]:
    stage = JointStage(load_policy(task, ROBOT), request.param)
    stage.loop.start(enabled=True)
    yield stage
    stage.loop.stop()
    assert stage.failures == []


def played(stage: JointStage, task: Path) -> Player:
    """All that the log says, decided again."""
    policy = load_policy(task, ROBOT)
    skill = Skill(Engine(policy, STEPS), Seen(stage, policy), Joiner(ChunkTiming.of(policy), stage.join))
    settings = {
        'output': 'both', 'shadow': stage.shadow, 'lockstep': stage.lockstep, 'gripper_hysteresis': HYSTERESIS,
        'control_rate_hz': RATE_HZ,
    }  # fmt: skip
    player = Player({policy.task.sha256: skill}, ROBOT, {'settings': settings}, GuardSettings(), SEED)
    starts = 0
    for text in stage.texts:
        for decision in decisions_from_text(text)[1]:
            if isinstance(decision, Start):
                player.start(decision, starts)
                starts += 1
            elif isinstance(decision, Ticks):
                player.ticks(decision)
            elif decision.led_to_commands:
                player.stay(decision) if decision.refused else player.cycle(decision)
    return player


def require_the_same(stage: JointStage, player: Player) -> None:
    """Every pose and every trajectory of the joints, bit for bit."""
    said = defaultdict(list)
    for command in player.commands:
        said[command.what].append(command.message)
    expected = [messages.joint_trajectory_message(motion, ROBOT) for motion in stage.motions]
    pairs = zip(expected, said['joint_trajectory'], strict=True)
    assert [messages.first_difference(*pair) for pair in pairs] == [None] * len(expected)
    positions = [(c.pose.position.x, c.pose.position.y, c.pose.position.z) for c in said['target_pose']]
    assert positions == [tuple(pose[:3, 3]) for _, pose in stage.outputs.commands]
    stamps_ns = [messages.message_stamp_ns(c) for c in said['target_pose']]
    assert stamps_ns == [stamp_ns for stamp_ns, _ in stage.outputs.commands]
    assert len(said['trajectory']) == len(stage.outputs.chunks)


def test_joints_stops_and_holds_are_computed_again_bit_for_bit(stage, task):
    stage.observe()
    stage.begin()
    stage.run_on()
    stage.run(4)
    stage.enable(False)  # braking, in joints
    stage.begin_anew()
    stage.run(6)
    stage.run(24, skip=('wrist',))  # at the end of its chunk the arm comes to rest, in joints too
    assert stage.loop.report()[0] == 'holding'
    stage.enable(False)
    assert len(stage.motions) >= (0 if stage.shadow else 4) and len(stage.outputs.chunks) >= 3
    require_the_same(stage, played(stage, task))


def test_whoever_gave_way_in_mid_motion_sends_no_way_to_rest_in_the_replay_either(task):
    stage = JointStage(load_policy(task, ROBOT), shadow=False)
    stage.loop.start(enabled=True)
    try:
        stage.begin()
        stage.run(4)
        motions = len(stage.motions)
        assert stage.loop.enable(False, GAVE_WAY, 'another one commands')
        assert len(stage.motions) == motions
        stage.begin_anew()
        stage.run(3)
        stage.enable(False)
    finally:
        stage.loop.stop()
    require_the_same(stage, played(stage, task))


def test_where_time_waits_a_stay_after_a_refused_chunk_is_computed_again(task):
    stage = JointStage(load_policy(task, ROBOT), shadow=False, lockstep=True, refusals=2)
    stage.loop.start(enabled=True)
    try:
        stage.observe()
        stage.run(12)
        assert stage.loop.report()[2]['rejected_chunks'] == '2' and stage.outputs.chunks
        stage.enable(False)
    finally:
        stage.loop.stop()
    require_the_same(stage, played(stage, task))


def test_where_time_waits_a_stay_after_a_chunk_that_is_not_finite_is_computed_again(task):
    """Nobody has looked where the arm is by then."""
    policy = load_policy(task, ROBOT)
    stage = JointStage(policy, shadow=False, lockstep=True, arm=Standing)
    stage.loop.follow_task(Broken(policy, 2), Sampler(policy.contract, stage.buffers), lambda name: '')
    stage.loop.start(enabled=True)
    try:
        stage.observe()
        stage.run(12)
        assert stage.loop.report()[2]['rejected_chunks'] == '2' and stage.outputs.chunks
        stage.enable(False)
    finally:
        stage.loop.stop()
    require_the_same(stage, played(stage, task))


def test_the_same_task_loaded_again_joins_anew(task):
    policy = load_policy(task, ROBOT)
    stage = JointStage(policy, False, JoinSettings(ensemble=0.1))
    stage.loop.start(enabled=True)
    try:
        stage.observe()
        stage.begin()
        stage.run_on()
        sampler = Sampler(policy.contract, stage.buffers)
        swapped = len(stage.outputs.chunks)
        stage.loop.between_cycles(
            lambda: stage.loop.follow_task(Engine(policy, STEPS), sampler, lambda name: '')
        )
        stage.run_on()
        stage.run_on()
        stage.enable(False)
        assert 2 <= swapped <= len(stage.outputs.chunks) - 2
    finally:
        stage.loop.stop()
    poses = [c.message for c in played(stage, task).commands if c.what == 'target_pose']
    positions = [(m.pose.position.x, m.pose.position.y, m.pose.position.z) for m in poses]
    assert positions == [tuple(pose[:3, 3]) for _, pose in stage.outputs.commands]
