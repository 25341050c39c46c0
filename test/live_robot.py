"""A Panda in real time for tests, benches and soaks: it goes where it is told, and breaks on request.

    body = Body(node)                              # in a test, on a node that is spun
    body.faults.silent = {'wrist'}

    python test/live_robot.py --streams agentview wrist                     # as a process
    {"silent": ["wrist"]}                                                   # on stdin: these faults and no others

The arm is where the last command was, found by inverse kinematics; pictures are noise. With a clock the process
publishes /clock, which runs like the wall's, plus the fault `clock_s`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import rclpy
from geometry_msgs.msg import PoseStamped
from numpy.typing import NDArray
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.parameter import Parameter
from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import Image, JointState

from decoupled_policy_ros.errors import MessageError
from decoupled_policy_ros.nodes.common import COMMAND, STATE, floats, image_message, time_message
from decoupled_policy_ros.observation.messages import pose_from_message
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.inverse import InverseKinematics
from decoupled_policy_ros.robot.kinematics import Kinematics

ROBOT = load_robot('panda_sim')
JOINTS = 'joint_states'
CAMERAS = tuple(ROBOT.cameras)
STREAMS = (JOINTS, *CAMERAS)
NS_PER_S = 1_000_000_000
FINGERS_RAD = 0.04 * np.array(ROBOT.gripper.joint_signs)


@dataclass
class Faults:
    """What is wrong at the moment; streams are called joint_states, agentview, wrist.

    Attributes:
        silent: streams that say nothing.
        late_s: by stream, how much older than true its stamps are.
        every: by stream, one message out of so many is sent.
        out_of_order: streams that send each second message after the one that follows it.
        unstamped: streams whose stamps are zero.
        encoding: of the pictures, as their messages claim; their bytes are rgb8.
        size: (height, width) of the pictures.
        shuffled: joints in another order in each message.
        lacking: names of joints that are left out.
        values: by joint, what is said in place of its position.
        clock_s: how far /clock is ahead of where it should be.
        clock_stands: /clock is published no more.
    """

    silent: set[str] = field(default_factory=set)
    late_s: dict[str, float] = field(default_factory=dict)
    every: dict[str, int] = field(default_factory=dict)
    out_of_order: set[str] = field(default_factory=set)
    unstamped: set[str] = field(default_factory=set)
    encoding: str = 'rgb8'
    size: tuple[int, int] = (84, 84)
    shuffled: bool = False
    lacking: tuple[str, ...] = ()
    values: dict[str, float] = field(default_factory=dict)
    clock_s: float = 0.0
    clock_stands: bool = False


class Body:
    """Publishers, subscription and timers of the robot on a node that somebody spins.

    Args:
        node: theirs.
        streams: those that it publishes; the arm listens to target_pose if joint states are among them.
        image_hz, joint_hz: rates.
        clock_hz: of /clock; 0 for none.
    """

    def __init__(
        self,
        node: Node,
        streams: tuple[str, ...] = STREAMS,
        image_hz: float = 20.0,
        joint_hz: float = 50.0,
        clock_hz: float = 0.0,
    ):
        self.faults, self.node, self._clock_ns = Faults(), node, 0
        self._inverse, self.joints_rad = InverseKinematics(ROBOT), ROBOT.home_rad.copy()
        self.kinematics = Kinematics(ROBOT)
        self._told: PoseStamped | None = None
        self._sent: dict[str, int] = dict.fromkeys(streams, 0)
        self._kept: dict[str, Any] = {}
        random = np.random.default_rng(0)
        self._pixels = [random.integers(0, 256, (84, 84, 3), dtype=np.uint8) for _ in range(16)]
        self._random = random
        self.publishers: dict[str, Any] = {}
        for stream in streams:
            self.open(stream)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._timers = []
        self._clock = None
        if clock_hz:
            self._clock = node.create_publisher(ClockMessage, '/clock', STATE)
            self._timers.append(node.create_timer(1.0 / clock_hz, self._tick, clock=steady))
        if JOINTS in streams:
            node.create_subscription(PoseStamped, ROBOT.topics['target_pose'], self._on_target, COMMAND)
            self._timers.append(node.create_timer(1.0 / joint_hz, self._show_joints, clock=steady))
        if set(streams) & set(CAMERAS):
            self._timers.append(node.create_timer(1.0 / image_hz, self._show_pictures, clock=steady))

    def open(self, stream: str) -> None:
        """Advertise a stream."""
        kind, topic = (
            (JointState, ROBOT.topics[JOINTS]) if stream == JOINTS else (Image, ROBOT.cameras[stream].topic)
        )
        self.publishers[stream] = self.node.create_publisher(kind, topic, STATE)

    def close(self, stream: str) -> None:
        """Take a stream's publisher away, as when its driver ends."""
        self.node.destroy_publisher(self.publishers.pop(stream))

    def stop(self) -> None:
        """Do nothing any more."""
        for timer in self._timers:
            timer.cancel()

    def now_ns(self) -> int:
        """Time of this robot's clock, which is its own where it publishes one."""
        if self._clock is not None:
            return self._clock_ns
        return int(self.node.get_clock().now().nanoseconds)

    def _tick(self) -> None:
        if self.faults.clock_stands:
            return
        self._clock_ns = time.monotonic_ns() + round(self.faults.clock_s * NS_PER_S)
        self._clock.publish(ClockMessage(clock=time_message(self._clock_ns)))

    def _on_target(self, message: PoseStamped) -> None:
        self._told = message

    def _show_joints(self) -> None:
        told, self._told = self._told, None
        if told is not None:
            with suppress(MessageError):
                pose = pose_from_message(told, ROBOT.base_frame)
                self.joints_rad = self._inverse.solve(pose, self.joints_rad).joints_rad
        faults = self.faults
        names, positions = list(ROBOT.all_joint_names), np.append(self.joints_rad, FINGERS_RAD)
        for name, value in faults.values.items():
            positions[names.index(name)] = value
        order: NDArray[np.intp] = np.arange(len(names))
        if faults.shuffled:
            order = self._random.permutation(order)
        order = np.array([i for i in order if names[i] not in faults.lacking], int)
        self._send(JOINTS, JointState(name=[names[i] for i in order], position=floats(positions[order])))

    def _show_pictures(self) -> None:
        height, width = self.faults.size
        for camera in CAMERAS:
            if camera in self._sent:
                pixels = self._pixels[self._sent[camera] % len(self._pixels)]
                if (height, width) != pixels.shape[:2]:
                    pixels = np.zeros((height, width, 3), np.uint8)
                message = image_message(pixels, ROBOT.cameras[camera].frame, 0)
                message.encoding = self.faults.encoding
                self._send(camera, message)

    def _send(self, stream: str, message: Any) -> None:
        faults, publisher, now_ns = self.faults, self.publishers.get(stream), self.now_ns()
        self._sent[stream] += 1
        spared = self._sent[stream] % faults.every.get(stream, 1) != 0
        if publisher is None or stream in faults.silent or spared or now_ns == 0:
            return
        if stream not in faults.unstamped:
            message.header.stamp = time_message(now_ns - round(faults.late_s.get(stream, 0.0) * NS_PER_S))
        if stream in faults.out_of_order and stream not in self._kept:
            self._kept[stream] = message
            return
        publisher.publish(message)
        if stream in self._kept:
            publisher.publish(self._kept.pop(stream))


def read_faults(text: str) -> Faults:
    """Faults from a JSON object of those that there are."""
    kinds = {f.name: f.default_factory for f in fields(Faults) if callable(f.default_factory)}
    values = {
        name: kinds[name](value) if name in kinds else value for name, value in json.loads(text).items()
    }
    if 'values' in values:
        values['values'] = {joint: math.nan if v is None else v for joint, v in values['values'].items()}
    return Faults(**values)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--streams', nargs='+', default=STREAMS, choices=STREAMS)
    parser.add_argument('--image-hz', type=float, default=20.0)
    parser.add_argument('--joint-hz', type=float, default=50.0)
    parser.add_argument('--clock-hz', type=float, default=0.0)
    parser.add_argument('--use-sim-time', action='store_true')
    options = parser.parse_args()
    rclpy.init(args=[])
    sim_time = Parameter('use_sim_time', value=options.use_sim_time)
    node = Node(f'live_{options.streams[0]}', parameter_overrides=[sim_time])
    body = Body(node, tuple(options.streams), options.image_hz, options.joint_hz, options.clock_hz)

    def listen() -> None:
        for line in sys.stdin:
            body.faults = read_faults(line)
        rclpy.try_shutdown()

    threading.Thread(target=listen, daemon=True).start()
    with suppress(ExternalShutdownException, KeyboardInterrupt):
        rclpy.spin(node)


if __name__ == '__main__':
    main()
