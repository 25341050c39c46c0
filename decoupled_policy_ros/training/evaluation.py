"""Closed-loop evaluation in the simulator: episodes over processes or machines, success with its uncertainty."""

from __future__ import annotations

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from decoupled_policy_ros.data.parallel import run_tasks
from decoupled_policy_ros.errors import ConfigError, EvaluationError
from decoupled_policy_ros.policy.checkpoint import read_header
from decoupled_policy_ros.sim.benchmarks import require_scenes
from decoupled_policy_ros.training.rollout import (
    LANES,
    Arms,
    EpisodeResult,
    Evaluation,
    Rollout,
    checkpoint_folder,
)

__all__ = ['EpisodeResult', 'Evaluation', 'Rollout', 'evaluate', 'evaluate_all', 'wilson_interval']

FILMED_EPISODES = 5


@dataclass(frozen=True)
class Films:
    """Which episodes are filmed, each into a file of its own.

    Attributes:
        folder: of the files.
        episodes: so many of the first of each policy in each task.
    """

    folder: Path
    episodes: int = FILMED_EPISODES

    def path(self, policy: int, seed: int) -> Path:
        """File of the episode of a seed, of policy number `policy` of an evaluation."""
        return self.folder / f'{policy:03d}-{seed}.mp4'


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a success rate, 95 % by default (Wilson, JASA 1927)."""
    if not 0 <= successes <= trials or trials < 1:
        raise ConfigError(
            f'successes must be in 0..trials and trials at least 1, got {successes} of {trials}'
        )
    rate, z2 = successes / trials, z * z
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z / (1 + z2 / trials) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(
    spec: Evaluation,
    episodes: int,
    seed: int = 0,
    workers: int | None = None,
    video: Path | None = None,
    lanes: int | None = None,
) -> dict[str, Any]:
    """Success over episodes seeded seed, seed + 1, ..., with a Wilson interval.

    Args:
        workers, video, lanes: see `evaluate_all`.

    Returns:
        The report: rate, interval, and each episode's seed, outcome and steps.

    Raises:
        CheckpointError, FingerprintMismatch, ConfigError, SimulationError: as their constructors say.
        EvaluationError: see `evaluate_all` and `require_unchanged`.
    """
    report = evaluate_all([spec], episodes, seed, workers, video=video, lanes=lanes)['reports'][0]
    require_unchanged([report])
    return report


def evaluate_all(
    specs: Sequence[Evaluation],
    episodes: int,
    seed: int = 0,
    workers: int | None = None,
    video: Path | None = None,
    lanes: int | None = None,
    ray: str | None = None,
    films: Films | None = None,
) -> dict[str, Any]:
    """Several policies, tasks or robots over the same scenes, with one pool of processes.

    Policies that differ only in what they were trained from (seeds 0, 42, 420, say) come together in the
    summary, which has one row for each task and robot, and for a benchmark of which several tasks were done.

    Args:
        specs: what to evaluate, in the order of the reports.
        episodes: of each of them, seeded seed, seed + 1, ...
        workers: processes; one per core by default. With 1 everything runs in this process.
        video: the first 5 episodes of the first policy are also filmed into this file, one after the other.
        lanes: episodes that a process has under way at a time; see `Rollout`.
        ray: address of a Ray cluster to use instead of processes of this machine; see `data.parallel`.
        films: also film episodes of every policy.

    Returns:
        {'reports': one as from `evaluate` for each, 'summary': rows, see `summary`}.

    Raises:
        CheckpointError, FingerprintMismatch, ConfigError, SimulationError: as their constructors say.
        EvaluationError: a process or machine failed.
    """
    if not specs:
        raise ConfigError('no policy is given; name task folders, or names in models/tasks')
    if episodes < 1:
        raise ConfigError(f'episodes must be at least 1, got {episodes}')
    if any(count is not None and count < 1 for count in (lanes, workers)):
        raise ConfigError(f'workers and lanes must be at least 1, got {workers} and {lanes}')
    workers = workers or len(os.sched_getaffinity(0))
    seeds = range(seed, seed + episodes)
    for spec in specs:
        require_scenes(spec.task, seeds)
    if video is not None:
        _film(specs[0], seeds[:FILMED_EPISODES], video)
    headers = [_header(spec) for spec in specs]
    alone = workers == 1 and ray is None
    jobs = _jobs(specs, seeds, lanes, 1 if alone else workers, films)
    finished = _here(jobs) if alone else _elsewhere(jobs, workers, ray)
    with closing(finished):
        results = _watched(finished, len(specs) * episodes)
    reports = [
        _report(spec, header, seed, [results[i, s] for s in seeds])
        for i, (spec, header) in enumerate(zip(specs, headers, strict=True))
    ]
    if films is not None:
        for index, report in enumerate(reports):
            filmed = seeds[: films.episodes]
            report['films'] = [{'seed': s, 'file': films.path(index, s).name} for s in filmed]
    return {'reports': reports, 'summary': summary(reports)}


def require_unchanged(reports: Iterable[dict[str, Any]]) -> None:
    """Refuse a policy whose files were written anew while it was evaluated: nobody knows which weights played.

    Raises:
        EvaluationError: there is one.
    """
    for report in reports:
        if 'task_sha256_afterwards' in report:
            raise EvaluationError(
                f'{report["policy"]} was written anew while it was evaluated: sha256 {report["task_sha256"]} before, '
                f'{report["task_sha256_afterwards"]} afterwards; evaluate a copy, or once its training is over'
            )


def summary(reports: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task and robot: all episodes pooled, and the policies' rates, their mean and deviation.

    A benchmark of which several tasks were done has a row besides. There the first policies of all its tasks count as
    one, and the second ones, and so on: the same policy, or one for each task from the same training seed.

    The interval is over episodes; `std_of_rates` (n - 1) is over policies, None for a single one.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for report in reports:
        groups[report['task'], report['robot']].append(report)
    rows = [
        _summed(*key, group, [report['success_rate'] for report in group]) for key, group in groups.items()
    ]
    suites: dict[tuple[str, str], list[list[dict[str, Any]]]] = defaultdict(list)
    for (task, robot), group in groups.items():
        if '/' in task:
            suites[task.partition('/')[0], robot].append(group)
    for (suite, robot), tasks in suites.items():
        if len(tasks) > 1 and len(set(map(len, tasks))) == 1:
            rates = [float(np.mean([r['success_rate'] for r in one])) for one in zip(*tasks, strict=True)]
            rows.append(_summed(f'{suite}, {len(tasks)} tasks', robot, list(itertools.chain(*tasks)), rates))
    return rows


def _summed(task: str, robot: str, group: Sequence[dict[str, Any]], rates: Sequence[float]) -> dict[str, Any]:
    """A row of the summary; `rates` are those of the policies, or of what counts as one."""
    successes, trials = (sum(report[key] for report in group) for key in ('successes', 'episodes'))
    return {
        'task': task,
        'robot': robot,
        'policies': list(dict.fromkeys(report['policy'] for report in group)),
        'episodes': trials,
        'successes': successes,
        'success_rate': successes / trials,
        'wilson_95': wilson_interval(successes, trials),
        'rates': list(rates),
        'mean_of_rates': float(np.mean(rates)),
        'std_of_rates': float(np.std(rates, ddof=1)) if len(rates) > 1 else None,
    }


def _header(spec: Evaluation) -> dict[str, Any]:
    return read_header(checkpoint_folder(spec.policy, spec.checkpoint))


def _report(
    spec: Evaluation, header: dict[str, Any], seed: int, results: list[EpisodeResult]
) -> dict[str, Any]:
    """What came of it; `header` is the policy's from before the first episode."""
    rows = [asdict(r) for r in results]
    successes = [r for r in results if r.success]
    now = _header(spec)['sha256']
    return {
        **asdict(spec),
        'task_sha256': header['sha256'],
        **({} if now == header['sha256'] else {'task_sha256_afterwards': now}),
        'backbone_sha256': header['backbone']['sha256'],
        'seed': seed,
        **counted(rows),
        'success_rate': len(successes) / len(results),
        'mean_steps_of_successes': float(np.mean([r.steps for r in successes])) if successes else None,
        'results': rows,
    }


def counted(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of episodes: how many there are, how many succeeded, its interval, and the share of torn chunks."""
    successes = sum(result['success'] for result in results)
    return {
        'episodes': len(results),
        'successes': successes,
        'wilson_95': wilson_interval(successes, len(results)),
        'torn_chunks': sum(r['torn_chunks'] for r in results) / max(sum(r['chunks'] for r in results), 1),
    }


# --- who plays which episodes -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """Episodes of one policy; `index` is its place among those that are evaluated."""

    index: int
    spec: Evaluation
    seeds: tuple[int, ...]
    lanes: int | None
    films: tuple[tuple[int, Path], ...] = ()


Finished = Generator[tuple[int, EpisodeResult], None, None]


def _jobs(
    specs: Sequence[Evaluation], seeds: range, lanes: int | None, workers: int, films: Films | None
) -> list[_Job]:
    """Jobs of a size at which the lanes are mostly busy and the workers finish together."""
    pieces = 1
    if workers > 1:
        largest = min(2 * (lanes or LANES), math.ceil(len(specs) * len(seeds) / workers))
        pieces = math.ceil(len(seeds) / largest)
    jobs = []
    for index, spec in enumerate(specs):
        for piece in np.array_split(seeds, pieces):
            mine = tuple(map(int, piece))
            filmed = [s for s in mine if films is not None and s in seeds[: films.episodes]]
            paths = tuple((s, films.path(index, s).resolve()) for s in filmed) if films is not None else ()
            jobs.append(_Job(index, spec, mine, lanes, paths))
    return jobs


def _here(jobs: Sequence[_Job]) -> Finished:
    """Play the jobs in this process."""
    arms = Arms()
    try:
        for job in jobs:
            rollout = Rollout(job.spec, job.lanes, arms)
            for result in rollout.run_all(job.seeds, dict(job.films)):
                yield job.index, result
    finally:
        arms.close()


def _elsewhere(jobs: Sequence[_Job], workers: int, ray: str | None) -> Finished:
    """Play the jobs in other processes, once all policies were seen to load here."""
    arms = Arms()
    try:
        for spec in dict.fromkeys(job.spec for job in jobs):
            Rollout(spec, arms=arms)  # a wrong file is reported once and not by every worker
    finally:
        arms.close()
    with closing(run_tasks(_play, jobs, workers, ray)) as results:
        for result in results:
            job = jobs[result.index]
            if result.error is not None:
                raise EvaluationError(
                    f'{job.spec.policy} in {job.spec.task}, seeds {job.seeds[0]} to {job.seeds[-1]}: {result.error}'
                )
            for episode in result.value:
                yield job.index, episode


_arms = Arms()
_rollout: tuple[Evaluation, Rollout] | None = None


def _play(job: _Job) -> list[EpisodeResult]:
    """All episodes of a job, in a worker; simulators and policy stay for the next job."""
    global _rollout
    torch.set_num_threads(1)
    if _rollout is None or _rollout[0] != job.spec:
        _rollout = job.spec, Rollout(job.spec, job.lanes, _arms)
    return list(_rollout[1].run_all(job.seeds, dict(job.films)))


def _film(spec: Evaluation, seeds: range, path: Path) -> None:
    """Film episodes, one after the other."""
    rollout = Rollout(spec)
    try:
        with rollout.scenes[0].film(path) as writer:
            for seed in seeds:
                rollout.run(seed, writer)
    finally:
        rollout.close()


def _watched(finished: Finished, total: int) -> dict[tuple[int, int], EpisodeResult]:
    """Results by policy and seed, with a progress bar meanwhile."""
    results: dict[tuple[int, int], EpisodeResult] = {}
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn('{task.fields[note]}'),
    )
    with Progress(*columns, refresh_per_second=2) as progress:
        bar = progress.add_task('episodes', total=total, note='')
        for index, result in finished:
            results[index, result.seed] = result
            note = f'{sum(r.success for r in results.values())} succeeded'
            progress.update(bar, advance=1, note=note)
    return results
