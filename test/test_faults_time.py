"""Faults of time: a clock that jumps forward or back, stands still, or never begins; inference slower than a chunk."""

from collections.abc import Iterator

import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from fault_cell import Cell, running_policy
from live_robot import Faults
from ros_harness import NodeProcess

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


def test_the_clock_stands_still(node, cell):
    """use_sim_time, and a simulator that is paused: no time, no commands."""
    moved(cell)
    cell.body.faults = Faults(clock_stands=True)
    cell.reported('policy', 'holding: /clock stands still', DiagnosticStatus.WARN)
    cell.is_silent()
    moved(cell)
