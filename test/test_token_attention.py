"""The bench that says where the waypoints of Stage 1 look."""

import json
import runpy
import sys

import pytest
import torch
from test_backbone_training import stage1

from decoupled_policy_ros.policy.backbones.dp_t import Attention

HORIZON, WIDTH = 16, 64


@pytest.fixture
def script(repository):
    return repository / 'bench' / 'token_attention.py'


def tokens(sharpness: float) -> tuple[Attention, torch.Tensor]:
    """Attention that compares tokens as they are, and tokens that are orthogonal to each other."""
    attention = Attention(WIDTH, heads=1, dropout=0.0)
    with torch.no_grad():
        for linear in (attention.query, attention.key_value):
            linear.weight.zero_()
            linear.bias.zero_()
            linear.weight[:WIDTH] = sharpness * torch.eye(WIDTH)
    return attention, torch.eye(WIDTH)[: 1 + HORIZON][None]


@pytest.mark.parametrize(('sharpness', 'share'), [(0.0, 1 / HORIZON), (20.0, 1.0)])
def test_the_share_of_the_own_frame_is_one_of_all_for_even_attention_and_all_for_sharp(
    script, sharpness, share
):
    own_share = runpy.run_path(str(script))['own_share']
    attention, memory = tokens(sharpness)
    waypoints = memory[:, 1:]  # waypoint i is like the token of frame i
    assert own_share(attention, waypoints, memory) == pytest.approx(share, abs=1e-6)
    together = torch.cat(
        [memory, waypoints], 1
    )  # as a prefix; each sees its like twice, in memory and in itself
    assert own_share(attention, together, together) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize('mechanism', ['prefix', 'cross_attention'])
def test_it_reads_a_stage_1_run(script, mechanism, tmp_path, monkeypatch):
    folder = stage1(tmp_path / 'run', 'dp_t', conditioning={'kind': mechanism})
    figures = tmp_path / 'figures.json'
    monkeypatch.setattr(sys, 'argv', ['', str(folder), '--batches', '2', '--json', str(figures)])
    runpy.run_path(str(script), run_name='__main__')
    (found,) = json.loads(figures.read_text()).values()
    assert (found['mechanism'], found['steps']) == (mechanism, 2)
    assert all(0 < share < 1 for share in found['share_of_own_frame'])
    assert all(found['loss_by_condition'][name] > 0 for name in ('own', 'reordered', 'another'))


def test_a_run_without_tokens_is_refused(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['', str(stage1(tmp_path / 'run', 'dp_t'))])
    with pytest.raises(SystemExit, match='a dp_t by adaln_zero; valid: dp_t by'):
        runpy.run_path(str(script), run_name='__main__')
