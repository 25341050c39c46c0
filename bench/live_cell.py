"""What the benches of the live node share: the robot's processes, somebody who watches, and what a process uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'test'))
import conftest  # noqa: E402, F401 (a ROS domain of this run's own, discovery on this machine, one thread each)
from ros_harness import PolicyPeer  # noqa: E402

ARM, CAMERAS = ('joint_states',), ('agentview', 'wrist')
PAGE_BYTES = os.sysconf('SC_PAGE_SIZE')
#: Messages of a topic that are kept.
KEPT = 200


class LiveRobot:
    """test/live_robot.py as a process, its faults set through stdin.

    Args:
        streams: those that it publishes.
        arguments: further ones.
    """

    def __init__(self, streams: tuple[str, ...], *arguments: str):
        command = [sys.executable, str(ROOT / 'test' / 'live_robot.py'), '--streams', *streams, *arguments]
        self._command = command
        self.start()

    def start(self) -> None:
        """Start it."""
        self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, text=True)

    def set(self, **faults: Any) -> None:
        """Have these faults and no others."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(faults) + '\n')
        self.process.stdin.flush()

    def kill(self) -> None:
        """End it without a word, as a driver that crashes."""
        self.process.kill()
        self.process.wait()


class Watcher(PolicyPeer):
    """A peer for hours: of each topic it keeps the newest messages only."""

    def _store(self, topic: str, message: Any) -> None:
        super()._store(topic, message)
        del self._received[topic][:-KEPT]

    def state(self) -> str:
        """The newest status."""
        last = self.received('policy_node/status')[-1:]
        return last[0].message if last else ''

    def values(self) -> dict[str, str]:
        """The newest diagnostics of the policy; empty before the first."""
        statuses = [s for array in self.received('/diagnostics') for s in array.status]
        mine = [s for s in statuses if s.name == 'policy_node: policy']
        return {pair.key: pair.value for pair in mine[-1].values} if mine else {}


def resources(pid: int) -> dict[str, float]:
    """Resident memory (MB), file descriptors and threads of a process."""
    process = Path(f'/proc/{pid}')
    resident = int((process / 'statm').read_text().split()[1]) * PAGE_BYTES
    return {
        'rss_mb': resident / 1e6,
        'descriptors': len(list((process / 'fd').iterdir())),
        'threads': len(list((process / 'task').iterdir())),
    }


def commit() -> str:
    """The commit that is measured, with a plus where files differ from it."""
    git = ['git', '-C', str(ROOT)]
    head = subprocess.run([*git, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, check=True)
    status = subprocess.run(
        [*git, 'status', '--porcelain', '-uno'], capture_output=True, text=True, check=True
    )
    return head.stdout.strip() + ('+' if status.stdout.strip() else '')
