"""`decoupled-policy watch` as a process, beside a live policy and simulator; and what RViz gets from that policy."""

import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ros_harness import PolicyPeer, node_process
from trajectory_msgs.msg import MultiDOFJointTrajectory
from visualization_msgs.msg import Marker, MarkerArray

from decoupled_policy_ros.nodes.common import LATCHED, STATE, time_ns
from decoupled_policy_ros.robot.description import load_robot

pytestmark = [pytest.mark.process, pytest.mark.sim]

SAMPLES, TRAJECTORY, GUARD = 'policy_node/samples', 'policy_node/trajectory', 'policy_node/guard_markers'
PATH = re.compile(r'(/\w+(?:/\w+)*)((?:\.\w+|\[:\]|\{\w+=="[^"]*"\})*)')
PART = re.compile(r'\.(\w+)|(\[:\])|\{(\w+)=="([^"]*)"\}')
COMMAND = [sys.executable, '-m', 'decoupled_policy_ros.cli', 'watch']


@pytest.fixture(scope='module')
def peer(tmp_path_factory) -> Iterator[PolicyPeer]:
    """Beside a simulator that waits for nobody and a policy that commands it."""
    folder = tmp_path_factory.mktemp('watch')
    boxes = folder / 'guard.yaml'
    boxes.write_text('boxes:\n- {name: post, lower_m: [0.4, 0.6, 0.0], upper_m: [0.5, 0.7, 0.6]}\n')
    policy = {'use_sim_time': True, 'autostart': True, 'denoising_steps': 4, 'guard_file': str(boxes)}
    peer = PolicyPeer()
    peer.record(MarkerArray, SAMPLES, STATE)
    peer.record(MultiDOFJointTrajectory, TRAJECTORY, STATE)
    try:
        with (
            node_process('sim_robot_node', folder / 'sim.log', {'lockstep': False}),
            node_process('policy_node', folder / 'policy.log', policy) as node,
        ):
            peer.wait_for(lambda: len(peer.received('target_pose')) > 10, 'commands')
            yield peer
        assert 'Traceback' not in node.output()
    finally:
        peer.close()


def watch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_once_prints_state_rates_and_latencies(peer, tmp_path):
    picture = tmp_path / 'watch.svg'
    result = watch('--once', '--wait', '60', '--svg', str(picture))
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    (state,) = [line for line in lines if line[:2] == ['policy_node:', 'policy'] and len(line) > 2]
    assert state[3].rstrip(':') in ('following', 'holding', 'waiting'), state
    for stream in ('agentview', 'wrist', 'proprioception'):
        (row,) = [line for line in lines if line[:1] == [stream]]
        assert float(row[1]) > 0.0, row
    for stage in ('encode', 'denoise', 'total'):
        (row,) = [line for line in lines if line[:1] == [stage]]
        assert 0.0 < float(row[1]) <= float(row[2])
    (row,) = [line for line in lines if line[:3] == ['observation', '→', 'command']]
    assert float(row[3]) >= 0.0
    assert next(int(line[1]) for line in lines if line[:1] == ['cycles']) >= 1
    assert '\x1b' not in result.stdout
    assert picture.read_text().startswith('<svg')


def test_a_node_that_is_not_there_is_missed_by_name(peer):
    result = watch('--once', '--node', 'left/policy_node', '--wait', '8')
    assert result.returncode == 2
    said = ' '.join(result.stderr.split())
    assert (
        "nothing heard of 'left/policy_node' for 8 s; heard:" in said
        and 'policy_node' in said.split('heard:')[1]
    )


def test_into_a_pipe_goes_a_line_a_second_until_it_is_ended(peer):
    process = subprocess.Popen(
        [*COMMAND, '--node', 'policy_node'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = ''
        deadline = time.monotonic() + 90.0
        while not ('total p99' in line and 'agentview' in line) and time.monotonic() < deadline:
            line = process.stdout.readline()
        assert re.search(r'policy_node: policy \w+.*, latency total p99 [\d.]+ ms', line)
        assert re.search(r'agentview [\d.]+ Hz', line)
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, '')


def test_where_nobody_speaks_the_domain_is_named(monkeypatch):
    monkeypatch.setenv('ROS_DOMAIN_ID', '101')  # the last of those that tests use
    result = watch('--once', '--wait', '3')
    assert result.returncode == 2
    said = ' '.join(result.stderr.split())
    assert 'nothing heard on /diagnostics for 3 s' in said
    assert 'ROS_DOMAIN_ID 101' in said and 'ROS_AUTOMATIC_DISCOVERY_RANGE LOCALHOST' in said


def test_markers_are_the_chunk_that_is_followed(peer):
    peer.forget()

    def both() -> tuple[MarkerArray, MultiDOFJointTrajectory] | None:
        for array in peer.received(SAMPLES):
            stamp_ns = time_ns(array.markers[0].header.stamp)
            for trajectory in peer.received(TRAJECTORY):
                if time_ns(trajectory.header.stamp) == stamp_ns:
                    return array, trajectory
        return None

    array, trajectory = peer.wait_for(both, 'markers and trajectory of one chunk')
    markers = {marker.ns: marker for marker in array.markers}
    translations = [point.transforms[0].translation for point in trajectory.points]
    expected = np.array([[t.x, t.y, t.z] for t in translations])
    waypoints = np.array([[p.x, p.y, p.z] for p in markers['waypoints'].points])
    np.testing.assert_array_equal(waypoints, expected)
    lines = [[(p.x, p.y, p.z) for p in markers[name].points] for name in ('executed', 'bridge')]
    shown = lines[0] + [point for point in lines[1] if point not in lines[0][-1:]]
    np.testing.assert_array_equal(shown, expected)
    assert {marker.header.frame_id for marker in array.markers} == {load_robot('panda_sim').base_frame}


def test_guard_markers_are_there_for_whoever_comes_late(peer):
    peer.record(MarkerArray, GUARD, LATCHED)
    markers = peer.last(GUARD).markers
    assert [marker.text for marker in markers if marker.type == Marker.TEXT_VIEW_FACING][-1] == 'post'
    (edges,) = [marker for marker in markers if marker.ns == 'workspace']
    corners = np.array([[p.x, p.y, p.z] for p in edges.points])
    np.testing.assert_allclose([corners.min(0), corners.max(0)], load_robot('panda_sim').limits.workspace_m)


# --- Foxglove --------------------------------------------------------------------------------------


def leaves(layout: Any) -> list[str]:
    """Panels of a layout's tree."""
    return [layout] if isinstance(layout, str) else [*leaves(layout['first']), *leaves(layout['second'])]


def named(config: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Topics and message paths of a panel."""
    topics = {
        *config.get('topics', {}),
        config.get('topicToRender'),
        config.get('imageMode', {}).get('imageTopic'),
    }
    return topics - {None}, {path['value'] for path in config.get('paths', [])}


def values(message: Any, path: str) -> list[Any]:
    """What a message path without its topic leads to; fails where a field does not exist."""
    found = [message]
    for field, everything, key, value in PART.findall(path):
        if field:
            found = [getattr(each, field) for each in found]
        elif everything:
            found = [each for several in found for each in several]
        else:
            found = [each for each in found if getattr(each, key) == value]
    return found


def message_class(kind: str) -> type:
    package, _, name = kind.split('/')
    return getattr(importlib.import_module(f'{package}.msg'), name)


@pytest.fixture(scope='module')
def panels(repository) -> dict[str, Any]:
    layout = json.loads((repository / 'config/foxglove_policy.json').read_text())
    assert sorted(leaves(layout['layout'])) == sorted(layout['configById'])
    return layout['configById']


def test_foxglove_shows_topics_that_are_there(peer, panels):
    topics = set().union(*(named(config)[0] for config in panels.values()))
    paths = set().union(*(named(config)[1] for config in panels.values()))
    assert {SAMPLES, GUARD, 'policy_node/path', 'wrist/image_raw'} < {topic[1:] for topic in topics}
    topics |= {PATH.fullmatch(path)[1] for path in paths}
    there = {topic for topic, _ in peer.get_topic_names_and_types() if peer.count_publishers(topic)}
    assert topics - there == set()
    (space,) = [config for name, config in panels.items() if name.startswith('3D!')]
    assert space['followTf'] == load_robot('panda_sim').base_frame


def test_foxglove_plots_figures_that_are_there(peer, panels):
    kinds = {topic: message_class(kinds[0]) for topic, kinds in peer.get_topic_names_and_types()}
    paths = set().union(*(named(config)[1] for config in panels.values()))
    said = [path for path in paths if path.startswith('/diagnostics.')]
    assert len(said) > 15
    for path in paths - set(said):
        topic, rest = PATH.fullmatch(path).groups()
        assert len(values(kinds[topic](), rest)) == 1, path
    peer.diagnostics('policy', after=2)  # some commands have been given by now
    array = [m for m in peer.received('/diagnostics') if m.status[0].name.startswith('policy_node')][-1]
    for path in said:
        (value,) = values(array, path.removeprefix('/diagnostics'))
        assert path.endswith('{key=="lifecycle"}.value') or float(value) >= -1.0, path
