"""Prepared data on disk: Parquet shards with fixed-shape tensors, and a manifest that vouches for every byte.

A folder of prepared data holds `<split>-00000-of-00002.parquet` files (column `data`: float32 tensors in data units;
column `label`: int64, -1 for none), `moments.safetensors` (of the train split, model space) and `manifest.json`:

    {"schema_version": 1, "name", "kind", "event_shape", "range", "row_form", "num_classes", "class_names",
     "splits": {"train": {"rows", "files": [{"name", "rows", "sha256"}]}, "heldout": ...},
     "moments": {"name", "sha256"}}

`row_form` says what a row is, a sample when it is left out; posteriors of latents have twice the channels.
Encoded images (`jobs.prepare_data data=images`) lie in `.arrow` files of the same columns and a third, `key`, with
`dtype` float16 or float32; they have no moments (null), but an entry `autoencoder`. They are mapped into memory, not
read (`open_split`). Any Arrow reader understands the shards. Whatever is damaged is refused with one line that
names the file.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mfm_ray.data.datasets import Dataset, Split
from mfm_ray.data.latents import check_row_form, mean_and_std, row_shape
from mfm_ray.data.mapped import ARROW, DTYPES, MappedRows, arrow_schema, local_shard, map_shard, read_arrow
from mfm_ray.data.moments import Moments, data_moments
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MOMENTS = "moments.safetensors"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_]+-\d{5}-of-\d{5}\.(parquet|arrow)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardFile:
    name: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of prepared data says about itself; `files` by split, in row order."""

    name: str
    space: DataSpace
    class_names: tuple[str, ...]
    files: Mapping[str, tuple[ShardFile, ...]]
    moments_sha256: str | None
    """None for encoded images, which come without moments."""
    sha256: str
    """Hash of manifest.json, and so of everything it vouches for: two data sets are the same when it is."""
    row_form: str = "sample"
    """What a row is, see `Dataset`."""
    dtype: str = "float32"
    """Of the stored numbers; what is read is float32."""
    autoencoder: Mapping[str, Any] | None = None
    """Of encoded images: source, fingerprint, image_size."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a stored row: that of a sample, with twice the channels where rows are posteriors."""
        return row_shape(self.space.event_shape, self.row_form)

    def rows(self, split: str) -> int:
        """Number of rows of a split; InputError naming the splits there are."""
        if split not in self.files:
            raise InputError(f"split={split}: {self.name} has {', '.join(self.files)}")
        return sum(file.rows for file in self.files[split])

    def description(self) -> dict[str, Any]:
        """The `data` entry of a model's config.json."""
        names = list(self.class_names)
        described = {"name": self.name, **self.space.config(), "num_classes": self.num_classes, "class_names": names}
        return described if self.autoencoder is None else {**described, "autoencoder": dict(self.autoencoder)}


def write_shards(target: str | Path | Storage, dataset: Dataset, *, rows_per_file: int = 8_192) -> Manifest:
    """Writes a data set in place of an older one at `target`; until it is complete the older one stays.

    InputError, before anything is written, for NaN, infinities, values out of the data's range, negative standard
    deviations and wrong labels (naming split and row), and for a target that holds something other than prepared data.
    """
    storage = Storage(target)
    check_row_form(dataset.row_form, dataset.space)
    for name, split in dataset.splits.items():
        _check_values(split, dataset.space, dataset.row_form, dataset.num_classes, where=f"{dataset.name} {name}")
        if len(split) == 0:
            raise InputError(f"{dataset.name} {name} has no rows")
    if storage.exists() and not storage.exists(MANIFEST) and (not storage.is_dir() or storage.listdir()):
        raise InputError(f"output={storage} holds something other than prepared data, it is left as it is")
    moments, shape = _moments(dataset), row_shape(dataset.space.event_shape, dataset.row_form)
    with storage.replace_dir(marker=MANIFEST) as folder:
        local = Storage(folder)
        splits = {
            name: _write_split(local, name, split, shape, rows_per_file) for name, split in dataset.splits.items()
        }
        local.write_json(MANIFEST, _manifest(dataset, splits, _write_moments(local, moments)))
    return read_manifest(storage)


def read_manifest(source: str | Path | Storage) -> Manifest:
    """The manifest, checked for itself and against the names of the files that lie beside it."""
    storage = Storage(source)
    if not storage.exists():
        raise InputError(f"data.path={storage} does not exist, expected a folder written by jobs.prepare_data")
    if not storage.is_file(MANIFEST):
        raise InputError(f"{storage.uri_of(MANIFEST)} is missing: not a folder written by jobs.prepare_data")
    raw, content = storage.read_json(MANIFEST), storage.read_bytes(MANIFEST)
    where = storage.uri_of(MANIFEST)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(f"{where} has schema_version {version}, expected {SCHEMA_VERSION}: prepare the data again")
    try:
        manifest = _parse_manifest(raw, hashlib.sha256(content).hexdigest())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{where} is not a valid manifest: {reason}") from error
    _check_file_names(storage, manifest)
    return manifest


def load_split(source: str | Path | Storage, split: str) -> Split:
    """All rows of a split in shard order, every file checked against its hash, schema and values."""
    storage = Storage(source)
    manifest = read_manifest(storage)
    manifest.rows(split)
    parts = [_read_shard(storage, file, manifest) for file in manifest.files[split]]
    return Split(torch.cat([part.data for part in parts]), torch.cat([part.labels for part in parts]))


@dataclass(frozen=True)
class OpenSplit:
    """A split for random reading. data: rows (N, *row), a tensor or mapped into memory. labels: as in `Split`."""

    data: Tensor | MappedRows
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def open_split(source: str | Path | Storage, split: str) -> OpenSplit:
    """A split to take rows from: Parquet shards are read and checked whole, Arrow shards mapped.

    Of mapped shards schema and numbers of rows are checked, not the hashes: `verify_shards` reads every byte. Shards
    that are not on this machine are copied to its cache first, and their hashes checked there.
    """
    storage = Storage(source)
    manifest = read_manifest(storage)
    manifest.rows(split)
    files = manifest.files[split]
    if not all(file.name.endswith(ARROW) for file in files):
        loaded = load_split(storage, split)
        return OpenSplit(loaded.data, loaded.labels)
    parts = []
    for file in files:
        table = map_shard(local_shard(storage, file.name, file.sha256, cache=manifest.sha256))
        _check_table(table, file, manifest, storage.uri_of(file.name))
        parts.append(table)
    labels = torch.cat([torch.tensor(part["label"].to_numpy()) for part in parts])
    return OpenSplit(MappedRows([part["data"] for part in parts]), labels)


def load_moments(source: str | Path | Storage) -> Moments | None:
    """Moments of the train split in model space, None where the data has none (encoded images)."""
    storage = Storage(source)
    manifest = read_manifest(storage)
    if manifest.moments_sha256 is None:
        return None
    content = _read_hashed(storage, MOMENTS, manifest.moments_sha256)
    try:
        tensors = safetensors.torch.load(content)
        moments = Moments(tensors["mean"], tensors["eigenvalues"], tensors["eigenvectors"])
    except (safetensors.SafetensorError, KeyError) as error:
        raise InputError(f"{storage.uri_of(MOMENTS)} is damaged: {error}") from error
    size = int(np.prod(manifest.space.event_shape))
    if moments.mean.shape != (size,) or moments.eigenvectors.shape != (size, size):
        raise InputError(f"{storage.uri_of(MOMENTS)} is not of data with event_shape={manifest.space.event_shape}")
    return moments


def verify_shards(source: str | Path | Storage) -> Manifest:
    """Reads and checks everything; the manifest when all is well, else an InputError naming the first bad file."""
    manifest = read_manifest(source)
    for files in manifest.files.values():
        for file in files:
            _read_shard(Storage(source), file, manifest)
    load_moments(source)
    return manifest


def _moments(dataset: Dataset) -> Moments:
    """Of the train split in model space; those of posteriors are the moments of what is drawn from them."""
    rows, space = dataset.splits["train"].data.double(), dataset.space
    if dataset.row_form == "sample":
        return data_moments(space.to_model_space(rows.flatten(1)))
    mean, std = mean_and_std(rows, dataset.row_form)
    variances = (std.flatten(1) / space.data_units_per_model_unit).square().mean(0)
    return data_moments(space.to_model_space(mean.flatten(1)), noise_variances=variances)


def _write_split(
    storage: Storage, name: str, split: Split, shape: tuple[int, ...], rows_per_file: int
) -> list[dict[str, Any]]:
    count = -(-len(split) // rows_per_file)
    files = []
    for index in range(count):
        rows = slice(index * rows_per_file, (index + 1) * rows_per_file)
        file_name = f"{name}-{index:05d}-of-{count:05d}.parquet"
        sink = pa.BufferOutputStream()
        table = _table(split.data[rows], split.labels[rows], shape)
        pq.write_table(table, sink, compression="zstd")
        content = sink.getvalue().to_pybytes()
        storage.write_bytes(file_name, content)
        digest = hashlib.sha256(content).hexdigest()
        files.append({"name": file_name, "rows": table.num_rows, "sha256": digest})
    return files


def _schema(shape: tuple[int, ...]) -> pa.Schema:
    return pa.schema(
        [
            pa.field("data", pa.fixed_shape_tensor(pa.float32(), shape), nullable=False),
            pa.field("label", pa.int64(), nullable=False),
        ]
    )


def _table(data: Tensor, labels: Tensor, shape: tuple[int, ...]) -> pa.Table:
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(data.numpy(), dtype=np.float32))
    return pa.Table.from_arrays([tensors, pa.array(labels.numpy(), pa.int64())], schema=_schema(shape))


def _write_moments(storage: Storage, moments: Moments) -> str:
    tensors = {"mean": moments.mean, "eigenvalues": moments.eigenvalues, "eigenvectors": moments.eigenvectors}
    content = safetensors.torch.save(tensors)
    storage.write_bytes(MOMENTS, content)
    return hashlib.sha256(content).hexdigest()


def _manifest(dataset: Dataset, splits: Mapping[str, list[dict[str, Any]]], moments_sha256: str) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "name": dataset.name,
        **dataset.space.config(),
        **({"row_form": dataset.row_form} if dataset.row_form != "sample" else {}),
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "splits": {
            name: {"rows": sum(file["rows"] for file in files), "files": files} for name, files in splits.items()
        },
        "moments": {"name": MOMENTS, "sha256": moments_sha256},
    }


def _parse_manifest(raw: Mapping[str, Any], digest: str) -> Manifest:
    files = {
        split: tuple(
            ShardFile(name=str(file["name"]), rows=int(file["rows"]), sha256=str(file["sha256"]))
            for file in entry["files"]
        )
        for split, entry in raw["splits"].items()
    }
    for split, shards in files.items():
        for file in shards:
            if not _SHARD_NAME.fullmatch(file.name) or not _SHA256.fullmatch(file.sha256) or file.rows < 1:
                raise ValueError(f"{file.name!r} of {split} has a wrong name, hash or number of rows")
        total = raw["splits"][split]["rows"]
        if sum(file.rows for file in shards) != total or total < 1:
            raise ValueError(f"{split} says {total} rows, its files {sum(file.rows for file in shards)}")
    if "train" not in files:
        raise ValueError("no train split")
    class_names = tuple(str(name) for name in raw["class_names"])
    if raw["num_classes"] != len(class_names):
        raise ValueError(f"num_classes={raw['num_classes']} but {len(class_names)} class_names")
    space, row_form = DataSpace.from_config(raw), str(raw.get("row_form", "sample"))
    check_row_form(row_form, space)
    return Manifest(
        name=str(raw["name"]),
        space=space,
        class_names=class_names,
        files=files,
        moments_sha256=None if raw["moments"] is None else str(raw["moments"]["sha256"]),
        sha256=digest,
        row_form=row_form,
        dtype=_checked_dtype(raw),
        autoencoder=_checked_autoencoder(raw),
    )


def _checked_dtype(raw: Mapping[str, Any]) -> str:
    dtype = str(raw.get("dtype", "float32"))
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}, expected {' or '.join(DTYPES)}")
    return dtype


def _checked_autoencoder(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    entry = raw.get("autoencoder")
    if entry is None:
        return None
    return {name: kind(entry[name]) for name, kind in {"source": str, "fingerprint": str, "image_size": int}.items()}


def _check_file_names(storage: Storage, manifest: Manifest) -> None:
    """Every shard is there, and no shard is there that the manifest does not know (other readers would take it)."""
    known = {file.name for shards in manifest.files.values() for file in shards}
    present = set(storage.listdir())
    needed = known if manifest.moments_sha256 is None else {*known, MOMENTS}
    for name in sorted(needed - present):
        raise InputError(f"{storage.uri_of(name)} is missing, {MANIFEST} names it")
    for name in sorted(name for name in present - known if name.endswith((".parquet", ARROW))):
        raise InputError(f"{storage.uri_of(name)} is a foreign file, {MANIFEST} does not name it")


def _read_hashed(storage: Storage, name: str, sha256: str) -> bytes:
    content = storage.read_bytes(name)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(f"{storage.uri_of(name)} was altered: its SHA-256 is not the one in {MANIFEST}")
    return content


def _read_shard(storage: Storage, file: ShardFile, manifest: Manifest) -> Split:
    where = storage.uri_of(file.name)
    content = _read_hashed(storage, file.name, file.sha256)
    is_arrow = file.name.endswith(ARROW)
    try:
        table = read_arrow(content) if is_arrow else pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        kind = "an Arrow" if is_arrow else "a Parquet"
        raise InputError(f"{where} is not {kind} file: {str(error).splitlines()[0]}") from error
    _check_table(table, file, manifest, where)
    data = table["data"].combine_chunks().to_numpy_ndarray()
    split = Split(torch.tensor(data, dtype=torch.float32), torch.tensor(table["label"].to_numpy()))
    _check_values(split, manifest.space, manifest.row_form, manifest.num_classes, where=where)
    return split


def _check_table(table: pa.Table, file: ShardFile, manifest: Manifest, where: str) -> None:
    is_arrow = file.name.endswith(ARROW)
    expected = arrow_schema(manifest.row_shape, manifest.dtype) if is_arrow else _schema(manifest.row_shape)
    if table.schema.names != expected.names or table.schema.types != expected.types:
        raise InputError(f"{where} has columns {_columns(table.schema)}, expected {_columns(expected)}")
    if table.num_rows != file.rows or any(column.null_count for column in table.columns):
        raise InputError(f"{where} has {table.num_rows} rows (or empty cells), {MANIFEST} says {file.rows}")


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _check_values(split: Split, space: DataSpace, row_form: str, num_classes: int, *, where: str) -> None:
    data, labels = split.data, split.labels
    shape = row_shape(space.event_shape, row_form)
    if data.shape[1:] != shape or labels.shape != data.shape[:1]:
        shapes = f"{list(data.shape)} with labels {list(labels.shape)}"
        raise InputError(f"{where}: data of shape {shapes}, expected (rows, {shape}) and (rows,)")
    flat = data.flatten(1)
    if (row := _first(~flat.isfinite().all(dim=1))) is not None:
        raise InputError(f"{where} row {row}: NaN or infinity in the data")
    if space.data_range is not None:
        low, high = space.data_range
        if (row := _first(((flat < low) | (flat > high)).any(dim=1))) is not None:
            raise InputError(f"{where} row {row}: pixel outside [{low:g}, {high:g}]")
    if row_form == "mean_std":
        _, std = mean_and_std(data, row_form)
        if (row := _first((std.flatten(1) < 0).any(dim=1))) is not None:
            raise InputError(f"{where} row {row}: negative standard deviation (a log-variance?)")
    if (row := _first((labels < -1) | (labels >= num_classes))) is not None:
        raise InputError(f"{where} row {row}: label {int(labels[row])}, expected -1 to {num_classes - 1}")


def _first(wrong: Tensor) -> int | None:
    """Index of the first True, None when there is none."""
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None
