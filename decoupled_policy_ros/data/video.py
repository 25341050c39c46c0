"""H.264 videos by PyAV."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray


class VideoWriter:
    """Writes RGB frames (H, W, 3) uint8, even sizes; the file has its name only when it is complete.

    Used as a context manager; an exception inside leaves no file.
    """

    def __init__(self, path: Path | str, rate_hz: int):
        self.path = Path(path)
        self._partial = self.path.with_name(f'{self.path.name}.part')
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._partial), 'w', format='mp4')
        self._rate_hz = rate_hz
        self._stream: av.VideoStream | None = None

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Append one frame."""
        if self._stream is None:
            self._stream = self._container.add_stream('h264', rate=self._rate_hz)
            self._stream.height, self._stream.width = frame.shape[:2]
            self._stream.pix_fmt = 'yuv420p'
            self._stream.options = {'crf': '23'}
        for packet in self._stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')):
            self._container.mux(packet)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is None and self._stream is not None:
            for packet in self._stream.encode():
                self._container.mux(packet)
        self._container.close()
        if kind is None and self._stream is not None:
            os.replace(self._partial, self.path)
        else:
            self._partial.unlink(missing_ok=True)
