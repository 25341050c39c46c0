"""One function over many tasks: in processes of this machine, or on the machines of a Ray cluster.

Results come as they are finished. A task that fails is a result too, with the reason as text: an exception that
can't be pickled, or a process that is killed, must not take the others with it. Tasks that a killed process took
along are done again; so a task may be done twice. A process ends within a second after the one that started it,
however that one ended.

On a cluster every machine needs this package and the same paths: a shared file system.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from decoupled_policy_ros.errors import ConfigError, DecoupledPolicyError

POLL_S = 0.25
CONNECT_TIMEOUT_S = 10.0
#: As an address: a Ray instance of this machine only, for as long as the work lasts.
RAY_LOCAL = 'local'
_DIED = 'a worker process died, and died again when this was done alone: killed, or out of memory'


@dataclass(frozen=True)
class Result:
    """What came of task number `index`: a value, or the reason why there is none."""

    index: int
    value: Any = None
    error: str | None = None


def run_tasks(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    workers: int,
    ray: str | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Generator[Result, None, None]:
    """Call `function` with each task, and yield the results as they come; close it to stop the rest.

    Args:
        function: of a module, so that another process finds it.
        tasks: picklable arguments, at least one.
        workers: processes; on a cluster its CPUs decide.
        ray: address of a Ray cluster ('auto', 'host:6379', 'ray://host:10001'), or 'local'.
        tick: called some times a second while waiting.

    Raises:
        ConfigError: Ray is not installed or the cluster can't be reached.
    """
    return _on_ray(function, tasks, ray, tick) if ray else _on_processes(function, tasks, workers, tick)


def guarded(function: Callable[[Any], Any], task: Any) -> tuple[Any, str | None]:
    """The function's value and no error, or no value and the error as text."""
    try:
        return function(task), None
    except DecoupledPolicyError as error:
        return None, str(error)
    except MemoryError:
        return None, 'out of memory'
    except Exception:
        return None, f'unexpected failure:\n{traceback.format_exc()}'


def _on_processes(
    function: Callable[[Any], Any], tasks: Sequence[Any], workers: int, tick: Callable[[], None]
) -> Generator[Result, None, None]:
    """A process that dies takes its pool along; whose task killed it only shows when each is done again alone."""
    left = deque(range(len(tasks)))
    while left:
        for index in (yield from _in_pool(function, tasks, left, workers, tick)):
            if (yield from _in_pool(function, tasks, deque([index]), 1, tick)):
                yield Result(index, error=_DIED)


def _in_pool(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    left: deque[int],
    workers: int,
    tick: Callable[[], None],
) -> Generator[Result, None, list[int]]:
    """Do tasks, taken from `left`, until none is left or a process dies; returns those that were lost with it."""
    others = set(multiprocessing.active_children())
    # Spawned, not forked: thread pools don't survive a fork.
    pool = ProcessPoolExecutor(
        min(workers, len(left)),
        multiprocessing.get_context('spawn'),
        initializer=start_worker,
        initargs=(os.getpid(), workers),
    )
    running: dict[Future, int] = {}
    lost: list[int] = []
    broken = False
    try:
        while running or (left and not broken):
            try:
                while left and not broken and len(running) <= workers:  # one waits, so that no process does
                    running[pool.submit(guarded, function, tasks[left[0]])] = left[0]
                    left.popleft()
            except BrokenProcessPool:
                broken = True
            done, _ = wait(running, POLL_S, FIRST_COMPLETED)
            tick()
            for future in done:
                index = running.pop(future)
                try:
                    value, error = future.result()
                except BrokenProcessPool:
                    broken = True
                    lost.append(index)
                else:
                    yield Result(index, value, error)
    finally:
        if running:  # whoever stops early does not wait for the rest
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
    return lost


def start_worker(parent: int, workers: int) -> None:
    """First thing in a process of a pool, while it has imported this module alone: BLAS asks for its threads once."""
    if workers > 1:
        # One process per core: further threads, the software renderer's too, would only wait for each other.
        for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'LP_NUM_THREADS'):
            os.environ.setdefault(name, '1')
        with suppress(ImportError):
            import cv2

            cv2.setNumThreads(1)
    end_with(parent)


def end_with(parent: int) -> None:
    """From now on, end this process once its parent is gone: after kill -9 nobody else would tell."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


def _on_ray(
    function: Callable[[Any], Any], tasks: Sequence[Any], address: str, tick: Callable[[], None]
) -> Generator[Result, None, None]:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--ray needs Ray: pip install 'decoupled_policy_ros[cluster]' on every machine"
        ) from error
    ours = not ray.is_initialized()
    if ours:
        try:
            _require_listener(address)
            ray.init(
                None if address == RAY_LOCAL else address, log_to_driver=False, logging_level=logging.WARNING
            )
        except Exception as error:  # of many kinds, from a refused connection to another Python version
            raise ConfigError(f'no Ray cluster at {address!r}: {error}') from error
    try:
        remote = ray.remote(num_cpus=1, max_retries=1)(guarded)
        waiting = {remote.remote(function, task): index for index, task in enumerate(tasks)}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
            tick()
            for reference in done:
                index = waiting.pop(reference)
                try:
                    value, reason = ray.get(reference)
                except ray.exceptions.RayError as failure:
                    value, reason = None, f'lost by the cluster: {failure}'
                yield Result(index, value, reason)
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        if ours:
            ray.shutdown()


def _require_listener(address: str) -> None:
    """Fail at once where nobody listens; Ray would try for minutes."""
    host, separator, port = address.removeprefix('ray://').rpartition(':')
    if separator and port.isdecimal():
        socket.create_connection((host.strip('[]'), int(port)), CONNECT_TIMEOUT_S).close()
