"""Whether the arm touches itself or a box, by coal through Pinocchio's geometry model."""

from __future__ import annotations

from itertools import combinations

import coal
import numpy as np
import pinocchio as pin
from numpy.typing import NDArray

from decoupled_policy_ros.errors import ConfigError, RobotDescriptionError
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.shapes import Box, Capsule

Array = NDArray[np.float64]


class CollisionChecks:
    """The capsules of a robot's file on its links, against each other and against boxes.

    Links that share a joint or are neighbours are left out, and so are the pairs that the file names. The base and the
    link that turns on it are not held against boxes: the arm may stand on a table.

    Args:
        robot: gives links, capsules and its own boxes.
        boxes: further ones, in the base frame.
        margin_m: distance to be kept.
        among_links, with_boxes: what is looked at.

    Raises:
        RobotDescriptionError: a capsule is on a link that the model lacks.
        ConfigError: there are boxes, and no capsule that could be held against them.
    """

    def __init__(
        self,
        robot: RobotDescription,
        boxes: tuple[Box, ...] = (),
        margin_m: float = 0.0,
        among_links: bool = True,
        with_boxes: bool = True,
    ):
        chain = self._chain = robot.source.chain(robot.base_link, robot.ee_link, robot.joint_names)
        self._geometry = pin.GeometryModel()
        self._names: list[str] = []  # of links and boxes, as people know them: Pinocchio's have to differ
        capsules = [(capsule, *self._add(capsule)) for capsule in robot.collision.capsules]
        if among_links:
            for (one, i, joint_i), (other, j, joint_j) in combinations(capsules, 2):
                pair = frozenset((one.link, other.link))
                if not self._neighbours(joint_i, joint_j) and pair not in robot.collision.ignored_pairs:
                    self._geometry.addCollisionPair(pin.CollisionPair(i, j))
        self.boxes = (*robot.collision.boxes, *boxes) if with_boxes else ()
        moving = [i for _, i, joint in capsules if joint > 1]
        if self.boxes and not moving:  # they would be shown, and nothing would be kept out of them
            names = ', '.join(box.name for box in self.boxes)
            raise ConfigError(
                f'boxes {names} keep nothing out: {robot.name!r} has no capsules on its moving links; add capsules '
                "under collision: in the robot's file, or boxes to ignored_rules in the guard's"
            )
        for box in self.boxes:
            index = self._add_box(box)
            for i in moving:
                self._geometry.addCollisionPair(pin.CollisionPair(i, index))
        self._data = chain.model.createData()
        self._placed = self._geometry.createData()
        for request in self._placed.collisionRequests:
            request.security_margin = margin_m
        self._neutral = pin.neutral(chain.model)
        self._tangent = np.zeros(chain.model.nv)
        self._first_box = len(capsules)

    @property
    def pairs(self) -> int:
        """How many pairs of shapes are looked at; 0 where the robot's file has no capsules and there are no boxes."""
        return len(self._geometry.collisionPairs)

    def touching(self, joints_rad: Array) -> tuple[str, str, bool, float] | None:
        """What touches at joint positions (n,): two names, whether the second is a box, and the distance (m) left.

        The distance is below the margin, negative where they overlap; None if nothing touches.
        """
        chain, geometry = self._chain, self._geometry
        self._tangent[chain.velocity_index] = joints_rad
        configuration = pin.integrate(chain.model, self._neutral, self._tangent)
        if not pin.computeCollisions(chain.model, self._data, geometry, self._placed, configuration, True):
            return None
        for pair, result in zip(geometry.collisionPairs, self._placed.collisionResults, strict=True):
            if result.isCollision():
                one, other = (self._names[i] for i in (pair.first, pair.second))
                depth = result.getContact(0).penetration_depth if result.numContacts() else 0.0
                return one, other, pair.second >= self._first_box, float(depth)
        raise AssertionError('a collision without a pair')

    def _add(self, capsule: Capsule) -> tuple[int, int]:
        """Index of the shape, and the joint that moves it."""
        model = self._chain.model
        links = [
            i for i, f in enumerate(model.frames) if f.name == capsule.link and f.type == pin.FrameType.BODY
        ]
        if not links:
            valid = [f.name for f in model.frames if f.type == pin.FrameType.BODY]
            raise RobotDescriptionError(
                f'collision: link {capsule.link!r} is not in the model; its links: {", ".join(valid)}'
            )
        frame = model.frames[links[0]]
        way = capsule.to_m - capsule.from_m
        length = float(np.linalg.norm(way))
        rotation = np.eye(3)
        if length > 0.0:  # coal's capsules lie along z
            rotation = pin.Quaternion.FromTwoVectors(np.array([0.0, 0.0, 1.0]), way / length).matrix()
        middle = pin.SE3(rotation, (capsule.from_m + capsule.to_m) / 2)
        shape = pin.GeometryObject(
            str(len(self._names)),
            frame.parentJoint,
            frame.placement * middle,
            coal.Capsule(capsule.radius_m, length),
        )
        return self._take(shape, capsule.link), frame.parentJoint

    def _add_box(self, box: Box) -> int:
        placement = self._chain.base_placement * pin.SE3(np.eye(3), (box.lower_m + box.upper_m) / 2)
        size = coal.Box(*(box.upper_m - box.lower_m))
        return self._take(pin.GeometryObject(str(len(self._names)), 0, placement, size), box.name)

    def _take(self, shape: pin.GeometryObject, name: str) -> int:
        self._names.append(name)
        return self._geometry.addGeometryObject(shape)

    def _neighbours(self, joint_a: int, joint_b: int) -> bool:
        parents = self._chain.model.parents
        return joint_a == joint_b or parents[joint_a] == joint_b or parents[joint_b] == joint_a
