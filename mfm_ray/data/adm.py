"""ADM's .npz batches: pictures as uint8 (N, H, W, C) in `arr_0`, and the moments of a set's Inception features.

The format of OpenAI's guided-diffusion evaluator. `VIRTUAL_imagenet256_labeled.npz` holds 10,000 pictures and the
moments `mu`, `sigma` (pooled features, (2048,) and (2048, 2048)) and `mu_s`, `sigma_s` (spatial ones) of the whole
training set. Pictures are read where they lie, a part at a time; nothing is unpickled; whatever is damaged is refused
by its name.
"""

from __future__ import annotations

import hashlib
import io
import math
import struct
import tokenize
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfm_ray.errors import InputError
from mfm_ray.metrics.features import FeatureStatistics
from mfm_ray.storage import Storage

IMAGES = "arr_0"
_MOMENTS = ("mu", "sigma")
_LOCAL_HEADER = 30  # bytes of a zip member's own header before its name
_CHUNK = 1 << 22


@dataclass(frozen=True)
class _Member:
    """An array of the file: its shape and type, and how many bytes of header stand before its numbers."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    header: int

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])


class AdmBatch:
    """An .npz batch at a path or URI, opened and checked but for its bytes (`verify`).

    InputError naming the file and the array for what is no zip, has neither pictures nor moments, holds Python objects,
    or has another type, order or shape than ADM's evaluator reads.
    """

    def __init__(self, location: str, *, key: str = "reference") -> None:
        folder, _, self._name = location.rstrip("/").rpartition("/")
        self._storage, self._where = Storage(folder or "."), f"{key}={location}"
        if not self._storage.is_file(self._name):
            raise InputError(f"{self._where} does not exist, expected ADM's .npz batch")
        try:
            with self._open() as archive:
                self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
                self._arrays = {name: self._header(archive, name) for name in self._members}
        except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            raise InputError(f"{self._where} is no whole .npz file: {error}") from error
        if IMAGES not in self._arrays and not set(_MOMENTS) <= set(self._arrays):
            raise InputError(f"{self._where} holds neither {IMAGES} nor mu and sigma, expected ADM's .npz batch")
        self._check_images()
        self._check_moments()

    @property
    def num_images(self) -> int:
        """0 for a file of moments alone."""
        return self._arrays[IMAGES].shape[0] if IMAGES in self._arrays else 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its pictures. InputError for a file of moments alone."""
        height, width, channels = self._images().shape[1:]
        return channels, height, width

    @property
    def has_moments(self) -> bool:
        """Whether mu and sigma are there."""
        return set(_MOMENTS) <= set(self._arrays)

    @property
    def fingerprint(self) -> str:
        """Hash of the names, sizes and checksums of its arrays."""
        parts = sorted((name, info.file_size, info.CRC) for name, info in self._members.items())
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def verify(self) -> None:
        """Reads every byte once and compares the checksums; InputError naming the array that is damaged."""
        with self._open() as archive:
            for name, info in self._members.items():
                try:
                    with archive.open(info) as member:
                        while member.read(_CHUNK):
                            pass
                except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
                    raise InputError(f"{self._where}: {name} is damaged: {error}") from error

    def images(self, first: int, count: int) -> Tensor:
        """Pictures first to first + count - 1 as (count, C, H, W) float32 in [0, 1]; only their bytes are read."""
        member = self._images()
        if not (first >= 0 and count > 0 and first + count <= member.shape[0]):
            raise ValueError(f"pictures {first} to {first + count - 1} of {member.shape[0]}")
        content = self._bytes(member, first * member.row_bytes, count * member.row_bytes)
        pixels = np.frombuffer(content, np.uint8).reshape(count, *member.shape[1:])
        return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255

    def moments(self) -> FeatureStatistics:
        """Of the pooled features of the whole set, whose size the file does not say. InputError without them."""
        if not self.has_moments:
            raise InputError(f"{self._where} holds no mu and sigma, expected a batch with moments")
        mean, covariance = (torch.from_numpy(self._whole(name)) for name in _MOMENTS)
        for name, values in zip(_MOMENTS, (mean, covariance), strict=True):
            if not bool(values.isfinite().all()):
                raise InputError(f"{self._where}: {name} holds NaN or infinity")
        return FeatureStatistics(mean, covariance, None)

    def _images(self) -> _Member:
        if IMAGES not in self._arrays:
            raise InputError(f"{self._where} holds moments alone, expected pictures ({IMAGES}) as well")
        return self._arrays[IMAGES]

    def _open(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self._storage.open_for_parts(self._name))

    def _header(self, archive: zipfile.ZipFile, name: str) -> _Member:
        info = self._members[name]
        if not info.filename.endswith(".npy"):
            raise InputError(f"{self._where}: {info.filename} is no array, expected .npy members alone")
        with archive.open(info) as member:
            try:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(member)
                header = member.tell()
            except (ValueError, struct.error, SyntaxError, tokenize.TokenError) as error:
                raise InputError(
                    f"{self._where}: {name} has no readable header: {str(error).splitlines()[0]}"
                ) from error
        if dtype.hasobject:
            raise InputError(f"{self._where}: {name} holds pickled Python objects, which are not read")
        if fortran and len(shape) > 1:
            raise InputError(f"{self._where}: {name} is in Fortran's order, expected C's")
        if header + dtype.itemsize * math.prod(shape) != info.file_size:
            raise InputError(f"{self._where}: {name} is {info.file_size} bytes long, too few or too many for {shape}")
        return _Member(info, tuple(shape), dtype, header)

    def _check_images(self) -> None:
        found = self._arrays.get(IMAGES)
        if found is None:
            return
        if found.dtype != np.uint8 or len(found.shape) != 4 or found.shape[3] not in (1, 3) or not found.shape[0]:
            raise InputError(
                f"{self._where}: {IMAGES} is {found.dtype} of shape {found.shape}, expected uint8 (N, H, W, 3)"
            )

    def _check_moments(self) -> None:
        for mean, covariance in (_MOMENTS, ("mu_s", "sigma_s")):
            found = [name for name in (mean, covariance) if name in self._arrays]
            if not found:
                continue
            if len(found) == 1:
                raise InputError(f"{self._where}: {found[0]} without its {covariance if found[0] == mean else mean}")
            first, second = (self._arrays[name] for name in found)
            if (
                len(first.shape) != 1
                or second.shape != first.shape * 2
                or {first.dtype.kind, second.dtype.kind} != {"f"}
            ):
                shapes = f"{mean} {first.shape} and {covariance} {second.shape}"
                raise InputError(f"{self._where}: {shapes}, expected numbers (D,), (D, D)")

    def _whole(self, name: str) -> np.ndarray[Any, Any]:
        member = self._arrays[name]
        content = self._bytes(member, 0, member.dtype.itemsize * math.prod(member.shape))
        return np.frombuffer(content, member.dtype).reshape(member.shape).astype(np.float64)

    def _bytes(self, member: _Member, start: int, length: int) -> bytes:
        """Part of an array's numbers: read where they lie, or unpacked from the beginning where they are packed."""
        if member.info.compress_type == zipfile.ZIP_STORED:
            with self._storage.open_for_parts(self._name) as file:
                file.seek(member.info.header_offset)
                name, extra = struct.unpack("<HH", file.read(_LOCAL_HEADER)[26:])
                file.seek(member.info.header_offset + _LOCAL_HEADER + name + extra + member.header + start)
                content = file.read(length)
        else:
            with self._open() as archive, archive.open(member.info) as packed:
                packed.seek(member.header + start)
                content = packed.read(length)
        if len(content) != length:
            raise InputError(f"{self._where}: ends within {member.info.filename}, it is damaged")
        return content


def write_adm_batch(folder: Storage, name: str, parts: Iterable[Tensor], *, count: int) -> None:
    """Writes pictures as ADM's evaluator reads them: `arr_0`, uint8 (count, H, W, C), a part in memory at a time.

    parts: (n, C, H, W) uint8 (`metrics.eight_bit`), count rows in all; grey pictures get three equal channels.
    ValueError for another number of rows or shape.
    """
    written = 0
    with folder.open_new(name) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as member:
            for part in parts:
                rows = part.expand(-1, 3, -1, -1) if part.shape[1] == 1 else part
                if rows.dtype != torch.uint8 or rows.dim() != 4 or rows.shape[1] != 3:
                    raise ValueError(f"pictures {tuple(part.shape)} {part.dtype}, expected (n, 3, H, W) uint8")
                if written == 0:
                    member.write(_npy_header((count, rows.shape[2], rows.shape[3], 3)))
                member.write(rows.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
                written += len(rows)
        if written != count:
            raise ValueError(f"{written} pictures, {count} were announced")


def _npy_header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()
