"""The tasks of a run: which there were, and where their files are now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decoupled_policy_ros.data.bags.reader import Bag
from decoupled_policy_ros.errors import CheckpointError
from decoupled_policy_ros.policy.checkpoint import find_model, load_policy, read_header
from decoupled_policy_ros.policy.policy import Policy
from decoupled_policy_ros.replay.inputs import Inputs
from decoupled_policy_ros.replay.log import RecordedLog
from decoupled_policy_ros.replay.player import Skill
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.runtime.assembly import join_settings
from decoupled_policy_ros.runtime.cycles import Cycle
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.runtime.joining import ChunkTiming, Joiner


def load_skills(
    bag: Bag,
    log: RecordedLog,
    robot: RobotDescription,
    policies: tuple[str, ...],
    backbone: str | None,
    seed: int,
) -> tuple[dict[str | None, Skill], list[str]]:
    """Each task of a run by its sha256, and in words those that are replayed by another one.

    Args:
        bag: the recording.
        log: its decisions.
        robot: the arm.
        policies: folders or names of tasks; those of the run's own names where none is given.
        backbone: folder or name; that of the task by default.
        seed: of the noise.

    Raises:
        CheckpointError, FingerprintMismatch: a task can't be found or loaded.
    """
    run, skills, others = log.run, {}, []
    parts = log.parts
    cycles: dict[tuple[str, str | None], list[list[Cycle]]] = {}
    for number, cycle in ((number, cycle) for number, part in enumerate(parts) for cycle in part):
        its_parts = cycles.setdefault((cycle.task, cycle.task_sha256), [[] for _ in parts])
        its_parts[number].append(cycle)
    known = [_identified(name) for name in (policies or (run['settings']['task'],))]
    for (name, sha256), its_parts in cycles.items():
        folder = _folder(name, sha256, known)
        policy = load_policy(folder, robot, backbone)
        if policy.task.sha256 != sha256:
            others.append(f'task {name!r}: sha256 {sha256!r} in the run, {policy.task.sha256!r} now')
        inputs = Inputs(bag, robot, policy.contract, run['cameras'], run['topics']['joint_states'], its_parts)
        joiner = Joiner(ChunkTiming.of(policy), join_settings(run['settings']))
        first = next(cycle for part in its_parts for cycle in part)
        skills[sha256] = Skill(_engine(policy, run, seed, first.instruction), inputs, joiner)
    return skills, others


def _identified(name: str) -> tuple[Path, dict[str, Any]]:
    folder = find_model('tasks', name)
    return folder, read_header(folder)


def _folder(name: str, sha256: str | None, known: list[tuple[Path, dict[str, Any]]]) -> Path:
    """Where a task is now: by its sha256 among those given and beside them, else by its name, else the only one."""
    beside = [folder.parent / name for folder, _ in known]
    there = [(folder, read_header(folder)) for folder in beside if (folder / 'task.json').is_file()]
    same = [folder for folder, header in (*known, *there) if header['sha256'] == sha256]
    same += [folder for folder, header in known if header['name'] == name]
    if same:
        return same[0]
    if len(known) == 1:
        return known[0][0]
    given = ', '.join(f'{folder} ({header["name"]!r})' for folder, header in known)
    raise CheckpointError(f'the run followed task {name!r} with sha256 {sha256}; --policy names {given}')


def _engine(policy: Policy, run: Mapping[str, Any], seed: int, instruction: str) -> Engine:
    settings = run['engine']
    return Engine(
        policy,
        settings['steps'],
        seed,
        settings['device'],
        settings['sampler'],
        instruction,
        settings['precision'],
        settings['shared_noise'],
    )
