"""`decoupled-policy watch`: listens to /diagnostics and every ~/status, and shows what it hears in a terminal."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import get_rmw_implementation_identifier
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.nodes.common import LATCHED
from decoupled_policy_ros.nodes.dashboard import SILENCE_S, Board
from decoupled_policy_ros.nodes.signals import interrupt_later

#: Nodes speak once a second: so long (s) after the first one everybody has.
ROUND_S = 1.2
REFRESH_S, LINE_S = 0.25, 1.0
#: Columns of what goes into a file or a pipe.
WIDE = 140
STATUS_TYPE = 'diagnostic_msgs/msg/DiagnosticStatus'


class Watcher(Node):
    """Collects on a board what nodes say.

    Args:
        board: gets every status.
    """

    def __init__(self, board: Board, **options: object):
        name = f'watch_{os.getpid()}'  # several may look at once
        super().__init__(name, enable_rosout=False, start_parameter_services=False, **options)
        self._board, self._since_s = board, time.monotonic()
        self._topics: set[str] = set()
        # Best effort matches every publisher, whatever it offers.
        qos = QoSProfile(depth=50, reliability=ReliabilityPolicy.BEST_EFFORT)
        self.create_subscription(DiagnosticArray, '/diagnostics', self._on_diagnostics, qos)

    @property
    def listening_s(self) -> float:
        """For how long it has been there."""
        return time.monotonic() - self._since_s

    def find_statuses(self) -> None:
        """Listen to every status topic that is there by now: a change of state is said there at once."""
        for topic, kinds in self.get_topic_names_and_types():
            if topic.endswith('/status') and STATUS_TYPE in kinds and topic not in self._topics:
                self._topics.add(topic)
                self.create_subscription(DiagnosticStatus, topic, self._on_status, LATCHED)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self._on_status(status)

    def _on_status(self, status: DiagnosticStatus) -> None:
        values = {pair.key: pair.value for pair in status.values}
        self._board.take(status.name, status.level[0], status.message, values, time.monotonic())


def watch(node: str, once: bool, wait_s: float, svg: Path | None) -> None:
    """Show what nodes say until Ctrl-C, or once.

    Args:
        node: only this one; '' is everybody.
        once: print the tables as soon as everybody has spoken, and end.
        wait_s: with `once`, how long to wait for the first word.
        svg: with `once`, also save a picture of the tables.

    Raises:
        ConfigError: with `once`, nothing was heard in time.
    """
    console = Console(record=svg is not None)
    if not console.is_terminal:
        console.width = WIDE
    board = Board(node)
    context = rclpy.Context()
    rclpy.init(args=[], context=context, signal_handler_options=SignalHandlerOptions.NO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the terminal is put right in any case
    executor = SingleThreadedExecutor(context=context)
    watcher = Watcher(board, context=context)
    executor.add_node(watcher)
    try:
        if once:
            _listen(executor, watcher, wait_s, lambda: any(heard.values for _, heard in board.shown))
            if not board.shown:
                raise ConfigError(nothing_heard(board, node, wait_s))
            _listen(executor, watcher, ROUND_S)
            console.print(_arranged(board, console))
            if svg is not None:
                console.save_svg(str(svg), title='decoupled-policy watch')
        elif console.is_terminal:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while True:
                    _listen(executor, watcher, REFRESH_S)
                    live.update(_picture(board, node, console, watcher), refresh=True)
        else:
            while True:
                _listen(executor, watcher, LINE_S)
                line = board.line(time.monotonic()) or _nothing_yet(board, node, watcher)
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        pass
    finally:
        executor.shutdown()
        context.try_shutdown()


def nothing_heard(board: Board, node: str, waited_s: float) -> str:
    """Why there may be nothing to show."""
    if board.nodes:
        return f'nothing heard of {node!r} for {waited_s:.0f} s; heard: {", ".join(board.nodes)}'
    domain = os.environ.get('ROS_DOMAIN_ID') or '0'
    discovery = os.environ.get('ROS_AUTOMATIC_DISCOVERY_RANGE') or 'SUBNET'
    return (
        f'nothing heard on /diagnostics for {waited_s:.0f} s: is a node running with ROS_DOMAIN_ID {domain}, '
        f'ROS_AUTOMATIC_DISCOVERY_RANGE {discovery} and {get_rmw_implementation_identifier()}?'
    )


def _listen(
    executor: SingleThreadedExecutor, watcher: Watcher, for_s: float, until: Callable[[], bool] | None = None
) -> None:
    """Take messages for so long, or until something is so."""
    end_s = time.monotonic() + for_s
    watcher.find_statuses()
    while (rest_s := end_s - time.monotonic()) > 0 and not (until is not None and until()):
        with interrupt_later():
            executor.spin_once(timeout_sec=min(rest_s, REFRESH_S))


def _picture(board: Board, node: str, console: Console, watcher: Watcher) -> RenderableType:
    if board.shown:
        return _arranged(board, console)
    return Text(_nothing_yet(board, node, watcher), 'yellow')


def _nothing_yet(board: Board, node: str, watcher: Watcher) -> str:
    if watcher.listening_s < SILENCE_S:
        return 'listening ...'
    return nothing_heard(board, node, watcher.listening_s)


def _arranged(board: Board, console: Console) -> RenderableType:
    """States on top and the rest side by side where a person looks; one below the other for a script."""
    states, *rest = board.tables(time.monotonic())
    if console.is_terminal:
        return Group(states, '', Columns(rest, padding=(1, 3)))
    return Group(states, *(part for table in rest for part in ('', table)))
