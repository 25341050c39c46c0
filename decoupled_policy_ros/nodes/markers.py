"""Pieces of visualization_msgs/MarkerArray that several nodes show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from geometry_msgs.msg import Point
from numpy.typing import ArrayLike, NDArray
from std_msgs.msg import ColorRGBA
from visualization_msgs.msg import Marker

Colour = tuple[float, float, float]

_BOX = np.array([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])
_EDGES = [(i, i | bit) for i in range(8) for bit in (1, 2, 4) if not i & bit]


def marker(
    frame_id: str, namespace: str, kind: int, rgb: Colour, alpha: float = 1.0, index: int = 0
) -> Marker:
    """A marker at the origin of a frame, without a stamp: true at any time."""
    message = Marker(ns=namespace, id=index, type=kind, action=Marker.ADD)
    message.header.frame_id = frame_id
    message.pose.orientation.w = 1.0
    message.color = colour(rgb, alpha)
    return message


def box_edges(frame_id: str, namespace: str, box_m: NDArray, rgb: Colour) -> Marker:
    """The twelve edges of a box, given by its corners (2, 3)."""
    message = marker(frame_id, namespace, Marker.LINE_LIST, rgb)
    message.frame_locked = True
    message.scale.x = 0.003
    corners_m = box_m[0] + _BOX * (box_m[1] - box_m[0])
    message.points = points(corners_m[[end for edge in _EDGES for end in edge]])
    return message


def points(positions_m: ArrayLike) -> list[Point]:
    """geometry_msgs/Point of each position, (n, 3)."""
    return [Point(x=x, y=y, z=z) for x, y, z in np.asarray(positions_m, float).tolist()]


def colour(rgb: Sequence[float], alpha: float = 1.0) -> ColorRGBA:
    """std_msgs/ColorRGBA of red, green and blue in [0, 1]."""
    r, g, b = (float(value) for value in rgb)
    return ColorRGBA(r=r, g=g, b=b, a=alpha)
