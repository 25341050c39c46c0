"""Set-up that every test shares. The environment is set when this file is imported: before rclpy, before torch.

Nothing leaves this machine, and two test runs at once don't hear each other: discovery stays on localhost
and each run takes a ROS domain of its own.
"""

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

# The socket is bound for as long as the run lasts: it is the claim on the domain.
_claims: list[socket.socket] = []


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
        _claims.append(claim)
        return domain
    raise RuntimeError(f'every ROS domain from {DOMAINS[0]} to {DOMAINS[-1]} is taken on this machine')


os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
os.environ['ROS_DOMAIN_ID'] = str(_claim_domain())
os.environ.pop('ROS_LOCALHOST_ONLY', None)  # the older switch would override the range
os.environ.setdefault('AMENT_PREFIX_PATH', sys.prefix)
os.environ.setdefault('MUJOCO_GL', 'egl')
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
