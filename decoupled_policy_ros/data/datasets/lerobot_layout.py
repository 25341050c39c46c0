"""The LeRobot v3 layout on disk: names, schemas and statistics, without the lerobot package.

    <root>/meta/info.json                                features, rate, counts, path templates
    <root>/meta/stats.json                               statistics of the whole dataset
    <root>/meta/tasks.parquet                            instruction -> task_index
    <root>/meta/episodes/chunk-000/file-000.parquet      one row per episode
    <root>/data/chunk-000/file-000.parquet               one row per frame, a row group per episode, or several
    <root>/videos/<key>/chunk-000/file-000.mp4           where images are kept as video, episode after episode

Otherwise images are PNG bytes in a column of type struct<bytes, path>.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.observation.image import fit_image

VERSION = 'v3.0'
CHUNK_FILES = 1000  # files in a folder
DATA_FILE_MB = 100
VIDEO_FILE_MB = 200
DATA_PATH = 'data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet'
VIDEO_PATH = 'videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4'
EPISODES_PATH = 'meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet'
TASKS_PATH = 'meta/tasks.parquet'
INFO_PATH = 'meta/info.json'
STATS_PATH = 'meta/stats.json'
IMAGE_PREFIX = 'observation.images.'
OWN_BLOCK = 'decoupled_policy'  # in info.json: what LeRobot has no place for

INDEX_FEATURES: dict[str, dict[str, Any]] = {
    'timestamp': {'dtype': 'float32', 'shape': [1], 'names': None},
    'frame_index': {'dtype': 'int64', 'shape': [1], 'names': None},
    'episode_index': {'dtype': 'int64', 'shape': [1], 'names': None},
    'index': {'dtype': 'int64', 'shape': [1], 'names': None},
    'task_index': {'dtype': 'int64', 'shape': [1], 'names': None},
}

#: What reading needs of info.json and of meta/episodes.
_INFO_KINDS: dict[str, type | tuple[type, ...]] = {
    'total_frames': int, 'fps': (int, float), 'data_path': str, 'features': dict
}  # fmt: skip
_EPISODE_COLUMNS = ('episode_index', 'length', 'dataset_to_index', 'data/chunk_index', 'data/file_index')

_IMAGE_TYPE = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
# For pictures this is both the fastest and, of those that take less than five times as long, the smallest.
_PNG_OPTIONS = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]


def require_info(info: Any, root: Path) -> None:
    """Refuse the content of an info.json of another layout, or in which something is missing or of another kind.

    Raises:
        DatasetError: which, and what it is.
    """
    if not isinstance(info, dict):
        raise DatasetError(f'{root}: info.json must be an object, got {type(info).__name__}')
    version = str(info.get('codebase_version'))
    if not version.startswith('v3.'):  # whose other files may lie elsewhere
        raise DatasetError(f'{root} has layout {version}; this package reads {VERSION}')
    values = dict(info)
    wanted = dict(_INFO_KINDS)
    features = info.get('features')
    for name, feature in features.items() if isinstance(features, dict) else ():
        values |= {f'features.{name}.{key}': value for key, value in _items(feature)}
        wanted |= {f'features.{name}.dtype': str, f'features.{name}.shape': list}
        if values.get(f'features.{name}.dtype') == 'video':
            wanted['video_path'] = str
    if OWN_BLOCK in info:
        wanted[OWN_BLOCK] = dict
    for name, kind in wanted.items():
        if not isinstance(values.get(name), kind):
            found = repr(values[name]) if name in values else 'missing'
            raise DatasetError(f'{root}: info.json is damaged: {name} is {found}')


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def require_episode_columns(there: Sequence[str], root: Path) -> None:
    """Refuse a meta/episodes without a column that reading needs.

    Raises:
        DatasetError: which.
    """
    missing = [name for name in _EPISODE_COLUMNS if name not in there]
    if missing:
        raise DatasetError(f'{root}: meta/episodes lacks the columns {", ".join(missing)}')


def next_place(place: tuple[int, int]) -> tuple[int, int]:
    """Chunk index and file index of the file after the one at `place`."""
    chunk, file = place
    return (chunk, file + 1) if file + 1 < CHUNK_FILES else (chunk + 1, 0)


def vector_feature(dim: int, names: list[str] | None = None) -> dict[str, Any]:
    """Feature entry of a float32 vector (dim,)."""
    return {'dtype': 'float32', 'shape': [dim], 'names': names}


def image_feature(height: int, width: int, dtype: str = 'image') -> dict[str, Any]:
    """Feature entry of a colour image (height, width, 3), stored as PNG ('image') or in a video ('video')."""
    return {'dtype': dtype, 'shape': [height, width, 3], 'names': ['height', 'width', 'channels']}


def arrow_schema(features: dict[str, dict[str, Any]]) -> pa.Schema:
    """Schema of the data files: fixed-size lists for vectors, scalars for shape [1], structs for images.

    Videos have no column there.
    """
    fields = []
    for name, feature in features.items():
        if feature['dtype'] == 'video':
            continue
        if feature['dtype'] == 'image':
            fields.append(pa.field(name, _IMAGE_TYPE))
            continue
        scalar = pa.from_numpy_dtype(np.dtype(feature['dtype']))
        (dim,) = feature['shape']
        fields.append(pa.field(name, scalar if dim == 1 else pa.list_(scalar, dim)))
    return pa.schema(fields)


def arrow_vector(array: NDArray[Any], kind: pa.DataType) -> pa.Array:
    """An Arrow array of `kind` (scalar or fixed-size list) from rows (T,) or (T, dim)."""
    if pa.types.is_fixed_size_list(kind):
        flat = pa.array(np.ascontiguousarray(array).reshape(-1), kind.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)
    return pa.array(np.ascontiguousarray(array).reshape(-1), kind)


def arrow_images(pngs: Sequence[bytes], first: int) -> pa.Array:
    """Structs of PNG files, the first of which is frame `first` of its episode."""
    return pa.array(
        [{'bytes': png, 'path': f'frame-{i:06d}.png'} for i, png in enumerate(pngs, first)], _IMAGE_TYPE
    )


def encode_png(rgb: NDArray[np.uint8]) -> bytes:
    """A PNG file from an RGB image (H, W, 3)."""
    done, png = cv2.imencode('.png', cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), _PNG_OPTIONS)
    if not done:
        raise DatasetError(f'an image of shape {rgb.shape} and type {rgb.dtype} could not be encoded as PNG')
    return png.tobytes()


def image_size(feature: dict[str, Any], name: str) -> tuple[int, int]:
    """Height and width of an image feature, whose shape other writers also give as (3, H, W).

    Raises:
        DatasetError: the shape is neither.
    """
    shape = tuple(int(n) for n in feature['shape'])
    if len(shape) == 3 and shape[2] == 3:
        return shape[0], shape[1]
    if len(shape) == 3 and shape[0] == 3:
        return shape[1], shape[2]
    raise DatasetError(
        f'{name} has the shape {shape}; colour images are (height, width, 3) or (3, height, width)'
    )


def decode_images(
    column: pa.ChunkedArray,
    out: NDArray[np.uint8],
    stored: tuple[int, int],
    pool: ThreadPoolExecutor,
    name: str,
    first: int = 0,
) -> None:
    """Decode the image structs of `column` into `out` (T, H, W, 3), RGB, with all threads of `pool`.

    Images are resized to the size of `out` as they come; `first` is the number of the first in messages.

    Raises:
        DatasetError: an image is missing, can't be decoded, or has another size than `stored`.
    """
    done = 0
    for chunk in column.chunks:
        data = chunk.field('bytes')
        # Spans rather than single images: a task per image costs more than decoding a small one.
        spans = [range(i, min(i + 64, len(data))) for i in range(0, len(data), 64)]

        def decode(span: range, data: pa.Array = data, done: int = done) -> None:
            for i in span:
                _decode_image(data[i].as_buffer(), out[done + i], stored, f'{name}, row {first + done + i}')

        for _ in pool.map(decode, spans):
            pass
        done += len(data)


def _decode_image(
    buffer: pa.Buffer | None, out: NDArray[np.uint8], stored: tuple[int, int], where: str
) -> None:
    if buffer is None or len(buffer) == 0:
        raise DatasetError(f'{where}: the image is empty; it should hold the bytes of a PNG or JPEG file')
    bgr = cv2.imdecode(np.frombuffer(buffer, np.uint8), cv2.IMREAD_COLOR)
    if bgr is None:
        raise DatasetError(f'{where}: {len(buffer)} bytes that are no readable image')
    if bgr.shape[:2] != stored:
        raise DatasetError(f'{where}: the image is {bgr.shape[:2]}, but info.json declares {stored}')
    if bgr.shape == out.shape:
        cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB, dst=out)
    else:
        out[:] = fit_image(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), (out.shape[0], out.shape[1]))


def vector_column(column: pa.ChunkedArray, feature: dict[str, Any], name: str) -> NDArray[Any]:
    """Rows (T, ...) of a data column whose feature is not an image; LeRobot's own indices are (T,).

    Raises:
        DatasetError: the column holds nulls or rows of other lengths than declared.
    """
    values = column
    while pa.types.is_nested(values.type):
        values = pa.chunked_array([chunk.flatten() for chunk in values.chunks], values.type.value_type)
    dim = int(np.prod(feature['shape']))
    if column.null_count or values.null_count or len(values) != len(column) * dim:
        raise DatasetError(f'column {name}: rows are missing values; every row must hold {dim}')
    return values.to_numpy().reshape(len(column), *(() if name in INDEX_FEATURES else feature['shape']))


def tasks_table(tasks: list[str]) -> pa.Table:
    """The table of meta/tasks.parquet: pandas readers must see `task` as the index, hence the metadata."""
    table = pa.table(
        {'task_index': pa.array(range(len(tasks)), pa.int64()), 'task': pa.array(tasks, pa.string())}
    )
    columns = [
        {'name': 'task_index', 'field_name': 'task_index', 'pandas_type': 'int64', 'numpy_type': 'int64'},
        {'name': 'task', 'field_name': 'task', 'pandas_type': 'unicode', 'numpy_type': 'object'},
    ]
    names = {'name': None, 'field_name': None, 'pandas_type': 'unicode', 'numpy_type': 'object'}
    pandas = {
        'index_columns': ['task'],
        'column_indexes': [{**names, 'metadata': {'encoding': 'UTF-8'}}],
        'columns': [{**column, 'metadata': None} for column in columns],
        'creator': {'library': 'pyarrow', 'version': pa.__version__},
        'pandas_version': '2.0.0',
    }
    return table.replace_schema_metadata({'pandas': json.dumps(pandas)})


def episodes_schema(row: dict[str, Any]) -> pa.Schema:
    """Schema of meta/episodes, by one of its rows; `success` is a bool column even if nobody said."""
    where = {'meta/episodes/chunk_index': 0, 'meta/episodes/file_index': 0}
    return pa.Table.from_pylist([row | {'success': True} | where]).schema


def task_names(table: pa.Table) -> list[str]:
    """Instructions in the order of their task_index; older writers left the index column unnamed."""
    name = next((n for n in ('task', '__index_level_0__') if n in table.column_names), None)
    if name is None or 'task_index' not in table.column_names:
        raise DatasetError(f'{TASKS_PATH} has columns {table.column_names}; it needs task and task_index')
    pairs = zip(table['task_index'].to_pylist(), table[name].to_pylist(), strict=True)
    return [task for _, task in sorted(pairs)]
