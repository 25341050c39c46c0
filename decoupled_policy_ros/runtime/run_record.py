"""What the commands of a run depend on besides messages and times: files, settings, software."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

import decoupled_policy_ros
from decoupled_policy_ros.observation.decoders import available_decoders
from decoupled_policy_ros.robot.description import RobotDescription, robot_file
from decoupled_policy_ros.runtime.engine import Engine

#: What computes something on the way from a message to a command.
LIBRARIES = ('numpy', 'scipy', 'torch', 'pin', 'opencv-python', 'opencv-python-headless', 'coal')

#: Where a file is says nothing of what is in it; the hashes do.
NAMES = ('settings.task', 'settings.backbone', 'settings.robot', 'settings.guard_file', 'settings.seed')


def run_record(
    engine: Engine, robot: RobotDescription, robot_name: str, settings: Mapping[str, Any], guard_file: str
) -> dict[str, Any]:
    """As JSON-able values.

    Args:
        engine: the policy's.
        robot: the arm.
        robot_name: name or file that it was read from.
        settings: parameters of the node.
        guard_file: what is in the guard's file; empty without one.
    """
    policy = engine.policy
    return {
        'seed': settings['seed'],
        'settings': dict(settings),
        'guard_file': guard_file,
        'robot': {'name': robot.name, 'sha256': _robot_sha256(robot, robot_name)},
        'backbone': {'name': policy.backbone.name, 'sha256': policy.backbone.sha256},
        'engine': {
            'device': str(engine.device),
            'sampler': engine.sampler.kind,
            'steps': len(engine.sampler.ks),
            'precision': engine.precision,
            'shared_noise': engine.sampler.shared_noise,
            'threads': torch.get_num_threads(),
        },
        'software': software(),
    }


def software() -> dict[str, str]:
    """Versions, and what the processor can do: other instructions may round otherwise."""
    versions = {'decoupled_policy_ros': decoupled_policy_ros.__version__, 'python': platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    versions['image_decoder'] = available_decoders()[-1]
    versions['processor'] = f'{platform.machine()} {torch.backends.cpu.get_cpu_capability()}'
    return versions


def run_differences(run: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What is not the same in two records of runs, by name and with both values; names of files aside."""
    one, two = _flat(run), _flat(other)
    return [
        f'{name}: {one.get(name, "none")!r} in the run, {two.get(name, "none")!r} now'
        for name in [*one, *(name for name in two if name not in one)]
        if one.get(name) != two.get(name) and name not in NAMES
    ]


def _flat(values: Mapping[str, Any], name: str = '') -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        full = f'{name}.{key}' if name else key
        flat |= _flat(value, full) if isinstance(value, Mapping) else {full: value}
    return flat


def _robot_sha256(robot: RobotDescription, name: str) -> str:
    """Hash of the robot's file and of its URDF or MJCF."""
    source = robot.source
    model = source.path.read_bytes() if source.path is not None else (source.xml or '').encode()
    return hashlib.sha256(robot_file(name).read_bytes() + model).hexdigest()
