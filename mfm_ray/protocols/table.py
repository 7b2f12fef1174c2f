"""All numbers and images behind a report as one Arrow table, one value or image a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from mfm_ray.protocols.comparison import Study
from mfm_ray.protocols.digits import DigitsEvaluation

SCHEMA = pa.schema(
    [
        pa.field("section", pa.string(), nullable=False),  # training, gallery, posterior, distance, reward
        pa.field("reward", pa.string()),
        pa.field("method", pa.string()),
        pa.field("target", pa.int64()),
        pa.field("item", pa.int64()),
        pa.field("x", pa.float64()),  # what the value stands over: step, time, calls, class
        pa.field("quantity", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("image", pa.list_(pa.float32())),  # row by row, in data units
    ]
)
Row = dict[str, Any]


def evaluation_parquet(evaluation: DigitsEvaluation, history: Sequence[Mapping[str, float]]) -> bytes:
    """The bytes of a Parquet file with `SCHEMA`."""
    rows = [*_training(history), *_gallery(evaluation), *_posterior(evaluation), *_distance(evaluation)]
    for study in evaluation.studies:
        rows += _study(study)
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _training(history: Sequence[Mapping[str, float]]) -> Iterator[Row]:
    for line in history:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                yield {"section": "training", "x": line["step"], "quantity": name, "value": value}


def _gallery(evaluation: DigitsEvaluation) -> Iterator[Row]:
    for kind, images in evaluation.gallery.images.items():
        yield {
            "section": "gallery",
            "method": kind,
            "quantity": "confidence",
            "value": evaluation.gallery.confidence[kind],
        }
        for item, image in enumerate(images):
            yield {"section": "gallery", "method": kind, "item": item, "quantity": "image", "image": _flat(image)}


def _posterior(evaluation: DigitsEvaluation) -> Iterator[Row]:
    shown = evaluation.posterior_gallery
    yield {"section": "posterior", "quantity": "clean", "image": _flat(shown.clean)}
    for time, noisy, draws in zip(shown.times, shown.noisy, shown.draws, strict=True):
        yield {"section": "posterior", "x": time, "quantity": "noisy", "image": _flat(noisy)}
        for item, draw in enumerate(draws):
            yield {"section": "posterior", "x": time, "item": item, "quantity": "draw", "image": _flat(draw)}


def _distance(evaluation: DigitsEvaluation) -> Iterator[Row]:
    for gap in evaluation.gaps:
        for quantity in ("one_step", "few_step", "floor", "mean"):
            for item, value in enumerate(getattr(gap, quantity).tolist()):
                yield {"section": "distance", "x": gap.time, "item": item, "quantity": quantity, "value": value}


def _study(study: Study) -> Iterator[Row]:
    base = {"section": "reward", "reward": study.problem.name}
    for target, wanted in enumerate(study.problem.targets):
        for name, image in wanted.pictures.items():
            yield {**base, "target": target, "quantity": name, "image": _flat(image)}
    for label, share in enumerate(study.tilted.frequencies.tolist()):
        yield {**base, "method": "tilted_law", "x": label, "quantity": "class_share", "value": share}
    for score in study.scores:
        of = {**base, "method": score.method.key}
        for label, share in enumerate(score.frequencies.tolist()):
            yield {**of, "x": label, "quantity": "class_share", "value": share}
        for target in range(len(study.problem.targets)):
            figures = {
                "reward": score.reward_mean,
                "reward_std": score.reward_std,
                "confidence": score.confidence,
            }
            for quantity, values in figures.items():
                yield {**of, "target": target, "x": score.nfe, "quantity": quantity, "value": float(values[target])}
            shown = zip(score.images[target], score.image_rewards[target].tolist(), strict=True)
            for item, (image, reward) in enumerate(shown):
                place = {"target": target, "item": item, "x": score.nfe}
                yield {**of, **place, "quantity": "sample", "value": reward, "image": _flat(image)}


def _flat(image: Tensor) -> list[float]:
    return image.flatten().tolist()
