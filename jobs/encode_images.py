"""The images of `jobs.prepare_data data=images`: what is to be done, what is done already, and the manifest at the end.

While the work goes on the output holds `plan.json` (all that decides what is stored), finished shards, and a record of
each part in `records/`. At the end it holds `manifest.json`, the shards and `damaged.jsonl`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from jobs.cluster import ray_cluster
from jobs.contract import JobRun, Outcome
from jobs.encode_pool import encode_on_ray, load_same_autoencoder
from jobs.sample_maker import Log, Progress
from jobs.sample_pool import choose_workers
from mfm_ray.config import PrepareDataConfig, load_config, to_dict
from mfm_ray.data.encoding import EncodingSettings, PartRecord, encode_part, record_name
from mfm_ray.data.image_sources import ImageIndex, index_images, open_source
from mfm_ray.data.mapped import arrow_schema
from mfm_ray.data.pixels import check_pillow
from mfm_ray.data.shards import MANIFEST, SCHEMA_VERSION, Manifest, read_manifest, verify_shards
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.hub import is_hub
from mfm_ray.storage import Storage

NAME = "images"
PLAN = "plan.json"
DAMAGED = "damaged.jsonl"
_OWN_KEYS = (
    "source_kind",
    "labels",
    "image_column",
    "label_column",
    "autoencoder",
    "image_size",
    "interpolation",
    "row_form",
    "dtype",
    "heldout_share",
    "batch_size",
    "shard_size",
    "encoder_threads",
    "scaling",
)


@dataclass(frozen=True)
class Work:
    """What is to be encoded, how, and the space that latents come to lie in."""

    index: ImageIndex
    settings: EncodingSettings
    space: DataSpace

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.index.images["key"].to_pylist())}

    def part_of(self, key: str) -> int:
        """The part that an image belongs to."""
        return self._rows[key] // self.settings.shard_size


def refuse_own_keys(config: PrepareDataConfig) -> None:
    """InputError for keys of images where the data are none."""
    given, default = to_dict(config), to_dict(load_config("prepare_data"))
    for key in _OWN_KEYS:
        if given[key] != default[key]:
            raise InputError(f"{key}={given[key]}: {config.data.name} is not encoded; only data=images has this key")


def check_images(config: PrepareDataConfig, output: Storage) -> None:
    """Source, labels, autoencoder and size fit, and so does what an earlier call has left. InputError, one line."""
    if config.source is None:
        raise InputError("source=null: expected the folder with the images, Parquet files or tars")
    if config.autoencoder is None:
        raise InputError("autoencoder=null: expected the folder of a diffusers AutoencoderKL, or hf://owner/name")
    if not any(config.scaling.resources_per_worker.values()):
        raise InputError("scaling.resources_per_worker: expected at least one resource above 0, such as {CPU: 1}")
    check_pillow()
    settings = work_of(config).settings
    if config.resume and output.exists(MANIFEST):
        _refuse_other(settings, output.read_json(MANIFEST).get("preparation", {}), output)
    elif config.resume and output.exists(PLAN):
        _refuse_other(settings, output.read_json(PLAN), output)


def has_unfinished(output: Storage) -> bool:
    """Whether a preparation of images was interrupted there."""
    return output.is_dir() and output.exists(PLAN) and not output.exists(MANIFEST)


def work_of(config: PrepareDataConfig) -> Work:
    """Lists the source and reads the autoencoder, once in a process."""
    assert config.source is not None and config.autoencoder is not None
    return _work(
        _place(config.source),
        config.autoencoder if is_hub(config.autoencoder) else os.path.abspath(config.autoencoder),
        config.source_kind,
        config.labels,
        config.image_column,
        config.label_column,
        tuple((key, getattr(config, key)) for key in _DECIDING),
    )


_DECIDING = (
    "image_size",
    "interpolation",
    "row_form",
    "dtype",
    "heldout_share",
    "batch_size",
    "shard_size",
    "encoder_threads",
)


@functools.lru_cache(maxsize=1)
def _work(
    source: str,
    autoencoder: str,
    kind: str,
    labels: str | None,
    image_column: str | None,
    label_column: str | None,
    deciding: tuple[tuple[str, Any], ...],
) -> Work:
    from mfm_ray.autoencoder import load_autoencoder

    values, (place, only) = dict(deciding), open_source(source)
    found = load_autoencoder(autoencoder)
    shape = found.latent_shape(values["image_size"])
    index = index_images(
        place, only=only, kind=kind, labels=labels, image_column=image_column, label_column=label_column
    )
    settings = EncodingSettings(
        source=source,
        kind=index.kind,
        column=index.column,
        index_sha256=index.sha256(),
        images=len(index),
        autoencoder=autoencoder,
        fingerprint=found.fingerprint(),
        **values,
    )
    return Work(index, settings, DataSpace(kind="latent", event_shape=shape, scale=found.scale))


def encode_images(run: JobRun, output: Storage) -> Outcome:
    """Does what is not done yet and writes the manifest."""
    config: PrepareDataConfig = run.config
    work = work_of(config)
    settings = work.settings
    if config.resume and output.exists(MANIFEST):
        try:
            manifest = verify_shards(output)
            _check_damaged(output)
            run.log(f"{output} is complete and unaltered")
            return _outcome(manifest, output)
        except InputError as damage:
            run.log(f"{damage}; what it belongs to is made again")
            reopen(work, output)
    if config.overwrite:
        output.delete()
    output.write_json(PLAN, asdict(settings))
    records = finished_parts(output, settings) if config.resume else {}
    missing = [part for part in range(settings.num_parts) if part not in records]
    run.log(f"{settings.images:,} images ({settings.kind}), {len(records)} of {settings.num_parts} parts are there")
    progress = Progress(run.log, before=sum(record.images for record in records.values()), total=settings.images)

    def keep(record: PartRecord) -> None:
        records[record.part] = record
        progress.made += record.images
        if progress.is_due:
            progress.tell(0, 0)

    if missing:
        _encode(config, work, missing, output, keep, progress, run.log)
    manifest = finish(work, records, output)
    run.log(f"wrote {output}")
    return _outcome(manifest, output, images_per_second=progress.images_per_second if missing else None)


def _encode(
    config: PrepareDataConfig,
    work: Work,
    missing: list[int],
    output: Storage,
    keep: Callable[[PartRecord], None],
    progress: Progress,
    log: Log,
) -> None:
    def entries_of(part: int) -> Any:
        where = work.settings.part(part)
        return work.index.images.slice(where.start, where.stop - where.start)

    if config.scaling.num_workers == 0:
        _encode_here(config, work.settings, missing, entries_of, output, keep, progress)
        return
    with ray_cluster(log):
        workers = choose_workers(config.scaling, len(missing))
        encode_on_ray(missing, entries_of, work.settings, output, keep, progress, workers=workers, log=log)


def _encode_here(
    config: PrepareDataConfig,
    settings: EncodingSettings,
    missing: list[int],
    entries_of: Callable[[int], Any],
    output: Storage,
    keep: Callable[[PartRecord], None],
    progress: Progress,
) -> None:
    import torch

    if config.scaling.use_gpu and not torch.cuda.is_available():
        raise InputError("scaling.use_gpu=true: this machine has no CUDA device; expected false or null")
    on_gpu = torch.cuda.is_available() and config.scaling.use_gpu is not False
    device = torch.device("cuda" if on_gpu else "cpu")
    autoencoder, threads = load_same_autoencoder(settings).to(device), len(os.sched_getaffinity(0))
    progress.restart()

    def tell(done: int) -> None:
        if progress.is_due:
            progress.tell(done, 0)

    for part in missing:
        entries = entries_of(part).to_pylist()
        keep(encode_part(part, entries, autoencoder, settings, output, device=device, threads=threads, note=tell))


def finished_parts(output: Storage, settings: EncodingSettings) -> dict[int, PartRecord]:
    """Records of parts whose shards are there, byte for byte."""
    found = {}
    for part in range(settings.num_parts):
        if not output.is_file(record_name(part)):
            continue
        try:
            record = PartRecord(**output.read_json(record_name(part)))
            whole = record.settings == settings.sha256() and all(
                output.is_file(file["name"])
                and hashlib.sha256(output.read_bytes(file["name"])).hexdigest() == file["sha256"]
                for file in record.files.values()
            )
        except (InputError, TypeError, KeyError):  # a record that is none: its part is made again
            continue
        if whole:
            found[part] = record
    return found


def finish(work: Work, records: Mapping[int, PartRecord], output: Storage) -> Manifest:
    """The manifest and the list of damaged images; after that what only the work needed is removed."""
    settings, ordered = work.settings, [records[part] for part in sorted(records)]
    damaged = [line for record in ordered for line in record.damaged]
    splits = {}
    for split in ("train", "heldout"):
        files = [record.files[split] for record in ordered if split in record.files]
        if files:
            splits[split] = {"rows": sum(file["rows"] for file in files), "files": files}
    if "train" not in splits:
        why = f"; the first: {damaged[0]['image']}: {damaged[0]['reason']}" if damaged else ""
        raise InputError(f"source={settings.source}: no image is left to train on, {len(damaged)} are damaged{why}")
    shape = (2 * work.space.event_shape[0], *work.space.event_shape[1:])
    columns = {field.name: str(field.type) for field in arrow_schema(shape, settings.dtype)}
    listed = "".join(f"{json.dumps(line)}\n" for line in damaged).encode()
    output.write_bytes(DAMAGED, listed)
    output.write_json(
        MANIFEST,
        {
            "schema_version": SCHEMA_VERSION,
            "name": NAME,
            **work.space.config(),
            "row_form": settings.row_form,
            "dtype": settings.dtype,
            "columns": columns,
            "num_classes": len(work.index.class_names),
            "class_names": list(work.index.class_names),
            "autoencoder": {
                "source": settings.autoencoder,
                "fingerprint": settings.fingerprint,
                "image_size": settings.image_size,
            },
            "preparation": asdict(settings),
            "damaged": {"name": DAMAGED, "images": len(damaged), "sha256": hashlib.sha256(listed).hexdigest()},
            "splits": splits,
            "moments": None,
        },
    )
    output.delete("records")
    output.delete(PLAN)
    return read_manifest(output)


def reopen(work: Work, output: Storage) -> None:
    """A finished output becomes an unfinished one again: a record of each part of which everything is there.

    Its manifest goes last, so that an interruption leaves either the one or the other.
    """
    settings, raw = work.settings, output.read_json(MANIFEST)
    files: dict[int, dict[str, Any]] = {part: {} for part in range(settings.num_parts)}
    for split, entry in raw["splits"].items():
        for file in entry["files"]:
            files[int(file["name"].split("-")[1])][split] = file
    damaged: dict[int, list[dict[str, str]]] = {part: [] for part in files}
    for line in _listed_damage(output, raw["damaged"]):
        damaged[work.part_of(line["image"])].append(line)
    output.write_json(PLAN, asdict(settings))
    for part in files:
        record = PartRecord(part=part, settings=settings.sha256(), files=files[part], damaged=damaged[part])
        where = settings.part(part)
        if record.images == where.stop - where.start:  # else the list of damaged images is not what it was
            output.write_json(record_name(part), asdict(record))
    output.delete(MANIFEST)


def _check_damaged(output: Storage) -> None:
    entry = output.read_json(MANIFEST)["damaged"]
    if entry["images"] != len(_listed_damage(output, entry)):
        raise InputError(f"{output.uri_of(DAMAGED)} is missing or was altered")


def _listed_damage(output: Storage, entry: Mapping[str, Any]) -> list[dict[str, str]]:
    """The lines of `damaged.jsonl`; none where it is not what the manifest vouches for."""
    content = output.read_bytes(DAMAGED) if output.is_file(DAMAGED) else b""
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        return []
    return [json.loads(line) for line in content.splitlines()]


def _outcome(manifest: Manifest, output: Storage, *, images_per_second: float | None = None) -> Outcome:
    raw = output.read_json(MANIFEST)
    metrics: dict[str, float] = {f"{split}.rows": manifest.rows(split) for split in manifest.files}
    metrics |= {"num_classes": manifest.num_classes, "images": raw["preparation"]["images"]}
    metrics["damaged"] = raw["damaged"]["images"]
    if images_per_second is not None:
        metrics["images_per_second"] = images_per_second
    artifacts = {"shards": output.uri, "damaged": output.uri_of(DAMAGED)}
    return Outcome(metrics=metrics, artifacts=artifacts)


def _refuse_other(settings: EncodingSettings, before: Any, output: Storage) -> None:
    """Going on with other settings, or with another source, would mix two data sets."""
    for field in fields(settings):
        now, then = getattr(settings, field.name), before.get(field.name) if isinstance(before, dict) else None
        if now != then:
            what = "the source holds other images than" if field.name == "index_sha256" else f"{field.name}={now}:"
            was = "before" if field.name == "index_sha256" else f"{output} was begun with {then}"
            raise InputError(f"{what} {was}; resume with the same, or overwrite=true")


def _place(source: str) -> str:
    return source if "://" in source else os.path.abspath(os.path.expanduser(source))
