"""Where images to be encoded lie: folders, Parquet files, webdataset tars; all read through `Storage`, local or URI.

`index_images` lists every image once, in an order that depends on the source alone, with its label. `ImageReader`
reads the bytes of listed ones. What is damaged on the way is listed too, with its reason in `problem`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from mfm_ray.data.pixels import DamagedImage
from mfm_ray.errors import InputError, StorageError
from mfm_ray.storage import Storage

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "bytes", "image_bytes", "content")
_LABEL_COLUMNS = ("label", "labels", "cls", "class", "class_name", "fine_label")
_INDEX = pa.schema(
    {"key": pa.string(), "file": pa.string(), "at": pa.int64(), "size": pa.int64()}
    | {"label": pa.int64(), "problem": pa.string()}
)


@dataclass(frozen=True)
class ImageIndex:
    """Every image of a source. images: a table with key (its name in the source), file, at and size (where its bytes
    are), label (-1 for none), problem (null, or why it cannot be read). column: of the images in Parquet files."""

    kind: str
    images: pa.Table
    class_names: tuple[str, ...]
    column: str | None = None

    def __len__(self) -> int:
        return self.images.num_rows

    def sha256(self) -> str:
        """Of keys, places, sizes and labels: the same when the source holds the same images."""
        digest = hashlib.sha256(json.dumps([self.kind, self.class_names]).encode())
        for column in self.images.select(["key", "file", "at", "size", "label"]).to_pydict().values():
            digest.update(json.dumps(column).encode())
        return digest.hexdigest()


def kind_of(source: Storage, asked: str = "auto") -> str:
    """What a source is, by the names in it. InputError for one that is missing, empty or holds two kinds."""
    if not source.exists():
        raise InputError(f"source={source} does not exist, expected a folder of images, Parquet files or tars")
    if not source.is_dir():
        raise InputError(f"source={source} is not a folder, expected one with images, Parquet files or tars")
    names = source.listdir()
    if not names:
        raise InputError(f"source={source} is empty, expected images, Parquet files or tars")
    if asked != "auto":
        return asked
    has = {"parquet": any(name.endswith(".parquet") for name in names), "webdataset": bool(_tars(names))}
    found = [kind for kind, there in has.items() if there]
    if len(found) > 1:
        raise InputError(f"source={source} holds {' and '.join(found)} files; say which by source_kind=")
    return found[0] if found else "folder"


def index_images(
    source: Storage,
    *,
    kind: str = "auto",
    labels: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageIndex:
    """All images of a source, in the order of their names.

    labels: a CSV file with columns file_name (as in `key`) and label, which then are the only labels.
    InputError for a source without images, of mixed form, or with labels that cannot be used.
    """
    kind = kind_of(source, kind)
    for name, value in {"image_column": image_column, "label_column": label_column}.items():
        if value is not None and kind != "parquet":
            raise InputError(f"{name}={value}: the source is of kind {kind}, expected null")
    column, names = None, None
    if kind == "folder":
        rows = _index_folder(source, labelled=labels is None)
    elif kind == "webdataset":
        rows = _index_tars(source)
    else:
        column, names, rows = _index_parquet(source, image_column, label_column)
    if not rows:
        raise InputError(f"source={source} holds no images of kind {kind}")
    if labels is not None:
        _relabel(rows, labels)
        names = None
    class_names = _number_labels(rows, names, source, are_words=kind == "folder" and labels is None)
    return ImageIndex(kind, pa.Table.from_pylist(rows, schema=_INDEX), class_names, column)


class ImageReader:
    """Bytes of listed images. Keeps the file that it reads open, and a row group of Parquet in memory."""

    def __init__(self, source: Storage, kind: str, column: str | None) -> None:
        self._source, self._kind, self._column = source, kind, column
        self._name: str | None = None
        self._file: Any = None
        self._group: tuple[int, int, Any] = (0, 0, None)

    def read(self, entry: Mapping[str, Any]) -> bytes:
        """`DamagedImage` where there is nothing to read."""
        if entry["problem"] is not None:
            raise DamagedImage(entry["problem"])
        try:
            if self._kind == "folder":
                return self._source.read_bytes(entry["file"])
            self._open(entry["file"])
            content = self._row(entry["at"]) if self._kind == "parquet" else self._slice(entry["at"], entry["size"])
        except FileNotFoundError as error:
            raise DamagedImage("missing: it was there when the source was listed") from error
        except (pa.ArrowException, OSError) as error:
            raise DamagedImage(f"cannot be read: {_first_line(error)}") from error
        if content is None:
            raise DamagedImage("no bytes in its row")
        return content

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._name, self._file, self._group = None, None, (0, 0, None)

    def _open(self, name: str) -> None:
        if name != self._name:
            self.close()
            stream = self._source.open_for_parts(name)
            self._file = pq.ParquetFile(stream) if self._kind == "parquet" else stream
            self._name = name

    def _slice(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        content = self._file.read(size)
        if len(content) < size:
            raise DamagedImage(f"truncated: {len(content)} of {size} bytes")
        return content

    def _row(self, row: int) -> bytes | None:
        first, end, cells = self._group
        if not first <= row < end:
            end = 0
            for group in range(self._file.num_row_groups):
                first, end = end, end + self._file.metadata.row_group(group).num_rows
                if row < end:
                    cells = self._file.read_row_group(group, columns=[self._column])[self._column]
                    self._group = (first, end, cells)
                    break
        value = cells[row - first].as_py()
        return value.get("bytes") if isinstance(value, dict) else value


def _entry(
    key: str, file: str, *, at: int = 0, size: int = 0, label: Any = None, problem: str | None = None
) -> dict[str, Any]:
    return {"key": key, "file": file, "at": at, "size": size, "label": label, "problem": problem}


def _index_folder(source: Storage, *, labelled: bool) -> list[dict[str, Any]]:
    found = source.filesystem.get_file_info(fs.FileSelector(source.path, recursive=True))
    prefix = len(source.path.rstrip("/")) + 1
    entries = sorted(((info.path[prefix:], info) for info in found), key=lambda pair: pair[0])
    shown = [(name, info) for name, info in entries if not any(part.startswith(".") for part in name.split("/"))]
    images = [(n, i) for n, i in shown if i.type == fs.FileType.File and n.lower().endswith(IMAGE_ENDINGS)]
    classes = {name.partition("/")[0] for name, _ in images if "/" in name} if labelled else set()
    if classes:
        if (flat := next((name for name, _ in images if "/" not in name), None)) is not None:
            raise InputError(f"source={source} holds both class folders and images such as {flat}; expected one form")
        for name, info in shown:
            if info.type == fs.FileType.Directory and "/" not in name and name not in classes:
                raise InputError(f"source={source}: the class folder {name} holds no images; fill it or take it away")
    return [_entry(n, n, size=i.size, label=n.partition("/")[0] if classes else None) for n, i in images]


def _tars(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".tar")]


def _index_tars(source: Storage) -> list[dict[str, Any]]:
    return [row for name in _tars(source.listdir()) for row in _index_tar(source, name)]


def _index_tar(source: Storage, name: str) -> Iterator[dict[str, Any]]:
    """Images of a tar in its order; a sample is the neighbours that share their name up to the first dot."""
    stem: tuple[PurePosixPath, str] | None = None
    images: list[dict[str, Any]] = []
    label = problem = None
    try:
        with source.open_for_parts(name) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                base, _, ending = path.name.partition(".")
                if not member.isfile():
                    continue
                if (path.parent, base) != stem:
                    yield from ({**image, "label": label} for image in images)
                    stem, images, label = (path.parent, base), [], None
                if f".{ending.lower()}" in IMAGE_ENDINGS:
                    images.append(_entry(f"{name}/{member.name}", name, at=member.offset_data, size=member.size))
                elif ending in ("cls", "json"):
                    content = archive.extractfile(member)
                    label = _label_of(content.read() if content else b"", ending, label)
    except (tarfile.TarError, OSError, pa.ArrowException, StorageError) as error:
        problem = f"the rest of the tar cannot be read: {_first_line(error)}"
    yield from ({**image, "label": label} for image in images)
    if problem is not None:
        yield _entry(f"{name}/", name, problem=problem)


def _label_of(content: bytes, ending: str, before: Any) -> Any:
    """What a `.cls` or `.json` file says; a file that says nothing leaves what another said."""
    text = content.decode(errors="replace").strip()
    if ending == "cls":
        return text or before
    try:
        found = json.loads(text)
    except ValueError:
        return before
    if isinstance(found, dict):
        found = next((found[name] for name in _LABEL_COLUMNS if name in found), None)
    return before if before is not None or isinstance(found, list | dict | float | bool) else found


def _index_parquet(
    source: Storage, image: str | None, label: str | None
) -> tuple[str | None, list[str] | None, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    names = None
    for file in (name for name in source.listdir() if name.endswith(".parquet")):
        try:
            with source.open_for_parts(file) as stream:
                parquet = pq.ParquetFile(stream)
                image = _image_column(parquet.schema_arrow, image, f"{source}/{file}")
                column = _label_column(parquet.schema_arrow, label, f"{source}/{file}")
                names = names or _class_label_names(parquet.schema_arrow, column)
                count = parquet.metadata.num_rows
                labels = [None] * count if column is None else parquet.read(columns=[column])[column].to_pylist()
        except (pa.ArrowException, OSError, StorageError) as error:
            rows.append(_entry(file, file, problem=f"the file cannot be read: {_first_line(error)}"))
            continue
        rows += [_entry(f"{file}#{row}", file, at=row, label=value) for row, value in enumerate(labels)]
    return image, names, rows


def _image_column(schema: pa.Schema, asked: str | None, where: str) -> str:
    """The column asked for, else one of a usual name, else the only one that holds bytes."""
    fitting = [field.name for field in schema if _holds_bytes(field.type)]
    if asked is not None:
        if asked not in fitting:
            raise InputError(f"image_column={asked}: {where} has no such column of bytes, but {', '.join(fitting)}")
        return asked
    named = [name for name in _IMAGE_COLUMNS if name in fitting]
    if not named and len(fitting) != 1:
        raise InputError(f"{where} has {len(fitting)} columns of bytes; say which holds images by image_column=")
    return (named or fitting)[0]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _label_column(schema: pa.Schema, asked: str | None, where: str) -> str | None:
    if asked is not None and asked not in schema.names:
        raise InputError(f"label_column={asked}: {where} has no such column, but {', '.join(schema.names)}")
    return asked or next((name for name in _LABEL_COLUMNS if name in schema.names), None)


def _class_label_names(schema: pa.Schema, column: str | None) -> list[str] | None:
    """Class names in the description that Hugging Face's datasets leave in a file."""
    described = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(described)["info"]["features"] if described else {}
        found = features.get(column, {}).get("names")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return [str(name) for name in found] if isinstance(found, list) else None


def _relabel(rows: list[dict[str, Any]], labels: str) -> None:
    place = Storage(labels)
    if not place.exists():
        raise InputError(f"labels={labels} does not exist, expected a CSV file with file_name,label")
    parent = Storage(str(PurePosixPath(place.path).parent), filesystem=place.filesystem)
    reader = csv.DictReader(io.StringIO(parent.read_bytes(place.name).decode(errors="replace")))
    if not {"file_name", "label"} <= set(reader.fieldnames or []):
        raise InputError(f"labels={labels} has columns {reader.fieldnames}, expected file_name and label")
    given = {line["file_name"]: line["label"] for line in reader}
    missing = [row["key"] for row in rows if row["key"] not in given]
    if missing:
        raise InputError(f"labels={labels}: {len(missing)} images are not in it, such as {missing[0]}")
    for row in rows:
        row["label"] = given[row["key"]]


def _number_labels(
    rows: list[dict[str, Any]], names: list[str] | None, source: Storage, *, are_words: bool
) -> tuple[str, ...]:
    """Replaces labels by numbers, -1 for none; the names of the classes. Numbers stay as they are, but for folders'."""
    given = [row["label"] for row in rows if row["label"] is not None]
    numbers = None if are_words and given else _as_numbers(given)
    if numbers is None:
        words = {str(label) for label in given}
        unknown = sorted(words - set(names)) if names else []
        if unknown:
            raise InputError(f"source={source}: the label {unknown[0]!r} is none of its class names")
        names = names or sorted(words)
        code = {name: number for number, name in enumerate(names)}
    else:
        last = max(numbers, default=-1)
        if names is not None and last >= len(names):
            raise InputError(f"source={source}: label {last}, but {len(names)} class names")
        names = names or [str(number) for number in range(last + 1)]
        code = {str(number): number for number in numbers}
    for row in rows:
        row["label"] = -1 if row["label"] is None else code[str(row["label"])]
    return tuple(names)


def _as_numbers(labels: list[Any]) -> list[int] | None:
    """The labels as whole numbers, None where one of them is a word: `n01440764` is, and so is `007`."""
    numbers = []
    for label in labels:
        text = str(label)
        if isinstance(label, bool) or not (text == "-1" or (text.isdecimal() and str(int(text)) == text)):
            return None
        numbers.append(int(text))
    return numbers


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
