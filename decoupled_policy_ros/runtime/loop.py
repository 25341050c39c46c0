"""The policy's two threads: one turns observations into chunks, one turns chunks into commands.

    worker     waits until a chunk is due and an observation for it is there, whose pictures it encodes as they come;
               samples, infers, hands over the chunk
    streamer   at each tick of the node's clock: the current chunk at that time, or the last command, held

The worker is never in a hurry and the streamer never waits for a network: while the next chunk is computed, the
streamer goes on along the waypoints of the current one that lie past its executed part; once the observation for
it is refused, the last command is held and the next chunk starts afresh, from the first valid observation.

With `lockstep` time itself waits: each clock value gets exactly one command, and where a chunk is due, that command
comes from the new chunk. Nothing here knows ROS; the node gives it a clock and a place to publish.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.errors import InferenceError, ObservationError
from decoupled_policy_ros.observation.sampler import Observation, Sampler
from decoupled_policy_ros.runtime.chunks import Chunk, GripperLatch, next_frames_ns
from decoupled_policy_ros.runtime.cores import pin_thread
from decoupled_policy_ros.runtime.cycles import CycleLog
from decoupled_policy_ros.runtime.exchange import Exchangeable
from decoupled_policy_ros.runtime.states import DISABLED, FAILED, FOLLOWING, HOLDING, WAITING, LoopSettings
from decoupled_policy_ros.runtime.statistics import Statistics
from decoupled_policy_ros.runtime.steering import ChunkRejected, Direct, Steering
from decoupled_policy_ros.runtime.stopping import come_to_rest
from decoupled_policy_ros.runtime.ticks import IDLE_S, Ticks

if TYPE_CHECKING:  # it brings torch, which takes seconds: the node is there before it is configured
    from decoupled_policy_ros.runtime.engine import Engine
    from decoupled_policy_ros.runtime.states import Outputs

#: How often a chunk is planned anew because commands went on meanwhile.
PLANS = 3


class PolicyLoop(Exchangeable):
    """Runs between `start` and `stop`; after `stop` has returned nothing is published.

    Args:
        engine: the policy, warmed up.
        sampler: takes observations out of the stream buffers.
        outputs: where commands go; called with this object's lock held, so that disabling is immediate.
        now_ns: the node's clock; 0 while there is no time yet.
        settings: how commands are streamed.
        explain: what went wrong lately on a stream, to be added to a refusal.
        on_failure: told of an exception that ended a thread; there are no commands any more then.
        steering: how a chunk is followed; as it was predicted by default.
        log: takes down what is decided.
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
    ):
        super().__init__(engine, sampler, explain)
        self._outputs, self._now_ns, self._settings = outputs, now_ns, settings
        self._on_failure, self._steering, self._log = on_failure, steering or Direct(), log or CycleLog()
        self.statistics = Statistics(settings.command_period_ns)
        self._ticks = Ticks(settings.control_rate_hz, settings.lockstep)
        self._ticked = threading.Condition(self._lock)  # wakes the streamer
        self._generation, self._running, self._enabled = 0, False, False
        self._latch = GripperLatch(settings.gripper_hysteresis)
        self.state, self.reason = DISABLED, ''
        self._forget()

    def _forget(self) -> None:
        """Start afresh; whatever is being computed now will be thrown away."""
        self._generation += 1
        self._chunk: Chunk | None = None
        self._refusal: ObservationError | InferenceError | ValueError | None = None
        self._refused_ns = self._rejected_frame_ns = 0
        self._steering.reset()
        self._log.started()
        self._ticks.restart()
        self._seen_ns = 0
        self._latch.reset()
        self.statistics.interrupt()

    # --- from the node's callbacks --------------------------------------------------------------

    def start(self, enabled: bool) -> None:
        """Start both threads."""
        with self._lock:
            self.statistics = Statistics(self._settings.command_period_ns)
        self._running = True
        self.state = ''  # so that the state is said even if it is the one before deactivation
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
            self._make_changes()
            self.state, self.reason = DISABLED, 'inactive'  # not published: whoever stops it says so
            self.statistics.state_begins()

    def enable(self, enabled: bool, state: str = DISABLED, reason: str = 'no commands') -> bool:
        """Let commands through, beginning with a fresh chunk; or none any more.

        Before it is disabled the arm is brought to rest; with another `state` commands end at once.
        Returns False, and changes nothing, when the threads have failed or were never started.
        """
        with self._lock:
            if not self._running:
                return False
            if self._enabled and not enabled and state == DISABLED and not self._settings.lockstep:
                self._enabled, self._generation = False, self._generation + 1  # no chunk that is on its way
                hold, publish, wait = self._steering.hold, self._publish, self._ticked.wait
                come_to_rest(self._now_ns, self._seen_ns, hold, publish, wait)
            self._enabled = enabled
            self._forget()
            self._set_state(*((WAITING, 'no observation yet') if enabled else (state, reason)))
            self._observed.notify_all()
            self._ticked.notify_all()
            return True

    def restart(self) -> None:
        """Forget samples, chunk and last command, as after a jump of the clock."""
        with self._lock:
            self._sampler.clear()  # what is stamped with the old time would bar what comes now
            if self._enabled:
                self.enable(True)

    def report(self) -> tuple[str, str, dict[str, str], dict[str, float]]:
        """State, its reason, all statistics as text, and the ages (s) of the last observation's streams."""
        with self._lock:
            state, reason, snapshot = self.state, self.reason, self.statistics.snapshot()
            steering = self._steering.values()
        return state, reason, snapshot.values() | steering, snapshot.ages_s

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
                self._running = self._enabled = False
                self._observed.notify_all()
                self._ticked.notify_all()
                self._set_state(FAILED, f'{type(error).__name__}: {error}')
            self._on_failure(error)

    # --- worker ---------------------------------------------------------------------------------

    def _work(self) -> None:
        pin_thread(self._settings.cores)
        while True:
            seen = self._observed.count
            worked = self._plan() or (
                self._enabled and self._engine.ahead(self._sampler.newest(next_frames_ns(self._chunk)))
            )
            with self._lock:
                if not self._running:
                    return
                if not worked:
                    self._observed.wait_after(seen, IDLE_S)
                self._make_changes()

    def _plan(self) -> bool:
        """One cycle, if one is due and possible; returns whether a chunk came of it."""
        with self._lock:
            if not self._enabled:
                return False
            generation, chunk, now_ns = self._generation, self._chunk, self._now_ns()
        if now_ns == 0 or (chunk is not None and now_ns < chunk.replan_stamp_ns):
            return False
        start = time.perf_counter()
        stamp_ns = self._sampler.latest_common_stamp_ns()
        try:
            observation = self._sampler.sample(now_ns if stamp_ns is None else stamp_ns, now_ns)
        except ObservationError as error:
            self._refuse(error, generation, now_ns)
            return False
        if stamp_ns is None or (chunk is not None and stamp_ns < chunk.replan_stamp_ns):
            self._await_frame(generation)
            return False
        if stamp_ns <= self._rejected_frame_ns:
            return False  # what came of this frame was rejected, and would come of it again
        sampled = time.perf_counter()
        try:
            self._engine.reset(self._settings.seed, stamp_ns)
            prediction = self._engine(observation.frames)
            new = self._engine.chunk(prediction.actions, stamp_ns)
            timings_ms = {'sample': 1e3 * (sampled - start), **prediction.timings_ms}
            return self._adopt(new, generation, timings_ms, observation)
        except (InferenceError, ValueError) as error:
            self._reject(error, generation, observation, now_ns)
            return False

    def _adopt(self, chunk: Chunk, generation: int, timings_ms: dict[str, float], seen: Observation) -> bool:
        """Follow a chunk from now on; raises ChunkRejected where the steering refuses it."""
        so_far_ms = timings_ms['sample'] + timings_ms['total']
        for _ in range(PLANS):
            start = time.perf_counter()
            plan = self._steering.plan(chunk, self._log.planning(self._now_ns()))
            guard_ms = 1e3 * (time.perf_counter() - start)
            timings_ms |= {'guard': guard_ms, 'total': so_far_ms + guard_ms}
            with self._lock:
                if generation != self._generation or not self._running:
                    return True
                if not self._steering.adopt(plan):
                    continue
                self._chunk, self._refusal = chunk, None
                self.statistics.add_cycle(timings_ms, seen.ages_s)
                self.statistics.add_chunk(plan.chunk, plan.begins_ns)
                self._outputs.publish_chunk(plan.chunk)
                self._log.adopted(self._engine, seen, plan.begins_ns)
                self._ticked.notify()
                return True
        raise ChunkRejected(f'commands were ahead of the chunk {PLANS} times: planning takes too long')

    def _reject(
        self, error: InferenceError | ValueError, generation: int, seen: Observation, now_ns: int
    ) -> None:
        with self._lock:
            self.statistics.add_rejection(str(error))
            if generation == self._generation:
                self._log.refused(self._engine, seen, str(error))
                self._refusal, self._refused_ns, self._rejected_frame_ns = error, now_ns, seen.stamp_ns
                self._ticked.notify()

    def _refuse(self, error: ObservationError, generation: int, now_ns: int) -> None:
        with self._lock:
            if generation == self._generation:
                self._refusal, self._refused_ns = error, now_ns
                self.statistics.refusals[error.stream] += 1
                self._ticked.notify()

    def _await_frame(self, generation: int) -> None:
        """The streams are fine, only the frame that the next chunk starts from has still to come."""
        with self._lock:
            if generation == self._generation:
                self._refusal = None

    # --- streamer -------------------------------------------------------------------------------

    def _stream(self) -> None:
        with self._lock:
            while self._running:
                now_ns = self._now_ns()
                if 0 < now_ns < self._seen_ns:
                    self.restart()  # a wall clock that was set back: nobody else would tell
                self._seen_ns = now_ns
                wait_s = self._ticks.until_s(now_ns)
                if wait_s <= 0.0 and self._enabled and self._command(now_ns):
                    self._ticks.done(now_ns)
                    continue
                self._ticked.wait(min(IDLE_S, wait_s) if wait_s > 0.0 else IDLE_S)

    def _command(self, now_ns: int) -> bool:
        """Command for this time; False if it has to be waited for."""
        chunk = self._chunk
        begun = chunk is not None and chunk.observation_stamp_ns <= now_ns
        if chunk is not None and begun and now_ns < chunk.replan_stamp_ns:
            return self._follow(now_ns)
        if self._settings.lockstep:
            if self._refusal is None or self._refused_ns < now_ns:
                return False
        elif chunk is not None and begun and now_ns <= chunk.end_stamp_ns and not self._refused_since(chunk):
            self.statistics.bridged_ticks += 1
            return self._follow(now_ns)
        return self._hold(now_ns)

    def _refused_since(self, chunk: Chunk) -> bool:
        """Whether the chunk that should follow this one has been refused an observation."""
        return self._refusal is not None and self._refused_ns >= chunk.replan_stamp_ns

    def _follow(self, now_ns: int) -> bool:
        pose, gripper = self._steering.follow(now_ns)
        edge = self._latch.update(gripper)
        if edge is not None:
            self._outputs.publish_gripper(edge)  # before the pose: they belong together
        self._publish(pose, now_ns, followed=True)
        self._set_state(FOLLOWING, '')
        return True

    def _hold(self, now_ns: int) -> bool:
        """Come to rest and stay there, and say why; before the first command there is nothing to hold."""
        pose = self._steering.hold(now_ns)
        if self._chunk is not None and now_ns > self._chunk.end_stamp_ns:
            self.statistics.underruns += 1
            self._chunk = None
        if self._refusal is not None:
            reason = self._reason(self._refusal)
        else:
            reason = 'no chunk yet' if pose is None else 'the next chunk is late'
        if pose is None:
            self._set_state(WAITING, reason)
            return not self._settings.lockstep
        if self._settings.lockstep or self._refusal is not None:
            self._chunk = None  # what follows a hold starts afresh
        if self.state != HOLDING:
            self.statistics.holds += 1
        self._set_state(HOLDING, reason)
        self._publish(pose, now_ns)
        return True

    def _reason(self, refusal: ObservationError | InferenceError | ValueError) -> str:
        explanation = self._explain(refusal.stream) if isinstance(refusal, ObservationError) else ''
        return f'{refusal}; {explanation}' if explanation else str(refusal)

    def _publish(self, pose: NDArray[np.float64], now_ns: int, followed: bool = False) -> None:
        self._outputs.publish_command(pose, now_ns)
        self._log.ticked(now_ns, followed)
        self.statistics.add_command(now_ns, self._now_ns(), followed)

    def _set_state(self, state: str, reason: str) -> None:
        """Remember state and reason; a change of state is published at once, a new reason with the diagnostics."""
        changed = state != self.state
        self.state, self.reason = state, reason
        if changed:
            self.statistics.state_begins()
            self._outputs.publish_state(state, reason)
