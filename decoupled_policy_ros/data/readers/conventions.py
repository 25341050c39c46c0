"""What a dataset's numbers mean, declared as data, and the conversions to our own meaning.

Rotation forms, by name:

    quat_xyzw, quat_wxyz              unit quaternions; ROS and SciPy have w last, MuJoCo and others first
    euler_<order>_extrinsic           angles about fixed axes, such as euler_xyz_extrinsic (SciPy's 'xyz')
    euler_<order>_intrinsic           angles about the turning axes, such as euler_xyz_intrinsic (SciPy's 'XYZ')
    axis_angle                        rotation vector, rad
    rot6d_columns, rot6d_rows         first two columns (Zhou et al.) or rows of the rotation matrix
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.robot import poses

Array = NDArray[np.float64]

PoseFrame = Literal['base', 'world']
ActionKind = Literal['pose', 'osc_pose', 'osc_delta', 'joints', 'next_pose', 'none']

#: Tolerance beyond the declared range of a gripper, as a share of it.
GRIPPER_SLACK = 0.1

_SIZES = {'quat_xyzw': 4, 'quat_wxyz': 4, 'axis_angle': 3, 'rot6d_columns': 6, 'rot6d_rows': 6}


@dataclass(frozen=True)
class Conventions:
    """How a dataset writes down what the arm did.

    Attributes:
        source: the format, in words.
        pose_frame: frame of its poses: the robot's base, or a world whose place is calibrated.
        rotation: form of the rotations of its poses, see the module's docstring; empty where it has none.
        tool: which point its poses are of, in words; its place on our end effector is calibrated.
        gripper: measured gripper, in words, with the values when open and closed.
        gripper_command: commanded gripper, likewise.
        action: 'pose' absolute poses of the same point as the measured ones, 'osc_pose' / 'osc_delta' absolute or
            relative goals of robosuite's OSC_POSE, 'joints' commanded joint positions, 'next_pose' no commands: the
            pose of the next frame stands for them, 'none' nothing that can be commanded.
        rate_hz: frames per second.
        images: 'upright' or 'upside down' as stored; what is read is upright.
        alignment: which observation an action of the same row belongs to.
    """

    source: str
    pose_frame: PoseFrame
    rotation: str
    tool: str
    gripper: str
    gripper_command: str
    action: ActionKind
    rate_hz: float
    images: str = 'upright'
    alignment: str = 'the action of a row follows its observation'

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)


def rotation_size(form: str) -> int:
    """How many numbers a rotation of that form has.

    Raises:
        DatasetError: no such form; the message names those that exist.
    """
    if form in _SIZES:
        return _SIZES[form]
    _euler_sequence(form)
    return 3


def rotation_matrices(values: ArrayLike, form: str) -> Array:
    """Rotation matrices (T, 3, 3) from rows (T, n) of a form.

    Raises:
        DatasetError: unknown form, rows of another size, not finite, or a degenerate rotation.
    """
    rows, size = np.asarray(values, float), rotation_size(form)
    if rows.ndim != 2 or rows.shape[1] != size:
        raise DatasetError(
            f'rotations of form {form} have {size} numbers, got rows of shape {rows.shape[1:]}'
        )
    if not len(rows):
        return np.zeros((0, 3, 3))
    if not np.all(np.isfinite(rows)):
        raise DatasetError(f'rotations of form {form} must be finite; row {_first(rows)} is not')
    if form.startswith('rot6d'):
        try:
            matrices = poses.rotation_from_rot6d(rows)
        except ValueError as error:
            raise DatasetError(f'rotations of form {form} are degenerate') from error
        return matrices if form == 'rot6d_columns' else np.swapaxes(matrices, -1, -2)
    if form.startswith('quat'):
        norm = np.linalg.norm(rows, axis=-1)
        if np.any(np.abs(norm - 1) > 1e-2):
            worst = int(np.abs(norm - 1).argmax())
            raise DatasetError(f'{form}: row {worst} has length {norm[worst]:.3g}; a unit quaternion has 1')
        return Rotation.from_quat(rows if form == 'quat_xyzw' else np.roll(rows, -1, -1)).as_matrix()
    if form == 'axis_angle':
        return Rotation.from_rotvec(rows).as_matrix()
    return Rotation.from_euler(_euler_sequence(form), rows).as_matrix()


def gripper_from(values: ArrayLike, open_value: float, closed_value: float, where: str) -> Array:
    """Gripper values (T,) in [-1 open, +1 closed] from a scale of which both ends are known.

    Raises:
        DatasetError: values lie outside the declared ends, as a width does where half a width was declared.
    """
    raw = np.asarray(values, float)
    span = closed_value - open_value
    if span == 0 or not np.isfinite(span):
        raise DatasetError(
            f'{where}: open and closed must be two numbers that differ, got {open_value} and {closed_value}'
        )
    share = (raw - open_value) / span
    if not np.all(np.isfinite(share)) or np.any((share < -GRIPPER_SLACK) | (share > 1 + GRIPPER_SLACK)):
        raise DatasetError(
            f'{where}: values from {np.min(raw):.4g} to {np.max(raw):.4g}, but the gripper was declared as '
            f'{open_value:g} open and {closed_value:g} closed; is it another unit, or a width where half a width was '
            'declared?'
        )
    return np.clip(2.0 * share - 1.0, -1.0, 1.0)


def _first(rows: Array) -> int:
    return int(np.argmin(np.isfinite(rows).all(-1)))


def _euler_sequence(form: str) -> str:
    """SciPy's name of an Euler form: lower case turns about fixed axes, upper case about the turning ones."""
    kind, _, rest = form.partition('_')
    order, _, sense = rest.partition('_')
    if kind == 'euler' and sorted(order) == ['x', 'y', 'z'] and sense in ('extrinsic', 'intrinsic'):
        return order if sense == 'extrinsic' else order.upper()
    raise DatasetError(
        f'unknown rotation form {form!r}; valid: {", ".join(_SIZES)}, euler_xyz_extrinsic, euler_xyz_intrinsic '
        '(or another order of xyz)'
    )
