"""Messages to arrays: rclpy messages and rosbags objects, every encoding, every way to be malformed."""

import array
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from builtin_interfaces.msg import Time
from geometry_msgs.msg import PoseStamped
from hypothesis import given
from hypothesis import strategies as st
from rosbags.typesys import Stores, get_typestore
from sensor_msgs.msg import CompressedImage, Image, JointState

from decoupled_policy_ros.errors import MessageError
from decoupled_policy_ros.observation.decoders import ENCODINGS, available_decoders
from decoupled_policy_ros.observation.image import fit_image
from decoupled_policy_ros.observation.messages import (
    compressed_image_to_array,
    image_to_array,
    joint_positions_from_message,
    pose_from_message,
    stamp_ns,
)

BAG = get_typestore(Stores.ROS2_JAZZY).types
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def rclpy_image(encoding, height, width, step, data, is_bigendian=0):
    msg = Image(encoding=encoding, height=height, width=width, step=step, is_bigendian=is_bigendian)
    msg.data = array.array('B', data)
    return msg


def bag_header():
    return BAG['std_msgs/msg/Header'](
        stamp=BAG['builtin_interfaces/msg/Time'](sec=1, nanosec=2), frame_id='camera'
    )


def bag_image(encoding, height, width, step, data, is_bigendian=0):
    return BAG['sensor_msgs/msg/Image'](
        bag_header(), height, width, encoding, is_bigendian, step, np.frombuffer(data, np.uint8)
    )


def plain_image(encoding, height, width, step, data, is_bigendian=0):
    return SimpleNamespace(
        encoding=encoding, height=height, width=width, step=step, data=data, is_bigendian=is_bigendian
    )


IMAGE_MAKERS = {'rclpy': rclpy_image, 'rosbags': bag_image, 'bytes': plain_image}


def padded(rows, padding):
    """Image bytes of `rows` (H, row bytes) with `padding` bytes of rubbish after each row, and the step."""
    rubbish = np.full((len(rows), padding), 0xA5, np.uint8)
    return np.concatenate([rows, rubbish], 1).tobytes(), rows.shape[1] + padding


def known_image(encoding):
    """(bytes of the rows (H, row bytes), expected array), made without any of the code under test."""
    rng = np.random.default_rng(7)
    height, width = 5, 7
    rgb = rng.integers(0, 256, (height, width, 3), np.uint8)
    alpha = rng.integers(0, 256, (height, width, 1), np.uint8)
    wide, depth = rgb[..., 0].astype(np.uint16) * 251, rgb[..., 0].astype(np.float32) / 3
    pixels, expected = {
        'rgb8': (rgb, rgb),
        'bgr8': (rgb[..., ::-1], rgb),
        'rgba8': (np.concatenate([rgb, alpha], -1), rgb),
        'bgra8': (np.concatenate([rgb[..., ::-1], alpha], -1), rgb),
        'mono8': (rgb[..., 0], rgb[..., 0]),
        '8UC1': (rgb[..., 0], rgb[..., 0]),
        'mono16': (wide, wide),
        '16UC1': (wide, wide),
        '32FC1': (depth, depth),
    }[encoding]
    return pixels, expected


FLAT = ('rgb8', 'bgr8', 'rgba8', 'bgra8', 'mono8', '8UC1', 'mono16', '16UC1', '32FC1')
BAYER = tuple(name for name in ENCODINGS if name.startswith('bayer_'))


def encoded(pixels, byte_order):
    pixels = np.ascontiguousarray(pixels)
    return pixels.astype(pixels.dtype.newbyteorder(byte_order)).view(np.uint8).reshape(len(pixels), -1)


def test_every_encoding_is_tested():
    assert set(FLAT) | set(BAYER) == set(ENCODINGS)


@pytest.mark.parametrize('decoder', available_decoders())
@pytest.mark.parametrize('maker', IMAGE_MAKERS)
@pytest.mark.parametrize('byte_order', ['<', '>'])
@pytest.mark.parametrize('padding', [0, 12, 1])
@pytest.mark.parametrize('encoding', FLAT)
def test_image_pixels(encoding, padding, byte_order, maker, decoder):
    pixels, expected = known_image(encoding)
    data, step = padded(encoded(pixels, byte_order), padding)
    msg = IMAGE_MAKERS[maker](encoding, 5, 7, step, data, is_bigendian=int(byte_order == '>'))
    result = image_to_array(msg, decoder)
    assert result.dtype == expected.dtype
    assert result.dtype.isnative
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, expected)


def mosaic(rgb, pattern):
    """What a sensor with that pattern of filters sees of an image (H, W, 3): pattern 'rggb' is row RG, row GB."""
    height, width, _ = rgb.shape
    channel = np.array(['rgb'.index(letter) for letter in pattern]).reshape(2, 2)
    return np.take_along_axis(rgb, np.tile(channel, (height // 2, width // 2))[..., None], -1)[..., 0]


@pytest.mark.parametrize('decoder', available_decoders())
@pytest.mark.parametrize('colour', [RED, GREEN, BLUE, (200, 100, 50)])
@pytest.mark.parametrize('encoding', BAYER)
def test_bayer_mosaic_of_one_colour_gives_that_colour(encoding, colour, decoder):
    rgb = np.tile(np.array(colour, np.uint8), (8, 10, 1))
    raw = mosaic(rgb, encoding[6:10])
    if encoding.endswith('16'):
        raw = raw.astype(np.uint16) * 257
    data, step = padded(encoded(raw, '<'), 6)
    np.testing.assert_array_equal(image_to_array(rclpy_image(encoding, 8, 10, step, data), decoder), rgb)


@pytest.mark.parametrize('decoder', available_decoders())
@pytest.mark.parametrize('encoding', BAYER)
def test_bayer_mosaic_keeps_places(encoding, decoder):
    """Red on the left, blue on the right: away from the seam each side has its colour."""
    rgb = np.zeros((8, 16, 3), np.uint8)
    rgb[:, :8], rgb[:, 8:] = RED, BLUE
    raw = mosaic(rgb, encoding[6:10])
    raw = raw.astype(np.uint16) * 257 if encoding.endswith('16') else raw
    data, step = padded(encoded(raw, '<'), 0)
    result = image_to_array(rclpy_image(encoding, 8, 16, step, data), decoder)
    np.testing.assert_array_equal(result[:, :6], rgb[:, :6])
    np.testing.assert_array_equal(result[:, 10:], rgb[:, 10:])


def test_big_endian_bayer():
    raw = mosaic(np.tile(np.array([200, 100, 50], np.uint16), (4, 4, 1)), 'rggb') * 257
    data, step = padded(encoded(raw, '>'), 0)
    result = image_to_array(rclpy_image('bayer_rggb16', 4, 4, step, data, is_bigendian=1))
    assert result[1, 1].tolist() == [200, 100, 50]


@given(
    st.sampled_from(['rgb8', 'mono8', '16UC1']),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 5),
    st.randoms(),
)
def test_image_of_any_size_and_padding(encoding, height, width, padding, random):
    layout = ENCODINGS[encoding]
    shape = (height, width) if layout.channels == 1 else (height, width, layout.channels)
    pixels = np.random.default_rng(random.getrandbits(32)).integers(0, 256, shape).astype(layout.dtype)
    data, step = padded(encoded(pixels, '<'), padding)
    np.testing.assert_array_equal(image_to_array(plain_image(encoding, height, width, step, data)), pixels)


def test_contiguous_rgb_is_not_copied():
    msg = bag_image('rgb8', 4, 6, 18, bytes(range(72)))
    assert np.shares_memory(image_to_array(msg, 'opencv'), msg.data)


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({'encoding': 'yuv9'}, ['yuv9', 'rgb8', 'bayer_rggb8', '32FC1']),
        ({'encoding': ''}, ['rgb8']),
        ({'data': bytes(35)}, ['35', '36']),
        ({'data': bytes(37)}, ['37', '36']),
        ({'data': b''}, ['0 bytes']),
        ({'step': 8}, ['step >= 9', 'got 8']),
        ({'height': 0, 'data': b''}, ['0 rows']),
        ({'width': 0}, ['0 pixels']),
        ({'data': [1] * 36}, ['list', 'bytes']),
    ],
)
def test_malformed_image_is_refused(change, named):
    fields = {'encoding': 'rgb8', 'height': 4, 'width': 3, 'step': 9, 'data': bytes(36), **change}
    with pytest.raises(MessageError) as error:
        image_to_array(plain_image(**fields))
    for text in named:
        assert text in str(error.value)


def test_decoder_that_is_not_there_is_refused():
    msg = rclpy_image('mono8', 1, 1, 1, b'\0')
    with pytest.raises(MessageError, match=r"'gpu'.*auto, opencv"):
        image_to_array(msg, 'gpu')


def test_cv_bridge_of_ros_1_is_not_taken(tmp_path):
    """A package of that name which fails on ROS 2 images, as PyPI's does, leaves OpenCV at work."""
    (tmp_path / 'cv_bridge.py').write_text(
        'class CvBridge:\n    def imgmsg_to_cv2(self, msg, encoding):\n        return msg.no_such_field\n'
    )
    code = 'from decoupled_policy_ros.observation.decoders import available_decoders; print(*available_decoders())'
    done = subprocess.run(
        [sys.executable, '-c', f'import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ['opencv']


def test_what_cv_bridge_refuses_is_a_refused_message(tmp_path):
    """A cv_bridge that works, until a picture comes that it fails on as the real one does: with a TypeError."""
    (tmp_path / 'cv_bridge.py').write_text(
        'import numpy as np\n'
        'class CvBridgeError(TypeError):\n    pass\n'
        'class CvBridge:\n'
        '    def imgmsg_to_cv2(self, msg, encoding):\n'
        '        if msg.height > 1:\n            raise CvBridgeError("no such\\nconversion")\n'
        '        return np.array([[[3, 2, 1]]], np.uint8)\n'
    )
    code = (
        f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n'
        'from types import SimpleNamespace\n'
        'from decoupled_policy_ros.errors import MessageError\n'
        'from decoupled_policy_ros.observation.messages import image_to_array\n'
        'image = dict(encoding="bgr8", width=1, step=3, is_bigendian=0)\n'
        'print(image_to_array(SimpleNamespace(height=1, data=bytes(3), **image)).tolist())\n'
        'try:\n'
        '    image_to_array(SimpleNamespace(height=2, data=bytes(6), **image))\n'
        'except MessageError as error:\n'
        '    print(error)\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        '[[[3, 2, 1]]]',
        "image of encoding 'bgr8' can't be decoded: no such conversion",
    ]


# Compressed images


def compressed(maker, image_format, data):
    if maker == 'rclpy':
        msg = CompressedImage(format=image_format)
        msg.data = array.array('B', data)
        return msg
    return BAG['sensor_msgs/msg/CompressedImage'](bag_header(), image_format, np.frombuffer(data, np.uint8))


def test_png_is_exact_and_rgb():
    rgb = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    data = cv2.imencode('.png', rgb[..., ::-1])[1].tobytes()
    for maker in ('rclpy', 'rosbags'):
        result = compressed_image_to_array(compressed(maker, 'rgb8; png compressed bgr8', data))
        np.testing.assert_array_equal(result, rgb)


def test_png_with_alpha_loses_it():
    bgra = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)
    data = cv2.imencode('.png', bgra)[1].tobytes()
    result = compressed_image_to_array(compressed('rclpy', 'png', data))
    np.testing.assert_array_equal(result, bgra[..., 2::-1])


@pytest.mark.parametrize('colour', [RED, GREEN, BLUE])
def test_jpeg_keeps_colours_apart(colour):
    rgb = np.tile(np.array(colour, np.uint8), (32, 32, 1))
    data = cv2.imencode('.jpg', rgb[..., ::-1])[1].tobytes()
    result = compressed_image_to_array(compressed('rosbags', 'jpeg', data))
    assert result.shape == (32, 32, 3)
    assert np.abs(result.astype(int) - rgb).max() <= 4


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_one_channel_png(dtype):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (6, 5), dtype)
    result = compressed_image_to_array(compressed('rclpy', 'png', cv2.imencode('.png', pixels)[1].tobytes()))
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, pixels)


def test_compressed_depth():
    depth = np.random.default_rng(0).integers(0, 65535, (6, 5), np.uint16)
    data = bytes(12) + cv2.imencode('.png', depth)[1].tobytes()
    result = compressed_image_to_array(compressed('rclpy', '16UC1; compressedDepth png', data))
    np.testing.assert_array_equal(result, depth)
    with pytest.raises(MessageError, match='32FC1; compressedDepth'):
        compressed_image_to_array(compressed('rclpy', '32FC1; compressedDepth', data))


@pytest.mark.parametrize(
    'data', [b'', b'not an image', cv2.imencode('.png', np.zeros((9, 9), np.uint8))[1].tobytes()[:40]]
)
def test_undecodable_image_is_refused(data):
    with pytest.raises(MessageError, match=f"'jpeg' and {len(data)} bytes"):
        compressed_image_to_array(compressed('rclpy', 'jpeg', data))


@pytest.mark.parametrize('kept', [0.99, 0.5, 0.1])
def test_a_jpeg_that_is_cut_off_is_refused(kept, monkeypatch):
    """Whatever OpenCV does: some versions fill in the rest. What a camera appends does no harm."""
    rng = np.random.default_rng(0)
    pixels = np.repeat(np.repeat(rng.integers(0, 255, (30, 40, 3), np.uint8), 8, 0), 8, 1)
    data = cv2.imencode('.jpg', pixels)[1].tobytes()
    monkeypatch.setattr(cv2, 'imdecode', lambda *_: pixels)
    for whole in (data, data + bytes(100)):
        assert compressed_image_to_array(compressed('rclpy', 'jpeg', whole)).shape == (240, 320, 3)
    with pytest.raises(MessageError, match='cut off'):
        compressed_image_to_array(compressed('rclpy', 'jpeg', data[: int(kept * len(data))]))


def png_of_size(height, width):
    """A PNG that claims a size and has no pixels."""

    def block(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + block(b'IHDR', header) + block(b'IDAT', b'') + block(b'IEND', b'')


def test_a_picture_that_claims_a_size_beyond_all_limits_is_refused():
    with pytest.raises(cv2.error):  # what OpenCV makes of it, and a node must not see
        cv2.imdecode(np.frombuffer(png_of_size(100_000, 100_000), np.uint8), cv2.IMREAD_UNCHANGED)
    for maker in ('rclpy', 'rosbags'):
        message = compressed(maker, 'png', png_of_size(100_000, 100_000))
        with pytest.raises(MessageError, match=r"format 'png'.*can't be decoded: .*PIXELS"):
            compressed_image_to_array(message)


def test_sixteen_bit_colour_png_is_refused():
    data = cv2.imencode('.png', np.zeros((4, 4, 3), np.uint16))[1].tobytes()
    with pytest.raises(MessageError, match='uint16'):
        compressed_image_to_array(compressed('rclpy', 'png', data))


# Fitting


def test_fit_image_averages_areas():
    rgb = np.zeros((4, 4, 3), np.uint8)
    rgb[::2] = 200  # stripes that a point sample would miss or take whole
    np.testing.assert_array_equal(fit_image(rgb, (2, 2)), np.full((2, 2, 3), 100))


def test_fit_image_shapes_and_identity():
    rgb = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    assert fit_image(rgb, (84, 90)).shape == (84, 90, 3)
    assert fit_image(rgb, (24, 90)).shape == (24, 90, 3)
    assert fit_image(rgb, (48, 64)) is rgb


@pytest.mark.parametrize(
    'image', [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))]
)
def test_fit_image_wants_rgb(image):
    with pytest.raises(MessageError, match='colour image'):
        fit_image(image, (2, 2))


# Joint states

NAMES = ('joint1', 'joint2', 'joint3')


def joint_state(maker, names, positions):
    if maker == 'rclpy':
        return JointState(name=list(names), position=list(positions))
    empty = np.array([])
    return BAG['sensor_msgs/msg/JointState'](
        bag_header(), list(names), np.array(positions, float), empty, empty
    )


@pytest.mark.parametrize('maker', ['rclpy', 'rosbags'])
@given(st.permutations([*NAMES, 'finger', 'wheel']))
def test_joints_are_taken_by_name(maker, order):
    value = {
        'joint1': 1.0,
        'joint2': 2.0,
        'joint3': 3.0,
        'finger': np.nan,
        'wheel': np.inf,
    }  # the last two unused
    msg = joint_state(maker, order, [value[name] for name in order])
    result = joint_positions_from_message(msg, NAMES)
    assert result.dtype == np.float64
    assert result.tolist() == [1.0, 2.0, 3.0]


def test_order_may_change_from_message_to_message():
    first = joint_positions_from_message(joint_state('rclpy', NAMES, [1, 2, 3]), NAMES)
    second = joint_positions_from_message(joint_state('rclpy', NAMES[::-1], [3, 2, 1]), NAMES)
    assert first.tolist() == second.tolist() == [1, 2, 3]


def test_joint_positions_are_a_copy():
    msg = joint_state('rosbags', NAMES, [1, 2, 3])
    result = joint_positions_from_message(msg, NAMES)
    msg.position[:] = 0
    assert result.tolist() == [1, 2, 3]


@pytest.mark.parametrize('maker', ['rclpy', 'rosbags'])
@pytest.mark.parametrize(
    ('names', 'positions', 'named'),
    [
        (['joint1', 'joint3'], [1, 3], ['joint2', 'it has joint1, joint3']),
        ([], [], ['joint1, joint2, joint3', 'no joints']),
        (NAMES, [1, 2], ['3 names', '2 positions']),
        (NAMES, [1, 2, 3, 4], ['3 names', '4 positions']),
        (NAMES, [], ['3 names', '0 positions']),
        (['joint1', 'joint2', 'joint3', 'joint2'], [1, 2, 3, 4], ['joint2', 'more than once']),
        (NAMES, [1, np.nan, 3], ['joint2', 'nan']),
        (NAMES, [1, 2, -np.inf], ['joint3', 'inf']),
    ],
)
def test_malformed_joint_state_is_refused(maker, names, positions, named):
    with pytest.raises(MessageError) as error:
        joint_positions_from_message(joint_state(maker, names, [float(p) for p in positions]), NAMES)
    for text in named:
        assert text in str(error.value)


# Poses and stamps


def pose_message(maker, position, quat_xyzw):
    if maker == 'rclpy':
        msg = PoseStamped()
        msg.header.frame_id = 'camera'
    else:
        point, quaternion = (
            BAG['geometry_msgs/msg/Point'](0, 0, 0),
            BAG['geometry_msgs/msg/Quaternion'](0, 0, 0, 1),
        )
        msg = BAG['geometry_msgs/msg/PoseStamped'](
            bag_header(), BAG['geometry_msgs/msg/Pose'](point, quaternion)
        )
    for axis, value in zip('xyz', position, strict=True):
        setattr(msg.pose.position, axis, float(value))
    for axis, value in zip('xyzw', quat_xyzw, strict=True):
        setattr(msg.pose.orientation, axis, float(value))
    return msg


@pytest.mark.parametrize('maker', ['rclpy', 'rosbags'])
def test_pose_message(maker):
    pose = pose_from_message(pose_message(maker, [1, 2, 3], [0, 0, np.sqrt(0.5), np.sqrt(0.5)]), 'camera')
    np.testing.assert_allclose(pose, [[0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]], atol=1e-15)


@pytest.mark.parametrize(
    ('position', 'quat_xyzw'),
    [
        ([np.nan, 0, 0], [0, 0, 0, 1]),
        ([0, np.inf, 0], [0, 0, 0, 1]),
        ([0, 0, 0], [0, 0, 0, 0]),
        ([0, 0, 0], [0, 0, np.nan, 1]),
        ([0, 0, 0], [0, 0, 0, 2]),
    ],
)
def test_malformed_pose_is_refused(position, quat_xyzw):
    with pytest.raises(MessageError, match='unit quaternion'):
        pose_from_message(pose_message('rclpy', position, quat_xyzw))


def test_pose_in_another_frame_is_refused():
    with pytest.raises(MessageError, match=r"'camera'.*'fr3_link0' or 'base'"):
        pose_from_message(pose_message('rclpy', [0, 0, 0], [0, 0, 0, 1]), 'fr3_link0', 'base')


def test_stamps():
    assert stamp_ns(Time(sec=3, nanosec=4)) == 3_000_000_004
    assert stamp_ns(bag_header().stamp) == 1_000_000_002
    assert stamp_ns(Time(sec=0, nanosec=1)) == 1
    for stamp in (Time(), Time(sec=-1, nanosec=5)):
        with pytest.raises(MessageError, match='zero stamp is no stamp'):
            stamp_ns(stamp)


def test_messages_module_needs_no_ros():
    """The observation code is imported where no ROS module can be."""
    code = (
        'import sys; blocked = {"rclpy", "sensor_msgs", "geometry_msgs", "builtin_interfaces", "torch"}\n'
        'sys.modules.update(dict.fromkeys(blocked))\n'
        'import decoupled_policy_ros.observation.messages, decoupled_policy_ros.observation.sampler\n'
        'import decoupled_policy_ros.observation.proprioception\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
