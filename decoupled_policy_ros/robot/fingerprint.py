"""The kinematic fingerprint: what has to be the same for two files, or a file and an arm, to be about one arm.

The hash is over the chain itself, not over the description's text: screw axes of the joints and the pose at
zero, both in the base frame, rounded to a micrometre / microradian. So a URDF from a topic, from a file, with
other meshes, inertias or formatting has the same hash, while any change to where the arm goes changes it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from decoupled_policy_ros.errors import FingerprintMismatch
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.kinematics import Kinematics

_DECIMALS = 6


@dataclass(frozen=True)
class Fingerprint:
    """Identity of an arm's kinematics and of the way that actions on it are written."""

    description_sha256: str
    base_frame: str
    ee_frame: str
    joint_names: tuple[str, ...]
    rotation_convention: str
    rate_hz: float

    @classmethod
    def of(cls, robot: RobotDescription, rate_hz: float) -> Fingerprint:
        """Fingerprint of a robot whose actions are `rate_hz` apart."""
        return cls(
            description_sha256=description_sha256(Kinematics(robot)),
            base_frame=robot.base_frame,
            ee_frame=robot.ee_frame,
            joint_names=robot.joint_names,
            rotation_convention=poses.ROTATION_CONVENTION,
            rate_hz=float(rate_hz),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values; inverse of `from_dict`."""
        return {**asdict(self), 'joint_names': list(self.joint_names)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Fingerprint:
        """From `to_dict`'s values.

        Raises:
            FingerprintMismatch: a field is missing or unknown.
        """
        valid = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or set(values) != set(valid):
            raise FingerprintMismatch(f'a fingerprint has the fields {valid}, got {values!r}')
        return cls(
            **{**values, 'joint_names': tuple(values['joint_names']), 'rate_hz': float(values['rate_hz'])}
        )

    def require_equal(self, other: Fingerprint, what: str = 'backbone', other_what: str = 'robot') -> None:
        """Do nothing if all fields are equal.

        Raises:
            FingerprintMismatch: some field differs; the message has each such field with both values.
        """
        differing = [
            f'{field.name}: {what} has {getattr(self, field.name)!r}, {other_what} has {getattr(other, field.name)!r}'
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        if differing:
            raise FingerprintMismatch(
                f'{what} and {other_what} do not belong together: ' + '; '.join(differing)
            )


def description_sha256(kinematics: Kinematics) -> str:
    """SHA-256 (hex) of the chain of `kinematics`, see the module's docstring."""
    zero_pose = kinematics.forward(np.zeros(kinematics.n))
    chain = {'screws': _rounded(kinematics.screws()), 'pose_at_zero': _rounded(zero_pose)}
    return hashlib.sha256(json.dumps(chain, sort_keys=True).encode()).hexdigest()


def _rounded(values: np.ndarray) -> list:
    return (np.round(values, _DECIMALS) + 0.0).tolist()  # + 0.0 turns -0.0 into 0.0
