"""Image decoding: ROS 2's cv_bridge where it is installed, OpenCV otherwise; both give the same arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.errors import MessageError

#: Markers of a JPEG: its first, the one before each of its scans, its last.
JPEG_START, JPEG_SCAN, JPEG_END = b'\xff\xd8', b'\xff\xda', b'\xff\xd9'


@dataclass(frozen=True)
class Encoding:
    """Layout of one image encoding, and the OpenCV code that turns it into RGB (None: no colour to convert)."""

    dtype: type
    channels: int
    is_colour: bool = False
    to_rgb: int | None = None

    @property
    def pixel_bytes(self) -> int:
        """Bytes of one pixel."""
        return np.dtype(self.dtype).itemsize * self.channels


# OpenCV names a Bayer pattern by its second row and column, ROS by its first: rggb is OpenCV's BG.
_BAYER = {
    'rggb': cv2.COLOR_BayerBG2RGB,
    'bggr': cv2.COLOR_BayerRG2RGB,
    'gbrg': cv2.COLOR_BayerGR2RGB,
    'grbg': cv2.COLOR_BayerGB2RGB,
}

ENCODINGS: dict[str, Encoding] = {
    'rgb8': Encoding(np.uint8, 3, True),
    'bgr8': Encoding(np.uint8, 3, True, cv2.COLOR_BGR2RGB),
    'rgba8': Encoding(np.uint8, 4, True, cv2.COLOR_RGBA2RGB),
    'bgra8': Encoding(np.uint8, 4, True, cv2.COLOR_BGRA2RGB),
    'mono8': Encoding(np.uint8, 1),
    '8UC1': Encoding(np.uint8, 1),
    'mono16': Encoding(np.uint16, 1),
    '16UC1': Encoding(np.uint16, 1),
    '32FC1': Encoding(np.float32, 1),
    **{f'bayer_{pattern}8': Encoding(np.uint8, 1, True, code) for pattern, code in _BAYER.items()},
    **{f'bayer_{pattern}16': Encoding(np.uint16, 1, True, code) for pattern, code in _BAYER.items()},
}

#: What OpenCV and cv_bridge raise on data that is not what it claims; CvBridgeError is a TypeError.
_FAILURES = (cv2.error, TypeError, ValueError, RuntimeError, MemoryError)

Decoder = Callable[[Any, NDArray[np.uint8], Encoding], NDArray]


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """A library's failure becomes a refused message: one broken picture must not end whoever reads it."""
    try:
        yield
    except _FAILURES as error:
        raise MessageError(f"{what} can't be decoded: {' '.join(str(error).split())}") from error


def decode_opencv(msg: Any, data: NDArray[np.uint8], encoding: Encoding) -> NDArray:
    """Pixels of an image whose sizes have been checked; `data` are its bytes, (height * step,)."""
    rows = data.reshape(msg.height, msg.step)[:, : msg.width * encoding.pixel_bytes]
    dtype = np.dtype(encoding.dtype)
    if dtype.itemsize > 1:
        rows = np.ascontiguousarray(rows).view(dtype.newbyteorder('>' if msg.is_bigendian else '<'))
        rows = rows.astype(dtype, copy=False)
    pixels = rows if encoding.channels == 1 else rows.reshape(msg.height, msg.width, encoding.channels)
    if encoding.to_rgb is not None:
        with _refusing(f'image of encoding {msg.encoding!r}'):
            pixels = cv2.cvtColor(np.ascontiguousarray(pixels), encoding.to_rgb)
    if encoding.is_colour and pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 -> 255, rounded
    return np.ascontiguousarray(pixels)


def _decode_cv_bridge(msg: Any, data: NDArray[np.uint8], encoding: Encoding) -> NDArray:
    swaps_bytes = bool(msg.is_bigendian) and np.dtype(encoding.dtype).itemsize > 1
    if msg.step % encoding.pixel_bytes or swaps_bytes:
        # cv_bridge counts a row's padding in whole pixels, which would shear this image, and swaps bytes by
        # a method that NumPy 2 removed.
        return decode_opencv(msg, data, encoding)
    with _refusing(f'image of encoding {msg.encoding!r}'):
        return _cv_bridge().imgmsg_to_cv2(msg, 'rgb8' if encoding.is_colour else 'passthrough')


@lru_cache(maxsize=1)
def _cv_bridge() -> Any:
    """A working CvBridge, or None: PyPI's package of that name is a ROS 1 port that fails on ROS 2 images."""
    try:
        from cv_bridge import CvBridge

        bridge = CvBridge()
        probe = SimpleNamespace(
            height=1,
            width=1,
            step=3,
            encoding='bgr8',
            is_bigendian=int(sys.byteorder == 'big'),
            data=bytes([1, 2, 3]),
        )
        works = np.array_equal(bridge.imgmsg_to_cv2(probe, 'rgb8'), [[[3, 2, 1]]])
    except Exception:  # whatever another package of that name, or one built for another NumPy, may raise
        return None
    return bridge if works else None


def available_decoders() -> tuple[str, ...]:
    """Names that `decoder_named` takes on this machine, besides 'auto'."""
    return ('opencv', 'cv_bridge') if _cv_bridge() is not None else ('opencv',)


@lru_cache(maxsize=8)
def decoder_named(name: str) -> Decoder:
    """The decoder of that name; 'auto' prefers cv_bridge.

    Raises:
        MessageError: it is unknown or not installed; the message lists those that are.
    """
    available = available_decoders()
    if name == 'auto':
        name = available[-1]
    if name not in available:
        raise MessageError(f'image decoder {name!r} is not there; available: auto, {", ".join(available)}')
    return decode_opencv if name == 'opencv' else _decode_cv_bridge


def _require_whole_jpeg(data: NDArray[np.uint8], what: str) -> None:
    """Refuse what was cut off: some versions of OpenCV fill the rest in, and say nothing.

    Neither marker can be part of a scan, and a camera may append what it likes to the end.
    """
    content = data.tobytes()
    if content.startswith(JPEG_START) and content.rfind(JPEG_END) < content.rfind(JPEG_SCAN):
        raise MessageError(f'{what}: the JPEG is cut off, its end (FF D9) is missing')


def decode_compressed(data: NDArray[np.uint8], image_format: str) -> NDArray:
    """Pixels of JPEG or PNG bytes, colour as RGB; see `messages.compressed_image_to_array` for what it raises."""
    what = f'compressed image of format {image_format!r} and {len(data)} bytes'
    if 'compressedDepth' in image_format:
        if not image_format.startswith(('16UC1', 'mono16')):
            raise MessageError(f'{what}: of compressedDepth only 16UC1 is known')
        data = data[12:]  # header of compressed_depth_image_transport; its quantisation serves 32FC1 only
    _require_whole_jpeg(data, what)
    with _refusing(what):
        pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if len(data) else None
    if pixels is None:
        raise MessageError(f"{what} can't be decoded; JPEG and PNG are known")
    if pixels.ndim == 2:
        return pixels
    if pixels.dtype != np.uint8:
        raise MessageError(f'{what} has colour of {pixels.dtype}; uint8 is known')
    with _refusing(what):
        return cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB)
