"""The log of a policy's decisions: it is read as it was written, and what differs between two runs is named."""

from types import SimpleNamespace

import numpy as np
import pytest

from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.observation.sampler import Observation
from decoupled_policy_ros.replay.messages import POSE, first_difference, pose_message
from decoupled_policy_ros.runtime.cycles import (
    REFUSED,
    TICKS,
    Cycle,
    CycleLog,
    Start,
    Ticks,
    decisions_from_text,
    decisions_to_text,
)
from decoupled_policy_ros.runtime.joining import Wish
from decoupled_policy_ros.runtime.run_record import run_differences, software

STAMP_NS = 1_795_701_884_148_302_307  # no float64 holds it
DECISIONS = [
    Start(STAMP_NS, {'scale': 0.1 + 0.2, 'tiny': 5e-324, 'quat_xyzw': [-0.0, 1 / 3, 2**0.5, 1e300]}),
    Cycle(
        'lift',
        'abc',
        'lift',
        STAMP_NS,
        {'wrist': [STAMP_NS - 1, STAMP_NS]},
        STAMP_NS + 1,
        STAMP_NS + 2,
        STAMP_NS + 3,
        True,
        [None, STAMP_NS],
    ),
    Ticks('hold', [STAMP_NS + 3, STAMP_NS + 23_000_001]),
    Cycle('lift', None, '', STAMP_NS, {}, 1, 0, 0, False, [], 'join: 0.2 m above "0.15"'),
]


def test_decisions_are_read_as_they_were_written():
    number, decisions = decisions_from_text(decisions_to_text(7, DECISIONS))
    assert number == 7 and decisions == DECISIONS
    assert str(decisions[0].run['quat_xyzw'][0]) == '-0.0'


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('{}', "is no message of a log of cycles: KeyError('format')"),
        ('[1]', 'is no message of a log'),
        ('{"format": 99}', 'format 99; this version reads format 1'),
        ('{"format": 1, "number": 0, "decisions": [{"kind": "guess"}]}', "KeyError('guess')"),
        ('{"format": 1, "number": 0, "decisions": [{"kind": "ticks", "when": 3}]}', 'unexpected keyword'),
    ],
)
def test_what_is_no_log_is_refused_with_the_reason(text, reason):
    with pytest.raises(DatasetError) as error:
        decisions_from_text(text)
    assert reason in str(error.value)


#: What the log looks at of an engine.
ENGINE = SimpleNamespace(
    policy=SimpleNamespace(task=SimpleNamespace(name='lift', sha256='abc')), instruction='up'
)


class Joints:
    """Joints since a millisecond before now."""

    def at(self, now_ns: int):
        return now_ns - 1_000_000, np.zeros(7)

    def why_not(self, now_ns: int) -> str:
        return ''


def test_a_log_has_all_that_was_decided_in_its_order():
    texts: list[str] = []
    log = CycleLog(texts.append, lambda: {'seed': 3})
    clock, joints = log.clock(lambda: 5), log.joints(Joints())
    clock()
    log.started()
    observation = Observation(100, {}, {'wrist': 0.0}, {'wrist': (50, 100)})
    for ticks in (TICKS + 10, 3):
        log.planning(2_000_000)
        joints.positions(2_000_000)
        log.adopted(ENGINE, observation, 120, Wish(100, 110, None, None))
        for i in range(ticks):
            log.ticked(200 + i, followed=True)
    log.ticked(300, followed=False)
    log.refused(ENGINE, observation, 'too fast', stays=False)
    log.started()
    messages = [decisions_from_text(text) for text in texts]
    assert [number for number, _ in messages] == list(range(len(messages)))
    cycle = Cycle('lift', 'abc', 'up', 100, {'wrist': [50, 100]}, 2_000_000, 120, 110, False, [1_000_000])
    assert [decision for _, decisions in messages for decision in decisions] == [
        Start(5, {'seed': 3}),
        cycle,
        Ticks('follow', list(range(200, 200 + TICKS))),
        Ticks('follow', list(range(200 + TICKS, 210 + TICKS))),
        cycle,
        Ticks('follow', [200, 201, 202]),
        Ticks('hold', [300]),
        Cycle('lift', 'abc', 'up', 100, {'wrist': [50, 100]}, 2_000_000, 0, 0, False, [], 'too fast'),
        Start(0, {'seed': 3}),
    ]


def test_a_cycle_says_how_often_the_task_had_been_loaded_anew():
    texts: list[str] = []
    log = CycleLog(texts.append)
    again = SimpleNamespace(**vars(ENGINE))  # the same file
    for engine in (ENGINE, ENGINE, again, again, ENGINE):
        log.adopted(engine, Observation(100, {}, {}, {}), 120, Wish(100, 110, None, None))
    cycles = [decision for text in texts for decision in decisions_from_text(text)[1]]
    assert [cycle.swap for cycle in cycles] == [0, 0, 1, 1, 2]


def test_chunks_that_are_refused_for_long_are_written_down_a_few_at_a_time():
    """Before the first command nothing else happens; all at once would hold up the first command."""
    texts: list[str] = []
    log = CycleLog(texts.append)
    for _ in range(10 * REFUSED + 1):
        log.refused(ENGINE, Observation(100, {}, {}, {}), 'too fast', stays=False)
    assert [len(decisions_from_text(text)[1]) for text in texts] == [REFUSED] * 10


def test_a_log_that_nobody_reads_holds_nothing():
    log = CycleLog()
    for i in range(10 * TICKS):
        log.ticked(i, followed=True)
    assert log._pending == [] and log._ticks.stamps_ns == []


def test_differences_of_runs_are_named_with_both_values():
    run = {'seed': 3, 'settings': {'task': '/here', 'threads': 1}, 'software': software()}
    assert run_differences(run, run) == []
    other = {
        'seed': 4,
        'settings': {'task': '/there', 'threads': 2},
        'software': software() | {'torch': '0.1'},
    }
    assert run_differences(run, other) == [
        'seed: 3 in the run, 4 now',
        'settings.threads: 1 in the run, 2 now',
        f"software.torch: {software()['torch']!r} in the run, '0.1' now",
    ]


def test_the_first_bit_that_differs_is_found():
    pose = np.eye(4)
    recorded, _ = pose_message(pose, 'base', STAMP_NS, None)
    pose[1, 3] = -0.0
    replayed, _ = pose_message(pose, 'base', STAMP_NS, None)
    assert first_difference(recorded, recorded) is None
    assert first_difference(recorded, replayed) == ('pose.position.y', 0.0, -0.0)
    assert recorded.__msgtype__ == POSE
