"""One thread for what takes long, where only the newest of it is wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Job:
    """Something to be done by `Background`, unless a newer job comes first.

    Args:
        work: is given this job, and looks at `dropped` where it can end early.

    Attributes:
        overtaken: it was dropped before it began, and never will.
    """

    def __init__(self, work: Callable[[Job], None]):
        self._work: Callable[[Job], None] | None = work
        self._dropped = threading.Event()
        self.overtaken = False

    @property
    def dropped(self) -> bool:
        """Whether nobody wants it any more."""
        return self._dropped.is_set()

    def drop(self) -> None:
        """Say that nobody wants it any more."""
        self._dropped.set()

    def wait(self, duration_s: float) -> bool:
        """Sleep, or until it is dropped; returns whether it is."""
        return self._dropped.wait(duration_s)

    def run(self) -> None:
        """Do it, once: what it is done with is let go of."""
        work, self._work = self._work, None
        assert work is not None
        work(self)


class Background:
    """Does one job after the other in a thread of its own. A new one makes those before it superfluous.

    Args:
        name: of the thread, which is there from the first job on.
    """

    def __init__(self, name: str):
        self._name = name
        self._arrived = threading.Condition()
        self._next: Job | None = None
        # Kept when it is done: a change that it asked for may still have to wait, and is dropped with it.
        self._newest: Job | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, work: Callable[[Job], None]) -> Job:
        """Do this next, and drop what is being done, waits, or is done and waits for others."""
        job = Job(work)
        with self._arrived:
            self._drop()
            self._newest = self._next = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._arrived.notify_all()
        return job

    def drop(self) -> None:
        """Drop what is being done, waits, or is done and waits for others."""
        with self._arrived:
            self._drop()

    def close(self, timeout_s: float) -> None:
        """Drop everything and end the thread; what can't be ended early is waited for, but not for longer than this."""
        with self._arrived:
            self._drop()
            self._closed = True
            self._arrived.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _drop(self) -> None:
        if self._newest is not None:
            self._newest.drop()
        if self._next is not None:
            self._next.overtaken = True
        self._next = None

    def _run(self) -> None:
        while True:
            with self._arrived:
                while self._next is None and not self._closed:
                    self._arrived.wait()
                if self._next is None:
                    return
                job, self._next = self._next, None
            job.run()
