"""Datasets, windows and motions: what is written comes back, and what is broken is refused."""

import contextlib
import itertools
import json
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoupled_policy_ros.data.datasets import lerobot_layout as layout
from decoupled_policy_ros.data.datasets.dataset import Dataset, DatasetSpec, DatasetWriter
from decoupled_policy_ros.data.datasets.windows import Windows
from decoupled_policy_ros.data.motions.motions import (
    AS_RECORDED_HZ,
    Motion,
    MotionWriter,
    demonstration_motions,
    motion_actions,
    read_motions,
    resample,
    synth_motions,
)
from decoupled_policy_ros.data.readers.opening import describe
from decoupled_policy_ros.errors import ConfigError, DatasetError, FingerprintMismatch
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.kinematics import Kinematics

CAMERAS = {'agentview': (12, 16), 'wrist': (10, 10)}


@pytest.fixture(scope='module')
def robot():
    return load_robot('panda_sim')


def make_frames(rng, length, vectors=(('object_state', 3),), cameras=CAMERAS):
    dims = {'joint_positions': 9, 'proprioception': 9, 'pose': 10, **dict(vectors)}
    frames = {f'observation.{name}': rng.normal(size=(length, dim)) for name, dim in dims.items()}
    frames['action'] = rng.normal(size=(length, 10))
    for name, size in cameras.items():
        frames[f'observation.images.{name}'] = rng.integers(0, 256, (length, *size, 3), np.uint8)
    return frames


def write_dataset(root, robot, lengths=(5, 1, 7), seed=0):
    rng = np.random.default_rng(seed)
    episodes = [make_frames(rng, length) for length in lengths]
    with DatasetWriter(root, DatasetSpec.of(robot, 20.0, CAMERAS, {'object_state': 3})) as writer:
        for i, frames in enumerate(episodes):
            writer.add_episode('lift the cube' if i % 2 == 0 else 'stack', i != 1, frames)
    return episodes


def test_dataset_round_trip(tmp_path, robot):
    episodes = write_dataset(tmp_path / 'set', robot)
    dataset = Dataset.open(tmp_path / 'set')
    assert (dataset.n_episodes, dataset.n_frames, dataset.rate_hz) == (3, 13, 20.0)
    assert dataset.lengths.tolist() == [5, 1, 7]
    assert dataset.starts.tolist() == [0, 5, 6]
    assert dataset.cameras == ['agentview', 'wrist']
    assert dataset.fingerprint == Fingerprint.of(robot, 20.0)
    for i, frames in enumerate(episodes):
        episode = dataset.episode(i)
        assert episode.instruction == ('lift the cube' if i % 2 == 0 else 'stack')
        assert episode.success is (i != 1)
        assert episode.arrays['frame_index'].tolist() == list(range(episode.length))
        for name, array in frames.items():
            if name.startswith('observation.images.'):
                np.testing.assert_array_equal(episode.images(name.removeprefix('observation.images.')), array)
            else:
                np.testing.assert_array_equal(episode.arrays[name], array.astype(np.float32))
    for name in episodes[0]:
        whole = np.concatenate([frames[name] for frames in episodes])
        if name.startswith('observation.images.'):
            np.testing.assert_array_equal(dataset.images(name), whole)
        else:
            np.testing.assert_array_equal(dataset.column(name), whole.astype(np.float32))
    np.testing.assert_allclose(dataset.column('timestamp', 2), np.arange(7) / 20, atol=1e-6)


def test_dataset_spreads_over_files_and_reads_across_them(tmp_path, robot, monkeypatch):
    monkeypatch.setattr(layout, 'DATA_FILE_MB', 0)
    monkeypatch.setattr(layout, 'CHUNK_FILES', 2)
    episodes = write_dataset(tmp_path / 'set', robot, (3, 4, 5))
    files = sorted(str(f.relative_to(tmp_path / 'set')) for f in (tmp_path / 'set/data').rglob('*.parquet'))
    assert files == [f'data/chunk-{c:03d}/file-{f:03d}.parquet' for c, f in ((0, 0), (0, 1), (1, 0))]
    dataset = Dataset.open(tmp_path / 'set')
    actions = np.concatenate([frames['action'] for frames in episodes]).astype(np.float32)
    np.testing.assert_array_equal(dataset.column('action'), actions)
    np.testing.assert_array_equal(dataset.episode(2).arrays['action'], actions[7:])
    np.testing.assert_array_equal(dataset.images('wrist', 1), episodes[1]['observation.images.wrist'])


def test_episode_is_found_where_row_groups_span_episodes(tmp_path, robot):
    """Other writers put several episodes into one row group, or cut an episode in two."""
    episodes = write_dataset(tmp_path / 'set', robot, (5, 6, 7))
    path = tmp_path / 'set/data/chunk-000/file-000.parquet'
    table = pq.read_table(path)
    for size in (4, 9, 100):
        pq.write_table(table, path, row_group_size=size)
        dataset = Dataset.open(tmp_path / 'set')
        for i, frames in enumerate(episodes):
            np.testing.assert_array_equal(dataset.column('action', i), frames['action'].astype(np.float32))
            np.testing.assert_array_equal(dataset.images('wrist', i), frames['observation.images.wrist'])


def test_dataset_layout_follows_lerobot_v3(tmp_path, robot):
    write_dataset(tmp_path / 'set', robot)
    info = json.loads((tmp_path / 'set/meta/info.json').read_text())
    assert info['codebase_version'] == 'v3.0'
    assert (info['total_episodes'], info['total_frames'], info['total_tasks']) == (3, 13, 2)
    assert info['fps'] == 20
    assert isinstance(info['fps'], int)
    assert info['splits'] == {'train': '0:3'}
    assert info['features']['observation.images.wrist'] == {
        'dtype': 'image', 'shape': [10, 10, 3], 'names': ['height', 'width', 'channels'],
    }  # fmt: skip
    schema = pq.read_schema(tmp_path / 'set' / info['data_path'].format(chunk_index=0, file_index=0))
    assert set(schema.names) == set(info['features'])
    assert str(schema.field('action').type) == 'fixed_size_list<element: float>[10]'
    assert str(schema.field('observation.images.wrist').type) == 'struct<bytes: binary, path: string>'
    assert str(schema.field('timestamp').type) == 'float'
    tasks = pq.read_table(tmp_path / 'set/meta/tasks.parquet')
    assert tasks.to_pydict() == {'task_index': [0, 1], 'task': ['lift the cube', 'stack']}
    assert json.loads(tasks.schema.metadata[b'pandas'])['index_columns'] == ['task']
    rows = pq.read_table(tmp_path / 'set/meta/episodes/chunk-000/file-000.parquet').to_pylist()
    assert [(r['dataset_from_index'], r['dataset_to_index'], r['length']) for r in rows] == [
        (0, 5, 5), (5, 6, 1), (6, 13, 7),
    ]  # fmt: skip
    assert rows[1]['tasks'] == ['stack']
    assert rows[1]['episode_index'] == 1
    assert np.shape(rows[0]['stats/observation.images.wrist/mean']) == (3, 1, 1)


def test_statistics_are_those_of_all_frames(tmp_path, robot):
    episodes = write_dataset(tmp_path / 'set', robot, (5, 1, 7))
    dataset = Dataset.open(tmp_path / 'set')
    actions = np.concatenate([frames['action'] for frames in episodes]).astype(np.float32).astype(float)
    statistics = dataset.statistics['action']
    for name, expected in (
        ('mean', actions.mean(0)), ('std', actions.std(0)), ('min', actions.min(0)), ('max', actions.max(0)),
    ):  # fmt: skip
        np.testing.assert_allclose(statistics[name], expected, atol=1e-12)
    assert statistics['count'].tolist() == [13]
    images = np.concatenate([frames['observation.images.wrist'] for frames in episodes]) / 255
    np.testing.assert_allclose(
        dataset.statistics['observation.images.wrist']['mean'].ravel(), images.mean((0, 1, 2)), atol=1e-12
    )


def test_dataset_appears_only_when_complete(tmp_path, robot):
    frames = make_frames(np.random.default_rng(0), 4)
    writer = DatasetWriter(tmp_path / 'set', DatasetSpec.of(robot, 20.0, CAMERAS, {'object_state': 3}))
    writer.add_episode('lift', True, frames)
    assert not (tmp_path / 'set').exists()
    with pytest.raises(DatasetError, match='LeRobot'):
        Dataset.open(tmp_path / 'set')
    writer.close()
    assert Dataset.open(tmp_path / 'set').n_episodes == 1
    assert [path.name for path in tmp_path.iterdir()] == ['set']


def test_dataset_writer_leaves_nothing_behind_after_an_error(tmp_path, robot):
    with (
        pytest.raises(DatasetError, match='columns missing'),
        DatasetWriter(tmp_path / 'set', DatasetSpec.of(robot, 20.0)) as writer,
    ):
        writer.add_episode('lift', True, {'action': np.zeros((3, 10))})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DatasetError, match='no episode'):
        DatasetWriter(tmp_path / 'set', DatasetSpec.of(robot, 20.0)).close()
    assert list(tmp_path.iterdir()) == []


def test_dataset_writer_refuses_an_existing_folder(tmp_path, robot):
    (tmp_path / 'set').mkdir()
    with pytest.raises(DatasetError, match='exists already'):
        DatasetWriter(tmp_path / 'set', DatasetSpec.of(robot, 20.0))


@pytest.mark.parametrize(
    ('column', 'value', 'message'),
    [
        ('action', np.zeros((4, 9)), r'action has shape \(4, 9\)'),
        ('observation.pose', np.zeros((3, 10)), r'observation.pose has shape \(3, 10\)'),
        ('observation.pose', np.full((4, 10), np.nan), 'not finite in frame 0'),
        ('observation.images.wrist', np.zeros((4, 10, 11, 3), np.uint8), r'\(4, 10, 10, 3\)'),
        ('observation.images.wrist', np.zeros((4, 10, 10, 3)), 'images are uint8'),
        ('observation.forces', np.zeros((4, 6)), r"unknown \['observation.forces'\]"),
    ],
)
def test_dataset_writer_refuses_frames_that_do_not_fit(tmp_path, robot, column, value, message):
    writer = DatasetWriter(tmp_path / 'set', DatasetSpec.of(robot, 20.0, CAMERAS, {'object_state': 3}))
    frames = make_frames(np.random.default_rng(0), 4) | {column: value}
    with pytest.raises(DatasetError, match=message):
        writer.add_episode('lift', True, frames)
    writer.abort()


def test_damaged_datasets_are_refused(tmp_path, robot):
    write_dataset(tmp_path / 'set', robot)

    def damaged(name):
        shutil.rmtree(tmp_path / 'copy', ignore_errors=True)
        shutil.copytree(tmp_path / 'set', tmp_path / 'copy')
        return tmp_path / 'copy' / name

    info = damaged('meta/info.json')
    info.write_text(info.read_text().replace('v3.0', 'v2.1'))
    with pytest.raises(DatasetError, match=r'layout v2.1; this package reads v3.0'):
        Dataset.open(tmp_path / 'copy')

    data = damaged('data/chunk-000/file-000.parquet')
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(DatasetError, match='missing or damaged'):
        Dataset.open(tmp_path / 'copy').column('action')

    info = damaged('meta/info.json')
    info.write_text(info.read_text().replace('"total_frames": 13', '"total_frames": 12'))
    with pytest.raises(DatasetError, match='do not add up to 12'):
        Dataset.open(tmp_path / 'copy')

    info = damaged('meta/info.json')
    values = json.loads(info.read_text())
    del values['decoupled_policy']
    values['features']['observation.images.wrist']['shape'] = [20, 20, 3]
    info.write_text(json.dumps(values))
    with pytest.raises(DatasetError, match=r'decoupled_policy.fingerprint'):
        _ = Dataset.open(tmp_path / 'copy').fingerprint
    with pytest.raises(DatasetError, match=r'row 0: the image is \(10, 10\)'):
        Dataset.open(tmp_path / 'copy').images('wrist')


def changed(**values):
    return lambda info: {**info, **values}


def without(name):
    return lambda info: {key: value for key, value in info.items() if key != name}


def with_feature(feature):
    return lambda info: {**info, 'features': {**info['features'], 'action': feature}}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda info: [info], 'info.json must be an object, got list'),
        (without('codebase_version'), 'has layout None'),
        (without('total_frames'), 'info.json is damaged: total_frames is missing'),
        (without('data_path'), 'data_path is missing'),
        (without('features'), 'features is missing'),
        (changed(features=[]), r'features is \[\]'),
        (changed(fps=None), 'fps is None'),
        (changed(decoupled_policy=None), 'decoupled_policy is None'),
        (with_feature('float32'), 'features.action.dtype is missing'),
        (with_feature({'dtype': 'float32', 'shape': None}), 'features.action.shape is None'),
        (with_feature({'dtype': 'video', 'shape': [8, 8, 3]}), 'video_path is None'),
    ],
)
def test_an_info_file_that_lacks_something_is_refused_naming_it(tmp_path, robot, change, message):
    write_dataset(tmp_path / 'set', robot)
    info = tmp_path / 'set/meta/info.json'
    info.write_text(json.dumps(change(json.loads(info.read_text()))))
    for opened in (Dataset.open, lambda path: describe(path, robot)):
        with pytest.raises(DatasetError, match=message):
            opened(tmp_path / 'set')


def test_episodes_without_their_places_are_refused(tmp_path, robot):
    write_dataset(tmp_path / 'set', robot)
    path = tmp_path / 'set/meta/episodes/chunk-000/file-000.parquet'
    pq.write_table(pq.read_table(path).drop_columns(['length', 'data/file_index']), path)
    with pytest.raises(DatasetError, match='meta/episodes lacks the columns length, data/file_index'):
        Dataset.open(tmp_path / 'set')


def test_unknown_columns_and_episodes_are_named(tmp_path, robot):
    write_dataset(tmp_path / 'set', robot)
    dataset = Dataset.open(tmp_path / 'set')
    with pytest.raises(DatasetError, match="no column 'actoin'"):
        dataset.column('actoin')
    with pytest.raises(DatasetError, match=r'no column .*front'):
        dataset.images('front')
    with pytest.raises(DatasetError, match='it has 0 to 2'):
        dataset.episode(3)


@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=6),
    horizon=st.integers(1, 20),
    n_obs_steps=st.integers(1, 4),
    data=st.data(),
)
def test_windows_equal_a_loop(lengths, horizon, n_obs_steps, data):
    windows = Windows(lengths, horizon, n_obs_steps)
    places = [(e, t) for e, length in enumerate(lengths) for t in range(length)]
    assert len(windows) == len(places)
    batch = data.draw(st.lists(st.integers(0, len(places) - 1), max_size=30))
    observations, actions = windows.observations(batch), windows.actions(batch)
    mask = windows.mask(batch)
    assert observations.shape == (len(batch), n_obs_steps)
    assert actions.shape == mask.shape == (len(batch), horizon)
    assert windows.episodes(batch).tolist() == [places[number][0] for number in batch]
    for row, number in enumerate(batch):
        e, t = places[number]
        start, length = sum(lengths[:e]), lengths[e]
        for rows, count in ((observations, n_obs_steps), (actions, horizon)):
            for k in range(count):
                frame = t - n_obs_steps + 1 + k
                assert rows[row, k] == start + min(max(frame, 0), length - 1)
                assert count == n_obs_steps or mask[row, k] == (0 <= frame < length)


@pytest.mark.parametrize('arguments', [([3, 0], 16, 2), ([3], 0, 2), ([3], 16, 0), ([[3]], 16, 2)])
def test_windows_refuse_what_makes_no_window(arguments):
    with pytest.raises(DatasetError):
        Windows(*arguments)


def test_windows_that_are_not_there_are_refused():
    windows = Windows([3, 4], 16, 2)
    for batch in ([0, 7], [-1]):
        with pytest.raises(DatasetError, match='numbered 0 to 6'):
            windows.actions(batch)


def test_windows_of_25_million_frames_take_no_memory():
    tracemalloc.start()
    windows = Windows(np.full(100_000, 250), 16, 2)
    batch = np.random.default_rng(0).integers(0, len(windows), 1024)
    assert windows.actions(batch).shape == (1024, 16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(windows) == 25_000_000
    assert peak < 10 * 2**20


def some_samples(rng, n, start_ns=10**18):
    stamps = start_ns + np.arange(n, dtype=np.int64) * 1_000_000
    return stamps, rng.normal(size=(n, 8)).astype(np.float32), rng.normal(size=(n, 10)).astype(np.float32)


def test_motion_round_trip(tmp_path, robot):
    rng = np.random.default_rng(0)
    fingerprint = Fingerprint.of(robot, AS_RECORDED_HZ)
    expected = some_samples(rng, 700)
    with MotionWriter(tmp_path / 'a.arrow', fingerprint) as writer:
        for rows in (slice(0, 1), slice(1, 400), slice(400, 700)):
            writer.append(*(array[rows] for array in expected))
        writer.summarise(residual_mean_m=0.25)
        assert [path.name for path in tmp_path.iterdir()] == ['a.arrow.part']
    (motion,) = read_motions(tmp_path)
    for actual, wanted in zip(
        (motion.stamps_ns, motion.joint_positions, motion.actions), expected, strict=True
    ):
        np.testing.assert_array_equal(actual, wanted)
        assert actual.dtype == wanted.dtype
    assert motion.fingerprint == fingerprint
    assert motion.summary == {'residual_mean_m': 0.25}
    with pytest.raises(DatasetError, match='must not exist'):
        MotionWriter(tmp_path / 'a.arrow', fingerprint)


@pytest.fixture(scope='module')
def killed_writer(tmp_path_factory, robot):
    """Bytes of a motion file whose writer was killed, and after each of its batches its size and samples."""
    folder = tmp_path_factory.mktemp('killed')
    writer = MotionWriter(folder / 'm.arrow', Fingerprint.of(robot, AS_RECORDED_HZ), flush_s=0.0)
    samples, sizes, counts = some_samples(np.random.default_rng(1), 60), [], []
    part = folder / 'm.arrow.part'
    for first, end in ((0, 1), (1, 20), (20, 22), (22, 60)):
        writer.summarise(batch=len(sizes))
        writer.append(*(array[first:end] for array in samples))
        sizes.append(part.stat().st_size)
        counts.append(end)
    content = part.read_bytes()
    writer.abort()
    return content, sizes, counts, samples


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_recover_saves_every_complete_batch(tmp_path_factory, killed_writer, data):
    content, sizes, counts, samples = killed_writer
    near = st.sampled_from(sizes).flatmap(lambda size: st.integers(size - 12, min(size + 12, len(content))))
    cut = data.draw(st.integers(0, len(content)) | near)
    folder = tmp_path_factory.mktemp('cut')
    (folder / 'm.arrow.part').write_bytes(content[:cut])
    complete = sum(size <= cut for size in sizes)
    (recovery,) = MotionWriter.recover(folder)
    assert recovery.n_samples == ([0, *counts][complete])
    assert not (folder / 'm.arrow.part').exists()
    if complete == 0:
        assert recovery.path is None
        assert list(folder.iterdir()) == []
        return
    assert recovery.lost_bytes == cut - sizes[complete - 1]
    (motion,) = read_motions(recovery.path)
    n = counts[complete - 1]
    np.testing.assert_array_equal(motion.stamps_ns, samples[0][:n])
    np.testing.assert_array_equal(motion.joint_positions, samples[1][:n])
    np.testing.assert_array_equal(motion.actions, samples[2][:n])
    assert motion.summary == {'batch': complete - 1, 'recovered': True}


def test_recover_leaves_a_living_writer_alone_and_never_overwrites(tmp_path, robot, killed_writer):
    content = killed_writer[0]
    fingerprint = Fingerprint.of(robot, AS_RECORDED_HZ)
    (tmp_path / 'old.arrow').write_bytes(b'somebody else')
    (tmp_path / 'old.arrow.part').write_bytes(content)
    with MotionWriter(tmp_path / 'live.arrow', fingerprint) as writer:
        writer.append(*some_samples(np.random.default_rng(0), 5))
        recoveries = MotionWriter.recover(tmp_path)
        assert [r.path.name for r in recoveries] == ['old_recovered.arrow']
    assert (tmp_path / 'old.arrow').read_bytes() == b'somebody else'
    assert len(read_motions(tmp_path / 'live.arrow')[0]) == 5


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :]


def test_recover_keeps_the_bytes_of_what_is_damaged(tmp_path, killed_writer):
    content, sizes, counts, samples = killed_writer
    schema_bytes = content.index(b'fingerprint')
    for name, position, n_saved in (
        ('begin', 2, 0),  # of the schema's message
        ('schema', schema_bytes, 0),  # what it says of the arm
        ('middle', sizes[1] + 3, counts[1]),  # the beginning of the third batch
        ('length', sizes[1] + 6, counts[1]),  # which then says that it goes on beyond the end
        ('last', sizes[2] + 8, counts[2]),  # a whole batch that can't be read
    ):
        folder = tmp_path / name
        folder.mkdir()
        damaged = flipped(content, position)
        (folder / 'm.arrow.part').write_bytes(damaged)
        (recovery,) = MotionWriter.recover(folder)
        assert recovery.n_samples == n_saved, name
        assert recovery.damaged.name == 'm.arrow.part.damaged' and recovery.damaged.read_bytes() == damaged
        assert 'kept it as m.arrow.part.damaged' in str(recovery)
        assert MotionWriter.recover(folder) == []
        if n_saved:
            (motion,) = read_motions(folder)
            np.testing.assert_array_equal(motion.stamps_ns, samples[0][:n_saved])
        else:
            assert recovery.path is None and 'saved nothing' in str(recovery)
    (folder / 'm.arrow.part').write_bytes(damaged)  # another one of that name replaces nothing
    assert MotionWriter.recover(folder)[0].damaged.name == 'm.arrow.part.damaged1'


@pytest.mark.parametrize('name', ['own block', 'fingerprint', 'summary'])
def test_a_motion_file_whose_metadata_are_damaged_is_refused(tmp_path, robot, name):
    path = tmp_path / 'm.arrow'
    with MotionWriter(path, Fingerprint.of(robot, AS_RECORDED_HZ)) as writer:
        writer.append(*some_samples(np.random.default_rng(0), 5))
    content = path.read_bytes()
    place = {
        'own block': content.index(b'{"fingerprint'),
        'fingerprint': content.index(b'base_frame'),
        'summary': content.index(b'{}'),
    }[name]
    for byte in (b'"', b'\xff'):  # no JSON, no UTF-8
        path.write_bytes(content[:place] + byte + content[place + 1 :])
        with pytest.raises(DatasetError, match='no motion file' if name != 'summary' else 'cut short'):
            read_motions(path)


def test_every_flipped_byte_of_a_motion_files_head_is_read_or_refused(tmp_path, killed_writer):
    content, sizes, *_ = killed_writer
    path = tmp_path / 'm.arrow'
    for position in range(0, sizes[0], 3):
        path.write_bytes(flipped(content, position) + b'\xff\xff\xff\xff\x00\x00\x00\x00')
        with contextlib.suppress(DatasetError):
            read_motions(path)


def test_broken_motion_files_are_refused(tmp_path, robot, killed_writer):
    path = tmp_path / 'm.arrow'
    for content, message in (
        (killed_writer[0], 'cut short'),
        (killed_writer[0][:-7], 'cut short'),
        (b'', 'no motion file'),
        (b'\x00' * 500, 'no motion file'),
        (b'PAR1' * 100, 'no motion file'),
    ):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=message):
            read_motions(path)
    path.unlink()
    with pytest.raises(DatasetError, match='holds no motion file'):
        read_motions(tmp_path)
    with pytest.raises(DatasetError, match='can not be read'):
        read_motions(path)


@settings(deadline=None)
@given(
    steps_ms=st.lists(st.integers(1, 260), min_size=1, max_size=80),
    rate_hz=st.sampled_from([10.0, 20.0, 30.0]),
    max_gap_ms=st.integers(30, 200),
)
def test_resample_takes_the_latest_at_or_before_and_never_bridges_a_gap(steps_ms, rate_hz, max_gap_ms):
    stamps = 10**18 + np.cumsum([0, *steps_ms]).astype(np.int64) * 1_000_000
    n = len(stamps)
    joints = np.repeat(np.arange(n, dtype=np.float32)[:, None], 8, 1)
    fingerprint = Fingerprint('sha', 'base', 'ee', tuple('abcdefg'), 'rot6d_columns', AS_RECORDED_HZ)
    motion = Motion(stamps, joints, np.zeros((n, 10), np.float32), fingerprint)
    pieces = resample(motion, rate_hz, max_gap_ms / 1000)
    covered = []
    for piece in pieces:
        assert piece.fingerprint == replace(fingerprint, rate_hz=rate_hz)
        assert len(piece) >= 2
        np.testing.assert_allclose(np.diff(piece.stamps_ns), 1e9 / rate_hz, atol=1)
        assert piece.stamps_ns[0] in stamps
        for stamp, row in zip(piece.stamps_ns, piece.joint_positions[:, 0].astype(int), strict=True):
            assert stamps[row] <= stamp
            assert row + 1 == n or stamps[row + 1] > stamp
            assert stamp - stamps[row] <= max_gap_ms * 1_000_000
        covered.append((piece.stamps_ns[0], piece.stamps_ns[-1]))
    # Nothing is dropped: every uninterrupted run of samples that is two periods long is in some piece.
    cuts = [0, *(i + 1 for i in range(n - 1) if stamps[i + 1] - stamps[i] > max_gap_ms * 1_000_000), n]
    long_runs = [
        (stamps[a], stamps[b - 1])
        for a, b in itertools.pairwise(cuts)
        if stamps[b - 1] - stamps[a] >= round(1e9 / rate_hz)
    ]
    assert [first for first, _ in covered] == [first for first, _ in long_runs]
    for (_, end), (_, run_end) in zip(covered, long_runs, strict=True):
        assert end <= run_end < end + 1e9 / rate_hz + 2


def test_synthetic_motions_stay_inside_all_limits(robot):
    rate_hz = 500.0
    motions = synth_motions(robot, 6, seed=3, rate_hz=rate_hz)
    limits = robot.limits
    for motion in motions:
        joints = motion.joint_positions.astype(float)
        arm = joints[:, :7]
        assert np.all(arm > limits.lower_rad - 1e-6)
        assert np.all(arm < limits.upper_rad + 1e-6)
        assert np.all(np.abs(joints[:, 7]) <= 1)
        speed = np.diff(arm, axis=0) * rate_hz
        assert np.all(np.abs(speed) < limits.velocity_rad_s + 1e-3)
        acceleration = np.diff(speed, axis=0) * rate_hz
        assert np.all(
            np.abs(acceleration) < limits.acceleration_rad_s2 + 0.3
        )  # float32 noise: 2^-24 * 3 * 500^2
        position_m = motion.actions[:, :3].astype(float)
        assert np.all(position_m > limits.workspace_m[0] - 5e-3)
        assert np.all(position_m < limits.workspace_m[1] + 5e-3)
        ee_speed = np.linalg.norm(np.diff(position_m, axis=0), axis=1) * rate_hz
        assert ee_speed.max() < limits.ee_linear_velocity_m_s + 1e-3
        assert motion.fingerprint == Fingerprint.of(robot, rate_hz)
    gripper = np.concatenate([motion.joint_positions[:, 7] for motion in motions])
    assert gripper.min() == -1
    assert gripper.max() == 1
    assert np.ptp(np.concatenate([m.actions[:, :3] for m in motions]), axis=0).min() > 0.2


def test_synthetic_motions_are_seeded_and_their_poses_are_forward_kinematics(robot):
    first, again, other = (synth_motions(robot, 3, seed, 20.0) for seed in (5, 5, 6))
    more = synth_motions(robot, 4, 5, 20.0)
    for a, b, c in zip(first, again, more, strict=False):
        np.testing.assert_array_equal(a.joint_positions, b.joint_positions)
        np.testing.assert_array_equal(a.joint_positions, c.joint_positions)
    assert not np.array_equal(first[0].joint_positions[:10], other[0].joint_positions[:10])
    motion = first[0]
    np.testing.assert_allclose(
        motion.actions, motion_actions(Kinematics(robot), motion.joint_positions), atol=1e-5
    )
    np.testing.assert_array_equal(motion.actions[:, 9], motion.joint_positions[:, 7])
    with pytest.raises(ConfigError, match='positive'):
        synth_motions(robot, 0, 0, 20.0)


def test_demonstrations_give_motions(tmp_path, robot):
    episodes = write_dataset(tmp_path / 'set', robot, (4, 6))
    dataset = Dataset.open(tmp_path / 'set')
    motions = list(demonstration_motions(dataset, robot))
    assert [len(motion) for motion in motions] == [4, 6]
    positions = episodes[1]['observation.joint_positions'].astype(np.float32)
    np.testing.assert_array_equal(motions[1].joint_positions[:, :7], positions[:, :7])
    np.testing.assert_allclose(
        motions[1].joint_positions[:, 7], robot.gripper.normalised(positions[:, 7:]), atol=1e-6
    )
    np.testing.assert_array_equal(motions[1].actions, episodes[1]['observation.pose'].astype(np.float32))
    assert np.diff(motions[1].stamps_ns).tolist() == [50_000_000] * 5

    info = tmp_path / 'set/meta/info.json'
    info.write_text(info.read_text().replace('"ee_frame": "grip_site"', '"ee_frame": "flange"'))
    message = r"ee_frame: dataset .*set has 'flange', robot 'panda_sim' has 'grip_site'"
    with pytest.raises(FingerprintMismatch, match=message):
        list(demonstration_motions(Dataset.open(tmp_path / 'set'), robot))
