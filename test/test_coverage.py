"""What Stage 1 covers: the counting, the sources, the comparison with a task, the command."""

import itertools
import json
import shutil
import sys
import tracemalloc
from dataclasses import replace

import cv2
import numpy as np
import pytest
from foreign_files import truths, write_robomimic
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from decoupled_policy_ros import cli
from decoupled_policy_ros.data.coverage import sources as coverage_sources
from decoupled_policy_ros.data.coverage.bins import Histogram, RotationCells, SphereBins, Thinned, VoxelGrid
from decoupled_policy_ros.data.coverage.coverage import Coverage, CoverageSettings, angles_between, measure
from decoupled_policy_ros.data.coverage.report import coverage_dict, half_in
from decoupled_policy_ros.data.coverage.sources import MotionBlock, open_source
from decoupled_policy_ros.data.coverage.task import compare_task
from decoupled_policy_ros.data.datasets.dataset import DatasetSpec, DatasetWriter
from decoupled_policy_ros.data.motions.motions import MotionWriter, synth_motions
from decoupled_policy_ros.errors import ConfigError, DatasetError, FingerprintMismatch
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.robot.poses import action_from_pose, pose_from_position_rotation

DOWN = Rotation.from_euler('x', 180, degrees=True).as_matrix()
QUICK = CoverageSettings(reach_samples=2000)


@pytest.fixture(scope='module')
def robot():
    return load_robot('panda_sim')


def block(robot, positions_m, rotations=DOWN, gripper=-1.0, joints=None, first=(0,), rate_hz=20.0):
    """Frames at positions (T, 3); joints at home unless given; motions begin at the frames `first`."""
    positions_m = np.asarray(positions_m, float)
    gripper = np.broadcast_to(np.asarray(gripper, float), len(positions_m))
    arm = np.broadcast_to(robot.home_rad if joints is None else joints, (len(positions_m), 7))
    actions = action_from_pose(pose_from_position_rotation(positions_m, rotations), gripper)
    starts = np.isin(np.arange(len(positions_m)), first)
    return MotionBlock(np.concatenate([arm, gripper[:, None]], -1), actions, starts, rate_hz)


def covered(robot, *blocks, settings=QUICK):
    coverage = Coverage(robot, settings)
    for one in blocks:
        coverage.add(one)
    return coverage


# --- counting -----------------------------------------------------------------------------------

VALUES = st.lists(st.floats(-5, 5, allow_nan=False), min_size=1, max_size=60)


@given(VALUES, st.integers(0, 60))
def test_histogram_counts_add_up_however_the_values_come(values, cut):
    histogram, whole = Histogram(-2, 3, 7), Histogram(-2, 3, 7)
    histogram.add(values[:cut])
    histogram.add(values[cut:])
    whole.add(values)
    assert histogram.to_dict() == whole.to_dict()
    assert histogram.total == len(values) == histogram.counts.sum() + histogram.below + histogram.above
    assert (histogram.minimum, histogram.maximum) == (min(values), max(values))
    assert histogram.below == sum(value < -2 for value in values)
    assert 0 <= histogram.share_visited <= 1
    quantiles = [histogram.quantile(q) for q in (0, 0.3, 0.8, 1)]
    assert quantiles == sorted(quantiles)
    assert min(values) <= quantiles[0] and quantiles[-1] == max(values)


def test_histogram_quantiles_are_those_of_the_values_to_a_bin():
    values = np.random.default_rng(0).gamma(2.0, 0.2, 20_000)
    histogram = Histogram(0, 2, 200)
    histogram.add(values)
    for share in (0.05, 0.5, 0.95, 0.99):
        assert histogram.quantile(share) == pytest.approx(np.quantile(values, share), abs=0.01)
    assert np.isnan(Histogram(0, 1, 3).quantile(0.5))


def test_a_path_through_a_cube_visits_exactly_its_voxels(robot):
    grid = VoxelGrid([[0, 0, 0], [0.5, 0.4, 0.3]], 0.1)
    assert grid.shape == (5, 4, 3)
    axis = np.arange(0.025, 0.2, 0.05)  # two points to each side of a voxel, in two voxels
    path = np.stack(np.meshgrid(axis + 0.1, axis + 0.2, axis, indexing='ij'), -1).reshape(-1, 3)
    grid.add(path)
    expected = np.zeros(grid.shape, np.int64)
    expected[1:3, 2:4, 0:2] = 8
    np.testing.assert_array_equal(grid.visits, expected)
    assert grid.outside == 0
    centres = grid.centres_m(grid.visits > 0)
    np.testing.assert_allclose(centres[0], [0.15, 0.25, 0.05])
    np.testing.assert_array_equal(grid.index(centres), np.flatnonzero(grid.visits))


def test_the_border_of_the_box_is_inside_and_beyond_it_is_not(robot):
    grid = VoxelGrid(robot.limits.workspace_m, 0.05)
    corners = robot.limits.workspace_m.astype(np.float32)  # what a dataset holds of it
    assert grid.index(corners).tolist() == [0, grid.visits.size - 1]
    grid.add([*corners, *(corners + np.array([[-0.001], [0.001]]))])
    assert (int(grid.visits.sum()), grid.outside) == (2, 2)


@given(st.floats(0.02, 0.4), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_voxels_tile_the_box_and_every_position_is_in_the_one_about_it(voxel_m, seed):
    box_m = np.array([[0.25, -0.45, -0.11], [0.8, 0.45, 0.6]])
    grid = VoxelGrid(box_m, voxel_m)
    assert np.all(grid.sizes_m <= voxel_m + 1e-6)
    np.testing.assert_allclose(grid.sizes_m * grid.shape, box_m[1] - box_m[0])
    positions = np.random.default_rng(seed).uniform(box_m[0] - 0.1, box_m[1] + 0.1, (200, 3))
    index = grid.index(positions)
    inside = np.all((positions >= box_m[0]) & (positions <= box_m[1]), -1)
    np.testing.assert_array_equal(index >= 0, inside)
    centres = grid.centres_m(np.ones(grid.shape, bool))[index[inside]]
    assert np.all(np.abs(positions[inside] - centres) <= grid.sizes_m / 2 + 1e-5)
    grid.add(positions)
    assert int(grid.visits.sum()) + grid.outside == 200


@pytest.mark.parametrize('voxel_m', [0.0, -1.0, 1e-4, float('nan'), float('inf')])
def test_voxels_that_are_too_small_are_refused_with_the_smallest(voxel_m):
    with pytest.raises(ConfigError, match=r'voxel_m must be at least 0\.0\d+ in this workspace, got'):
        VoxelGrid([[0, 0, 0], [1, 1, 1]], voxel_m)


def test_bins_on_the_sphere_have_equal_areas():
    sphere = SphereBins()
    vectors = np.random.default_rng(0).normal(size=(200_000, 3))
    sphere.add(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))
    assert sphere.counts.sum() == sum(sphere.named.values()) == 200_000
    assert sphere.share_visited == 1.0
    np.testing.assert_allclose(sphere.counts / 200_000, 1 / sphere.counts.size, rtol=0.1)
    np.testing.assert_allclose(np.array(list(sphere.named.values())) / 200_000, 1 / 6, rtol=0.02)


def test_the_centre_of_a_bin_lies_in_it_and_axes_have_their_names():
    sphere = SphereBins()
    centres = sphere.centres().reshape(-1, 3)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=-1), 1)
    sphere.add(centres)
    assert np.all(sphere.counts == 1)
    for name, vector in (('+x', [1, 0.1, 0]), ('-y', [0.2, -1, 0.3]), ('-z', [0, 0, -1])):
        named = SphereBins()
        named.add([np.array(vector) / np.linalg.norm(vector)])
        assert named.named[name] == 1 == sum(named.named.values())


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_cells_of_rotations_hold_what_is_alike_and_part_what_is_not(seed):
    rng = np.random.default_rng(seed)
    rotations = Rotation.random(300, random_state=rng)
    index = RotationCells().index(rotations.as_matrix())
    assert index.min() >= 0 and index.max() < 864
    same = index[:, None] == index
    quats = rotations.as_quat()
    apart_rad = 2 * np.arccos(np.clip(np.abs(quats @ quats.T), 0, 1))
    assert np.degrees(apart_rad[same]).max() < 65  # the diagonal of a cell
    counts = RotationCells()
    counts.add(rotations.as_matrix())
    assert counts.counts.sum() == 300


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 30))
def test_a_thinned_sample_is_the_same_in_any_portions(portions, limit):
    rows = np.arange(sum(portions), dtype=np.float32)[:, None]
    thinned = Thinned(limit, 1)
    for end, size in zip(np.cumsum(portions), portions, strict=True):
        thinned.add(rows[end - size : end])
    assert len(thinned.rows) <= limit
    np.testing.assert_array_equal(thinned.rows, rows[:: thinned.every])
    assert thinned.every == 1 or len(rows[:: thinned.every // 2]) > limit


@given(st.floats(0, np.pi), st.integers(0, 2**32 - 1))
def test_angles_between_rotations_are_exact_for_small_ones_too(angle, seed):
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=3)
    start = Rotation.random(random_state=rng)
    turn = Rotation.from_rotvec(angle * axis / np.linalg.norm(axis))
    found = angles_between(start.as_matrix()[None], (turn * start).as_matrix()[None])
    assert found[0] == pytest.approx(angle, abs=1e-7, rel=1e-7)


def test_half_of_the_frames_is_in_so_many_voxels():
    assert half_in(np.array([0, 5, 1, 1, 1, 1, 1])) == 1
    assert half_in(np.array([1, 1, 1, 1])) == 2
    assert half_in(np.zeros(4, int)) == 0


# --- coverage of motions ------------------------------------------------------------------------


def test_speed_and_direction_of_a_known_motion(robot):
    steps = np.arange(41)
    positions = np.array([0.4, 0.0, 0.2]) + np.outer(steps / 20.0, [0.1, 0.0, 0.0])
    turns = Rotation.from_rotvec(np.outer(0.4 * steps / 20.0, [0, 0, 1])).as_matrix() @ DOWN
    joints = robot.home_rad + np.outer(steps / 20.0, [0.2, 0, 0, 0, 0, 0, 0])
    coverage = covered(robot, block(robot, positions, turns, 1.0, joints))
    for histogram, speed in ((coverage.linear_m_s, 0.1), (coverage.angular_rad_s, 0.4)):
        assert histogram.total == 40
        assert (histogram.minimum, histogram.maximum) == (pytest.approx(speed), pytest.approx(speed))
        assert histogram.quantile(0.5) == pytest.approx(speed)
    assert coverage.joint_speeds_rad_s[0].maximum == pytest.approx(0.2)
    assert coverage.joint_speeds_rad_s[1].maximum == pytest.approx(0, abs=1e-12)
    assert coverage.directions.named == {'+x': 40, '-x': 0, '+y': 0, '-y': 0, '+z': 0, '-z': 0}
    assert coverage.tilt_deg.maximum == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(coverage.position_range_m, [[0.4, 0, 0.2], [0.6, 0, 0.2]], atol=1e-12)
    assert coverage.duration_s == pytest.approx(41 / 20)
    assert (coverage.n_frames, coverage.n_motions) == (41, 1)
    assert coverage.shares.to_dict() == {
        'open': 0.0, 'closed': 1.0, 'between': 0.0, 'gripper_moving': 0.0, 'idle': 0.0,
    }  # fmt: skip


def test_idle_and_gripper_shares(robot):
    gripper = np.array([-1.0, -1.0, -0.4, 0.2, 0.2, 1.0])
    coverage = covered(robot, block(robot, np.tile([0.5, 0, 0.2], (6, 1)), gripper=gripper))
    assert coverage.shares.to_dict() == pytest.approx(
        {'open': 2 / 6, 'closed': 1 / 6, 'between': 3 / 6, 'gripper_moving': 3 / 5, 'idle': 2 / 5}
    )
    assert sum(coverage.directions.named.values()) == 0


def test_between_two_motions_nothing_moves(robot):
    positions = [[0.3, 0, 0.1], [0.3, 0, 0.1], [0.7, 0.3, 0.4], [0.7, 0.3, 0.4]]
    assert covered(robot, block(robot, positions, first=(0, 2))).linear_m_s.maximum == 0
    assert covered(robot, block(robot, positions)).linear_m_s.maximum > 10
    apart = [block(robot, positions[:2]), block(robot, positions[2:])]
    assert covered(robot, *apart).linear_m_s.maximum == 0


def figures(coverage):
    return json.dumps(coverage_dict(coverage), sort_keys=True), coverage.points.rows.tobytes()


@given(st.lists(st.integers(1, 119), max_size=5), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_frames_count_the_same_in_any_portions(robot, cuts, seed):
    rng = np.random.default_rng(seed)
    positions = np.array([0.5, 0, 0.2]) + 0.02 * rng.normal(size=(120, 3)).cumsum(0)
    rotations = Rotation.from_rotvec(0.3 * rng.normal(size=(120, 3))).as_matrix() @ DOWN
    joints = robot.home_rad + 0.05 * rng.normal(size=(120, 7)).cumsum(0)
    whole = block(robot, positions, rotations, rng.uniform(-1, 1, 120), joints, (0, 50, 51))
    edges = [0, *sorted(set(cuts)), 120]
    portions = [
        replace(
            whole, joints=whole.joints[a:b], actions=whole.actions[a:b], first=whole.first[a:b]
        )
        for a, b in itertools.pairwise(edges)
    ]  # fmt: skip
    one, many = covered(robot, whole), covered(robot, *portions)
    one.duration_s = many.duration_s  # a sum of floats, in another order
    assert figures(one) == figures(many)
    report = coverage_dict(one)
    assert report['frames'] == int(one.grid.visits.sum()) + one.grid.outside == 120
    assert one.linear_m_s.total == one.shares.steps == 120 - 3
    for key in ('share_of_voxels', 'share_of_reachable'):
        assert 0 <= report['workspace'][key]
    assert 0 <= report['workspace']['share_of_voxels'] <= 1
    for joint in report['joints'].values():
        assert 0 <= joint['share_of_range'] <= 1 and 0 <= joint['share_of_bins'] <= 1


def test_memory_does_not_grow_with_the_frames(robot):
    rng = np.random.default_rng(0)
    one = block(robot, rng.uniform([0.3, -0.3, 0], [0.7, 0.3, 0.4], (2048, 3)))

    def peak(blocks):
        coverage = Coverage(robot, CoverageSettings(points=1000))
        tracemalloc.start()
        for _ in range(blocks):
            coverage.add(one)
        _, top = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return top

    assert peak(40) < 1.1 * peak(4)


def test_looking_for_what_is_reachable_can_be_ended(robot):
    coverage = covered(robot, settings=replace(QUICK, reach_samples=10**9, voxel_m=0.01))

    def ended(frames: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        coverage.find_reachable(ended)
    assert 0 < coverage.reach_samples < 10**6


def test_what_was_visited_is_reachable_and_home_is_found_by_sampling(robot):
    home_m = Kinematics(robot).forward(robot.home_rad)[:3, 3]
    coverage = covered(robot, block(robot, [robot.limits.workspace_m[1] - 0.01] * 2))
    coverage.find_reachable()
    assert coverage.reach_samples == 2000
    assert np.all(coverage.reachable[coverage.visited])
    again = covered(robot, settings=replace(QUICK, reach_samples=60_000))
    again.find_reachable()
    assert again.reachable.reshape(-1)[again.grid.index(home_m[None])[0]]
    assert coverage.reachable.sum() < again.reachable.sum() <= again.reachable.size


# --- sources ------------------------------------------------------------------------------------


def write_motions(folder, motions):
    folder.mkdir(parents=True)
    for i, motion in enumerate(motions):
        with MotionWriter(folder / f'motion_{i:06d}.arrow', motion.fingerprint) as writer:
            writer.append(motion.stamps_ns, motion.joint_positions, motion.actions)
    return folder


def write_dataset(root, robot, motions, commanded=lambda actions: actions):
    """A dataset whose achieved poses are those of `motions`."""
    with DatasetWriter(root, DatasetSpec.of(robot, 20.0)) as writer:
        for motion in motions:
            width = robot.gripper.width_from_normalised(motion.joint_positions[:, 7])
            fingers = np.stack([width / 2, -width / 2], -1)
            frames = {
                'observation.joint_positions': np.concatenate([motion.joint_positions[:, :7], fingers], -1),
                'observation.proprioception': np.zeros((len(motion), 9)),
                'observation.pose': motion.actions,
                'action': commanded(motion.actions),
            }
            writer.add_episode('wander', True, frames)
    return root


@pytest.fixture(scope='module')
def motions(robot):
    return synth_motions(robot, 4, seed=3, rate_hz=20.0)


@pytest.fixture(scope='module')
def recordings(tmp_path_factory, motions):
    return write_motions(tmp_path_factory.mktemp('recorded') / 'motions', motions)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory, robot, motions):
    return write_dataset(tmp_path_factory.mktemp('sets') / 'wander', robot, motions)


def test_recordings_and_datasets_of_the_same_motion_cover_the_same(robot, motions, recordings, dataset):
    recorded, demonstrated = measure([recordings], robot, QUICK), measure([dataset], robot, QUICK)
    n_frames = sum(map(len, motions))
    for coverage, path in ((recorded, recordings), (demonstrated, dataset)):
        assert coverage.sources == [{'path': str(path), 'frames': n_frames, 'motions': 4, 'rate_hz': 20.0}]
        positions = np.concatenate([motion.actions[:, :3] for motion in motions])
        np.testing.assert_array_equal(coverage.position_range_m, [positions.min(0), positions.max(0)])
    np.testing.assert_array_equal(recorded.grid.visits, demonstrated.grid.visits)
    np.testing.assert_array_equal(recorded.directions.counts, demonstrated.directions.counts)
    for one, other in zip(recorded.joints_rad, demonstrated.joints_rad, strict=True):
        np.testing.assert_array_equal(one.counts, other.counts)
    both = measure([recordings, dataset], robot, QUICK)
    np.testing.assert_array_equal(both.grid.visits, 2 * recorded.grid.visits)
    assert [source['motions'] for source in both.sources] == [4, 4]


def test_a_dataset_is_read_episode_by_episode(robot, motions, dataset):
    (only,) = open_source(dataset, robot, 20.0).blocks()
    np.testing.assert_array_equal(only.actions, np.concatenate([motion.actions for motion in motions]))
    np.testing.assert_allclose(
        only.joints, np.concatenate([motion.joint_positions for motion in motions]), atol=1e-6
    )
    np.testing.assert_array_equal(np.flatnonzero(only.first), np.cumsum([0, *map(len, motions)])[:-1])


def test_datasets_of_other_kinds_are_covered_in_our_frames(robot, tmp_path):
    episodes = truths(robot)
    file = write_robomimic(tmp_path / 'stack.hdf5', episodes)
    coverage = measure([file], robot, QUICK)
    assert (coverage.n_motions, coverage.n_frames) == (3, sum(len(episode.joints) for episode in episodes))
    reached = np.concatenate([episode.poses[:, :3, 3] for episode in episodes])
    np.testing.assert_allclose(coverage.position_range_m, [reached.min(0), reached.max(0)], atol=1e-6)
    told = np.concatenate([episode.commands[:, :3, 3] for episode in episodes])
    needs = compare_task(file, coverage)
    np.testing.assert_allclose(needs.own.position_range_m, [told.min(0), told.max(0)], atol=1e-5)
    valid = measure([file], robot, QUICK, filter_key='valid')
    assert (valid.n_motions, valid.n_frames) == (1, len(episodes[-1].joints))
    assert measure([file], robot, QUICK, every=2).sources[0]['rate_hz'] == 10.0


@pytest.mark.parametrize('kind', ['recordings', 'dataset'])
def test_blocks_are_small_and_their_edges_do_not_count(robot, kind, request, monkeypatch):
    path = request.getfixturevalue(kind)
    whole = measure([path], robot, QUICK)
    monkeypatch.setattr(coverage_sources, 'BLOCK_FRAMES', 7)
    assert max(len(one) for one in open_source(path, robot, 20.0).blocks()) == 7
    portions = measure([path], robot, QUICK)
    whole.duration_s = portions.duration_s
    assert figures(whole) == figures(portions)


def test_recordings_are_resampled_to_the_rate(robot, recordings):
    twenty, five = (measure([recordings], robot, replace(QUICK, rate_hz=rate)) for rate in (20.0, 5.0))
    assert five.n_frames == pytest.approx(twenty.n_frames / 4, abs=4)
    assert five.duration_s == pytest.approx(twenty.duration_s, rel=0.02)
    assert five.linear_m_s.maximum == pytest.approx(twenty.linear_m_s.maximum, rel=0.1)


def test_nothing_to_measure_is_refused(robot, tmp_path, recordings):
    for path, message in ((tmp_path / 'no', 'does not exist'), (tmp_path, 'is an empty folder')):
        with pytest.raises(
            DatasetError, match=f'{path} {message}; valid: a LeRobot v3 dataset .*motion files'
        ):
            open_source(path, robot, 20.0)
    assert (
        open_source(recordings.parent, robot, 20.0).path == recordings.parent
    )  # folders below are looked into
    (tmp_path / 'readme.txt').touch()
    with pytest.raises(DatasetError, match='is none of the datasets that can be read'):
        open_source(tmp_path, robot, 20.0)
    with pytest.raises(DatasetError, match=r'no motion in .* can be used at 1e-05 Hz: 4 files'):
        measure([recordings], robot, replace(QUICK, rate_hz=1e-5))


def test_another_arm_is_refused_with_both_values(robot, recordings, dataset):
    other = load_robot('fr3')
    for path in (recordings, dataset):
        with pytest.raises(FingerprintMismatch) as error:
            measure([path], other, QUICK)
        assert 'panda_base' in str(error.value) and 'fr3_link0' in str(error.value)
        assert str(path) in str(error.value) and "'fr3'" in str(error.value)


def test_damaged_data_are_refused(robot, recordings, dataset, motions, tmp_path):
    cut = tmp_path / 'cut'
    shutil.copytree(recordings, cut)
    file = cut / 'motion_000002.arrow'
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=r'motion_000002\.arrow is cut short'):
        measure([cut], robot, QUICK)

    spoiled = motions[0].actions.copy()
    spoiled[5, 1] = np.nan
    nan = write_motions(tmp_path / 'nan', [replace(motions[0], actions=spoiled)])
    with pytest.raises(DatasetError, match=r'nan, frame 0 \+ 5: joints .* must be finite'):
        measure([nan], robot, QUICK)
    flat = motions[0].actions.copy()
    flat[3, 3:9] = 0
    degenerate = write_motions(tmp_path / 'flat', [replace(motions[0], actions=flat)])
    with pytest.raises(DatasetError, match=r'frame 0 \+ 3: .*two independent columns of a rotation'):
        measure([degenerate], robot, QUICK)

    broken = tmp_path / 'broken'
    shutil.copytree(dataset, broken)
    data = broken / 'data/chunk-000/file-000.parquet'
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(DatasetError, match=f'{broken}: a data file is missing or damaged'):
        measure([broken], robot, QUICK)
    data.unlink()
    with pytest.raises(DatasetError, match='do not fit meta/episodes'):
        measure([broken], robot, QUICK)


def test_a_dataset_without_the_columns_is_refused(robot, dataset, tmp_path):
    foreign = tmp_path / 'foreign'
    shutil.copytree(dataset, foreign)
    info = json.loads((foreign / 'meta/info.json').read_text())
    del info['features']['observation.pose']
    (foreign / 'meta/info.json').write_text(json.dumps(info))
    with pytest.raises(DatasetError, match=r"no column 'observation\.pose'; it has \['action'"):
        measure([foreign], robot, QUICK)
    assert next(open_source(foreign, robot, 20.0, 'commanded').blocks())


# --- a task beside it ---------------------------------------------------------------------------


def test_a_task_inside_what_is_covered_is_served(robot, dataset):
    needs = compare_task(dataset, measure([dataset], robot, QUICK))
    report = needs.to_dict()
    assert (report['inside_range'], report['poses_covered']) == (1.0, 1.0)
    assert report['voxels_needed'] == report['voxels_covered'] == int(needs.stage1.visited.sum())
    assert needs.verdict().startswith('every commanded position is inside the range of Stage 1; 100.0%')


def test_a_task_that_leaves_the_range_is_named_by_axis_and_share(robot, motions, dataset, tmp_path):
    def shifted(actions):
        moved = actions.copy()
        moved[:, 0] += 0.2
        moved[:, 3:9] = action_from_pose(pose_from_position_rotation(np.zeros(3), np.eye(3)), 0.0)[3:9]
        return moved

    stage1 = measure([dataset], robot, QUICK)
    needs = compare_task(write_dataset(tmp_path / 'task', robot, motions, shifted), stage1)
    x = np.concatenate([motion.actions[:, 0] for motion in motions]) + np.float32(0.2)
    above = float((x > stage1.position_range_m[1, 0] + 1e-3).mean())
    report = needs.to_dict()
    assert 0 < above < 1
    assert report['axes']['x']['above'] == pytest.approx(above)
    assert report['axes']['x']['beyond_m'] == [0.0, pytest.approx(0.2, abs=1e-6)]
    assert [report['axes'][axis]['above'] + report['axes'][axis]['below'] for axis in 'yz'] == [0, 0]
    assert report['inside_range'] == pytest.approx(1 - above)
    assert report['orientations_covered'] == report['poses_covered'] == 0.0  # a tool that points up
    assert report['positions_covered'] < 1
    assert needs.verdict().startswith('Stage 2 will refuse this task')
    assert f'x above by up to 0.200 m in {above:.1%} of the frames' in needs.verdict()


def test_commanded_poses_count_not_where_the_arm_got(robot, motions, dataset, tmp_path):
    far = write_dataset(tmp_path / 'far', robot, motions, lambda actions: actions + np.eye(10)[2] * 2.0)
    stage1 = measure([dataset], robot, QUICK)
    assert compare_task(far, stage1).to_dict()['inside_range'] == 0.0
    assert measure([far], robot, QUICK).position_range_m.tolist() == stage1.position_range_m.tolist()


def test_options_for_stage_1_leave_the_task_as_it_is_and_do_not_suit_recordings(
    monkeypatch, robot, dataset, recordings, tmp_path
):
    whole = measure([dataset], robot, QUICK).n_frames
    run_cli(
        monkeypatch, dataset, '--robot', 'panda_sim', '--task', dataset, '--every', 2, '--out', tmp_path / 'out',
        '--no-pictures',
    )  # fmt: skip
    report = json.loads((tmp_path / 'out/coverage.json').read_text())
    assert [source['frames'] for source in report['task']['sources']] == [whole]
    assert report['frames'] < whole
    for options in ({'mapping': 'droid_lerobot'}, {'filter_key': 'train'}, {'every': 2}):
        (name,) = options
        with pytest.raises(DatasetError, match=f'{name} .* is for datasets; leave it out'):
            measure([recordings], robot, QUICK, **options)


# --- the command --------------------------------------------------------------------------------


def run_cli(monkeypatch, *arguments):
    quick = ['--reach-samples', '2000']
    monkeypatch.setenv('COLUMNS', '500')  # no path is broken, however long the tests' folder is called
    monkeypatch.setattr(sys, 'argv', ['decoupled-policy', 'coverage', *map(str, arguments), *quick])
    cli.main()


def test_the_command_leaves_a_table_a_report_and_pictures(monkeypatch, capsys, recordings, dataset, tmp_path):
    out = tmp_path / 'a' / 'report'
    run_cli(monkeypatch, recordings, '--robot', 'panda_sim', '--task', dataset, '--out', out)
    printed = capsys.readouterr().out
    for text in ('position x', 'joint7', 'of the reachable', 'gripper', 'every commanded position is inside'):
        assert text in printed

    def refuse(constant):
        raise AssertionError(f'{constant} is no JSON')

    report = json.loads((out / 'coverage.json').read_text(), parse_constant=refuse)
    assert (
        report['frames']
        == sum(report['workspace']['visits']['count']) + report['workspace']['frames_outside']
    )
    assert report['task']['inside_range'] == 1
    assert {path.name for path in out.iterdir()} == {
        'coverage.json', 'workspace.png', 'joints.png', 'speeds.png', 'directions.png',
    }  # fmt: skip
    for path in out.glob('*.png'):
        picture = cv2.imread(str(path))
        assert min(picture.shape[:2]) > 500
        assert picture.std() > 10  # something is drawn


def test_a_single_frame_has_no_speed_and_still_a_report(monkeypatch, capsys, robot, motions, tmp_path):
    one = write_dataset(
        tmp_path / 'one', robot, [replace(motions[0], **{
            name: getattr(motions[0], name)[:1] for name in ('stamps_ns', 'joint_positions', 'actions')
        })],
    )  # fmt: skip
    run_cli(monkeypatch, one, '--robot', 'panda_sim', '--task', one, '--out', tmp_path / 'out')
    report = json.loads((tmp_path / 'out/coverage.json').read_text())
    assert report['linear_speed_m_s']['p99'] is None
    assert report['frames'] == 1
    assert (tmp_path / 'out/speeds.png').is_file()
    assert 'linear speed' in capsys.readouterr().out


def test_mistakes_end_in_one_line(monkeypatch, capsys, recordings, tmp_path):
    for arguments, message in (
        ([tmp_path / 'no', '--robot', 'panda_sim'], 'does not exist'),
        ([recordings, '--robot', 'fr3'], "robot 'fr3' do not belong together"),
        ([recordings, '--robot', 'pandora'], "no robot 'pandora'"),
        ([recordings, '--robot', 'panda_sim', '--voxel-m', '1e-5'], 'voxel_m must be at least'),
        ([recordings, '--robot', 'panda_sim', '--rate-hz', '0'], 'rate_hz must be positive'),
        (['--robot', 'panda_sim'], 'at least one folder of motion files or dataset'),
    ):
        with pytest.raises(SystemExit) as stop:
            run_cli(monkeypatch, *arguments, '--out', tmp_path / 'out')
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_names_with_brackets_and_dollar_signs_are_printed_and_drawn(
    monkeypatch, capsys, recordings, tmp_path
):
    named = tmp_path / '[/red]_$x_{$'
    shutil.copytree(recordings, named)
    run_cli(monkeypatch, named, '--robot', 'panda_sim', '--out', tmp_path / 'out[/]')
    printed = ' '.join(capsys.readouterr().out.split())
    assert '[/red]_$x_{$' in printed and 'out[/]: coverage.json' in printed
    assert (tmp_path / 'out[/]' / 'workspace.png').is_file()


def test_a_report_that_can_not_be_written_is_refused_before_the_work(
    monkeypatch, capsys, recordings, tmp_path
):
    (tmp_path / 'file').touch()
    monkeypatch.setattr('decoupled_policy_ros.data.coverage.command.measure', None)  # is not come to
    with pytest.raises(SystemExit):
        run_cli(monkeypatch, recordings, '--robot', 'panda_sim', '--out', tmp_path / 'file' / 'out')
    assert 'out can not be made: ' in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named_and_numbers_can_be_had(
    monkeypatch, capsys, recordings, tmp_path
):
    monkeypatch.delitem(sys.modules, 'decoupled_policy_ros.data.coverage.pictures', raising=False)
    for name in [name for name in sys.modules if name.partition('.')[0] == 'matplotlib']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    options = (recordings, '--robot', 'panda_sim', '--out', tmp_path / 'out')
    with pytest.raises(SystemExit):
        run_cli(monkeypatch, *options)
    assert "pip install 'decoupled_policy_ros[train]'" in capsys.readouterr().err
    run_cli(monkeypatch, *options, '--no-pictures')
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['coverage.json']
