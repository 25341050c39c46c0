"""Scripts of bench/ that play episodes still run: one episode each, for their figures are not what is tested."""

import json
import os
import subprocess
import sys

import pytest
import torch

from decoupled_policy_ros.policy.packed import usable_precisions

pytestmark = [pytest.mark.sim, pytest.mark.slow]

PLAYED = {
    'guard.py': ('--episodes', '1', '--scenes', '1', '--draws', '2'),
    'outputs.py': ('--episodes', '1'),
    'precision.py': ('--episodes', '1'),
    'seams.py': ('--episodes', '1', '--ways', 'in-painting'),
}


@pytest.mark.parametrize('script', PLAYED)
def test_a_bench_that_plays_episodes_runs(script, repository, tmp_path):
    command = [sys.executable, str(repository / 'bench' / script), *PLAYED[script]]
    found = subprocess.run(
        [*command, '--json', str(tmp_path / 'figures.json')],
        cwd=repository,
        env=dict(os.environ),
        capture_output=True,
    )
    assert found.returncode == 0, found.stderr.decode()[-2000:]
    if script == 'precision.py' and 'bfloat16' not in usable_precisions(torch.device('cpu')):
        assert b'does not multiply bfloat16' in found.stdout
    else:
        assert json.loads((tmp_path / 'figures.json').read_text())
