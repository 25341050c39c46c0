"""The policy's two threads: one turns observations into chunks, one turns chunks into commands.

    worker     encodes pictures as they come; samples and infers once a chunk is due and its observation is there
    streamer   at each tick of the node's clock: the current chunk at that time, or the last command, held

The worker requests a chunk so much before it is due as a cycle takes (`runtime.planning`), and the streamer never waits
for a network: where the next chunk is late, it goes on along the waypoints of the current one that lie past its
executed part; at the end of those, or once the observation for the next chunk is refused, the arm comes to rest and the
next chunk starts afresh, from the first valid observation.

With `lockstep` time itself waits: each clock value gets exactly one command, and where a chunk is due, that command
comes from the new chunk. Nothing here knows ROS; the node gives it a clock and a place to publish.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from decoupled_policy_ros.errors import InferenceError, ObservationError
from decoupled_policy_ros.observation.sampler import Observation, Sampler
from decoupled_policy_ros.runtime.chunks import NS_PER_S
from decoupled_policy_ros.runtime.commanding import Commander
from decoupled_policy_ros.runtime.cores import pin_thread
from decoupled_policy_ros.runtime.cycles import CycleLog
from decoupled_policy_ros.runtime.direct import Direct
from decoupled_policy_ros.runtime.exchange import Exchangeable
from decoupled_policy_ros.runtime.joining import JoinSettings
from decoupled_policy_ros.runtime.motion import UnderWay
from decoupled_policy_ros.runtime.planning import Planner, Prediction
from decoupled_policy_ros.runtime.states import DISABLED, FAILED, GAVE_WAY, WAITING, LoopSettings
from decoupled_policy_ros.runtime.steering import ChunkRejected, Steering
from decoupled_policy_ros.runtime.ticks import IDLE_S, Ticks

if TYPE_CHECKING:  # it brings torch, which takes seconds: the node is there before it is configured
    from decoupled_policy_ros.runtime.engine import Engine
    from decoupled_policy_ros.runtime.states import Outputs

#: How often a chunk is planned anew because its path should have begun meanwhile.
PLANS = 3
#: How long the arm is left alone that did not do what it was told (ns): nobody is to be asked over and over.
PAUSE_NS = 500_000_000


class PolicyLoop(Exchangeable):
    """Runs between `start` and `stop`; after `stop` has returned nothing is published.

    Args:
        engine: the policy, warmed up.
        sampler: takes observations out of the stream buffers.
        outputs: where commands go; called with this object's lock held, so that disabling is immediate.
        now_ns: the node's clock; 0 while there is no time yet.
        settings: how commands are streamed.
        explain: what went wrong lately on a stream, to be added to a refusal.
        on_failure: told of an exception that ended a thread, and all commands; if the worker's, once the arm rests.
        steering: how a chunk is followed; as it was predicted by default.
        log: takes down what is decided.
        join: how chunks join; by default each is followed as it was predicted.
        on_restart: called with the lock held after a jump of the clock, to forget what is stamped with the old time.
    """

    def __init__(
        self,
        engine: Engine,
        sampler: Sampler,
        outputs: Outputs,
        now_ns: Callable[[], int],
        settings: LoopSettings,
        explain: Callable[[str], str],
        on_failure: Callable[[Exception], None],
        steering: Steering | None = None,
        log: CycleLog | None = None,
        join: JoinSettings | None = None,
        on_restart: Callable[[], None] = lambda: None,
    ):
        self._steering, self._log = steering or Direct(), log or CycleLog()
        super().__init__(
            Planner(engine, sampler, join or JoinSettings(), settings.seed, settings.lockstep),
            Commander(self._steering, outputs, now_ns, settings, explain, self._log),
        )
        self._now_ns, self._settings = now_ns, settings
        self._on_failure, self._on_restart = on_failure, on_restart
        self._ticks = Ticks(settings.control_rate_hz, settings.lockstep)
        self._ticked = threading.Condition(self._lock)  # wakes the streamer
        self._threads: list[threading.Thread] = []
        self._generation, self._running, self._enabled, self._resting = 0, False, False, False
        self._forget()

    @property
    def state(self) -> str:
        """What the policy is doing, see `runtime.states`."""
        return self._commander.state

    @property
    def reason(self) -> str:
        """Why."""
        return self._commander.reason

    def _forget(self, silently: bool = False) -> None:
        """Start afresh; whatever is being computed now will be thrown away."""
        self._generation += 1
        self._commander.forget(silently)
        self._log.started(silently)
        self._ticks.restart()
        self._seen_ns = self._resume_ns = 0
        self._interruption: tuple[str, bool] | None = None
        self._afresh = True

    # --- from the node's callbacks --------------------------------------------------------------

    def start(self, enabled: bool) -> None:
        """Start both threads."""
        with self._lock:
            self._commander.begin()
        self._running = self._cycling = True
        self.enable(enabled)
        for target, name in ((self._work, 'policy_worker'), (self._stream, 'policy_streamer')):
            thread = threading.Thread(target=self._guarded, args=(target,), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """End both threads; a cycle that is being computed is waited for and dropped."""
        with self._lock:
            self._running = self._enabled = False
            self._observed.notify_all()
            self._ticked.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        with self._lock:
            self._commander.end('inactive')

    def enable(self, enabled: bool, state: str = DISABLED, reason: str = 'no commands') -> bool:
        """Let commands through, beginning with a fresh chunk; or none any more.

        Before it is disabled the arm is brought to rest; with another `state` commands end at once.
        Where they are let through already they go on as they are, and what is disabled has nothing to give way with.
        Returns False, and changes nothing, when the threads have failed or were never started.
        """
        with self._lock:
            if state == DISABLED:  # another thread may be bringing the arm to rest
                self._ticked.wait_for(lambda: not self._resting)
            if not self._running:
                return False
            self._interrupt()
            if enabled and self._enabled:
                return True
            if state == GAVE_WAY and self.state == DISABLED and not self._resting:
                return True  # it says nothing already, and somebody wants that
            if self._enabled and not enabled and state == DISABLED and not self._settings.lockstep:
                self._enabled, self._generation = False, self._generation + 1  # no chunk that is on its way
                generation = self._generation
                self._resting = True
                try:
                    self._commander.come_to_rest(self._seen_ns, self._ticked.wait)
                finally:
                    self._resting = False
                    self._ticked.notify_all()
                if generation != self._generation:
                    return True  # it has given way meanwhile
            self._enabled = enabled
            self._begin_as(*((WAITING, 'no observation yet') if enabled else (state, reason)))
            return True

    def restart(self) -> None:
        """Forget samples, chunk and last command, as after a jump of the clock."""
        with self._lock:
            self._planner.clear()  # what is stamped with the old time would bar what comes now
            self._on_restart()
            if self._enabled:
                self._begin_as(WAITING, 'no observation yet')

    def interrupt(self, reason: str, gives_way: bool) -> None:
        """Begin afresh from where the arm is, for it does not do what it was told last; or give way."""
        self._interruption = reason, gives_way  # attended to later: who calls may be in the middle of sending

    def _interrupt(self) -> None:
        if self._interruption is not None and self._enabled:
            reason, gives_way = self._interruption
            self._enabled = not gives_way
            self._begin_as(GAVE_WAY if gives_way else WAITING, reason, silently=True)
            self._resume_ns = self._now_ns() + PAUSE_NS

    def _begin_as(self, state: str, reason: str, silently: bool = False) -> None:
        """Start afresh in a state; in another than these two somebody else commands the arm, and nothing is sent."""
        self._forget(silently or state not in (WAITING, DISABLED))
        self._commander.set_state(state, reason)
        self._observed.notify_all()
        self._ticked.notify_all()

    def report(self) -> tuple[str, str, dict[str, str], dict[str, float]]:
        """State, its reason, all statistics as text, and the ages (s) of the last observation's streams."""
        with self._lock:
            state, reason, snapshot = self.state, self.reason, self._commander.statistics.snapshot()
            steering, planner = self._steering.values(), self._planner.values()
        return state, reason, snapshot.values() | planner | steering, snapshot.ages_s

    def notify_observed(self) -> None:
        """Say that a stream has a new sample."""
        with self._lock:
            self._observed.notify()

    def notify_ticked(self) -> None:
        """Say that the node's clock has moved."""
        with self._lock:
            self._ticked.notify()
            self._observed.notify()

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except Exception as error:  # a thread would die in silence
            with self._lock:
                moving = self._enabled and target == self._work and not self._settings.lockstep
                self._running = self._enabled = False
                self._observed.notify_all()
                self._ticked.notify_all()
                if moving:  # the streamer ends too, but commands can still be sent
                    with suppress(Exception):  # what failed first is what is told
                        self._commander.come_to_rest(self._seen_ns, self._ticked.wait)
                with suppress(Exception):
                    self._steering.reset()  # what nobody has heard yet must not be said later
                with suppress(Exception):
                    self._log.started()  # and what was decided last has to be written down all the same
                self._commander.set_state(FAILED, f'{type(error).__name__}: {error}')
            self._on_failure(error)
        finally:
            if target == self._work:
                self._end_cycles()

    # --- worker ---------------------------------------------------------------------------------

    def _work(self) -> None:
        pin_thread(self._settings.cores)
        while True:
            seen = self._observed.count
            worked = self._plan() or (self._enabled and self._planner.encode_ahead(self._commander.chunk))
            with self._lock:
                if not self._running:
                    return
                if not worked:
                    self._observed.wait_after(seen, self._idle_s())
                self._make_changes()

    def _plan(self) -> bool:
        """One cycle, if one is due and possible; returns whether a chunk came of it."""
        with self._lock:
            if not self._enabled:
                return False
            generation, chunk, now_ns = self._generation, self._commander.chunk, self._now_ns()
        if now_ns <= self._resume_ns or (chunk is not None and now_ns < self._planner.request_ns(chunk)):
            return False
        try:
            observation, sample_ms = self._planner.observe(chunk, now_ns)
        except ObservationError as error:
            self._refuse(error, generation, now_ns)
            return False
        if observation is None:
            self._await_frame(generation)
            return False
        if self._commander.rejected(observation.stamp_ns):
            return False
        try:
            under_way = self._begun(generation)
            self._log.planning(now_ns)  # it may come to nothing before there is anything to plan
            prediction = self._planner.predict(observation, sample_ms, under_way, now_ns)
            return self._adopt(prediction, generation)
        except (InferenceError, ValueError) as error:
            self._reject(error, generation, observation, now_ns)
            return False

    def _idle_s(self) -> float:
        """How long the worker may sleep unless it is woken: until the next chunk is to be requested, at most."""
        chunk = self._commander.chunk
        if chunk is None or self._settings.lockstep:
            return IDLE_S
        left_s = (self._planner.request_ns(chunk) - self._now_ns()) / NS_PER_S
        return left_s if 0.0 < left_s < IDLE_S else IDLE_S

    def _begun(self, generation: int) -> UnderWay | None:
        """What is under way, after a fresh start nothing; the planner learns of a fresh start here, on its thread."""
        with self._lock:
            if self._afresh and generation == self._generation:
                self._planner.reset()
                self._afresh = False
            return self._steering.under_way()

    def _adopt(self, prediction: Prediction, generation: int) -> bool:
        """Follow a chunk from when it takes over on; raises ChunkRejected where the steering refuses it."""
        joined, timings_ms = prediction.joined, dict(prediction.timings_ms)
        for _ in range(PLANS):
            start = time.perf_counter()
            plan = self._steering.plan(joined.chunk, self._log.planning(self._now_ns()))
            guard_ms = 1e3 * (time.perf_counter() - start)
            timings_ms |= {'guard': guard_ms, 'total': prediction.timings_ms['total'] + guard_ms}
            with self._lock:
                self._interrupt()
                if generation != self._generation or not self._running:
                    return True
                if not self._commander.adopt(joined, plan):
                    continue
                self._planner.followed(prediction, self._now_ns())
                self._commander.statistics.add_cycle(timings_ms, prediction.observation.ages_s)
                self._log.adopted(
                    self._planner.engine, prediction.observation, plan.begins_ns, prediction.wish
                )
                self._ticked.notify()
                return True
        raise ChunkRejected(f'planned {PLANS} times, each time too late to begin: planning takes too long')

    def _reject(
        self, error: InferenceError | ValueError, generation: int, seen: Observation, now_ns: int
    ) -> None:
        with self._lock:
            if generation == self._generation:
                self._commander.statistics.add_rejection(str(error))
                self._log.refused(self._planner.engine, seen, str(error), self._commander.stays)
                self._commander.reject(error, seen.stamp_ns, now_ns)
                self._ticked.notify()

    def _refuse(self, error: ObservationError, generation: int, now_ns: int) -> None:
        with self._lock:
            if generation == self._generation:
                self._commander.refuse(error, now_ns)
                self._ticked.notify()

    def _await_frame(self, generation: int) -> None:
        with self._lock:
            if generation == self._generation:
                self._commander.await_frame()

    # --- streamer -------------------------------------------------------------------------------

    def _stream(self) -> None:
        with self._lock:
            while self._running:
                now_ns = self._now_ns()
                if 0 < now_ns < self._seen_ns:
                    self.restart()  # a wall clock that was set back: nobody else would tell
                self._interrupt()
                self._seen_ns = now_ns
                wait_s = self._ticks.until_s(now_ns)
                if wait_s <= 0.0 and self._enabled and self._commander.command(now_ns):
                    self._ticks.done(now_ns)
                    continue
                self._ticked.wait(min(IDLE_S, wait_s) if wait_s > 0.0 else IDLE_S)
