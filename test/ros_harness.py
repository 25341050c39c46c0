"""What the process tests share: nodes as processes, a peer that talks to them over DDS, an eye on their commands."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from command_watch import CommandWatch
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import ParameterValue
from rcl_interfaces.srv import (
    DescribeParameters,
    GetParameters,
    ListParameters,
    SetParameters,
    SetParametersAtomically,
)
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from spun_node import SpunNode
from std_msgs.msg import Float64

from decoupled_policy_ros.errors import DecoupledPolicyError
from decoupled_policy_ros.nodes.common import LATCHED, STATE, time_ns
from decoupled_policy_ros.robot.description import load_robot

#: Far longer than anything takes here: a test that waits this long has failed.
TIMEOUT_S = 90.0

TRANSITIONS = {'configure': 1, 'cleanup': 2, 'activate': 3, 'deactivate': 4}


#: Nodes that command an arm: whatever they say is looked at.
COMMANDERS = ('policy_node', 'command_guard_node', 'teleop_node')


class Watched:
    """The one command watch of a test run, and which of the nodes that it looks at run without the guard."""

    def __init__(self) -> None:
        self.watch: CommandWatch | None = None
        self.unguarded: dict[int, str] = {}  # by process
        self.processes: list[subprocess.Popen] = []

    def begin(self, module: str, name: str, parameters: dict[str, Any], namespace: str) -> bool:
        """Look at the commands of a node from now on; whether it runs with its limits."""
        robot = 'panda_sim'
        with suppress(DecoupledPolicyError):
            robot = load_robot(parameters.get('robot', robot))
        if isinstance(robot, str):  # the node refuses it too
            robot = load_robot(robot)
        guarded = parameters.get('guard', True)
        self.watch = self.watch or CommandWatch(self.running)
        self.watch.listen(namespace, name, robot, guarded)
        return guarded

    def running(self) -> bool:
        """Whether any of these nodes runs."""
        self.processes = [process for process in self.processes if process.poll() is None]
        return bool(self.processes)

    def verdict(self, exempt: bool) -> None:
        """Fail if a command since the last verdict broke a limit, or a guard is off without a word about it."""
        if self.watch is None:
            return
        breaches = self.watch.breaches()
        assert not breaches, f'{len(breaches)} commands broke a limit: ' + '; '.join(breaches[:5])
        assert exempt or not self.unguarded, (
            f'{self.unguarded} without a guard: mark the test unguarded(reason)'
        )

    def forgive(self, why: str) -> None:
        """Leave out what broke a limit so far: commands that were not of one node alone."""
        assert why and self.watch is not None
        self.watch.breaches()


WATCHED = Watched()


class NodeProcess:
    """A node of this package as a process, its output in a file."""

    def __init__(
        self,
        module: str,
        log: Path,
        parameters: dict[str, Any] | None = None,
        namespace: str = '',
        name: str = '',
    ):
        guarded = module not in COMMANDERS or WATCHED.begin(
            module, name or module, parameters or {}, namespace
        )
        pairs = [f'{name}:={_yaml(value)}' for name, value in (parameters or {}).items()]
        arguments = [argument for pair in pairs for argument in ('-p', pair)]
        if namespace:
            arguments += ['-r', f'__ns:=/{namespace}']
        if name:
            arguments += ['-r', f'__node:={name}']
        command = [sys.executable, '-m', f'decoupled_policy_ros.nodes.{module}', '--ros-args', *arguments]
        self.log = log
        environment = {**os.environ, 'RCUTILS_LOGGING_BUFFERED_STREAM': '0'}
        with log.open('wb') as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        if module in COMMANDERS:
            WATCHED.processes.append(self.process)
        if not guarded:
            WATCHED.unguarded[self.process.pid] = module

    def output(self) -> str:
        """Everything that it has printed so far."""
        return self.log.read_text(errors='replace')

    def stop(self) -> int:
        """End it as Ctrl-C would; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        WATCHED.unguarded.pop(self.process.pid, None)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}'" if isinstance(value, str) else str(value)


@contextmanager
def node_process(
    module: str,
    log: Path,
    parameters: dict[str, Any] | None = None,
    namespace: str = '',
    name: str = '',
) -> Iterator[NodeProcess]:
    """Run a node for as long as the block lasts."""
    process = NodeProcess(module, log, parameters, namespace, name)
    try:
        yield process
    finally:
        process.stop()


class Peer(SpunNode):
    """A node of the test's own, spun in a thread; records what it subscribes to, asks services, and waits."""

    def __init__(self, namespace: str = '') -> None:
        super().__init__('test_peer', namespace)
        self._condition = threading.Condition()
        self._received: dict[str, list[Any]] = {}
        self.spin_in_background()

    def record(self, kind: type, topic: str, qos: QoSProfile = STATE) -> None:
        """Collect every message of a topic from now on."""
        self._received[topic] = []
        self.create_subscription(kind, topic, lambda message: self._store(topic, message), qos)

    def _store(self, topic: str, message: Any) -> None:
        with self._condition:
            self._received[topic].append(message)
            self._condition.notify_all()

    def received(self, topic: str) -> list[Any]:
        """Messages of a topic so far."""
        with self._condition:
            return list(self._received[topic])

    def forget(self) -> None:
        """Drop what was recorded."""
        with self._condition:
            for messages in self._received.values():
                messages.clear()

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until `condition` gives something true, and return that."""
        result = None

        def holds() -> bool:
            nonlocal result
            result = condition()
            return bool(result)

        deadline = time.monotonic() + TIMEOUT_S
        with self._condition:
            while not holds():
                assert time.monotonic() < deadline, f'waited {TIMEOUT_S} s for {what}'
                self._condition.wait(0.1)
        return result

    def stamped(self, topic: str, stamp_ns: int) -> Any:
        """Wait for the message of a topic with that header stamp."""

        def found() -> Any:
            return next((m for m in self._received[topic] if time_ns(m.header.stamp) == stamp_ns), None)

        return self.wait_for(found, f'{topic} stamped {stamp_ns}; there are {self._stamps(topic)[-5:]}')

    def _stamps(self, topic: str) -> list[int]:
        return [time_ns(message.header.stamp) for message in self._received[topic]]

    def stamps_ns(self, topic: str) -> list[int]:
        """Header stamps of a topic's messages so far."""
        with self._condition:
            return self._stamps(topic)

    def last(self, topic: str) -> Any:
        """The newest message of a topic, waiting for a first one."""
        return self.wait_for(lambda: self._received[topic][-1:], topic)[0]

    def call(self, kind: type, name: str, request: Any) -> Any:
        """Ask a service and wait for its answer; where none comes for long, ask once more.

        A busy node may not have found this client yet when it answers, and then DDS drops the answer.
        """
        client = self.create_client(kind, name)
        try:
            assert client.wait_for_service(TIMEOUT_S), f'no service {name}'
            futures, asked_at = [client.call_async(request)], time.monotonic()

            def answer() -> Any:
                nonlocal asked_at
                if time.monotonic() - asked_at > TIMEOUT_S / 4:
                    futures.append(client.call_async(request))
                    asked_at = time.monotonic()
                return next((future.result() for future in futures if future.done()), None)

            return self.wait_for(answer, f'an answer of {name}')
        finally:
            self.destroy_client(client)

    def wait_for_subscribers(self, *publishers: Any) -> None:
        """Wait until each publisher has been discovered by somebody."""
        self.wait_for(lambda: all(p.get_subscription_count() for p in publishers), 'subscribers')


class PolicyPeer(Peer):
    """A peer that also knows policy_node's interface."""

    def __init__(self, namespace: str = '') -> None:
        super().__init__(namespace)
        self.record(PoseStamped, 'target_pose')
        self.record(Float64, 'gripper_command')
        self.record(DiagnosticStatus, 'policy_node/status', LATCHED)
        self.record(DiagnosticArray, '/diagnostics')

    def change_state(self, transition: str) -> bool:
        """Ask for a lifecycle transition; returns whether it succeeded."""
        request = ChangeState.Request()
        request.transition.id = TRANSITIONS[transition]
        return bool(self.call(ChangeState, 'policy_node/change_state', request).success)

    def lifecycle_state(self) -> str:
        """Label of the present lifecycle state."""
        return str(self.call(GetState, 'policy_node/get_state', GetState.Request()).current_state.label)

    def set_parameter(self, node: str, name: str, value: Any) -> tuple[bool, str]:
        """Set a parameter; returns success and reason."""
        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        result = self.call(SetParameters, f'{node}/set_parameters', request).results[0]
        return result.successful, result.reason

    def set_parameters_atomically(self, node: str, **values: Any) -> tuple[bool, str]:
        """Set parameters all at once; returns success and reason."""
        messages = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        request = SetParametersAtomically.Request(parameters=messages)
        result = self.call(SetParametersAtomically, f'{node}/set_parameters_atomically', request).result
        return result.successful, result.reason

    def parameter(self, node: str, name: str) -> ParameterValue:
        """Value of a parameter."""
        return self.call(GetParameters, f'{node}/get_parameters', GetParameters.Request(names=[name])).values[
            0
        ]

    def described_parameters(self, node: str) -> dict[str, Any]:
        """Descriptor of each parameter of a node."""
        names = list(
            self.call(ListParameters, f'{node}/list_parameters', ListParameters.Request()).result.names
        )
        request = DescribeParameters.Request(names=names)
        descriptors = self.call(DescribeParameters, f'{node}/describe_parameters', request).descriptors
        return {descriptor.name: descriptor for descriptor in descriptors}

    def status(self, state: str, text: str = '') -> str:
        """Wait until the policy's status begins with a state and contains a text; returns the whole of it."""

        def found() -> str:
            message = ''.join(m.message for m in self._received['policy_node/status'][-1:])
            return message if message.startswith(state) and text in message else ''

        return str(self.wait_for(found, f'status {state!r} with {text!r}'))

    def diagnostics(self, part: str, after: int = 1) -> dict[str, str]:
        """Values of 'policy' or 'streams' from the diagnostics, waiting for `after` new ones."""

        def matching() -> list[DiagnosticStatus]:
            arrays = self._received['/diagnostics']
            return [s for array in arrays for s in array.status if s.name == f'policy_node: {part}']

        with self._condition:
            before = len(matching())
        self.wait_for(lambda: len(matching()) >= before + after, f'diagnostics of {part}')
        with self._condition:
            return {pair.key: pair.value for pair in matching()[-1].values}
