"""Parameters of policy_node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.nodes.common import parameter
from decoupled_policy_ros.nodes.gripper_output import WAYS
from decoupled_policy_ros.nodes.joint_states import JointStates
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.runtime.assembly import assembled_steering, default_guard
from decoupled_policy_ros.runtime.cycles import CycleLog
from decoupled_policy_ros.runtime.dependent import Dependent
from decoupled_policy_ros.runtime.guard.settings import GuardSettings, read_guard_settings
from decoupled_policy_ros.runtime.shadow import FromArm, Shadowing
from decoupled_policy_ros.runtime.states import IN_JOINTS, LoopSettings, command_period_ns
from decoupled_policy_ros.runtime.steering import Guarded, Steering

if TYPE_CHECKING:
    from decoupled_policy_ros.nodes.policy_outputs import PolicyOutputs

#: Values of the parameter output.
OUTPUTS = ('pose', 'joint_trajectory', 'both', 'none')

#: A parameter that configure reads; it can be set while the node is unconfigured.
_parameter = partial(parameter, read_only=False)


@dataclass(frozen=True)
class PolicySettings:
    """Parameters of the node. configure reads them, and they can be set while the node is unconfigured.

    `task` and `instruction` can be set at any time, see `PolicyTasks`.
    """

    robot: str = _parameter('panda_sim', 'name in config/robots or path of a YAML file')
    task: str = _parameter('lift', 'folder of a task, or name of one in models/tasks')
    backbone: str = _parameter('', 'folder or name of a backbone; empty: the one that the task names')
    instruction: str = _parameter(
        '', 'what to do, in words; empty: the only instruction that the task was trained on'
    )
    task_timeout_s: float = _parameter(
        5.0,
        'how long another task, set while the node is running, may wait for its first observation (s)',
        floating=(0.0, 600.0),
    )
    device: str = _parameter('cpu', "where the network runs: 'cpu', 'cuda', 'cuda:1', ...")
    threads: int = _parameter(
        1,
        'CPU threads of the network; 0: one per core, for a machine with nothing else to do, or one for each of cores',
        integer=(0, 256),
    )
    cores: str = _parameter(
        '', "CPU cores that the network's threads run on, such as '2,3' or '4-7'; empty: any"
    )
    precision: str = _parameter(
        'float32',
        "what the network's large products are computed in: 'float32', or 'bfloat16' on a CPU that has it: faster, and "
        'poses differ by half a millimetre or so, see docs/performance.md',
        choices=('float32', 'bfloat16'),
    )
    denoising_steps: int = _parameter(10, 'DDIM steps of a chunk', integer=(1, 1000))
    seed: int = _parameter(
        0, 'of the noise: with the stamp of its observation it gives that of a chunk', integer=(0, 2**31)
    )
    control_rate_hz: float = _parameter(
        50.0, 'rate of target_pose on the node clock (Hz)', floating=(1.0, 1000.0)
    )
    lockstep: bool = _parameter(
        False,
        'with a simulator that waits: exactly one command for each value of /clock, stamped with it, and none '
        'before the chunk that is due then; replaces control_rate_hz and needs use_sim_time',
    )
    gripper_hysteresis: float = _parameter(
        0.2,
        'half width of the dead band around half open, in [-1 open, +1 closed]',
        floating=(0.0, 0.9),
    )
    shared_noise: bool = _parameter(
        False,
        'denoise all waypoints of a chunk from the same noise: they tremble less; for dp_mlp, see docs/timing.md',
    )
    inpaint: bool = _parameter(
        False,
        'begin each chunk with what will have been executed by the time that it is there, see docs/timing.md',
    )
    blend: int = _parameter(
        4,
        'waypoints after those that are drawn towards the motion under way, less and less',
        integer=(0, 64),
    )
    ensemble: float = _parameter(
        -1.0,
        'temporal ensembling: each chunk a mean of those that cover its time, the i-th of them weighing '
        'exp(-ensemble i); -1: off',
        floating=(-1.0, 100.0),
    )
    samples: int = _parameter(
        1,
        'chunks that are drawn of each observation; the one that continues the motion best is followed',
        integer=(1, 64),
    )
    spread_slow_m: float = _parameter(
        0.0,
        'slow down in proportion where the samples lie further apart than this (m); 0: never',
        floating=(0.0, 10.0),
    )
    spread_hold_m: float = _parameter(
        0.0,
        'come to rest where the samples lie further apart than this (m); 0: never',
        floating=(0.0, 10.0),
    )
    spread_help_s: float = _parameter(
        5.0,
        'ask for help, in ~/status and as an error in /diagnostics, where that goes on for so long (s); 0: never',
        floating=(0.0, 3600.0),
    )
    guard: bool = _parameter(
        True,
        'check every chunk against the limits of the robot, slow it down or refuse it, see docs/safety.md',
    )
    guard_file: str = _parameter(
        '', "YAML file with the guard's settings; what it leaves out keeps its default"
    )
    output: str = _parameter(
        'pose',
        "what the arm is told: 'pose', target_pose at control_rate_hz for a Cartesian controller; 'joint_trajectory', "
        "each chunk for joint_trajectory_controller; 'both'; 'none', nothing, the gripper neither",
        choices=OUTPUTS,
    )
    shadow: bool = _parameter(
        False,
        'somebody else moves the arm: command nothing, whatever output says, show where the policy would have gone, '
        'and say how far the arm was from there, see docs/tasks.md',
    )
    trajectory_action: bool = _parameter(
        False,
        'send joint trajectories as goals of FollowJointTrajectory, not on the topic; needs control_msgs',
    )
    gripper: str = _parameter(
        'auto',
        "how the gripper is told: 'action', GripperCommand; 'topic', gripper_command; 'auto', the action where the "
        'robot names one and control_msgs is installed',
        choices=WAYS,
    )
    missing_server: str = _parameter(
        'go_on',
        "without the action server of the gripper or the trajectories, or a listener on the gripper's topic: 'go_on' "
        "and say so, or 'hold' the arm",
        choices=('go_on', 'hold'),
    )
    other_commanders: str = _parameter(
        'give_way',
        "when somebody else commands the same arm: 'give_way', say nothing more until ~/enable; or 'go_on' and say so",
        choices=('give_way', 'go_on'),
    )
    enabled: bool = _parameter(True, 'command right after activation; otherwise ~/enable is waited for')
    robot_description_timeout_s: float = _parameter(
        3.0,
        'how long to wait for the URDF where the robot names a topic for it (s)',
        floating=(0.0, 60.0),
    )
    autostart: bool = parameter(False, 'configure and activate without being asked')


def loop_settings(settings: PolicySettings, cores: frozenset[int]) -> LoopSettings:
    """How commands are streamed; `cores` are those of the loop's threads.

    Raises:
        ConfigError: nothing would come of a setting.
    """
    _require_effect(settings)
    return LoopSettings(
        settings.lockstep, settings.control_rate_hz, settings.gripper_hysteresis, settings.seed, cores
    )


def policy_steering(
    robot: RobotDescription,
    settings: PolicySettings,
    outputs: PolicyOutputs,
    now_ns: Callable[[], int],
    log: CycleLog,
) -> tuple[Steering, JointStates | None]:
    """What turns chunks into commands, and where it is to be told of joint states.

    Raises:
        ConfigError: the guard's file is not readable, or has a value that is out of range; or joints are to be
            commanded without the guard.
    """
    checks = _guard_settings(settings, robot) if settings.guard else None
    if checks is None and outputs.joints is not None:
        raise ConfigError(
            f'output {settings.output!r} needs the guard, which finds the joints: set guard too'
        )
    joints = JointStates(robot, checks.joint_state_max_age_s) if checks is not None else None
    steering = assembled_steering(
        robot,
        checks,
        log.joints(joints) if joints is not None else None,
        command_period_ns(settings.lockstep, settings.control_rate_hz),
        outputs.joints.send if outputs.joints is not None else None,
        log.clock(now_ns),
        FromArm if settings.shadow else Guarded,
    )
    if outputs.shadow is not None:
        steering = Shadowing(steering, outputs.shadow.divergence.predicted)
    return Dependent(steering, outputs.parts(), settings.missing_server == 'hold'), joints


def _guard_settings(settings: PolicySettings, robot: RobotDescription) -> GuardSettings:
    defaults = default_guard(robot, settings.output in IN_JOINTS)
    return read_guard_settings(settings.guard_file, defaults) if settings.guard_file else defaults


def _require_effect(settings: PolicySettings) -> None:
    """Refuse settings that nothing would come of: whoever sets one relies on it."""
    for name in ('spread_slow_m', 'spread_hold_m'):
        if getattr(settings, name) > 0.0 and settings.samples < 2:
            raise ConfigError(
                f'{name} {getattr(settings, name):g} needs samples of at least 2, got {settings.samples}'
            )
    if -1.0 < settings.ensemble < 0.0:
        raise ConfigError(f'ensemble must be -1 (off), 0 or positive, got {settings.ensemble:g}')
    if settings.guard_file and not settings.guard:
        raise ConfigError(f'guard_file {settings.guard_file!r} needs the guard: set guard too, or no file')
    # Without any output, or in shadow mode, the action is only named for when the arm is to be commanded.
    if settings.trajectory_action and not settings.shadow and settings.output == 'pose':
        raise ConfigError(
            f'trajectory_action needs output {" or ".join(map(repr, IN_JOINTS))}, got {settings.output!r}'
        )
