"""Decides again what a log says was decided, with the code that decided it live, and keeps what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.errors import InferenceError
from decoupled_policy_ros.replay import messages
from decoupled_policy_ros.replay.inputs import Inputs
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.poses import GRIPPER_CLOSED, GRIPPER_OPEN
from decoupled_policy_ros.runtime.assembly import assembled_steering
from decoupled_policy_ros.runtime.chunks import Chunk, GripperLatch
from decoupled_policy_ros.runtime.cycles import FOLLOW, Cycle, Start, Ticks
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.runtime.guard.settings import GuardSettings
from decoupled_policy_ros.runtime.joining import Joiner
from decoupled_policy_ros.runtime.joint_motion import JointMotion
from decoupled_policy_ros.runtime.motion import UnderWay
from decoupled_policy_ros.runtime.shadow import FromArm
from decoupled_policy_ros.runtime.states import IN_JOINTS, IN_POSES, command_period_ns
from decoupled_policy_ros.runtime.steering import Guarded

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Command:
    """Something that the policy said.

    Attributes:
        what: 'target_pose', 'gripper_command', 'joint_trajectory' or 'trajectory'.
        message: as `messages` makes it.
        part: number of the start that it comes after.
        chunk_ns: stamp of the observation of the chunk that was followed then; 0 before the first.
    """

    what: str
    message: Any
    part: int
    chunk_ns: int


@dataclass(frozen=True, eq=False)
class Skill:
    """A task of the run, what it saw, and how its chunks joined."""

    engine: Engine
    inputs: Inputs
    joiner: Joiner


class GivenJoints:
    """Joints as the log says they were."""

    def __init__(self) -> None:
        self._left: list[tuple[int, Array] | None] = []
        self._standing: tuple[int, Array] | None = None

    def give(
        self, answers: list[tuple[int, Array] | None], standing: tuple[int, Array] | None = None
    ) -> None:
        """Answer with these stamps and positions in turn, and from then on with those of an arm that stands."""
        self._left, self._standing = answers, standing

    def at(self, now_ns: int) -> tuple[int, Array] | None:
        """Stamp and joint positions (n,), rad; None where nobody knew."""
        return self._left.pop(0) if self._left else self._standing

    def positions(self, now_ns: int) -> Array | None:
        """Joint positions (n,), rad; None where nobody knew."""
        found = self.at(now_ns)
        return None if found is None else found[1]

    def why_not(self, now_ns: int) -> str:
        """Why nobody knew."""
        return 'nobody knew them'


class GivenStart(Guarded):
    """Paths begin when the log says that they did: live it depends on how long checking them took."""

    start_ns = 0

    def _start_ns(self, chunk: Chunk, now_ns: int) -> int:
        return self.start_ns


class GivenStartFromArm(GivenStart, FromArm):
    """The same in shadow mode."""


class Player:
    """One run of the policy, decided again.

    Args:
        skills: tasks by their sha256.
        robot: the arm.
        run: what the run depended on, of its first start.
        guard: settings of the guard; None where there was none.
        seed: of the noise.
    """

    def __init__(
        self,
        skills: Mapping[str | None, Skill],
        robot: RobotDescription,
        run: Mapping[str, Any],
        guard: GuardSettings | None,
        seed: int,
    ):
        self.skills, self._robot, self._seed = skills, robot, seed
        settings = run['settings']
        self._shadow = settings['shadow']
        self._in_poses = self._shadow or settings['output'] in IN_POSES
        self._in_joints = not self._shadow and settings['output'] in IN_JOINTS
        self._with_gripper = self._shadow or settings['output'] != 'none'
        self._joints = GivenJoints()
        self._clock_ns = 0
        self._begun: GivenStart | None = None
        self._steering = assembled_steering(
            robot,
            guard,
            self._joints,
            command_period_ns(settings['lockstep'], settings['control_rate_hz']),
            self._send if self._in_joints else None,
            lambda: self._clock_ns,
            self._guarded,
        )
        self._latch = GripperLatch(settings['gripper_hysteresis'])
        self._near: messages.Quaternion | None = None
        self._part, self._chunk_ns = 0, 0
        self._forget()
        self.commands: list[Command] = []

    def start(self, decision: Start, part: int) -> None:
        """Forget everything before."""
        self._clock_ns = decision.now_ns
        self._joints.give([])
        self._steering.reset(decision.silently)
        for skill in self.skills.values():
            skill.inputs.start(part)
        self._part, self._chunk_ns = part, 0
        self._forget()
        self._latch.reset()
        near = decision.run['quat_xyzw']
        self._near = None if near is None else tuple(near)

    def _forget(self) -> None:
        """There is neither a motion nor a task whose chunks the next one could go on from."""
        # What was under way when a chunk was asked for: the chunk before, whatever has become of it since.
        self._under_way: UnderWay | None = None
        self._followed: tuple[Skill, int] | None = None

    def cycle(self, decision: Cycle) -> None:
        """Compute a chunk and follow it.

        Raises:
            ObservationError, InferenceError, ValueError: there is nothing to follow here.
        """
        skill = self.skills[decision.task_sha256]
        engine, inputs = skill.engine, skill.inputs
        observation = inputs.observation(decision)
        if decision.instruction != engine.instruction:
            engine.instruct(decision.instruction)
        engine.reset(self._seed, decision.stamp_ns)
        if (skill, decision.swap) != self._followed:  # the same file loaded again joins anew too
            skill.joiner.reset()
            self._followed = (skill, decision.swap)
        under_way = self._under_way if decision.joined else None
        wish = skill.joiner.wish(decision.stamp_ns, decision.takeover_ns, under_way)
        prediction = engine(observation.frames, wish.known, skill.joiner.settings.samples)
        joined = skill.joiner.join(prediction.samples, wish)
        self._joints.give(
            [None if stamp is None else (stamp, inputs.joints(stamp)) for stamp in decision.joints_ns]
        )
        if self._begun is not None:
            self._begun.start_ns = decision.start_ns
        plan = self._steering.plan(joined.chunk, decision.now_ns)
        self._chunk_ns = decision.stamp_ns
        if not self._steering.adopt(plan):
            raise InferenceError('its path begins before the last command, other than that of the run')
        self._under_way = self._steering.under_way()
        skill.joiner.followed(joined)
        self._say('trajectory', messages.trajectory_message(plan.chunk, self._robot))

    def stay(self, decision: Cycle) -> None:
        """A chunk was refused before the arm was told anything: it may be told to stay where it was then."""
        inputs = self.skills[decision.task_sha256].inputs
        stamps_ns = [stamp for stamp in decision.joints_ns if stamp is not None]
        self._joints.give([], (stamps_ns[-1], inputs.joints(stamps_ns[-1])) if stamps_ns else None)

    def ticks(self, decision: Ticks) -> None:
        """Command for each of these times."""
        for now_ns in decision.stamps_ns:
            if decision.what == FOLLOW:
                pose, gripper = self._steering.follow(now_ns)
                self._grip(self._latch.update(gripper))
                self._command(pose, now_ns)
            else:
                held = self._steering.hold(now_ns, begin=True)
                if held is not None:
                    self._command(held, now_ns)

    def _guarded(self, *arguments: Any) -> Guarded:
        self._begun = (GivenStartFromArm if self._shadow else GivenStart)(*arguments)
        return self._begun

    def _command(self, pose: Array, now_ns: int) -> None:
        if self._in_poses:
            frame = self._robot.base_frame
            message, self._near = messages.pose_message(pose, frame, now_ns, self._near)
            self._say('target_pose', message)

    def _grip(self, edge: str | None) -> None:
        if edge is not None and self._with_gripper:
            value = GRIPPER_OPEN if edge == 'open' else GRIPPER_CLOSED
            width_m = float(self._robot.gripper.width_from_normalised(value))
            self._say('gripper_command', messages.width_message(width_m))

    def _send(self, motion: JointMotion) -> None:
        self._say('joint_trajectory', messages.joint_trajectory_message(motion, self._robot))

    def _say(self, what: str, message: Any) -> None:
        self.commands.append(Command(what, message, self._part, self._chunk_ns))
