"""Where images to be encoded lie: folders, Parquet files, webdataset tars; all read through `Storage`, local or URI.

`index_images` lists every image once, in an order that depends on the source alone, with its label. `ImageReader`
reads the bytes of listed ones. What is damaged on the way is listed too, with its reason in `problem`.

Damage is what is wrong with bytes that were read. Whatever keeps this machine from reading them (a missing mount, an
input/output error) is a `StorageError`: an image left out for that would be a hole that no resumption mends.
"""

from __future__ import annotations

import csv
import fnmatch
import hashlib
import io
import json
import os
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
_NO_IMAGE_ENDINGS = (".cls", ".csv", ".html", ".json", ".jsonl", ".md", ".npy", ".py", ".tsv", ".txt", ".xml", ".yaml")
_IMAGE_HEADS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6")
_HEAD_BYTES = 512
_LOOKED_AT = 8
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


def open_source(source: str) -> tuple[Storage, str | None]:
    """The folder of a source, and the names of the files in it that are meant: null for all.

    source: a folder, one file, or a pattern in the last part of the path, such as `/data/train-*.parquet`.
    """
    place = Storage(source)
    if "*" in place.name or place.is_file(""):
        return Storage(str(PurePosixPath(place.path).parent), filesystem=place.filesystem), place.name
    return place, None


def kind_of(source: Storage, asked: str = "auto", *, only: str | None = None) -> str:
    """What a source is, by the endings of its files, or else by their first bytes.

    only: as `open_source` gives it. InputError for a source that is missing, empty or holds two kinds.
    """
    if not source.exists():
        raise InputError(f"source={source} does not exist, expected a folder of images, Parquet files or tars")
    if not source.is_dir():
        raise InputError(f"source={source} is not a folder, expected one with images, Parquet files or tars")
    names = _names(source, only)
    if not names:
        what = "is empty" if only is None else f"holds no file {only}"
        raise InputError(f"source={source} {what}, expected images, Parquet files or tars")
    kind = asked
    if asked == "auto":
        unclear = [name for name in names if _kind_by_name(name) is None and not _says_no_image(name)][:_LOOKED_AT]
        kinds = {_kind_by_name(name) for name in names} | {_kind_by_content(source, name) for name in unclear}
        found = sorted(kind for kind in kinds if kind in ("parquet", "webdataset"))
        if len(found) > 1:
            raise InputError(f"source={source} holds {' and '.join(found)} files; say which by source_kind=")
        kind = found[0] if found else "folder"
    if kind == "folder" and only is not None:
        raise InputError(f"source={source}/{only}: expected a folder; single files and patterns are Parquet or tars")
    return kind


def _names(source: Storage, only: str | None) -> list[str]:
    return [name for name in source.listdir() if only is None or name == only or fnmatch.fnmatchcase(name, only)]


def _kind_by_name(name: str) -> str | None:
    kinds = {IMAGE_ENDINGS: "folder", (".parquet",): "parquet", (".tar",): "webdataset"}
    return next((kind for endings, kind in kinds.items() if name.lower().endswith(endings)), None)


def _says_no_image(name: str) -> bool:
    return name.startswith(".") or name.lower().endswith(_NO_IMAGE_ENDINGS)


def _kind_by_content(source: Storage, name: str) -> str | None:
    if not source.is_file(name):
        return None
    with source.open_for_parts(name) as stream:
        head = bytes(stream.read(_HEAD_BYTES))
    if head[:4] == b"PAR1":
        return "parquet"
    if head[257:262] == b"ustar":
        return "webdataset"
    is_image = head.startswith(_IMAGE_HEADS) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
    return "folder" if is_image else None


def _files_of_kind(source: Storage, kind: str, only: str | None) -> list[str]:
    """Names that have the kind's ending, and those without a telling one that have its first bytes."""
    names = _names(source, only)
    by_name = {name: _kind_by_name(name) for name in names}
    return [
        name
        for name in names
        if by_name[name] == kind
        or (by_name[name] is None and not _says_no_image(name) and _kind_by_content(source, name) == kind)
    ]


def index_images(
    source: Storage,
    *,
    kind: str = "auto",
    labels: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    only: str | None = None,
) -> ImageIndex:
    """All images of a source, in the order of their names.

    source, only: as `open_source` gives them.
    labels: a CSV file with columns file_name (as in `key`) and label, which then are the only labels.
    InputError for a source without images, of mixed form, or with labels that cannot be used. StorageError where it
    cannot be read.
    """
    kind = kind_of(source, kind, only=only)
    for name, value in {"image_column": image_column, "label_column": label_column}.items():
        if value is not None and kind != "parquet":
            raise InputError(f"{name}={value}: the source is of kind {kind}, expected null")
    column, names = None, None
    if kind == "folder":
        rows = _index_folder(source, labelled=labels is None)
    elif kind == "webdataset":
        rows = [row for name in _files_of_kind(source, kind, only) for row in _index_tar(source, name)]
    else:
        column, names, rows = _index_parquet(source, _files_of_kind(source, kind, only), image_column, label_column)
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
        self._stream: _Watched | None = None
        self._parquet: pq.ParquetFile | None = None
        self._group: tuple[int, int, Any] = (0, 0, None)

    def read(self, entry: Mapping[str, Any]) -> bytes:
        """`DamagedImage` where the source holds no bytes for it, StorageError where this machine cannot read them."""
        if entry["problem"] is not None:
            raise DamagedImage(entry["problem"])
        name = entry["file"]
        try:
            if self._kind == "folder":
                return self._source.read_bytes(name)
            self._open(name)
        except FileNotFoundError as error:
            here = os.uname().nodename
            raise StorageError(f"{self._source.uri_of(name)} was listed, but {here} does not see it") from error
        content = self._row(entry["at"]) if self._kind == "parquet" else self._slice(entry["at"], entry["size"])
        if content is None:
            raise DamagedImage("no bytes in its row")
        return content

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._name, self._stream, self._parquet, self._group = None, None, None, (0, 0, None)

    def _open(self, name: str) -> None:
        if name != self._name:
            self.close()
            self._stream = _Watched(self._source, name)
            self._name = name

    def _slice(self, at: int, size: int) -> bytes:
        assert self._stream is not None
        self._stream.seek(at)
        content = self._stream.read(size)
        if len(content) < size:
            raise DamagedImage(f"truncated: {len(content)} of {size} bytes")
        return content

    def _row(self, row: int) -> bytes | None:
        first, end, cells = self._group
        if not first <= row < end:
            first, end, cells = self._group = self._group_of(row)
        if isinstance(cells, DamagedImage):
            raise DamagedImage(str(cells))
        value = cells[row - first].as_py()
        return value.get("bytes") if isinstance(value, dict) else value

    def _group_of(self, row: int) -> tuple[int, int, Any]:
        """First row, end, and images of the row group that holds a row; instead of the images what is wrong."""
        assert self._stream is not None
        try:
            self._parquet = self._parquet or pq.ParquetFile(self._stream)
            metadata, end = self._parquet.metadata, 0
        except (pa.ArrowException, OSError) as error:
            return row, row + 1, self._stream.damage(error)
        for group in range(metadata.num_row_groups):
            first, end = end, end + metadata.row_group(group).num_rows
            if row < end:
                try:
                    return first, end, self._parquet.read_row_group(group, columns=[self._column])[self._column]
                except (pa.ArrowException, OSError) as error:
                    return first, end, self._stream.damage(error)
        return row, row + 1, DamagedImage("its row is gone")


class _Watched(io.RawIOBase):
    """A file for readers of a format, which tells what is wrong with the file from what is wrong with this machine."""

    def __init__(self, source: Storage, name: str) -> None:
        super().__init__()
        self._stream, self._where = source.open_for_parts(name), source.uri_of(name)
        self._size = self._stream.size()
        self._error: OSError | pa.ArrowException | None = None

    def damage(self, error: BaseException) -> DamagedImage:
        """Of what a reader of the format raised; StorageError where the bytes could not be read, or not held."""
        if isinstance(error, MemoryError):
            raise error
        if self._error is not None:
            raise StorageError(f"cannot read {self._where}: {_first_line(self._error)}") from self._error
        return DamagedImage(f"cannot be read: {_first_line(error)}")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._stream.tell())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As in any file, but not beyond the end, which object stores refuse."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._size}[whence]
        self._stream.seek(min(start + offset, self._size))
        return self.tell()

    def read(self, size: int | None = -1) -> bytes:
        try:
            return bytes(self._stream.read(None if size is None or size < 0 else size))
        except (OSError, pa.ArrowException) as error:
            self._error = error
            raise StorageError(f"cannot read {self._where}: {_first_line(error)}") from error

    def close(self) -> None:
        self._stream.close()
        super().close()


def _entry(
    key: str, file: str, *, at: int = 0, size: int = 0, label: Any = None, problem: str | None = None
) -> dict[str, Any]:
    return {"key": key, "file": file, "at": at, "size": size, "label": label, "problem": problem}


def _index_folder(source: Storage, *, labelled: bool) -> list[dict[str, Any]]:
    try:
        found = source.filesystem.get_file_info(fs.FileSelector(source.path, recursive=True))
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot list {source}: {_first_line(error)}") from error
    prefix = len(source.path.rstrip("/")) + 1
    entries = sorted(((info.path[prefix:], info) for info in found), key=lambda pair: pair[0])
    shown = [(name, info) for name, info in entries if not any(part.startswith(".") for part in name.split("/"))]
    files = [(name, info) for name, info in shown if info.type == fs.FileType.File]
    images = [(name, info) for name, info in files if _is_image(source, name)]
    classes = {name.partition("/")[0] for name, _ in images if "/" in name} if labelled else set()
    if classes:
        if (flat := next((name for name, _ in images if "/" not in name), None)) is not None:
            raise InputError(f"source={source} holds both class folders and images such as {flat}; expected one form")
        for name, info in shown:
            if info.type == fs.FileType.Directory and "/" not in name and name not in classes:
                raise InputError(f"source={source}: the class folder {name} holds no images; fill it or take it away")
    return [_entry(n, n, size=i.size, label=n.partition("/")[0] if classes else None) for n, i in images]


def _is_image(source: Storage, name: str) -> bool:
    """By its ending, whatever it holds; without a telling one by its first bytes."""
    kind = _kind_by_name(name)
    return kind == "folder" or (
        kind is None and not _says_no_image(name) and _kind_by_content(source, name) == "folder"
    )


def _index_tar(source: Storage, name: str) -> Iterator[dict[str, Any]]:
    """Images of a tar in its order; a sample is the neighbours that share their name up to the first dot."""
    stem: tuple[PurePosixPath, str] | None = None
    images: list[dict[str, Any]] = []
    label = problem = None
    try:
        with _Watched(source, name) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
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
    except (tarfile.TarError, EOFError) as error:
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
    source: Storage, files: list[str], image: str | None, label: str | None
) -> tuple[str | None, list[str] | None, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    names = None
    for file in files:
        with _Watched(source, file) as stream:
            try:
                parquet = pq.ParquetFile(stream)
                image = _image_column(parquet.schema_arrow, image, f"{source}/{file}")
                column = _label_column(parquet.schema_arrow, label, f"{source}/{file}")
                names = names or _class_label_names(parquet.schema_arrow, column)
                count = parquet.metadata.num_rows
                labels = [None] * count if column is None else parquet.read(columns=[column])[column].to_pylist()
            except (pa.ArrowException, OSError) as error:
                rows.append(_entry(file, file, problem=f"the file {stream.damage(error)}"))
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
