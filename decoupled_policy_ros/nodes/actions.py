"""Commands that are goals of an action: the newest counts, and nobody waits for a server.

control_msgs comes with a ROS installation only, so its actions are looked up when they are asked for.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

from action_msgs.msg import GoalStatus
from rclpy.action import ActionClient
from rclpy.node import Node

from decoupled_policy_ros.errors import ConfigError


def control_action(name: str) -> Any:
    """An action type of control_msgs.

    Raises:
        ConfigError: control_msgs is not installed.
    """
    try:
        return getattr(importlib.import_module('control_msgs.action'), name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'the action {name} needs the ROS package control_msgs, which is not installed: '
            f'apt install ros-$ROS_DISTRO-control-msgs'
        ) from error


class LatestGoal:
    """Sends goals to one action server; a newer goal replaces an older one there. Any thread may call it.

    Args:
        client: an rclpy ActionClient.
        name: of the action, for messages.
        keep: hold a goal that found no server until there is one.

    Attributes:
        lost: told why the newest goal was not done, and whether somebody cancelled it; any thread may call it,
            whatever it holds.
    """

    def __init__(self, client: ActionClient, name: str, keep: bool):
        self._client, self.name, self._keep = client, name, keep
        self.lost: Callable[[str, bool], None] = lambda answer, cancelled: None
        self._lock = threading.Lock()
        self._waiting: Any = None
        self._sent = 0
        self._answer = ''

    @classmethod
    def to(cls, node: Node, kind: Any, name: str, keep: bool) -> LatestGoal:
        """Goals of an action type to the server of a (relative) name."""
        return cls(ActionClient(node, kind, name), name, keep)

    def close(self) -> None:
        """Forget the server; what it does goes on."""
        self._client.destroy()

    def forget(self) -> None:
        """Don't send a goal that is waiting for a server."""
        with self._lock:
            self._waiting = None

    def send(self, goal: Any) -> None:
        """Send a goal now, or, if it is kept, as soon as there is a server."""
        with self._lock:
            self._waiting = goal
        missing = self.missing()
        if not self._keep and missing:
            self.forget()
            self.lost(missing, False)

    def missing(self) -> str:
        """What is missing, if anything is; sends a goal that has been waiting."""
        with self._lock:
            if not self._client.server_is_ready():
                return f'no action server {self.name}'
            goal, self._waiting = self._waiting, None
            if goal is None:
                return ''
            self._sent += 1
            number, self._answer = self._sent, ''
            future = self._client.send_goal_async(goal)  # by the lock: goals of two threads keep their order
        # Without the lock: the server may have answered, and then the callback is called here.
        future.add_done_callback(lambda done: self._answered(number, done.result()))
        return ''

    def trouble(self) -> str:
        """What is missing, or what became of the newest goal if it was not done."""
        return self.missing() or self._answer

    def _answered(self, number: int, handle: Any) -> None:
        if not handle.accepted:
            self._note(number, f'{self.name} refused the goal')
            return
        future = handle.get_result_async()
        future.add_done_callback(lambda done: self._ended(number, done.result().status))

    def _ended(self, number: int, status: int) -> None:
        if status == GoalStatus.STATUS_ABORTED:
            self._note(number, f'{self.name} gave the goal up')
        elif status == GoalStatus.STATUS_CANCELED:
            self._note(number, f'{self.name} cancelled the goal', cancelled=True)

    def _note(self, number: int, answer: str, cancelled: bool = False) -> None:
        with self._lock:
            if number != self._sent:
                return  # what becomes of a goal that has been replaced is of no interest
            self._answer = answer
        self.lost(answer, cancelled)
