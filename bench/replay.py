"""A live run recorded and computed again: how much of it is identical, and how long that takes.

    python bench/replay.py                                            a minute, docs/bench/replay.json

policy_node with the shipped `lift` and its guard on the wall clock, commands at 50 Hz; beside it, each a process, an
arm at 50 Hz that goes where it is told, two cameras of 84 x 84 pixels at 20 Hz whose pictures are noise, and the
episode recorder. Then the recording is replayed, once as the run was and once with another seed, which has to be
noticed.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from live_cell import ARM, CAMERAS, LiveRobot, Watcher, commit
from ros_harness import NodeProcess
from std_srvs.srv import SetBool, Trigger

from decoupled_policy_ros.data.bags.reader import Bag
from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.replay import report
from decoupled_policy_ros.replay.replay import ReplayOptions, replay
from decoupled_policy_ros.runtime.cycles import decisions_from_text, decisions_to_text

RATE_HZ = 50.0
SEED = 5
RECORDER = 'episode_recorder_node'
#: How long the recorder may take to hear all topics (s).
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        seconds: length of the run.
        task: of the policy.
        json: write the figures here.
    """

    seconds: float = 60.0
    task: str = 'lift'
    json: Path | None = Path('docs/bench/replay.json')


def recorded(arguments: Arguments, folder: Path) -> Path:
    """The recording of a run, from before it is enabled to after it is disabled."""
    watcher, arm, cameras = Watcher(), LiveRobot(ARM), LiveRobot(CAMERAS)
    parameters = {
        'task': arguments.task, 'autostart': True, 'enabled': False, 'seed': SEED, 'control_rate_hz': RATE_HZ,
    }  # fmt: skip
    policy = NodeProcess('policy_node', folder / 'policy.log', parameters)
    recorder = NodeProcess(RECORDER, folder / 'recorder.log', {'output_dir': str(folder / 'episodes')})
    try:
        watcher.status('disabled', 'no commands')
        began_s = time.monotonic()
        while not (answer := watcher.call(Trigger, f'{RECORDER}/start', Trigger.Request())).success:
            assert time.monotonic() - began_s < TIMEOUT_S, answer.message
            time.sleep(0.2)
        time.sleep(2.0)  # what the first chunk is made of
        assert watcher.call(SetBool, 'policy_node/enable', SetBool.Request(data=True)).success
        time.sleep(arguments.seconds)
        assert watcher.call(SetBool, 'policy_node/enable', SetBool.Request(data=False)).success
        time.sleep(1.0)
        assert watcher.call(SetBool, f'{RECORDER}/keep', SetBool.Request(data=True)).success
        assert 'Traceback' not in policy.output() + recorder.output()
    finally:
        recorder.stop()
        policy.stop()
        arm.kill()
        cameras.kill()
        watcher.close()
    return folder / 'episodes' / 'episode_000000'


def replayed(episode: Path, arguments: Arguments, seed: int | None = None) -> dict[str, Any]:
    """What a replay found, without the commands, and the processor time of all of it, loading the policy included."""
    began_s = time.process_time()
    found = report.values(replay(episode, ReplayOptions((arguments.task,), seed=seed)))
    del found['commands']
    return {**found, 'processor_s': time.process_time() - began_s}


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Everything as numbers."""
    episode = recorded(arguments, folder)
    with Bag(episode) as bag:
        log = [message.decode().data for message in bag.messages(['/policy_node/cycles'])]
    decisions = [decisions_from_text(text) for text in log]
    began_s = time.process_time()
    for number, each in decisions:
        decisions_to_text(number, each)
    written_s = (time.process_time() - began_s) / len(log)
    return {
        'commit': commit(), 'task': arguments.task, 'cores': len(os.sched_getaffinity(0)),
        'load_average': os.getloadavg()[0],
        'recording_mb': sum(file.stat().st_size for file in episode.rglob('*') if file.is_file()) / 1e6,
        'log': {
            'messages': len(log), 'bytes_per_s': sum(map(len, log)) / arguments.seconds, 'written_us': 1e6 * written_s,
        },
        'as_it_was': replayed(episode, arguments), 'another_seed': replayed(episode, arguments, SEED + 1),
    }  # fmt: skip


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    print(json.dumps(found, indent=1))
    if arguments.json:
        write_json(arguments.json, found)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
