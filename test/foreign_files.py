"""Writes files in other people's layouts from motion that this package knows exactly, for the tests of the readers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.data.motions.synthesis import joint_paths
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.kinematics import Kinematics

#: Where robosuite puts the Panda, and the pose of what the observations report on the grip site.
WORLD_BASE = poses.pose_from_position_rotation([-0.56, 0.0, 0.912], np.eye(3))
SITE_TO_HAND = Rotation.from_euler('z', 90, degrees=True).as_matrix()
OSC = {
    'type': 'OSC_POSE', 'input_max': 1, 'input_min': -1, 'impedance_mode': 'fixed', 'position_limits': None,
    'output_max': [0.05, 0.05, 0.05, 0.5, 0.5, 0.5], 'output_min': [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    'orientation_limits': None, 'control_delta': True,
}  # fmt: skip


@dataclass
class Truth:
    """One episode as it was: joints, measured and commanded poses as pose_base_ee, gripper in [-1, 1], pictures."""

    joints: np.ndarray
    gripper: np.ndarray
    poses: np.ndarray
    commands: np.ndarray
    gripper_commands: np.ndarray
    images: np.ndarray

    @property
    def fingers(self) -> np.ndarray:
        half = 0.04 * (1 - self.gripper) / 2
        return np.column_stack([half, -half])

    @property
    def achieved_rows(self) -> np.ndarray:
        return poses.action_from_pose(self.poses, self.gripper)

    @property
    def action_rows(self) -> np.ndarray:
        return poses.action_from_pose(self.commands, self.gripper_commands)


def truths(
    robot: RobotDescription, n: int = 3, seed: int = 0, rate_hz: float = 20.0, size=(12, 16)
) -> list[Truth]:
    """Episodes whose commands lead their motion by a step and a small, varying distance."""
    rng, kinematics = np.random.default_rng(seed), Kinematics(robot)
    made = []
    for rows in joint_paths(robot, kinematics, n, seed, rate_hz):
        rows = rows[:70]
        reached = kinematics.forward_many(rows[:, :-1])
        offset = poses.pose_from_position_rotation(
            rng.normal(size=(len(rows), 3)) * 0.004,
            Rotation.from_rotvec(rng.normal(size=(len(rows), 3)) * 0.03).as_matrix(),
        )
        commands = np.concatenate([reached[1:], reached[-1:]]) @ offset
        told = np.where(np.append(rows[1:, -1], rows[-1, -1]) > 0, 1.0, -1.0)
        images = rng.integers(0, 256, (len(rows), *size, 3), np.uint8)
        made.append(Truth(rows[:, :-1], rows[:, -1], reached, commands, told, images))
    return made


def write_robomimic(
    path: Path, episodes: list[Truth], controller=None, world_base=WORLD_BASE, **changes
) -> Path:
    """A robomimic file with absolute goals; `changes` replace what an episode writes (name -> function of it)."""
    config = {**OSC, 'control_delta': False} if controller is None else controller
    with h5py.File(path, 'w') as file:
        data = file.create_group('data')
        data.attrs['env_args'] = json.dumps(
            {
                'env_name': 'Stack_D1',
                'type': 1,
                'env_kwargs': {'robots': ['Panda'], 'control_freq': 20, 'controller_configs': config},
            }
        )
        data.attrs['total'] = sum(len(e.joints) for e in episodes)
        for i, episode in enumerate(episodes):
            write = {**_ROBOMIMIC, **changes}
            demo = data.create_group(f'demo_{i}')
            demo.attrs['num_samples'] = len(episode.joints)
            demo['actions'] = write['actions'](episode, world_base)
            for key in (key for key in write if key != 'actions'):
                values = write[key](episode, world_base)
                if values is not None:
                    demo[f'obs/{key}'] = values
        names = [f'demo_{i}'.encode() for i in range(len(episodes))]
        file['mask/train'], file['mask/valid'] = names[:-1], names[-1:]
    return path


def rotation_values(matrices: np.ndarray, form: str) -> np.ndarray:
    """Rows (T, n) of a form from rotation matrices (T, 3, 3)."""
    if form.startswith('rot6d'):
        return poses.rot6d_from_rotation(
            matrices if form == 'rot6d_columns' else np.swapaxes(matrices, -1, -2)
        )
    rotation = Rotation.from_matrix(matrices)
    if form.startswith('quat'):
        return rotation.as_quat() if form == 'quat_xyzw' else np.roll(rotation.as_quat(), 1, -1)
    if form == 'axis_angle':
        return rotation.as_rotvec()
    _, order, sense = form.split('_')
    return rotation.as_euler(order if sense == 'extrinsic' else order.upper())


def absolute_actions(episode: Truth, world_base: np.ndarray) -> np.ndarray:
    goal = world_base @ episode.commands
    turn = Rotation.from_matrix(goal[:, :3, :3]).as_rotvec()
    return np.column_stack([goal[:, :3, 3], turn, episode.gripper_commands])


def hand_quaternions(episode: Truth, world_base: np.ndarray) -> np.ndarray:
    return rotation_values((world_base @ episode.poses)[:, :3, :3] @ SITE_TO_HAND, 'quat_xyzw')


_ROBOMIMIC = {
    'actions': absolute_actions,
    'robot0_joint_pos': lambda e, x: e.joints,
    'robot0_gripper_qpos': lambda e, x: e.fingers,
    'robot0_eef_pos': lambda e, x: (x @ e.poses)[:, :3, 3],
    'robot0_eef_quat': hand_quaternions,
    'object': lambda e, x: np.tile(np.arange(3.0), (len(e.joints), 1)),
    'agentview_image': lambda e, x: e.images,
    'robot0_eye_in_hand_image': lambda e, x: 255 - e.images,
}


def write_libero(
    path: Path,
    episodes: list[Truth],
    instruction: str,
    actions: list[np.ndarray],
    after: bool,
    world_base=WORLD_BASE,
) -> Path:
    """A LIBERO file: pictures upside down; with `after`, row k holds the observation that followed action k.

    `actions` (T, 7) are those given at each frame of an episode.
    """
    with h5py.File(path, 'w') as file:
        data = file.create_group('data')
        kwargs = {'robots': ['Panda'], 'control_freq': 20, 'controller_configs': OSC}
        data.attrs['env_args'] = json.dumps({'env_name': 'Libero_Kitchen', 'env_kwargs': kwargs})
        data.attrs['problem_info'] = json.dumps({'language_instruction': instruction})
        data.attrs['macros_image_convention'] = 'opengl'
        for i, (episode, given) in enumerate(zip(episodes, actions, strict=True)):
            seen = slice(1, None) if after else slice(None)
            rows = slice(None, -1) if after else slice(None)
            pose = (world_base @ episode.poses)[seen]
            turn = Rotation.from_matrix(pose[:, :3, :3] @ SITE_TO_HAND).as_rotvec()
            demo = data.create_group(f'demo_{i}')
            demo['actions'] = given[rows]
            state = np.column_stack([np.arange(len(episode.joints)) / 20, episode.joints, episode.fingers])
            demo['states'] = np.column_stack([state, np.zeros((len(state), 20))])[rows]
            demo['obs/joint_states'], demo['obs/gripper_states'] = episode.joints[seen], episode.fingers[seen]
            demo['obs/ee_pos'], demo['obs/ee_ori'] = pose[:, :3, 3], turn
            demo['obs/ee_states'] = np.column_stack([pose[:, :3, 3], turn])
            demo['obs/agentview_rgb'] = episode.images[seen, ::-1]
            demo['obs/eye_in_hand_rgb'] = 255 - episode.images[seen, ::-1]
    return path


def write_lerobot(
    root: Path,
    columns: list[dict[str, np.ndarray]],
    fps: float,
    tasks: list[str],
    cameras: dict[str, list] | None = None,
) -> Path:
    """A LeRobot v3 dataset as others write it: several episodes in one row group, no block of ours.

    Args:
        columns: of each episode, name -> rows (T, dim).
        tasks: of each episode.
        cameras: name -> pictures (T, H, W, 3) of each episode.
    """
    names = {name: values.shape[1] for name, values in columns[0].items()}
    lengths = [len(next(iter(c.values()))) for c in columns]
    features = {n: {'dtype': 'float32', 'shape': [d], 'names': None} for n, d in names.items()}
    features |= {
        key: {'dtype': kind, 'shape': [1], 'names': None}
        for key, kind in {'timestamp': 'float32', **dict.fromkeys(
            ['frame_index', 'episode_index', 'index', 'task_index'], 'int64')}.items()
    }  # fmt: skip
    table = {
        n: pa.FixedSizeListArray.from_arrays(
            pa.array(np.concatenate([c[n] for c in columns]).astype(np.float32).ravel()), d
        )
        if d > 1
        else pa.array(np.concatenate([c[n] for c in columns]).astype(np.float32).ravel())
        for n, d in names.items()
    }
    unique = list(dict.fromkeys(tasks))
    frames = np.concatenate([np.arange(n) for n in lengths])
    table |= {
        'timestamp': pa.array((frames / fps).astype(np.float32)),
        'frame_index': pa.array(frames),
        'episode_index': pa.array(np.repeat(np.arange(len(lengths)), lengths)),
        'index': pa.array(np.arange(sum(lengths))),
        'task_index': pa.array(np.repeat([unique.index(t) for t in tasks], lengths)),
    }
    for name, pictures in (cameras or {}).items():
        column, shape = f'observation.images.{name}', list(pictures[0].shape[1:])
        features[column] = {'dtype': 'image', 'shape': shape, 'names': ['height', 'width', 'channels']}
        png = [cv2.imencode('.png', p[..., ::-1])[1].tobytes() for e in pictures for p in e]
        kind = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
        table[column] = pa.array([{'bytes': b, 'path': None} for b in png], kind)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for folder in ('meta/episodes/chunk-000', 'data/chunk-000'):
        (root / folder).mkdir(parents=True)
    info = {
        'codebase_version': 'v3.0', 'robot_type': 'panda', 'total_episodes': len(lengths), 'total_frames': sum(lengths),
        'total_tasks': len(unique), 'chunks_size': 1000, 'fps': fps, 'splits': {'train': f'0:{len(lengths)}'},
        'data_path': 'data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet', 'video_path': None,
        'features': features,
    }  # fmt: skip
    (root / 'meta/info.json').write_text(json.dumps(info))
    (root / 'meta/stats.json').write_text('{}')
    pq.write_table(pa.table({'task_index': range(len(unique)), 'task': unique}), root / 'meta/tasks.parquet')
    episodes = {
        'episode_index': range(len(lengths)), 'tasks': [[t] for t in tasks], 'length': lengths,
        'data/chunk_index': [0] * len(lengths), 'data/file_index': [0] * len(lengths),
        'dataset_from_index': starts[:-1], 'dataset_to_index': starts[1:],
    }  # fmt: skip
    pq.write_table(pa.table(episodes), root / 'meta/episodes/chunk-000/file-000.parquet')
    pq.write_table(pa.table(table), root / 'data/chunk-000/file-000.parquet')
    return root


def droid_columns(
    episode: Truth, tool: np.ndarray, form: str = 'euler_xyz_extrinsic'
) -> dict[str, np.ndarray]:
    """The columns of DROID's LeRobot port that are read, and one that is not."""

    def cartesian(base_ee: np.ndarray) -> np.ndarray:
        pose = base_ee @ tool
        return np.column_stack([pose[:, :3, 3], rotation_values(pose[:, :3, :3], form)])

    closed = ((episode.gripper + 1) / 2)[:, None]
    told = ((episode.gripper_commands + 1) / 2)[:, None]
    return {
        'observation.state.joint_position': episode.joints,
        'observation.state.gripper_position': closed,
        'observation.state.cartesian_position': cartesian(episode.poses),
        'action.cartesian_position': cartesian(episode.commands),
        'action.gripper_position': told,
        'action.joint_velocity': np.zeros_like(episode.joints),
    }
