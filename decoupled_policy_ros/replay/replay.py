"""Replays a recorded run: the same policy on the same messages, and every command beside the recorded one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from decoupled_policy_ros.data.bags.reader import Bag
from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.replay.comparison import TopicComparison, compare
from decoupled_policy_ros.replay.log import read_log
from decoupled_policy_ros.replay.playback import Playback, play
from decoupled_policy_ros.replay.player import Command, Player
from decoupled_policy_ros.replay.skills import load_skills
from decoupled_policy_ros.robot.description import RobotDescription, description_topic, load_robot
from decoupled_policy_ros.runtime.assembly import default_guard
from decoupled_policy_ros.runtime.guard.settings import GuardSettings, guard_settings
from decoupled_policy_ros.runtime.run_record import run_differences, run_record
from decoupled_policy_ros.runtime.states import IN_JOINTS


@dataclass(frozen=True)
class ReplayOptions:
    """What the user may choose; None means as the run was.

    Attributes:
        policy: task folders, or names in models/tasks.
        backbone: folder or name.
        robot: name or file.
        seed: of the noise.
        node: full name of the policy's node, for a recording of several.
    """

    policy: tuple[str, ...] = ()
    backbone: str | None = None
    robot: str | None = None
    seed: int | None = None
    node: str = ''


@dataclass(frozen=True)
class Replayed:
    """A run, computed again.

    Attributes:
        topics: full names, by what is on them.
        other: what is not as it was in the run, with both values: seed, files, software.
        playback: chunks and what went wrong with them.
        comparisons: topic by topic.
        commands: as computed.
        run_s: length of the run, from its first start to the end of the log.
        wall_s: what computing and comparing took, loading left out.
    """

    topics: Mapping[str, str]
    other: list[str]
    playback: Playback
    comparisons: list[TopicComparison]
    commands: list[Command]
    run_s: float
    wall_s: float

    @property
    def identical(self) -> bool:
        """Whether there was something to compare, all of it was computed, and all of it came out the same."""
        compared = sum(comparison.compared for comparison in self.comparisons)
        faults = self.playback.problems or any(comparison.differs for comparison in self.comparisons)
        return bool(compared) and not faults


def replay(recording: Path, options: ReplayOptions) -> Replayed:
    """Replay a recording.

    Raises:
        DatasetError: it can't be read, has no log of a policy, or lacks a topic that the policy listened to.
        ConfigError, CheckpointError, RobotDescriptionError, FingerprintMismatch: policy or robot can't be loaded.
    """
    with Bag(recording) as bag:
        log = read_log(bag, options.node)
        run = log.run
        settings = run['settings'] | {'seed': run['seed'] if options.seed is None else options.seed}
        torch.set_num_threads(run['engine']['threads'])
        robot_name = options.robot or settings['robot']
        robot = load_robot(robot_name, _description(bag, run, robot_name))
        backbone = options.backbone or (None if options.policy else settings['backbone']) or None
        skills, other = load_skills(bag, log, robot, options.policy, backbone, settings['seed'])
        player = Player(skills, robot, run, _guard(run, robot), settings['seed'])
        begin = time.perf_counter()
        playback = play(bag, log, player)
        comparisons = compare(bag, run['topics'], playback, player.commands)
        wall_s = time.perf_counter() - begin
    for skill in skills.values():
        own = run_record(skill.engine, robot, robot_name, settings, run['guard_file'])
        other += [text for text in run_differences({n: run[n] for n in own}, own) if text not in other]
    run_s = (log.entries[-1].log_ns - log.entries[0].log_ns) * 1e-9
    return Replayed(run['topics'], other, playback, comparisons, player.commands, run_s, wall_s)


def _description(bag: Bag, run: Mapping[str, Any], name: str) -> str | None:
    """The URDF that the run had from a topic, if it is in the recording."""
    topic = description_topic(name)
    full = run['topics'].get('robot_description') if topic is not None else None
    if full is None or full not in bag.topics:
        return None
    return next((message.decode().data for message in bag.messages([full])), None)


def _guard(run: Mapping[str, Any], robot: RobotDescription) -> GuardSettings | None:
    settings = run['settings']
    if not settings['guard']:
        return None
    defaults = default_guard(robot, settings['output'] in IN_JOINTS)
    if not run['guard_file']:
        return defaults
    try:
        values = yaml.safe_load(run['guard_file'])
    except yaml.YAMLError as error:
        raise ConfigError(f"the guard's settings of the run: {error}") from error
    return guard_settings({} if values is None else values, settings['guard_file'], defaults)
