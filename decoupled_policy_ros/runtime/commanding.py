"""What is commanded at a tick of the clock: the chunk, or coming to rest and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.errors import InferenceError, ObservationError
from decoupled_policy_ros.runtime.chunks import Chunk, GripperLatch
from decoupled_policy_ros.runtime.cycles import CycleLog
from decoupled_policy_ros.runtime.joining import Joined
from decoupled_policy_ros.runtime.selection import SamplesDisagree
from decoupled_policy_ros.runtime.states import (
    DISABLED,
    FOLLOWING,
    HOLDING,
    NEEDS_HELP,
    WAITING,
    LoopSettings,
)
from decoupled_policy_ros.runtime.statistics import Statistics
from decoupled_policy_ros.runtime.steering import Plan, Steering
from decoupled_policy_ros.runtime.stopping import come_to_rest

if TYPE_CHECKING:
    from decoupled_policy_ros.runtime.states import Outputs

#: Why there is no next chunk.
Refusal = ObservationError | InferenceError | ValueError


class Commander:
    """Commands of one motion after the other. Not for several threads at once: the loop's lock guards it.

    Args:
        steering: how a chunk is followed.
        outputs: where commands go.
        now_ns: the node's clock.
        settings: how commands are streamed.
        explain: what went wrong lately on a stream, to be added to a refusal.
        log: takes down what is commanded when.

    Attributes:
        state, reason: what the policy is doing, and why.
        chunk: the one that is followed, or taken over to soon; None where the next one starts afresh.
        statistics: since `begin`.
    """

    def __init__(
        self,
        steering: Steering,
        outputs: Outputs,
        now_ns: Callable[[], int],
        settings: LoopSettings,
        explain: Callable[[str], str],
        log: CycleLog,
    ):
        self._log = log
        self._steering, self._outputs, self._now_ns = steering, outputs, now_ns
        self._settings, self._explain = settings, explain
        self._latch = GripperLatch(settings.gripper_hysteresis)
        self.begin()
        self.forget()
        self.state, self.reason = DISABLED, ''

    def begin(self) -> None:
        """Count from zero, and say the next state even if it is the present one."""
        self.statistics = Statistics(self._settings.command_period_ns)
        self.state = ''

    def forget(self, silently: bool = False) -> None:
        """Start afresh; `silently` as for `Steering.reset`."""
        self.chunk: Chunk | None = None
        self._refusal: Refusal | None = None
        self._refused_ns = self._rejected_frame_ns = 0
        self._answered = False
        self._steering.reset(silently)
        self._latch.reset()
        self.statistics.interrupt()

    def follow_task(self, explain: Callable[[str], str]) -> None:
        """Another task's chunks come from now on: a frame that came to nothing may be good enough for it."""
        self._explain, self._rejected_frame_ns = explain, 0

    def end(self, reason: str) -> None:
        """Nothing is commanded any more; not published: whoever ends it says so."""
        self.state, self.reason = DISABLED, reason
        self.statistics.state_begins()

    # --- what becomes of observations -----------------------------------------------------------

    def adopt(self, joined: Joined, plan: Plan) -> bool:
        """Follow a chunk as it is planned; False if the plan came too late, and another one is needed."""
        if self._begins_too_late(plan) or not self._steering.adopt(plan):
            return False
        self.chunk, self._refusal = joined.chunk, None
        self.statistics.add_chunk(plan.chunk, plan.begins_ns)
        self._outputs.publish_chunk(plan.chunk, joined.others)
        return True

    def _begins_too_late(self, plan: Plan) -> bool:
        """Whether a first command would already be on the way, and not where the arm is."""
        first = plan.path is not None and plan.after is None
        return first and not self._settings.lockstep and plan.begins_ns < self._now_ns()

    def reject(self, error: InferenceError | ValueError, frame_ns: int, now_ns: int) -> None:
        """What came of the frame of a stamp can't be followed."""
        self._refusal, self._refused_ns, self._rejected_frame_ns = error, now_ns, frame_ns
        self._answered = False

    @property
    def stays(self) -> bool:
        """Whether the arm is told to stay where it is if it has not been told anything yet.

        Where time waits it would wait for ever: what came of a frame comes of it again, and there is no other.
        """
        return self._settings.lockstep and self.chunk is None

    def rejected(self, frame_ns: int) -> bool:
        """Whether what came of a frame was rejected: it would come of it again."""
        return frame_ns <= self._rejected_frame_ns

    def refuse(self, error: ObservationError, now_ns: int) -> None:
        """There is no valid observation."""
        self._refusal, self._refused_ns = error, now_ns
        self.statistics.refusals[error.stream] += 1

    def await_frame(self) -> None:
        """The streams are fine, only the frame that the next chunk starts from has still to come."""
        self._refusal = None

    # --- commands -------------------------------------------------------------------------------

    def command(self, now_ns: int) -> bool:
        """Command for this time; False if it has to be waited for."""
        chunk = self.chunk
        if chunk is not None and (missed_s := self._steering.missed_s(now_ns)):
            self._refusal = InferenceError(f'no command for {missed_s:.3f} s: begins anew, from rest')
            self._refused_ns = now_ns
            return self._hold(now_ns)
        begun = chunk is not None and chunk.observation_stamp_ns <= now_ns
        if chunk is not None and begun and now_ns < chunk.replan_stamp_ns:
            return self._follow(now_ns)
        if self._settings.lockstep:
            # Where nothing is commanded yet time may go on by itself, and every chunk be refused too late.
            unanswered = chunk is None and self._chunk_refused and not self._answered
            if self._refusal is None or (self._refused_ns < now_ns and not unanswered):
                return False
        elif chunk is not None and begun and now_ns <= chunk.end_stamp_ns and not self._refused_since(chunk):
            self.statistics.bridged_ticks += 1
            return self._follow(now_ns)
        return self._hold(now_ns)

    def come_to_rest(self, since_ns: int, wait: Callable[[float], object]) -> None:
        """Command the way to rest from the last command, at a time, on; see `stopping.come_to_rest`."""
        come_to_rest(self._now_ns, since_ns, self._steering.hold, self._publish, wait)

    @property
    def _chunk_refused(self) -> bool:
        return self._refusal is not None and not isinstance(self._refusal, ObservationError)

    def _refused_since(self, chunk: Chunk) -> bool:
        """Whether the chunk that should follow this one has been refused an observation."""
        return self._refusal is not None and self._refused_ns >= chunk.replan_stamp_ns

    def _follow(self, now_ns: int) -> bool:
        pose, gripper = self._steering.follow(now_ns)
        edge = self._latch.update(gripper)
        if edge is not None:
            self._outputs.publish_gripper(edge)  # before the pose: they belong together
        self._publish(pose, now_ns, followed=True)
        self.set_state(FOLLOWING, '')
        return True

    def _hold(self, now_ns: int) -> bool:
        """Come to rest and stay there, and say why; before the first command there is nothing to hold."""
        self._answered = True
        pose = self._steering.hold(now_ns, begin=self.stays and self._chunk_refused)
        if self.chunk is not None and now_ns > self.chunk.end_stamp_ns:
            self.statistics.underruns += 1
            self.chunk = None
        if self._refusal is not None:
            reason = self._reason(self._refusal)
        else:
            reason = 'no chunk yet' if pose is None else 'the next chunk is late'
        needs_help = isinstance(self._refusal, SamplesDisagree) and self._refusal.needs_help
        if pose is None:
            self.set_state(NEEDS_HELP if needs_help else WAITING, reason)
            return not self._settings.lockstep
        if self._settings.lockstep or self._refusal is not None:
            self.chunk = None  # what follows a hold starts afresh
        if self.state not in (HOLDING, NEEDS_HELP):
            self.statistics.holds += 1
        self.set_state(NEEDS_HELP if needs_help else HOLDING, reason)
        self._publish(pose, now_ns)
        return True

    def _reason(self, refusal: Refusal) -> str:
        explanation = self._explain(refusal.stream) if isinstance(refusal, ObservationError) else ''
        return f'{refusal}; {explanation}' if explanation else str(refusal)

    def _publish(self, pose: NDArray[np.float64], now_ns: int, followed: bool = False) -> None:
        self._outputs.publish_command(pose, now_ns)
        self._log.ticked(now_ns, followed)
        self.statistics.add_command(now_ns, self._now_ns(), followed)

    def set_state(self, state: str, reason: str) -> None:
        """Remember state and reason; a change of state is published at once, a new reason with the diagnostics."""
        changed = state != self.state
        self.state, self.reason = state, reason
        if changed:
            self.statistics.state_begins()
            self._outputs.publish_state(state, reason)
