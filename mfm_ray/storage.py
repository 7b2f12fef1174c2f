"""One place where a run writes, be it a local folder or any URI that pyarrow's filesystems know.

Every write is whole or absent: a file or folder is written under a temporary name beside its target and
renamed when complete, so that a reader never meets half of one, even after a run was killed.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
from pyarrow import fs

from mfm_ray.errors import InputError, StorageError, UnusableStorageError

_TEMPORARY = ".tmp-"
# These rename a folder in one step; elsewhere (object stores) a marker file says what is complete.
_RENAMES_FOLDERS = ("local", "mock", "hdfs")
_PROBE_BYTES = 1 << 16


class Storage:
    """A folder, local or remote. `rel` arguments are paths below it ("a/b"); "" is the folder itself.

    location: a local path (a relative one is resolved against the working directory) or a URI such as
    `file:///data/runs` or `s3://bucket/runs`. With `filesystem`, a path inside that filesystem.

    InputError for a location that cannot be understood; StorageError (one line: what, where, why) when
    the storage refuses; FileNotFoundError for a missing file.
    """

    filesystem: fs.FileSystem
    path: str
    uri: str

    def __init__(self, location: "str | Path | Storage", *, filesystem: fs.FileSystem | None = None) -> None:
        if isinstance(location, Storage):
            self.filesystem, self.path, self.uri = location.filesystem, location.path, location.uri
            return
        text = os.fspath(location)
        if not text.strip():
            raise InputError("storage is empty, expected a path or a URI")
        if filesystem is not None:
            self.filesystem, self.path = filesystem, text.rstrip("/")
            self.uri = f"{filesystem.type_name}:{self.path}"
        elif "://" in text:
            self.filesystem, self.path = _open_uri(text)
            self.uri = text.rstrip("/")
        else:
            self.filesystem, self.path = fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
        if isinstance(self.filesystem, fs.LocalFileSystem):
            self.uri = self.path

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def __str__(self) -> str:
        return self.uri

    @property
    def local_path(self) -> Path | None:
        """The folder as a local path, None when it is not on this machine's filesystem."""
        return Path(self.path) if isinstance(self.filesystem, fs.LocalFileSystem) else None

    @property
    def for_ray(self) -> dict[str, Any]:
        """This folder as the arguments of a RunConfig of Ray Train or Ray Tune."""
        if self.local_path is not None:
            return {"storage_path": str(self.local_path)}
        return {"storage_path": self.path, "storage_filesystem": self.filesystem}

    @property
    def name(self) -> str:
        """Last part of the path."""
        return PurePosixPath(self.path).name

    def child(self, *parts: str) -> "Storage":
        """The folder below this one."""
        rel = "/".join(parts)
        child = Storage(self)
        child.path, child.uri = self._path(rel), self.uri_of(rel)
        return child

    def uri_of(self, rel: str) -> str:
        """Absolute path or URI of something below this folder (a URI's query stays at its end)."""
        base, mark, query = self.uri.partition("?")
        return f"{base}/{_checked(rel)}{mark}{query}" if rel else self.uri

    def exists(self, rel: str = "") -> bool:
        return self._type(rel) != fs.FileType.NotFound

    def is_dir(self, rel: str = "") -> bool:
        return self._type(rel) == fs.FileType.Directory

    def is_file(self, rel: str) -> bool:
        return self._type(rel) == fs.FileType.File

    def listdir(self, rel: str = "") -> list[str]:
        """Sorted names in a folder, without what interrupted writes have left."""
        with self._named("list", rel):
            found = self.filesystem.get_file_info(fs.FileSelector(self._path(rel)))
        return sorted(info.base_name for info in found if _TEMPORARY not in info.base_name)

    def read_bytes(self, rel: str) -> bytes:
        with self._named("read", rel), self.filesystem.open_input_stream(self._path(rel), compression=None) as stream:
            return stream.read()

    def read_json(self, rel: str) -> Any:
        """InputError naming the file when it is not JSON."""
        try:
            return json.loads(self.read_bytes(rel))
        except ValueError as error:
            raise InputError(f"{self.uri_of(rel)} is not valid JSON: {_one_line(error)}") from error

    def write_bytes(self, rel: str, data: bytes) -> None:
        """The whole file or nothing: what stood there before stays until the new content is complete."""
        target = self._path(rel)
        staging = _temporary_sibling(target)
        with self._named("write", rel):
            self.filesystem.create_dir(_parent(target), recursive=True)
            try:
                with self.filesystem.open_output_stream(staging, compression=None) as stream:
                    stream.write(data)
                self.filesystem.move(staging, target)
            except BaseException:
                self._discard(staging)
                raise

    @contextmanager
    def open_new(self, rel: str) -> Iterator[Any]:
        """A stream into a new file, of which half may stay when the block raises: for folders with a marker file."""
        target = self._path(rel)
        with self._named("write", rel):
            self.filesystem.create_dir(_parent(target), recursive=True)
            with self.filesystem.open_output_stream(target, compression=None) as stream:
                yield stream

    def open_for_parts(self, rel: str) -> Any:
        """A file of which any part can be read (pyarrow.NativeFile); the caller closes it."""
        with self._named("read", rel):
            return self.filesystem.open_input_file(self._path(rel))

    def write_json(self, rel: str, value: Any) -> None:
        """Standard JSON: ValueError for NaN and infinities, which have no place in it."""
        self.write_bytes(rel, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def delete(self, rel: str = "") -> None:
        """Removes a file or a whole folder; nothing happens when there is none."""
        kind = self._type(rel)
        with self._named("delete", rel):
            if kind == fs.FileType.Directory:
                self.filesystem.delete_dir(self._path(rel))
            elif kind != fs.FileType.NotFound:
                self.filesystem.delete_file(self._path(rel))

    def upload_dir(self, local_dir: str | Path, rel: str = "", *, marker: str | None = None) -> None:
        """Puts the content of a local folder in place of `rel`.

        Where a folder can be renamed the new one takes the old one's place at the end. On object stores it
        cannot: there the `marker` file (one that readers need first, such as a manifest) is removed at the
        beginning and written last, so that an interrupted upload is never taken for a complete folder.
        """
        if not self._renames_folders:
            self._upload_in_place(local_dir, rel, marker)
            return
        staging = _temporary_sibling(self._path(rel))
        try:
            with self._named("write", rel):
                self._copy_in(local_dir, staging)
            self._swap_in(staging, rel)
        except BaseException:
            self._discard(staging)
            raise

    def download_dir(self, rel: str, local_dir: str | Path) -> Path:
        """Copies a folder to a local one, which is created when missing; returns its path."""
        if not self.is_dir(rel):
            raise FileNotFoundError(f"{self.uri_of(rel)} is not a folder")
        os.makedirs(local_dir, exist_ok=True)
        with self._named("read", rel):
            fs.copy_files(
                self._path(rel),
                os.path.abspath(local_dir),
                self.filesystem,
                fs.LocalFileSystem(),
                use_threads=False,
            )
        return Path(local_dir)

    @contextmanager
    def replace_dir(self, rel: str = "", *, marker: str | None = None) -> Iterator[Path]:
        """A local folder to fill; takes the place of `rel` when the block ends, is dropped when it raises."""
        if self.local_path is None:
            with tempfile.TemporaryDirectory(prefix="mfm-ray-") as scratch:
                yield Path(scratch)
                self.upload_dir(scratch, rel, marker=marker)
            return
        staging = Path(_temporary_sibling(self._path(rel)))
        try:
            with self._named("write", rel):
                staging.mkdir(parents=True)
            yield staging
            self._swap_in(str(staging), rel)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if type(error) is StorageError:  # name the place that the user knows
                raise StorageError(str(error).replace(str(staging), self.uri_of(rel))) from error
            raise

    def check_writable(self) -> None:
        """Creates the folder and writes a small file into it; UnusableStorageError when that fails."""
        probe = f"{_TEMPORARY}{uuid.uuid4().hex}"
        was_there = True
        try:
            was_there = self.exists()
            with self._named("write", ""):
                self.filesystem.create_dir(self.path, recursive=True)
            self.write_bytes(probe, bytes(_PROBE_BYTES))
            self.delete(probe)
        except StorageError as error:
            self._discard(self._path(probe))
            if not was_there and self.is_dir() and not self.listdir():
                self._discard(self.path)
            reason = str(error).removeprefix(f"cannot write {self.uri_of(probe)}: ")
            reason = reason.removeprefix(f"cannot write {self.uri}: ")
            raise UnusableStorageError(f"storage {self.uri} cannot be written: {reason}") from error

    def _path(self, rel: str) -> str:
        return f"{self.path}/{_checked(rel)}" if rel else self.path

    def _type(self, rel: str) -> fs.FileType:
        with self._named("look at", rel):
            return self.filesystem.get_file_info(self._path(rel)).type

    @property
    def _renames_folders(self) -> bool:
        filesystem = self.filesystem
        while isinstance(filesystem, fs.SubTreeFileSystem):
            filesystem = filesystem.base_fs
        return filesystem.type_name in _RENAMES_FOLDERS

    @contextmanager
    def _named(self, action: str, rel: str) -> Iterator[None]:
        """Turns a filesystem's error into one line that says what was tried, where, and why it failed."""
        try:
            yield
        except StorageError:
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            if action == "write":
                raise StorageError(f"cannot write {self.uri_of(rel)}: {_reason(error)}") from error
            raise FileNotFoundError(f"{self.uri_of(rel)} does not exist") from error
        except (OSError, pyarrow.ArrowException) as error:
            raise StorageError(f"cannot {action} {self.uri_of(rel)}: {_reason(error)}") from error

    def _copy_in(self, local_dir: str | Path, target: str) -> None:
        self.filesystem.create_dir(target, recursive=True)
        # use_threads=False: pyarrow's copier then raises the first error instead of leaving threads behind
        fs.copy_files(os.path.abspath(local_dir), target, fs.LocalFileSystem(), self.filesystem, use_threads=False)

    def _swap_in(self, staging: str, rel: str) -> None:
        """Renames a complete folder into place; the old one is only deleted after the new one stands."""
        target = self._path(rel)
        with self._named("write", rel):
            if not self.exists(rel):
                self.filesystem.move(staging, target)
                return
            old = _temporary_sibling(target)
            self.filesystem.move(target, old)
            try:
                self.filesystem.move(staging, target)
            except BaseException:
                self.filesystem.move(old, target)
                raise
        self._discard(old)

    def _upload_in_place(self, local_dir: str | Path, rel: str, marker: str | None) -> None:
        if marker is not None:
            self.delete(f"{rel}/{marker}".lstrip("/"))
        self.delete(rel)
        files = sorted(path for path in Path(local_dir).rglob("*") if path.is_file())
        names = [path.relative_to(local_dir).as_posix() for path in files]
        for name in sorted(names, key=lambda name: name == marker):
            self.write_bytes(f"{rel}/{name}".lstrip("/"), (Path(local_dir) / name).read_bytes())

    def _discard(self, path: str) -> None:
        """Best effort: the error that led here is the one to report."""
        try:
            info = self.filesystem.get_file_info(path)
            if info.type == fs.FileType.Directory:
                self.filesystem.delete_dir(path)
            elif info.type == fs.FileType.File:
                self.filesystem.delete_file(path)
        except (OSError, pyarrow.ArrowException):
            pass


def _open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (OSError, pyarrow.ArrowException, ImportError) as error:
        raise InputError(
            f"storage {uri} cannot be opened: {_reason(error)}; expected a local path or a URI (file://, s3://)"
        ) from error
    return filesystem, path.rstrip("/") or path


def _checked(rel: str) -> str:
    parts = PurePosixPath(rel).parts
    if rel.startswith("/") or ".." in parts or not parts:
        raise ValueError(f"{rel!r} is not a path below the folder")
    return "/".join(parts)


def _parent(path: str) -> str:
    return str(PurePosixPath(path).parent)


def _temporary_sibling(path: str) -> str:
    return str(PurePosixPath(path).parent / f".{PurePosixPath(path).name}{_TEMPORARY}{uuid.uuid4().hex[:12]}")


def _reason(error: BaseException) -> str:
    code = getattr(error, "errno", None)
    return os.strerror(code) if code else _one_line(error)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
