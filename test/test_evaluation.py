"""Evaluation: the interval, and the closed loop through observation, engine and chunks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from decoupled_policy_ros.errors import CheckpointError, ConfigError
from decoupled_policy_ros.training.evaluation import Evaluation, Rollout, evaluate, wilson_interval


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_equals_scipys(case):
    successes, trials = case
    theirs = binomtest(successes, trials).proportion_ci(0.95, method='wilson')
    np.testing.assert_allclose(wilson_interval(successes, trials), (theirs.low, theirs.high), atol=1e-6)


@pytest.mark.parametrize(('successes', 'trials'), [(3, 2), (-1, 5), (0, 0)])
def test_wilson_interval_refuses_impossible_counts(successes, trials):
    with pytest.raises(ConfigError):
        wilson_interval(successes, trials)


@pytest.mark.sim
def test_the_loop_observes_every_chunk_from_fresh_history_and_executes_eight(
    small_policy_folders, monkeypatch
):
    """The engine is the real one; what it is given and when is watched."""
    backbone, task = small_policy_folders
    rollout = Rollout(Evaluation(str(task), 'lift', str(backbone), denoising_steps=2, max_steps=20))
    seen = []
    many = rollout.engine.many

    def watched(observations, generators):
        (arrays,) = observations
        seen.append((rollout.sim.stamp_ns, {name: array.copy() for name, array in arrays.items()}))
        return many(observations, generators)

    monkeypatch.setattr(rollout.engine, 'many', watched)
    assert rollout.run(seed=3).steps == 20
    stamps = np.array([stamp for stamp, _ in seen])
    assert np.diff(stamps).tolist() == [400_000_000] * 2
    for _, arrays in seen:
        assert arrays['wrist'].shape == (2, 84, 84, 3)
        assert not np.array_equal(*arrays['wrist']) or seen[0][1] is arrays  # at first the arm holds still
        assert arrays['proprioception'].dtype == np.float32
    first_run = [arrays['proprioception'] for _, arrays in seen]
    seen.clear()
    rollout.run(seed=3)
    np.testing.assert_array_equal(first_run, [arrays['proprioception'] for _, arrays in seen])
    rollout.close()


@pytest.mark.sim
def test_evaluate_writes_what_it_reports(small_policy_folders, tmp_path):
    backbone, task = small_policy_folders
    spec = Evaluation(str(task), 'lift', str(backbone), denoising_steps=1, max_steps=10, sampler='ddpm')
    assert Rollout(spec).engine.sampler.kind == 'ddpm'
    report = evaluate(
        spec, 2, seed=5, workers=2, json_path=tmp_path / 'report.json', video=tmp_path / 'video.mp4'
    )
    assert json.loads((tmp_path / 'report.json').read_text()) == json.loads(json.dumps(report))
    assert [r['seed'] for r in report['results']] == [5, 6]
    assert report['successes'] == 0  # an untrained policy does not lift a cube in half a second
    assert (tmp_path / 'video.mp4').read_bytes()[4:8] == b'ftyp'


def test_evaluate_refuses_what_is_no_policy(tmp_path):
    with pytest.raises(CheckpointError, match='no_such_policy'):
        evaluate(Evaluation('no_such_policy', 'lift'), 1)
    with pytest.raises(
        ConfigError, match=r"'euler' does not exist with a 'squared_cosine'.*valid: ddim, ddpm"
    ):
        evaluate(Evaluation('lift', 'lift', sampler='euler'), 1)
    with pytest.raises(ConfigError, match='at least 1, got 0'):
        evaluate(Evaluation('no_such_policy', 'lift'), 0)
