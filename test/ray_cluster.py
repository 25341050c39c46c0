"""A Ray cluster on this machine, for as long as a test needs it."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

HEAD = """
import sys, ray
ray.init(num_cpus=1, object_store_memory=100_000_000, include_dashboard=False)
print('address', ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def ray_cluster() -> Iterator[tuple[str, dict[str, str]]]:
    """Its address, and the environment of a process that may use it: newer versions ask for a token."""
    token = {'RAY_AUTH_MODE': 'token', 'RAY_AUTH_TOKEN': secrets.token_hex(32)}
    environment = {**os.environ, 'RAY_USAGE_STATS_ENABLED': '0', **token}
    head = subprocess.Popen(
        [sys.executable, '-c', HEAD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert head.stdin is not None and head.stdout is not None
    try:
        yield next(line.split()[1] for line in head.stdout if line.startswith('address')), environment
    finally:
        head.stdin.close()
        head.stdout.close()
        head.wait(60)
