"""Evaluation: the interval, and the closed loop through observation, engine and chunks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray_cluster import ray_cluster
from scipy.stats import binomtest
from untrained import save_untrained_policy

from decoupled_policy_ros import cli_evaluate
from decoupled_policy_ros.cli import main
from decoupled_policy_ros.cli_evaluate import EvaluateOptions
from decoupled_policy_ros.data.parallel import Result
from decoupled_policy_ros.errors import (
    CheckpointError,
    ConfigError,
    EvaluationError,
    FingerprintMismatch,
    SimulationError,
)
from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.policy.checkpoint import load_backbone, read_header, save_task
from decoupled_policy_ros.policy.model_files import identity
from decoupled_policy_ros.policy.policy import Task
from decoupled_policy_ros.training import evaluation
from decoupled_policy_ros.training.evaluation import (
    EpisodeResult,
    Evaluation,
    Rollout,
    _jobs,
    evaluate,
    evaluate_all,
    wilson_interval,
)


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

    def watched(observations, *others):
        (arrays,) = observations
        seen.append((rollout.sim.stamp_ns, {name: array.copy() for name, array in arrays.items()}))
        return many(observations, *others)

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
def test_a_chunk_with_a_rotation_that_is_none_is_rejected_and_the_episode_goes_on(
    small_policy_folders, monkeypatch
):
    backbone, task = small_policy_folders
    rollout = Rollout(Evaluation(str(task), 'lift', str(backbone), denoising_steps=2, max_steps=20))
    many = rollout.engine.many
    degenerate = iter([True])

    def young(*arguments):
        chunks = many(*arguments)
        return [np.zeros_like(chunk) for chunk in chunks] if next(degenerate, False) else chunks

    monkeypatch.setattr(rollout.engine, 'many', young)
    result = rollout.run(seed=3)
    rollout.close()
    assert (result.steps, result.rejected_chunks) == (20, 1) and result.chunks > 2


@pytest.mark.sim
def test_evaluate_reports_and_films_its_episodes(small_policy_folders, tmp_path):
    backbone, task = small_policy_folders
    spec = Evaluation(str(task), 'lift', str(backbone), denoising_steps=1, max_steps=10, sampler='ddpm')
    rollout = Rollout(spec)
    assert rollout.engine.sampler.kind == 'ddpm'
    rollout.close()
    report = evaluate(spec, 2, seed=5, workers=1, video=tmp_path / 'video.mp4')
    assert [r['seed'] for r in report['results']] == [5, 6]
    assert report['successes'] == 0  # an untrained policy does not lift a cube in half a second
    assert (tmp_path / 'video.mp4').read_bytes()[4:8] == b'ftyp'


@pytest.mark.sim
def test_a_policy_that_is_written_anew_meanwhile_has_no_report(small_policy_folders, tmp_path, monkeypatch):
    backbone, task = small_policy_folders
    copied = tmp_path / 'task'
    shutil.copytree(task, copied)
    spec = Evaluation(str(copied), 'lift', str(backbone), denoising_steps=1, max_steps=2)

    def rewriting(jobs):
        yield from here(jobs)
        header = json.loads((copied / 'task.json').read_text())
        header['instruction'] += ' again'
        header['sha256'] = identity(header)
        (copied / 'task.json').write_text(json.dumps(header))

    here = evaluation._here
    monkeypatch.setattr(evaluation, '_here', rewriting)
    with pytest.raises(EvaluationError, match='was written anew while it was evaluated'):
        evaluate(spec, 1, workers=1)
    before, other = read_header(copied)['sha256'], replace(spec, policy=str(task))
    changed, whole = evaluate_all([spec, other], 1, workers=1)['reports']
    assert 'task_sha256_afterwards' not in whole  # whose episodes are not lost
    assert changed['task_sha256'] == before != changed['task_sha256_afterwards']


def test_what_can_not_be_written_or_done_is_refused_before_any_episode(small_policy_folders, tmp_path):
    _, task = small_policy_folders
    for options, message in (
        (EvaluateOptions(json=tmp_path), 'is a folder; name a file'),
        (EvaluateOptions(films=-1), 'films must be at least 0, got -1'),
        (EvaluateOptions(seed=2**32), r'a seed is in 0 .. 2\^32 - 1'),
    ):
        with pytest.raises(ConfigError, match=message):
            cli_evaluate.evaluate((str(task),), ('lift',), options)
    with pytest.raises(ConfigError, match='no policy is given'):
        cli_evaluate.evaluate((), ('lift',), EvaluateOptions())
    with pytest.raises(ConfigError, match='no task is given'):
        cli_evaluate.evaluate((str(task),), (), EvaluateOptions())


# Several episodes at a time, in several places


@pytest.fixture(scope='module')
def untrained(tmp_path_factory) -> Evaluation:
    """A few steps of a policy that moves about, but does not know what it does."""
    task = save_untrained_policy(tmp_path_factory.mktemp('models'))
    return Evaluation(str(task), 'lift', denoising_steps=2, max_steps=18)


@pytest.fixture(scope='module')
def alone(untrained) -> dict[int, EpisodeResult]:
    """Its episodes of three seeds, each played by itself."""
    rollout = Rollout(untrained)
    results = {seed: rollout.run(seed) for seed in (3, 4, 5)}
    rollout.close()
    assert len({result.largest_step_m for result in results.values()}) == 3
    return results


def same(results: list[dict], alone: dict[int, EpisodeResult]) -> None:
    """The same episodes but for the last bits of the network's output."""
    assert [result['seed'] for result in results] == list(alone)
    for result in results:
        expected = asdict(alone[result['seed']])
        assert result.pop('largest_step_m') == pytest.approx(expected.pop('largest_step_m'), rel=1e-4)
        assert result == expected


@pytest.mark.sim
@pytest.mark.parametrize('seeds', [(3, 4, 5), (5, 3, 4)])
def test_an_episode_does_not_depend_on_those_beside_it(untrained, alone, seeds):
    rollout = Rollout(untrained, lanes=2)
    results = sorted(rollout.run_all(seeds), key=lambda result: result.seed)
    assert len(rollout.scenes) == 2
    rollout.close()
    same([asdict(result) for result in results], alone)


@pytest.mark.sim
def test_workers_and_lanes_change_nothing(untrained, alone):
    report = evaluate_all([untrained, untrained], 3, seed=3, workers=2, lanes=1)
    for one in report['reports']:
        same(one['results'], alone)


@pytest.mark.sim
@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_episodes(untrained, tmp_path):
    pytest.importorskip('ray')
    common = ['--policy', untrained.policy, '--task', 'lift', '--episodes', '2', '--denoising-steps', '1']
    command = [sys.executable, '-m', 'decoupled_policy_ros.cli', 'evaluate', *common]
    with ray_cluster() as (address, environment):
        options = ['--ray', address, '--json', str(tmp_path / 'cluster.json')]
        done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    theirs = json.loads((tmp_path / 'cluster.json').read_text())
    ours = evaluate(replace(untrained, denoising_steps=1, max_steps=None), 2, workers=1)
    same(theirs['results'], {r['seed']: EpisodeResult(**r) for r in ours['results']})


def test_jobs_are_as_large_as_keeps_lanes_and_workers_busy(untrained):
    sizes = [len(job.seeds) for job in _jobs([untrained], range(50), 8, 2, None)]
    assert sum(sizes) == 50 and max(sizes) <= 16 and max(sizes) - min(sizes) <= 1
    assert [len(job.seeds) for job in _jobs([untrained], range(6), 8, 3, None)] == [2, 2, 2]
    assert [len(job.seeds) for job in _jobs([untrained] * 2, range(9), 8, 1, None)] == [9, 9]


@pytest.mark.sim
def test_a_worker_that_fails_is_named_with_what_it_played(untrained, monkeypatch):
    """Whatever processes and clusters do about a failure, see the tests of convert; here what is made of it."""

    def run_tasks(function, jobs, workers, ray):
        yield Result(0, [EpisodeResult(seed, False, 1) for seed in jobs[0].seeds])
        yield Result(1, error='a worker process died: killed, or out of memory')

    monkeypatch.setattr('decoupled_policy_ros.training.evaluation.run_tasks', run_tasks)
    with pytest.raises(EvaluationError, match=r'tiny in lift, seeds 2 to 3: a worker process died'):
        evaluate_all([untrained], 4, workers=2)


@pytest.mark.sim
@pytest.mark.parametrize('robot', ['ur5e_sim', 'iiwa_sim', 'kinova3_sim'])
def test_policies_of_every_arm_are_evaluated(tmp_path, robot):
    task = save_untrained_policy(tmp_path, robot)
    spec = Evaluation(str(task), 'lift', robot=robot, denoising_steps=1, max_steps=9)
    report = evaluate(spec, 1, workers=1)
    assert (report['robot'], report['results'][0]['steps'], report['results'][0]['chunks']) == (robot, 9, 2)


# What is refused


@pytest.mark.sim
@pytest.mark.parametrize(
    ('changes', 'error', 'message'),
    [
        ({'task': 'juggle'}, SimulationError, "unknown simulated task 'juggle', valid: can, detour"),
        ({'max_steps': 0}, ConfigError, 'max_steps must be at least 1, got 0'),
        ({'denoising_steps': 0}, ConfigError, '0'),
        ({'robot': 'ur5e_sim'}, FingerprintMismatch, 'ur5e_sim'),
        ({'checkpoint': 'best'}, CheckpointError, 'only its last weights'),
    ],
)
def test_evaluate_refuses(untrained, changes, error, message):
    with pytest.raises(error, match=message):
        evaluate(replace(untrained, **changes), 1, workers=1)


@pytest.mark.sim
@pytest.mark.parametrize(
    ('stream', 'message'),
    [
        (StreamSpec('object_state', 'vector', (10,), 0.2), r"'object_state' of 10 values.*'stack'.* has 23"),
        (
            StreamSpec('force', 'vector', (6,), 0.2),
            r"does not measure the vector 'force'; valid: object_state",
        ),
        (StreamSpec('overhead', 'image', (84, 84, 3), 0.2), r"camera 'overhead', valid: agentview, front"),
    ],
)
def test_a_policy_that_observes_something_else_is_refused_before_an_episode(tmp_path, stream, message):
    backbone = load_backbone(save_untrained_policy(tmp_path).parents[1] / 'backbones' / 'tiny')
    task = Task(ObservationContract(20.0, 2, (stream,), 0.1), backbone, {'base_channels': 16, 'crop': 76})
    save_task(tmp_path / 'tasks' / 'other', task)
    with pytest.raises((ConfigError, SimulationError), match=message):
        evaluate(Evaluation(str(tmp_path / 'tasks' / 'other'), 'stack'), 1, workers=1)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--policy', '--task', 'lift'], 'no policy is given'),
        (['--policy', 'lift', '--task'], 'no task is given'),
        (['--policy', 'lift', '--task', 'lift', '--episodes', '0'], 'episodes must be at least 1, got 0'),
        (
            ['--policy', 'lift', '--task', 'lift', '--seed', '-1'],
            'a seed is in 0 .. 2^32 - 1, got scenes -1 to 48',
        ),
        (['--policy', 'lift', '--task', 'lift', '--lanes', '0'], 'lanes must be at least 1'),
        (
            ['--policy', 'lift', '--task', 'lift', '--workers', '0'],
            'workers and lanes must be at least 1, got 0',
        ),
        (
            ['--policy', 'lift', '--task', 'lift', 'mimicgen/stack_d1'],
            'lift and mimicgen/stack_d1 can not be',
        ),
        (['--policy', 'lift', '--task', 'mimicgen/juggle'], 'unknown benchmark task'),
    ],
)
def test_the_command_says_in_a_line_what_is_wrong(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, 'argv', ['decoupled-policy', 'evaluate', *arguments])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2
    assert message in ' '.join(capsys.readouterr().err.split())


def test_evaluate_refuses_what_is_no_policy(tmp_path):
    with pytest.raises(CheckpointError, match='no_such_policy'):
        evaluate(Evaluation('no_such_policy', 'lift'), 1)
    with pytest.raises(
        ConfigError, match=r"'euler' does not exist with a 'squared_cosine'.*valid: ddim, ddpm"
    ):
        evaluate(Evaluation('lift', 'lift', sampler='euler'), 1)
    with pytest.raises(ConfigError, match='at least 1, got 0'):
        evaluate(Evaluation('no_such_policy', 'lift'), 0)
