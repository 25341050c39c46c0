"""The simulated arm, its expert and the demonstrations, each against the real simulator."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.data.datasets.dataset import Dataset
from decoupled_policy_ros.data.parallel import start_worker
from decoupled_policy_ros.errors import DatasetError, SimulationError
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.sim import demonstrations
from decoupled_policy_ros.sim.environment import SimRobot
from decoupled_policy_ros.sim.expert import Expert
from decoupled_policy_ros.sim.reference import MAX_STEP_M, pose_distance, step_towards
from decoupled_policy_ros.sim.tasks import TASKS, sim_task
from decoupled_policy_ros.sim.wander import Wander

pytestmark = pytest.mark.sim


@pytest.fixture(scope='module')
def lift():
    with SimRobot('lift') as sim:
        yield sim


@pytest.fixture(scope='module')
def stack():
    with SimRobot('stack', cameras={}) as sim:
        yield sim


def run_expert(sim, seed, steps=None):
    """Let the expert act for a whole episode or a number of steps; the hash of all that it saw and did."""
    sim.reset(seed)
    expert, digest = Expert(sim.task.name), hashlib.sha256()
    for _ in range(sim.task.max_steps if steps is None else steps):
        pose, gripper = expert.act(sim)
        if expert.done:
            break
        sim.step(pose, gripper)
        for array in (pose, sim.joint_positions, sim.joint_velocities, sim.object_state):
            digest.update(array.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize('seed', range(4))
def test_expert_lifts(lift, seed):
    run_expert(lift, seed)
    assert lift.success
    assert lift.object_poses()['cube'][2, 3] > -0.112 + 0.04  # the table's top, and robosuite's margin


@pytest.mark.parametrize('seed', [0, 15])
def test_expert_stacks_and_lets_go(stack, seed):
    run_expert(stack, seed)
    assert stack.success
    upper, lower = (stack.object_poses()[name][:3, 3] for name in ('cube_a', 'cube_b'))
    assert upper[2] - lower[2] == pytest.approx(0.045, abs=2e-3)  # half of 4 cm and half of 5 cm
    assert stack.robot.gripper.normalised(stack.joint_positions[7:]) < -0.9


def test_doing_nothing_is_no_success(lift):
    lift.reset(0)
    home = lift.pose_base_ee
    for _ in range(5):
        lift.step(home, 1.0)
    assert not lift.success


def test_same_seed_same_episode_in_a_process_without_opengl(lift):
    """One program, two facts: a fresh process computes the same bits, and lacks nothing but pictures without OpenGL."""
    program = """
import json, sys
from decoupled_policy_ros.errors import SimulationError
from decoupled_policy_ros.sim.environment import SimRobot
sys.path.insert(0, 'test')
from test_sim import run_expert
sim = SimRobot('lift')
digest = run_expert(sim, 7, steps=15)
try:
    sim.image('wrist')
    message = 'a picture'
except SimulationError as error:
    message = str(error)
print(json.dumps([digest, message]))
"""
    environment = {**os.environ, 'MUJOCO_GL': 'glx'}
    done = subprocess.run(
        [sys.executable, '-c', program], env=environment, capture_output=True, text=True, check=True, timeout=120,
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )  # fmt: skip
    digest, message = json.loads(done.stdout.splitlines()[-1])
    assert digest == run_expert(lift, 7, steps=15)
    assert 'libegl1' in message
    assert '\n' not in message


def test_a_way_to_draw_that_is_not_there_is_named():
    program = """
from decoupled_policy_ros.errors import SimulationError
from decoupled_policy_ros.sim.environment import SimRobot
try:
    SimRobot('lift')
except SimulationError as error:
    print(error)
"""
    environment = {**os.environ, 'MUJOCO_GL': 'vulkan'}
    done = subprocess.run(
        [sys.executable, '-c', program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert 'MUJOCO_GL=vulkan' in done.stdout and 'valid: egl, osmesa, glfw' in done.stdout


def test_an_attempt_takes_as_many_seconds_at_another_rate():
    task = sim_task('lift')
    assert task.steps_at(20.0) == task.max_steps
    assert task.steps_at(10.0) == task.max_steps // 2
    assert task.steps_at(30.0) == task.max_steps * 3 // 2


@pytest.mark.parametrize(('robot', 'rate_hz'), [('panda_sim', 30.0), ('panda_sim', 15.0), ('ur5e_sim', 60.0)])
def test_every_step_takes_its_whole_period(robot, rate_hz):
    sim = SimRobot('lift', load_robot(robot), cameras={}, rate_hz=rate_hz)
    before_s = sim._data.time
    for _ in range(20):
        sim.step(sim.home_pose, -1.0)
    assert sim._data.time - before_s == pytest.approx(20 / rate_hz, rel=1e-9)
    assert 1.5e-3 < sim._model.opt.timestep < 2e-3


def threads_of_blas() -> set[int]:
    return {pool['num_threads'] for pool in threadpoolctl.threadpool_info() if pool['user_api'] == 'blas'}


def test_processes_that_make_demonstrations_have_one_thread_each(monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, context, initializer=start_worker, initargs=(os.getpid(), 2)) as pool:
        assert pool.submit(threads_of_blas).result() == {1}


def test_seeds_place_the_cube_differently_and_leave_the_callers_generator_alone(lift):
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    places = []
    for seed in range(5):
        lift.reset(seed)
        places.append(lift.object_poses()['cube'][:2, 3])
    assert np.random.random() == expected
    assert np.unique(np.round(places, 4), axis=0).shape == (5, 2)


def test_time_never_runs_backwards(lift):
    before = lift.stamp_ns
    lift.reset(3)
    after_reset = lift.stamp_ns
    lift.step(lift.pose_base_ee, -1.0)
    assert before < after_reset
    assert lift.stamp_ns == after_reset + 50_000_000


def test_commanded_pose_is_reached(lift):
    lift.reset(1)
    target = lift.pose_base_ee
    target[:3, 3] += [0.04, -0.06, 0.03]
    target[:3, :3] = Rotation.from_euler('z', 0.4).as_matrix() @ target[:3, :3]
    for _ in range(40):
        lift.step(target, -1.0)
    distance_m, angle_rad = pose_distance(lift.pose_base_ee, target)
    assert distance_m < 2e-3
    assert angle_rad < 0.01
    assert np.abs(lift.joint_velocities).max() < 0.02


def test_gripper_opens_and_closes(lift):
    lift.reset(1)
    home, widths = lift.pose_base_ee, []
    for value in (1.0, -1.0):
        for _ in range(20):
            lift.step(home, value)
        widths.append(lift.robot.gripper.normalised(lift.joint_positions[7:]))
    assert widths[0] > 0.9
    assert widths[1] < -0.9


def test_end_effector_is_where_forward_kinematics_says(lift):
    lift.reset(2)
    kinematics, wander = Kinematics(lift.robot), Wander(lift.robot, lift.pose_base_ee, seed=0)
    for _ in range(30):  # in motion too: joints and poses belong to the same instant
        lift.step(*wander.act())
        np.testing.assert_allclose(kinematics.forward(lift.joint_positions[:7]), lift.pose_base_ee, atol=1e-9)


@pytest.mark.parametrize('camera', ['agentview', 'wrist'])
def test_red_cube_is_where_the_projection_says(lift, camera):
    """Upright, not mirrored, sharp to a pixel, and the cube is red among nothing red."""
    for seed in range(4):
        lift.reset(seed)
        lift.step(lift.pose_base_ee, -1.0)
        picture = lift.image(camera)
        assert picture.shape == (84, 84, 3)
        assert picture.dtype == np.uint8
        red, green, blue = np.moveaxis(picture.astype(int), -1, 0)
        pixels = np.argwhere((red > 1.7 * green) & (red > 1.7 * blue) & (red > 40))
        assert 15 < len(pixels) < 400
        centre = lift.object_poses()['cube'][:3, 3]
        assert np.linalg.norm(pixels.mean(0) - lift.project(camera, centre)) < 1.5


def test_a_picture_belongs_to_its_instant(lift):
    lift.reset(0)
    first = lift.image('wrist')
    assert lift.image('wrist') is first
    target = lift.pose_base_ee
    target[2, 3] -= 0.03
    for _ in range(3):
        lift.step(target, -1.0)
    assert np.any(lift.image('wrist') != first)


def test_overview_draws_the_whole_arm_for_people(lift):
    picture = lift.image('overview')
    assert picture.shape == (240, 320, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000


def test_object_state_is_what_it_says(stack):
    stack.reset(4)
    state, objects = stack.object_state, stack.object_poses()
    assert state.shape == (TASKS['stack'].object_state_dim,)
    assert state.dtype == np.float32
    a, b = (objects[name][:3, 3] for name in ('cube_a', 'cube_b'))
    ee = stack.pose_base_ee[:3, 3]
    expected = np.concatenate([a, a - ee, b, b - ee, b - a])
    np.testing.assert_allclose(
        state[[0, 1, 2, 7, 8, 9, 10, 11, 12, 17, 18, 19, 20, 21, 22]], expected, atol=1e-6
    )
    rotations = Rotation.from_quat([state[3:7], state[13:17]]).as_matrix()
    np.testing.assert_allclose(rotations, [objects['cube_a'][:3, :3], objects['cube_b'][:3, :3]], atol=1e-6)


def test_commanded_steps_are_capped_and_arrive():
    goal = poses.pose_from_position_rotation([0.3, -0.2, 0.1], Rotation.from_euler('z', 1.2).as_matrix())
    pose = np.eye(4)
    for _ in range(60):
        following = step_towards(pose, goal)
        distance_m, angle_rad = pose_distance(pose, following)
        assert distance_m <= MAX_STEP_M + 1e-12
        assert angle_rad <= 0.12 + 1e-9
        pose = following
    np.testing.assert_array_equal(pose, goal)


@pytest.mark.parametrize(
    ('arguments', 'named'),
    [
        ({'task': 'juggle'}, ['juggle', 'lift', 'stack']),
        ({'cameras': {'ceiling': (84, 84)}}, ['ceiling', 'agentview', 'wrist']),
    ],
)
def test_unknown_names_are_refused_with_the_valid_ones(arguments, named):
    with pytest.raises(SimulationError) as caught:
        SimRobot(**arguments)
    assert all(name in str(caught.value) for name in named)


def test_another_arm_is_refused(lift):
    with pytest.raises(SimulationError, match=r'fr3_joint1.*joint1'):
        SimRobot('lift', load_robot('fr3'), cameras={})
    longer_tool = lift.robot.tool.copy()
    longer_tool[2, 3] += 0.01
    with pytest.raises(SimulationError, match=r'panda_sim.*differs by 0\.0'):
        SimRobot('lift', dataclasses.replace(lift.robot, tool=longer_tool), cameras={})


@pytest.mark.parametrize(
    ('pose', 'gripper'), [(np.full((4, 4), np.nan), 0.0), (np.eye(3), 0.0), (np.eye(4), np.nan)]
)
def test_commands_that_are_no_pose_are_refused(lift, pose, gripper):
    before = lift.stamp_ns
    with pytest.raises(SimulationError, match='finite'):
        lift.step(pose, gripper)
    assert lift.stamp_ns == before


def test_recorded_actions_replayed_give_the_recorded_joints(lift):
    """Frame k: what was measured at t_k, and the command in force from then on."""
    success, frames = demonstrations.record_episode(lift, Kinematics(lift.robot), seed=11, noise=False)
    assert success
    lift.reset(11)
    for joints, action in zip(frames['observation.joint_positions'], frames['action'], strict=True):
        np.testing.assert_allclose(lift.joint_positions, joints, atol=1e-4)
        pose, gripper = poses.pose_from_action(action)
        lift.step(pose, float(gripper))
    assert lift.success


def test_demonstrations_are_written_and_do_not_depend_on_the_workers(lift, tmp_path):
    out = tmp_path / 'demos'
    report = demonstrations.make_demonstrations('lift', 2, out, images=True, seed=3, workers=2, quiet=True)
    dataset = Dataset.open(out)
    assert report.episodes == dataset.n_episodes == 2
    assert report.frames == sum(dataset.episode(i).length for i in range(2))
    kinematics = Kinematics(lift.robot)
    seeds = iter(range(100))
    for index in range(2):
        success = False
        while not success:
            seed = demonstrations.episode_seed(3, next(seeds))
            success, frames = demonstrations.record_episode(lift, kinematics, seed, noise=True)
        episode = dataset.episode(index)
        assert episode.instruction == 'lift the red cube'
        for name in ('observation.joint_positions', 'observation.object_state', 'action'):
            np.testing.assert_array_equal(episode.arrays[name], frames[name].astype(np.float32))
        for camera in ('agentview', 'wrist'):
            np.testing.assert_array_equal(episode.images(camera), frames[f'observation.images.{camera}'])


def test_two_tasks_of_one_scene_share_a_dataset_and_begin_alike(tmp_path):
    out = tmp_path / 'demos'
    tasks = ['lift_red', 'lift_green']
    demonstrations.make_demonstrations(
        tasks, 1, out, images=False, seed=2, workers=1, noise=False, quiet=True
    )
    red, green = (Dataset.open(out).episode(i) for i in range(2))
    assert (red.instruction, green.instruction) == ('lift the red cube', 'lift the green cube')
    states = [e.arrays['observation.object_state'] for e in (red, green)]
    np.testing.assert_array_equal(states[0][0], states[1][0])
    assert states[0][-1, 2] > states[0][0, 2] + 0.05  # the first cube is the red one
    assert states[1][-1, 12] > states[1][0, 12] + 0.05


def test_workers_end_when_the_process_that_makes_demonstrations_is_killed(tmp_path):
    command = [
        sys.executable,
        '-m',
        'decoupled_policy_ros.cli',
        'demos',
        '--task',
        'lift',
        '--episodes',
        '1000',
    ]
    making = subprocess.Popen([*command, '--out', str(tmp_path / 'demos'), '--workers', '2'])
    children = Path(f'/proc/{making.pid}/task/{making.pid}/children')
    workers: list[int] = []
    while len(workers) < 3:  # and the resource tracker
        assert making.poll() is None
        time.sleep(0.2)
        workers = [int(child) for child in children.read_text().split()]
    time.sleep(2.0)  # they have begun
    making.kill()
    making.wait()
    until = time.monotonic() + 60.0
    while time.monotonic() < until and any(Path(f'/proc/{worker}').exists() for worker in workers):
        time.sleep(0.2)
    left = [worker for worker in workers if Path(f'/proc/{worker}').exists()]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left


def test_demonstrations_refuse_a_bad_task_count_or_folder(tmp_path):
    with pytest.raises(SimulationError, match='square does not share that of lift'):
        demonstrations.make_demonstrations(['lift', 'square'], 1, tmp_path / 'a')
    with pytest.raises(SimulationError, match=r'juggle.*lift'):
        demonstrations.make_demonstrations('juggle', 1, tmp_path / 'a')
    with pytest.raises(SimulationError, match='at least 1'):
        demonstrations.make_demonstrations('lift', 0, tmp_path / 'a')
    with pytest.raises(SimulationError, match='seed must be at least 0, got -1'):
        demonstrations.make_demonstrations('lift', 1, tmp_path / 'a', seed=-1)
    with pytest.raises(DatasetError, match='exists'):
        demonstrations.make_demonstrations('lift', 1, tmp_path)
    assert list(tmp_path.iterdir()) == []
