"""Running a study: processes that take what is not done yet, until all of it is.

Processes agree by lock files alone. So the same command may be started again after an interruption, or a second
time beside the first, here or on another machine that shares the folder.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections.abc import MutableSequence, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from decoupled_policy_ros.errors import ConfigError, DecoupledPolicyError
from decoupled_policy_ros.training.study.config import StudyConfig
from decoupled_policy_ros.training.study.job_kinds import LOG, Cell, DemonstrationsJob, Job
from decoupled_policy_ros.training.study.jobs import Place, plan, require_same
from decoupled_policy_ros.training.study.tables import read_results

ERROR = 'error.txt'
WAIT_S = 5.0


def run_studies(
    studies: Sequence[StudyConfig],
    out: Path,
    seeds: Sequence[int] | None = None,
    workers: int = 1,
    results: Path | None = None,
) -> dict[str, dict[Place, Cell]]:
    """Do what is missing of several studies, which share what they have in common.

    The first seed of all studies comes before the second of any.

    Args:
        out: folder of all runs.
        seeds: do only these; what is known of the others is in the cells that are returned all the same.
        workers: processes, each of which trains and evaluates on one thread; with 1 everything runs in this process,
            and with 0 nothing.
        results: folder of earlier results; what is in them is not done again.

    Returns:
        The cells of each study by its name; those that failed are not done.

    Raises:
        ConfigError: a configuration that can't be trained, demonstrations that are missing and that nothing makes, or
            that are others than the study wants, a seed that no study has, two studies of one name, or none.
    """
    _require_told_apart(studies)
    known = sorted({seed for study in studies for seed in study.seeds})
    if unknown := sorted(set(seeds or ()) - set(known)):
        raise ConfigError(f'no study has seed {unknown[0]}; there are {", ".join(map(str, known))}')
    jobs, cells = _planned(studies, out, seeds)
    if results is not None:
        for study in studies:
            read_results(cells[study.name], results / f'{study.name}.json')
    if workers < 0:
        raise ConfigError(f'workers must be at least 0, got {workers}')
    if workers:
        _require_data(list(jobs.values()))
    waiting = _wanted(jobs)
    _say(f'{len(jobs) - len(waiting)} of {len(jobs)} runs are done')
    if workers == 1:
        _work(waiting, out, [False] * len(waiting))
    elif waiting and workers:
        context = multiprocessing.get_context('spawn')
        failed = context.Array('b', len(waiting))
        given = (waiting, out, failed)
        processes = [context.Process(target=_work_until_interrupted, args=given) for _ in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    return cells


def _require_told_apart(studies: Sequence[StudyConfig]) -> None:
    if not studies:
        raise ConfigError('no study is given; name YAML files, such as config/studies/recipes.yaml')
    titles: dict[str, str] = {}
    for study in studies:
        if study.name in titles:
            raise ConfigError(
                f'two studies have the name {study.name!r}: {titles[study.name]!r} and {study.title!r}; their results '
                'would have the same file, so give one another name'
            )
        titles[study.name] = study.title


def _planned(
    studies: Sequence[StudyConfig], out: Path, seeds: Sequence[int] | None
) -> tuple[dict[Path, Job], dict[str, dict[Place, Cell]]]:
    """The jobs of some seeds, by their folders, and the cells of all."""
    cells: dict[str, dict[Place, Cell]] = {study.name: {} for study in studies}
    jobs: dict[Path, Job] = {}
    for index in range(max(len(study.seeds) for study in studies)):
        for study in studies:
            for seed in study.seeds[index : index + 1]:
                needed, placed = plan(study, out, [seed])
                require_same(jobs, needed, f'study {study.name}')
                cells[study.name].update(placed)
                if seeds is None or seed in seeds:
                    jobs.update({job.folder: job for job in needed if job.folder not in jobs})
    return jobs, cells


def _wanted(jobs: dict[Path, Job]) -> list[Job]:
    """The cells that are not done, in the order of the jobs, each behind what it waits for and no earlier one does."""
    wanted: dict[Path, Job] = {}

    def want(job: Job) -> None:
        if not job.done and job.folder not in wanted:
            for path in job.inputs:
                if path in jobs:
                    want(jobs[path])
            wanted[job.folder] = job

    for job in jobs.values():
        if isinstance(job, Cell):
            want(job)
    return list(wanted.values())


def _require_data(jobs: Sequence[Job]) -> None:
    made = {job.folder for job in jobs if isinstance(job, DemonstrationsJob)}
    for job in jobs:
        if isinstance(job, DemonstrationsJob) and job.done:
            job.require_wanted()
        if isinstance(job, Cell) and job.config.dataset not in made and not job.config.dataset.exists():
            raise ConfigError(
                f'{job.config.dataset} does not exist; make it with `decoupled-policy demos --task '
                f'{" ".join(job.tasks)} --out {job.config.dataset}`, or state `demonstrations: 200` for this task in '
                'the study'
            )


def _work(jobs: Sequence[Job], out: Path, failed: MutableSequence[int]) -> None:
    """Take jobs until none is left that could be done; `failed` says of each whether any process failed at it."""
    torch.set_num_threads(1)
    place = {job.folder: number for number, job in enumerate(jobs)}
    (out / 'locks').mkdir(parents=True, exist_ok=True)
    while waiting := [number for number, job in enumerate(jobs) if not job.done and not failed[number]]:
        for number in waiting:
            job = jobs[number]
            inputs = [place[path] for path in job.inputs if path in place]
            if any(failed[earlier] for earlier in inputs):
                failed[number] = True
                break
            if not all(jobs[earlier].done for earlier in inputs):
                continue
            try:
                with FileLock(out / 'locks' / f'{job.folder.name}.lock', timeout=0):
                    if not job.done and not failed[number]:
                        failed[number] = not _do(job, len(jobs), jobs)
                break  # from the first one again: what it made may be what an earlier one waits for
            except Timeout:
                continue  # another process is at it
        else:
            time.sleep(WAIT_S)


def _work_until_interrupted(jobs: Sequence[Job], out: Path, failed: MutableSequence[int]) -> None:
    """As `_work`, in a process of its own: Ctrl-C goes to all of them, and the first one answers for it."""
    with suppress(KeyboardInterrupt):
        _work(jobs, out, failed)


def _do(job: Job, total: int, jobs: Sequence[Job]) -> bool:
    """Run one job, with what it prints in its log; False if it failed."""
    place = (
        job.folder if not isinstance(job, DemonstrationsJob) else job.folder.parent / f'.{job.folder.name}'
    )
    place.mkdir(parents=True, exist_ok=True)
    (place / ERROR).unlink(missing_ok=True)
    try:
        with (place / LOG).open('a') as log, redirect_stdout(log), redirect_stderr(log):
            result = job.run()
    except Exception as error:
        # One run must not end the others, whatever befell it; it is tried again when the study is started anew.
        (place / ERROR).write_text(traceback.format_exc())
        known = isinstance(error, DecoupledPolicyError | OSError)
        _say(f'failed: {job.folder.name}: {error if known else f"see {place / ERROR}"}')
        return False
    done = sum(other.done for other in jobs)
    _say(f'{done}/{total} {job.folder.name}: {result}')
    return True


def _say(line: str) -> None:
    Console(file=sys.__stdout__, width=1000).print(line, highlight=False, markup=False)
