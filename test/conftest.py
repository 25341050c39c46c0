"""Set-up that every test shares. The environment is set when this file is imported: before rclpy, before torch.

Nothing leaves this machine, and two test runs at once don't hear each other: discovery stays on localhost
and each run takes a ROS domain of its own.
"""

import atexit
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Domains 1-101 are safe on every operating system. Port 7400 + 250 * domain is the one that DDS uses first.
DOMAINS = range(20, 101)
FIRST_PORT, PORTS_PER_DOMAIN = 7400, 250


def _claim_domain() -> int:
    """Claim a ROS domain that no other run on this machine has, whatever process starts it."""
    start = os.getpid() % len(DOMAINS)
    for domain in [*DOMAINS[start:], *DOMAINS[:start]]:
        claim = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            claim.bind(('127.0.0.1', FIRST_PORT + PORTS_PER_DOMAIN * domain))
        except OSError:
            claim.close()
            continue
        atexit.register(claim.close)  # the bound socket is the claim, for as long as the run lasts
        return domain
    raise RuntimeError(f'every ROS domain from {DOMAINS[0]} to {DOMAINS[-1]} is taken on this machine')


os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
os.environ['ROS_DOMAIN_ID'] = str(_claim_domain())
os.environ.pop('ROS_LOCALHOST_ONLY', None)  # the older switch would override the range
os.environ.setdefault('AMENT_PREFIX_PATH', sys.prefix)
os.environ.setdefault('MUJOCO_GL', 'egl')
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # a model that is not here is missed at once
# Many processes on few cores: one thread each is faster than all threads in each.
for variable in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
    os.environ.setdefault(variable, '1')
# Child processes import the package that is being tested, wherever they are started.
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get('PYTHONPATH')]))
os.environ.setdefault('ROS_LOG_DIR', str(REPOSITORY / 'out' / 'ros_log'))


@pytest.fixture(scope='session')
def repository() -> Path:
    """The root of the source tree under test."""
    return REPOSITORY


@pytest.fixture(scope='session')
def ros_environment() -> dict[str, str]:
    """The environment that a process needs to meet this run's nodes, and no others."""
    return dict(os.environ)


@pytest.fixture
def rclpy_context() -> Iterator[object]:
    """An rclpy context of this test's own, shut down after it: no state goes from one test to the next."""
    import rclpy

    context = rclpy.Context()
    rclpy.init(args=[], context=context)
    yield context
    context.try_shutdown()


@pytest.fixture(scope='module')
def cell() -> Iterator[object]:
    """A robot beside a node that runs, whose parts can be made to fail."""
    from fault_cell import Cell

    cell = Cell()
    yield cell
    cell.close()


@pytest.fixture(autouse=True)
def commands_within_limits(request) -> Iterator[None]:
    """No command of a node that a process test starts breaks a limit, unless it is marked as unguarded."""
    yield
    if 'ros_harness' in sys.modules and request.node.get_closest_marker('process'):
        sys.modules['ros_harness'].WATCHED.verdict(bool(request.node.get_closest_marker('unguarded')))


@pytest.fixture(scope='session')
def image_contract():
    """Two 84x84 cameras and proprioception, two steps at 20 Hz: what the shipped Lift task sees."""
    from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec

    cameras = [StreamSpec(name, 'image', (84, 84, 3), 0.2) for name in ('agentview', 'wrist')]
    return ObservationContract(
        20.0, 2, (*cameras, StreamSpec('proprioception', 'proprioception', (9,), 0.2)), 0.1
    )


@pytest.fixture
def small_backbone():
    """An untrained backbone of full structure and small size, for the simulated Panda at 20 Hz."""
    import torch

    from decoupled_policy_ros.policy import Backbone
    from decoupled_policy_ros.policy.backbones import DPMLPBackbone, DPMLPSize
    from decoupled_policy_ros.policy.diffusion import NoiseSchedule
    from decoupled_policy_ros.policy.schedule import ScheduleConfig
    from decoupled_policy_ros.robot.description import load_robot
    from decoupled_policy_ros.robot.fingerprint import Fingerprint

    torch.manual_seed(0)
    denoiser = DPMLPBackbone(DPMLPSize(width=32, hidden=64, blocks=2, time_width=16))
    # Predicting v, noise gives rotations of all kinds; predicting noise, an untrained network's clip to corners of the
    # cube, some of which are no rotations.
    schedule = NoiseSchedule(ScheduleConfig(prediction='v'))
    backbone = Backbone(denoiser, Fingerprint.of(load_robot('panda_sim'), 20.0), schedule, 'small')
    backbone.normaliser.fit([[0.3, -0.3, -0.1, *[0.0] * 7], [0.7, 0.3, 0.4, *[0.0] * 7]])
    return backbone.freeze()


@pytest.fixture
def small_policy_folders(small_backbone, image_contract, tmp_path) -> tuple[Path, Path]:
    """Folders (backbone, task) of an untrained policy that sees two cameras."""
    from decoupled_policy_ros.policy import Task, save_backbone, save_task

    save_backbone(tmp_path / 'backbones' / 'small', small_backbone)
    task = Task(
        image_contract,
        small_backbone,
        {'base_channels': 16, 'keypoints': 8},
        'small_task',
        'lift the red cube',
    )
    save_task(tmp_path / 'tasks' / 'small_task', task)
    return tmp_path / 'backbones' / 'small', tmp_path / 'tasks' / 'small_task'


@pytest.fixture
def small_policy(small_policy_folders):
    """That policy, loaded."""
    from decoupled_policy_ros.policy import load_policy
    from decoupled_policy_ros.robot.description import load_robot

    return load_policy(small_policy_folders[1], load_robot('panda_sim'))
