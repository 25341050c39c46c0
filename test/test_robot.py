"""Robot files, kinematics and fingerprint, on the two robots that ship."""

import copy
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.errors import FingerprintMismatch, RobotDescriptionError
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import description_topic, load_robot, robot_file, robot_names
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.kinematics import Kinematics

ROBOTS = Path(__file__).resolve().parents[1] / 'config/robots'
FR3_URDF = (ROBOTS / 'fr3.urdf').read_text()

# Franka's published Denavit-Hartenberg parameters (Craig): a (m), d (m), alpha (rad) of joints 1-7 and the flange.
FRANKA_DH = [
    (0.0, 0.333, 0.0),
    (0.0, 0.0, -np.pi / 2),
    (0.0, 0.316, np.pi / 2),
    (0.0825, 0.0, np.pi / 2),
    (-0.0825, 0.384, -np.pi / 2),
    (0.0, 0.0, np.pi / 2),
    (0.088, 0.0, np.pi / 2),
    (0.0, 0.107, 0.0),
]


GRIPPERS = {name: load_robot(name).gripper for name in ('fr3', 'panda_sim', 'ur5e_sim', 'iiwa_sim')}


@pytest.fixture(scope='module', params=['panda_sim', 'fr3', 'ur5e_sim', 'iiwa_sim', 'kinova3_sim'])
def robot(request):
    return load_robot(request.param)


@pytest.fixture(scope='module')
def fr3():
    return load_robot('fr3')


def translation(x, y, z):
    return poses.pose_from_position_rotation([x, y, z], np.eye(3))


def rotation(axis, angle):
    return poses.pose_from_position_rotation(
        np.zeros(3), Rotation.from_rotvec(np.array(axis) * angle).as_matrix()
    )


def franka_hand_tcp(q):
    """Base to fr3_hand_tcp from the DH table: a product of plain rotations and translations."""
    pose = np.eye(4)
    for (a, d, alpha), angle in zip(FRANKA_DH, [*q, 0.0], strict=True):
        pose = (
            pose
            @ rotation([1, 0, 0], alpha)
            @ translation(a, 0, 0)
            @ rotation([0, 0, 1], angle)
            @ translation(0, 0, d)
        )
    return pose @ rotation([0, 0, 1], -np.pi / 4) @ translation(0, 0, 0.1034)


def configurations(robot, count, seed=0):
    limits = robot.limits
    return np.random.default_rng(seed).uniform(
        limits.lower_rad, limits.upper_rad, (count, len(limits.lower_rad))
    )


# Shipped robots


def test_shipped_robots_are_complete(robot):
    assert robot.all_joint_names == robot.joint_names + robot.gripper.joint_names
    assert len(robot.joint_names) == (6 if robot.name == 'ur5e_sim' else 7)
    assert len(robot.gripper.joint_names) == 2
    assert set(robot.cameras) == {'agentview', 'wrist'}
    for topic in [*robot.topics.values(), *(camera.topic for camera in robot.cameras.values())]:
        assert not topic.startswith('/'), 'topics are relative, so that a namespace works'
    position = Kinematics(robot).forward(robot.home_rad)[:3, 3]
    assert np.all(position > robot.limits.workspace_m[0])
    assert np.all(position < robot.limits.workspace_m[1])


def test_fr3_has_the_names_of_franka_ros2(fr3):
    assert fr3.joint_names == tuple(f'fr3_joint{i}' for i in range(1, 8))
    assert (fr3.base_frame, fr3.ee_frame) == ('fr3_link0', 'fr3_hand_tcp')
    assert fr3.base_frames == ('fr3_link0', 'base')  # its state broadcaster says the latter
    assert fr3.topics['current_pose'] == 'franka_robot_state_broadcaster/current_pose'
    assert description_topic('fr3') == 'robot_description'
    assert description_topic('panda_sim') is None


def test_an_arm_that_stands_elsewhere_on_base_has_another_name_for_neither(tmp_path):
    on_a_table = FR3_URDF.replace(
        '<origin xyz="0 0 0" rpy="0 0 0"/>', '<origin xyz="0 0 0.8" rpy="0 0 0"/>', 1
    )
    assert on_a_table != FR3_URDF
    with pytest.raises(RobotDescriptionError, match=r"'base' lies elsewhere than 'fr3_link0'.*leave it out"):
        load_robot('fr3', on_a_table)
    assert load_robot(written(tmp_path, {'frames': {'base_aliases': None}}), on_a_table).base_frames == (
        'fr3_link0',
    )
    named = load_robot(written(tmp_path, {'frames': {'base_aliases': ['arm_base']}}))
    assert named.base_frames == ('fr3_link0', 'arm_base')  # a name that the model does not have


def test_robots_are_found_by_name_and_by_path():
    assert {'fr3', 'panda_sim'} <= set(robot_names())
    assert robot_file(ROBOTS / 'fr3.yaml') == robot_file('fr3')
    with pytest.raises(RobotDescriptionError, match=r"'ur5e'.*fr3,.* panda_sim, ur5e_sim"):
        load_robot('ur5e')


def test_gripper_width_and_normalised_value():
    panda, fr3 = load_robot('panda_sim').gripper, load_robot('fr3').gripper
    assert panda.width([0.03, -0.03]) == pytest.approx(0.06)  # the simulator's right finger counts down
    assert fr3.width([0.03, 0.03]) == pytest.approx(0.06)
    np.testing.assert_allclose(fr3.normalised([[0.04, 0.04], [0.02, 0.02], [0.0, 0.0]]), [-1, 0, 1])
    assert fr3.normalised([0.05, 0.05]) == -1.0  # a finger past its stop


def test_a_gripper_whose_fingers_turn_has_a_width_too():
    robotiq = load_robot('iiwa_sim').gripper
    np.testing.assert_allclose(robotiq.width([[0.013, -0.013], [0.482, -0.482]]), [0.127, 0.017])
    np.testing.assert_allclose(
        robotiq.normalised([[0.0, 0.0], [0.2475, -0.2475], [0.5, -0.5]]), [-1, 0, 1], atol=1e-12
    )


@pytest.mark.parametrize('name', ['fr3', 'panda_sim', 'ur5e_sim', 'iiwa_sim'])
@settings(deadline=None)
@given(value=st.floats(-1.0, 1.0))
def test_gripper_value_round_trip(name, value):
    gripper = GRIPPERS[name]
    width_m = gripper.width_from_normalised(value)
    assert gripper.normalised_from_width(width_m) == pytest.approx(value, abs=1e-12)
    assert gripper.normalised(gripper.joint_positions(width_m)) == pytest.approx(value, abs=1e-12)


def test_arrays_of_a_description_are_read_only(robot):
    for array in (robot.home_rad, robot.tool, robot.limits.lower_rad, robot.limits.workspace_m):
        with pytest.raises(ValueError, match='read-only'):
            array[0] = 0.0


# Kinematics


def test_fr3_matches_the_published_dh_parameters(fr3):
    kinematics = Kinematics(fr3)
    for q in configurations(fr3, 50):
        np.testing.assert_allclose(kinematics.forward(q), franka_hand_tcp(q), rtol=0, atol=1e-12)


def test_forward_many_equals_forward(robot):
    kinematics, q = Kinematics(robot), configurations(robot, 20)
    np.testing.assert_array_equal(
        kinematics.forward_many(q), np.stack([kinematics.forward(row) for row in q])
    )
    assert kinematics.forward_many(np.empty((0, len(robot.joint_names)))).shape == (0, 4, 4)


def test_screws_and_zero_pose_are_the_whole_chain(robot):
    """Product of exponentials, written out with matrices, against Pinocchio."""
    from scipy.linalg import expm

    kinematics = Kinematics(robot)
    for q in configurations(robot, 5):
        pose = kinematics.forward(np.zeros_like(robot.home_rad))
        for (vx, vy, vz, wx, wy, wz), angle in reversed(list(zip(kinematics.screws(), q, strict=True))):
            twist = np.array([[0, -wz, wy, vx], [wz, 0, -wx, vy], [-wy, wx, 0, vz], [0, 0, 0, 0]])
            pose = expm(twist * angle) @ pose
        np.testing.assert_allclose(kinematics.forward(q), pose, rtol=0, atol=1e-12)


@pytest.mark.parametrize('shape', [(6,), (9,), (1, 7)])
def test_wrong_number_of_joints_is_refused(fr3, shape):
    with pytest.raises(RobotDescriptionError, match='fr3_joint1'):
        Kinematics(fr3).forward(np.zeros(shape))


def test_kinematics_is_safe_between_threads(fr3):
    """Pinocchio's work space is one thread's at a time: a call waits while another one is in it."""
    kinematics, q = Kinematics(fr3), configurations(fr3, 2)
    expected, results = kinematics.forward_many(q), []
    thread = threading.Thread(target=lambda: results.append(kinematics.forward(q[0])), daemon=True)
    with kinematics._lock:
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert results == []
    thread.join(10)
    np.testing.assert_array_equal(results, expected[:1])


@pytest.mark.sim
@pytest.mark.parametrize(
    ('name', 'arm_name'),
    [('panda_sim', 'Panda'), ('ur5e_sim', 'UR5e'), ('iiwa_sim', 'IIWA'), ('kinova3_sim', 'Kinova3')],
)
def test_simulated_arms_match_the_simulator(name, arm_name):
    """Hand body and grip site of the running simulation, in its base body's frame, to 1e-9."""
    import robosuite

    robot = load_robot(name)
    kinematics = Kinematics(robot)
    env = robosuite.make(
        'Lift', robots=arm_name, has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False
    )
    try:
        env.reset()
        model, data, arm = env.sim.model, env.sim.data, env.robots[0]
        assert tuple(joint.removeprefix('robot0_') for joint in arm.robot_joints) == robot.joint_names
        fingers = {joint.removeprefix('gripper0_') for joint in arm.gripper_joints}
        assert set(robot.gripper.joint_names) <= fingers
        np.testing.assert_allclose(arm.init_qpos, robot.home_rad, atol=1e-7)

        def body(name):
            i = model.body_name2id(name)
            return poses.pose_from_position_rotation(data.body_xpos[i], data.body_xmat[i].reshape(3, 3))

        site = model.site_name2id('gripper0_grip_site')
        for q in configurations(robot, 25):
            data.qpos[arm._ref_joint_pos_indexes] = q
            env.sim.forward()
            base_world = poses.inverse(body('robot0_base'))
            grip_site = poses.pose_from_position_rotation(
                data.site_xpos[site], data.site_xmat[site].reshape(3, 3)
            )
            np.testing.assert_allclose(
                base_world @ body('robot0_right_hand'), kinematics.link_forward(q), atol=1e-9
            )
            np.testing.assert_allclose(base_world @ grip_site, kinematics.forward(q), atol=1e-9)
    finally:
        env.close()


# Fingerprint


def hash_of(urdf):
    return Fingerprint.of(load_robot('fr3', description_xml=urdf), 20).description_sha256


def replaced(old, new):
    assert FR3_URDF.count(old) >= 1
    return FR3_URDF.replace(old, new, 1)


MESH = (
    '<visual><geometry><mesh filename="package://franka_description/meshes/link3.dae"/></geometry></visual>'
)
INERTIAL = (
    '<inertial><mass value="3.2"/><inertia ixx="1" ixy="0" ixz="0" iyy="1" iyz="0" izz="1"/></inertial>'
)
SAME_CHAIN = {
    'the same text': FR3_URDF,
    'a mesh and an inertia': replaced(
        '<link name="fr3_link3"/>', f'<link name="fr3_link3">{MESH}{INERTIAL}</link>'
    ),
    'other white space': ' '.join(FR3_URDF.split()),
    'digits of pi': FR3_URDF.replace('1.5707963267948966', '1.57079633'),
    'other joint limits': replaced('upper="2.7437"', 'upper="2.5"'),
    'a continuous joint': replaced(
        'name="fr3_joint7" type="revolute"', 'name="fr3_joint7" type="continuous"'
    ),
    'a longer finger': replaced('0 0 0.0584', '0 0 0.06'),
    'another robot name': replaced('<robot name="fr3">', '<robot name="left_arm">'),
    'a negative zero': replaced('xyz="0 -0.316 0"', 'xyz="-0 -0.316 0"'),
}
OTHER_CHAIN = {
    'a joint origin': replaced('0.0825 0 0', '0.0826 0 0'),
    'a joint turned': replaced('0 -0.316 0" rpy="1.5707963267948966', '0 -0.316 0" rpy="1.5708963267948966'),
    'an axis reversed': replaced('<axis xyz="0 0 1"/>', '<axis xyz="0 0 -1"/>'),
    'an axis turned': replaced('<axis xyz="0 0 1"/>', '<axis xyz="0 1 0"/>'),
    'a tool offset': replaced('0 0 0.1034', '0 0 0.1044'),
    'the hand turned': replaced('rpy="0 0 -0.7853981633974483"', 'rpy="0 0 0"'),
    'two joints exchanged': FR3_URDF.replace('"fr3_joint2"', '"swap"')
    .replace('"fr3_joint3"', '"fr3_joint2"')
    .replace('"swap"', '"fr3_joint3"'),
    'a prismatic joint': replaced('name="fr3_joint5" type="revolute"', 'name="fr3_joint5" type="prismatic"'),
}


@pytest.mark.parametrize('variant', SAME_CHAIN)
def test_description_hash_ignores_what_does_not_move_the_arm(fr3, variant):
    assert hash_of(SAME_CHAIN[variant]) == Fingerprint.of(fr3, 20).description_sha256


@pytest.mark.parametrize('variant', OTHER_CHAIN)
def test_description_hash_sees_every_change_of_the_chain(fr3, variant):
    assert hash_of(OTHER_CHAIN[variant]) != Fingerprint.of(fr3, 20).description_sha256


def test_continuous_joint_turns_like_a_revolute_one(fr3):
    turning = Kinematics(load_robot('fr3', description_xml=SAME_CHAIN['a continuous joint']))
    q = configurations(fr3, 1)[0]
    np.testing.assert_allclose(turning.forward(q), franka_hand_tcp(q), rtol=0, atol=1e-12)


def test_fingerprint_round_trip_and_equality(robot):
    fingerprint = Fingerprint.of(robot, 20)
    again = Fingerprint.from_dict(yaml.safe_load(yaml.safe_dump(fingerprint.to_dict())))
    assert again == fingerprint
    fingerprint.require_equal(again)
    assert fingerprint.rotation_convention == 'rot6d_columns'


def test_another_arm_is_refused_with_both_values(fr3):
    backbone, arm = Fingerprint.of(load_robot('panda_sim'), 20), Fingerprint.of(fr3, 10)
    with pytest.raises(FingerprintMismatch) as error:
        backbone.require_equal(arm, 'backbone', 'robot')
    for value in (
        backbone.description_sha256,
        arm.description_sha256,
        'grip_site',
        'fr3_hand_tcp',
        '20.0',
        '10.0',
    ):
        assert value in str(error.value)
    assert 'rotation_convention' not in str(error.value)  # the same in both


@pytest.mark.parametrize('change', [{'rate_hz': None}, {'colour': 'red'}])
def test_fingerprint_with_other_fields_is_refused(fr3, change):
    values = {**Fingerprint.of(fr3, 20).to_dict(), **change}
    values = {key: value for key, value in values.items() if value is not None}
    with pytest.raises(FingerprintMismatch, match='description_sha256'):
        Fingerprint.from_dict(values)


# Refusals of a robot file: (change to fr3.yaml, what the message must name)

REFUSED = {
    'unknown key': ({'colour': 'white'}, ['colour', 'cameras', 'gripper']),
    'unknown limit': ({'limits': {'jerk': 1}}, ['limits', 'jerk', 'velocity_rad_s']),
    'missing section': ({'arm': None}, ["missing key 'arm'", 'limits']),
    'joint not in the model': (
        {'arm': {'joint_names': [*(f'fr3_joint{i}' for i in range(1, 7)), 'elbow']}},
        ['elbow', 'fr3_joint7'],
    ),
    'joint left out': ({'arm': {'joint_names': [f'fr3_joint{i}' for i in range(1, 7)]}}, ['home_rad', '6']),
    'joint twice': ({'arm': {'joint_names': ['fr3_joint1'] * 7}}, ['fr3_joint1', 'twice']),
    'finger as arm joint': (
        {
            'arm': {'joint_names': [*(f'fr3_joint{i}' for i in range(1, 7)), 'fr3_finger_joint1']},
            'gripper': {'joint_names': ['a', 'b']},
        },
        ['fr3_joint7', 'fr3_finger_joint1'],
    ),
    'arm joint as finger': (
        {'gripper': {'joint_names': ['fr3_joint1', 'fr3_finger_joint1']}},
        ['fr3_joint1'],
    ),
    'base frame': ({'frames': {'base': 'pedestal'}}, ['pedestal', 'fr3_link0']),
    'ee frame': ({'frames': {'ee': 'tool0'}}, ['tool0', 'fr3_hand_tcp']),
    'base alias elsewhere': (
        {'frames': {'base_aliases': ['fr3_link8']}},
        ['base_aliases', 'fr3_link8', 'elsewhere', 'fr3_link0'],
    ),
    'base alias twice': ({'frames': {'base_aliases': ['base', 'base']}}, ['base_aliases', 'twice']),
    'base above a joint': ({'frames': {'base': 'fr3_link1'}}, ['base link', 'fr3_joint1', 'joint_names']),
    'ee before a joint': ({'frames': {'ee': 'fr3_link6'}}, ['fr3_joint6', 'fr3_joint7']),
    'tool quaternion': (
        {'frames': {'tool': {'position_m': [0, 0, 0], 'quat_xyzw': [0, 0, 0, 0]}}},
        ['quat_xyzw'],
    ),
    'limit of the wrong size': ({'limits': {'lower_rad': [0, 0]}}, ['lower_rad', '7', '[0, 0]']),
    'limit not a number': ({'limits': {'velocity_rad_s': ['fast'] * 7}}, ['velocity_rad_s', 'fast']),
    'lower above upper': (
        {'limits': {'lower_rad': [4.0] * 7}},
        ['lower_rad and upper_rad', 'number 1', '4.0', '2.'],
    ),
    'flat workspace': (
        {'limits': {'workspace_m': {'lower': [0.1, 0.1, 0.5], 'upper': [0.9, 0.9, 0.5]}}},
        ['workspace_m', 'number 3 has 0.5 and 0.5'],
    ),
    'limit true': ({'limits': {'velocity_rad_s': [True] * 7}}, ['velocity_rad_s', 'True']),
    'braking offset of the printed formula': (
        {'limits': {'braking': {'offset_rad_s': [-0.3] * 7}}},
        ['braking', 'offset_rad_s', 'at least 0', '-0.3'],
    ),
    'braking without a brake': (
        {'limits': {'braking': {'deceleration_rad_s2': [0] * 7}}},
        ['deceleration_rad_s2', 'positive', '0.0'],
    ),
    'pairs within a pair': (
        {'collision': {'ignored_pairs': [[['fr3_link0', 'fr3_link1'], ['fr3_link1', 'fr3_link2']]]}},
        ['ignored_pairs', "['fr3_link0', 'fr3_link1']"],
    ),
    'gripper in millimetres': ({'gripper': {'open_width_m': 80}}, ['open_width_m', 'metres', '80']),
    'velocity zero': ({'limits': {'velocity_rad_s': [0] * 7}}, ['velocity_rad_s', 'positive']),
    'home outside': ({'arm': {'home_rad': [0, 0, 0, 0, 0, 1.5, 0]}}, ['fr3_joint4', '0.0', '-0.1518']),
    'gripper never opens': ({'gripper': {'open_width_m': 0.0}}, ['open_width_m', '0.0']),
    'gripper sign': ({'gripper': {'joint_signs': [1, 2]}}, ['joint_signs', '2.0']),
    'gripper half turning': ({'gripper': {'open_position': 0.0}}, ['closed_position', 'only open_position']),
    'gripper does not turn': (
        {'gripper': {'open_position': 0.5, 'closed_position': 0.5}},
        ['must differ', '0.5'],
    ),
    'topic missing': ({'topics': {'joint_states': None}}, ['joint_states']),
    'camera key': ({'cameras': {'wrist': {'fps': 30}}}, ['wrist', 'fps', 'topic']),
    'camera flag': ({'cameras': {'wrist': {'compressed': 'yes'}}}, ['compressed', 'yes']),
    'cameras a list': ({'cameras': ['wrist']}, ['cameras', 'wrist']),
    'no such file': ({'urdf': 'fr4.urdf'}, ['fr4.urdf', 'does not exist']),
    'no such package': ({'urdf': 'package://no_such_package/arm.urdf'}, ['no_such_package']),
    'two models': ({'mjcf': 'arm.xml'}, ['urdf', 'mjcf']),
    'only the topic': ({'urdf': None}, ['robot_description']),
}


def merged(values, change):
    """`change` laid over `values`; None takes a key away."""
    values = copy.deepcopy(values)
    for key, value in change.items():
        if value is None:
            del values[key]
        elif isinstance(value, dict):
            values[key] = merged(values.get(key, {}), value)
        else:
            values[key] = value
    return values


def written(folder, change):
    (folder / 'fr3.urdf').write_text(FR3_URDF)
    path = folder / 'robot.yaml'
    path.write_text(yaml.safe_dump(merged(yaml.safe_load((ROBOTS / 'fr3.yaml').read_text()), change)))
    return path


@pytest.mark.parametrize('case', REFUSED)
def test_bad_robot_file_is_refused_by_name(tmp_path, case):
    change, named = REFUSED[case]
    with pytest.raises(RobotDescriptionError) as error:
        load_robot(written(tmp_path, change))
    for text in named:
        assert text in str(error.value)


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    path = written(tmp_path, {})
    text = path.read_text() + '\n'
    values = yaml.safe_load(text)
    values['limits'] |= {'ee_linear_jerk_m_s3': '4.5e3', 'jerk_rad_s3': ['5e3'] * 7}
    path.write_text(yaml.safe_dump(values).replace("'4.5e3'", '4.5e3').replace("'5e3'", '5e3'))
    limits = load_robot(path).limits
    assert limits.ee_linear_jerk_m_s3 == 4500.0
    np.testing.assert_array_equal(limits.jerk_rad_s3, [5000.0] * 7)


def test_the_unchanged_copy_loads(tmp_path, fr3):
    copied = load_robot(written(tmp_path, {}))
    assert Fingerprint.of(copied, 20) == Fingerprint.of(fr3, 20)


@pytest.mark.parametrize('text', ['<robot name="fr3">', 'no xml at all', ''])
def test_broken_urdf_is_refused(text):
    with pytest.raises(RobotDescriptionError, match='robot_description text'):
        load_robot('fr3', description_xml=text)


@pytest.mark.parametrize(
    'text',
    ['- a\n- list', 'name: [unclosed', '', 'name: fr3\n!!python/object:os.system {}', 'name: 2024-13-45'],
)
def test_file_that_is_no_robot_is_refused(tmp_path, text):
    path = tmp_path / 'robot.yaml'
    path.write_text(text)
    with pytest.raises(RobotDescriptionError, match=r'robot\.yaml'):
        load_robot(path)


def test_topic_description_serves_a_robot_without_a_file(tmp_path, fr3):
    path = written(tmp_path, {'urdf': None})
    assert description_topic(path) == 'robot_description'
    assert Fingerprint.of(load_robot(path, description_xml=FR3_URDF), 20) == Fingerprint.of(fr3, 20)


def test_package_uri_follows_the_ament_index(tmp_path, monkeypatch, fr3):
    share = tmp_path / 'share/my_arm_description'
    marker = tmp_path / 'share/ament_index/resource_index/packages/my_arm_description'
    for path, text in ((share / 'urdf/arm.urdf', FR3_URDF), (marker, '')):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(tmp_path))
    robot = load_robot(written(tmp_path, {'urdf': 'package://my_arm_description/urdf/arm.urdf'}))
    assert robot.source.path == share / 'urdf/arm.urdf'
    assert Fingerprint.of(robot, 20) == Fingerprint.of(fr3, 20)


@settings(max_examples=25)
@given(st.permutations(range(7)))
def test_joint_order_is_by_name(order):
    """A robot whose file lists the joints in another order wants its positions in that order, and no other."""
    fr3 = load_robot('fr3')
    names = tuple(fr3.joint_names[i] for i in order)
    shuffled = type(fr3)(**{**vars(fr3), 'joint_names': names})
    q = configurations(fr3, 1)[0]
    np.testing.assert_array_equal(Kinematics(shuffled).forward(q[list(order)]), Kinematics(fr3).forward(q))
    if list(order) != list(range(7)):
        assert Fingerprint.of(shuffled, 20) != Fingerprint.of(fr3, 20)
