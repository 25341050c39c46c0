"""Recordings to a dataset: `decoupled-policy convert`.

    .<out>.converting/            beside <out>, until everything is done
        settings.json             what the parts were made with; another command is refused
        bags/<name>-<key>/        a finished recording: bag.json and its encoded episodes; taken up by the next run
        dataset/                  the dataset, once every recording is there; renamed to <out> at the very end

A run that was interrupted, killed or out of disk is resumed by the same command.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from decoupled_policy_ros.data.conversion.bag import PROGRESS_FILE, RESULT_FILE, BagTask, convert_bag
from decoupled_policy_ros.data.conversion.plan import ConvertSettings, Plan, PlannedBag, make_plan
from decoupled_policy_ros.data.conversion.report import (
    FOLDER,
    conversion_report,
    failure_lines,
    notes,
    report_table,
    write_report,
)
from decoupled_policy_ros.data.datasets.episode import EncodedEpisode
from decoupled_policy_ros.data.datasets.writer import DatasetWriter
from decoupled_policy_ros.data.parallel import run_tasks
from decoupled_policy_ros.errors import ConfigError, DatasetError
from decoupled_policy_ros.files import sync_folder, write_json
from decoupled_policy_ros.robot.description import robot_file

_SETTINGS_FILE = 'settings.json'
#: As text, because a failure comes from another process.
_DISK_FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]


def convert(
    bags: Sequence[str | Path],
    out: str | Path,
    settings: ConvertSettings,
    workers: int | None = None,
    ray: str | None = None,
    skip_bad: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Convert recordings into a dataset at `out`, and return the report.

    Args:
        bags: rosbag2 folders, single .mcap or .db3 files, or folders of recordings.
        out: folder of the dataset; must not exist.
        settings: how.
        workers: processes; None for one per core.
        ray: address of a Ray cluster, instead of processes of this machine.
        skip_bad: leave out recordings that can't be converted; a disk that takes no more is no fault of theirs.
        console: where progress and report go; None for nowhere.

    Raises:
        DatasetError: `out` exists, a recording can't be converted, no frame is left, or the disk is full or gone.
        ConfigError, FingerprintMismatch, RobotDescriptionError: see `make_plan`; also an unreachable cluster.
    """
    out = Path(out)
    if out.exists():
        raise DatasetError(f'{out} exists already; choose a folder that does not, or remove it')
    workers = workers if workers is not None else len(os.sched_getaffinity(0))
    if workers < 1:
        raise ConfigError(f'workers must be at least 1, got {workers}')
    if not bags:
        raise ConfigError('no recording is given')
    import_module('matplotlib')  # before the work, in case that it or PyAV is not installed
    if settings.images != 'png' and settings.cameras != ():
        import_module('av')
    plan = make_plan(bags, settings, skip_bad)
    console = console or Console(quiet=True)
    with _Work(out, plan) as work:
        failures = work.run(workers, ray, console)
        if failures and not skip_bad:
            raise DatasetError(work.failure_text(failures))
        report = work.assemble(failures)
    console.print(report_table(report))
    for line in notes(report):
        console.print(f'[yellow]note:[/] {escape(line)}', highlight=False, soft_wrap=True)
    return report


class _Work:
    """The folder beside `out` in which the dataset grows; a context manager that holds its lock.

    Raises:
        DatasetError: another process works in it, or it was begun with other settings.
    """

    def __init__(self, out: Path, plan: Plan):
        self.out, self.plan = out, plan
        self.folder = out.resolve().with_name(f'.{out.resolve().name}.converting')
        self.records: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> _Work:
        try:
            (self.folder / 'bags').mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise DatasetError(f'{self.folder} can not be made: {error.strerror}') from error
        try:
            self._take_lock()
            self._require_same_settings()
            for part in self.folder.glob('bags/*.part-*'):
                shutil.rmtree(part, ignore_errors=True)
            for bag in self.plan.bags:
                record = None if bag.problem is not None else self._finished(bag)
                if record is not None:
                    self.records[bag.key] = record
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for part in self.folder.glob('bags/*.part-*'):
                shutil.rmtree(part, ignore_errors=True)
            if self.folder.exists() and not any((self.folder / 'bags').iterdir()):
                shutil.rmtree(self.folder)  # there is nothing to resume
        finally:
            os.close(self._lock)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DatasetError(f'{self.out} is being converted by another process already') from error

    def _require_same_settings(self) -> None:
        path, mine = self.folder / _SETTINGS_FILE, self.plan.identity()
        if path.exists():
            theirs = json.loads(path.read_text())
            differing = _differences(theirs, mine)
            if differing:
                raise DatasetError(
                    f'{self.folder} holds a conversion that was begun otherwise: {"; ".join(differing)}. Give the '
                    f'same options to resume it, or remove that folder'
                )
        write_json(path, mine)

    def _part(self, bag: PlannedBag) -> Path:
        return self.folder / 'bags' / bag.key

    def _finished(self, bag: PlannedBag) -> dict[str, Any] | None:
        """The record of a recording that an earlier run has finished."""
        part = self._part(bag)
        if not part.exists():
            return None
        try:
            record = json.loads((part / RESULT_FILE).read_text())
            for piece in record['pieces']:
                EncodedEpisode.load(part / piece['folder'])
        except (OSError, ValueError, KeyError, DatasetError):
            shutil.rmtree(part)  # damaged since: made anew
            return None
        return record

    # --- recordings -------------------------------------------------------------------------------

    def run(self, workers: int, ray: str | None, console: Console) -> dict[str, str]:
        """Convert what is not finished yet; returns the recordings that failed, with the reason.

        Raises:
            DatasetError: the disk failed, and not a recording.
        """
        plan = self.plan
        failures = {str(bag.path): bag.problem for bag in plan.bags if bag.problem is not None}
        for reason in failures.values():
            self._require_disk(reason)
        waiting = [bag for bag in plan.bags if bag.problem is None and bag.key not in self.records]
        if self.records:
            console.print(
                f'taking up {len(self.records)} of {len(plan.bags)} recordings, which an earlier run has finished'
            )
        if not waiting:
            return failures
        tasks = [self._task(bag) for bag in waiting]
        with (
            _Bar(self, waiting, console) as bar,
            closing(run_tasks(convert_bag, tasks, workers, ray, bar.tick)) as results,
        ):
            for result in results:
                bag = waiting[result.index]
                if result.error is None:
                    self.records[bag.key] = result.value
                else:
                    self._require_disk(result.error)
                    failures[str(bag.path)] = result.error
                    bar.say(f'{bag.path} can not be converted; the reason follows at the end')
                bar.tick()
        return failures

    def _task(self, bag: PlannedBag) -> BagTask:
        settings = self.plan.settings
        # A worker may be in another folder, and on a machine that has the shipped robots somewhere else.
        is_path = Path(settings.robot).suffix in ('.yaml', '.yml')
        return BagTask(
            bag.path.resolve(),
            self._part(bag),
            str(robot_file(settings.robot)) if is_path else settings.robot,
            bag.robot_xml,
            self.plan.contract,
            self.plan.spec,
            settings.on_gap,
            settings.min_frames,
            settings.max_command_age_s,
            settings.trim_idle,
            settings.namespace,
        )

    def _require_disk(self, reason: str) -> None:
        """Raise a failure that is the disk's: it would take the recordings that come after with it."""
        # What can't be written begins with its path, and that is in here; a disk for temporary files may be full too.
        if reason.startswith(str(self.folder)) or any(words in reason for words in _DISK_FULL):
            raise DatasetError(reason + self._kept_text())

    def failure_text(self, failures: dict[str, str]) -> str:
        """One message for all failures, and how to go on."""
        how = '; with --skip-bad it leaves the others out' if self.records else ''
        return '\n'.join(failure_lines(failures)) + self._kept_text() + how

    def _kept_text(self) -> str:
        if not self.records:
            return ''
        return f'\n{len(self.records)} finished recordings are kept in {self.folder} for the same command to resume'

    # --- dataset ----------------------------------------------------------------------------------

    def assemble(self, failures: dict[str, str]) -> dict[str, Any]:
        """Lay the episodes one after the other, add the report, and give the dataset its name."""
        plan, dataset = self.plan, self.folder / 'dataset'
        bags = [bag for bag in plan.bags if bag.key in self.records]
        for bag in plan.bags:
            if bag.key not in self.records and str(bag.path) not in failures:
                raise DatasetError(f'{bag.path} is neither converted nor refused{self._kept_text()}')
        records = [self.records[bag.key] for bag in bags]
        report = conversion_report(plan, records, failures)
        if not report['totals']['frames']:
            shutil.rmtree(self.folder)
            raise DatasetError(_no_frames_text(report))
        for leftover in (dataset, *self.folder.glob('.dataset.*')):
            shutil.rmtree(leftover, ignore_errors=True)
        provenance = {'converted_from': [str(bag.path) for bag in bags]}
        try:
            with DatasetWriter(dataset, plan.spec, provenance) as writer:
                for bag, record in zip(bags, records, strict=True):
                    for piece in record['pieces']:
                        encoded = EncodedEpisode.load(self._part(bag) / piece['folder'])
                        writer.add(encoded, bag.instruction, bag.success)
            write_report(dataset / FOLDER, report)
            if self.out.exists():
                raise DatasetError(f'{self.out} came into being meanwhile; the dataset is left at {dataset}')
            os.rename(dataset, self.out)
            sync_folder(self.out.resolve().parent)
        except OSError as error:
            shutil.rmtree(dataset, ignore_errors=True)
            raise DatasetError(
                f'{dataset} can not be written: {error}; the parts are kept for the same command to resume'
            ) from error
        shutil.rmtree(self.folder)
        return report


class _Bar:
    """Progress over seconds of recording: finished ones, and what the workers say of theirs."""

    def __init__(self, work: _Work, waiting: list[PlannedBag], console: Console):
        self._work = work
        self._finished_s = sum(record['bag_s'] for record in work.records.values())
        total_s = self._finished_s + sum(bag.summary.duration_s for bag in waiting)
        self._progress = Progress(
            TextColumn('converting'),
            BarColumn(),
            TextColumn('{task.percentage:>3.0f} %'),
            TimeRemainingColumn(),
            TextColumn('{task.fields[note]}'),
            console=console,
            disable=console.quiet,
        )
        self._task = self._progress.add_task('', total=max(total_s, 1e-9), note='')
        self._begun = time.monotonic()

    def tick(self) -> None:
        """Look at what has been done, and show it."""
        records = self._work.records
        bag_s, frames = (sum(record[key] for record in records.values()) for key in ('bag_s', 'frames'))
        for path in self._work.folder.glob(f'bags/*.part-*/{PROGRESS_FILE}'):
            try:
                done = json.loads(path.read_text())
            except (OSError, ValueError):  # gone by now, or being written
                continue
            bag_s, frames = bag_s + done['bag_s'], frames + done['frames']
        rate = (bag_s - self._finished_s) / max(time.monotonic() - self._begun, 1e-9)
        total = len(self._work.plan.bags)
        note = f'{len(records)}/{total} recordings, {frames} frames, {rate:.1f} s of recording per s'
        self._progress.update(self._task, completed=bag_s, note=note)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(f'[red]{escape(text)}[/]', highlight=False, soft_wrap=True)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.stop()


def _differences(theirs: Any, mine: Any, where: str = '') -> list[str]:
    """Paths at which two JSON-able values differ, with both values."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        return [
            line
            for key in sorted({*theirs, *mine})
            for line in _differences(theirs.get(key), mine.get(key), f'{where}.{key}' if where else key)
        ]
    if theirs == json.loads(json.dumps(mine)):
        return []
    return [f'{where} was {json.dumps(theirs)}, is now {json.dumps(mine)}']


def _no_frames_text(report: dict[str, Any]) -> str:
    reasons = ', '.join(f'{reason}: {frames}' for reason, frames in report['totals']['cut'].items() if frames)
    failed = ''.join(f'\n{line}' for line in failure_lines(report['failed']))
    details = [gap['detail'] for record in report['bags'] for gap in record['gaps']][:3]
    return (
        f'not one frame of {report["totals"]["bags"]} recordings can be used; cut: {reasons or "nothing"}'
        f'{"; " + "; ".join(details) if details else ""}{failed}'
    )
