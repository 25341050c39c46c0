"""A chunk in time: stamps of its waypoints, what lies between them, when the next one is due; the gripper's edges."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.errors import ChunkExhausted
from decoupled_policy_ros.robot.poses import action_from_pose, pose_from_position_rotation
from decoupled_policy_ros.runtime.chunks import Chunk, GripperLatch, interpolate_waypoints

PERIOD_NS = 50_000_000
T0_NS = 1_700_000_000_123_456_789


def make_chunk(seed: int = 0, horizon: int = 16, **options) -> Chunk:
    rng = np.random.default_rng(seed)
    poses = pose_from_position_rotation(
        rng.uniform(-1, 1, (horizon, 3)), Rotation.random(horizon, random_state=seed).as_matrix()
    )
    actions = action_from_pose(poses, rng.uniform(-1, 1, horizon))
    return Chunk(actions, **{'observation_stamp_ns': T0_NS, 'rate_hz': 20.0, **options})


def test_second_waypoint_belongs_to_the_observation() -> None:
    chunk = make_chunk()
    assert len(chunk) == 16
    assert chunk.stamps_ns == [T0_NS + (i - 1) * PERIOD_NS for i in range(16)]
    assert chunk.first == 1
    # Indices 1..8 are executed: t .. t + 0.35 s. The next chunk starts at t + 0.4 s.
    assert chunk.replan_stamp_ns == T0_NS + 8 * PERIOD_NS
    assert chunk.end_stamp_ns == T0_NS + 14 * PERIOD_NS


def test_one_observation_step_starts_at_the_observation() -> None:
    chunk = make_chunk(n_obs_steps=1, n_execute=4)
    assert chunk.stamps_ns[0] == T0_NS
    assert chunk.replan_stamp_ns == T0_NS + 4 * PERIOD_NS


@pytest.mark.parametrize('rate_hz', [20.0, 30.0, 7.3])
def test_stamps_do_not_accumulate_rounding(rate_hz: float) -> None:
    chunk = make_chunk(horizon=50, rate_hz=rate_hz)
    since_ns = np.array(chunk.stamps_ns) - T0_NS
    assert np.abs(since_ns - (np.arange(50) - 1) * 1e9 / rate_hz).max() <= 0.5


@given(st.integers(0, 2**31), st.integers(0, 15))
def test_at_a_waypoint_it_is_that_waypoint_exactly(seed: int, index: int) -> None:
    chunk = make_chunk(seed)
    pose, gripper = chunk.sample(chunk.stamp_ns(index))
    np.testing.assert_array_equal(pose, chunk.poses_base_ee[index])
    assert gripper == chunk.gripper[index]


@given(st.integers(0, 2**31), st.integers(-PERIOD_NS, 14 * PERIOD_NS - 1))
def test_between_two_waypoints_it_is_between_them(seed: int, since_ns: int) -> None:
    chunk = make_chunk(seed)
    pose, gripper = chunk.sample(T0_NS + since_ns)
    before, share = divmod(since_ns + PERIOD_NS, PERIOD_NS)
    share /= PERIOD_NS
    a, b = chunk.poses_base_ee[before], chunk.poses_base_ee[before + 1]
    np.testing.assert_allclose(pose[:3, 3], (1 - share) * a[:3, 3] + share * b[:3, 3], atol=1e-12)
    whole = Rotation.from_matrix(a[:3, :3].T @ b[:3, :3]).magnitude()
    part = Rotation.from_matrix(a[:3, :3].T @ pose[:3, :3]).magnitude()
    np.testing.assert_allclose(part, share * whole, atol=1e-6)
    assert gripper == chunk.gripper[before]  # an edge never comes before its waypoint


@pytest.mark.parametrize('since_ns', [-PERIOD_NS - 1, 14 * PERIOD_NS + 1])
def test_outside_it_refuses(since_ns: int) -> None:
    with pytest.raises(ChunkExhausted, match='they span'):
        make_chunk().sample(T0_NS + since_ns)


def test_network_output_is_made_a_rotation() -> None:
    rng = np.random.default_rng(1)
    chunk = Chunk(rng.normal(size=(16, 10)), T0_NS, 20.0)
    rotations = chunk.poses_base_ee[:, :3, :3]
    np.testing.assert_allclose(
        rotations @ rotations.swapaxes(1, 2), np.broadcast_to(np.eye(3), (16, 3, 3)), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(rotations), 1.0)
    assert np.abs(chunk.gripper).max() <= 1.0


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_waypoint_that_is_not_finite_is_refused(bad: float) -> None:
    actions = np.random.default_rng(2).normal(size=(16, 10))
    actions[11, 2] = bad
    with pytest.raises(ValueError, match='not finite'):
        Chunk(actions, T0_NS, 20.0)


def test_a_degenerate_rotation_is_refused() -> None:
    actions = np.random.default_rng(3).normal(size=(16, 10))
    actions[4, 6:9] = 2 * actions[4, 3:6]
    with pytest.raises(ValueError, match='independent'):
        Chunk(actions, T0_NS, 20.0)


def test_a_horizon_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match='at least 9'):
        make_chunk(horizon=8)
    assert len(make_chunk(horizon=9)) == 9


def test_a_single_waypoint_is_followed_at_its_stamp_only() -> None:
    pose = make_chunk().poses_base_ee[:1]
    np.testing.assert_array_equal(interpolate_waypoints([5], pose, 5), pose[0])
    for stamp_ns in (4, 6):
        with pytest.raises(ChunkExhausted):
            interpolate_waypoints([5], pose, stamp_ns)


def test_gripper_latch_gives_edges_only() -> None:
    latch = GripperLatch(0.2)
    values = [-0.1, -0.9, 0.1, 0.2, 0.21, 0.9, -0.2, 0.0, -0.3, -1.0]
    assert [latch.update(value) for value in values] == [
        'open', None, None, None, 'closed', None, None, None, 'open', None,
    ]  # fmt: skip


def test_gripper_latch_leaves_the_gripper_where_nothing_is_said() -> None:
    latch = GripperLatch()
    assert latch.update(None) is None and latch.update(0.9) == 'closed'
    assert latch.update(None) is None and latch.state == 'closed'


def test_gripper_latch_forgets_on_reset() -> None:
    latch = GripperLatch()
    assert latch.update(1.0) == 'closed'
    assert latch.update(1.0) is None
    latch.reset()
    assert latch.state is None
    assert latch.update(1.0) == 'closed'


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60), st.floats(0, 0.9))
def test_gripper_latch_alternates(values: list[float], hysteresis: float) -> None:
    latch = GripperLatch(hysteresis)
    edges = [edge for edge in map(latch.update, values) if edge is not None]
    assert all(a != b for a, b in pairwise(edges))
    assert edges[-1] == latch.state


@pytest.mark.parametrize('hysteresis', [-0.1, 1.0, float('nan')])
def test_gripper_latch_refuses_a_band_without_outside(hysteresis: float) -> None:
    with pytest.raises(ValueError, match='hysteresis'):
        GripperLatch(hysteresis)
