"""From a task's name and an arm to a running robosuite environment, the same in every process."""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from decoupled_policy_ros.errors import SimulationError
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.sim.benchmarks import make_benchmark_environment
from decoupled_policy_ros.sim.renderer import NO_OPENGL, choose_opengl
from decoupled_policy_ros.sim.tasks import SimTask

if TYPE_CHECKING:
    from decoupled_policy_ros.sim.environment import SimRobot

#: robosuite's arms that there is a description of, and the robot in config/robots that is it.
ARMS = {'Panda': 'panda_sim', 'UR5e': 'ur5e_sim', 'IIWA': 'iiwa_sim', 'Kinova3': 'kinova3_sim'}


def simulated_arm(robot: RobotDescription) -> str:
    """Name in robosuite of the arm that has the described joints.

    Raises:
        SimulationError: there is none; the message names the joints of each.
    """
    import_robosuite()
    from robosuite.models.robots import create_robot

    joints = {arm: tuple(map(bare, create_robot(arm).joints)) for arm in ARMS}
    for arm, names in joints.items():
        if names == robot.joint_names:
            return arm
    simulated = '; '.join(f'{arm}: {", ".join(names)}' for arm, names in joints.items())
    raise SimulationError(
        f'robot {robot.name!r} has joints {", ".join(robot.joint_names)}, the simulated arms have {simulated}'
    )


def bare(name: str) -> str:
    """Name of a joint without robosuite's prefix for the arm or the gripper."""
    return name.split('_', 1)[1]


def import_robosuite() -> Any:
    """The robosuite module, quiet and with a way to draw.

    Raises:
        SimulationError: it isn't installed; the message names the extra that brings it.
    """
    choose_opengl()
    # robosuite warns on every import that its optional private macro file is missing.
    logging.getLogger('robosuite_logs').addFilter(lambda record: 'macro' not in record.getMessage())
    try:
        return importlib.import_module('robosuite')
    except ImportError as error:
        raise SimulationError(
            f'the simulator needs robosuite and mujoco ({error}): pip install "decoupled_policy_ros[sim]"'
        ) from error
    except (AttributeError, RuntimeError) as error:  # MuJoCo's, of a library that it was told to draw with
        chosen = os.environ.get('MUJOCO_GL')
        raise SimulationError(
            f'{NO_OPENGL} (MUJOCO_GL={chosen}: {error}; valid: egl, osmesa, glfw)'
        ) from error


def make_environment(task: SimTask, arm: str, rate_hz: float) -> Any:
    """A robosuite environment with that arm, commanded by absolute poses, without observations or pictures."""
    robosuite = import_robosuite()
    if task.environment == 'Detour':
        importlib.import_module('decoupled_policy_ros.sim.detour')
    controller = robosuite.load_controller_config(default_controller='OSC_POSE')
    controller['control_delta'] = False
    # A reset without rebuilding the model takes milliseconds instead of seconds; robosuite draws the Lift cube's
    # size when it builds, so a fixed seed here makes the model the same in every process.
    settings = {
        'robots': arm,
        'controller_configs': controller,
        'control_freq': rate_hz,
        'hard_reset': False,
        'ignore_done': True,
        'has_renderer': False,
        'has_offscreen_renderer': False,
        'use_camera_obs': False,
        'use_object_obs': bool(task.suite),  # some of the benchmarks' scenes can't be built without
    }
    with global_seed(0):
        env = (
            make_benchmark_environment(task, settings)
            if task.suite
            else robosuite.make(task.environment, **settings)
        )
    # Observables are evaluated at every physics step and nobody here reads them.
    for name in list(env.observation_names):
        env.modify_observable(name, 'enabled', False)
        env.modify_observable(name, 'active', False)
    _fill_period(env)
    return env


def _fill_period(env: Any) -> None:
    """Shorten the physics steps where no whole number of robosuite's 2 ms makes a period.

    robosuite rounds their number down, and an arm at 30 or 60 Hz would move in 96 % of the time that has passed.
    """
    period_s, step_s = env.control_timestep, env.model_timestep
    count = math.ceil(period_s / step_s - 1e-9)
    if abs(count * step_s - period_s) < 1e-9:
        return
    step_s = period_s / count
    if int(period_s / step_s) < count:  # by rounding; robosuite takes the whole part
        step_s = math.nextafter(step_s, 0.0)
    env.model_timestep = step_s
    env.sim.model._model.opt.timestep = step_s


def check_kinematics(sim: SimRobot) -> None:
    """Refuse a description whose forward kinematics isn't that of the simulated arm.

    Raises:
        SimulationError: the message has the distance at the scene's current configuration.
    """
    robot = sim.robot
    pose_base_ee = Kinematics(robot).forward(sim.joint_positions[: len(robot.joint_names)])
    error = float(np.abs(pose_base_ee - sim.pose_base_ee).max())
    if error > 1e-6:
        raise SimulationError(
            f"robot {robot.name!r} describes another arm or another ee_frame than the simulated {sim.arm}'s grip "
            f'site: forward kinematics differs by {error:.3g}'
        )


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, from which robosuite draws, and put the caller's state back afterwards."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)
