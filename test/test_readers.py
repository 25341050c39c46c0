"""Readers of other people's formats: motion written in their conventions comes back in ours."""

from __future__ import annotations

import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
import yaml
from foreign_files import (
    OSC,
    WORLD_BASE,
    droid_columns,
    rotation_values,
    truths,
    write_lerobot,
    write_libero,
    write_robomimic,
)
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.data.datasets.dataset import DatasetSpec, DatasetWriter
from decoupled_policy_ros.data.motions.motions import MotionWriter, synth_motions
from decoupled_policy_ros.data.readers.converted import Converted
from decoupled_policy_ros.data.readers.opening import open_demonstrations
from decoupled_policy_ros.data.readers.rlds import RldsSource
from decoupled_policy_ros.data.readers.streaming import stream_columns
from decoupled_policy_ros.data.readers.views import Decimated
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.observation.image import fit_image
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.kinematics import Kinematics

COLUMNS = ['observation.joint_positions', 'observation.proprioception', 'observation.pose', 'action']
TOOL = poses.pose_from_position_rotation(
    [0.01, 0.0, 0.06], Rotation.from_euler('z', -45, degrees=True).as_matrix()
)


@pytest.fixture(scope='module')
def robot():
    return load_robot('panda_sim')


@pytest.fixture(scope='module')
def episodes(robot):
    return truths(robot)


def require_equal(found, episodes, robot, fingers_exact=True):
    """Every column of every episode, one by one and streamed, is that of the truth within 1e-5 m and rad."""
    assert found.lengths.tolist() == [len(e.joints) for e in episodes]
    assert found.starts.tolist() == [0, *np.cumsum(found.lengths)[:-1].tolist()]
    assert found.n_frames == sum(found.lengths) and found.n_episodes == len(episodes)
    proprioception = Proprioception(robot, Kinematics(robot))
    for i, (truth, streamed) in enumerate(zip(episodes, stream_columns(found, COLUMNS), strict=True)):
        joints = np.column_stack([truth.joints, truth.fingers])
        expected = dict(
            zip(
                COLUMNS,
                [joints, proprioception.many(joints), truth.achieved_rows, truth.action_rows],
                strict=True,
            )
        )
        for name, rows in expected.items():
            column = found.column(name, i)
            assert column.dtype == np.float32
            np.testing.assert_allclose(column, rows, atol=1e-5, err_msg=f'{name} of episode {i}')
            np.testing.assert_array_equal(streamed[name], column)
    for name in COLUMNS:
        whole = np.concatenate([found.column(name, i) for i in range(found.n_episodes)])
        np.testing.assert_array_equal(found.column(name), whole)


def test_robomimic_with_absolute_goals(robot, episodes, tmp_path):
    found = open_demonstrations(write_robomimic(tmp_path / 'demo.hdf5', episodes), robot)
    require_equal(found, episodes, robot)
    assert found.rate_hz == 20 and found.fingerprint == Fingerprint.of(robot, 20.0)
    assert found.tasks == ['Stack_D1'] and found.task_of(1) == 'Stack_D1'
    assert found.cameras == ['agentview', 'wrist']
    np.testing.assert_array_equal(found.images('agentview', 1), episodes[1].images)
    np.testing.assert_array_equal(found.images('wrist'), 255 - np.concatenate([e.images for e in episodes]))
    np.testing.assert_array_equal(found.column('observation.object', 0)[:, 2], 2.0)
    np.testing.assert_allclose(found.calibration.pose_frame_base, WORLD_BASE, atol=1e-7)
    assert found.conventions['action'] == 'osc_pose' and found.conventions['rotation'] == 'quat_xyzw'


def test_pictures_are_resized_as_they_are_live(robot, episodes, tmp_path):
    found = open_demonstrations(write_robomimic(tmp_path / 'demo.hdf5', episodes), robot)
    resized = found.images('agentview', 0, (6, 8))
    np.testing.assert_array_equal(resized[3], fit_image(episodes[0].images[3], (6, 8)))
    assert found.images('agentview', None, (6, 8)).shape == (found.n_frames, 6, 8, 3)


def test_a_filter_of_the_file_picks_its_demonstrations(robot, episodes, tmp_path):
    path = write_robomimic(tmp_path / 'demo.hdf5', episodes)
    require_equal(open_demonstrations(path, robot, filter_key='valid'), episodes[-1:], robot)
    with pytest.raises(DatasetError, match=r"no filter 'test'; it has \['train', 'valid'\]"):
        open_demonstrations(path, robot, filter_key='test')


def test_joints_stored_as_sine_and_cosine_are_read_within_their_limits(robot, episodes, tmp_path):
    path = write_robomimic(
        tmp_path / 'demo.hdf5', episodes,
        robot0_joint_pos=lambda e, x: None,
        robot0_joint_pos_sin=lambda e, x: np.sin(e.joints),
        robot0_joint_pos_cos=lambda e, x: np.cos(e.joints),
    )  # fmt: skip
    require_equal(open_demonstrations(path, robot), episodes, robot)


def test_rows_that_a_later_demonstration_lacks_are_refused_naming_it(robot, episodes, tmp_path):
    """The rows after them would all belong to another action."""
    many = episodes * 20  # so many that those which the frames are calibrated by leave some out

    def written(name, key, n_rows):
        path = write_robomimic(tmp_path / f'{name}.hdf5', many)
        with h5py.File(path, 'a') as file:
            rows = file[f'data/demo_1/{key}'][:n_rows]
            del file[f'data/demo_1/{key}']
            if n_rows:
                file[f'data/demo_1/{key}'] = rows
        return path

    found = open_demonstrations(written('vector', 'obs/object', 5), robot)
    for episode in (None, 1):
        with pytest.raises(DatasetError, match=r'obs of demo_1 has 5 rows of object for \d+ actions'):
            found.column('observation.object', episode)
    for name, key, n_rows, message in (
        ('short', 'obs/robot0_joint_pos', 7, r'obs of demo_1 has 7 rows of robot0_joint_pos for \d+ actions'),
        (
            'joints',
            'obs/robot0_joint_pos',
            0,
            'obs of demo_1 lacks robot0_joint_pos; it has .*robot0_eef_pos',
        ),
        ('actions', 'actions', 0, r"demo_1 needs obs and actions, it holds \['obs'\]"),
    ):
        path = written(name, key, n_rows)
        with pytest.raises(DatasetError, match=message):
            open_demonstrations(path, robot)


def test_a_source_that_gives_too_few_rows_is_refused(robot, episodes, tmp_path, monkeypatch):
    found = open_demonstrations(write_robomimic(tmp_path / 'demo.hdf5', episodes), robot)
    read = found._source.read
    monkeypatch.setattr(found._source, 'read', lambda *args: {k: v[:-1] for k, v in read(*args).items()})
    n = len(episodes[0].joints)
    for name in COLUMNS:
        with pytest.raises(DatasetError, match=rf'episode 0: {name} has {n - 1} rows for {n} frames'):
            found.column(name)


def relative_actions(rng, length):
    """Steps of which some are clipped, some only move and some are zero."""
    given = np.column_stack([rng.uniform(-1.2, 1.2, (length, 6)), np.ones(length)])
    given[::3, 3:6] = 0.0
    return given


def goals_by_hand(given, truth):
    """What OSC_POSE heads for, step by step."""
    held, goals = truth.poses[0][:3, :3], []
    for action, pose in zip(given, truth.poses, strict=True):
        step = np.clip(action[:6], -1, 1) * [0.05, 0.05, 0.05, 0.5, 0.5, 0.5]
        if np.any(step[3:]):
            held = (
                WORLD_BASE[:3, :3].T
                @ Rotation.from_rotvec(step[3:]).as_matrix()
                @ WORLD_BASE[:3, :3]
                @ pose[:3, :3]
            )
        goals.append(poses.pose_from_position_rotation(pose[:3, 3] + step[:3], held))
    return np.array(goals)


def test_robomimic_with_relative_goals(robot, episodes, tmp_path):
    rng = np.random.default_rng(1)
    given = [relative_actions(rng, len(e.joints)) for e in episodes]
    order = iter(given)
    path = write_robomimic(tmp_path / 'demo.hdf5', episodes, controller=OSC, actions=lambda e, x: next(order))
    found = open_demonstrations(path, robot)
    assert found.conventions['action'] == 'osc_delta'
    for i, (truth, actions) in enumerate(zip(episodes, given, strict=True)):
        expected = poses.action_from_pose(goals_by_hand(actions, truth), 1.0)
        np.testing.assert_allclose(found.column('action', i), expected, atol=1e-5)


@pytest.mark.parametrize('after', [True, False], ids=["as LIBERO's own", 'regenerated'])
def test_libero_pairs_each_observation_with_the_action_that_follows_it(robot, episodes, tmp_path, after):
    given = [relative_actions(np.random.default_rng(i), len(e.joints)) for i, e in enumerate(episodes)]
    path = write_libero(tmp_path / 'KITCHEN_SCENE3_demo.hdf5', episodes, 'turn on the stove', given, after)
    found = open_demonstrations(path, robot)
    assert found.tasks == ['turn on the stove']
    assert found.cameras == ['agentview', 'wrist']
    first = 1 if after else 0
    for i, (truth, actions) in enumerate(zip(episodes, given, strict=True)):
        last = len(actions) - (1 if after else 0)
        assert found.lengths[i] == last - first
        np.testing.assert_allclose(
            found.column('observation.pose', i), truth.achieved_rows[first:last], atol=1e-5
        )
        positions = goals_by_hand(actions, truth)[first:last, :3, 3]
        np.testing.assert_allclose(found.column('action', i)[:, :3], positions, atol=1e-5)
        np.testing.assert_array_equal(found.images('agentview', i), truth.images[first:last])


def test_a_folder_of_libero_files_is_several_tasks_each_with_its_own_scene(robot, episodes, tmp_path):
    shifted = poses.pose_from_position_rotation([-0.6, 0.1, 0.4], np.eye(3))
    given = [np.tile([0, 0, 0.1, 0, 0, 0.1, -1.0], (len(e.joints), 1)) for e in episodes]
    write_libero(tmp_path / 'a_demo.hdf5', episodes[:1], 'open the drawer', given[:1], False)
    write_libero(
        tmp_path / 'b_demo.hdf5', episodes[1:], 'close the drawer', given[1:], False, world_base=shifted
    )
    found = open_demonstrations(tmp_path, robot)
    assert found.tasks == ['open the drawer', 'close the drawer']
    assert [found.task_of(i) for i in range(3)] == ['open the drawer', 'close the drawer', 'close the drawer']
    expected = np.concatenate([e.achieved_rows for e in episodes])
    np.testing.assert_allclose(found.column('observation.pose'), expected, atol=1e-5)
    np.testing.assert_array_equal(found.column('action', 2), found.column('action')[found.starts[2] :])
    np.testing.assert_array_equal(found.images('wrist', 2), 255 - episodes[2].images)
    assert [len(rows['action']) for rows in stream_columns(found, ['action'])] == found.lengths.tolist()


def write_droid(root, episodes, **changes):
    tasks = ['put the marker in the mug', 'wipe the table', 'put the marker in the mug'][: len(episodes)]
    cameras = {
        name: [e.images for e in episodes] for name in ('wrist_left', 'exterior_1_left', 'exterior_2_left')
    }
    columns = [{**droid_columns(e, TOOL), **{k: f(e) for k, f in changes.items()}} for e in episodes]
    return write_lerobot(root, columns, 15, tasks, cameras)


def test_the_lerobot_port_of_droid_is_recognised(robot, episodes, tmp_path):
    found = open_demonstrations(write_droid(tmp_path / 'droid', episodes), robot)
    require_equal(found, episodes, robot)
    assert found.rate_hz == 15 and found.conventions['rotation'] == 'euler_xyz_extrinsic'
    assert [found.task_of(i) for i in range(3)] == [found.tasks[i] for i in (0, 1, 0)]
    assert found.cameras == ['wrist', 'exterior_1', 'exterior_2']
    np.testing.assert_array_equal(found.images('exterior_2', 1), episodes[1].images)
    np.testing.assert_allclose(found.calibration.pose_ee_tool, TOOL, atol=1e-5)


@pytest.mark.parametrize(
    'form',
    ['quat_xyzw', 'quat_wxyz', 'euler_xyz_intrinsic', 'euler_zyx_extrinsic', 'axis_angle', 'rot6d_rows'],
)
def test_a_mapping_reads_any_rotation_form_units_and_components(robot, episodes, tmp_path, form):
    def rows(base_ee):
        world = WORLD_BASE @ base_ee @ TOOL
        return np.column_stack([world[:, :3, 3], rotation_values(world[:, :3, :3], form)])

    columns = [
        {
            'observation.state': np.column_stack([np.rad2deg(e.joints), 100 * (1 - e.gripper) / 2]),
            'observation.ee': rows(e.poses),
            'action': np.column_stack([rows(e.commands), e.gripper_commands]),
        }
        for e in episodes
    ]
    root = write_lerobot(tmp_path / 'theirs', columns, 20, ['pick'] * 3)
    n = columns[0]['observation.ee'].shape[1]
    mapping = {
        'source': 'a colleague', 'rate_hz': 20,
        'joints': {'column': 'observation.state[0:7]', 'unit': 'deg'},
        'gripper': {'column': 'observation.state[7]', 'open': 100.0, 'closed': 0.0},
        'pose': {
            'position': 'observation.ee[0:3]', 'rotation': f'observation.ee[3:{n}]', 'form': form, 'frame': 'world',
        },
        'action': {'kind': 'pose', 'position': 'action[0:3]', 'rotation': f'action[3:{n}]'},
        'gripper_command': {'column': f'action[{n}]', 'open': -1.0, 'closed': 1.0},
    }  # fmt: skip
    path = tmp_path / 'mapping.yaml'
    path.write_text(yaml.safe_dump(mapping))
    require_equal(open_demonstrations(root, robot, mapping=str(path)), episodes, robot)


def test_the_next_pose_or_commanded_joints_can_stand_for_commands(robot, episodes, tmp_path):
    kinematics = Kinematics(robot)
    columns = [{'state': np.column_stack([e.joints, e.fingers]), 'action': e.joints + 0.01} for e in episodes]
    root = write_lerobot(tmp_path / 'theirs', columns, 20, ['pick'] * 3)
    mapping = {
        'source': 'a colleague', 'rate_hz': 20, 'joints': {'column': 'state[0:7]', 'unit': 'rad'},
        'gripper': {'column': 'state[7:9]', 'finger_signs': [1, -1]}, 'action': {'kind': 'next_pose'},
    }  # fmt: skip
    path = tmp_path / 'mapping.yaml'
    path.write_text(yaml.safe_dump(mapping))
    found = open_demonstrations(root, robot, mapping=str(path))
    assert found.lengths.tolist() == [len(e.joints) - 1 for e in episodes]
    np.testing.assert_allclose(found.column('action', 1), episodes[1].achieved_rows[1:], atol=1e-5)
    np.testing.assert_allclose(found.column('observation.pose', 1), episodes[1].achieved_rows[:-1], atol=1e-5)
    thirds = Decimated(found, 3)
    kept = episodes[1].achieved_rows[:-1][::3]
    np.testing.assert_allclose(thirds.column('action', 1), kept[1:], atol=1e-5)
    np.testing.assert_allclose(thirds.column('observation.pose', 1), kept[:-1], atol=1e-5)
    told = [{**c, 'told': e.gripper_commands[:, None]} for c, e in zip(columns, episodes, strict=True)]
    root = write_lerobot(tmp_path / 'told', told, 20, ['pick'] * 3)
    command = {'column': 'told', 'open': -1, 'closed': 1}
    path.write_text(yaml.safe_dump({**mapping, 'gripper_command': command}))
    thirds = open_demonstrations(root, robot, mapping=str(path), every=3)
    np.testing.assert_allclose(thirds.column('action', 1)[:, :9], kept[1:, :9], atol=1e-5)
    np.testing.assert_allclose(
        thirds.column('action', 1)[:, 9], episodes[1].gripper_commands[:-1][::3][:-1], atol=1e-5
    )

    path.write_text(yaml.safe_dump({**mapping, 'action': {'kind': 'joints', 'column': 'action'}}))
    found = open_demonstrations(root, robot, mapping=str(path))
    expected = poses.action_from_pose(kinematics.forward_many(episodes[2].joints + 0.01), 0.0)
    np.testing.assert_allclose(found.column('action', 2)[:, :9], expected[:, :9], atol=1e-5)


def test_every_third_frame_of_a_faster_dataset(robot, episodes, tmp_path):
    found = open_demonstrations(write_robomimic(tmp_path / 'demo.hdf5', episodes), robot)
    slower = open_demonstrations(tmp_path / 'demo.hdf5', robot, every=2)
    assert slower.rate_hz == 10 and slower.fingerprint == Fingerprint.of(robot, 10.0)
    for i in range(3):
        assert slower.lengths[i] == len(found.column('action', i)[::2])
        np.testing.assert_array_equal(slower.column('action', i), found.column('action', i)[::2])
        np.testing.assert_array_equal(slower.images('wrist', i), found.images('wrist', i)[::2])
    np.testing.assert_array_equal(
        slower.column('action', 1), slower.column('action')[slower.starts[1] :][: slower.lengths[1]]
    )
    assert slower.images('wrist').shape[0] == slower.n_frames


def test_achieved_poses_at_a_lower_rate_keep_the_gripper_that_was_commanded(robot, episodes, tmp_path):
    episode, kinematics = episodes[0], Kinematics(robot)
    told = np.where(np.arange(len(episode.joints)) < 20, -1.0, 1.0)
    width_m = np.where(told < 0, 0.08, 0.04)  # an object stops the fingers half way
    joints = np.column_stack([episode.joints, width_m / 2, -width_m / 2])
    measured = robot.gripper.normalised(joints[:, 7:])
    following = np.minimum(np.arange(len(joints)) + 1, len(joints) - 1)
    spec = DatasetSpec.of(robot, 60.0, action='achieved', gripper_source='commanded')
    with DatasetWriter(tmp_path / 'd', spec) as writer:
        rows = {
            'observation.joint_positions': joints,
            'observation.proprioception': Proprioception(robot, kinematics).many(joints),
            'observation.pose': poses.action_from_pose(episode.poses, measured),
            'action': poses.action_from_pose(episode.poses[following], told),
        }
        writer.add_episode('hold it', True, rows)
    slower = open_demonstrations(tmp_path / 'd', robot, every=3)
    for actions in (slower.column('action'), slower.column('action', 0)):
        np.testing.assert_array_equal(actions[:, 9], told[::3][:-1])
        np.testing.assert_allclose(actions[:, :9], episode.achieved_rows[::3][1:, :9], atol=1e-5)
    assert slower.column('observation.pose')[:, 9].max() == pytest.approx(0.0)


def test_a_measured_gripper_at_a_lower_rate_is_that_of_the_next_kept_frame(robot, episodes, tmp_path):
    episode, kinematics = episodes[0], Kinematics(robot)
    width_m = np.linspace(0.08, 0.0, len(episode.joints))
    joints = np.column_stack([episode.joints, width_m / 2, -width_m / 2])
    measured = robot.gripper.normalised(joints[:, 7:])
    following = np.minimum(np.arange(len(joints)) + 1, len(joints) - 1)
    spec = DatasetSpec.of(robot, 60.0, action='commanded', gripper_source='measured')
    with DatasetWriter(tmp_path / 'd', spec) as writer:
        rows = {
            'observation.joint_positions': joints,
            'observation.proprioception': Proprioception(robot, kinematics).many(joints),
            'observation.pose': poses.action_from_pose(episode.poses, measured),
            'action': poses.action_from_pose(episode.poses[::-1], measured[following]),
        }
        writer.add_episode('close it', True, rows)
    slower = open_demonstrations(tmp_path / 'd', robot, every=3)
    kept = measured[::3].astype(np.float32)
    for actions in (slower.column('action'), slower.column('action', 0)):
        np.testing.assert_allclose(actions[:, 9], np.append(kept[1:], kept[-1]), atol=1e-6)
        np.testing.assert_allclose(actions[:, :9], rows['action'][::3, :9], atol=1e-6)


def rlds_steps(episode, tool=TOOL):
    columns = droid_columns(episode, tool)
    for k in range(len(episode.joints)):
        yield {
            'observation': {
                'joint_position': columns['observation.state.joint_position'][k],
                'gripper_position': columns['observation.state.gripper_position'][k],
                'cartesian_position': columns['observation.state.cartesian_position'][k],
                'wrist_image_left': episode.images[k],
                'exterior_image_1_left': episode.images[k],
                'exterior_image_2_left': episode.images[k],
            },
            'action_dict': {
                'cartesian_position': columns['action.cartesian_position'][k],
                'gripper_position': columns['action.gripper_position'][k],
            },
            'language_instruction': b'move the cup',
        }


def test_droid_steps_of_rlds(robot, episodes, tmp_path):
    found = Converted(RldsSource(tmp_path, lambda images: (rlds_steps(e) for e in episodes)), robot)
    require_equal(found, episodes, robot)
    assert found.tasks == ['move the cup'] and found.rate_hz == 15
    np.testing.assert_array_equal(found.images('exterior_1', 2), episodes[2].images)


def test_a_step_without_a_field_is_refused_naming_those_it_has(tmp_path, episodes):
    def without(step):
        return {**step, 'action_dict': {'joint_velocity': np.zeros(7)}}

    with pytest.raises(
        DatasetError, match=r'episode 0: a step has no action_dict/cartesian_position; it has joint_velocity'
    ):
        RldsSource(tmp_path, lambda images: [map(without, rlds_steps(episodes[0]))])


def test_rlds_without_tensorflow_says_what_brings_it(robot, tmp_path):
    (tmp_path / 'droid-train.tfrecord-00000-of-00001').touch()
    code = (
        'import sys; sys.modules["tensorflow_datasets"] = None\n'
        'from decoupled_policy_ros.data.readers.opening import open_demonstrations\n'
        'from decoupled_policy_ros.robot.description import load_robot\n'
        'open_demonstrations(sys.argv[1], load_robot("panda_sim"))\n'
    )
    run = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True)
    assert 'pip install tensorflow tensorflow-datasets' in run.stderr.splitlines()[-1]


def test_recordings_of_motion_are_demonstrations_without_commands(robot, tmp_path):
    motion = synth_motions(robot, 1, 3, 20.0)[0]
    with MotionWriter(tmp_path / 'motion.arrow', Fingerprint.of(robot, 0.0)) as writer:
        writer.append(motion.stamps_ns, motion.joint_positions, motion.actions)
    found = open_demonstrations(tmp_path, robot)
    np.testing.assert_allclose(found.column('observation.pose'), motion.actions, atol=1e-6)
    positions = found.column('observation.joint_positions')
    np.testing.assert_allclose(
        robot.gripper.normalised(positions[:, 7:]), motion.joint_positions[:, 7], atol=1e-5
    )
    with pytest.raises(DatasetError, match="no column 'action'"):
        found.column('action')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'robot0_joint_pos': lambda e, x: None}, 'obs lacks robot0_joint_pos; it has agentview_image, object, '),
        ({'robot0_joint_pos': lambda e, x: e.joints[:, ::-1]}, 'not those of this arm'),
        ({'robot0_joint_pos': lambda e, x: np.rad2deg(e.joints)}, 'not those of this arm'),
        ({'robot0_joint_pos': lambda e, x: e.joints[:, :6]}, r"robot 'panda_sim' has 7 joints: joint1, "),
        ({'robot0_joint_pos': lambda e, x: e.joints * np.nan}, 'of them not finite'),
        ({'actions': lambda e, x: np.zeros((len(e.joints), 4))}, 'one arm with OSC_POSE has 7'),
        ({'controller': {**OSC, 'type': 'JOINT_VELOCITY'}}, "type 'JOINT_VELOCITY'; goals are known for .* OSC_POSE"),
        ({'controller': {'body_parts': {}}}, r"keys \['body_parts'\]; goals are known for"),
        ({'controller': {**OSC, 'impedance_mode': 'variable'}}, "impedance_mode 'variable'"),
        ({'controller': {**OSC, 'output_max': [1, 2]}}, r'output_max must be one or six numbers, got \[1, 2\]'),
    ],
)  # fmt: skip
def test_what_can_not_be_converted_is_refused(robot, episodes, tmp_path, changes, message):
    path = write_robomimic(tmp_path / 'demo.hdf5', episodes, **changes)
    with pytest.raises(DatasetError, match=message):
        open_demonstrations(path, robot)


def test_another_arm_is_refused_by_its_kinematics(episodes, tmp_path):
    path = write_robomimic(tmp_path / 'demo.hdf5', episodes)
    panda = open_demonstrations(path, load_robot('panda_sim'))
    assert panda.calibration.residual_m < 1e-6
    text = (load_robot('fr3').source.path).read_text().replace('0.316', '0.336')
    (tmp_path / 'fr3.urdf').write_text(text)
    source = yaml.safe_load((load_robot_file('fr3')).read_text())
    (tmp_path / 'other.yaml').write_text(yaml.safe_dump({**source, 'urdf': 'fr3.urdf'}))
    with pytest.raises(DatasetError, match='agree within'):
        open_demonstrations(path, load_robot(tmp_path / 'other.yaml'))


def load_robot_file(name):
    from decoupled_policy_ros.robot.description import robot_file

    return robot_file(name)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'joints': {'column': 'observation.joints', 'unit': 'rad'}},
         r"no column 'observation.joints' for joints of mapping; it has .*observation.state.joint_position"),
        ({'joints': {'column': 'observation.state.joint_position[0:6]', 'unit': 'rad'}},
         'joints of mapping needs 7 values'),
        ({'joints': {'column': 'observation.state.joint_position', 'unit': 'turns'}}, "one of rad, deg, got 'turns'"),
        ({'cameras': {'wrist': 'hand'}}, "no camera 'hand' for 'wrist' of mapping; it has exterior_1_left"),
        ({'rate_hz': 20}, 'has 15 frames per second, mapping says 20'),
        ({'action': {'kind': 'velocity'}}, "one of pose, joints, next_pose, none, got 'velocity'"),
        ({'action': {'kind': 'joints', 'position': 'x'}}, 'kind joints has no position; it has column'),
        ({'colour': 1}, 'unknown key colour'),
        ({'gripper': {'column': 'x[1:', 'open': 0, 'closed': 1}}, r"'x\[1:' is no column"),
    ],
)  # fmt: skip
def test_a_mapping_that_does_not_fit_is_refused(robot, episodes, tmp_path, repository, change, message):
    root = write_droid(tmp_path / 'droid', episodes)
    values = yaml.safe_load((repository / 'config/datasets/droid_lerobot.yaml').read_text())
    (tmp_path / 'mapping.yaml').write_text(yaml.safe_dump({**values, **change}))
    with pytest.raises(DatasetError, match=message):
        open_demonstrations(root, robot, mapping=str(tmp_path / 'mapping.yaml'))


def test_what_is_no_dataset_is_refused(robot, episodes, tmp_path):
    with pytest.raises(DatasetError, match='does not exist; valid: a LeRobot v3 dataset'):
        open_demonstrations(tmp_path / 'nothing', robot)
    with pytest.raises(DatasetError, match='none of the datasets that can be read'):
        open_demonstrations(tmp_path, robot)
    (tmp_path / 'broken.hdf5').write_bytes(b'not HDF5')
    with pytest.raises(DatasetError, match=r'broken.hdf5 is no readable HDF5 file'):
        open_demonstrations(tmp_path / 'broken.hdf5', robot)
    with h5py.File(tmp_path / 'other.hdf5', 'w') as file:
        file['images'] = np.zeros(3)
    with pytest.raises(DatasetError, match=r"no group data with attribute env_args; it holds \['images'\]"):
        open_demonstrations(tmp_path / 'other.hdf5', robot)
    unknown = write_lerobot(tmp_path / 'unknown', [{'state': episodes[0].joints}], 20, ['x'])
    with pytest.raises(
        DatasetError, match=r'a mapping has to say .* droid_lerobot, of which 0 fit; its columns are state'
    ):
        open_demonstrations(unknown, robot)
    with pytest.raises(
        DatasetError, match=r"no mapping 'mine': give a path to a .yaml file or one of droid_lerobot"
    ):
        open_demonstrations(unknown, robot, mapping='mine')
    path = write_robomimic(tmp_path / 'demo.hdf5', episodes)
    with pytest.raises(DatasetError, match='a mapping is for LeRobot datasets'):
        open_demonstrations(path, robot, mapping='droid_lerobot')


def test_hdf5_without_h5py_says_what_brings_it(robot, episodes, tmp_path):
    path = write_robomimic(tmp_path / 'demo.hdf5', episodes)
    code = (
        'import sys; sys.modules["h5py"] = None\n'
        'from decoupled_policy_ros.data.readers.opening import open_demonstrations\n'
        'from decoupled_policy_ros.robot.description import load_robot\n'
        'open_demonstrations(sys.argv[1], load_robot("panda_sim"))\n'
    )
    run = subprocess.run([sys.executable, '-c', code, str(path)], capture_output=True, text=True)
    assert "pip install 'decoupled_policy_ros[datasets]'" in run.stderr.splitlines()[-1]


def test_where_the_grip_site_is_comes_from_the_files_own_model(robot, episodes, tmp_path):
    """A site that is mounted straight: the goals are then turned by 90 degrees against the Panda's."""
    model = (
        '<mujoco><worldbody><body name="robot0_right_hand"><body name="gripper0_right_gripper" quat="{}">'
        '<body name="gripper0_eef"><site name="gripper0_grip_site"/></body></body></body></worldbody></mujoco>'
    )
    for quat, refused in (('0.7071068 0 0 -0.7071068', False), ('1 0 0 0', True)):
        path = write_robomimic(tmp_path / f'{refused}.hdf5', episodes)
        with h5py.File(path, 'a') as file:
            file['data/demo_0'].attrs['model_file'] = model.format(quat)
        if refused:
            with pytest.raises(DatasetError, match=r'1.57 rad \(median\)'):
                open_demonstrations(path, robot)
        else:
            require_equal(open_demonstrations(path, robot), episodes, robot)
    with h5py.File(path, 'a') as file:
        del file['data/demo_0'].attrs['model_file']
        env_args = json.loads(file['data'].attrs['env_args'])
        env_args['env_kwargs']['robots'] = ['Sawyer']
        file['data'].attrs['env_args'] = json.dumps(env_args)
    with pytest.raises(DatasetError, match=r"robots \['Sawyer'\] without the demonstrations' model_file"):
        open_demonstrations(path, robot)
