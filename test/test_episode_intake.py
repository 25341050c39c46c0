"""What the episode recorder takes, and the time that it is logged by."""

import pytest
import rclpy
from std_msgs.msg import String

from decoupled_policy_ros.nodes.episode_clock import EpisodeClock
from decoupled_policy_ros.nodes.episode_intake import Budget, RawIntake
from decoupled_policy_ros.nodes.recorder_intake import Offer

START_NS = 1_700_000_000_000_000_000
MS, S = 1_000_000, 1_000_000_000


class Time:
    """The two clocks of a system whose user can set one of them."""

    def __init__(self):
        self.monotonic_ns, self.set_ns = 5 * S, START_NS - 5 * S
        self.clock = EpisodeClock(self.system_ns, lambda: self.monotonic_ns)

    def system_ns(self):
        return self.monotonic_ns + self.set_ns

    def pass_by(self, duration_ns):
        self.monotonic_ns += duration_ns


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def intake(rclpy_context, time):
    node = rclpy.create_node('intake', context=rclpy_context)
    intake = RawIntake(node, String, 'words', 100, Budget(10**6), time.clock)
    yield intake
    intake.close()
    node.destroy_node()


def receive(intake, received_ns, data=b'x', sequence=0):
    info = {'received_timestamp': received_ns, 'source_timestamp': 1, 'publication_sequence_number': sequence}
    intake._on_raw(data, info)


@pytest.mark.parametrize('set_by_ns', [-3600 * S, 3600 * S, -200 * MS])
def test_nothing_is_lost_where_the_clock_is_set_during_an_episode(time, intake, set_by_ns):
    waiting_ns = time.system_ns()
    time.pass_by(5 * MS)
    intake.begin(time.clock.restart(), None)
    receive(intake, waiting_ns)  # is from before the episode
    for k in range(100):
        time.pass_by(10 * MS)
        received_ns = time.system_ns()
        time.pass_by(5 * MS)  # until it is taken
        if k == 50:
            time.set_ns += set_by_ns
        receive(intake, received_ns)
    log_ns = [message.log_ns - START_NS for message in intake.take()]
    assert log_ns == [15 * MS * (k + 1) for k in range(100)]
    assert intake.received == 100
    assert time.clock.set_by_ns() == set_by_ns


@pytest.mark.parametrize('set_by_ns', [51 * MS, 55 * MS, 58 * MS, -55 * MS])
def test_messages_stay_in_order_where_a_clock_is_set_by_little(time, intake, set_by_ns):
    """Some are taken as soon as they come, and others 9 ms later."""
    intake.begin(time.clock.restart(), None)
    for k in range(200):
        if k == 50:
            time.set_ns += set_by_ns
        received_ns = [time.system_ns() + i * MS for i in range(10)]
        time.pass_by(10 * MS)
        for stamp_ns in received_ns:
            receive(intake, stamp_ns)
    log_ns = [message.log_ns for message in intake.take()]
    assert len(log_ns) == 2000 and log_ns[600:] == sorted(log_ns[600:])


def test_no_message_is_logged_ahead_of_its_time(time):
    time.clock.restart()
    time.set_ns += 3600 * S
    time.pass_by(S)
    received_ns = time.system_ns()
    time.set_ns -= S
    assert time.clock.reception_ns(received_ns) <= time.clock.now_ns()


def taken(intake, begin_ns):
    return [(message.data, message.log_ns - begin_ns) for message in intake.take()]


def test_latched_messages_from_before_an_episode_are_its_first(time, intake):
    intake.profile = Offer(reliable=True, latched=True)
    receive(intake, time.system_ns(), b'before')
    time.set_ns -= 3600 * S
    time.pass_by(100 * S)
    begin_ns = time.clock.restart()
    intake.begin(begin_ns, None)
    receive(intake, begin_ns - 5 * MS, b'waited in DDS')
    time.pass_by(1 * S)
    receive(intake, time.system_ns(), b'during')
    assert taken(intake, begin_ns) == [(b'before', 0), (b'waited in DDS', 0), (b'during', 1 * S)]
    assert intake.received == 3


def test_latched_messages_of_a_topic_that_is_found_late_are_logged_when_they_came(time, intake):
    intake.profile = Offer(reliable=True, latched=True)
    begin_ns = time.clock.restart()
    time.pass_by(10 * S)
    receive(intake, time.system_ns(), b'latched')
    time.pass_by(3 * S)  # a slow disk
    intake.begin(begin_ns, None)
    assert taken(intake, begin_ns) == [(b'latched', 10 * S)]


def test_a_thread_that_does_not_run_for_a_while_is_no_clock_that_is_set(time):
    def interrupted():
        time.pass_by(1 * S)
        return time.system_ns()

    clock = EpisodeClock(interrupted, lambda: time.monotonic_ns)
    assert clock.set_by_ns() == 0
    received_ns = time.system_ns()
    assert clock.reception_ns(received_ns) == received_ns
    assert clock.reception_ns(0) == clock.now_ns()
