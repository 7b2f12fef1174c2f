"""One trial: samples of one point, rung after rung, in a worker that keeps its model from trial to trial.

Every trial draws the images 0, 1, 2, ... of the sweep's one seed: common random numbers, so that trials differ by
their settings alone. The number of samples is the fidelity; a longer trial begins with the images of a shorter one.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from ray import tune
from torch import Tensor

from mfm_ray.errors import InputError
from mfm_ray.metrics import by_students_t, class_confidence, class_probabilities, mean_with_interval
from mfm_ray.reporting.pictures import grid, png
from mfm_ray.storage import Storage
from mfm_ray.tuning.front import HALF_WIDTH

FIDELITY, FAILURE, WORKER, LOADS = "num_samples", "failure", "worker", "model_loads"
TRIAL, SETTINGS = "trial", "settings"
"""Tune's configuration of a trial: its index, and its settings as text, which Tune does not take apart."""
MEASURED = ("reward", "judge.", "confidence", "diversity", "frechet", "sliced_w2", "nfe", "seconds")
"""What the names of the metrics begin with."""
PICTURED = 10
_PAIRED = 512  # images whose mutual distances are the diversity
_INTERVAL = 1.96


class TrialSampler(Protocol):
    """A model that is loaded, and what is built on it for each trial. makes_images: whether samples are pictures."""

    classifier: Callable[[Tensor], Tensor] | None
    makes_images: bool

    def draw(self, settings: Mapping[str, Any], *, first_image: int, count: int) -> Any:
        """`mfm_ray.samplers.Samples` of images first_image, first_image + 1, ...; InputError for what is refused."""

    def compare(self, settings: Mapping[str, Any], images: Tensor) -> dict[str, float]:
        """Distances of the images to held-out data with half widths; {} where none were asked for."""


@dataclass(frozen=True)
class TrialSpec:
    """What all trials share. load: to a model, once a worker; rungs: numbers of samples after which a trial reports,
    rising; pictures: where the first images of each trial go; objectives: metrics that every trial must have; threads:
    of torch.
    """

    load: Callable[[], TrialSampler]
    rungs: Sequence[int]
    pictures: Storage
    objectives: Sequence[str] = ()
    threads: int = 1


class SamplingTrial(tune.Trainable):
    """Ray Tune's side of a trial; its actor lives on from trial to trial (`reuse_actors`) and with it the model."""

    def setup(self, config: dict[str, Any], spec: TrialSpec) -> None:  # type: ignore[override]
        self._spec = spec
        torch.set_num_threads(spec.threads)
        self._sampler = spec.load()
        self._loads = 1
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._loads = 0
        self._begin(new_config)
        return True

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._index, self._settings = int(config[TRIAL]), json.loads(config[SETTINGS])
        self._rung, self._seconds = 0, 0.0
        self._drawn: list[Any] = []

    def step(self) -> dict[str, Any]:
        """The samples up to the next rung, and all metrics over the samples so far."""
        done, wanted = self._spec.rungs[self._rung - 1] if self._rung else 0, self._spec.rungs[self._rung]
        about = {WORKER: os.getpid(), LOADS: self._loads}
        began = time.perf_counter()
        try:
            self._drawn.append(self._sampler.draw(self._settings, first_image=done, count=wanted - done))
            self._seconds += time.perf_counter() - began
            measured = self._measure()
        except InputError as refusal:
            return {**about, FIDELITY: done, FAILURE: str(refusal), "done": True}
        if self._rung == 0:
            self._keep_picture(self._drawn[0].images)
        self._rung += 1
        return {**about, **measured, FIDELITY: wanted, "done": self._rung == len(self._spec.rungs)}

    def _measure(self) -> dict[str, float]:
        """All metrics of the samples so far. InputError naming one that others could not be compared with."""
        images = torch.cat([part.images for part in self._drawn]).cpu()
        if not bool(images.isfinite().all()):
            raise InputError("samples: not finite, expected finite numbers")
        measured = measure(self._drawn, self._sampler.classifier, seconds=self._seconds)
        measured |= self._sampler.compare(self._settings, images)
        for name, value in measured.items():
            if not math.isfinite(value):
                raise InputError(f"{name}: {value}, expected a finite number")
        for name in self._spec.objectives:
            if name not in measured:
                raise InputError(f"{name}: not measured; expected a max_nfe that leaves a steered step")
        return measured

    def _keep_picture(self, images: Tensor) -> None:
        if self._sampler.makes_images:
            zoom = max(1, 48 // images.shape[-1])
            content = png(grid(images[:PICTURED].cpu(), columns=PICTURED, gap=max(1, zoom // 2), zoom=zoom))
            self._spec.pictures.write_bytes(picture_name(self._index), content)


def packed(settings: Mapping[str, Any]) -> str:
    """Settings as the text that a trial gets."""
    return json.dumps(settings)


def picture_name(index: int) -> str:
    return f"{index:05d}.png"


def rungs_of(num_samples: int, prune_after: int | None, reduction_factor: int) -> list[int]:
    """Numbers of samples after which trials report: each `reduction_factor` times the one before, the last is all."""
    rungs, edge = [], num_samples if prune_after is None else prune_after
    while edge < num_samples:
        rungs.append(edge)
        edge *= reduction_factor
    return [*rungs, num_samples]


def measure(drawn: Sequence[Any], classifier: Callable[[Tensor], Tensor] | None, *, seconds: float) -> dict[str, float]:
    """The metric vector of samples in parts: means with half their 95 percent interval; nfe and seconds an image.

    diversity: mean distance of two of the first images (`metrics.mean_pairwise_distance`), in data units.
    """
    images = torch.cat([part.images for part in drawn]).cpu()
    counts = [len(part.images) for part in drawn]
    measured = {
        "nfe": sum(part.nfe * count for part, count in zip(drawn, counts, strict=True)) / len(images),
        "seconds": seconds / len(images),
    }
    if drawn[0].rewards is not None:
        measured |= _mean("reward", torch.cat([part.rewards for part in drawn]))
    for name in drawn[0].judges:
        measured |= _mean(f"judge.{name}", torch.cat([part.judges[name] for part in drawn]))
    if classifier is not None:
        measured |= _mean("confidence", class_confidence(class_probabilities(classifier, images)))
    return measured | _diversity(images[:_PAIRED])


def _mean(name: str, values: Tensor) -> dict[str, float]:
    mean = by_students_t(mean_with_interval(values.cpu()))
    return {name: mean.value, name + HALF_WIDTH: mean.half_width}


def _diversity(images: Tensor) -> dict[str, float]:
    """Mean distance over pairs; its interval from the images' own mean distances (half of a pair's variance each)."""
    count = len(images)
    if count < 2:
        return {}
    rows = images.flatten(1).double()
    own = torch.cdist(rows, rows).sum(1) / (count - 1)
    error = 2 * float(own.std()) / count**0.5
    return {"diversity": float(own.mean()), "diversity" + HALF_WIDTH: _INTERVAL * error}
