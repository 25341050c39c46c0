"""What the policy reports of itself: rates, latencies and what was missed, from numbers that are known."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.statistics import WINDOW, Statistics, Window

MS = 1_000_000
PERIOD_NS = 20 * MS
START_NS = 1_000_000 * MS


def chunk(stamp_ns: int) -> Chunk:
    """A chunk at 20 Hz of which 8 waypoints are executed: the next one is due 400 ms later."""
    actions = np.zeros((16, 10))
    actions[:, [3, 7]] = 1.0
    return Chunk(actions, stamp_ns, 20.0)


def run(statistics: Statistics, delays_ms: list[float]) -> dict[str, str]:
    """Commands on a grid of 20 ms, each published so much after its time."""
    for i, delay_ms in enumerate(delays_ms):
        stamp_ns = START_NS + i * PERIOD_NS
        statistics.add_command(stamp_ns, stamp_ns + round(delay_ms * MS), followed=True)
    return statistics.snapshot().values()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.integers(1, 10))
def test_a_window_holds_the_newest_values(values, size):
    window = Window(size)
    for value in values:
        window.add(value)
    assert sorted(window.copy()) == sorted(values[-size:])


def test_jitter_is_the_distance_from_the_period():
    steady = run(Statistics(PERIOD_NS), [1.0] * 50)
    assert float(steady['command_rate_hz']) == 50.0
    assert steady['command_jitter_p99_ms'] == steady['command_jitter_max_ms'] == '0.00'
    late = run(Statistics(PERIOD_NS), [1.0] * 49 + [8.0])
    assert (late['command_jitter_p50_ms'], late['command_jitter_max_ms']) == ('0.00', '7.00')
    assert late['command_period_ms'] == '20.00'


def test_where_time_waits_there_is_no_jitter():
    assert not [key for key in run(Statistics(None), [0.0] * 5) if key.startswith(('command_j', 'command_r'))]


def test_before_the_first_command_no_figure_is_made_up():
    values = Statistics(PERIOD_NS).snapshot().values()
    assert not [key for key in values if key.endswith(('p50_ms', 'p99_ms', 'max_ms', 'rate_hz'))]


def test_after_an_interruption_the_pause_is_no_jitter():
    statistics = Statistics(PERIOD_NS)
    run(statistics, [0.0] * 5)
    statistics.interrupt()
    statistics.add_command(START_NS + 5_000 * MS, START_NS + 5_000 * MS, followed=True)
    assert statistics.snapshot().values()['command_jitter_max_ms'] == '0.00'


def test_reaction_is_from_the_observation_to_the_first_command_of_its_chunk():
    statistics = Statistics(PERIOD_NS)
    statistics.add_chunk(chunk(START_NS), START_NS + 60 * MS)
    statistics.add_command(START_NS + 40 * MS, START_NS + 41 * MS, followed=True)  # still the chunk before
    statistics.add_command(START_NS + 45 * MS, START_NS + 46 * MS, followed=False)
    assert 'observation_to_command_p50_ms' not in statistics.snapshot().values()
    statistics.add_command(START_NS + 60 * MS, START_NS + 62 * MS, followed=True)
    statistics.add_command(START_NS + 80 * MS, START_NS + 82 * MS, followed=True)
    values = statistics.snapshot().values()
    assert values['observation_to_command_p50_ms'] == values['observation_to_command_max_ms'] == '62.00'


@pytest.mark.parametrize(
    ('gaps_ms', 'missed'),
    [
        ([400, 400, 400], 0),
        ([433, 433], 0),  # a camera at 30 Hz: the first frame after the time that it was due
        ([475], 1),
        ([800], 1),
        ([874], 1),
        ([875], 2),
        ([400, 1200], 2),
    ],
)
def test_cycles_missed(gaps_ms, missed):
    statistics = Statistics(PERIOD_NS)
    stamp_ns = START_NS
    statistics.add_chunk(chunk(stamp_ns), stamp_ns)
    for gap_ms in gaps_ms:
        stamp_ns += gap_ms * MS
        statistics.add_chunk(chunk(stamp_ns), stamp_ns)
    assert statistics.snapshot().values()['cycles_missed'] == str(missed)


def test_what_was_disabled_meanwhile_was_not_missed():
    statistics = Statistics(PERIOD_NS)
    statistics.add_chunk(chunk(START_NS), START_NS)
    statistics.interrupt()
    statistics.add_chunk(chunk(START_NS + 60_000 * MS), START_NS)
    assert statistics.cycles_missed == 0


def test_streaming_takes_no_more_memory_with_time():
    statistics = Statistics(PERIOD_NS)

    def stream(commands: int) -> None:
        for i in range(commands):
            statistics.add_command(START_NS + i * PERIOD_NS, START_NS + i * PERIOD_NS, followed=True)
            if i % 20 == 0:
                statistics.add_chunk(chunk_of_stream, START_NS)
                statistics.add_cycle({'total': 1.0}, {})

    chunk_of_stream = chunk(START_NS)
    stream(WINDOW)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        stream(3 * WINDOW)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 2000


def test_a_snapshot_does_not_change_any_more():
    statistics = Statistics(PERIOD_NS)
    run(statistics, [0.0] * 5)
    snapshot = statistics.snapshot()
    before = snapshot.values()
    run(statistics, [9.0] * 5)
    assert snapshot.values() == before
