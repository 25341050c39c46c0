"""Time in the node, over DDS: chunks are there when they are due, join without a jump, and their spread is said."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from fault_cell import Cell, running_policy
from untrained import save_untrained_policy

from decoupled_policy_ros.nodes.common import time_ns
from decoupled_policy_ros.observation.messages import pose_from_message

pytestmark = pytest.mark.process

#: Circles of `told_policy` are travelled at 0.16 m/s; a new chunk begins them anew, 10 mm and more away.
FASTEST_M_S = 0.45
CYCLES = 4


@pytest.fixture
def cell() -> Iterator[Cell]:
    cell = Cell()
    yield cell
    cell.close()


def speeds_m_s(cell: Cell) -> np.ndarray:
    """Speeds of the commands so far, from one to the next."""
    commands = cell.received('target_pose')
    positions = np.array([pose_from_message(m)[:3, 3] for m in commands])
    stamps_s = np.array([time_ns(m.header.stamp) for m in commands]) * 1e-9
    return np.linalg.norm(np.diff(positions, axis=0), axis=1) / np.diff(stamps_s)


def test_chunks_are_in_time_and_join_without_a_jump(cell, tmp_path):
    """Without a guard, so that nothing else makes them join."""
    parameters = {'guard': False, 'inpaint': True, 'samples': 4}
    with running_policy(tmp_path, **parameters):
        cell.is_moving()
        # On a machine with enough to do a cycle may take longer than any of late: then it is looked again.
        steady = False
        for _ in range(60):
            cell.forget_commands()
            before = cell.diagnostics('policy')
            cell.wait_for(
                lambda before=before: (
                    int(cell.diagnostics('policy')['cycles']) >= int(before['cycles']) + CYCLES
                ),
                'cycles',
            )
            after = cell.diagnostics('policy')
            steady = all(after[name] == before[name] for name in ('bridged_ticks', 'holds', 'cycles_missed'))
            if steady:
                break
        assert steady
        assert float(after['requested_ahead_ms']) > 10.0
        assert float(after['spread_m']) < 1e-4  # four samples of a network that says the same
        assert speeds_m_s(cell).max() < FASTEST_M_S
        status = cell.last('policy_node/status')
        assert {'spread_m', 'requested_ahead_ms'} <= {pair.key for pair in status.values}


def test_samples_that_lie_apart_are_said_and_held_against(cell, tmp_path):
    """An untrained network, whose samples lie anywhere."""
    parameters = {
        'task': str(save_untrained_policy(tmp_path / 'models')), 'samples': 4, 'spread_hold_m': 0.001,
        'spread_help_s': 1.0,
    }  # fmt: skip
    with running_policy(tmp_path, **parameters):
        cell.status('needs_help', 'the 4 samples lie')
        values = cell.reported('policy', 'please help', DiagnosticStatus.ERROR)
        assert float(values['spread_m']) > 0.001
        assert cell.received('target_pose') == []


@pytest.mark.parametrize(
    ('values', 'reason'),
    [
        (
            {'samples': 2, 'spread_slow_m': 0.2, 'spread_hold_m': 0.1},
            'spread_hold_m 0.1 must not be below spread_slow_m 0.2',
        ),
    ],
)
def test_limits_that_contradict_each_other_are_refused(cell, tmp_path: Path, values, reason):
    with running_policy(tmp_path, **values):
        cell.status('failed', reason)
