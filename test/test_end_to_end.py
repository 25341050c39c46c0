"""The closed circle at small size: simulator and policy node over DDS, the same loop without ROS, and the demo."""

import json
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from ros_harness import PolicyPeer, node_process
from sensor_msgs.msg import JointState
from std_srvs.srv import SetBool, Trigger
from told_policy import HOME, save_told_policy, stay
from untrained import save_untrained_policy

from decoupled_policy_ros.nodes.common import time_ns
from decoupled_policy_ros.nodes.demo import run_demo
from decoupled_policy_ros.nodes.demo_client import DemoError
from decoupled_policy_ros.observation.messages import joint_positions_from_message, pose_from_message
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.runtime.engine import noise_seed
from decoupled_policy_ros.training.evaluation import Evaluation, Rollout

pytestmark = [
    pytest.mark.process,
    pytest.mark.sim,
    pytest.mark.unguarded('commands are compared with those of the evaluation, which has no guard'),
]

PERIOD_NS = 50_000_000
SEED, STEPS, DENOISING_STEPS = 5, 30, 4
ROBOT = load_robot('panda_sim')


@pytest.fixture(scope='module')
def task_folder(tmp_path_factory) -> Path:
    return save_untrained_policy(tmp_path_factory.mktemp('models'))


def without_ros(task_folder: Path, begins_ns: int) -> tuple[np.ndarray, np.ndarray]:
    """Commanded poses (STEPS, 4, 4) and joint positions (STEPS, 9) before each, of the evaluation's own loop.

    Args:
        begins_ns: stamp of the first observation in the node, whose noise is that of seed and stamp.
    """
    spec = Evaluation(str(task_folder), 'lift', denoising_steps=DENOISING_STEPS, max_steps=STEPS)
    rollout = Rollout(spec)
    commands, joints, stamps_ns = [], [], []
    step, many = rollout.sim.step, rollout.engine.many

    def recording(pose, gripper) -> None:
        commands.append(pose)
        joints.append(rollout.sim.joint_positions)
        step(pose, gripper)

    def with_the_nodes_noise(observations, generators, *rest):
        stamps_ns.append(rollout.sim.stamp_ns)
        generators[0].manual_seed(noise_seed(SEED, begins_ns + stamps_ns[-1] - stamps_ns[0]))
        return many(observations, generators, *rest)

    rollout.sim.step, rollout.engine.many = recording, with_the_nodes_noise
    rollout.run(SEED)
    rollout.sim.close()
    return np.stack(commands[-STEPS:]), np.stack(joints[-STEPS:])


def test_over_dds_it_is_the_same_run_as_without_ros(task_folder, tmp_path):
    """However slow either process is: the simulated clock waits for each command, so nothing depends on timing."""
    peer = PolicyPeer()
    simulator = {'seed': SEED - 1, 'real_time_factor': 0.0, 'lockstep_timeout_s': 120.0}
    policy = {
        'task': str(task_folder), 'use_sim_time': True, 'lockstep': True, 'denoising_steps': DENOISING_STEPS,
        'seed': SEED, 'enabled': False, 'autostart': True, 'threads': 1, 'guard': False,
    }  # fmt: skip
    try:
        peer.record(JointState, 'joint_states')
        with (
            node_process('sim_robot_node', tmp_path / 'sim.log', simulator) as sim,
            node_process('policy_node', tmp_path / 'policy.log', policy) as node,
        ):
            peer.status('disabled', 'no commands')  # it is active
            assert peer.call(Trigger, 'sim_robot_node/reset', Trigger.Request()).message == f'seed {SEED}'
            assert peer.call(SetBool, 'policy_node/enable', SetBool.Request(data=True)).success
            peer.wait_for(lambda: len(peer.received('target_pose')) >= STEPS, 'commands')
            commands, states = peer.received('target_pose')[:STEPS], peer.received('joint_states')
            assert peer.diagnostics('policy')['holds'] == '0'
            assert 'Traceback' not in sim.output() + node.output()
    finally:
        peer.close()
    stamps_ns = [time_ns(command.header.stamp) for command in commands]
    assert all(b - a == PERIOD_NS for a, b in pairwise(stamps_ns))
    expected_commands, expected_joints = without_ros(task_folder, stamps_ns[0])
    joints = {time_ns(s.header.stamp): joint_positions_from_message(s, ROBOT.all_joint_names) for s in states}
    np.testing.assert_allclose(np.stack([joints[stamp] for stamp in stamps_ns]), expected_joints, atol=1e-6)
    poses = np.stack([pose_from_message(command, ROBOT.base_frame) for command in commands])
    np.testing.assert_allclose(poses, expected_commands, atol=1e-6)


def test_demo_leaves_a_summary_a_video_and_a_picture(task_folder, tmp_path, capsys):
    summary = run_demo(str(task_folder), episodes=2, out=tmp_path / 'demo', max_s=0.8, guard=False)
    assert json.loads((tmp_path / 'demo' / 'summary.json').read_text()) == summary
    assert summary['episodes'] == 2
    assert [result['seed'] for result in summary['results']] == [1, 2]
    # 16 steps, 8 to a chunk; the third chunk is due at the very end, and may be counted still.
    assert all(result['cycles'] in (2, 3) for result in summary['results'])
    assert summary['holds'] == summary['underruns'] == 0
    assert set(summary['latency_ms']) == {'sample', 'encode', 'modulate', 'denoise', 'guard', 'total'}
    with av.open(str(tmp_path / 'demo' / 'demo.mp4')) as video:
        frames = [frame.to_ndarray(format='rgb24') for frame in video.decode(video=0)]
    assert len(frames) >= 2 * 6
    assert frames[0].shape == (480, 640, 3)
    assert frames[0].std() > 20
    assert cv2.imread(str(tmp_path / 'demo' / 'demo.png')).shape[1] > 1000
    output = capsys.readouterr().out
    assert 'episode  1' in output
    assert '2 episodes succeeded' in ' '.join(output.split())
    assert 'encode' in output


def test_demo_with_the_guard_begins_episode_after_episode(tmp_path):
    summary = run_demo('lift', episodes=6, out=tmp_path / 'demo', max_s=0.4)
    # A first chunk that the guard refuses is held against for a step: the simulator waits for every command.
    assert summary['holds'] <= summary['rejected_chunks'] <= 3
    assert all(result['cycles'] in (1, 2) for result in summary['results'])


def test_demo_of_a_policy_that_the_guard_refuses_ends_in_failures_and_says_why(tmp_path, capsys):
    far = HOME.copy()
    far[0, 3] += 0.3  # m
    summary = run_demo(
        str(save_told_policy(tmp_path, stay(far))), episodes=2, out=tmp_path / 'demo', max_s=0.4
    )
    assert (summary['successes'], summary['cycles'], summary['holds']) == (0, 0, 2)
    assert summary['rejected_chunks'] >= 2 * 6  # one a step; the last may come after the last diagnostics
    assert all(result['held_because'].startswith('join at waypoint 1: ') for result in summary['results'])
    printed = capsys.readouterr().out
    assert '1 holds: join at waypoint 1: ' in printed
    assert f'{summary["rejected_chunks"]} rejected chunks' in printed


def test_demo_without_a_task_ends_with_its_reason(tmp_path):
    with pytest.raises(
        DemoError, match=r"policy_node refused to configure: .*'juggle' is neither a folder nor"
    ):
        run_demo('juggle', episodes=1, out=tmp_path / 'demo')


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_demo_leaves_no_process(how, task_folder, tmp_path):
    out = tmp_path / 'demo'
    command = [
        sys.executable,
        '-m',
        'decoupled_policy_ros.cli',
        'demo',
        '--task',
        str(task_folder),
        '--out',
        str(out),
    ]
    # A shell's background job ignores Ctrl-C, and its children inherit that: this one shall not.
    demo = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(children := _children(demo.pid)) < 2:
        assert demo.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    demo.send_signal(how)
    output, _ = demo.communicate(timeout=90)
    assert demo.returncode == 130
    assert 'Traceback' not in output
    assert not [child for child in children if Path(f'/proc/{child}').exists()]
    assert not (out / 'demo.mp4').exists()


def _children(pid: int) -> list[int]:
    """Processes that a process has started and that still live, as Linux lists them."""
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
