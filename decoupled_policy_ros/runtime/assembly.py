"""The steering that settings ask for: in the node, and where a run of the node is computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime.direct import Direct
from decoupled_policy_ros.runtime.guard.guard import Guard
from decoupled_policy_ros.runtime.guard.settings import GuardSettings
from decoupled_policy_ros.runtime.joining import JoinSettings
from decoupled_policy_ros.runtime.joint_motion import JointMotion
from decoupled_policy_ros.runtime.joint_steering import InJoints
from decoupled_policy_ros.runtime.selection import SpreadLimits
from decoupled_policy_ros.runtime.steering import Guarded, Joints, Steering

#: Share of the joints' acceleration that paths are planned with where joints are commanded. The rest is for what the
#: joints do besides: they lean towards home, and were up to 1.32 times as fast as planned over three Lift episodes.
JOINT_SHARE = 0.7


def default_guard(robot: RobotDescription, in_joints: bool) -> GuardSettings:
    """Settings of the guard as far as no file gives others.

    Args:
        robot: the arm.
        in_joints: whether joints are commanded: a controller that follows them exactly needs joints that accelerate
            like the arm's.
    """
    if not in_joints:
        return GuardSettings()
    planned = {'acceleration_rad_s2': (JOINT_SHARE * robot.limits.acceleration_rad_s2).tolist()}
    return GuardSettings(frozenset(), overrides=planned)


def join_settings(settings: Mapping[str, Any]) -> JoinSettings:
    """How chunks join, from the parameters of the node that say so.

    Raises:
        ConfigError: they contradict each other.
    """
    return JoinSettings(
        settings['inpaint'],
        settings['blend'],
        settings['ensemble'] if settings['ensemble'] >= 0.0 else None,
        settings['samples'],
        SpreadLimits(settings['spread_slow_m'], settings['spread_hold_m'], settings['spread_help_s']),
    )


def assembled_steering(
    robot: RobotDescription,
    checks: GuardSettings | None,
    joints: Joints | None,
    period_ns: int | None,
    send: Callable[[JointMotion], None] | None,
    now_ns: Callable[[], int],
    guarded: Callable[[Guard, Kinematics, Any, int | None], Guarded] = Guarded,
) -> Steering:
    """What turns chunks into commands.

    Args:
        robot: the arm.
        checks: of the guard; None: no guard.
        joints: where the arm is; needed with a guard.
        period_ns: of commands; None: time waits for them.
        send: told of motions of the joints; None: none are made. They need a guard.
        now_ns: the clock.
        guarded: what follows chunks with a guard.

    Raises:
        ConfigError: the guard's settings and the robot do not fit together.
    """
    if checks is None:
        return Direct(GuardSettings().stopping(robot))
    assert joints is not None
    steering = guarded(Guard(robot, checks), Kinematics(robot), joints, period_ns)
    return steering if send is None else InJoints(steering, robot, joints, send, now_ns, period_ns is None)
