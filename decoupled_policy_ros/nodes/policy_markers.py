"""What the policy is about to do, and what keeps it from doing more, as markers for RViz and Foxglove."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from geometry_msgs.msg import Vector3
from numpy.typing import NDArray
from rclpy.lifecycle import LifecycleNode
from visualization_msgs.msg import Marker, MarkerArray

from decoupled_policy_ros.nodes.common import COMMAND, LATCHED, time_message
from decoupled_policy_ros.nodes.markers import box_edges, colour, marker, points
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.guard.guard import Guard

EXECUTED_RGB, BRIDGE_RGB, OTHER_RGB = (0.15, 0.85, 0.25), (0.95, 0.85, 0.2), (0.6, 0.6, 0.6)
OPEN_RGB, CLOSED_RGB = np.array([0.25, 0.55, 1.0]), np.array([1.0, 0.35, 0.1])
WORKSPACE_RGB, BOX_RGB = (0.3, 0.8, 0.9), (0.9, 0.2, 0.2)
LINE_M, THIN_M, WAYPOINT_M, TEXT_M = 0.004, 0.0015, 0.008, 0.03


class PolicyMarkers:
    """`~/samples`, one message for each chunk, and `~/guard_markers`, latched.

    Args:
        node: publishes; only while it is active, apart from what the guard looks at.
        robot: gives the base frame.
    """

    def __init__(self, node: LifecycleNode, robot: RobotDescription):
        self._node, self._frame_id = node, robot.base_frame
        self._samples = node.create_lifecycle_publisher(MarkerArray, '~/samples', COMMAND)
        self._guard = node.create_publisher(MarkerArray, '~/guard_markers', LATCHED)

    def close(self) -> None:
        """Destroy the publishers."""
        self._node.destroy_lifecycle_publisher(self._samples)
        self._node.destroy_publisher(self._guard)

    def show_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Show the chunk that is followed, the first one, and those that are not, if anybody looks."""
        if self._samples.get_subscription_count():
            self._samples.publish(chunk_markers(chunks, self._frame_id))

    def show_guard(self, guard: Guard | None) -> None:
        """Show what the guard keeps the arm out of; nothing if there is none."""
        self._guard.publish(guard_markers(guard, self._frame_id))


def chunk_markers(chunks: Sequence[Chunk], frame_id: str) -> MarkerArray:
    """Chunks from their observation's stamp on, the first of them being the one that is followed.

    Namespaces: executed, up to where the next chunk is due; bridge, what is followed if that one is late; waypoints,
    blue with the gripper open and orange with it closed; others, all further chunks.
    """
    followed = chunks[0]
    positions_m = _ahead_m(followed)
    executed = sum(followed.stamps_ns[i] <= followed.replan_stamp_ns for i in followed.ahead())
    waypoints = marker(frame_id, 'waypoints', Marker.SPHERE_LIST, OTHER_RGB)
    waypoints.scale = Vector3(x=WAYPOINT_M, y=WAYPOINT_M, z=WAYPOINT_M)
    waypoints.points = points(positions_m)
    closed = (followed.gripper[followed.ahead().start :, None] + 1.0) / 2.0
    waypoints.colors = [colour(rgb) for rgb in (OPEN_RGB + closed * (CLOSED_RGB - OPEN_RGB)).tolist()]
    messages = [
        _line(frame_id, 'executed', positions_m[:executed], EXECUTED_RGB),
        _line(frame_id, 'bridge', positions_m[max(executed - 1, 0) :], BRIDGE_RGB),
        waypoints if waypoints.points else _nothing(waypoints),
        _segments(frame_id, [_ahead_m(chunk) for chunk in chunks[1:]]),
    ]
    for message in messages:
        message.header.stamp = time_message(followed.observation_stamp_ns)
    return MarkerArray(markers=messages)


def guard_markers(guard: Guard | None, frame_id: str) -> MarkerArray:
    """The workspace and the boxes that the guard looks at, in place of whatever was shown before.

    Namespaces: workspace, boxes, names.
    """
    messages = [Marker(action=Marker.DELETEALL)]
    if guard is None:
        return MarkerArray(markers=messages)
    if guard.settings.looks_at('workspace'):
        messages.append(box_edges(frame_id, 'workspace', guard.limits.workspace_m, WORKSPACE_RGB))
    for index, box in enumerate(guard.boxes):
        cube = marker(frame_id, 'boxes', Marker.CUBE, BOX_RGB, 0.3, index)
        name = marker(frame_id, 'names', Marker.TEXT_VIEW_FACING, (1.0, 1.0, 1.0), 1.0, index)
        middle_m, size_m = (box.lower_m + box.upper_m) / 2, box.upper_m - box.lower_m
        above_m = np.append(middle_m[:2], box.upper_m[2] + TEXT_M)
        cube.pose.position, name.pose.position = points([middle_m, above_m])
        cube.scale = Vector3(x=size_m[0], y=size_m[1], z=size_m[2])
        name.scale.z, name.text = TEXT_M, box.name
        cube.frame_locked = name.frame_locked = True
        messages += [cube, name]
    return MarkerArray(markers=messages)


def _ahead_m(chunk: Chunk) -> NDArray:
    """Positions (n, 3) from the observation's stamp on."""
    return chunk.poses_base_ee[chunk.ahead().start :, :3, 3]


def _line(frame_id: str, namespace: str, positions_m: NDArray, rgb: tuple[float, float, float]) -> Marker:
    message = marker(frame_id, namespace, Marker.LINE_STRIP, rgb)
    message.scale.x = LINE_M
    message.points = points(positions_m)
    return message if len(message.points) > 1 else _nothing(message)


def _segments(frame_id: str, lines_m: Sequence[NDArray]) -> Marker:
    message = marker(frame_id, 'others', Marker.LINE_LIST, OTHER_RGB, 0.6)
    message.scale.x = THIN_M
    for line_m in lines_m:
        message.points += points(np.repeat(line_m, 2, axis=0)[1:-1])
    return message if message.points else _nothing(message)


def _nothing(message: Marker) -> Marker:
    """RViz warns about a list of nothing; this takes away what was shown before."""
    message.action = Marker.DELETE
    return message
