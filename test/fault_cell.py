"""What the tests of faults share: a policy that goes round in circles, its robot, and how a fault goes.

A fault goes right when the arm comes to rest, or goes on, inside all limits (command_watch.py looks at every command),
when ~/status and /diagnostics say why, and when what is right to go on by itself does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from diagnostic_msgs.msg import DiagnosticStatus
from live_robot import Body, Faults
from numpy.typing import NDArray
from ros_harness import NodeProcess, PolicyPeer, node_process
from told_policy import circle, save_told_policy

from decoupled_policy_ros.observation.messages import pose_from_message
from decoupled_policy_ros.robot.description import robot_file

#: The last so many commands alike: the arm is at rest.
AT_REST = 6


class Cell(PolicyPeer):
    """A live robot, and somebody who watches the policy that commands it."""

    def __init__(self, namespace: str = '', clock_hz: float = 0.0) -> None:
        super().__init__(namespace)
        self.body = Body(self, clock_hz=clock_hz)

    def close(self) -> None:
        """Stop the robot, then as any peer."""
        self.body.stop()
        super().close()

    def positions(self) -> NDArray[np.float64]:
        """Commanded positions (n, 3) so far."""
        return np.array([pose_from_message(m)[:3, 3] for m in self.received('target_pose')]).reshape(-1, 3)

    def is_moving(self) -> None:
        """Wait until the policy is followed, by commands that differ."""
        self.status('following')
        self.forget_commands()
        self.wait_for(lambda: len(np.unique(self.positions(), axis=0)) > AT_REST, 'moving commands')

    def is_at_rest(self) -> None:
        """Wait until commands stand still."""
        self.forget_commands()
        self.wait_for(
            lambda: len(self.positions()) >= AT_REST and not np.ptp(self.positions()[-AT_REST:], 0).any(),
            'commands that stand still',
        )

    def is_silent(self) -> None:
        """Nothing is commanded while two diagnostics, a second apart, come."""
        self.forget_commands()
        self.reported('policy', '', after=2)
        assert self.received('target_pose') == []

    def forget_commands(self) -> None:
        """Drop the commands so far."""
        with self._condition:
            self._received['target_pose'].clear()

    def reported(self, part: str, text: str, level: bytes | None = None, after: int = 1) -> dict[str, str]:
        """Wait for `after` new diagnostics of a part whose message has a text; the values of the last."""
        name = f'{self.get_namespace().strip("/")}/policy_node: {part}'.lstrip('/')

        def matching() -> list[DiagnosticStatus]:
            statuses = [s for array in self._received['/diagnostics'] for s in array.status if s.name == name]
            return [s for s in statuses if text in s.message and level in (None, s.level)]

        with self._condition:
            self._received['/diagnostics'].clear()
        self.wait_for(lambda: len(matching()) >= after, f'{text!r} in the diagnostics of {part}')
        with self._condition:
            return {pair.key: pair.value for pair in matching()[-1].values}

    def has_said(self, state: str) -> None:
        """Wait until one of the statuses since `forget` begins with a state."""
        topic = 'policy_node/status'
        self.wait_for(lambda: any(m.message.startswith(state) for m in self._received[topic]), state)

    def says(self, node: str, text: str) -> None:
        """Wait until the newest status of another node, which is recorded, contains a text."""
        topic = f'{node}/status'
        self.wait_for(lambda: any(text in m.message for m in self._received[topic][-1:]), f'{node}: {text}')

    def stops_and_goes_on(self, reason: str, **faults: Any) -> None:
        """With these faults the arm comes to rest for a reason, that is said; without them it goes on by itself."""
        self.is_moving()
        self.body.faults = Faults(**faults)
        assert self.status('holding', reason)
        self.is_at_rest()
        self.reported('policy', reason, DiagnosticStatus.WARN)
        self.body.faults = Faults()
        self.is_moving()

    def goes_on(self, **faults: Any) -> None:
        """With these faults the arm goes on; a hold now and then is that of a machine that stood still for a moment."""
        self.is_moving()
        self.body.faults = Faults(**faults)
        holds = [int(self.diagnostics('policy')['holds'])]
        while len(holds) < 2 or (holds[-1] != holds[-2] and len(holds) < 5):
            self.is_moving()
            holds.append(int(self.diagnostics('policy')['holds']))
        assert holds[-1] == holds[-2], f'holds: {holds}'
        self.body.faults = Faults()


def changed_robot(folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """Path of a description that is the simulated Panda's but for a change."""
    description = yaml.safe_load(robot_file('panda_sim').read_text())
    change(description)
    (folder / 'panda.yaml').write_text(yaml.safe_dump(description))
    return str(folder / 'panda.yaml')


def policy_parameters(folder: Path, **parameters: Any) -> dict[str, Any]:
    """Of a policy that goes round in circles; its files go into a folder."""
    task = save_told_policy(folder / 'models', circle())
    return {'task': str(task), 'denoising_steps': 2, 'autostart': True, **parameters}


@contextmanager
def running_policy(folder: Path, **parameters: Any) -> Iterator[NodeProcess]:
    """policy_node with that policy, or another `task`; it prints no traceback."""
    with node_process('policy_node', folder / 'policy.log', policy_parameters(folder, **parameters)) as node:
        yield node
    assert 'Traceback' not in node.output(), node.output()
