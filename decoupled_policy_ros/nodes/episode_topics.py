"""What the episode recorder records: the topics of a robot and more, each once somebody publishes it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rclpy.node import Node
from rclpy.qos import QoSProfile

from decoupled_policy_ros.data.bags.format import OfferedQos
from decoupled_policy_ros.data.bags.message_definitions import MessageDefinition, message_definition
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.nodes.episode_clock import EpisodeClock
from decoupled_policy_ros.nodes.episode_intake import Budget, Poller, RawIntake
from decoupled_policy_ros.nodes.recorder_intake import DEPTH
from decoupled_policy_ros.robot.description import RobotDescription

#: Messages of these types are large: DDS holds 10 s of a 30 Hz camera for us, not 5000 pictures.
LARGE_TYPES = {'sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage', 'sensor_msgs/msg/PointCloud2'}
LARGE_DEPTH = 300
_TYPES = {
    'joint_states': 'sensor_msgs/msg/JointState',
    'current_pose': 'geometry_msgs/msg/PoseStamped',
    'target_pose': 'geometry_msgs/msg/PoseStamped',
    'gripper_command': 'std_msgs/msg/Float64',
    'joint_trajectory': 'trajectory_msgs/msg/JointTrajectory',
}
#: What a policy says of itself, where one is running: with it a run can be computed again, see docs/replay.md.
_POLICY = {
    'policy_node/cycles': 'std_msgs/msg/String',
    'policy_node/trajectory': 'trajectory_msgs/msg/MultiDOFJointTrajectory',
    'policy_node/shadow/target_pose': 'geometry_msgs/msg/PoseStamped',
    'policy_node/shadow/gripper_command': 'std_msgs/msg/Float64',
}


@dataclass(frozen=True)
class TopicPlan:
    """A topic to record: its full name, the type that the robot's file implies ('' any), whether it must speak."""

    name: str
    type_name: str
    required: bool


def plan_topics(
    robot: RobotDescription, extra: Iterable[str], resolve: Callable[[str], str]
) -> list[TopicPlan]:
    """Topics of a robot's file and `extra` ones, each once; `resolve` gives the full name."""
    plans = [
        TopicPlan(resolve(robot.topics[key]), type_name, key == 'joint_states')
        for key, type_name in _TYPES.items()
        if key in robot.topics
    ]
    plans += [TopicPlan(resolve(name), type_name, False) for name, type_name in _POLICY.items()]
    for camera in robot.cameras.values():
        type_name = 'sensor_msgs/msg/CompressedImage' if camera.compressed else 'sensor_msgs/msg/Image'
        plans.append(TopicPlan(resolve(camera.topic), type_name, True))
    if robot.description_topic:
        plans.append(TopicPlan(resolve(robot.description_topic), 'std_msgs/msg/String', False))
    plans += [TopicPlan(resolve(name), '', False) for name in extra if name]
    return list({plan.name: plan for plan in reversed(plans)}.values())[::-1]


class RecordedTopic:
    """One topic: waits for a publisher, then for the end of the node.

    `problem` says why it is not recorded, or what is wrong with it; '' nothing.
    """

    def __init__(self, node: Node, plan: TopicPlan, budget: Budget, poller: Poller, clock: EpisodeClock):
        self.plan = plan
        self.problem = ''
        self.intake: RawIntake | None = None
        self.definition: MessageDefinition | None = None
        self._node, self._budget, self._poller, self._clock = node, budget, poller, clock
        self._refused: set[str] = set()

    @property
    def name(self) -> str:
        """Full name of the topic."""
        return self.plan.name

    @property
    def type_name(self) -> str:
        """The type that is recorded; before there is a publisher, the one that is expected."""
        return self.definition.type_name if self.definition else self.plan.type_name

    @property
    def has_expected_type(self) -> bool:
        """Whether the publishers have the type that the robot's file implies."""
        return not self.plan.type_name or self.type_name == self.plan.type_name

    def offered(self) -> list[OfferedQos]:
        """QoS of the publishers."""
        return [_offered_qos(p.qos_profile) for p in self.intake.publishers] if self.intake else []

    def type_hash(self) -> str:
        """ROS's hash of the type, as the first publisher has it."""
        publishers = self.intake.publishers if self.intake else ()
        return str(publishers[0].topic_type_hash) if publishers else ''

    def look(self) -> bool:
        """Subscribe once somebody publishes, and adapt to who publishes; returns whether it is new."""
        publishers = self._node.get_publishers_info_by_topic(self.name)
        types = sorted({publisher.topic_type for publisher in publishers} - self._refused)
        if self.intake is not None:
            self.intake.adapt()
            if not types or self.type_name in types or self.intake.hold:
                self._judge_types(types)
                return False
            self._poller.intakes.remove(self.intake)
            self.intake.close()  # who published has gone, and who publishes now says something else
            self.intake = None
        return bool(types) and self._subscribe(types)

    def _subscribe(self, types: list[str]) -> bool:
        type_name = self.plan.type_name if self.plan.type_name in types else types[0]
        try:
            self.definition, kind = message_definition(type_name), _message_class(type_name)
        except DatasetError as error:
            self._refused.add(type_name)
            self._complain(f'{self.name} is not recorded: {error}')
            return False
        self._judge_types(types)
        depth = LARGE_DEPTH if type_name in LARGE_TYPES else DEPTH
        self.intake = RawIntake(self._node, kind, self.name, depth, self._budget, self._clock)
        self.intake.adapt()
        self._poller.intakes.append(self.intake)
        return True

    def _judge_types(self, types: list[str]) -> None:
        others = [name for name in types if name != self.type_name]
        if not self.has_expected_type:
            self._complain(
                f'{self.name} has type {self.type_name}, the robot file means {self.plan.type_name}'
            )
        elif others:
            self._complain(
                f'{self.name} has publishers of {", ".join(others)} too: only {self.type_name} is recorded'
            )
        else:
            self.problem = ''

    def _complain(self, problem: str) -> None:
        if problem != self.problem:
            self._node.get_logger().warning(problem)
        self.problem = problem


def _message_class(type_name: str) -> type:
    """The Python class of a message type.

    Raises:
        DatasetError: its package is not installed.
    """
    package, _, name = type_name.split('/')
    try:
        return getattr(importlib.import_module(f'{package}.msg'), name)
    except (ImportError, AttributeError) as error:
        raise DatasetError(f'the package of {type_name} is not installed: {error}') from error


def _offered_qos(qos: QoSProfile) -> OfferedQos:
    return OfferedQos(
        reliability=qos.reliability.name.lower(),
        durability=qos.durability.name.lower(),
        history=qos.history.name.lower(),
        depth=qos.depth,
        deadline_ns=qos.deadline.nanoseconds,
        lifespan_ns=qos.lifespan.nanoseconds,
        liveliness=qos.liveliness.name.lower(),
        liveliness_lease_ns=qos.liveliness_lease_duration.nanoseconds,
    )
