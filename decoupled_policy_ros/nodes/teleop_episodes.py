"""Buttons and keys of an operator to the services of an episode recorder; nothing here ever waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.node import Node
from rclpy.task import Future
from std_srvs.srv import SetBool, Trigger

from decoupled_policy_ros.nodes.common import LATCHED

#: An answer that takes longer than this is reported; closing a long episode takes a moment.
ANSWER_S = 30.0
#: A recorder says its status once a second; one that is silent for longer is gone.
STATUS_S = 5.0

#: Action -> service, its type, and the request's `data` where it has one.
_SERVICES: dict[str, tuple[str, type, bool | None]] = {
    'start': ('start', Trigger, None),
    'keep_success': ('keep', SetBool, True),
    'keep_failure': ('keep', SetBool, False),
    'discard': ('discard', Trigger, None),
    'rerecord': ('rerecord', Trigger, None),
}


class EpisodeClient:
    """Calls an episode recorder's services and follows its status.

    Args:
        node: the node that calls.
        recorder: the recorder's node name.
        on_recording: called when the recorder has begun an episode.
        before_log: called before a line is logged.
    """

    def __init__(
        self,
        node: Node,
        recorder: str,
        on_recording: Callable[[], None],
        before_log: Callable[[], None],
    ):
        self._node, self._recorder = node, recorder
        self._on_recording, self._before_log = on_recording, before_log
        kinds = {service: kind for service, kind, _ in _SERVICES.values()}
        self._service_clients = {
            service: node.create_client(kind, f'{recorder}/{service}') for service, kind in kinds.items()
        }
        node.create_subscription(DiagnosticStatus, f'{recorder}/status', self._on_status, LATCHED)
        #: What came of the last action.
        self.outcome = ''
        self.state = ''
        self._episode: tuple[str, str] | None = None  # that is being recorded
        self._status_text = ''
        self._status_at: float | None = None
        self._asked: tuple[str, Future, float] | None = None

    @property
    def line(self) -> str:
        """The recorder's own status line, or that there is none."""
        if self._status_at is None:
            return f'no episode recorder {self._recorder!r}'
        silent_s = time.monotonic() - self._status_at
        return self._status_text if silent_s < STATUS_S else f'recorder silent for {silent_s:.0f} s'

    def request(self, action: str) -> None:
        """Ask the recorder for one of EPISODE_ACTIONS; the outcome is logged when it comes."""
        if action == 'start_or_keep':
            action = 'keep_success' if self.state == 'recording' else 'start'
        if self._asked is not None:
            self._say(f'{action} not asked for: still waiting for the answer to {self._asked[0]}', bad=True)
            return
        service, kind, data = _SERVICES[action]
        client = self._service_clients[service]
        if not client.service_is_ready():
            self._say(f'{action} not done: no episode recorder at {client.srv_name}', bad=True)
            return
        request = kind.Request() if data is None else kind.Request(data=data)  # type: ignore[attr-defined]
        future = client.call_async(request)
        self._asked = action, future, time.monotonic()
        future.add_done_callback(self._on_answer)

    def poll(self) -> None:
        """Give up on an answer that does not come."""
        if self._asked is None:
            return
        action, future, asked_at = self._asked
        if time.monotonic() - asked_at > ANSWER_S:
            self._asked = None
            future.cancel()
            self._say(f'{action}: no answer from the episode recorder within {ANSWER_S:g} s', bad=True)

    def _on_answer(self, future: Future) -> None:
        if self._asked is None or future is not self._asked[1] or future.cancelled():
            return
        action, self._asked = self._asked[0], None
        if future.exception() is not None:
            self._say(f'{action} failed: {future.exception()}', bad=True)
            return
        answer: Any = future.result()
        if answer.success:
            self._say(f'{action}: {answer.message or "done"}')
        else:
            self._say(f'{action} refused: {answer.message or "no reason given"}', bad=True)

    def _on_status(self, message: DiagnosticStatus) -> None:
        values = {pair.key: pair.value for pair in message.values}
        self.state = values.get('state', '')
        self._status_text, self._status_at = message.message, time.monotonic()
        # An episode that is thrown away and recorded again has the same name, and no status comes in between.
        episode = (values.get('episode', ''), values.get('discarded', ''))
        before, self._episode = self._episode, episode if self.state == 'recording' else None
        if self._episode not in (None, before):
            self._on_recording()

    def _say(self, outcome: str, bad: bool = False) -> None:
        self.outcome = outcome
        self._before_log()
        # Two calls: rclpy allows one severity for each line that logs.
        if bad:
            self._node.get_logger().warning(f'episode: {outcome}')
        else:
            self._node.get_logger().info(f'episode: {outcome}')
