"""All numbers and images behind a report as one Arrow table, one value or image a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from mfm_ray.protocols.comparison import Study
from mfm_ray.protocols.digits import DigitsEvaluation
from mfm_ray.protocols.quality import Judgement

SCHEMA = pa.schema(
    [
        pa.field(
            "section", pa.string(), nullable=False
        ),  # training, gallery, novelty, posterior, distance, reward, law
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
    rows = [*_training(history), *_gallery(evaluation), *_novelty(evaluation)]
    rows += [*_posterior(evaluation), *_distance(evaluation)]
    for study in evaluation.studies:
        rows += [*_study(study), *_quality(study, evaluation.judgements[study.problem.name])]
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


def _novelty(evaluation: DigitsEvaluation) -> Iterator[Row]:
    for kind, found in evaluation.novelty.items():
        of = {"section": "novelty", "method": kind, "x": found.count}
        yield {**of, "quantity": "nearest_distance", "value": found.memorisation.samples}
        yield {**of, "quantity": "nearest_ratio", "value": found.memorisation.ratio}
        yield {**of, "quantity": "vendi", "value": found.vendi}
        for item, (image, nearest) in enumerate(zip(found.samples, found.nearest, strict=True)):
            yield {**of, "item": item, "quantity": "sample", "image": _flat(image)}
            yield {**of, "item": item, "quantity": "nearest", "image": _flat(nearest)}


def _quality(study: Study, judgement: Judgement) -> Iterator[Row]:
    """Distances of every method with their floors, over calls; and the chains' rewards."""
    base = {"section": "law", "reward": study.problem.name}
    for score in study.all_scores:
        of = {**base, "method": score.method.key, "x": score.nfe}
        yield {**of, "quantity": "mean_reward", "value": score.reward}
        yield {**of, "quantity": "samples", "value": score.count}
        found = {"": judgement[score.method.key], "_floor": judgement.floor(score)}
        for suffix, quality in found.items():
            for name, value in vars(quality).items() if quality is not None else ():
                if value is not None:
                    yield {**of, "quantity": f"{name}{suffix}", "value": value}
    if judgement.law is not None:
        of = {**base, "method": "chains"}
        for label, share in enumerate(judgement.law.frequencies.tolist()):
            yield {**of, "x": label, "quantity": "class_share", "value": share}
        for item, reward in enumerate(judgement.law.rewards.tolist()):
            yield {**of, "item": item, "quantity": "chain_reward", "value": reward}


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
