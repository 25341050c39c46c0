"""In the node, over DDS: from the stamp of a picture to the command, the jitter of the commands, memory over time.

    python bench/node_latency.py                                      ten minutes, docs/bench/node_latency.json

policy_node with the shipped `lift` and its guard, on the wall clock, commands at 50 Hz. Beside it, each a process: an
arm at 50 Hz that goes where it is told, and two cameras of 84 x 84 pixels at 20 Hz. Pictures are noise, so the chunks
are those of no task, but every one is computed, checked and followed; a simulator that draws two cameras would take
more of two cores than the policy does, and would be measured instead. Times from stamp to command are the node's own,
all of them; the jitter is taken from the middleware's times of publication, outside of the node.
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

from decoupled_policy_ros.files import write_json

#: Commands per second.
RATE_HZ = 50.0
#: What is left out at the beginning (s): discovery, and memory that a process takes once.
SETTLE_S = 20.0
LOOK_S = 5.0


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        minutes: how long to measure.
        task: of the policy.
        threads: CPU threads of the network.
        json: write the figures here.
    """

    minutes: float = 10.0
    task: str = 'lift'
    threads: int = 1
    json: Path | None = Path('docs/bench/node_latency.json')


class Listener(Watcher):
    """Takes down when each command was published, and when it was here."""

    def __init__(self) -> None:
        super().__init__()
        self.published_ns: list[int] = []
        self.received_ns: list[int] = []
        qos = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)
        self.create_subscription(PoseStamped, 'target_pose', lambda m, i: self._note(i), qos, raw=True)

    def _note(self, info: dict[str, Any]) -> None:
        self.published_ns.append(info['source_timestamp'])
        self.received_ns.append(info['received_timestamp'])


def spread(values_ms: NDArray[np.float64]) -> dict[str, float]:
    """Median, 99th percentile, largest."""
    return {
        'p50': float(np.percentile(values_ms, 50)), 'p99': float(np.percentile(values_ms, 99)),
        'max': float(values_ms.max()),
    }  # fmt: skip


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Everything as numbers."""
    measured = commit()
    listener, arm, cameras = Listener(), LiveRobot(ARM), LiveRobot(CAMERAS)
    parameters = {
        'task': arguments.task, 'autostart': True, 'control_rate_hz': RATE_HZ, 'threads': arguments.threads,
    }  # fmt: skip
    node = NodeProcess('policy_node', folder / 'policy.log', parameters)
    breaches: list[str] = []
    samples: list[dict[str, float]] = []
    try:
        listener.status('following')
        time.sleep(SETTLE_S)
        # What was counted while it settled does not count: activation begins all counts anew.
        assert listener.change_state('deactivate') and listener.change_state('activate')
        listener.status('following')
        first, began_s = len(listener.published_ns), time.monotonic()
        load = [os.getloadavg()[0]]
        while time.monotonic() - began_s < 60.0 * arguments.minutes:
            time.sleep(LOOK_S)
            samples.append({'t_s': time.monotonic() - began_s, **resources(node.process.pid)})
            load.append(os.getloadavg()[0])
            assert WATCHED.watch is not None
            breaches += WATCHED.watch.breaches()
        time.sleep(1.5)  # the last diagnostics
        values = listener.values()
        published_ns = np.array(listener.published_ns[first:])
        travelled_ms = (np.array(listener.received_ns[first:]) - published_ns) * 1e-6
        assert 'Traceback' not in node.output(), node.output()
    finally:
        node.stop()
        arm.kill()
        cameras.kill()
        listener.close()
    errors_ms = np.abs(np.diff(published_ns) * 1e-6 - 1e3 / RATE_HZ)
    minutes = [s['t_s'] / 60.0 for s in samples]
    resident = [s['rss_mb'] for s in samples]
    return {
        'commit': measured, 'minutes': arguments.minutes, 'task': arguments.task, 'threads': arguments.threads,
        'cores': len(os.sched_getaffinity(0)), 'load_average': statistics.mean(load),
        'observation_to_command_ms': {
            name: float(values[f'observation_to_command_{name}_ms']) for name in ('p50', 'p99', 'max')
        },
        'computation_ms': {
            stage: {name: float(values[f'latency_{stage}_{name}_ms']) for name in ('p50', 'p99')}
            for stage in ('sample', 'encode', 'modulate', 'denoise', 'guard', 'total')
        },
        'commands': len(published_ns), 'command_period_ms': 1e3 / RATE_HZ,
        'period_error_ms': spread(errors_ms), 'publication_to_subscriber_ms': spread(travelled_ms),
        'cycles': int(values['cycles']), 'cycles_missed': int(values['cycles_missed']),
        'holds': int(values['holds']), 'rejected_chunks': int(values['rejected_chunks']),
        'breaches': len(breaches),
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
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
