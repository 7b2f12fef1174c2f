"""Samples of a model, steered or not: a Parquet file of images, rewards and labels, and a picture of the first ones.

python -m jobs.sample model=runs/digits/model num_samples=256
python -m jobs.sample model=runs/digits/model steering=gradient reward=masked_observation reward.row=3
python -m jobs.sample model=runs/digits/model steering=best_of_n steering.num_particles=100 reward=symmetry
"""

import time
from collections.abc import Callable
from typing import Any

from jobs.contract import JobRun, Outcome, run_job
from mfm_ray.config import SampleConfig
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage

SAMPLES, GRID = "samples.parquet", "grid.png"
_PICTURED, _COLUMNS = 100, 10
_LINE_EVERY_S = 10.0


def check(config: SampleConfig) -> None:
    """The model loads, and steering, reward, label and sampler fit it."""
    flow_map, _ = build(config)
    if config.label is not None and not config.label < flow_map.num_classes:
        allowed = f"0 to {flow_map.num_classes - 1}" if flow_map.num_classes else "null: this model has no classes"
        raise InputError(f"label={config.label}: expected {allowed}")
    if config.cfg_scale is not None and config.cfg_scale not in flow_map.cfg_scales:
        known = ", ".join(map(str, flow_map.cfg_scales)) or "null alone: this model has none"
        raise InputError(f"cfg_scale={config.cfg_scale}: expected one of {known}")


def build(config: SampleConfig) -> tuple[Any, Any]:
    """Flow map and steering method (None: unsteered)."""
    from mfm_ray.building import build_reward, build_steering
    from mfm_ray.pretrained import load_classifier, load_flow_map

    if config.model is None:
        raise InputError("model=null: expected a model directory")
    model = Storage(config.model)
    flow_map = load_flow_map(model)
    reward = build_reward(
        config.reward,
        load_classifier=lambda: load_classifier(model),
        load_heldout=lambda place: _heldout(model, place),
        seed=config.seed,
    )
    if reward is not None and config.steering.get("name") == "none":
        raise InputError(f"reward={config.reward['name']}: steering=none takes no reward; choose a steering")
    return flow_map, build_steering(config.steering, reward)


def body(run: JobRun) -> Outcome:
    from mfm_ray.reporting.pictures import grid, png
    from mfm_ray.samplers import sample

    config: SampleConfig = run.config
    flow_map, steering = build(config)
    began = time.monotonic()
    drawn = sample(
        flow_map,
        num_samples=config.num_samples,
        steering=steering,
        num_steps=config.num_steps,
        dynamics=config.dynamics,
        seed=config.seed,
        label=config.label,
        cfg_scale=config.cfg_scale,
        preset=config.preset,
        batch_size=config.batch_size,
        progress=_progress(run.log, began),
    )
    seconds = time.monotonic() - began
    run.storage.write_bytes(SAMPLES, samples_parquet(drawn, config))
    artifacts = {"samples": run.storage.uri_of(SAMPLES)}
    if flow_map.space.kind == "image":
        zoom = max(1, 48 // flow_map.event_shape[-1])
        picture = grid(drawn.images[:_PICTURED], columns=_COLUMNS, gap=max(1, zoom // 2), zoom=zoom)
        run.storage.write_bytes(GRID, png(picture))
        artifacts["grid"] = run.storage.uri_of(GRID)
    metrics = {"num_samples": config.num_samples, "nfe": drawn.nfe, "images_per_second": config.num_samples / seconds}
    if drawn.rewards is not None:
        metrics["reward"] = float(drawn.rewards.mean())
        metrics["reward_std"] = float(drawn.rewards.std()) if config.num_samples > 1 else 0.0
    run.log(", ".join(f"{name} {value:,.4g}" for name, value in metrics.items()))
    return Outcome(metrics=metrics, artifacts=artifacts)


def samples_parquet(drawn: Any, config: SampleConfig) -> bytes:
    """Columns image (fixed-shape tensor, data units), reward, nfe, label, seed, index; one sample a row."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(drawn.images.numpy(), dtype=np.float32))
    count = len(images)
    rewards = [None] * count if drawn.rewards is None else drawn.rewards.tolist()
    columns = {
        "image": images,
        "reward": pa.array(rewards, pa.float32()),
        "nfe": pa.array([drawn.nfe] * count, pa.float64()),
        "label": pa.array([config.label] * count, pa.int64()),
        "seed": pa.array([config.seed] * count, pa.int64()),
        "index": pa.array(range(count), pa.int64()),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _heldout(model: Storage, place: str | None) -> Any:
    """Held-out images of prepared data, or of the bundled data that the model was trained on."""
    from jobs.prepare_data import make_dataset
    from mfm_ray.data.shards import load_split
    from mfm_ray.pretrained import read_model_config

    if place is not None:
        return load_split(place, "heldout").data
    name = read_model_config(model)["data"]["name"]
    try:
        return make_dataset(name).splits["heldout"].data
    except InputError as error:
        raise InputError(f"reward.data=null: {name} is not bundled; expected a folder of prepared data") from error


def _progress(log: Callable[[str], None], began: float) -> Callable[[int, int], None]:
    spoke = began

    def tell(done: int, total: int) -> None:
        nonlocal spoke
        now = time.monotonic()
        if now - spoke >= _LINE_EVERY_S and done < total:
            spoke = now
            log(f"{done:,} of {total:,} images, {(now - began) * (total - done) / done:.0f} s left")

    return tell


if __name__ == "__main__":
    run_job("sample", body, check=check)
