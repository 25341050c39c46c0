"""A simulated Franka Panda at a table: robosuite behind the quantities that a real arm reports.

`SimRobot` takes what a Cartesian controller of a real arm takes, an absolute end-effector pose in the base
frame and a gripper value at 20 Hz, and gives what a real arm gives: joint positions and velocities, the
end-effector pose, stamped pictures. Time is simulated: it advances by one period with each step and never runs
backwards, resets included.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.errors import SimulationError
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import RobotDescription, load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.sim.renderer import SceneRenderer, assign_geom_groups, choose_opengl

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class SimTask:
    """What a task's name stands for: robosuite's environment, its objects and how long an attempt may take."""

    name: str
    environment: str
    #: Our name of each object -> robosuite's.
    objects: Mapping[str, str]
    instruction: str
    max_steps: int

    @property
    def object_state_dim(self) -> int:
        """Size of `SimRobot.object_state`."""
        return 10 * len(self.objects) + 3 * (len(self.objects) - 1)


TASKS = {
    'lift': SimTask('lift', 'Lift', {'cube': 'cube'}, 'lift the red cube', 120),
    'stack': SimTask(
        'stack', 'Stack', {'cube_a': 'cubeA', 'cube_b': 'cubeB'}, 'stack the red cube on the green cube', 240
    ),
}

#: Policy camera -> robosuite's camera.
CAMERAS = {'agentview': 'agentview', 'wrist': 'robot0_eye_in_hand', 'front': 'frontview', 'side': 'sideview'}
DEFAULT_CAMERAS = {'agentview': (84, 84), 'wrist': (84, 84)}

#: Steps that a reset lets the scene settle, gripper opening, so that an episode starts at rest.
SETTLE_STEPS = 10


def sim_task(name: str) -> SimTask:
    """Task of that name.

    Raises:
        SimulationError: there is none; the message names the valid ones.
    """
    if name not in TASKS:
        raise SimulationError(f'unknown simulated task {name!r}, valid: {", ".join(sorted(TASKS))}')
    return TASKS[name]


class SimRobot:
    """One task's scene with its arm; construct and use it in one thread (OpenGL contexts belong to threads).

    Args:
        task: 'lift' or 'stack'.
        robot: description whose joints this arm has to have; None for the shipped `panda_sim`.
        cameras: policy camera name -> (height, width) of its pictures; drawn only when asked for.
        seed: of the first reset.
        rate_hz: commands per second; each step advances time by its inverse.
        overview_size: (height, width) of `image('overview')`, a view for people with the visual meshes.

    Raises:
        SimulationError: unknown task or camera, robosuite isn't installed, or another arm is described.
    """

    def __init__(
        self,
        task: str = 'lift',
        robot: RobotDescription | None = None,
        cameras: Mapping[str, tuple[int, int]] | None = None,
        seed: int = 0,
        rate_hz: float = 20.0,
        overview_size: tuple[int, int] = (240, 320),
    ):
        self.task = sim_task(task)
        self.rate_hz = float(rate_hz)
        self.cameras = dict(DEFAULT_CAMERAS if cameras is None else cameras)
        for name in self.cameras:
            if name not in CAMERAS:
                raise SimulationError(
                    f'unknown simulated camera {name!r}, valid: {", ".join(sorted(CAMERAS))}'
                )
        self._sizes: dict[str, tuple[int, int]] = {**self.cameras, 'overview': overview_size}
        self._renderers: dict[tuple[tuple[int, int], bool], SceneRenderer] = {}
        self._images: dict[str, NDArray[np.uint8]] = {}
        self._period_ns = round(1e9 / self.rate_hz)
        self.stamp_ns = 0
        self._env = _make_environment(self.task, self.rate_hz)
        arm = self._env.robots[0]
        self._model, self._data = self._env.sim.model._model, self._env.sim.data._data
        assign_geom_groups(self._model)
        self._eef_site = arm.eef_site_id
        self._base_body = self._model.body(arm.robot_model.root_body).id
        self._qpos = np.array([*arm._ref_joint_pos_indexes, *arm._ref_gripper_joint_pos_indexes])
        self._qvel = np.array([*arm._ref_joint_vel_indexes, *arm._ref_gripper_joint_vel_indexes])
        self._bodies = {
            ours: self._model.body(getattr(self._env, theirs).root_body).id
            for ours, theirs in self.task.objects.items()
        }
        self.robot = load_robot('panda_sim') if robot is None else robot
        self.reset(seed)
        _check_robot(self, [*arm.robot_joints, *arm.gripper_joints])

    def reset(self, seed: int) -> None:
        """Place the objects and the arm anew. One seed always gives the same episode, in any process.

        The arm starts at rest near home with the gripper open; the settling counts as time.
        """
        with _global_seed(seed):
            self._env.reset()
        home = self.pose_base_ee
        for _ in range(SETTLE_STEPS):
            self.step(home, -1.0)

    def step(self, pose_base_target: ArrayLike, gripper: float) -> None:
        """Command an absolute end-effector pose (4, 4) in the base frame and a gripper value; advance one period.

        The gripper closes while the value is positive, opens while it is negative, and holds at zero.

        Raises:
            SimulationError: the target isn't a finite (4, 4) pose or the gripper value isn't finite.
        """
        target = np.asarray(pose_base_target, float)
        if target.shape != (4, 4) or not np.all(np.isfinite(target)) or not np.isfinite(gripper):
            raise SimulationError(
                f'a command is a finite (4, 4) pose and a number, got {target.tolist()}, {gripper}'
            )
        world = self.pose_world_base @ target
        rotation = Rotation.from_matrix(world[:3, :3]).as_rotvec()
        self._env.step(np.concatenate([world[:3, 3], rotation, [np.clip(gripper, -1.0, 1.0)]]))
        # The last physics step has moved the joints but not yet what follows from them (poses, contacts).
        self._env.sim.forward()
        self.stamp_ns += self._period_ns
        self._images.clear()

    @property
    def pose_world_base(self) -> Array:
        """Robot base in the simulator's world (4, 4)."""
        return self._body_pose(self._base_body)

    @property
    def pose_base_ee(self) -> Array:
        """Grip site, the point that the commands move, in the base frame (4, 4)."""
        position, rotation = self._data.site_xpos[self._eef_site], self._data.site_xmat[self._eef_site]
        world = poses.pose_from_position_rotation(position, rotation.reshape(3, 3))
        return poses.inverse(self.pose_world_base) @ world

    @property
    def joint_positions(self) -> Array:
        """Seven arm joints (rad), then two finger joints (m): (9,)."""
        return self._data.qpos[self._qpos].copy()

    @property
    def joint_velocities(self) -> Array:
        """Velocities (9,) in rad/s and m/s, ordered as `joint_positions`."""
        return self._data.qvel[self._qvel].copy()

    def object_poses(self) -> dict[str, Array]:
        """Pose (4, 4) in the base frame of each of the task's objects, ground truth."""
        base = poses.inverse(self.pose_world_base)
        return {name: base @ self._body_pose(body) for name, body in self._bodies.items()}

    @property
    def object_state(self) -> NDArray[np.float32]:
        """Ground truth for low-dimensional policies, base frame, float32.

        Per object: position 3 (m), quaternion xyzw 4, object minus end effector 3 (m); for two objects
        then also second minus first 3 (m). Lift (10,), Stack (23,).
        """
        ee, parts, positions = self.pose_base_ee[:3, 3], [], []
        for pose in self.object_poses().values():
            position, quat = poses.position_quat_from_pose(pose)
            positions.append(position)
            parts += [position, quat, position - ee]
        parts += [b - a for a, b in itertools.pairwise(positions)]
        return np.concatenate(parts).astype(np.float32)

    @property
    def success(self) -> bool:
        """Whether the task is done, now, by robosuite's own check."""
        return bool(self._env._check_success())

    def image(self, name: str) -> NDArray[np.uint8]:
        """Picture (H, W, 3) uint8 rgb of a camera at the current stamp; drawn once, when first asked for.

        Raises:
            SimulationError: no such camera, or no OpenGL to draw with.
        """
        if name not in self._sizes:
            raise SimulationError(f'no camera {name!r} here, valid: {", ".join(sorted(self._sizes))}')
        if name not in self._images:
            overview = name == 'overview'
            key = (self._sizes[name], overview)
            if key not in self._renderers:
                height, width = self._sizes[name]
                self._renderers[key] = SceneRenderer(self._model, height, width, visual_meshes=overview)
            self._images[name] = self._renderers[key].render(self._data, None if overview else CAMERAS[name])
        return self._images[name]

    def project(self, name: str, position_base_m: ArrayLike) -> Array:
        """Pixel (row, column), fractional, at which a camera shows a point (3,) of the base frame."""
        camera = self._data.camera(CAMERAS[name])
        point = self.pose_world_base @ np.append(np.asarray(position_base_m, float), 1.0)
        x, y, z = camera.xmat.reshape(3, 3).T @ (point[:3] - camera.xpos)
        height, width = self._sizes[name]
        focal = 0.5 * height / np.tan(np.deg2rad(self._model.camera(CAMERAS[name]).fovy[0]) / 2)
        return np.array([height / 2 - 0.5 + focal * y / z, width / 2 - 0.5 - focal * x / z])

    def close(self) -> None:
        """Free the renderers' OpenGL contexts; the instance can't be used afterwards."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._env.close()

    def __enter__(self) -> SimRobot:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _body_pose(self, body: int) -> Array:
        return poses.pose_from_position_rotation(self._data.xpos[body], self._data.xmat[body].reshape(3, 3))


def _make_environment(task: SimTask, rate_hz: float) -> Any:
    choose_opengl()
    # robosuite warns on every import that its optional private macro file is missing.
    logging.getLogger('robosuite_logs').addFilter(lambda record: 'macro' not in record.getMessage())
    try:
        import robosuite
    except ImportError as error:
        raise SimulationError(
            f'the simulator needs robosuite and mujoco ({error}): pip install "decoupled_policy_ros[sim]"'
        ) from error
    controller = robosuite.load_controller_config(default_controller='OSC_POSE')
    controller['control_delta'] = False
    # A reset without rebuilding the model takes milliseconds instead of seconds; robosuite draws the Lift cube's
    # size when it builds, so a fixed seed here makes the model the same in every process.
    with _global_seed(0):
        env = robosuite.make(
            task.environment,
            robots='Panda',
            controller_configs=controller,
            control_freq=rate_hz,
            hard_reset=False,
            ignore_done=True,
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            use_object_obs=False,
        )
    # Observables are evaluated at every physics step and nobody here reads them.
    for name in list(env.observation_names):
        env.modify_observable(name, 'enabled', False)
        env.modify_observable(name, 'active', False)
    return env


def _check_robot(sim: SimRobot, sim_joints: list[str]) -> None:
    """Refuse a description whose joints or whose forward kinematics aren't those of the simulated arm.

    Raises:
        SimulationError: the message names the joints, or the distance at the scene's current configuration.
    """
    robot = sim.robot
    bare = [name.split('_', 1)[1] for name in sim_joints]
    described = list(robot.all_joint_names)
    if described != bare:
        raise SimulationError(f'robot {robot.name!r} has joints {described}, the simulated arm has {bare}')
    pose_base_ee = Kinematics(robot).forward(sim.joint_positions[: len(robot.joint_names)])
    error = float(np.abs(pose_base_ee - sim.pose_base_ee).max())
    if error > 1e-6:
        raise SimulationError(
            f"robot {robot.name!r} describes another arm or another ee_frame than the simulated Panda's grip site: "
            f'forward kinematics differs by {error:.3g}'
        )


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, from which robosuite draws, and put the caller's state back afterwards."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)
