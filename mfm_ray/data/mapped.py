"""Arrow shards of rows too many for memory: written one by one, mapped into memory, read row by row.

A shard is an Arrow IPC file with columns `data` (fixed-shape tensors of `dtype`), `label` (int64) and `key` (the row's
name in its source). It is not compressed, so that a row is where its number says, and all workers of a machine share
one copy in its page cache.

float16 is what `jobs.prepare_data` stores unless told otherwise: it halves disk and page cache (ImageNet at 256: 21 GB
instead of 42), and rounds a mean by at most 2^-11 of its size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mfm_ray.errors import InputError
from mfm_ray.storage import Storage

ARROW = ".arrow"
DTYPES = ("float16", "float32")
CACHE = "XDG_CACHE_HOME"


def arrow_schema(shape: tuple[int, ...], dtype: str) -> pa.Schema:
    """Of a shard whose rows have that shape."""
    numbers = pa.float16() if dtype == "float16" else pa.float32()
    return pa.schema(
        [
            pa.field("data", pa.fixed_shape_tensor(numbers, shape), nullable=False),
            pa.field("label", pa.int64(), nullable=False),
            pa.field("key", pa.string(), nullable=False),
        ]
    )


def arrow_bytes(data: np.ndarray, labels: Sequence[int], keys: Sequence[str]) -> bytes:
    """A shard of rows (N, *row) in float16 or float32; the same rows give the same bytes."""
    schema = arrow_schema(data.shape[1:], str(data.dtype))
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(data))
    arrays = [tensors, pa.array(labels, pa.int64()), pa.array(keys, pa.string())]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return sink.getvalue().to_pybytes()


def read_arrow(content: bytes) -> pa.Table:
    """A shard from its bytes."""
    with pa.ipc.open_file(pa.BufferReader(content)) as reader:
        return reader.read_all()


def map_shard(path: Path) -> pa.Table:
    """A shard whose pages are read when they are needed. InputError for a file that is none."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not an Arrow file: {str(error).splitlines()[0]}") from error


def local_shard(storage: Storage, name: str, sha256: str, *, cache: str) -> Path:
    """Where a shard lies on this machine, in a folder of its cache when the storage is elsewhere.

    cache: name of that folder. A copy is written whole or not at all, so that several workers may make it at once.
    """
    if storage.local_path is not None:
        return storage.local_path / name
    home = Storage(Path(os.environ.get(CACHE) or Path.home() / ".cache") / "mfm-ray" / "shards" / cache[:32])
    assert home.local_path is not None
    if not home.is_file(name):
        content = storage.read_bytes(name)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise InputError(f"{storage.uri_of(name)} was altered: its SHA-256 is not the one in its manifest")
        home.write_bytes(name, content)
    return home.local_path / name


class MappedRows:
    """Rows of mapped shards as one array: `rows[index]` are those of an index (N,) as a float32 tensor (N, *row)."""

    def __init__(self, columns: Sequence[Any]) -> None:
        self._parts: list[np.ndarray] = [_array(column) for column in columns]
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.shape = (int(self._ends[-1]), *self._parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        wanted = index.numpy()
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()}: expected 0 to {len(self) - 1}")
        found = np.empty((len(wanted), *self.shape[1:]), dtype=np.float32)
        parts = np.searchsorted(self._ends, wanted, side="right")
        for number in np.unique(parts):
            here = parts == number
            part = self._parts[number]
            found[here] = part[wanted[here] - (self._ends[number] - len(part))]
        return torch.from_numpy(found)


def _array(column: Any) -> np.ndarray:
    """The one chunk of a column of tensors, without a copy."""
    (chunk,) = column.chunks
    return chunk.to_numpy_ndarray()
