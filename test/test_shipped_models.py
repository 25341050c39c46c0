"""The weights in models/: they fit together, their sizes, where they come from, and that they work."""

from __future__ import annotations

import json

import pytest

from decoupled_policy_ros.policy import load_backbone, load_policy
from decoupled_policy_ros.policy.checkpoint import read_header
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.training.evaluation import Evaluation, Rollout


def test_every_shipped_model_passes_its_own_hashes_and_stays_small(repository):
    limits = {'backbones': 20e6, 'tasks': 28e6}
    for kind, limit in limits.items():
        folders = sorted(path for path in (repository / 'models' / kind).iterdir() if path.is_dir())
        assert folders
        for folder in folders:
            read_header(folder)
            assert sum(file.stat().st_size for file in folder.iterdir()) < limit, folder.name


def test_the_backbone_has_seen_recorded_motion_only_and_none_of_lift(repository):
    backbone = load_backbone(repository / 'models' / 'backbones' / 'dp_mixer_panda')
    assert sum(p.numel() for p in backbone.parameters()) == 4_799_370
    assert backbone.provenance['stage'] == 'stage1'
    sources = backbone.provenance['data']['sources']
    assert sources
    assert all('recorded' in source and 'lift' not in source['recorded'] for source in sources)


def test_one_frozen_backbone_serves_four_tasks(repository):
    backbone = read_header(repository / 'models' / 'backbones' / 'dp_mixer_panda')
    tasks = {
        path.name: read_header(path) for path in (repository / 'models' / 'tasks').iterdir() if path.is_dir()
    }
    assert set(tasks) == {'lift', 'stack', 'square', 'detour'}
    for header in tasks.values():
        assert header['backbone'] == {'name': backbone['name'], 'sha256': backbone['sha256']}
        assert header['provenance']['stage'] == 'stage2'
    evidence = json.loads((repository / 'docs' / 'evidence' / 'panda_tasks.json').read_text())
    measured = {row['task']: row['seeds']['0']['task_sha256'] for row in evidence['rows']}
    assert measured == {name: header['sha256'] for name, header in tasks.items()}


def test_lift_sees_two_cameras_and_proprioception_and_no_ground_truth(repository):
    policy = load_policy('lift', load_robot('panda_sim'))
    assert policy.backbone.name == 'dp_mixer_panda'
    kinds = {stream.name: stream.kind for stream in policy.contract.streams}
    assert kinds == {'agentview': 'image', 'wrist': 'image', 'proprioception': 'proprioception'}
    assert policy.task.provenance['stage'] == 'stage2'
    header = json.loads((repository / 'models' / 'tasks' / 'lift' / 'task.json').read_text())
    assert header['backbone']['sha256'] == policy.backbone.sha256


@pytest.mark.sim
@pytest.mark.slow
def test_lift_lifts_the_cube():
    """Scenes that no demonstration showed; the measured rate over 50 is in models/README.md."""
    rollout = Rollout(Evaluation('lift', 'lift'))
    outcomes = [rollout.run(seed).success for seed in range(100, 104)]
    rollout.sim.close()
    assert sum(outcomes) >= 3
