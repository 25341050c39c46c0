"""Faults of time: a clock that jumps forward or back, stands still, or never begins; inference slower than a chunk."""

import random
import signal
import time
from collections.abc import Iterator

import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from fault_cell import Cell, policy_parameters, running_policy
from live_robot import Faults
from ros_harness import NodeProcess, node_process

pytestmark = pytest.mark.process


@pytest.fixture(scope='module')
def cell() -> Iterator[Cell]:
    """A robot that publishes /clock, and begins with it when it is told to."""
    cell = Cell(clock_hz=100.0)
    cell.body.faults = Faults(clock_stands=True)
    yield cell
    cell.close()


@pytest.fixture(scope='module')
def node(tmp_path_factory, cell) -> Iterator[NodeProcess]:
    with running_policy(tmp_path_factory.mktemp('faults'), use_sim_time=True) as node:
        cell.reported('policy', 'waiting: nothing on /clock', DiagnosticStatus.WARN)
        yield node


def moved(cell: Cell) -> None:
    cell.body.faults = Faults()
    cell.is_moving()


def test_there_is_no_clock(node, cell):
    cell.is_silent()
    moved(cell)


def test_the_clock_jumps_forward(node, cell):
    """What was seen is too old at once; what comes after the jump is followed."""
    moved(cell)
    cell.forget()
    cell.body.faults = Faults(clock_s=5.0)
    cell.has_said('holding')
    cell.is_moving()


def test_the_clock_jumps_back(node, cell):
    cell.body.faults = Faults(clock_s=5.0)
    cell.is_moving()
    length = len(node.output())
    cell.body.faults = Faults()
    cell.wait_for(lambda: 'the clock went back by' in node.output()[length:], 'the warning')
    cell.is_moving()


def test_the_node_is_stalled(tmp_path):
    """Stopped again and again for up to 0.15 s, as by a machine that has too much to do: late, but never a jump."""
    cell, chance = Cell('stalled'), random.Random(1)
    try:
        with node_process('policy_node', tmp_path / 'log', policy_parameters(tmp_path), 'stalled') as node:
            cell.is_moving()
            for _ in range(40):
                time.sleep(chance.uniform(0.02, 0.2))
                node.process.send_signal(signal.SIGSTOP)
                time.sleep(chance.uniform(0.005, 0.15))
                node.process.send_signal(signal.SIGCONT)
            cell.is_moving()
            assert float(cell.diagnostics('policy')['command_jitter_max_ms']) > 20.0
            assert 'Traceback' not in node.output()
    finally:
        cell.close()


def test_the_clock_stands_still(node, cell):
    """use_sim_time, and a simulator that is paused: no time, no commands."""
    moved(cell)
    cell.body.faults = Faults(clock_stands=True)
    cell.reported('policy', 'holding: /clock stands still', DiagnosticStatus.WARN)
    cell.is_silent()
    moved(cell)
