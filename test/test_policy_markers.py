"""What RViz and Foxglove are given: markers whose points are the chunk's, and the guard's boxes where they are."""

import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from visualization_msgs.msg import Marker, MarkerArray

from decoupled_policy_ros.nodes.command_guard_node import CommandGuardNode
from decoupled_policy_ros.nodes.common import LATCHED, time_ns
from decoupled_policy_ros.nodes.policy_markers import chunk_markers, guard_markers
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.guard.guard import Guard
from decoupled_policy_ros.runtime.guard.settings import guard_settings

STAMP_NS = 1_000_000_000_000
FRAME = 'panda_base'
MARKER_DISPLAY = 'rviz_default_plugins/MarkerArray'


def chunk(seed: int = 0) -> Chunk:
    rng = np.random.default_rng(seed)
    actions = np.zeros((16, 10))
    actions[:, :3] = np.cumsum(rng.normal(0, 0.01, (16, 3)), 0)
    actions[:, [3, 7]] = 1.0
    actions[:, 9] = np.where(np.arange(16) < 10, -1.0, 1.0)
    return Chunk(actions, STAMP_NS, 20.0)


def by_name(array: MarkerArray) -> dict[str, Marker]:
    return {m.ns: m for m in array.markers}


def positions(marker: Marker) -> np.ndarray:
    return np.array([[p.x, p.y, p.z] for p in marker.points])


def test_a_chunk_is_a_line_that_is_executed_and_one_that_bridges():
    followed = chunk()
    markers = by_name(chunk_markers([followed], FRAME))
    # Index 1 is the observation's own time, 9 that of the next chunk.
    np.testing.assert_array_equal(positions(markers['executed']), followed.poses_base_ee[1:10, :3, 3])
    np.testing.assert_array_equal(positions(markers['bridge']), followed.poses_base_ee[9:, :3, 3])
    np.testing.assert_array_equal(positions(markers['waypoints']), followed.poses_base_ee[1:, :3, 3])
    assert markers['executed'].type == markers['bridge'].type == Marker.LINE_STRIP
    assert markers['executed'].color != markers['bridge'].color
    assert markers['others'].action == Marker.DELETE
    for marker in markers.values():
        assert (marker.header.frame_id, time_ns(marker.header.stamp)) == (FRAME, STAMP_NS)


def test_waypoints_tell_what_the_gripper_does():
    colours = [(c.r, c.g, c.b) for c in by_name(chunk_markers([chunk()], FRAME))['waypoints'].colors]
    assert len(colours) == 15
    assert len(set(colours[:9])) == len(set(colours[9:])) == 1  # waypoints 1..9 open, 10..15 closed
    assert colours[0][2] > colours[0][0] and colours[-1][0] > colours[-1][2]  # blue, orange


def test_further_samples_are_lines_of_their_own():
    others = by_name(chunk_markers([chunk(0), chunk(1), chunk(2)], FRAME))['others']
    ends = positions(others).reshape(2, 14, 2, 3)
    for line, seed in zip(ends, (1, 2), strict=True):
        expected = chunk(seed).poses_base_ee[1:, :3, 3]
        np.testing.assert_array_equal(line[:, 0], expected[:-1])
        np.testing.assert_array_equal(line[:, 1], expected[1:])


def test_a_chunk_that_was_slowed_down_is_shown_as_it_will_be_followed():
    slowed = chunk()
    stamps_ns = [STAMP_NS + 100_000_000 * (i + 1) for i in range(6)]
    slowed = slowed.retimed(slowed.poses_base_ee[:6], slowed.gripper[:6], stamps_ns)
    markers = by_name(chunk_markers([slowed], FRAME))
    # The next chunk is due after 400 ms: so far come the first four of these.
    np.testing.assert_array_equal(positions(markers['executed']), slowed.poses_base_ee[:4, :3, 3])
    np.testing.assert_array_equal(positions(markers['bridge']), slowed.poses_base_ee[3:, :3, 3])


def test_a_single_waypoint_makes_no_line():
    single = chunk()
    single = single.retimed(single.poses_base_ee[:1], single.gripper[:1], [STAMP_NS])
    markers = by_name(chunk_markers([single], FRAME))
    assert {markers[name].action for name in ('executed', 'bridge', 'others')} == {Marker.DELETE}
    assert len(markers['waypoints'].points) == 1


def test_the_guards_boxes_are_where_it_looks():
    boxes = [
        {'name': 'post', 'lower_m': [0.4, 0.2, 0.0], 'upper_m': [0.5, 0.3, 0.6]},
        {'name': 'shelf', 'lower_m': [-0.1, -0.8, 0.0], 'upper_m': [0.1, -0.6, 0.2]},
    ]
    workspace = {'lower': [0.2, -0.4, 0.0], 'upper': [0.8, 0.4, 0.7]}
    robot = load_robot('panda_sim')
    guard = Guard(robot, guard_settings({'boxes': boxes, 'workspace_m': workspace}, 'test'))
    clear, *markers = guard_markers(guard, FRAME).markers
    assert clear.action == Marker.DELETEALL  # boxes of a configuration before
    edges = positions(next(m for m in markers if m.ns == 'workspace'))
    assert edges.shape == (24, 3)
    np.testing.assert_array_equal([edges.min(0), edges.max(0)], [workspace['lower'], workspace['upper']])
    cubes = [m for m in markers if m.ns == 'boxes'][len(robot.collision.boxes) :]
    for cube, box in zip(cubes, boxes, strict=True):
        centre = np.array([cube.pose.position.x, cube.pose.position.y, cube.pose.position.z])
        size = np.array([cube.scale.x, cube.scale.y, cube.scale.z])
        np.testing.assert_allclose(centre - size / 2, box['lower_m'], atol=1e-12)
        np.testing.assert_allclose(centre + size / 2, box['upper_m'], atol=1e-12)
    assert [m.text for m in markers if m.ns == 'names'][-2:] == ['post', 'shelf']
    assert len({(m.ns, m.id) for m in markers}) == len(markers)


@pytest.mark.parametrize('rule', ['workspace', 'boxes'])
def test_what_the_guard_does_not_look_at_is_not_shown(rule):
    box = {'name': 'post', 'lower_m': [0.4, 0.2, 0.0], 'upper_m': [0.5, 0.3, 0.6]}
    guard = Guard(load_robot('panda_sim'), guard_settings({'boxes': [box], 'ignored_rules': [rule]}, 'test'))
    shown = {m.ns for m in guard_markers(guard, FRAME).markers}
    assert rule not in shown
    assert shown & {'workspace', 'boxes'}


def test_without_a_guard_what_was_shown_is_taken_away():
    (clear,) = guard_markers(None, FRAME).markers
    assert clear.action == Marker.DELETEALL


def test_the_guard_of_commands_shows_its_boxes_too(rclpy_context):
    node = CommandGuardNode(context=rclpy_context)
    peer = Node('late', context=rclpy_context)
    executor = SingleThreadedExecutor(context=rclpy_context)
    arrays: list[MarkerArray] = []
    try:
        peer.create_subscription(MarkerArray, 'command_guard_node/guard_markers', arrays.append, LATCHED)
        executor.add_node(node)
        executor.add_node(peer)
        deadline = time.monotonic() + 30.0
        while not arrays and time.monotonic() < deadline:
            executor.spin_once(timeout_sec=0.1)
        assert {'workspace'} <= {marker.ns for marker in arrays[0].markers}
    finally:
        executor.shutdown()
        peer.destroy_node()
        node.destroy_node()


def test_rviz_shows_the_markers_and_gets_those_of_the_guard_though_it_comes_late(repository: Path):
    rviz = yaml.safe_load((repository / 'config/policy.rviz').read_text())
    displays = rviz['Visualization Manager']['Displays']
    markers = {d['Topic']['Value']: d['Topic'] for d in displays if d['Class'] == MARKER_DISPLAY}
    assert set(markers) == {'policy_node/samples', 'policy_node/guard_markers'}
    assert markers['policy_node/guard_markers']['Durability Policy'] == 'Transient Local'
    assert markers['policy_node/samples']['Durability Policy'] == 'Volatile'
