"""What is to be converted and how, decided before anything is read: recordings, robot, contract, labels, actions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from xml.etree import ElementTree

import numpy as np

from decoupled_policy_ros.data.bags.reader import BagSummary, bag_summary
from decoupled_policy_ros.data.conversion.intake import absolute
from decoupled_policy_ros.data.conversion.recordings import episodes_of, expand
from decoupled_policy_ros.data.datasets.spec import ACTION_KINDS, IMAGE_FORMATS, DatasetSpec
from decoupled_policy_ros.errors import ConfigError, DatasetError, DecoupledPolicyError, FingerprintMismatch
from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.observation.sources import stream_sources
from decoupled_policy_ros.robot.description import (
    RobotDescription,
    description_topic,
    load_robot,
    robot_file,
)
from decoupled_policy_ros.robot.fingerprint import Fingerprint

ON_GAP = ('cut', 'refuse')
T = TypeVar('T')

# What a recording without episode.json is converted by, unless options say otherwise: as the episode recorder does.
DEFAULT_RATE_HZ, DEFAULT_SIZE, DEFAULT_MAX_AGE_S, DEFAULT_MAX_SKEW_S = 20.0, (84, 84), 0.2, 0.1


@dataclass(frozen=True)
class ConvertSettings:
    """What the user may choose; None means as the recordings say, or the default.

    Attributes:
        robot: name or file of the robot.
        contract: of a policy, instead of the recordings' own.
        rate_hz: frames per second.
        size: (height, width) of every camera.
        cameras: those to take.
        max_age_s: oldest sample of a frame.
        max_skew_s: largest distance between the samples of a frame.
        action: 'commanded' or 'achieved'; commanded where the recordings have the topic.
        max_command_age_s: longest time that a commanded pose is in force.
        images: 'png', 'h264' or 'av1'.
        instruction: in words, instead of what the recordings say.
        success: of the recordings that do not say.
        only_successful: leave out what is not labelled a success.
        on_gap: 'cut' or 'refuse'.
        min_frames: shorter pieces are left out.
        trim_idle: leave out the arm's standing still at both ends of a piece.
        namespace: of the robot's topics in the recordings.
    """

    robot: str
    contract: ObservationContract | None = None
    rate_hz: float | None = None
    size: tuple[int, int] | None = None
    cameras: tuple[str, ...] | None = None
    max_age_s: float | None = None
    max_skew_s: float | None = None
    action: str | None = None
    max_command_age_s: float = 0.5
    images: str = 'png'
    instruction: str | None = None
    success: bool | None = None
    only_successful: bool = False
    on_gap: str = 'cut'
    min_frames: int = 16
    trim_idle: bool = False
    namespace: str = ''

    def __post_init__(self) -> None:
        for name, valid in (
            ('on_gap', ON_GAP),
            ('images', IMAGE_FORMATS),
            ('action', (*ACTION_KINDS, None)),
        ):
            if getattr(self, name) not in valid:
                raise ConfigError(
                    f'{name} must be one of {", ".join(map(str, valid))}, got {getattr(self, name)!r}'
                )
        if self.min_frames < 1 or not self.max_command_age_s > 0:
            raise ConfigError(
                f'min_frames must be at least 1 and max_command_age_s positive, got {self.min_frames} and '
                f'{self.max_command_age_s}'
            )
        for name in ('rate_hz', 'max_age_s', 'max_skew_s', 'size'):
            value = getattr(self, name)
            if value is not None and not all(0 < v < math.inf for v in np.atleast_1d(value)):
                raise ConfigError(f'{name} must be positive, got {value}')


@dataclass(frozen=True)
class PlannedBag:
    """One recording with its labels; `problem` says why it can't be converted, where that is known already.

    `key` names its part: another path, size or time of change makes another key.
    """

    path: Path
    key: str
    instruction: str
    success: bool | None
    robot_xml: str | None
    summary: BagSummary
    problem: str | None = None


@dataclass(frozen=True)
class Plan:
    """Recordings and what they are converted by."""

    bags: list[PlannedBag]
    left_out: list[str]
    contract: ObservationContract
    spec: DatasetSpec
    settings: ConvertSettings

    def identity(self) -> dict[str, Any]:
        """Whatever decides what a part contains, JSON-able: a run can only be resumed by the same."""
        settings = self.settings
        return {
            'robot': hashlib.sha256(robot_file(settings.robot).read_bytes()).hexdigest(),
            'contract': self.contract.to_dict(),
            'dataset': self.spec.to_dict(),
            'on_gap': settings.on_gap,
            'min_frames': settings.min_frames,
            'max_command_age_s': settings.max_command_age_s,
            'trim_idle': settings.trim_idle,
            'namespace': settings.namespace,
        }


def make_plan(paths: Sequence[str | Path], settings: ConvertSettings, skip_bad: bool = False) -> Plan:
    """Find the recordings and settle what the settings leave open.

    With `skip_bad`, recordings without commanded poses do not keep the others from being converted by theirs, and
    those whose episode.json is damaged are left out with that as their problem.

    Raises:
        DatasetError: no recording there, recordings contradict each other, or one has no instruction.
        ConfigError: a setting is out of range, or the robot lacks a stream.
        FingerprintMismatch: a recording is of another arm; the message has both values.
        RobotDescriptionError: the robot can't be loaded.
    """
    found, left_out = expand([Path(path) for path in paths])
    episodes, damaged = episodes_of(found)
    if damaged and (not skip_bad or not episodes):
        raise DatasetError(next(iter(damaged.values())))
    robot, robot_xml = _robot(settings.robot, episodes)
    contract = _contract(robot, settings, episodes)
    stream_sources(robot, contract)  # refuses a contract that this robot can't serve
    for path, episode in episodes.items():
        _require_same_arm(robot, path, episode)
    bags = [_planned(path, episode, settings, robot_xml) for path, episode in episodes.items()]
    if settings.only_successful:
        left_out += [f'{bag.path}: not labelled a success' for bag in bags if bag.success is not True]
        bags = [bag for bag in bags if bag.success is True]
        if not bags:
            raise DatasetError(f'none of {len(episodes)} recordings is labelled a success')
    bags += [_unusable(path, problem) for path, problem in damaged.items()]
    action, gripper_source = _actions(robot, settings, bags, skip_bad)
    sizes = contract.picture_sizes
    spec = DatasetSpec.of(robot, contract.rate_hz, sizes, None, settings.images, action, gripper_source)
    return Plan(bags, left_out, contract, spec, settings)


def _robot(name: str, episodes: dict[Path, dict[str, Any]]) -> tuple[RobotDescription, str | None]:
    """The robot and its URDF, of the first recording that brings one."""
    for path, episode in episodes.items():
        _require_urdf(name, path, _robot_xml(name, episode), (episode.get('robot') or {}).get('name'))
    brought = (_robot_xml(name, episode) for episode in episodes.values())
    xml = next((xml for xml in brought if xml is not None), None)
    return load_robot(name, xml), xml


def _require_urdf(name: str, path: Path, xml: str | None, recorded: str | None) -> None:
    """Refuse the MJCF of a simulated arm where the robot takes its URDF from the recording."""
    try:
        kind = 'robot' if xml is None else ElementTree.fromstring(xml).tag
    except (ElementTree.ParseError, ValueError):
        kind = 'no XML'
    if kind != 'robot':
        raise FingerprintMismatch(
            f'{path} and robot {name} do not belong together: it was recorded with robot {recorded}, whose '
            f'description is no URDF ({kind}); give --robot {recorded}'
        )


def _robot_xml(name: str, episode: dict[str, Any]) -> str | None:
    """The URDF that a recording brings along, where the robot's own comes from a topic."""
    description = (episode.get('robot') or {}).get('description')
    return description if description and description_topic(name) is not None else None


def _require_same_arm(robot: RobotDescription, path: Path, episode: dict[str, Any]) -> None:
    if 'fingerprint' in episode:
        recorded = Fingerprint.from_dict(episode['fingerprint'])
        recorded.require_equal(Fingerprint.of(robot, recorded.rate_hz), str(path), f'robot {robot.name}')


def _planned(
    path: Path, episode: dict[str, Any], settings: ConvertSettings, robot_xml: str | None
) -> PlannedBag:
    instruction = settings.instruction or episode.get('instruction') or ''
    success = episode.get('success')
    problem, summary = None, BagSummary(0.0, {})
    try:
        summary = bag_summary(path)
        if not instruction:
            problem = f'{path} does not say what was done: give --instruction'
    except DecoupledPolicyError as error:
        problem = str(error)
    return PlannedBag(
        path,
        _key(path),
        instruction,
        settings.success if success is None else success,
        _robot_xml(settings.robot, episode) or robot_xml,  # one arm for all, whoever wrote it down
        summary,
        problem,
    )


def _unusable(path: Path, problem: str) -> PlannedBag:
    return PlannedBag(path, _key(path), '', None, None, BagSummary(0.0, {}), problem)


def _key(path: Path) -> str:
    files = [file for file in path.rglob('*') if file.is_file()] if path.is_dir() else [path]
    states = [file.stat() for file in files]
    identity = [str(path.resolve()), sum(s.st_size for s in states), max(s.st_mtime_ns for s in states)]
    return f'{path.stem}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:12]}'


def _contract(
    robot: RobotDescription, settings: ConvertSettings, episodes: dict[Path, dict[str, Any]]
) -> ObservationContract:
    """The policy's contract, or the recordings' own, or the default; then what the options change."""
    if settings.contract is not None:
        contract = settings.contract
    else:
        own = {
            path: ObservationContract.from_dict(e['contract'])
            for path, e in episodes.items()
            if 'contract' in e
        }
        paths = list(own)
        for path in paths[1:]:
            if own[path] != own[paths[0]]:
                raise DatasetError(
                    f'{path} was recorded for another contract than {paths[0]}: {own[path]} and {own[paths[0]]}; '
                    f'choose one with --policy'
                )
        contract = own[paths[0]] if paths else _default_contract(robot)
    streams = [_changed(stream, settings) for stream in contract.streams]
    if settings.cameras is not None:
        streams = [s for s in streams if s.kind != 'image' or s.name in settings.cameras]
        age_s, size = _given(settings.max_age_s, DEFAULT_MAX_AGE_S), _given(settings.size, DEFAULT_SIZE)
        known = [s.name for s in streams]
        streams += [StreamSpec(n, 'image', (*size, 3), age_s) for n in settings.cameras if n not in known]
    if not any(stream.kind == 'proprioception' for stream in streams):  # every dataset has joint positions
        streams.append(_proprioception(robot, max(stream.max_age_s for stream in streams)))
    return ObservationContract(
        _given(settings.rate_hz, contract.rate_hz),
        1,
        tuple(streams),
        _given(settings.max_skew_s, contract.max_skew_s),
    )


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _default_contract(robot: RobotDescription) -> ObservationContract:
    cameras = [StreamSpec(name, 'image', (*DEFAULT_SIZE, 3), DEFAULT_MAX_AGE_S) for name in robot.cameras]
    streams = (*cameras, _proprioception(robot, DEFAULT_MAX_AGE_S))
    return ObservationContract(DEFAULT_RATE_HZ, 1, streams, DEFAULT_MAX_SKEW_S)


def _proprioception(robot: RobotDescription, max_age_s: float) -> StreamSpec:
    return StreamSpec('proprioception', 'proprioception', (7 + len(robot.gripper.joint_names),), max_age_s)


def _changed(stream: StreamSpec, settings: ConvertSettings) -> StreamSpec:
    if settings.size is not None and stream.kind == 'image':
        stream = replace(stream, shape=(*settings.size, 3))
    return stream if settings.max_age_s is None else replace(stream, max_age_s=settings.max_age_s)


def _actions(
    robot: RobotDescription, settings: ConvertSettings, bags: list[PlannedBag], skip_bad: bool
) -> tuple[str, str]:
    """Kind of action and source of the gripper's: commanded in a recording that can be used."""
    readable = [bag for bag in bags if bag.problem is None]

    def having(topic: str) -> list[PlannedBag]:
        name = absolute(robot.topics[topic], settings.namespace)
        return [bag for bag in readable if bag.summary.counts.get(name)]

    commanded = having('target_pose')
    if settings.action is None and not skip_bad and 0 < len(commanded) < len(readable):
        lacking = next(bag for bag in readable if bag not in commanded)
        raise DatasetError(
            f'{commanded[0].path} has commanded poses and {lacking.path} has none: --action commanded '
            f'--skip-bad leaves those without out, --action achieved takes all of them'
        )
    action = settings.action or ('commanded' if commanded else 'achieved')
    return action, 'commanded' if having('gripper_command') else 'measured'
