"""The messages that a recorded run was made of, through the code that the policy node runs live."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.data.bags.reader import Bag, BagMessage
from decoupled_policy_ros.data.bags.stamp_watch import header_stamp_ns
from decoupled_policy_ros.errors import MessageError
from decoupled_policy_ros.observation.contract import ObservationContract
from decoupled_policy_ros.observation.messages import joint_positions_from_message
from decoupled_policy_ros.observation.sampler import Observation, Sampler
from decoupled_policy_ros.observation.sources import JOINT_STATE_TYPE, stream_sources
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.runtime.cycles import Cycle

Array = NDArray[np.float64]

_UNBOUNDED = 2**62  # what has been used is dropped


class Inputs:
    """Samples of one task by their stamps: those that the run took, and no others, whatever else has been recorded.

    Args:
        bag: the recording; its topics are checked.
        robot: the arm.
        contract: gives the streams.
        cameras: full name of the topic of each camera.
        joints_topic: full name of the topic of joint states, of the policy and of the guard.
        parts: all cycles that will be asked for, from each start of the run to the next.

    Raises:
        DatasetError: a topic is missing, of another type or empty.
        ConfigError: the robot has no topic for a stream.
    """

    def __init__(
        self,
        bag: Bag,
        robot: RobotDescription,
        contract: ObservationContract,
        cameras: Mapping[str, str],
        joints_topic: str,
        parts: Sequence[Sequence[Cycle]],
    ):
        self._robot, self._joints_topic = robot, joints_topic
        self._sources = stream_sources(robot, contract, joint_capacity=_UNBOUNDED, image_capacity=_UNBOUNDED)
        self._streams = {
            name: joints_topic if source.message_type == JOINT_STATE_TYPE else cameras[name]
            for name, source in self._sources.items()
        }
        self._sampler = Sampler(contract, {name: source.buffer for name, source in self._sources.items()})
        self._needed: dict[str, set[int]] = {name: set() for name in self._sources}
        self._joints_needed: set[int] = set()
        for cycle in (cycle for part in parts for cycle in part):
            for name, stamps_ns in cycle.samples_ns.items():
                self._needed.setdefault(name, set()).update(stamps_ns)
            self._joints_needed.update(stamp for stamp in cycle.joints_ns if stamp is not None)
        self._there: dict[str, set[int]] = {name: set() for name in self._needed}
        self._joints: dict[int, Array] = {}
        self._newest_ns: dict[str, int] = {}
        self._went_back = self._jumps(parts)
        self._behind: dict[str, list[BagMessage]] = defaultdict(list)
        self._bad: dict[tuple[str, int], str] = {}
        for name, source in self._sources.items():
            bag.require(self._streams[name], source.message_type)
        if self._joints_needed:
            bag.require(joints_topic, JOINT_STATE_TYPE)

    @property
    def topics(self) -> set[str]:
        """The topics that are read."""
        joints = {self._joints_topic} if self._joints_needed else set()
        return {self._streams[name] for name in self._sources} | joints

    def _jumps(self, parts: Sequence[Sequence[Cycle]]) -> dict[int, set[str]]:
        """Topics whose clock went back at a start, by the number of its part: its first samples are older."""
        jumps: dict[int, set[str]] = defaultdict(set)
        newest_ns: dict[tuple[str, str], int] = {}
        for number, part in enumerate(parts):
            for cycle in part:
                for stream, topic, stamp_ns in self._newest_samples(cycle):
                    if stamp_ns < newest_ns.get((stream, topic), 0):
                        jumps[number].add(topic)
                    newest_ns[stream, topic] = stamp_ns
        return jumps

    def _newest_samples(self, cycle: Cycle) -> Iterator[tuple[str, str, int]]:
        """Name, topic and newest stamp of each stream of a cycle, and of what its guard looked at."""
        for name, stamps_ns in cycle.samples_ns.items():
            if name in self._streams:
                yield name, self._streams[name], stamps_ns[-1]
        joints_ns = [stamp_ns for stamp_ns in cycle.joints_ns if stamp_ns is not None]
        if joints_ns:
            yield 'the guard', self._joints_topic, joints_ns[-1]

    def start(self, part: int) -> None:
        """A part begins; where the clock went back, what was kept before is forgotten."""
        for topic in self._went_back.get(part, ()):
            self._forget(topic)
            for message in self._behind.pop(topic, []):  # the first of them may have come before
                self.take(message)

    def take(self, message: BagMessage) -> None:
        """Keep a message if it will be asked for.

        One that is not newer than the last that was kept is late or repeated, which the run refused, or the clock has
        gone back; then the part that asks for it has yet to start.
        """
        topic, stamp_ns = message.topic, header_stamp_ns(message.data)
        if not self._asked_for(topic, stamp_ns):
            return
        if stamp_ns <= self._newest_ns.get(topic, 0):
            self._behind[topic].append(message)
            return
        try:
            self._keep(message, stamp_ns)
        except MessageError as error:
            self._bad[topic, stamp_ns] = str(error)
        else:
            self._newest_ns[topic] = stamp_ns
            self._behind.pop(topic, None)

    def _asked_for(self, topic: str, stamp_ns: int) -> bool:
        if topic == self._joints_topic and stamp_ns in self._joints_needed:
            return True
        return any(self._streams[n] == topic and stamp_ns in self._needed[n] for n in self._sources)

    def _keep(self, message: BagMessage, stamp_ns: int) -> None:
        for name, source in self._sources.items():
            wanted = self._streams[name] == message.topic and stamp_ns in self._needed[name]
            if wanted and source.take(message.decode()):
                self._there[name].add(stamp_ns)
        if message.topic == self._joints_topic and stamp_ns in self._joints_needed:
            positions_rad = joint_positions_from_message(message.decode(), self._robot.joint_names)
            self._joints.setdefault(stamp_ns, positions_rad)

    def missing(self, cycle: Cycle) -> str:
        """The first message of a cycle that is not there (yet), in words; empty if all are."""
        for name, stamps_ns in cycle.samples_ns.items():
            for stamp_ns in stamps_ns:
                if stamp_ns not in self._there[name]:
                    return self._absence(f'stream {name!r}', self._streams.get(name, name), stamp_ns)
        for stamp in cycle.joints_ns:
            if stamp is not None and stamp not in self._joints:
                return self._absence('the guard', self._joints_topic, stamp)
        return ''

    def _absence(self, whose: str, topic: str, stamp_ns: int) -> str:
        bad = self._bad.get((topic, stamp_ns))
        state = f'can not be used: {bad}' if bad else 'is not in the recording'
        return f'the message of {topic} stamped {stamp_ns} ns, for {whose}, {state}'

    def observation(self, cycle: Cycle) -> Observation:
        """The observation of a cycle none of whose messages is missing.

        Raises:
            ObservationError: its messages make no observation, or another one.
        """
        return self._sampler.sample(cycle.stamp_ns)

    def joints(self, stamp_ns: int) -> Array:
        """Joint positions (n,) of a stamp, rad."""
        return self._joints[stamp_ns]

    def done(self, cycle: Cycle) -> None:
        """Drop what no later cycle asks for."""
        for name, stamps_ns in cycle.samples_ns.items():
            if name not in self._sources:
                continue  # a stream that the task lacks: nothing is kept of it
            self._sources[name].buffer.drop_before(stamps_ns[0])
            self._there[name] = {stamp for stamp in self._there[name] if stamp >= stamps_ns[0]}
        joints_ns = [stamp for stamp in cycle.joints_ns if stamp is not None]
        if joints_ns:
            self._joints = {stamp: q for stamp, q in self._joints.items() if stamp >= min(joints_ns)}

    def _forget(self, topic: str) -> None:
        self._newest_ns.pop(topic, None)
        for name, source in self._sources.items():
            if self._streams[name] == topic:
                source.buffer.clear()
                self._there[name].clear()
        if topic == self._joints_topic:
            self._joints.clear()
