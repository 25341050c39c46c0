"""Ctrl-C asks a node to end; it interrupts no code, compiled code least of all. What can't begin says so in a line."""

import signal
import subprocess
import sys

import pytest

from decoupled_policy_ros.nodes.signals import ending

NODE = """
import os, signal, sys, threading, time
from rclpy.node import Node
from std_msgs.msg import Empty
from decoupled_policy_ros.nodes.common import read_robot, spin_main

def pressed_twice():
    for _ in range(2):
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        time.sleep(0.05)
    print('uninterrupted', flush=True)

class Interrupted(Node):
    def __init__(self):
        if sys.argv[1] == 'importing':
            pressed_twice()
        super().__init__('interrupted')
        if sys.argv[1] == 'starting':
            pressed_twice()
        if sys.argv[1] == 'waiting':
            threading.Timer(0.2, pressed_twice).start()
            read_robot(self, 'fr3', 60.0)
            print('loaded', flush=True)
        self.create_publisher(Empty, 'never', 1)
        self.pressed = False
        self.create_timer(0.01, self.fire)

    def fire(self):
        self.fired = 1
        if not self.pressed:
            self.pressed = True
            pressed_twice()

    def wind_down(self):
        if sys.argv[1] == 'spinning':
            time.sleep(0.3)  # timers go on, and what they publish
            self.fired = 0
            time.sleep(0.3)
            print('rested' if self.fired and self.context.ok() else 'cut off', flush=True)

    def destroy_node(self):
        print('destroyed', flush=True)
        super().destroy_node()

raise SystemExit(spin_main(Interrupted))
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ('when', 'how', 'said'),
    [
        ('importing', 'SIGINT', ['uninterrupted']),
        ('starting', 'SIGINT', ['uninterrupted']),
        ('waiting', 'SIGINT', ['uninterrupted']),
        ('spinning', 'SIGINT', ['uninterrupted', 'rested', 'destroyed']),
        ('spinning', 'SIGTERM', ['uninterrupted', 'rested', 'destroyed']),
        ('spinning', 'SIGHUP', ['uninterrupted', 'rested', 'destroyed']),  # the terminal is gone
    ],
)
def test_what_ends_a_node_interrupts_nothing(when, how, said):
    done = subprocess.run([sys.executable, '-c', NODE, when, how], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, said, '')


def test_nohup_keeps_a_node_running_without_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ending() == (signal.SIGINT, signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in ending()


AGAIN = """
import os, signal, threading, time
import rclpy
from rclpy.node import Node
from decoupled_policy_ros.nodes.common import spin_main

for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(signal.SIGUSR1, lambda number, frame: print('USR1', flush=True))
    timer = threading.Timer(1.0, os.kill, (os.getpid(), number))
    if number == signal.SIGUSR1:  # nobody's business
        threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    timer.start()
    assert spin_main(lambda: Node('again')) == 0 and not rclpy.ok()
    print('ended', 'late' if time.monotonic() - began > 1.9 else 'early', flush=True)
    assert not [t for t in threading.enumerate() if t.name == 'signals']
"""


@pytest.mark.process
def test_one_node_after_the_other_ends_with_its_own_signals_only():
    done = subprocess.run([sys.executable, '-c', AGAIN], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split('\n') == ['USR1', 'ended late', 'ended early', 'ended early', '']


SLOW_SHUTDOWN = """
import os, signal, threading
from rclpy.node import Node
from rclpy.signals import SignalHandlerGuardCondition
from decoupled_policy_ros.nodes.common import spin_main

class Idle(Node):  # nothing but Ctrl-C wakes its executor
    def __init__(self):
        super().__init__('idle')
        # rclpy's handlers wake all these, milliseconds of work, between the executor and the shutting down.
        self.others = [SignalHandlerGuardCondition(self.context) for _ in range(20_000)]
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()

raise SystemExit(spin_main(Idle))
"""


@pytest.mark.process
def test_an_idle_node_ends_even_if_it_wakes_before_its_context_is_shut_down():
    done = subprocess.run([sys.executable, '-c', SLOW_SHUTDOWN], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, '')


@pytest.mark.process
@pytest.mark.parametrize(
    ('node', 'arguments', 'reason'),
    [
        (
            'command_guard_node',
            ['-p', "input_topic:='a b'"],
            "topic 'a b': topic name must not contain",
        ),
        (
            'command_guard_node',
            ['-p', "input_topic:='{arm}/pose'"],
            "topic '{arm}/pose': unknown substitution: {arm}",
        ),
        (
            'command_guard_node',
            ['-p', 'input_topic:=there', '-r', 'there:=target_pose'],
            "'there' is /target_pose, on which this node commands the arm",
        ),
        ('teleop_node', ['-p', "recorder:='{arm}/recorder'"], 'unknown substitution: {arm}'),
        ('teleop_node', ['-p', "recorder:='a//b'"], "must not contain repeated '/': '/a//b/start'"),
        (
            'episode_recorder_node',
            ['-p', "extra_topics:=['a b']"],
            "topic 'a b': topic name must not contain",
        ),
        ('teleop_node', ['--params-file', 'nothere.yaml'], "params file: '--params-file nothere.yaml'"),
        ('teleop_node', ['-p', 'robot'], "Couldn't parse parameter override rule: '-p robot'"),
        ('teleop_node', ['--robot'], "unknown ['--robot']"),
    ],
)
def test_names_and_arguments_that_are_none_are_said_in_one_line(tmp_path, node, arguments, reason):
    command = [sys.executable, '-m', f'decoupled_policy_ros.nodes.{node}', '--ros-args', *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1 and reason in done.stderr, done.stderr
    assert 'Traceback' not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if 'FATAL' in line)
    assert reason in line
