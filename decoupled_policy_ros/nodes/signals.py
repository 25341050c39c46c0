"""Ctrl-C, SIGTERM and the end of the terminal: they ask a process to end, and interrupt no code."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

import rclpy
from rclpy.signals import SignalHandlerOptions, install_signal_handlers, uninstall_signal_handlers


def ending() -> tuple[signal.Signals, ...]:
    """The signals that ask a process to end; that of a terminal or ssh session that is gone unless nohup ignores it."""
    gone = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *gone)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in ending()}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def interrupted_by_all() -> AbstractContextManager[None]:
    """Within the block each of them raises KeyboardInterrupt, as Ctrl-C does: what has to be ended is ended."""
    return _handled_by(signal.default_int_handler)


@contextmanager
def interrupt_later() -> Iterator[None]:
    """Hold these signals back until the end of the block, which then raises KeyboardInterrupt.

    Compiled code makes another error of a KeyboardInterrupt, and one within Popen leaves a child that nobody knows of.
    """
    seen: list[int] = []
    # A function and not SIG_IGN, which children would inherit.
    with _handled_by(lambda number, frame: seen.append(number)):
        yield
    if seen:
        raise KeyboardInterrupt


@contextmanager
def shut_down_by_signals(wind_down: Callable[[], None]) -> Iterator[None]:
    """Within the block these signals shut the context down, once `wind_down` has returned, and do no more.

    They interrupt no code: a KeyboardInterrupt would come out of compiled code as whatever error that makes of it.
    `wind_down` is called on another thread and the executor goes on meanwhile: with rclpy's own handlers nobody could
    say a last word. Under ros2 launch Ctrl-C arrives twice; the second one changes nothing.
    """

    def wait() -> None:
        while number := reader.recv(1):
            if number[0] not in ends:
                continue
            try:
                wind_down()
            finally:
                # In this order: rclpy's own handlers wake the executor before they shut the context down, and one that
                # is the faster of the two waits again, for ever.
                rclpy.try_shutdown()
                install_signal_handlers(SignalHandlerOptions.ALL)  # wake what waits without an executor
                signal.raise_signal(signal.SIGTERM)
            return

    ends = ending()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    thread = threading.Thread(target=wait, name='signals', daemon=True)
    thread.start()
    # Python would only look at a signal once the executor comes back from waiting; the socket hears of it at once.
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in ends:
        signal.signal(number, lambda number, frame: None)
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        writer.shutdown(socket.SHUT_RDWR)  # also where a child has a copy of it
        writer.close()
        thread.join()
        reader.close()
        uninstall_signal_handlers()  # else they can not be installed again
