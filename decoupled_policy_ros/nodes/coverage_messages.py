"""Coverage as standard messages, for RViz and Foxglove: a point cloud and markers, in the robot's base frame.

Their stamps are zero: what is shown is true at any time, and a viewer then takes the latest transform instead of
one from when this was published, which it may have forgotten by the time that it subscribes.
"""

from __future__ import annotations

import array
from typing import TYPE_CHECKING

import numpy as np
from geometry_msgs.msg import Vector3
from numpy.typing import NDArray
from sensor_msgs.msg import PointCloud2, PointField
from visualization_msgs.msg import Marker, MarkerArray

from decoupled_policy_ros.nodes.markers import box_edges, colour, marker, points

if TYPE_CHECKING:  # needs PyArrow, which rosdep can't install: the node says so if it is missing
    from decoupled_policy_ros.data.coverage.coverage import Coverage

POINT = np.dtype([('x', '<f4'), ('y', '<f4'), ('z', '<f4'), ('rgb', '<u4'), ('visits', '<f4')])

# Dark blue where the arm was once, yellow where it was most often.
_ANCHORS = np.array([[0.16, 0.19, 0.45], [0.13, 0.45, 0.55], [0.25, 0.68, 0.45], [0.98, 0.90, 0.15]])
_ARROW_M = 0.3  # the longest


def cloud(coverage: Coverage) -> PointCloud2:
    """Positions of the end effector, each with the visits of its voxel (0 outside of the workspace) and a colour.

    Fields: x, y, z (m), rgb (packed, as RViz and PCL have it), visits.
    """
    points_m = coverage.points.rows
    index = coverage.grid.index(points_m)
    visits = np.where(index >= 0, coverage.grid.visits.reshape(-1)[index], 0)
    rows = np.empty(len(points_m), POINT)
    for i, axis in enumerate('xyz'):
        rows[axis] = points_m[:, i]
    rows['visits'] = visits
    rgb = np.round(255 * colours(visits, int(coverage.grid.visits.max()))).astype(np.uint32)
    rows['rgb'] = rgb[:, 0] << 16 | rgb[:, 1] << 8 | rgb[:, 2]
    message = PointCloud2(
        height=1, width=len(rows), is_bigendian=False, is_dense=True,
        point_step=POINT.itemsize, row_step=POINT.itemsize * len(rows),
    )  # fmt: skip
    message.header.frame_id = coverage.robot.base_frame
    # rgb is called a float by convention: its bits are what counts.
    message.fields = [
        PointField(name=name, offset=POINT.fields[name][1], datatype=PointField.FLOAT32, count=1)  # type: ignore[index]
        for name in POINT.names or ()
    ]
    message.data = array.array('B', rows.tobytes())
    return message


def markers(coverage: Coverage) -> MarkerArray:
    """The workspace box, the range of Stage 1, visited and merely reachable voxels, directions, a line of text.

    Namespaces: workspace, range, visited, reachable, directions, summary.
    """
    grid, visited = coverage.grid, coverage.visited
    visits = grid.visits[visited]
    return MarkerArray(
        markers=[
            box_edges(coverage.robot.base_frame, 'workspace', grid.box_m, (0.9, 0.9, 0.9)),
            box_edges(coverage.robot.base_frame, 'range', coverage.position_range_m, (0.85, 0.25, 0.2)),
            _voxels(coverage, 'visited', visited, colours(visits, int(grid.visits.max())), 0.5),
            _voxels(coverage, 'reachable', coverage.reachable & ~visited, np.full((1, 3), 0.6), 0.04),
            *_arrows(coverage),
            _summary(coverage),
        ]
    )


def colours(visits: NDArray, most: int) -> NDArray[np.float64]:
    """RGB (N, 3) in [0, 1] of visits (N,), by their logarithm; grey for none."""
    share = np.log(np.maximum(visits, 1)) / max(np.log(most) if most > 1 else 0.0, 1e-9)
    places = np.linspace(0, 1, len(_ANCHORS))
    rgb = np.stack([np.interp(share, places, _ANCHORS[:, i]) for i in range(3)], -1)
    return np.where(np.asarray(visits)[:, None] > 0, rgb, 0.5)


def _marker(coverage: Coverage, namespace: str, kind: int, alpha: float = 1.0, index: int = 0) -> Marker:
    message = marker(coverage.robot.base_frame, namespace, kind, (1.0, 1.0, 1.0), alpha, index)
    message.frame_locked = True
    return message


def _voxels(
    coverage: Coverage, namespace: str, chosen: NDArray[np.bool_], rgb: NDArray, alpha: float
) -> Marker:
    """Cubes of the voxels `chosen`; `rgb` has a row for each, or one for all."""
    message = _marker(coverage, namespace, Marker.CUBE_LIST, alpha)
    if not chosen.any():
        message.action = Marker.DELETE  # RViz warns about a list of nothing
        return message
    sizes_m = 0.9 * coverage.grid.sizes_m  # gaps let one see between them
    message.scale = Vector3(x=sizes_m[0], y=sizes_m[1], z=sizes_m[2])
    message.points = points(coverage.grid.centres_m(chosen))
    if len(rgb) == 1:
        message.color = colour(rgb[0], alpha)
    else:
        message.colors = [colour(each, alpha) for each in rgb.tolist()]
    return message


def _arrows(coverage: Coverage) -> list[Marker]:
    """An arrow for each direction of motion that occurred, as long as it is frequent, from the range's middle."""
    counts = coverage.directions.counts.reshape(-1)
    centres = coverage.directions.centres().reshape(-1, 3)
    start_m = coverage.position_range_m.mean(0)
    arrows = []
    for index in np.flatnonzero(counts).tolist():
        share = counts[index] / counts.max()
        message = _marker(coverage, 'directions', Marker.ARROW, index=index)
        message.points = points([start_m, start_m + centres[index] * _ARROW_M * share])
        message.scale = Vector3(x=0.006, y=0.014, z=0.02)  # shaft, head, and the head's length
        message.color = colour((0.95, 0.55, 0.15))
        arrows.append(message)
    return arrows


def _summary(coverage: Coverage) -> Marker:
    message = _marker(coverage, 'summary', Marker.TEXT_VIEW_FACING)
    lower_m, upper_m = coverage.grid.box_m
    message.pose.position = points([[*(lower_m + upper_m)[:2] / 2, upper_m[2] + 0.05]])[0]
    message.scale.z = 0.04
    reachable = max(int(coverage.reachable.sum()), 1)
    message.text = (
        f'{coverage.n_motions} motions, {coverage.duration_s / 60:.0f} min: {coverage.visited.mean():.1%} of the '
        f'workspace, {coverage.visited.sum() / reachable:.1%} of what is reachable'
    )
    return message
