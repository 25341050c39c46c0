"""LeRobot v3 datasets in the ways in which LeRobot itself and others write them, which are not ours."""

import json

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decoupled_policy_ros.data.datasets.dataset import Dataset
from decoupled_policy_ros.errors import DatasetError

LENGTHS = (4, 3, 5)
TASKS = ['open the door', 'close it']
RATE_HZ = 12.5
EPISODES = 'meta/episodes/chunk-000/file-000.parquet'


@pytest.fixture
def foreign(tmp_path):
    """Lists of any length, pictures declared as (3, H, W), two episodes in a row group, nothing about success."""
    rng, root, n = np.random.default_rng(0), tmp_path / 'foreign', sum(LENGTHS)
    pictures = rng.integers(0, 256, (n, 2, 2, 3), np.uint8).repeat(8, 1).repeat(10, 2)
    columns = {
        'observation.state': rng.normal(size=(n, 7)).astype(np.float32),
        'grid': rng.normal(size=(n, 2, 3)).astype(np.float32),
        'next.reward': rng.normal(size=n).astype(np.float32),
        'next.done': np.arange(n) % 4 == 3,
    }
    episode = np.repeat(np.arange(3), LENGTHS)
    frame = np.concatenate([np.arange(length) for length in LENGTHS])
    # The second episode is given two instructions, one after the other.
    task = np.where(episode == 1, frame > 0, episode == 2).astype(np.int64)
    arrays = {name: pa.array(rows.tolist()) for name, rows in columns.items()}
    arrays['observation.images.top'] = pa.array(
        [{'bytes': cv2.imencode('.png', p[..., ::-1])[1].tobytes(), 'path': None} for p in pictures],
        pa.struct([('bytes', pa.binary()), ('path', pa.string())]),
    )
    index = {'frame_index': frame, 'episode_index': episode, 'index': np.arange(n), 'task_index': task}
    arrays |= {name: pa.array(rows) for name, rows in index.items()}
    arrays['timestamp'] = pa.array((frame / RATE_HZ).astype(np.float32))
    table, places = pa.table(arrays), ((0, 0, 7), (1, 0, 5))  # chunk, file, rows
    for first, (chunk, file, rows) in zip((0, 7), places, strict=True):
        path = root / f'data/chunk-{chunk:03d}/file-{file:03d}.parquet'
        path.parent.mkdir(parents=True)
        pq.write_table(table.slice(first, rows), path)
    (root / EPISODES).parent.mkdir(parents=True)
    ends = np.cumsum(LENGTHS)
    rows = {
        'episode_index': [0, 1, 2], 'tasks': [TASKS[:1], TASKS, TASKS[1:]], 'length': list(LENGTHS),
        'data/chunk_index': [0, 0, 1], 'data/file_index': [0, 0, 0],
        'dataset_from_index': (ends - LENGTHS).tolist(), 'dataset_to_index': ends.tolist(),
    }  # fmt: skip
    pq.write_table(pa.table(rows), root / EPISODES)
    tasks = pa.table({'task_index': [0, 1], '__index_level_0__': TASKS})
    pq.write_table(tasks, root / 'meta/tasks.parquet')
    features = {
        'observation.state': {'dtype': 'float32', 'shape': [7], 'names': {'motors': list('abcdefg')}},
        'grid': {'dtype': 'float32', 'shape': [2, 3], 'names': None},
        'next.reward': {'dtype': 'float32', 'shape': [1], 'names': None},
        'next.done': {'dtype': 'bool', 'shape': [1], 'names': None},
        'observation.images.top': {
            'dtype': 'image', 'shape': [3, 16, 20], 'names': ['channels', 'height', 'width'],
        },
        'timestamp': {'dtype': 'float32', 'shape': [1], 'names': None},
        **{name: {'dtype': 'int64', 'shape': [1], 'names': None} for name in index},
    }  # fmt: skip
    info = {
        'codebase_version': 'v3.0', 'robot_type': None, 'total_episodes': 3, 'total_frames': n, 'total_tasks': 2,
        'chunks_size': 1, 'fps': RATE_HZ, 'splits': {'train': '0:3'}, 'video_path': None, 'features': features,
        'data_path': 'data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet',
    }  # fmt: skip
    (root / 'meta/info.json').write_text(json.dumps(info))
    return root, columns, pictures


def test_what_others_write_is_read(foreign):
    root, columns, pictures = foreign
    dataset = Dataset.open(root)
    assert (dataset.rate_hz, dataset.tasks, dataset.cameras) == (RATE_HZ, TASKS, ['top'])
    assert dataset.conventions == {}
    for name, rows in columns.items():
        wanted = rows.reshape(len(rows), *dataset.features[name]['shape'])
        np.testing.assert_array_equal(dataset.column(name), wanted)
        for e, start in enumerate(dataset.starts):
            np.testing.assert_array_equal(dataset.column(name, e), wanted[start : start + LENGTHS[e]])
    np.testing.assert_array_equal(dataset.images('top'), pictures)
    np.testing.assert_array_equal(dataset.images('top', 1), pictures[4:7])
    assert dataset.images('top', 2, (8, 10)).shape == (5, 8, 10, 3)
    assert [dataset.task_of(e) for e in range(3)] == [TASKS[0], TASKS[0], TASKS[1]]
    episode = dataset.episode(2)
    assert (episode.length, episode.instruction, episode.success) == (5, TASKS[1], None)
    np.testing.assert_array_equal(episode.arrays['index'], np.arange(7, 12))
    with pytest.raises(DatasetError, match=r'decoupled_policy.fingerprint'):
        _ = dataset.fingerprint


def change(root, name, values):
    table = pq.read_table(root / EPISODES)
    i = table.schema.get_field_index(name)
    pq.write_table(table.set_column(i, name, pa.array(values)), root / EPISODES)


@pytest.mark.parametrize(
    ('column', 'values', 'message'),
    [
        ('episode_index', [0, 1, 3], 'does not count its episodes from 0'),
        ('dataset_to_index', [4, 8, 12], 'episode 1 does not end where its length says'),
        ('length', [4, 3, 4], 'do not add up to 12 frames'),
        ('data/file_index', [0, 0, 1], 'data file is missing or damaged'),
        ('data/chunk_index', [0, 1, 1], 'rows for 5 frames|missing or damaged'),
    ],
)
def test_metadata_that_contradict_themselves_are_refused(foreign, column, values, message):
    root, _, _ = foreign
    change(root, column, values)
    with pytest.raises(DatasetError, match=message):
        Dataset.open(root).column('observation.state', 2)


def test_a_dataset_of_an_older_version_is_refused_by_its_version(tmp_path):
    (tmp_path / 'meta').mkdir()  # v2 has episodes.jsonl in place of the folder of episodes
    (tmp_path / 'meta/info.json').write_text(json.dumps({'codebase_version': 'v2.1', 'total_episodes': 1}))
    (tmp_path / 'meta/episodes.jsonl').write_text('{"episode_index": 0, "tasks": ["x"], "length": 3}')
    with pytest.raises(DatasetError, match=r'has layout v2\.1; this package reads v3\.0'):
        Dataset.open(tmp_path)


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ([16, 20, 4], r'has the shape \(16, 20, 4\)'),
        ([16, 20], r'has the shape \(16, 20\)'),
        ([3, 20, 16], r'\(16, 20\)'),
    ],
)
def test_pictures_of_another_shape_are_refused(foreign, shape, message):
    root, _, _ = foreign
    info = json.loads((root / 'meta/info.json').read_text())
    info['features']['observation.images.top']['shape'] = shape
    (root / 'meta/info.json').write_text(json.dumps(info))
    with pytest.raises(DatasetError, match=message):
        Dataset.open(root).images('top')
