"""Motion files: an Arrow IPC stream, one motion long.

    stamp_ns          int64             time of the joint state
    joint_positions   float32 (8,)      arm joints in rad, then the gripper in [-1 open, +1 closed]
    action            float32 (10,)     pose_base_ee by forward kinematics, and the same gripper value

The schema's metadata say whose kinematics these are; the metadata of each batch say what its writer knew
by then (a summary, e.g. the residual against a measured pose). The file grows as `*.arrow.part`, each batch
in the hands of the operating system as soon as it is written, so that a writer that is killed loses no more
than the batch it was filling; `recover` saves the rest, and deletes nothing but such a torn batch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from decoupled_policy_ros.data.datasets.lerobot_layout import OWN_BLOCK, arrow_vector
from decoupled_policy_ros.errors import DatasetError, FingerprintMismatch
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.poses import ACTION_DIM

SUFFIX = '.arrow'
PART_SUFFIX = '.arrow.part'

DAMAGED_SUFFIX = '.damaged'

_MESSAGE_BEGIN = (
    b'\xff\xff\xff\xff'  # then the length of what describes the message, which has its body's length
)
_END_OF_STREAM = _MESSAGE_BEGIN + b'\x00\x00\x00\x00'


class MotionWriter:
    """Writes one motion file; it appears at `path` on `close`, until then it is `<path>.part`.

    Args:
        path: ends in .arrow; neither it nor its part may exist.
        fingerprint: whose kinematics; rate_hz AS_RECORDED_HZ for samples as they came.
        flush_s: longest time that an appended sample waits in memory for the next append.

    Raises:
        DatasetError: the file exists, or can't be made.
    """

    def __init__(self, path: str | Path, fingerprint: Fingerprint, flush_s: float = 0.25):
        self.path = Path(path)
        if self.path.suffix != SUFFIX or self.path.exists():
            raise DatasetError(f'{self.path}: a motion file ends in {SUFFIX} and must not exist yet')
        self.n_samples = 0
        self._part = self.path.with_name(self.path.name + '.part')
        self._schema = _schema(fingerprint)
        self._flush_s = flush_s
        self._waiting: list[tuple[NDArray[Any], ...]] = []
        self._summary: dict[str, Any] = {}
        self._flushed_at = time.monotonic()
        try:
            self._file = open(self._part, 'xb')  # noqa: SIM115 - closed by close and abort
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells `recover` that we are alive
            self._stream = pa.ipc.new_stream(self._file, self._schema)
            self._file.flush()
        except OSError as error:
            raise DatasetError(f'{self._part} can not be written: {error}') from error

    def append(self, stamps_ns: ArrayLike, joint_positions: ArrayLike, actions: ArrayLike) -> None:
        """Append samples: stamps (T,), joints with gripper (T, n + 1), actions (T, 10).

        Raises:
            DatasetError: the disk is full or gone; what was written before stays readable.
        """
        stamps = np.asarray(stamps_ns, np.int64)
        arrays = stamps, np.asarray(joint_positions, np.float32), np.asarray(actions, np.float32)
        if any(len(array) != len(stamps) for array in arrays):
            raise DatasetError(f'{self.path}: arrays of different lengths {[len(array) for array in arrays]}')
        self._waiting.append(arrays)
        self.n_samples += len(stamps)
        if time.monotonic() - self._flushed_at >= self._flush_s:
            self.flush()

    def summarise(self, **values: Any) -> None:
        """Set JSON values that the next batch carries; a reader sees those of the last batch."""
        self._summary |= values

    def flush(self) -> None:
        """Hand what waits in memory to the operating system as one batch."""
        self._flushed_at = time.monotonic()
        if self._waiting:
            self._write_batch([np.concatenate(arrays) for arrays in zip(*self._waiting, strict=True)])
            self._waiting.clear()

    def _write_batch(self, columns: list[NDArray[Any]]) -> None:
        arrays = [arrow_vector(c, f.type) for c, f in zip(columns, self._schema, strict=True)]
        batch = pa.record_batch(arrays, schema=self._schema)
        try:
            self._stream.write_batch(batch, custom_metadata={'summary': json.dumps(self._summary)})
            self._file.flush()
        except OSError as error:
            raise DatasetError(f'{self._part} can not be written: {error}') from error

    def close(self) -> Path:
        """Finish the file and give it its final name; returns the path."""
        self.flush()
        self._write_batch([np.empty(0) for _ in self._schema])  # carries the last summary
        try:
            self._stream.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            os.rename(self._part, self.path)
        except OSError as error:
            raise DatasetError(f'{self._part} can not be finished: {error}') from error
        finally:
            self.abandon()
        return self.path

    def abandon(self) -> None:
        """Close the file and leave it as it is, for `recover`."""
        with contextlib.suppress(OSError):  # of what a full disk didn't take before
            self._file.close()

    def abort(self) -> None:
        """Remove what was written."""
        self.abandon()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> MotionWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @staticmethod
    def recover(folder: str | Path) -> list[Recovery]:
        """Save what writers that were killed left in `folder`, see `recover`."""
        return recover(folder)


@dataclass(frozen=True)
class Recovery:
    """What became of one partial file.

    `path` is None where nothing could be read. `damaged` is where the file's bytes are kept, if more than its last
    batch is missing; None where it was deleted.
    """

    part: Path
    path: Path | None
    n_samples: int
    lost_bytes: int
    damaged: Path | None = None

    def __str__(self) -> str:
        saved = f'{self.n_samples} samples in {self.path.name}' if self.path else 'nothing'
        if self.damaged is None:
            return f'saved {saved}, lost the last {self.lost_bytes} bytes'
        return f'it is damaged: saved {saved}, and kept it as {self.damaged.name}'


def recover(folder: str | Path) -> list[Recovery]:
    """Turn each `*.arrow.part` that no living writer holds into a motion file of its complete batches.

    One that is damaged, rather than torn in its last batch, is kept beside it as `*.arrow.part.damaged`.

    Raises:
        DatasetError: a recovered motion can't be written.
    """
    return [
        done for part in sorted(Path(folder).glob(f'*{PART_SUFFIX}')) if (done := _recover(part)) is not None
    ]


def _recover(part: Path) -> Recovery | None:
    with open(part, 'rb') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None  # its writer lives
        content = file.read()
        schema, batches, used_bytes = _complete_batches(content)
        is_ours = schema is not None and _fingerprint(schema) is not None
        n_samples = sum(batch.num_rows for batch, _ in batches) if is_ours else 0
        path = damaged = None
        if schema is not None and n_samples:
            path = _free_path(part.with_name(part.name.removesuffix('.part')))
            _rewrite(path, schema, batches)
        if (is_ours or schema is None) and _is_torn(content[used_bytes:]):
            part.unlink()
        else:  # there may be whole batches behind the damage
            damaged = _keep(part)
    return Recovery(part, path, n_samples, len(content) - used_bytes, damaged)


def _keep(part: Path) -> Path:
    """Give a damaged file a name by which it is not recovered again; returns its path."""
    names = (part.with_name(f'{part.name}{DAMAGED_SUFFIX}{i or ""}') for i in range(1_000_000))
    kept = next(path for path in names if not path.exists())
    try:
        return part.rename(kept)
    except OSError as error:
        raise DatasetError(f'{part} can not be kept as {kept.name}: {error.strerror or error}') from error


def _is_torn(rest: bytes) -> bool:
    """Whether what follows the complete batches is one message whose end is missing, or nothing, and not damage."""
    if len(rest) < len(_END_OF_STREAM) or rest == _END_OF_STREAM:
        return rest[:4] == _MESSAGE_BEGIN[: len(rest)]
    if rest[:4] != _MESSAGE_BEGIN or any(rest[i : i + 4] == _MESSAGE_BEGIN for i in range(8, len(rest), 8)):
        return False
    try:
        pa.ipc.read_message(rest)
    except (pa.ArrowException, OSError) as error:
        return str(error).startswith('Expected to')  # what pyarrow says of a message that is cut short
    return False


Batches = list[tuple[pa.RecordBatch, dict[str, Any]]]


def _complete_batches(content: bytes) -> tuple[pa.Schema | None, Batches, int]:
    """Schema, batches with their summaries, and the number of bytes that these take up."""
    source = pa.BufferReader(content)
    batches: Batches = []
    used = 0
    try:
        reader = pa.ipc.open_stream(source)
        used = source.tell()
        while True:
            batch, metadata = reader.read_next_batch_with_custom_metadata()
            batch.validate()
            summary = json.loads((metadata or {}).get(b'summary', b'{}'))
            if not isinstance(summary, dict):
                raise ValueError('a summary that is no object')
            batches.append((batch, summary))
            used = source.tell()
    except (
        StopIteration,
        ValueError,
        OSError,
        pa.ArrowException,
    ):  # a cut or damaged message raises any of them
        return (reader.schema if used else None), batches, used


def _rewrite(path: Path, schema: pa.Schema, batches: Batches) -> None:
    temporary = path.with_name(path.name + '.recovering')
    try:
        with open(temporary, 'wb') as file:
            with pa.ipc.new_stream(file, schema) as stream:
                for batch, summary in batches:
                    metadata = {'summary': json.dumps(summary | {'recovered': True})}
                    stream.write_batch(batch, custom_metadata=metadata)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DatasetError(f'{path} can not be written: {error}') from error


def _free_path(path: Path) -> Path:
    taken = (path.with_name(f'{path.stem}_recovered{i or ""}{SUFFIX}') for i in range(1_000_000))
    return path if not path.exists() else next(p for p in taken if not p.exists())


def _schema(fingerprint: Fingerprint) -> pa.Schema:
    fields = [
        ('stamp_ns', pa.int64()),
        ('joint_positions', pa.list_(pa.float32(), len(fingerprint.joint_names) + 1)),
        ('action', pa.list_(pa.float32(), ACTION_DIM)),
    ]
    return pa.schema(fields, metadata={OWN_BLOCK: json.dumps({'fingerprint': fingerprint.to_dict()})})


def _fingerprint(schema: pa.Schema) -> Fingerprint | None:
    """Whose kinematics a file is about; None where its schema is not ours, or damaged."""
    try:
        fingerprint = Fingerprint.from_dict(
            json.loads((schema.metadata or {})[OWN_BLOCK.encode()])['fingerprint']
        )
        return fingerprint if schema.equals(_schema(fingerprint)) else None
    except (KeyError, TypeError, ValueError, FingerprintMismatch):
        return None


def read_stream(path: Path) -> tuple[Fingerprint, pa.Table, dict[str, Any]]:
    """Fingerprint, samples and last summary of one finished motion file.

    Raises:
        DatasetError: it can't be read, is no motion file, or is cut short.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f'{path} can not be read: {error}') from error
    schema, batches, used_bytes = _complete_batches(content)
    fingerprint = None if schema is None else _fingerprint(schema)
    if fingerprint is None:
        raise DatasetError(f'{path} is no motion file: {len(content)} bytes without our Arrow schema')
    if content[used_bytes:] != _END_OF_STREAM:
        raise DatasetError(
            f'{path} is cut short after {used_bytes} bytes; MotionWriter.recover saves partial files'
        )
    table = pa.Table.from_batches([batch for batch, _ in batches], schema)
    return fingerprint, table, batches[-1][1] if batches else {}
