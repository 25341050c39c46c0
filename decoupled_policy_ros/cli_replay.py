"""The verb of `decoupled-policy` that computes a recorded run again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console


def replay(
    bag: Annotated[Path, tyro.conf.Positional],
    policy: tuple[str, ...] = (),
    backbone: str | None = None,
    robot: str | None = None,
    seed: int | None = None,
    node: str = '',
    out: Path | None = None,
) -> None:
    """Compute the commands of a recorded run of policy_node again, and compare them bit for bit.

    The recording needs the topics that the policy listened to, ~/cycles, and what it commanded, from before it was
    enabled on; see docs/replay.md. What is not given is as the run had it. Status 1: something is not identical.

    Args:
        bag: rosbag2 folder, or a single .mcap or .db3 file.
        policy: task folder, or a name in models/tasks; all of them where the run changed between several.
        backbone: folder or name; the one that the task names by default.
        robot: name in config/robots or path of a YAML file.
        seed: of the noise.
        node: full name of the policy's node, for a recording of several.
        out: write the commands into a new rosbag2 folder, or them and what was found into a new .json file.
    """
    from decoupled_policy_ros.replay import report
    from decoupled_policy_ros.replay.replay import ReplayOptions
    from decoupled_policy_ros.replay.replay import replay as run

    replayed = run(bag, ReplayOptions(policy, backbone, robot, seed, node))
    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)
    console.print(report.table(replayed))
    for line in report.lines(replayed):
        console.print(line, soft_wrap=True, markup=False)
    if out is not None:
        report.write(replayed, out)
        console.print(f'{out}', soft_wrap=True)
    if not replayed.identical:
        sys.exit(1)
