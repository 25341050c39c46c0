"""In the node, over DDS: from the stamp of a picture to the command, the jitter of the commands, memory over time.

    python bench/node_latency.py                                      ten minutes, docs/bench/node_latency.json
    python bench/node_latency.py --simulator                          the same beside the simulator, in its time

policy_node with its guard, on the wall clock, commands at 50 Hz. Beside it, each a process: an arm at 50 Hz that goes
where it is told, and two cameras of 84 x 84 pixels at 20 Hz. Pictures are noise, and the policy, of DP-MLP's full size,
says a circle whatever it sees: every chunk is computed, checked and followed. Times from stamp to command are the
node's own, all of them; the jitter is taken from the middleware's times of publication, outside of the node.

With `--simulator` sim_robot_node runs in real time in their place, and the node in simulated time, which stands still
between two steps: so commands come at 20 Hz, and what is measured besides is how long after a step, pictures and all,
the command for it was published.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from geometry_msgs.msg import PoseStamped
from live_cell import ARM, CAMERAS, LiveRobot, Watcher, commit, resources
from numpy.typing import NDArray
from rclpy.qos import QoSProfile, ReliabilityPolicy
from ros_harness import WATCHED, NodeProcess
from rosgraph_msgs.msg import Clock
from std_srvs.srv import SetBool, Trigger
from told_policy import FULL, circle, save_told_policy

from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.nodes.common import time_ns

#: Commands per second.
RATE_HZ, SIMULATED_HZ = 50.0, 20.0
#: What is left out at the beginning (s): discovery, and memory that a process takes once.
SETTLE_S = 20.0
LOOK_S = 5.0


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        minutes: how long to measure.
        task: of the policy; by default the shipped `lift` beside the simulator, and else one that goes round a circle.
        threads: CPU threads of the network.
        simulator: beside the simulator.
        json: write the figures here; 'docs/bench/node_latency.json' or 'docs/bench/node_latency_simulator.json'.
    """

    minutes: float = 10.0
    task: str = ''
    threads: int = 1
    simulator: bool = False
    json: Path | None = None


class Listener(Watcher):
    """Takes down when each command was published, and when it was here."""

    def __init__(self) -> None:
        super().__init__()
        self.published_ns: list[int] = []
        self.received_ns: list[int] = []
        qos = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)
        self.create_subscription(PoseStamped, 'target_pose', self._note, qos)
        self.stamps_ns: list[int] = []
        self.clock_ns: dict[int, int] = {}
        self.create_subscription(Clock, '/clock', self._note_clock, qos)

    def _note(self, message: PoseStamped, info: dict[str, Any]) -> None:
        self.stamps_ns.append(time_ns(message.header.stamp))
        self.published_ns.append(info['source_timestamp'])
        self.received_ns.append(info['received_timestamp'])

    def _note_clock(self, message: Clock, info: dict[str, Any]) -> None:
        self.clock_ns.setdefault(time_ns(message.clock), info['source_timestamp'])

    def after_their_step_ms(self, first: int) -> NDArray[np.float64]:
        """How long after its step of the simulator each command was published."""
        pairs = zip(self.stamps_ns[first:], self.published_ns[first:], strict=True)
        return np.array(
            [1e-6 * (sent - self.clock_ns[stamp]) for stamp, sent in pairs if stamp in self.clock_ns]
        )


def spread(values_ms: NDArray[np.float64]) -> dict[str, float]:
    """Median, 99th percentile, largest."""
    return {
        'p50': float(np.percentile(values_ms, 50)), 'p99': float(np.percentile(values_ms, 99)),
        'max': float(values_ms.max()),
    }  # fmt: skip


def put_back(listener: Listener) -> None:
    """Put the scene back: a cube that has been lifted is nothing to go on with."""
    assert listener.call(Trigger, 'sim_robot_node/reset', Trigger.Request()).success


def begin_anew(listener: Listener) -> None:
    """Let the policy begin anew, with a scene that has been put back."""
    assert listener.call(SetBool, 'policy_node/enable', SetBool.Request(data=False)).success
    put_back(listener)
    assert listener.call(SetBool, 'policy_node/enable', SetBool.Request(data=True)).success


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Everything as numbers."""
    measured = commit()
    listener = Listener()
    circling = None if arguments.simulator else save_told_policy(folder, circle(), size=FULL)
    task = arguments.task or str(circling or 'lift')
    robot: list[LiveRobot | NodeProcess] = (
        [NodeProcess('sim_robot_node', folder / 'sim.log', {'lockstep': False})]
        if arguments.simulator
        else [LiveRobot(ARM), LiveRobot(CAMERAS)]
    )
    rate_hz = SIMULATED_HZ if arguments.simulator else RATE_HZ
    parameters = {
        'task': task, 'autostart': True, 'control_rate_hz': rate_hz, 'threads': arguments.threads,
        'use_sim_time': arguments.simulator,
    }  # fmt: skip
    node = NodeProcess('policy_node', folder / 'policy.log', parameters)
    breaches: list[str] = []
    samples: list[dict[str, float]] = []
    try:
        listener.status('following')
        time.sleep(SETTLE_S)
        # What was counted while it settled does not count: activation begins all counts anew.
        assert listener.change_state('deactivate')
        if arguments.simulator:
            put_back(listener)
        assert listener.change_state('activate')
        listener.status('following')
        first, began_s = len(listener.published_ns), time.monotonic()
        load = [os.getloadavg()[0]]
        while time.monotonic() - began_s < 60.0 * arguments.minutes:
            time.sleep(LOOK_S)
            if arguments.simulator:
                begin_anew(listener)
            samples.append({'t_s': time.monotonic() - began_s, **resources(node.process.pid)})
            load.append(os.getloadavg()[0])
            assert WATCHED.watch is not None
            breaches += WATCHED.watch.breaches()
        time.sleep(1.5)  # the last diagnostics
        values = listener.values()
        published_ns = np.array(listener.published_ns[first:])
        travelled_ms = (np.array(listener.received_ns[first:][: len(published_ns)]) - published_ns) * 1e-6
        assert 'Traceback' not in node.output(), node.output()
    finally:
        node.stop()
        for process in robot:
            process.stop() if isinstance(process, NodeProcess) else process.kill()
        listener.close()
    # From one scene to the next there are no commands, and the node's last ones bring the arm to rest.
    running = np.diff(listener.stamps_ns[first:][: len(published_ns)]) < 1.5e9 / rate_hz
    errors_ms = np.abs(np.diff(published_ns)[running] * 1e-6 - 1e3 / rate_hz)
    minutes = [s['t_s'] / 60.0 for s in samples]
    resident = [s['rss_mb'] for s in samples]
    after_ms = listener.after_their_step_ms(first)
    return {
        'commit': measured, 'minutes': arguments.minutes, 'task': Path(task).name, 'threads': arguments.threads,
        'cores': len(os.sched_getaffinity(0)), 'load_average': statistics.mean(load),
        'observation_to_command_ms': {
            name: float(values[f'observation_to_command_{name}_ms']) for name in ('p50', 'p99', 'max')
        },
        'computation_ms': {
            stage: {name: float(values[f'latency_{stage}_{name}_ms']) for name in ('p50', 'p99')}
            for stage in ('sample', 'encode', 'modulate', 'denoise', 'guard', 'total')
        },
        'commands': len(published_ns), 'command_period_ms': 1e3 / rate_hz,
        **({'after_their_step_ms': spread(after_ms)} if arguments.simulator else {}),
        'period_error_ms': spread(errors_ms), 'publication_to_subscriber_ms': spread(travelled_ms),
        'cycles': int(values['cycles']), 'cycles_missed': int(values['cycles_missed']),
        'holds': int(values['holds']), 'rejected_chunks': int(values['rejected_chunks']),
        'breaches': breaches,
        'rss_mb': {'first': resident[0], 'last': resident[-1], 'max': max(resident)},
        'rss_mb_per_minute': float(np.polyfit(minutes, resident, 1)[0]) if len(samples) > 1 else None,
        'descriptors': {'first': samples[0]['descriptors'], 'last': samples[-1]['descriptors']},
        'threads_of_the_process': {'first': samples[0]['threads'], 'last': samples[-1]['threads']},
    }  # fmt: skip


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    with tempfile.TemporaryDirectory() as folder:
        report = measure(arguments, Path(folder))
    print(json.dumps(report, indent=1))
    name = 'node_latency_simulator' if arguments.simulator else 'node_latency'
    write_json(arguments.json or Path('docs/bench') / f'{name}.json', report)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
