"""An arm for tests, run as a process: joint states at a fixed rate with stamps that count samples.

It rests until a line comes on stdin, plays its segments, says `done`, and rests until stdin ends. Sample k has
the stamp START + k periods whenever it is sent, so that a test can tell which samples arrived. Every 50 samples
it prints k.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time

import numpy as np
import rclpy
from geometry_msgs.msg import PoseStamped
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import JointState

from decoupled_policy_ros.nodes.common import pose_stamped, time_message
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics

START_NS = 1_700_000_000_000_000_000
SPEED_RAD_S = 0.3


def joint_positions(robot, moved_s: float) -> np.ndarray:
    """Arm and fingers (9,) after so many seconds of movement; one of two joints is always under way."""
    positions = np.concatenate([robot.home_rad, 0.04 * np.array(robot.gripper.joint_signs)])
    positions[:2] += 0.1 * np.array([np.sin(moved_s * SPEED_RAD_S * 10), np.cos(moved_s * SPEED_RAD_S * 10)])
    return positions


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument('--robot', default='panda_sim')
    parser.add_argument('--rate-hz', type=float, default=1000.0)
    parser.add_argument('--segments', default='1', help='seconds of moving, resting, moving, ...')
    parser.add_argument('--reverse', action='store_true', help='joints in the opposite order')
    parser.add_argument('--best-effort', action='store_true')
    parser.add_argument('--pose-every', type=int, default=0, help='publish the pose every so many samples')
    parser.add_argument('--pose-offset-m', type=float, default=0.0)
    parser.add_argument(
        '--nan-every', type=int, default=0, help='a NaN in each sample of the movement so far apart'
    )
    parser.add_argument(
        '--lack-every', type=int, default=0, help='the first joint lacks in samples so far apart'
    )
    return parser.parse_args()


class Arm:
    """The publishers, and what the options make of each sample."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.robot = load_robot(options.robot)
        self.kinematics = Kinematics(self.robot)
        self.names = list(self.robot.all_joint_names)
        reliability = ReliabilityPolicy.BEST_EFFORT if options.best_effort else ReliabilityPolicy.RELIABLE
        # What a reader on a busy machine has not confirmed for a second is sent all the same.
        qos = QoSProfile(depth=1000, reliability=reliability)
        self.node = rclpy.create_node('arm_publisher')
        self.states = self.node.create_publisher(JointState, 'joint_states', qos)
        self.poses = self.node.create_publisher(PoseStamped, self.robot.topics['current_pose'], qos)

    def publish(self, k: int, moved: int, moves: bool) -> None:
        """Sample k, after `moved` samples of movement."""
        options = self.options
        positions = joint_positions(self.robot, moved / options.rate_hz)
        stamp_ns = START_NS + round(k * 1e9 / options.rate_hz)
        if options.pose_every and k % options.pose_every == 0:
            pose = self.kinematics.forward(positions[:7])
            pose[2, 3] += options.pose_offset_m
            self.poses.publish(pose_stamped(pose, self.robot.base_frame, stamp_ns))
        if moves and options.nan_every and moved % options.nan_every == 0:
            positions[3] = np.nan
        lacking = moves and options.lack_every and moved % options.lack_every == 0
        order = slice(None, None, -1) if options.reverse else slice(1 if lacking else 0, None)
        message = JointState(name=self.names[order], position=positions[order].tolist())
        message.header.stamp = time_message(stamp_ns)
        self.states.publish(message)


def main() -> None:
    options = read_options()
    rclpy.init()
    arm = Arm(options)
    go, end = threading.Event(), threading.Event()

    def listen() -> None:
        sys.stdin.readline()
        go.set()
        sys.stdin.read()
        end.set()

    threading.Thread(target=listen, daemon=True).start()
    segments = [round(float(s) * options.rate_hz) for s in options.segments.split(',')]
    plan = [i % 2 == 0 for i, count in enumerate(segments) for _ in range(count)]
    step = moved = k = 0
    started = time.perf_counter()
    while not end.is_set():
        going = go.is_set()
        moves = going and step < len(plan) and plan[step]
        moved += moves
        arm.publish(k, moved, moves)
        step += going
        if going and step in (1, len(plan)):
            print('first' if step == 1 else 'done', k, flush=True)
        k += 1
        if k % 50 == 0:
            print('sent', k - 1, flush=True)
        time.sleep(max(0.0, started + k / options.rate_hz - time.perf_counter()))
    rclpy.shutdown()


if __name__ == '__main__':
    main()
