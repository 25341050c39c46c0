"""From a URDF or MJCF to the serial chain between two links, as a Pinocchio model of the arm joints alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pinocchio as pin
from numpy.typing import NDArray

from decoupled_policy_ros.errors import RobotDescriptionError


@dataclass(frozen=True, eq=False)
class Chain:
    """A Pinocchio model that moves the named joints only, and where base and end effector hang in it."""

    model: pin.Model
    velocity_index: NDArray[np.intp]  # (n,): where joint i of the caller's order sits in a tangent vector
    base_placement: pin.SE3  # world -> base link; constant, since no joint moves the base
    ee_joint: int
    ee_placement: pin.SE3  # frame of ee_joint -> ee link


@dataclass(frozen=True)
class ModelSource:
    """Where the model comes from: a URDF or MJCF file, or URDF text."""

    kind: str  # 'urdf' or 'mjcf'
    path: Path | None = None
    xml: str | None = None

    def build(self) -> pin.Model:
        """Parse the whole model.

        Raises:
            RobotDescriptionError: the file is missing or can't be parsed.
        """
        where = str(self.path) if self.path is not None else 'robot_description text'
        if self.path is not None and not self.path.is_file():
            raise RobotDescriptionError(f'robot model {where} does not exist')
        try:
            if self.kind == 'mjcf':
                return pin.buildModelFromMJCF(str(self.path))
            xml = self.path.read_text() if self.path is not None else self.xml
            return pin.buildModelFromXML(xml)
        except (RuntimeError, ValueError) as error:
            raise RobotDescriptionError(f'{where} is not a valid {self.kind.upper()}: {error}') from error

    def chain(self, base_link: str, ee_link: str, joint_names: tuple[str, ...]) -> Chain:
        """The chain base_link -> ee_link, all joints but `joint_names` locked at zero.

        Raises:
            RobotDescriptionError: a link or joint is not in the model, a joint has more than one degree of
                freedom, a named joint does not move the end effector in the base frame, or an unnamed one does.
        """
        model = self.build()
        base, ee = (model.frames[_link_id(model, link)] for link in (base_link, ee_link))
        known = list(model.names)[1:]  # without the universe
        missing = [name for name in joint_names if name not in known]
        if missing:
            raise RobotDescriptionError(
                f'joint {", ".join(missing)} is not in the model; its joints: {", ".join(known)}'
            )
        _require_chain(model, base.parentJoint, ee.parentJoint, joint_names)
        locked = [i for i, name in enumerate(model.names) if i > 0 and name not in joint_names]
        arm = pin.buildReducedModel(model, locked, pin.neutral(model))
        base, ee = (arm.frames[_link_id(arm, link)] for link in (base_link, ee_link))
        index = np.array([arm.joints[arm.getJointId(name)].idx_v for name in joint_names])
        return Chain(arm, index, base.placement, ee.parentJoint, ee.placement)

    def may_coincide(self, name: str, link: str) -> bool:
        """Whether a frame lies on a link and stays there; also true of a frame that the model does not know."""
        model = self.build()
        if not model.existFrame(name):
            return True
        one, other = (model.frames[_link_id(model, each)] for each in (name, link))
        return one.parentJoint == other.parentJoint and one.placement.isApprox(other.placement, 1e-9)


def _link_id(model: pin.Model, name: str) -> int:
    """Index of the frame of that name; a link wins over a joint, as MJCF lets them share a name."""
    links = [i for i, frame in enumerate(model.frames) if frame.name == name]
    if not links:
        valid = [frame.name for frame in model.frames if frame.type == pin.FrameType.BODY]
        raise RobotDescriptionError(f'frame {name!r} is not in the model; its links: {", ".join(valid)}')
    return min(links, key=lambda i: model.frames[i].type != pin.FrameType.BODY)


def _require_chain(model: pin.Model, base_joint: int, ee_joint: int, joint_names: tuple[str, ...]) -> None:
    below_base, below_ee = _ancestors(model, base_joint), _ancestors(model, ee_joint)
    moving = [model.names[i] for i in below_ee if i not in below_base]
    if carrying := [model.names[i] for i in below_base if model.names[i] in joint_names]:
        raise RobotDescriptionError(
            f'the base link is moved by {", ".join(carrying)} of joint_names: choose a link that comes before '
            f'{joint_names[0]}'
        )
    if set(moving) != set(joint_names):
        raise RobotDescriptionError(
            f'joint_names must be the joints between base and end effector, which are {", ".join(moving) or "none"}; '
            f'got {", ".join(joint_names)}'
        )
    for name in joint_names:
        if model.joints[model.getJointId(name)].nv != 1:
            raise RobotDescriptionError(
                f'joint {name} has more than one degree of freedom, which is not supported'
            )


def _ancestors(model: pin.Model, joint: int) -> list[int]:
    chain = []
    while joint > 0:
        chain.append(joint)
        joint = model.parents[joint]
    return chain[::-1]
