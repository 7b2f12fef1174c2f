"""What a sampling job leaves: shards of samples that vouch for themselves, and the manifest over all of them.

A job of one shard writes `samples.parquet`; one of several the folder `samples/`, which Parquet readers take for one
data set because they pass over names that begin with `_`:

    samples/part-00003-of-00049.parquet    rows of images 3072 to 4095
    samples/_part-00003-of-00049.json      its record, written after it: hash, rows, rewards
    samples/_part-00003-of-00049.png       its first 100 images, for the first ten shards

`manifest.json` lists the records of all finished shards beside the settings that decide the samples. A shard is
finished when its file has the hash of its record and the record is of these settings; all else is made again.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from mfm_ray.config import SampleConfig, flatten
from mfm_ray.errors import InputError
from mfm_ray.settings import shown
from mfm_ray.storage import Storage

SAMPLES, FOLDER, MANIFEST = "samples.parquet", "samples", "manifest.json"
FORMAT, FORMAT_VERSION = "mfm-ray-samples", 1
PICTURED_SHARDS = 10
_PICTURED, _COLUMNS = 100, 10
_READERS = 8  # files that are read at once when a resumed job looks at what is there


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One piece of a job: its file below the run's folder, and the images that belong into it."""

    index: int
    file: str
    first_image: int
    count: int

    @property
    def record(self) -> str | None:
        """Where its record stands; that of a job's only shard stands in the manifest alone."""
        return None if self.file == SAMPLES else self._beside("json")

    @property
    def picture(self) -> str | None:
        return None if self.file == SAMPLES or self.index >= PICTURED_SHARDS else self._beside("png")

    def _beside(self, ending: str) -> str:
        folder, _, name = self.file.rpartition("/")
        return f"{folder}/_{name.removesuffix('parquet')}{ending}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """A finished shard.

    reward, reward_std: of its images, None when unsteered; judges: means by name; settings: hash of what decided them;
    device: where they were calculated, "cpu" or "cuda", whose last bits differ.
    """

    file: str
    first_image: int
    count: int
    rows: int
    sha256: str
    nfe: float
    reward: float | None
    reward_std: float | None
    settings: str
    device: str
    judges: dict[str, float] = field(default_factory=dict)


def plan_shards(num_samples: int, shard_size: int) -> list[Shard]:
    total = math.ceil(num_samples / shard_size)
    if total == 1:
        return [Shard(index=0, file=SAMPLES, first_image=0, count=num_samples)]
    return [
        Shard(
            index=index,
            file=f"{FOLDER}/part-{index:05d}-of-{total:05d}.parquet",
            first_image=index * shard_size,
            count=min(shard_size, num_samples - index * shard_size),
        )
        for index in range(total)
    ]


def deciding_settings(config: SampleConfig) -> dict[str, Any]:
    """Everything that the samples depend on; batch_size and the number of workers are none of it."""
    from mfm_ray.latent_models import Decoding, autoencoder_checksum

    sampler = ("num_steps", "dynamics", "order", "max_nfe", "preset", "label", "cfg_scale")
    keys = ("seed", "num_samples", "shard_size", *sampler)
    scores = [config.reward, {"parts": config.judges}]
    data = {place: _data_checksum(place) for reward in scores for place in _data_places(reward)}
    model = Storage(config.model or "")
    autoencoder = autoencoder_checksum(model, Decoding.of(config))
    return {
        "model": model_checksum(model),
        **({} if autoencoder is None else {"autoencoder": autoencoder}),
        **{key: getattr(config, key) for key in keys},
        "steering": dict(config.steering),
        "reward": dict(config.reward),
        "judges": list(config.judges),
        **({"reward_data": data} if data else {}),
    }


def model_checksum(model: Storage) -> str:
    """Hash of all files of a model directory that samples can depend on."""
    from mfm_ray.pretrained import CLASSIFIER_CONFIG, CLASSIFIER_WEIGHTS, CONFIG, WEIGHTS

    present = [name for name in (CONFIG, WEIGHTS, CLASSIFIER_CONFIG, CLASSIFIER_WEIGHTS) if model.is_file(name)]
    return _sha256("".join(f"{name} {_sha256(model.read_bytes(name))}\n" for name in present).encode())


def checksum(settings: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(settings, sort_keys=True).encode())


def read_manifest(run: Storage) -> dict[str, Any] | None:
    """The manifest of an earlier call in the run's folder; None when there is none that can be read."""
    try:
        found = run.read_json(MANIFEST) if run.is_file(MANIFEST) else None
    except InputError:
        return None
    is_ours = isinstance(found, dict) and found.get("format") == FORMAT and isinstance(found.get("settings"), dict)
    return found if is_ours else None


def refuse_other_settings(manifest: Mapping[str, Any] | None, settings: Mapping[str, Any], *, where: str) -> None:
    """InputError naming the first key in which the samples of an earlier call were decided otherwise."""
    if manifest is None:
        return
    now, then = _leaves(settings), _leaves(manifest["settings"])
    for key in [*now, *(key for key in then if key not in now)]:
        if key in now and key in then and now[key] == then[key]:
            continue
        given, begun = (f"{key}={shown(side[key])}" if key in side else f"no {key}" for side in (now, then))
        if key == "model":
            given, begun = (f"model of hash {str(side.get(key))[:12]}" for side in (now, then))
        raise InputError(f"{given}: the samples in {where} were begun with {begun}; expected that, or overwrite=true")


def refuse_other_device(records: Iterable[Record], device: str, *, where: str) -> None:
    """InputError when shards that are there were made on the other kind of device: no job would give both."""
    found = next((record.device for record in records if record.device != device), None)
    if found is not None:
        wanted = shown(found == "cuda")
        raise InputError(
            f"scaling.use_gpu: the samples in {where} were begun on {found} and would go on on {device}; "
            f"expected scaling.use_gpu={wanted}, or overwrite=true"
        )


def finished_records(run: Storage, shards: Iterable[Shard], settings: Mapping[str, Any]) -> dict[int, Record]:
    """Records of the shards that need not be made again, by index; reads every byte that they vouch for."""
    decided = checksum(settings)
    listed = {entry.get("file"): entry for entry in (read_manifest(run) or {}).get("shards", [])}
    present = {f"{FOLDER}/{name}" for name in run.listdir(FOLDER)} if run.is_dir(FOLDER) else set()

    def look(shard: Shard) -> tuple[int, Record | None]:
        if shard.record is None:
            return shard.index, _verified(run, shard, listed.get(shard.file), decided)
        if not {shard.file, shard.record} <= present:
            return shard.index, None
        try:
            return shard.index, _verified(run, shard, run.read_json(shard.record), decided)
        except InputError:
            return shard.index, None

    with ThreadPoolExecutor(_READERS) as pool:
        return {index: record for index, record in pool.map(look, shards) if record is not None}


def write_manifest(
    run: Storage,
    config: SampleConfig,
    settings: Mapping[str, Any],
    records: Mapping[int, Record],
    *,
    num_shards: int,
    images_per_second: float | None = None,
) -> None:
    """`status` is "running" until every shard is there; readers see the old or the new file, never half of one."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "status": "complete" if len(records) == num_shards else "running",
        "model": config.model,
        "num_samples": config.num_samples,
        "num_shards": num_shards,
        "rows": sum(record.rows for record in records.values()),
        "images_per_second": images_per_second,
        "settings": settings,
        "shards": [asdict(records[index]) for index in sorted(records)],
    }
    run.write_json(MANIFEST, content)


def join_rewards(records: Iterable[Record]) -> tuple[float, float] | None:
    """Mean and standard deviation over the images of all shards; None when unsteered."""
    count, mean, squares = 0, 0.0, 0.0
    for record in records:
        if record.reward is None or record.reward_std is None:
            return None
        gap, total = record.reward - mean, count + record.rows
        squares += record.reward_std**2 * (record.rows - 1) + gap**2 * count * record.rows / total
        mean += gap * record.rows / total
        count = total
    return (mean, math.sqrt(squares / (count - 1)) if count > 1 else 0.0) if count else None


def join_judges(records: Iterable[Record]) -> dict[str, float]:
    """Mean of each judge over the images of all shards."""
    kept = list(records)
    total = sum(record.rows for record in kept)
    names = kept[0].judges if kept else {}
    return {name: sum(record.judges[name] * record.rows for record in kept) / total for name in names}


def make_record(shard: Shard, content: bytes, drawn: Any, *, settings: Mapping[str, Any], device: str) -> Record:
    rewards = None if drawn.rewards is None else drawn.rewards.double()
    return Record(
        file=shard.file,
        first_image=shard.first_image,
        count=shard.count,
        rows=len(drawn.images),
        sha256=_sha256(content),
        nfe=float(drawn.nfe),
        reward=None if rewards is None else float(rewards.mean()),
        reward_std=None if rewards is None else (float(rewards.std()) if len(rewards) > 1 else 0.0),
        settings=checksum(settings),
        device=device,
        judges={name: float(values.double().mean()) for name, values in drawn.judges.items()},
    )


def samples_parquet(drawn: Any, *, label: int | None, seed: int, first_image: int = 0) -> bytes:
    """Columns image (fixed-shape tensor, data units), reward, nfe, label, seed, index, judge.NAME; a sample a row."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    pixels = np.ascontiguousarray(drawn.images.cpu().numpy(), dtype=np.float32)
    images, count = pa.FixedShapeTensorArray.from_numpy_ndarray(pixels), len(pixels)
    rewards = [None] * count if drawn.rewards is None else drawn.rewards.tolist()
    columns = {
        "image": images,
        "reward": pa.array(rewards, pa.float32()),
        "nfe": pa.array([drawn.nfe] * count, pa.float64()),
        "label": pa.array([label] * count, pa.int64()),
        "seed": pa.array([seed] * count, pa.int64()),
        "index": pa.array(range(first_image, first_image + count), pa.int64()),
    }
    columns |= {f"judge.{name}": pa.array(values.tolist(), pa.float32()) for name, values in drawn.judges.items()}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def first_images(run: Storage, shards: Iterable[Shard]) -> Any:
    """The images of a job's picture, (up to 100, *sample_shape)."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    parts: list[Any] = []
    for shard in shards:
        column = pq.read_table(pa.BufferReader(run.read_bytes(shard.file)), columns=["image"])["image"]
        parts.append(torch.from_numpy(column.combine_chunks().to_numpy_ndarray().copy()))
        if sum(map(len, parts)) >= _PICTURED:
            break
    return torch.cat(parts)[:_PICTURED]


def picture_of(images: Any) -> bytes:
    """PNG of the first hundred images, ten in a row."""
    from mfm_ray.reporting.pictures import grid, png

    zoom = max(1, 48 // images.shape[-1])
    return png(grid(images[:_PICTURED].cpu(), columns=_COLUMNS, gap=max(1, zoom // 2), zoom=zoom))


def _verified(run: Storage, shard: Shard, entry: Any, settings: str) -> Record | None:
    """The record of a shard when it is of these settings and its file is what it says, byte for byte."""
    try:
        record = Record(**entry)
        content = run.read_bytes(shard.file)
    except (TypeError, FileNotFoundError):
        return None
    wanted = (shard.file, shard.first_image, shard.count, shard.count, settings)
    found = (record.file, record.first_image, record.count, record.rows, record.settings)
    return record if found == wanted and _sha256(content) == record.sha256 else None


def _leaves(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flatten(settings).items() if not isinstance(value, Mapping)}


def _data_places(reward: Mapping[str, Any]) -> list[str]:
    """Folders of prepared data that a reward and its parts name."""
    parts = [part for part in reward.get("parts") or [] if isinstance(part, Mapping)]
    own = [reward["data"]] if isinstance(reward.get("data"), str) else []
    return [*own, *(place for part in parts for place in _data_places(part))]


def _data_checksum(place: str) -> str:
    from mfm_ray.data.shards import read_manifest as read_data_manifest

    return read_data_manifest(place).sha256


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
