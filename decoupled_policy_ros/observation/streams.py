"""Stamped ring buffers: what arrived on one stream, in the order of its stamps."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque

import numpy as np
from numpy.typing import NDArray


class StreamBuffer:
    """The last `capacity` samples of one stream, with strictly increasing stamps. Any thread may call it.

    A sample whose stamp is not newer than the newest one is rejected and counted, never sorted in: a live
    consumer has already passed that time. When the clock itself goes back (a simulator restarts, a bag loops),
    call `clear`.

    Raises:
        ValueError: capacity is below 1.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f'a buffer holds at least one sample, got capacity {capacity}')
        self.capacity = capacity
        self._stamps_ns: deque[int] = deque(maxlen=capacity)
        self._arrays: deque[NDArray] = deque(maxlen=capacity)
        self._accepted = 0
        self._rejected = 0
        self._lock = threading.Lock()

    def push(self, stamp_ns: int, array: NDArray) -> bool:
        """Append a sample, dropping the oldest one of a full buffer; False if its stamp is not newer.

        The array is kept, not copied: the caller must not write to it afterwards.
        """
        view = np.asarray(array).view()
        view.flags.writeable = False
        with self._lock:
            if self._stamps_ns and stamp_ns <= self._stamps_ns[-1]:
                self._rejected += 1
                return False
            self._stamps_ns.append(stamp_ns)
            self._arrays.append(view)
            self._accepted += 1
            return True

    @property
    def accepted(self) -> int:
        """Samples taken since construction."""
        return self._accepted

    @property
    def rejected(self) -> int:
        """Samples refused since construction because their stamps were not newer."""
        return self._rejected

    def __len__(self) -> int:
        return len(self._stamps_ns)

    @property
    def oldest_stamp_ns(self) -> int | None:
        """Stamp of the oldest sample still held, or None."""
        with self._lock:
            return self._stamps_ns[0] if self._stamps_ns else None

    @property
    def latest_stamp_ns(self) -> int | None:
        """Stamp of the newest sample, or None."""
        with self._lock:
            return self._stamps_ns[-1] if self._stamps_ns else None

    def latest(self) -> tuple[int, NDArray] | None:
        """The newest sample, as (its stamp, read-only array), or None."""
        with self._lock:
            return (self._stamps_ns[-1], self._arrays[-1]) if self._stamps_ns else None

    def at_or_before(self, stamp_ns: int) -> tuple[int, NDArray] | None:
        """The latest sample with a stamp <= `stamp_ns`, as (its stamp, read-only array), or None."""
        with self._lock:
            index = bisect_right(self._stamps_ns, stamp_ns)
            return (self._stamps_ns[index - 1], self._arrays[index - 1]) if index else None

    def first_after(self, stamp_ns: int) -> int | None:
        """Stamp of the first sample newer than `stamp_ns`, or None."""
        with self._lock:
            index = bisect_right(self._stamps_ns, stamp_ns)
            return self._stamps_ns[index] if index < len(self._stamps_ns) else None

    def drop_before(self, stamp_ns: int) -> None:
        """Forget what nobody needs who asks for `stamp_ns` or later."""
        with self._lock:
            for _ in range(bisect_right(self._stamps_ns, stamp_ns) - 1):
                self._stamps_ns.popleft()
                self._arrays.popleft()

    def clear(self) -> None:
        """Forget all samples; the next one may have any stamp."""
        with self._lock:
            self._stamps_ns.clear()
            self._arrays.clear()
