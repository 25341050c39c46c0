"""sim_robot_node: a simulated arm behind the topics of a real one.

Publishes joint states, the end-effector pose, cameras and /clock, takes streamed poses, whole trajectories of the end
effector or of the joints, and gripper widths. Remap trajectory:=policy_node/trajectory to follow a policy's whole
chunks. Everything happens in one thread: callbacks are taken between two steps, so a step never sees half a command,
and OpenGL stays where its context is.

~/objects holds what no real arm knows, for scripted operators and for judging what came of a task: the true poses of
the task's objects in the base frame, stamped as the joint states (Lift: the cube; Stack: cube_a, then cube_b).

With `lockstep` a slow machine makes a slow simulation, never a wrong one: while somebody commands, the step from
t to t + 50 ms is taken only once a command stamped t or later is there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from geometry_msgs.msg import PoseArray, PoseStamped
from numpy.typing import NDArray
from rclpy.executors import Executor
from rclpy.node import Node
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, Float64
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory, MultiDOFJointTrajectory

from decoupled_policy_ros.nodes.common import (
    COMMAND,
    LATCHED,
    STATE,
    declare_settings,
    floats,
    image_message,
    parameter,
    pose_message,
    pose_stamped,
    spin_main,
    time_message,
)
from decoupled_policy_ros.nodes.sim_commands import Commands
from decoupled_policy_ros.nodes.sim_motions import MOTIONS, check_motion, make_motion
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.sim.environment import SimRobot
from decoupled_policy_ros.sim.tasks import TASKS

#: While waiting for a command /clock is published again this often: its subscribers are best effort.
CLOCK_PERIOD_S = 0.1


@dataclass(frozen=True)
class SimSettings:
    """Parameters of the node."""

    robot: str = parameter('panda_sim', 'name in config/robots or path of a YAML file')
    task: str = parameter('lift', 'simulated task', choices=tuple(sorted(TASKS)))
    seed: int = parameter(0, 'seed of the first episode; each reset adds one', integer=(0, 2**31))
    real_time_factor: float = parameter(
        1.0, 'simulated seconds per second; 0: as fast as possible', floating=(0.0, 100.0)
    )
    motion: str = parameter('', 'what the arm does by itself; empty: it follows commands', choices=MOTIONS)
    motion_episode_s: float = parameter(
        60.0, 'simulated seconds after which a motion starts anew (s)', floating=(1.0, 3600.0)
    )
    publish_images: bool = parameter(True, 'render and publish the cameras')
    image_height: int = parameter(84, 'camera height (pixels)', integer=(16, 2160))
    image_width: int = parameter(84, 'camera width (pixels)', integer=(16, 3840))
    overview_every: int = parameter(
        0, 'publish overview/image, a view for people, every so many steps; 0: never', integer=(0, 1000)
    )
    overview_height: int = parameter(360, 'overview height (pixels)', integer=(16, 2160))
    overview_width: int = parameter(480, 'overview width (pixels)', integer=(16, 3840))
    lockstep: bool = parameter(
        True, 'while somebody commands, wait at each step for the command stamped for it'
    )
    lockstep_timeout_s: float = parameter(
        2.0, 'longest wait for a command before running on (s, wall)', floating=(0.0, 600.0)
    )
    hold_steps: int = parameter(
        1,
        'steps after a reset before a first command is waited for: a policy needs n_obs_steps - 1 of them',
        integer=(0, 100),
    )


class SimRobotNode(Node):
    """A simulated arm; `run` drives it together with its executor."""

    def __init__(self) -> None:
        super().__init__('sim_robot_node')
        settings = self.settings = declare_settings(self, SimSettings)
        check_motion(settings.motion, settings.task)
        self.robot = load_robot(settings.robot)
        cameras = dict.fromkeys(self.robot.cameras, (settings.image_height, settings.image_width))
        overview_size = (settings.overview_height, settings.overview_width)
        self.sim = SimRobot(settings.task, self.robot, cameras, settings.seed, overview_size=overview_size)
        self.period_s = 1.0 / self.sim.rate_hz
        self.commands = Commands(self.robot, self.get_logger(), lambda: self.sim.stamp_ns)
        self.episode = 0
        self.lockstep_timeouts = 0
        self._make_topics()
        self._start_episode()

    def _make_topics(self) -> None:
        topics = self.robot.topics
        self._joint_states = self.create_publisher(JointState, topics['joint_states'], STATE)
        self._current_pose = self.create_publisher(PoseStamped, topics['current_pose'], STATE)
        self._objects = self.create_publisher(PoseArray, '~/objects', STATE)
        self._images = {
            name: self.create_publisher(Image, camera.topic, STATE)
            for name, camera in self.robot.cameras.items()
        }
        self._overview = self.create_publisher(Image, 'overview/image', STATE)
        self._clock = self.create_publisher(Clock, '/clock', STATE)
        self._success = self.create_publisher(Bool, '~/success', LATCHED)
        self.create_subscription(PoseStamped, topics['target_pose'], self.commands.on_pose, COMMAND)
        self.create_subscription(MultiDOFJointTrajectory, 'trajectory', self.commands.on_trajectory, COMMAND)
        if 'joint_trajectory' in topics:
            self.create_subscription(
                JointTrajectory, topics['joint_trajectory'], self.commands.on_joint_trajectory, COMMAND
            )
        self.create_subscription(Float64, topics['gripper_command'], self.commands.on_gripper, COMMAND)
        self.create_service(Trigger, '~/reset', self._on_reset)

    # --- episodes -------------------------------------------------------------------------------

    def _on_reset(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.episode += 1
        self.sim.reset(self.settings.seed + self.episode)
        self._start_episode()
        response.success = True
        response.message = f'seed {self.settings.seed + self.episode}'
        return response

    def _start_episode(self) -> None:
        """Forget commands and success, publish the first state."""
        self.commands.reset(self.sim.pose_base_ee, self.sim.stamp_ns)
        self.motion_now = make_motion(self.settings.motion, self.sim, self.settings.seed + self.episode)
        self.succeeded = False
        self._success.publish(Bool(data=False))
        self._holds_left = self.settings.hold_steps
        # After a reset a commander is given the time of one timeout to send its first command.
        self._engaged = self.settings.lockstep and not self.settings.motion
        self._episode_stamp_ns = self.sim.stamp_ns
        self._waiting_since: float | None = None
        self._next_step = time.monotonic()
        self._steps = 0
        self.publish_state()

    # --- the loop -------------------------------------------------------------------------------

    def run(self, executor: Executor) -> None:
        """Take callbacks and steps in turn until shutdown."""
        while self.context.ok():
            wait_s = self._wait_s()
            executor.spin_once(timeout_sec=wait_s)
            if wait_s == 0.0 and self.context.ok():
                self._take_pending(executor)
                if self._wait_s() == 0.0:
                    self.step()

    def _take_pending(self, executor: Executor) -> None:
        """Take what else has arrived: a gripper command is sent before the pose that it belongs to."""
        for _ in range(4):
            executor.spin_once(timeout_sec=0.0)

    def _wait_s(self) -> float:
        """Seconds (wall) until the next step may be taken; 0 when it is due."""
        now = time.monotonic()
        if now < self._next_step:
            return self._next_step - now
        if self._must_wait_for_command(now):
            return 0.005 if now - self._clock_published < CLOCK_PERIOD_S else self._publish_clock()
        return 0.0

    def _must_wait_for_command(self, now: float) -> bool:
        if not self.settings.lockstep or self._holds_left or self.commands.covers(self.sim.stamp_ns):
            return False
        if self.commands.take_engaged():
            self._engaged = True
        if not self._engaged:
            return False
        if self._waiting_since is None:
            self._waiting_since = now
        if now - self._waiting_since < self.settings.lockstep_timeout_s:
            return True
        self._disengage()
        return False

    def _disengage(self) -> None:
        self._engaged = False
        self._waiting_since = None
        if self.commands.received:
            self.lockstep_timeouts += 1
            self.get_logger().warning(
                f'no command for {self.sim.stamp_ns / 1e9:.2f} s within {self.settings.lockstep_timeout_s} s: '
                f'running on, holding the last one ({self.lockstep_timeouts} times so far)'
            )

    def step(self) -> None:
        """Advance by one control period and publish what came of it."""
        target, gripper = self._command()
        self.sim.step(target, gripper)
        self._steps += 1
        self._holds_left = max(0, self._holds_left - 1)
        self._waiting_since = None
        now = time.monotonic()
        pace_s = self.period_s / self.settings.real_time_factor if self.settings.real_time_factor else 0.0
        # Never catch up by more than a step: after a wait the simulation goes on at its pace.
        self._next_step = max(self._next_step + pace_s, now)
        if self.sim.success and not self.succeeded:
            self.succeeded = True
            self._success.publish(Bool(data=True))
        self.publish_state()
        if self.settings.motion and self._motion_is_over():
            self.episode += 1
            self.sim.reset(self.settings.seed + self.episode)
            self._start_episode()

    def _command(self) -> tuple[NDArray[np.float64], float]:
        if self.motion_now is not None:
            return self.motion_now.act()
        return self.commands.at(self.sim.stamp_ns)

    def _motion_is_over(self) -> bool:
        assert self.motion_now is not None
        elapsed_s = (self.sim.stamp_ns - self._episode_stamp_ns) / 1e9
        return self.motion_now.done or elapsed_s >= self.settings.motion_episode_s

    # --- what it says ---------------------------------------------------------------------------

    def publish_state(self) -> None:
        """Publish joint states, pose and pictures, then the clock, all with the same stamp."""
        stamp_ns = self.sim.stamp_ns
        joints = JointState(name=list(self.robot.all_joint_names))
        joints.header.stamp = time_message(stamp_ns)
        joints.header.frame_id = self.robot.base_frame
        joints.position = floats(self.sim.joint_positions)
        joints.velocity = floats(self.sim.joint_velocities)
        self._joint_states.publish(joints)
        self._current_pose.publish(pose_stamped(self.sim.pose_base_ee, self.robot.base_frame, stamp_ns))
        objects = PoseArray(poses=[pose_message(pose) for pose in self.sim.object_poses().values()])
        objects.header.stamp = time_message(stamp_ns)
        objects.header.frame_id = self.robot.base_frame
        self._objects.publish(objects)
        if self.settings.publish_images:
            for name, camera in self.robot.cameras.items():
                self._images[name].publish(image_message(self.sim.image(name), camera.frame, stamp_ns))
        if self.settings.overview_every and self._steps % self.settings.overview_every == 0:
            self._overview.publish(image_message(self.sim.image('overview'), 'overview', stamp_ns))
        self._publish_clock()

    def _publish_clock(self) -> float:
        self._clock.publish(Clock(clock=time_message(self.sim.stamp_ns)))
        self._clock_published = time.monotonic()
        return 0.005

    def destroy_node(self) -> None:
        """Free the renderers, then the node."""
        self.sim.close()
        super().destroy_node()


def main() -> int:
    """Console entry point."""
    return spin_main(SimRobotNode)


if __name__ == '__main__':
    raise SystemExit(main())
