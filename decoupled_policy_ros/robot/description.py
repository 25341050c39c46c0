"""What the arm is: one YAML file in config/robots/ and the URDF or MJCF that it points at.

Joints are known by name, never by index. Every array is read-only, so a description can be shared
between threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from decoupled_policy_ros.errors import ConfigError, RobotDescriptionError
from decoupled_policy_ros.resources import find, resolve_uri
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.gripper import GripperAction, read_gripper_action
from decoupled_policy_ros.robot.limits import Limits, read_limits
from decoupled_policy_ros.robot.model import ModelSource
from decoupled_policy_ros.robot.settings import Section
from decoupled_policy_ros.robot.shapes import CollisionDescription, read_collision

Array = NDArray[np.float64]

#: A gripper that opens wider was measured in another unit.
LARGEST_WIDTH_M = 1.0
_KEYS = (
    'name', 'urdf', 'mjcf', 'description_topic', 'frames', 'arm', 'gripper', 'limits', 'collision', 'cameras', 'topics',
)  # fmt: skip
_TOPICS = ('joint_states', 'current_pose', 'target_pose', 'gripper_command')
_OPTIONAL_TOPICS = ('joint_trajectory',)


@dataclass(frozen=True)
class GripperDescription:
    """A two-finger gripper whose opening width follows from a signed sum of its joint positions.

    `joint_signs` holds +1 or -1 per joint: Franka's two fingers both count up as they open (+1, +1),
    robosuite's right finger counts down (+1, -1). For sliding fingers the sum is the width. For fingers that
    turn, `open_position` and `closed_position` are the sums (rad) at which the gripper is open and closed,
    and the width is linear in between.
    """

    joint_names: tuple[str, ...]
    joint_signs: tuple[float, ...]
    open_width_m: float
    closed_width_m: float
    open_position: float | None = None
    closed_position: float | None = None

    def width(self, joint_positions: ArrayLike) -> Array:
        """Opening width (...) in metres of joint positions (..., number of gripper joints)."""
        total = np.asarray(joint_positions, float) @ np.array(self.joint_signs)
        if self.open_position is None or self.closed_position is None:
            return total
        opening = (total - self.closed_position) / (self.open_position - self.closed_position)
        return self.closed_width_m + opening * (self.open_width_m - self.closed_width_m)

    def joint_positions(self, width_m: ArrayLike) -> Array:
        """Joint positions (..., number of gripper joints) at opening widths (...), each joint with its share."""
        total = np.asarray(width_m, float)
        if self.open_position is not None and self.closed_position is not None:
            opening = (total - self.closed_width_m) / (self.open_width_m - self.closed_width_m)
            total = self.closed_position + opening * (self.open_position - self.closed_position)
        return total[..., None] * np.array(self.joint_signs) / len(self.joint_signs)

    def normalised(self, joint_positions: ArrayLike) -> Array:
        """Gripper value (...) in [-1 open, +1 closed] of joint positions; clipped to that range."""
        return self.normalised_from_width(self.width(joint_positions))

    def normalised_from_width(self, width_m: ArrayLike) -> Array:
        """Gripper value (...) in [-1 open, +1 closed] of opening widths (...) in metres; clipped."""
        opening = (np.asarray(width_m, float) - self.closed_width_m) / (
            self.open_width_m - self.closed_width_m
        )
        return np.clip(1.0 - 2.0 * opening, -1.0, 1.0)

    def width_from_normalised(self, value: ArrayLike) -> Array:
        """Opening width (...) in metres for gripper values (...) in [-1 open, +1 closed]."""
        opening = (1.0 - np.clip(np.asarray(value, float), -1.0, 1.0)) / 2.0
        return self.closed_width_m + opening * (self.open_width_m - self.closed_width_m)


@dataclass(frozen=True)
class CameraDescription:
    """One camera: its image topic, its optical frame, and whether the topic carries CompressedImage.

    `size` is (height, width) in pixels where the file gives it: images of another size are refused then.
    """

    topic: str
    frame: str
    compressed: bool = False
    size: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class RobotDescription:
    """An arm with its gripper, frames, limits, cameras and topics.

    `base_frame` and `ee_frame` are the names that poses carry on topics and in files; `base_link` and
    `ee_link` are the links of the model that they hang on, with `tool` (4, 4) from ee_link to ee_frame.
    `base_aliases` are other names that drivers have for the base frame: poses that are heard may carry them, none
    that is said does.
    """

    name: str
    base_frame: str
    ee_frame: str
    base_link: str
    ee_link: str
    tool: Array
    joint_names: tuple[str, ...]
    home_rad: Array
    gripper: GripperDescription
    limits: Limits
    cameras: dict[str, CameraDescription]
    topics: dict[str, str]
    source: ModelSource
    description_topic: str | None = None
    collision: CollisionDescription = field(default_factory=CollisionDescription)
    gripper_action: GripperAction | None = None
    base_aliases: tuple[str, ...] = ()

    @property
    def base_frames(self) -> tuple[str, ...]:
        """Every frame id that a pose in the base frame may carry."""
        return (self.base_frame, *self.base_aliases)

    @property
    def all_joint_names(self) -> tuple[str, ...]:
        """Arm joints, then gripper joints: the order of every joint vector in this package."""
        return self.joint_names + self.gripper.joint_names


def robot_names() -> list[str]:
    """Names of the robots in config/robots/, sorted."""
    return sorted(path.stem for path in find('config/robots').glob('*.yaml'))


def robot_file(name_or_path: str | Path) -> Path:
    """The YAML file of a robot given by name or by path.

    Raises:
        RobotDescriptionError: there is no such file; the message lists the names that exist.
    """
    text = str(name_or_path)
    is_path = text.endswith(('.yaml', '.yml'))
    path = Path(text).expanduser() if is_path else find('config/robots') / f'{text}.yaml'
    if path.is_file():
        return path.resolve()
    raise RobotDescriptionError(
        f'no robot {text!r}: give a path to a .yaml file or one of {", ".join(robot_names())}'
    )


def description_topic(name_or_path: str | Path) -> str | None:
    """Topic on which the URDF of this robot is latched, or None; to be read before `load_robot`."""
    section = _read(robot_file(name_or_path))
    return section.text('description_topic') if 'description_topic' in section else None


def load_robot(name_or_path: str | Path, description_xml: str | None = None) -> RobotDescription:
    """Read and check a robot.

    Args:
        name_or_path: a name in config/robots/ or the path of a YAML file.
        description_xml: URDF text, as from the `robot_description` topic; replaces the file's urdf / mjcf.

    Raises:
        RobotDescriptionError: an unknown or missing key, a value of the wrong size, or a joint or frame
            that the model lacks; the message names it and the valid ones.
    """
    path = robot_file(name_or_path)
    section = _read(path)
    frames = section.section('frames', ('base', 'base_aliases', 'base_link', 'ee', 'ee_link', 'tool'))
    arm = section.section('arm', ('joint_names', 'home_rad'))
    joint_names = arm.names('joint_names')
    gripper = section.section('gripper', _GRIPPER_KEYS)
    topics = section.section('topics', (*_TOPICS, *_OPTIONAL_TOPICS))
    robot = RobotDescription(
        name=section.text('name'),
        base_frame=frames.text('base'),
        ee_frame=frames.text('ee'),
        base_link=frames.text('base_link', frames.text('base')),
        ee_link=frames.text('ee_link', frames.text('ee')),
        tool=_tool(frames),
        joint_names=joint_names,
        home_rad=arm.numbers('home_rad', len(joint_names)),
        gripper=_gripper(gripper, joint_names),
        limits=read_limits(section.section('limits', Limits.__dataclass_fields__), len(joint_names)),
        cameras=_cameras(section),
        topics={
            key: topics.text(key) for key in (*_TOPICS, *_OPTIONAL_TOPICS) if key in _TOPICS or key in topics
        },
        source=_source(section, path, description_xml),
        description_topic=section.text('description_topic') if 'description_topic' in section else None,
        collision=read_collision(section.section('collision', CollisionDescription.__dataclass_fields__))
        if 'collision' in section
        else CollisionDescription(),
        gripper_action=read_gripper_action(gripper.section('action', GripperAction.__dataclass_fields__))
        if 'action' in gripper
        else None,
        base_aliases=frames.names('base_aliases') if 'base_aliases' in frames else (),
    )
    _check_home(robot, section.where)
    robot.source.chain(
        robot.base_link, robot.ee_link, robot.joint_names
    )  # refuses joints and frames it lacks
    _check_aliases(robot, frames.where)
    return robot


def _read(path: Path) -> Section:
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an impossible date
        raise RobotDescriptionError(f'{path}: not a YAML file: {error}') from error
    return Section(values, path.name, _KEYS)


def _source(section: Section, path: Path, description_xml: str | None) -> ModelSource:
    if description_xml is not None:
        return ModelSource('urdf', xml=description_xml)
    kinds = [kind for kind in ('urdf', 'mjcf') if kind in section]
    if not kinds and 'description_topic' in section:
        topic = section.text('description_topic')
        raise RobotDescriptionError(
            f'{section.where}: this robot has no file, its URDF comes from the topic {topic!r}'
        )
    if len(kinds) != 1:
        raise RobotDescriptionError(
            f'{section.where}: give exactly one of urdf and mjcf, or a description_topic; got {kinds or "none"}'
        )
    try:
        return ModelSource(kinds[0], path=resolve_uri(section.text(kinds[0]), path.parent))
    except ConfigError as error:
        raise RobotDescriptionError(f'{section.where}: {error}') from error


def _tool(frames: Section) -> Array:
    tool = np.eye(4)
    if 'tool' in frames:
        transform = frames.section('tool', ('position_m', 'quat_xyzw'))
        try:
            quat_xyzw = transform.numbers('quat_xyzw', 4)
            tool = poses.pose_from_position_quat(transform.numbers('position_m', 3), quat_xyzw)
        except ValueError as error:
            raise RobotDescriptionError(f'{transform.where}: quat_xyzw: {error}') from error
    tool.setflags(write=False)
    return tool


_GRIPPER_KEYS = (
    'joint_names', 'joint_signs', 'open_width_m', 'closed_width_m', 'open_position', 'closed_position',
    'action',
)  # fmt: skip


def _gripper(section: Section, arm_joint_names: tuple[str, ...]) -> GripperDescription:
    names = section.names('joint_names')
    both = sorted(set(names) & set(arm_joint_names))
    if both:
        raise RobotDescriptionError(f'{section.where}: {", ".join(both)} is a joint of the arm already')
    signs = section.numbers('joint_signs', len(names))
    if not set(signs) <= {-1.0, 1.0}:
        raise RobotDescriptionError(
            f'{section.where}: joint_signs must be 1 or -1 each, got {signs.tolist()}'
        )
    width_open, width_closed = section.number('open_width_m'), section.number('closed_width_m')
    if width_open <= width_closed:
        raise RobotDescriptionError(
            f'{section.where}: open_width_m must exceed closed_width_m, got {width_open} and {width_closed}'
        )
    if width_open > LARGEST_WIDTH_M:
        raise RobotDescriptionError(
            f'{section.where}: open_width_m is in metres and at most {LARGEST_WIDTH_M:g}, got {width_open:g}'
        )
    turning = [key for key in ('open_position', 'closed_position') if key in section]
    if len(turning) == 1:
        raise RobotDescriptionError(
            f'{section.where}: open_position and closed_position come together, only {turning[0]} is there'
        )
    open_position, closed_position = [section.number(key) for key in turning] or (None, None)
    if turning and open_position == closed_position:
        raise RobotDescriptionError(
            f'{section.where}: open_position and closed_position must differ, got {open_position} twice'
        )
    return GripperDescription(
        names, tuple(signs.tolist()), width_open, width_closed, open_position, closed_position
    )


def _cameras(section: Section) -> dict[str, CameraDescription]:
    names = section.get('cameras')
    if not isinstance(names, dict):
        raise RobotDescriptionError(f'{section.where}: cameras must be a mapping from names, got {names!r}')
    cameras = {}
    for name, values in names.items():
        camera = Section(values, f'{section.where}: cameras: {name}', CameraDescription.__dataclass_fields__)
        cameras[str(name)] = CameraDescription(
            camera.text('topic'), camera.text('frame'), camera.flag('compressed', False), _image_size(camera)
        )
    return cameras


def _image_size(camera: Section) -> tuple[int, int] | None:
    if 'size' not in camera:
        return None
    size = camera.numbers('size', 2)
    if np.any(size < 1) or np.any(size != np.round(size)):
        raise RobotDescriptionError(
            f'{camera.where}: size must be [height, width] in whole pixels, got {camera.get("size")!r}'
        )
    return int(size[0]), int(size[1])


def _check_home(robot: RobotDescription, where: str) -> None:
    low, high = robot.limits.lower_rad, robot.limits.upper_rad
    outside = (robot.home_rad < low) | (robot.home_rad > high)
    if np.any(outside):
        i = int(np.argmax(outside))
        raise RobotDescriptionError(
            f'{where}: home_rad of {robot.joint_names[i]} is {robot.home_rad[i]}, outside [{low[i]}, {high[i]}]'
        )


def _check_aliases(robot: RobotDescription, where: str) -> None:
    """Refuse an alias that the model knows as another place: poses in it would be read wrongly."""
    for alias in robot.base_aliases:
        if not robot.source.may_coincide(alias, robot.base_link):
            raise RobotDescriptionError(
                f'{where}: base_aliases: {alias!r} lies elsewhere than {robot.base_link!r} in the model: leave it out'
            )
