"""A simulated arm at a table: robosuite behind the quantities that a real arm reports.

`SimRobot` takes what a Cartesian controller of a real arm takes, an absolute end-effector pose in the base
frame and a gripper value at 20 Hz, and gives what a real arm gives: joint positions and velocities, the
end-effector pose, stamped pictures. Time is simulated: it advances by one period with each step and never runs
backwards, resets included.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.errors import SimulationError
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import RobotDescription, load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.sim.benchmarks import set_start
from decoupled_policy_ros.sim.renderer import SceneRenderer, assign_geom_groups
from decoupled_policy_ros.sim.scene import (
    bare,
    check_kinematics,
    global_seed,
    make_environment,
    simulated_arm,
)
from decoupled_policy_ros.sim.stepping import ControlPeriod
from decoupled_policy_ros.sim.tasks import sim_task

Array = NDArray[np.float64]

#: Policy camera -> robosuite's camera.
CAMERAS = {'agentview': 'agentview', 'wrist': 'robot0_eye_in_hand', 'front': 'frontview', 'side': 'sideview'}
DEFAULT_CAMERAS = {'agentview': (84, 84), 'wrist': (84, 84)}


class SimRobot:
    """One task's scene with its arm; construct and use it in one thread (OpenGL contexts belong to threads).

    Args:
        task: a name of `sim.tasks`.
        robot: description of the arm; its joints tell which one is simulated. None for the shipped `panda_sim`.
        cameras: policy camera name -> (height, width) of its pictures; drawn only when asked for.
        seed: of the first reset.
        rate_hz: commands per second; each step advances time by its inverse.
        overview_size: (height, width) of `image('overview')`, a view for people with the visual meshes.

    Raises:
        SimulationError: unknown task or camera, robosuite isn't installed, or no such arm is simulated.
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
        self.robot = load_robot('panda_sim') if robot is None else robot
        self.arm = simulated_arm(self.robot)
        self._env = make_environment(self.task, self.arm, self.rate_hz)
        # Closed linkages in the other arms' grippers leave the contact solver room: only the Panda's steps are the
        # same to round-off. Some of the benchmarks' environments do more in theirs.
        fast = self.arm == 'Panda' and not self.task.suite
        self._advance = ControlPeriod(self._env) if fast else self._env.step
        arm = self._env.robots[0]
        self._model, self._data = self._env.sim.model._model, self._env.sim.data._data
        assign_geom_groups(self._model)
        self._eef_site = arm.eef_site_id
        self._base_body = self._model.body(arm.robot_model.root_body).id
        self._find_joints([*arm.robot_joints, *arm.gripper_joints])
        self._find_objects()
        self._failed = False
        self.home_pose = Kinematics(self.robot).forward(self.robot.home_rad)
        self.reset(seed)
        check_kinematics(self)

    def _find_joints(self, sim_joints: list[str]) -> None:
        """Where the described joints are; a gripper may have more of them than are described."""
        by_name = {bare(name): self._model.joint(name) for name in sim_joints}
        unknown = [name for name in self.robot.all_joint_names if name not in by_name]
        if unknown:
            raise SimulationError(
                f'robot {self.robot.name!r} has joints {", ".join(unknown)}, the simulated {self.arm} has '
                f'{", ".join(by_name)}'
            )
        joints = [by_name[name] for name in self.robot.all_joint_names]
        self._qpos = np.array([joint.qposadr[0] for joint in joints])
        self._qvel = np.array([joint.dofadr[0] for joint in joints])

    def _find_objects(self) -> None:
        """Body or site of each object of the task, and the geoms of each, and of the robot."""
        objects = self.task.objects
        if objects is None:
            objects = {item.name: item.root_body for item in self._env.model.mujoco_objects}
        self._objects = {ours: self._frame(theirs) for ours, theirs in objects.items()}
        body_of_geom, parent = self._model.geom_bodyid, self._model.body_parentid
        trees = {name: index for name, (kind, index) in self._objects.items() if kind == 'body'}
        trees['robot'] = self._base_body
        self._geoms = {name: np.zeros(self._model.ngeom, bool) for name in trees}
        for geom, body in enumerate(body_of_geom):
            while body:  # up to the world, which is body 0
                for name, tree in trees.items():
                    self._geoms[name][geom] |= body == tree
                body = parent[body]
        for side in ('left', 'right'):
            pads = self._env.robots[0].gripper.important_geoms[f'{side}_fingerpad']
            self._geoms[side] = np.isin(np.arange(self._model.ngeom), [self._model.geom(n).id for n in pads])

    def _frame(self, name: str) -> tuple[str, int]:
        """Kind, 'body' or 'site', and index of a frame of the scene."""
        for kind in ('body', 'site'):
            try:
                return kind, getattr(self._model, kind)(name).id
            except KeyError:
                continue
        raise SimulationError(f'the scene of task {self.task.name!r} has no body or site {name!r}')

    def reset(self, seed: int) -> None:
        """Place the objects and the arm anew. One seed always gives the same episode, in any process.

        The arm starts near home, and after the task's steps of settling, which count as time, at rest with the gripper
        open.
        """
        with global_seed(seed):
            self._env.reset()
            set_start(self.task, self._env, seed)
        self.stamp_ns += self._period_ns  # what is seen now is new, even where nothing settles
        self._images.clear()
        home = self.pose_base_ee
        for _ in range(self.task.settle_steps):
            self.step(home, -1.0)
        self._failed = self._has_failed()

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
        self._advance(np.concatenate([world[:3, 3], rotation, [np.clip(gripper, -1.0, 1.0)]]))
        # The last physics step has moved the joints but not yet what follows from them (poses, contacts).
        self._env.sim.forward()
        self.stamp_ns += self._period_ns
        self._images.clear()
        self._failed = self._failed or self._has_failed()

    @property
    def pose_world_base(self) -> Array:
        """Robot base in the simulator's world (4, 4)."""
        return self._world_pose('body', self._base_body)

    @property
    def pose_base_ee(self) -> Array:
        """Grip site, the point that the commands move, in the base frame (4, 4)."""
        return poses.inverse(self.pose_world_base) @ self._world_pose('site', self._eef_site)

    @property
    def joint_positions(self) -> Array:
        """Arm joints (rad), then gripper joints, as `robot.all_joint_names`: (9,) for the Panda."""
        return self._data.qpos[self._qpos].copy()

    @property
    def joint_velocities(self) -> Array:
        """Velocities, in units per second, ordered as `joint_positions`."""
        return self._data.qvel[self._qvel].copy()

    def object_poses(self) -> dict[str, Array]:
        """Pose (4, 4) in the base frame of each of the task's objects, ground truth."""
        base = poses.inverse(self.pose_world_base)
        return {name: base @ self._world_pose(*frame) for name, frame in self._objects.items()}

    def pose_of(self, name: str) -> Array:
        """Pose (4, 4) in the base frame of any body or site of the scene, by MuJoCo's name.

        Raises:
            SimulationError: there is none of that name.
        """
        return poses.inverse(self.pose_world_base) @ self._world_pose(*self._frame(name))

    @property
    def table_height_m(self) -> float:
        """Height of the table's top in the base frame."""
        return float(self._env.model.mujoco_arena.table_offset[2] - self.pose_world_base[2, 3])

    def touching(self, name: str, other: str) -> bool:
        """Whether two objects of the task touch each other now; 'robot' is the arm with its gripper."""
        first, second = self._geoms[name], self._geoms[other]
        a, b = self._data.contact.geom.reshape(-1, 2).T
        return bool(np.any((first[a] & second[b]) | (first[b] & second[a])))

    def holding(self, name: str) -> bool:
        """Whether the pads of both fingers touch an object."""
        return self.touching(name, 'left') and self.touching(name, 'right')

    @property
    def object_state(self) -> NDArray[np.float32]:
        """Ground truth for low-dimensional policies, base frame, float32.

        Per object: position 3 (m), quaternion xyzw 4, object minus end effector 3 (m); for two objects
        then also second minus first 3 (m), and so on. Lift (10,), Stack (23,).
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
        """Whether the task is done, now, by its own check or the environment's."""
        check = self.task.success
        return not self._failed and bool(check(self) if check else self._env._check_success())

    @property
    def failed(self) -> bool:
        """Whether this attempt is lost for good, such as after touching what must not be touched."""
        return self._failed

    def _has_failed(self) -> bool:
        return self.task.failure is not None and self.task.failure(self)

    def image(self, name: str) -> NDArray[np.uint8]:
        """Picture (H, W, 3) uint8 rgb of a camera at the current stamp; drawn once, when first asked for.

        Raises:
            SimulationError: no such camera, or no OpenGL to draw with.
        """
        if name not in self._sizes:
            raise SimulationError(f'no camera {name!r} here, valid: {", ".join(sorted(self._sizes))}')
        if name not in self._images:
            overview = name == 'overview'
            # The benchmarks' data show the visual meshes.
            visual = overview or bool(self.task.suite)
            key = (self._sizes[name], visual)
            if key not in self._renderers:
                height, width = self._sizes[name]
                self._renderers[key] = SceneRenderer(self._model, height, width, visual_meshes=visual)
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

    def _world_pose(self, kind: str, index: int) -> Array:
        data = self._data
        position, rotation = (data.xpos, data.xmat) if kind == 'body' else (data.site_xpos, data.site_xmat)
        return poses.pose_from_position_rotation(position[index], rotation[index].reshape(3, 3))
