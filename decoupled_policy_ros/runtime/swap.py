"""Another task for a running policy: loaded beside the one that is followed, handed over between two cycles."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from decoupled_policy_ros.errors import ConfigError, ObservationError
from decoupled_policy_ros.observation.sampler import Sampler
from decoupled_policy_ros.runtime.background import Job
from decoupled_policy_ros.runtime.exchange import Exchangeable

if TYPE_CHECKING:  # it brings torch, which takes seconds
    from decoupled_policy_ros.runtime.engine import Engine

#: How often it is looked for a first observation (s).
POLL_S = 0.02


class Dropped(Exception):
    """Nobody wants it any more."""


@dataclass
class SwapTimes:
    """What a change of task or instruction took.

    Attributes:
        load_ms: reading, checking, warming up, or embedding an instruction; in the background.
        wait_ms: from then until a first observation was there and the cycle under way had ended.
        swap_ms: the exchange itself, with the loop's lock held.
    """

    load_ms: float = 0.0
    wait_ms: float = 0.0
    swap_ms: float = 0.0


def swap_task(
    job: Job,
    loop: Exchangeable,
    load: Callable[[], Engine],
    sampler: Sampler,
    explain: Callable[[str], str],
    now_ns: Callable[[], int],
    timeout_s: float,
    done: Callable[[Engine | None, SwapTimes], None],
) -> None:
    """Load a task, wait until it could see, and let the loop follow it.

    Args:
        job: that this is the work of.
        loop: goes on with what it follows until then, and if this raises.
        load: gives an engine, warmed up; raises DecoupledPolicyError for a task that can't be followed.
        sampler, explain: of the task's observations.
        now_ns: the clock of the observations.
        timeout_s: how long to wait for a first observation; a loop that is not running needs none.
        done: told, with the loop's lock held, once the task is followed; without an engine where nobody wants it any
            more by then.

    Raises:
        Dropped: nobody wants it any more.
        ConfigError: no observation came in time; the message says why.
    """
    times, began_s = SwapTimes(), time.perf_counter()
    engine = load()
    loaded_s = time.perf_counter()
    times.load_ms = 1e3 * (loaded_s - began_s)
    await_observation(job, loop, sampler, now_ns, timeout_s)

    def change() -> None:
        if job.dropped:
            done(None, times)
            return
        start_s = time.perf_counter()
        loop.follow_task(engine, sampler, explain)
        times.wait_ms, times.swap_ms = _ms(loaded_s, start_s), _ms(start_s, time.perf_counter())
        done(engine, times)

    _hand_over(job, loop, change)


def change_instruction(
    job: Job,
    loop: Exchangeable,
    instruction: str,
    done: Callable[[Engine | None, SwapTimes], None],
) -> None:
    """Embed an instruction, and let the loop's engine follow it from the next cycle on; `done` as for `swap_task`.

    Raises:
        Dropped: nobody wants it any more.
        ConfigError: it is none that the task understands.
    """
    times, began_s = SwapTimes(), time.perf_counter()
    engine = loop.engine  # jobs before this one were dropped: it changes no more until this one's change
    engine.task.spoken(
        instruction
    )  # a text is embedded once: it is at hand when the engine asks for it again
    embedded_s = time.perf_counter()
    times.load_ms = _ms(began_s, embedded_s)

    def change() -> None:
        if job.dropped:
            done(None, times)
            return
        start_s = time.perf_counter()
        engine.instruct(instruction)
        times.wait_ms, times.swap_ms = _ms(embedded_s, start_s), _ms(start_s, time.perf_counter())
        done(engine, times)

    _hand_over(job, loop, change)


def await_observation(
    job: Job, loop: Exchangeable, sampler: Sampler, now_ns: Callable[[], int], timeout_s: float
) -> None:
    """Return once there is a valid observation, or at once for a loop that is not running.

    Raises:
        Dropped, ConfigError: see `swap_task`.
    """
    deadline_s = time.monotonic() + timeout_s
    while loop.cycling:
        time_ns = now_ns()
        stamp_ns = sampler.latest_common_stamp_ns(time_ns)
        try:
            sampler.sample(time_ns if stamp_ns is None else stamp_ns, time_ns)
            return
        except ObservationError as error:
            if time.monotonic() >= deadline_s:
                raise ConfigError(f'no observation for it within {timeout_s:g} s: {error}') from error
        if job.wait(POLL_S):
            raise Dropped


def _hand_over(job: Job, loop: Exchangeable, change: Callable[[], None]) -> None:
    if job.dropped:
        raise Dropped
    loop.between_cycles(change)


def _ms(begin_s: float, end_s: float) -> float:
    return 1e3 * (end_s - begin_s)
