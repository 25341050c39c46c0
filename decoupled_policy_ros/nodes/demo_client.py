"""The demo's own small node: it asks for episodes and watches what comes of them, over DDS like everybody else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image
from std_msgs.msg import Bool
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import MultiDOFJointTrajectory

from decoupled_policy_ros.errors import DecoupledPolicyError
from decoupled_policy_ros.nodes.common import LATCHED, STATE, time_ns
from decoupled_policy_ros.nodes.signals import interrupt_later
from decoupled_policy_ros.observation.messages import image_to_array
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.runtime.states import HOLDING

T = TypeVar('T')

SIMULATOR, POLICY = 'sim_robot_node', 'policy_node'


class DemoError(DecoupledPolicyError):
    """The demo can't go on: a process ended, a service failed, or nothing happened for too long."""


class DemoClient(Node):
    """Services to ask, topics to watch.

    Args:
        robot: gives the camera topics.
        context: of a ROS domain that nobody else uses.
        check: raises when a process of the demo has ended.
    """

    def __init__(self, robot: RobotDescription, context: rclpy.Context, check: Callable[[], None]):
        super().__init__('demo', context=context)
        self._executor = SingleThreadedExecutor(context=context)
        self._executor.add_node(self)
        self._check = check
        self.now_ns = 0
        # When the episode's first chunk was followed, or refused and held against; 0 before.
        self.start_ns = 0
        self.succeeded = False
        self._success_sent = 0
        self._clocks: deque[tuple[int, int]] = deque(
            maxlen=200
        )  # when each was sent (wall), and what it says
        self.cycles = 0
        self.holds = 0
        self.held_because, self._holding = '', False
        self._policy_says = ''
        self.images: dict[str, Any] = {}
        self.on_overview: Callable[[], None] = lambda: None
        self._diagnostics: dict[str, str] = {}
        self._diagnostics_seen = 0
        self.create_subscription(Clock, '/clock', self._on_clock, STATE)
        self.create_subscription(Bool, f'{SIMULATOR}/success', self._on_success, LATCHED)
        self.create_subscription(MultiDOFJointTrajectory, f'{POLICY}/trajectory', self._on_chunk, STATE)
        self.create_subscription(DiagnosticStatus, f'{POLICY}/status', self._on_status, LATCHED)
        self.create_subscription(DiagnosticArray, '/diagnostics', self._on_diagnostics, STATE)
        for name, camera in robot.cameras.items():
            self.create_subscription(Image, camera.topic, lambda m, name=name: self._on_image(name, m), STATE)
        self.create_subscription(Image, 'overview/image', self._on_overview, STATE)
        self._reset = self.create_client(Trigger, f'{SIMULATOR}/reset')
        self._enable = self.create_client(SetBool, f'{POLICY}/enable')
        self._transition = self.create_client(ChangeState, f'{POLICY}/change_state')

    # --- what it asks ---------------------------------------------------------------------------

    def wait_until(self, condition: Callable[[], T], what: str, timeout_s: float) -> T:
        """Spin until a condition gives something true, and return that.

        Raises:
            DemoError: it took longer than `timeout_s` (wall), or a process ended meanwhile.
        """
        deadline = time.monotonic() + timeout_s
        while not (result := condition()):
            self._check()
            if time.monotonic() > deadline:
                raise DemoError(
                    f'waited {timeout_s:g} s in vain for {what}; {POLICY} says {self._policy_says!r}'
                )
            with interrupt_later():
                self._executor.spin_once(timeout_sec=0.1)
        return result

    def wait_for_simulator(self, timeout_s: float) -> None:
        """Wait until the simulator can be asked and its clock has been heard."""
        self.wait_until(self._reset.service_is_ready, f'service {self._reset.srv_name}', timeout_s)
        self.wait_until(lambda: self.now_ns, 'the simulated clock', timeout_s)

    def activate_policy(self, timeout_s: float) -> None:
        """Wait for the policy node, configure and activate it.

        Raises:
            DemoError: it refused.
        """
        for client in (self._enable, self._transition):
            self.wait_until(client.service_is_ready, f'service {client.srv_name}', timeout_s)
        for transition, name in (
            (Transition.TRANSITION_CONFIGURE, 'configure'),
            (Transition.TRANSITION_ACTIVATE, 'activate'),
        ):
            request = ChangeState.Request(transition=Transition(id=transition))
            if not self._call(self._transition, request, timeout_s).success:
                raise DemoError(f'{POLICY} refused to {name}')

    def begin_episode(self, timeout_s: float) -> str:
        """Put the scene back, then let the policy act; returns what the simulator says of the episode."""
        self._call(self._enable, SetBool.Request(data=False), timeout_s)
        # The simulator waits with its first step for the policy: no frame of the episode is missed.
        said = self._call(self._reset, Trigger.Request(), timeout_s).message
        self.succeeded, self.cycles, self.holds, self.start_ns = False, 0, 0, 0
        self.held_because = ''
        self._call(self._enable, SetBool.Request(data=True), timeout_s)
        return str(said)

    def end_episode(self, timeout_s: float) -> None:
        """Let the policy command nothing any more."""
        self._call(self._enable, SetBool.Request(data=False), timeout_s)

    def diagnostics(self, timeout_s: float) -> dict[str, str]:
        """The policy's next diagnostics."""
        seen = self._diagnostics_seen
        self.wait_until(lambda: self._diagnostics_seen > seen, 'diagnostics of the policy', timeout_s)
        return self._diagnostics

    def _call(self, client: Any, request: Any, timeout_s: float) -> Any:
        future = client.call_async(request)
        return self.wait_until(
            lambda: future.done() and future.result(), f'an answer of {client.srv_name}', timeout_s
        )

    # --- what it sees ---------------------------------------------------------------------------

    @property
    def success_ns(self) -> int:
        """Simulated time of the success: the simulator sends it just before that step's clock.

        Messages wait here while a frame is being filmed, so the order in which they are taken says nothing.
        """
        return min(
            (now_ns for sent, now_ns in self._clocks if sent > self._success_sent), default=self.now_ns
        )

    def _on_clock(self, message: Clock, info: dict[str, Any]) -> None:
        self.now_ns = time_ns(message.clock)
        self._clocks.append((info['source_timestamp'], self.now_ns))

    def _on_success(self, message: Bool, info: dict[str, Any]) -> None:
        self.succeeded, self._success_sent = bool(message.data), info['source_timestamp']

    def _on_chunk(self, message: MultiDOFJointTrajectory) -> None:
        self.start_ns = self.start_ns or time_ns(message.header.stamp)
        self.cycles += 1

    def _on_status(self, message: DiagnosticStatus) -> None:
        self._policy_says = message.message
        holding = message.message.startswith(HOLDING)
        self.holds += holding and not self._holding  # a hold that lasts is reported again each second
        self._holding = holding
        if holding:
            self.held_because = message.message.removeprefix(f'{HOLDING}: ')
            self.start_ns = self.start_ns or self.now_ns

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name == f'{POLICY}: policy':
                self._diagnostics = {pair.key: pair.value for pair in status.values}
                self._diagnostics_seen += 1

    def _on_image(self, name: str, message: Image) -> None:
        self.images[name] = image_to_array(message)

    def _on_overview(self, message: Image) -> None:
        self.images['overview'] = image_to_array(message)
        self.on_overview()
