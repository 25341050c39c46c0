"""The log of what the policy decides, on `~/cycles`: with it a recorded run can be computed again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import String

from decoupled_policy_ros.nodes.common import RCLError, resolve_topic
from decoupled_policy_ros.nodes.policy_outputs import PolicyOutputs
from decoupled_policy_ros.nodes.policy_settings import PolicySettings
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.runtime.guard.settings import read_guard_file

if TYPE_CHECKING:
    from decoupled_policy_ros.runtime.engine import Engine

# None may be lost: what comes after one that is missing can't be computed again.
LOG = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
    history=HistoryPolicy.KEEP_LAST,
    depth=100,
)


class CycleOutput:
    """Publishes the log, std_msgs/String with JSON, see `runtime.cycles`.

    It is there from the node's beginning, so that a recorder has found it before there is something to record.

    Args:
        node: publishes, while it is active.
    """

    def __init__(self, node: LifecycleNode):
        self._node = node
        self._publisher = node.create_lifecycle_publisher(String, '~/cycles', LOG)
        self._run: dict[str, Any] = {}
        self._outputs: PolicyOutputs | None = None

    def publish(self, text: str) -> None:
        """Publish a message of the log."""
        try:
            self._publisher.publish(String(data=text))
        except RCLError:  # after Ctrl-C nobody hears it
            if self._node.context.ok():
                raise

    def describe(
        self, engine: Engine, robot: RobotDescription, settings: PolicySettings, outputs: PolicyOutputs
    ) -> None:
        """Take down what a run depends on, once for all its beginnings.

        Raises:
            ConfigError: the guard's file can't be read, or a topic's name is none.
        """
        from decoupled_policy_ros.runtime.run_record import run_record

        cameras = {name: camera.topic for name, camera in robot.cameras.items()}
        topics = {'trajectory': '~/trajectory', **robot.topics}
        if settings.shadow:
            topics |= {name: f'~/shadow/{name}' for name in ('target_pose', 'gripper_command')}
        if robot.description_topic:
            topics['robot_description'] = robot.description_topic
        guard_file = read_guard_file(settings.guard_file) if settings.guard_file else ''
        self._outputs = outputs
        self._run = {
            **run_record(engine, robot, settings.robot, asdict(settings), guard_file),
            'cameras': {name: resolve_topic(self._node, topic) for name, topic in cameras.items()},
            'topics': {name: resolve_topic(self._node, topic) for name, topic in topics.items()},
        }

    def run(self) -> Mapping[str, Any]:
        """What a run that begins now depends on: of q and -q a target pose has the one nearer to that before it."""
        outputs = self._outputs
        said = outputs and (outputs.commands or (outputs.shadow and outputs.shadow.commands))
        return {**self._run, 'quat_xyzw': said.quat_xyzw if said else None}
