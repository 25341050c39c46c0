"""A node with a context and an executor of its own, spun in a thread."""

from __future__ import annotations

import threading
from contextlib import suppress

import rclpy
from rclpy.exceptions import InvalidHandle
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node


class SpunNode(Node):
    """Spins from `spin_in_background` until `close`.

    Args:
        name, namespace: of the node.
    """

    def __init__(self, name: str, namespace: str = '') -> None:
        self._context = rclpy.Context()
        rclpy.init(args=[], context=self._context)
        super().__init__(name, namespace=namespace, context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self)
        self._thread = threading.Thread(target=self._spin, daemon=True)

    def spin_in_background(self) -> None:
        """Begin, once everything that callbacks need is there."""
        self._thread.start()

    def _spin(self) -> None:
        with suppress(ExternalShutdownException):
            while True:
                with suppress(InvalidHandle):  # the test destroyed something while the executor looked at it
                    self._executor.spin()
                    return

    def close(self) -> None:
        """Stop spinning and leave the graph: the context alone leaves a node there until it is garbage."""
        self._executor.shutdown()
        self._thread.join(10)
        self.destroy_node()
        self._context.try_shutdown()
