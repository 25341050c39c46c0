"""Scripts of bench/ that play episodes still run: one episode each, for their figures are not what is tested."""

import json
import runpy
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
def test_a_bench_that_plays_episodes_runs(script, repository, tmp_path, monkeypatch, capfd):
    figures = tmp_path / 'figures.json'
    monkeypatch.chdir(repository)
    monkeypatch.syspath_prepend(repository / 'bench')
    monkeypatch.setattr(sys, 'argv', [script, *PLAYED[script], '--json', str(figures)])
    runpy.run_path(str(repository / 'bench' / script), run_name='__main__')
    if script == 'precision.py' and 'bfloat16' not in usable_precisions(torch.device('cpu')):
        assert 'does not multiply bfloat16' in capfd.readouterr().out
    else:
        assert json.loads(figures.read_text())
