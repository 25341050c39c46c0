"""Tasks in processes, some of which are killed: what is lost with them is done again, what kills them fails alone."""

import os
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest

from decoupled_policy_ros.data.parallel import run_tasks


def work(task: tuple[int, Path, int]) -> int:
    """Kills its process as often as it is told to; beyond that returns its number."""
    number, folder, deaths = task
    attempts = folder / str(number)
    with attempts.open('a') as file:
        file.write('.')
    time.sleep(0.2)  # the other process is at work, too
    if attempts.stat().st_size <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize('workers', [1, 2])
def test_only_the_task_that_kills_its_process_again_fails(tmp_path, workers):
    deaths = [0, 0, 9, 0, 0, 0, 0, 1, 0]  # the third always, another once
    tasks = [(number, tmp_path, n) for number, n in enumerate(deaths)]
    results = sorted(run_tasks(work, tasks, workers), key=lambda result: result.index)
    assert [result.index for result in results] == list(range(9))
    assert [result.value for result in results] == [0, 1, None, 3, 4, 5, 6, 7, 8]
    (error,) = [result.error for result in results if result.error is not None]
    assert 'died again when this was done alone' in error
    assert all((tmp_path / str(number)).stat().st_size <= 3 for number in range(9))


def test_whoever_stops_early_does_not_wait_for_the_rest(tmp_path):
    with closing(run_tasks(work, [(number, tmp_path, 0) for number in range(200)], 2)) as results:
        next(results)
    assert len(list(tmp_path.iterdir())) < 20
