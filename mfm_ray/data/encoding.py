"""Encoding of images: a part of a source becomes one Arrow shard for each split, the same bytes wherever it is made.

A part is a run of consecutive images of the index. Its batches are the consecutive good ones among them, so that what
is stored depends on the source, the autoencoder and `EncodingSettings` alone: not on workers, kills or their order.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from mfm_ray.autoencoder import Autoencoder
from mfm_ray.data.image_sources import ImageReader, open_source
from mfm_ray.data.mapped import arrow_bytes
from mfm_ray.data.pixels import DamagedImage, read_pixels
from mfm_ray.data.prefetch import Prefetcher
from mfm_ray.storage import Storage

SPLITS = ("train", "heldout")


@dataclass(frozen=True, kw_only=True)
class EncodingSettings:
    """All that decides what is stored, beside the images: kept in `plan.json` while the work goes on, and in the
    manifest after that. kind, column, index_sha256, images: of the `ImageIndex`. encoder_threads: CPU threads of the
    autoencoder, whose number changes the last bits of its sums."""

    source: str
    kind: str
    column: str | None
    index_sha256: str
    images: int
    autoencoder: str
    fingerprint: str
    image_size: int
    interpolation: str
    row_form: str
    dtype: str
    heldout_share: float
    batch_size: int
    shard_size: int
    encoder_threads: int = 1

    @property
    def num_parts(self) -> int:
        return -(-self.images // self.shard_size)

    def part(self, number: int) -> slice:
        """The images of a part."""
        return slice(number * self.shard_size, min(self.images, (number + 1) * self.shard_size))

    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What a part became. files: by split {"name", "rows", "sha256"}. damaged: [{"image", "reason"}] in order."""

    part: int
    settings: str
    files: dict[str, dict[str, Any]]
    damaged: list[dict[str, str]]

    @property
    def rows(self) -> int:
        return sum(file["rows"] for file in self.files.values())

    @property
    def images(self) -> int:
        return self.rows + len(self.damaged)


def record_name(part: int) -> str:
    return f"records/{part:05d}.json"


def is_held_out(key: str, share: float) -> bool:
    """By the image's name alone: whatever else is in the source, it stays where it is."""
    word = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return word < share * 2**64


def encode_part(
    part: int,
    entries: Sequence[Mapping[str, Any]],
    autoencoder: Autoencoder,
    settings: EncodingSettings,
    output: Storage,
    *,
    device: torch.device,
    threads: int = 1,
    note: Callable[[int], None] = lambda done: None,
) -> PartRecord:
    """Writes the shards of a part and, last, its record.

    entries: its rows of the index. threads: that decode images ahead of the autoencoder, which itself has
    `settings.encoder_threads`. note: called with the number of images that are done.
    """
    with _same_arithmetic(settings.encoder_threads):
        return _encode_part(part, entries, autoencoder, settings, output, device=device, threads=threads, note=note)


@contextmanager
def _same_arithmetic(threads: int) -> Iterator[None]:
    """float32 as it is, without TF32, by algorithms that do not change from call to call."""
    cudnn, matmul, threads_before = torch.backends.cudnn, torch.backends.cuda.matmul, torch.get_num_threads()
    before = cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, matmul.allow_tf32
    try:
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, matmul.allow_tf32 = False, True, False, False
        torch.set_num_threads(threads)
        yield
    finally:
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, matmul.allow_tf32 = before
        torch.set_num_threads(threads_before)


def _encode_part(
    part: int,
    entries: Sequence[Mapping[str, Any]],
    autoencoder: Autoencoder,
    settings: EncodingSettings,
    output: Storage,
    *,
    device: torch.device,
    threads: int,
    note: Callable[[int], None],
) -> PartRecord:
    rows: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    kept: dict[str, list[Mapping[str, Any]]] = {split: [] for split in SPLITS}
    damaged: list[dict[str, str]] = []
    for batch in _batches(entries, settings, threads):
        damaged += batch.damaged
        if batch.entries:
            moments = _moments(autoencoder, batch.pixels, settings, device)
            for entry, moment in zip(batch.entries, moments, strict=True):
                if not np.isfinite(moment).all():
                    damaged.append({"image": entry["key"], "reason": f"its latent is not finite in {settings.dtype}"})
                    continue
                split = SPLITS[is_held_out(entry["key"], settings.heldout_share)]
                rows[split].append(moment)
                kept[split].append(entry)
        note(sum(map(len, kept.values())) + len(damaged))
    files = {}
    for split in (split for split in SPLITS if rows[split]):
        name = f"{split}-{part:05d}-of-{settings.num_parts:05d}.arrow"
        labels, keys = zip(*((entry["label"], entry["key"]) for entry in kept[split]), strict=True)
        content = arrow_bytes(np.stack(rows[split]), labels, keys)
        output.write_bytes(name, content)
        files[split] = {"name": name, "rows": len(keys), "sha256": hashlib.sha256(content).hexdigest()}
    record = PartRecord(part=part, settings=settings.sha256(), files=files, damaged=damaged)
    output.write_json(record_name(part), asdict(record))
    return record


@torch.inference_mode()
def _moments(
    autoencoder: Autoencoder, pixels: np.ndarray, settings: EncodingSettings, device: torch.device
) -> np.ndarray:
    """Posteriors as rows (B, 2C, h, w) of the stored form; the autoencoder computes in float32."""
    images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
    mean, spread = autoencoder.posterior(images)
    if settings.row_form == "mean_std":
        spread = (spread * 0.5).exp()
    return torch.cat([mean, spread], dim=1).to(getattr(torch, settings.dtype)).cpu().numpy()


@dataclass(frozen=True)
class _PixelBatch:
    entries: list[Mapping[str, Any]]
    pixels: np.ndarray
    damaged: list[dict[str, str]]


def _batches(entries: Sequence[Mapping[str, Any]], settings: EncodingSettings, threads: int) -> Iterator[_PixelBatch]:
    """Consecutive good images, `batch_size` at a time, read and decoded while earlier ones are encoded."""
    reader = ImageReader(open_source(settings.source)[0], settings.kind, settings.column)
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        making = _BatchMaker(entries, settings, reader, pool)
        ahead: Prefetcher[_PixelBatch] = Prefetcher(making, end=len(entries) + 1)
        try:
            step = 0
            while (batch := ahead.take(step)).entries or batch.damaged:
                yield batch
                step += 1
        finally:
            ahead.close()
            reader.close()


class _BatchMaker:
    def __init__(
        self,
        entries: Sequence[Mapping[str, Any]],
        settings: EncodingSettings,
        reader: ImageReader,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._entries, self._settings, self._reader, self._pool, self._next = entries, settings, reader, pool, 0

    def __call__(self, step: int) -> _PixelBatch:
        good: list[Mapping[str, Any]] = []
        pixels: list[np.ndarray] = []
        damaged: list[dict[str, str]] = []
        while len(good) < self._settings.batch_size and self._next < len(self._entries):
            end = self._next + self._settings.batch_size - len(good)
            wanted = self._entries[self._next : end]
            self._next = end
            for entry, found in zip(wanted, self._decoded(wanted), strict=True):
                if isinstance(found, str):
                    damaged.append({"image": entry["key"], "reason": found})
                else:
                    good.append(entry)
                    pixels.append(found)
        return _PixelBatch(good, np.stack(pixels) if pixels else np.empty(0, np.uint8), damaged)

    def _decoded(self, entries: Sequence[Mapping[str, Any]]) -> list[np.ndarray | str]:
        """Pixels of each, or why there are none."""
        if self._settings.kind == "folder":
            return list(self._pool.map(lambda entry: self._decode(lambda: self._reader.read(entry)), entries))
        waiting = []
        for entry in entries:  # one file is open at a time, its readers are no two threads
            try:
                content: bytes | DamagedImage = self._reader.read(entry)
            except DamagedImage as damage:
                content = damage
            waiting.append(self._pool.submit(self._decode, functools.partial(_raised, content)))
        return [future.result() for future in waiting]

    def _decode(self, content: Callable[[], bytes]) -> np.ndarray | str:
        try:
            return read_pixels(content(), self._settings.image_size, interpolation=self._settings.interpolation)
        except DamagedImage as damage:
            return str(damage)


def _raised(content: bytes | DamagedImage) -> bytes:
    if isinstance(content, DamagedImage):
        raise content
    return content
