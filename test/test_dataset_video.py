"""Datasets whose images are video: what is written comes back, frame by frame, however episodes lie in files."""

import json
import shutil

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decoupled_policy_ros.data.datasets import lerobot_layout as layout
from decoupled_policy_ros.data.datasets.dataset import Dataset, DatasetSpec, DatasetWriter
from decoupled_policy_ros.data.datasets.video import DATASET_ENCODINGS, VideoWriter, frames_at
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.observation.image import fit_image
from decoupled_policy_ros.robot.description import load_robot

SIZE = (48, 64)
CODECS = ('h264', 'av1')


@pytest.fixture(scope='module')
def robot():
    return load_robot('panda_sim')


def numbered_images(rng, length, size=SIZE, first=0):
    """Smooth pictures whose frame number stands in them as six grey blocks, so that no frame passes for another."""
    coarse = (rng.integers(60, 200, (6, 8, 1)) + rng.integers(-20, 20, (6, 8, 3))).astype(np.float32)
    picture = cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC).clip(40, 215)
    images = np.repeat(picture[None].astype(np.uint8), length, 0)
    side = size[1] // 8
    for row in range(length):
        for bit in range(6):
            images[row, :side, bit * side : (bit + 1) * side] = 235 if (first + row) >> bit & 1 else 20
    return images


def number_of(image):
    side = image.shape[1] // 8
    blocks = [image[2 : side - 2, bit * side + 2 : (bit + 1) * side - 2].mean() for bit in range(6)]
    return sum(int(value > 128) << bit for bit, value in enumerate(blocks))


def frames_of(rng, images):
    n = len(next(iter(images.values())))
    dims = {
        'observation.joint_positions': 9,
        'observation.proprioception': 9,
        'observation.pose': 10,
        'action': 10,
    }
    vectors = {name: rng.normal(size=(n, dim)) for name, dim in dims.items()}
    return vectors | {f'observation.images.{camera}': rows for camera, rows in images.items()}


def write_videos(root, robot, codec, lengths=(7, 1, 12), rate_hz=20.0):
    rng = np.random.default_rng(0)
    spec = DatasetSpec.of(robot, rate_hz, {'front': SIZE, 'wrist': SIZE}, images=codec)
    episodes, first = [], 0
    with DatasetWriter(root, spec) as writer:
        for length in lengths:
            images = {c: numbered_images(rng, length, first=first) for c in ('front', 'wrist')}
            writer.add_episode('look', True, frames_of(rng, images))
            episodes.append(images)
            first += length
    return episodes


@pytest.mark.parametrize('codec', CODECS)
def test_videos_come_back_frame_by_frame(tmp_path, robot, codec):
    episodes = write_videos(tmp_path / 'set', robot, codec)
    dataset = Dataset.open(tmp_path / 'set')
    assert dataset.cameras == ['front', 'wrist']
    for camera in dataset.cameras:
        whole = dataset.images(camera)
        assert [number_of(image) for image in whole] == list(range(20))
        written = np.concatenate([images[camera] for images in episodes])
        assert np.abs(whole.astype(int) - written).mean() < 3.0
        assert np.abs((whole.astype(int) - written).mean()) < 2.0  # neither darker nor brighter
        for i, start in enumerate(dataset.starts):
            np.testing.assert_array_equal(
                dataset.images(camera, i), whole[start : start + dataset.lengths[i]]
            )
    np.testing.assert_array_equal(dataset.episode(2).images('wrist'), dataset.images('wrist', 2))


def test_the_same_frames_give_the_same_file(tmp_path, robot):
    for name in 'ab':
        write_videos(tmp_path / name, robot, 'h264', (5, 6))
    files = [sorted((tmp_path / name / 'videos').rglob('*.mp4')) for name in 'ab']
    assert len(files[0]) == 2
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


@pytest.mark.parametrize('rate_hz', [20.0, 29.97, 12.5, 50.0])
def test_video_times_are_exact_at_any_rate(tmp_path, robot, rate_hz):
    write_videos(tmp_path / 'set', robot, 'h264', (9, 4), rate_hz)
    with av.open(str(tmp_path / 'set/videos/observation.images.front/chunk-000/file-000.mp4')) as container:
        stream = container.streams.video[0]
        packets = [(p.pts, p.dts, p.is_keyframe) for p in container.demux(stream) if p.dts is not None]
        times_s = np.array([float(pts * stream.time_base) for pts, _, _ in packets])
    np.testing.assert_allclose(times_s, np.arange(13) / rate_hz, atol=1e-9)
    assert all(pts == dts for pts, dts, _ in packets)
    assert all(packets[k][2] for k in (0, 9))  # every episode begins with a key frame
    assert [number_of(image) for image in Dataset.open(tmp_path / 'set').images('front', 1)] == [
        9,
        10,
        11,
        12,
    ]


def test_videos_spread_over_files(tmp_path, robot, monkeypatch):
    monkeypatch.setattr(layout, 'VIDEO_FILE_MB', 0)
    monkeypatch.setattr(layout, 'CHUNK_FILES', 2)
    write_videos(tmp_path / 'set', robot, 'h264', (3, 4, 5))
    folder = tmp_path / 'set/videos/observation.images.wrist'
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob('*.mp4'))
    assert found == ['chunk-000/file-000.mp4', 'chunk-000/file-001.mp4', 'chunk-001/file-000.mp4']
    dataset = Dataset.open(tmp_path / 'set')
    assert [number_of(image) for image in dataset.images('wrist')] == list(range(12))
    assert [number_of(image) for image in dataset.images('wrist', 1)] == [3, 4, 5, 6]


@pytest.mark.parametrize('kind', ['png', 'h264'])
def test_images_are_resized_as_the_live_node_does(tmp_path, robot, kind):
    rng = np.random.default_rng(1)
    images = numbered_images(rng, 4, (60, 80))
    with DatasetWriter(
        tmp_path / 'set', DatasetSpec.of(robot, 20.0, {'front': (60, 80)}, images=kind)
    ) as writer:
        writer.add_episode('look', None, frames_of(rng, {'front': images}))
    dataset = Dataset.open(tmp_path / 'set')
    stored = dataset.images('front')
    for size in ((24, 32), (48, 48), (60, 80)):
        expected = np.stack([fit_image(image, size) for image in stored])
        np.testing.assert_array_equal(dataset.images('front', size=size), expected)
        np.testing.assert_array_equal(dataset.episode(0).images('front', size), expected)
    for larger in ((61, 80), (24, 81)):  # live, the camera's own picture is shrunk to that
        with pytest.raises(
            DatasetError, match=rf'front is stored as 60x80 .* --size {larger[0]} {larger[1]}'
        ):
            dataset.images('front', size=larger)
    assert dataset.episode(0).success is None


def test_video_of_odd_size_is_refused_before_anything_is_written(robot):
    with pytest.raises(DatasetError, match=r"wrist is 85x84; h264 video needs an even .*images='png'"):
        DatasetSpec.of(robot, 20.0, {'wrist': (85, 84)}, images='h264')
    DatasetSpec.of(robot, 20.0, {'wrist': (85, 84)}, images='png')


def change_episodes(root, name, change):
    path = root / 'meta/episodes/chunk-000/file-000.parquet'
    table = pq.read_table(path)
    i = table.schema.get_field_index(name)
    pq.write_table(table.set_column(i, name, pa.array(change(table[name].to_pylist()))), path)


def test_videos_that_do_not_fit_their_episodes_are_refused(tmp_path, robot):
    write_videos(tmp_path / 'set', robot, 'h264', (6, 6))

    def copy():
        shutil.rmtree(tmp_path / 'copy', ignore_errors=True)
        return shutil.copytree(tmp_path / 'set', tmp_path / 'copy')

    key = 'videos/observation.images.front'
    change_episodes(copy(), f'{key}/to_timestamp', lambda old: [old[0], old[1] - 0.1])
    with pytest.raises(
        DatasetError, match=r'the video of episode 1 is 0.200 s, but 6 frames at 20 Hz are 0.300 s'
    ):
        Dataset.open(tmp_path / 'copy').images('front', 1)
    change_episodes(copy(), f'{key}/from_timestamp', lambda old: [v + 0.1 for v in old])
    change_episodes(tmp_path / 'copy', f'{key}/to_timestamp', lambda old: [v + 0.1 for v in old])
    with pytest.raises(DatasetError, match=r'no frame at 0.6000 s; frame 4 of 6'):
        Dataset.open(tmp_path / 'copy').images('front', 1)

    video = copy() / 'videos/observation.images.front/chunk-000/file-000.mp4'
    video.write_bytes(video.read_bytes()[:400])
    with pytest.raises(DatasetError, match=r'file-000.mp4'):
        Dataset.open(tmp_path / 'copy').images('front')
    video.unlink()
    with pytest.raises(DatasetError, match=r'file-000.mp4'):
        Dataset.open(tmp_path / 'copy').images('front')

    info = copy() / 'meta/info.json'
    values = json.loads(info.read_text())
    values['features']['observation.images.front']['shape'] = [50, 64, 3]
    info.write_text(json.dumps(values))
    with pytest.raises(DatasetError, match=r'the video is \(48, 64\), but info.json declares \(50, 64\)'):
        Dataset.open(tmp_path / 'copy').images('front')


def test_videos_with_frames_that_refer_to_later_ones_are_read_too(tmp_path):
    """What other programs write: B-frames, a long key frame interval, full colour resolution."""
    images = numbered_images(np.random.default_rng(2), 40)
    with av.open(str(tmp_path / 'other.mp4'), 'w') as container:
        stream = container.add_stream('libx264', rate=30, options={'bf': '3', 'g': '250', 'crf': '10'})
        stream.height, stream.width, stream.pix_fmt = *SIZE, 'yuv444p'
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format='rgb24')))
        container.mux(stream.encode())
    for first, count in ((0, 40), (13, 9), (39, 1)):
        times_s = (first + np.arange(count)) / 30
        found = [number_of(image) for image in frames_at(tmp_path / 'other.mp4', times_s, 30.0)]
        assert found == list(range(first, first + count))


def test_a_video_has_its_name_only_when_it_is_complete(tmp_path):
    images = numbered_images(np.random.default_rng(0), 3)

    def write(fail):
        with VideoWriter(tmp_path / 'a.mp4', 20.0, DATASET_ENCODINGS['h264']) as writer:
            writer.add(images[0])
            assert not (tmp_path / 'a.mp4').exists()
            if fail:
                raise KeyError

    with pytest.raises(KeyError):
        write(fail=True)
    assert list(tmp_path.iterdir()) == []
    write(fail=False)
    assert [path.name for path in tmp_path.iterdir()] == ['a.mp4']
    with (
        pytest.raises(DatasetError, match=r'odd.mp4: a video has even height and width, got 11x13'),
        VideoWriter(tmp_path / 'odd.mp4', 20.0) as writer,
    ):
        writer.add(np.zeros((11, 13, 3), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ['a.mp4']
