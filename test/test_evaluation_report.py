"""What an evaluation leaves: tables, plots, films, and a folder that is whole or not there."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from decoupled_policy_ros.cli import main
from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.files import whole_folder
from decoupled_policy_ros.sim.tasks import TASKS
from decoupled_policy_ros.training.evaluation import summary, wilson_interval
from decoupled_policy_ros.training.evaluation_report import (
    VIDEOS,
    loss_plot,
    success_plot,
    success_table,
    write_report,
)

PNG = b'\x89PNG'


def a_report(policy: str, task: str, steps: list[int], robot: str = 'panda_sim') -> dict:
    """As of `evaluate`: an episode for each number of steps, a success below 100."""
    results = [{'seed': seed, 'success': n < 100, 'steps': n} for seed, n in enumerate(steps)]
    successes = [r['steps'] for r in results if r['success']]
    return {
        'policy': policy, 'task': task, 'robot': robot, 'checkpoint': 'last', 'denoising_steps': 10,
        'instruction': None, 'task_sha256': '1' * 64, 'backbone_sha256': '2' * 64, 'episodes': len(steps),
        'seed': 0, 'successes': len(successes), 'success_rate': len(successes) / len(steps),
        'wilson_95': wilson_interval(len(successes), len(steps)), 'torn_chunks': 0.25, 'results': results,
        'mean_steps_of_successes': sum(successes) / len(successes) if successes else None,
    }  # fmt: skip


@pytest.fixture
def reports(tmp_path, monkeypatch):
    """Two training seeds in two tasks, their folders with a run.json in one of them."""
    monkeypatch.chdir(tmp_path)
    for name in ('a|<b>/seed_0', 'a|<b>/seed_42'):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / 'task.json').write_text('{}')
    (tmp_path / 'a|<b>' / 'seed_0' / 'run.json').write_text(json.dumps({'losses': [1.0, 0.5, 0.2]}))
    return [
        a_report('a|<b>/seed_0', 'stack', [80, 60, 100, 100]),
        a_report('a|<b>/seed_42', 'stack', [90, 60, 70, 100]),
        a_report('a|<b>/seed_0', 'square', [100, 100, 100, 100]),
        a_report('a|<b>/seed_42', 'square', [100, 50, 100, 100]),
    ]


def cells(table: str) -> list[list[str]]:
    """Cells of a Markdown table without its rule."""
    lines = table.strip().splitlines()
    assert set(lines[1]) <= set('| -')
    return [[c.strip() for c in re.split(r'(?<!\\)\|', line)[1:-1]] for line in [lines[0], *lines[2:]]]


def test_the_table_has_a_line_for_each_policy_and_task(reports):
    head, first, *_, last = cells(success_table(reports))
    assert len(head) == len(first) == len(last) == 8
    row = dict(zip(head, first, strict=True))
    assert (row['task'], row['policy'], row['successes'], row['rate']) == (
        'stack', r'a\|<b>/seed_0', '2 of 4', '50 %',
    )  # fmt: skip
    low, high = wilson_interval(2, 4)
    assert row['95 % interval'] == f'{100 * low:.0f} to {100 * high:.0f} %'
    assert (row['steps of successes'], row['torn chunks']) == ('70', '25.0 %')
    assert cells(success_table(reports))[3][6] == '-'  # square, without a success


def test_the_table_of_a_summary_has_mean_and_deviation(reports):
    head, stack, square = cells(success_table(summary(reports)))
    assert head[-1] == 'mean ± deviation of the policies'
    assert stack[-1] == '62.5 ± 17.7 %' and stack[3] == '5 of 8'
    assert square[0] == 'square'
    assert len(cells(success_table(summary(reports[:1])))[0]) == 6  # a single policy has no deviation


@pytest.mark.parametrize('count', [1, 4])
def test_plots_are_drawn_of_reports_and_of_summaries(reports, tmp_path, count):
    for index, rows in enumerate((reports[:count], summary(reports[:count]))):
        success_plot(rows, tmp_path / f'{index}.png')
        assert (tmp_path / f'{index}.png').read_bytes().startswith(PNG)
    assert loss_plot(reports[:count], tmp_path / 'loss.png')
    assert not loss_plot(reports[1:2], tmp_path / 'none.png')
    assert not (tmp_path / 'none.png').exists()


def test_the_page_is_one_file_with_films_beside_it(reports, tmp_path):
    reports[1]['films'] = [{'seed': 0, 'file': 'one.mp4'}, {'seed': 3, 'file': 'two.mp4'}]
    write_report({'reports': reports, 'summary': summary(reports)}, tmp_path)
    page = (tmp_path / 'report.html').read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert re.findall(r'<figure class="(\w+)"><video [^>]*src="([^"]*)"', page) == [
        ('success', f'{VIDEOS}/one.mp4'),
        ('failure', f'{VIDEOS}/two.mp4'),
    ]
    assert 'a|&lt;b&gt;/seed_42' in page and '<b>/' not in page and 'http' not in page
    document = (tmp_path / 'report.md').read_text()
    assert success_table(reports) in document and success_table(summary(reports)) in document
    assert f'[seed 3: failure after 100 steps]({VIDEOS}/two.mp4)' in document
    for picture in re.findall(r'!\[.*\]\((.*)\)', document):
        assert (tmp_path / picture).read_bytes().startswith(PNG)
    assert json.loads((tmp_path / 'report.json').read_text())['reports'][0]['successes'] == 2


def fill(path: Path, content: Callable[[Path], object]) -> None:
    with whole_folder(path) as folder:
        content(folder)


def test_a_folder_is_whole_or_not_there(tmp_path):
    def fail(folder: Path) -> None:
        (folder / 'file').write_text('half')
        raise KeyError

    def write(folder: Path) -> None:
        (folder / 'file').write_text('whole')
        assert not out.exists()

    def race(folder: Path) -> None:
        (tmp_path / 'b').mkdir()
        (tmp_path / 'b' / 'theirs').touch()

    out = tmp_path / 'a' / 'report'
    with pytest.raises(KeyError):
        fill(out, fail)
    assert list(out.parent.iterdir()) == []
    fill(out, write)
    assert (out / 'file').read_text() == 'whole'
    assert out.stat().st_mode == out.parent.stat().st_mode
    with pytest.raises(ConfigError, match='exists already'):
        fill(out, write)
    with pytest.raises(ConfigError, match='meanwhile'):
        fill(tmp_path / 'b', race)
    assert [p.name for p in (tmp_path / 'b').iterdir()] == ['theirs']


def evaluate(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, 'argv', ['decoupled-policy', 'evaluate', *map(str, arguments)])
    main()


@pytest.mark.sim
def test_evaluate_leaves_a_report_with_films(small_policy_folders, tmp_path, monkeypatch, capsys):
    backbone, task = small_policy_folders
    out = tmp_path / 'report'
    common = ['--policy', task, '--task', 'lift', '--backbone', backbone, '--report', out]
    monkeypatch.setattr('decoupled_policy_ros.sim.tasks.TASKS', {'lift': short_lift()})
    evaluate(monkeypatch, *common, '--episodes', 2, '--films', 1, '--workers', 1, '--denoising-steps', 1)
    assert 'report.html' in capsys.readouterr().out
    names = {str(p.relative_to(out)) for p in out.rglob('*') if p.is_file()}
    assert names == {
        'report.html',
        'report.md',
        'report.json',
        'success.png',
        'steps.png',
        'videos/000-0.mp4',
    }
    report = json.loads((out / 'report.json').read_text())['reports'][0]
    assert [r['steps'] for r in report['results']] == [6, 6]
    assert report['task_sha256'] == json.loads((task / 'task.json').read_text())['sha256']
    with pytest.raises(SystemExit) as error:
        evaluate(monkeypatch, *common)
    assert error.value.code == 2 and 'exists already' in capsys.readouterr().err


def short_lift():
    """Six steps of Lift."""
    return dataclasses.replace(TASKS['lift'], max_steps=6)
