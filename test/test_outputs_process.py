"""The policy drives the simulated arm by joint trajectories, over DDS; poses do in test_end_to_end."""

from itertools import pairwise

import numpy as np
import pytest
from ros_harness import PolicyPeer, node_process
from sensor_msgs.msg import JointState
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory, MultiDOFJointTrajectory

from decoupled_policy_ros.nodes.common import COMMAND, time_ns
from decoupled_policy_ros.nodes.sim_commands import joint_motion
from decoupled_policy_ros.observation.messages import joint_positions_from_message
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics

pytestmark = [pytest.mark.process, pytest.mark.sim]

ROBOT = load_robot('panda_sim')


def test_joint_trajectories_drive_the_arm_and_it_comes_to_rest_when_told(tmp_path):
    """A simulated second of Lift in lockstep, whatever the machine has to do besides."""
    peer = PolicyPeer()
    policy = {
        'task': 'lift', 'use_sim_time': True, 'lockstep': True, 'enabled': False, 'autostart': True,
        'denoising_steps': 4, 'output': 'joint_trajectory',
    }  # fmt: skip
    simulator = {'real_time_factor': 0.0, 'lockstep_timeout_s': 120.0}
    try:
        peer.record(JointTrajectory, 'joint_trajectory')
        peer.record(JointState, 'joint_states')
        with (
            node_process('sim_robot_node', tmp_path / 'sim.log', simulator) as sim,
            node_process('policy_node', tmp_path / 'policy.log', policy) as node,
        ):
            peer.status('disabled', 'no commands')
            assert peer.call(Trigger, 'sim_robot_node/reset', Trigger.Request()).success
            assert peer.call(SetBool, 'policy_node/enable', SetBool.Request(data=True)).success
            peer.wait_for(lambda: len(peer.received('joint_trajectory')) >= 4, 'trajectories')
            values = peer.diagnostics('policy')
            assert peer.call(SetBool, 'policy_node/enable', SetBool.Request(data=False)).success
            peer.wait_for(
                lambda: not any(peer.received('joint_trajectory')[-1].points[-1].velocities), 'a stop'
            )
            messages, states = peer.received('joint_trajectory'), peer.received('joint_states')
            assert 'Traceback' not in sim.output() + node.output()
            assert 'refused' not in sim.output()
            assert not peer.received('target_pose')
    finally:
        peer.close()
    assert values['gripper'] == values['joint_trajectory'] == 'ready'
    assert values['holds'] == '0'
    motions = [joint_motion(m, ROBOT.joint_names, time_ns(m.header.stamp)) for m in messages[:-1]]
    for before, after in pairwise(motions):
        np.testing.assert_allclose(
            before.at(after.stamps_ns[0])[0], after.positions_rad[0], atol=1e-3
        )  # one goes on where the other was
    measured = {time_ns(s.header.stamp): joint_positions_from_message(s, ROBOT.joint_names) for s in states}
    forward = Kinematics(ROBOT).forward
    gone, lag = 0.0, []
    for motion in motions:
        for stamp_ns in filter(
            measured.__contains__, range(motion.stamps_ns[0], motion.stamps_ns[-1], 50_000_000)
        ):
            wanted = forward(motion.at(stamp_ns)[0])[:3, 3]
            lag.append(np.linalg.norm(wanted - forward(measured[stamp_ns])[:3, 3]))
        gone += np.linalg.norm(
            forward(motion.positions_rad[-1])[:3, 3] - forward(motion.positions_rad[0])[:3, 3]
        )
    assert gone > 0.03
    assert len(lag) > 10 and max(lag) < 0.1  # the arm follows, as far behind as its controller lets it be


def test_a_dry_run_shows_what_it_would_do_and_commands_nothing(tmp_path):
    peer = PolicyPeer()
    policy = {
        'task': 'lift', 'use_sim_time': True, 'autostart': True, 'denoising_steps': 4, 'output': 'none',
    }  # fmt: skip
    simulator = {'real_time_factor': 1.0, 'lockstep': False}
    try:
        peer.record(MultiDOFJointTrajectory, 'policy_node/trajectory', COMMAND)
        peer.record(JointState, 'joint_states')
        with (
            node_process('sim_robot_node', tmp_path / 'sim.log', simulator),
            node_process('policy_node', tmp_path / 'policy.log', policy) as node,
        ):
            peer.wait_for(lambda: len(peer.received('policy_node/trajectory')) >= 2, 'what it would do')
            for topic in ('target_pose', 'gripper_command', 'joint_trajectory'):
                assert peer.count_publishers(topic) == 0
            states = peer.received('joint_states')
            assert 'Traceback' not in node.output()
    finally:
        peer.close()
    first, last = (joint_positions_from_message(s, ROBOT.joint_names) for s in (states[0], states[-1]))
    np.testing.assert_allclose(first, last, atol=0.02)
    assert not peer.received('target_pose') and not peer.received('gripper_command')


BAD = [
    ({'output': 'both', 'guard': False}, "output 'both' needs the guard"),
    (
        {'output': 'joint_trajectory', 'trajectory_action': True},
        'the action FollowJointTrajectory needs the ROS package control_msgs',
    ),
    ({'gripper': 'action'}, "robot 'panda_sim' names no action of its gripper"),
]


def test_what_cannot_be_is_refused_with_the_reason(tmp_path):
    good = {'output': 'pose', 'guard': True, 'trajectory_action': False, 'gripper': 'auto'}
    peer = PolicyPeer()
    try:
        with node_process('policy_node', tmp_path / 'policy.log', {'task': 'lift'}) as node:
            for bad, reason in BAD:
                for name, value in {**good, **bad}.items():
                    assert peer.set_parameter('policy_node', name, value)[0]
                assert not peer.change_state('configure')
                peer.status('failed', reason)
            assert 'Traceback' not in node.output()
    finally:
        peer.close()
