"""Transitions of a lifecycle node that say what went wrong: rclpy swallows what they raise."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import wraps
from typing import Protocol, TypeVar

from rclpy.context import Context
from rclpy.impl.rcutils_logger import RcutilsLogger
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn

from decoupled_policy_ros.nodes.common import user_error


class Transient(Protocol):
    """A node whose transitions may fail."""

    @property
    def context(self) -> Context:
        """Shut down after Ctrl-C."""

    def get_logger(self) -> RcutilsLogger:
        """The node's."""

    def give_up(self, reason: str) -> None:
        """Be unconfigured again, and say why."""


T = TypeVar('T', bound=Transient)
Transition = Callable[[T, LifecycleState], TransitionCallbackReturn]


def logged(transition: Transition[T]) -> Transition[T]:
    """Log what a transition raises; the node is unconfigured afterwards."""

    @wraps(transition)
    def wrapper(self: T, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return transition(self, state)
        except Exception as error:
            if not self.context.ok():
                return TransitionCallbackReturn.ERROR  # Ctrl-C came: nothing failed, and nobody can be told
            line = user_error(error)
            reason = f'{transition.__name__} failed: {line or error}'
            self.get_logger().error(reason if line else f'{reason}\n{traceback.format_exc()}')
        self.give_up(reason)
        configures = transition.__name__ == 'on_configure'
        return TransitionCallbackReturn.FAILURE if configures else TransitionCallbackReturn.ERROR

    return wrapper
