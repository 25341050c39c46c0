"""Which messages a replayed cycle gets: stamps that are zero, late, in the future, or of a clock that went back."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bag_files import JOINTS, MS, ROBOT, START_NS, joint_positions, joints, kind, write_bag

from decoupled_policy_ros.data.bags.reader import Bag
from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.replay.inputs import Inputs
from decoupled_policy_ros.replay.log import Entry, RecordedLog
from decoupled_policy_ros.replay.playback import Playback, _decide, play
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime.cycles import Cycle, Start

STATE = StreamSpec('proprioception', 'proprioception', (9,), 0.2)
CONTRACT = ObservationContract(20.0, 2, (STATE,), 0.1)
PROPRIOCEPTION = Proprioception(ROBOT, Kinematics(ROBOT))
STEP_NS = 50 * MS


def stamp(step: float) -> int:
    return START_NS + round(step * STEP_NS)


def cycle(step: int) -> Cycle:
    """Of the samples of a step and the one before, with a guard that looked at the newest."""
    samples_ns = [stamp(step - 1), stamp(step)]
    names = ('task', 'sha256', 'go')
    return Cycle(*names, stamp(step), {'proprioception': samples_ns}, 1, 2, 3, False, [samples_ns[-1]])


class Played:
    """Messages of joint states in a bag, taken in turn by the inputs of cycles."""

    def __init__(self, bag: Bag, parts: list[list[Cycle]]) -> None:
        self.inputs = Inputs(bag, ROBOT, CONTRACT, {}, JOINTS, parts)
        self._messages = bag.messages([JOINTS])

    def take(self, count: int) -> None:
        for _ in range(count):
            self.inputs.take(next(self._messages))

    def decide(self, cycle: Cycle, offset: float = 0.0) -> None:
        """It is made of the right messages; `offset` is that of their joints."""
        assert self.inputs.missing(cycle) == ''
        (stamps_ns,) = cycle.samples_ns.values()
        expected = [PROPRIOCEPTION(joint_positions(stamp_ns) + offset) for stamp_ns in stamps_ns]
        observation = self.inputs.observation(cycle)
        np.testing.assert_array_equal(observation.frames['proprioception'], expected)
        at = self.inputs.joints(stamps_ns[-1])
        np.testing.assert_array_equal(at, joint_positions(stamps_ns[-1])[:7] + offset)
        self.inputs.done(cycle)


@contextmanager
def played_bag(folder: Path, messages: Iterable[object], parts: list[list[Cycle]]) -> Iterator[Played]:
    logged = [(START_NS + i * MS, JOINTS, message) for i, message in enumerate(messages)]
    with Bag(write_bag(folder / 'bag', logged)) as bag:
        yield Played(bag, parts)


@pytest.mark.parametrize(
    'between',
    [
        [joints(0)],
        [joints(stamp(-20))],
        [joints(stamp(3), joint_positions(stamp(3)) + 0.1)],
        [joints(stamp(200))],
        [joints(stamp(200)), joints(0), joints(stamp(200)), joints(stamp(-20))],
    ],
    ids=['zero', 'late', 'repeated', 'future', 'all'],
)
def test_a_stamp_that_the_run_refused_costs_no_sample(tmp_path, between):
    steps = [joints(stamp(step)) for step in range(20)]
    cycles = [cycle(step) for step in (4, 8, 19)]
    with played_bag(tmp_path, [*steps[:8], *between, *steps[8:]], [cycles[:2], cycles[2:]]) as played:
        played.inputs.start(0)
        played.take(5)
        played.decide(cycles[0])
        played.take(3 + len(between) + 1)
        played.decide(cycles[1])
        played.inputs.start(1)  # enabled again
        played.take(11)
        played.decide(cycles[2])


@pytest.mark.parametrize('late', [0, 3], ids=['start first', 'messages first'])
@pytest.mark.parametrize('back', [3, 8], ids=['three steps back', 'to the beginning'])
def test_after_a_clock_that_went_back_the_newer_of_two_messages_counts(tmp_path, late, back):
    before = [joints(stamp(step)) for step in range(1, 11)]
    again = [joints(stamp(s), joint_positions(stamp(s)) + 0.01) for s in range(11 - back, 15)]
    parts = [[cycle(4), cycle(10)], [cycle(12 - back), cycle(13)]]
    with played_bag(tmp_path, [*before, *again], parts) as played:
        played.inputs.start(0)
        played.take(4)
        played.decide(parts[0][0])
        played.take(6)
        played.decide(parts[0][1])
        late = min(late, back)  # those that are not newer than what was kept
        played.take(late)
        played.inputs.start(1)
        played.take(len(again) - late)
        for each in parts[1]:
            played.decide(each, 0.01)


def test_of_a_part_that_is_not_played_any_more_no_samples_are_kept(tmp_path):
    cycles = [cycle(step) for step in range(1, 40)]
    unknown = replace(cycles[-1], samples_ns={'touch': [stamp(1)]})
    playback = Playback(starts_ns=[START_NS], broken={0})
    with played_bag(tmp_path, [joints(stamp(step)) for step in range(40)], [[*cycles, unknown]]) as played:
        player = SimpleNamespace(skills={'sha256': SimpleNamespace(inputs=played.inputs)})
        played.take(1)
        for each in cycles:
            played.take(1)
            assert _decide(playback, player, {}, START_NS, each, overdue=False)
            kept_ns = played.inputs._there['proprioception']
            assert len(kept_ns) <= 2 and len(played.inputs._joints) <= 1
        assert _decide(playback, player, {}, START_NS, unknown, overdue=False)
    assert playback.followed == 40 and not playback.played


def test_a_gap_in_the_log_breaks_the_part_that_it_is_in(tmp_path):
    """The log runs ahead of the messages that its decisions wait for."""
    topic, run = '/policy_node/cycles', {'settings': {}}
    begin, again = (Start(now_ns, run) for now_ns in (1, 2))
    log = RecordedLog(
        topic, [Entry(START_NS, [begin, cycle(1)]), Entry(START_NS, [again]), Entry(START_NS, [], '3')], 0
    )
    text = kind('std_msgs/msg/String')('')
    first = [(START_NS + i, topic, text) for i in range(3)]
    states = [(START_NS + (i + 3) * MS, JOINTS, joints(stamp(i))) for i in range(2)]
    with Bag(write_bag(tmp_path / 'bag', [*first, *states])) as bag:
        inputs = Inputs(bag, ROBOT, CONTRACT, {}, JOINTS, log.parts)
        skills = {'sha256': SimpleNamespace(inputs=inputs)}
        followed = []
        player = SimpleNamespace(skills=skills, start=lambda *_: None, cycle=followed.append)
        playback = play(bag, log, player)
    assert playback.played == 1 and followed == [cycle(1)]
    assert playback.broken == {1} and 'messages 3 of' in playback.problems[0]
