"""What the table and the page of a sweep say about the job that it sweeps: everything else is the same for all jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mfm_ray.config import JobConfig
from mfm_ray.storage import Storage
from mfm_ray.tuning.training_space import finetune_words, train_words
from mfm_ray.tuning.trial import FIDELITY, picture_name
from mfm_ray.tuning.words import sample_words


@dataclass(frozen=True, kw_only=True)
class SweptJob:
    """One job that sweeps can be over.

    fidelity: the metric that rises while a trial goes on; total: name of its sum over all trials; cost: what trials
    are sorted by; unit: of the cost, in words; hidden: beginnings of metrics that are no column of the page; words: of
    a trial's settings, for the job that reruns it; model: words of the model that they need; about: (configuration,
    number of trials) to the page's first paragraph; measured_by: what was the same for all trials; picture: of a
    trial, None where there is none; paragraph: over the pictures; has_curves: whether metrics are shown over fidelity.
    """

    fidelity: str
    total: str
    cost: str
    unit: str
    hidden: tuple[str, ...]
    words: Callable[[Mapping[str, Any]], list[str]]
    model: Callable[[Any], list[str]]
    about: Callable[[Any, int], str]
    measured_by: Callable[[Any], dict[str, Any]]
    picture: Callable[[Storage, int], bytes | None]
    paragraph: str
    has_curves: bool = False


def swept_job(config: JobConfig) -> SweptJob:
    return SWEPT[config.job]  # type: ignore[attr-defined]


def _drawn(run: Storage, index: int) -> bytes | None:
    pictures = run.child("pictures")
    return pictures.read_bytes(picture_name(index)) if pictures.is_file(picture_name(index)) else None


def _grid(run: Storage, index: int) -> bytes | None:
    """The last sample grid of a training."""
    folder = run.child("trainings", f"{index:05d}")
    names = folder.listdir("samples") if folder.is_dir("samples") else []
    return folder.read_bytes(f"samples/{names[-1]}") if names else None


SWEPT: dict[str, SweptJob] = {
    "sample": SweptJob(
        fidelity=FIDELITY,
        total="samples",
        cost="nfe",
        unit="calls",
        hidden=(FIDELITY,),
        words=sample_words,
        model=lambda config: [f"model={config.model}"],
        about=lambda config, count: (
            f"{count} trials of up to {config.num_samples} samples, all from the same noise (seed {config.seed}), so "
            "that they differ by their settings alone."
        ),
        measured_by=lambda config: {"num_samples": config.num_samples, "seed": config.seed},
        picture=_drawn,
        paragraph="The same noise in every row, from the cheapest trial to the dearest.",
    ),
    "train": SweptJob(
        fidelity="step",
        total="steps",
        cost="seconds",
        unit="seconds of training",
        hidden=("step", "loss", "learning_rate"),
        words=train_words,
        model=lambda config: [],
        about=lambda config, count: (
            f"{count} trainings of up to {config.max_steps} steps (experiment {config.experiment}), each measured "
            f"every {config.checkpoint_every} steps on the same held-out rows (at most {config.heldout.num_rows}) with "
            f"the same noise (seed {config.seed})."
        ),
        measured_by=lambda config: {"num_rows": config.heldout.num_rows, "num_draws": config.heldout.num_draws},
        picture=_grid,
        paragraph="Samples of the averaged model by one and by four steps, the same noise in every row.",
        has_curves=True,
    ),
    "finetune": SweptJob(
        fidelity="step",
        total="steps",
        cost="seconds",
        unit="seconds of training",
        hidden=("step", "loss", "learning_rate"),
        words=finetune_words,
        model=lambda config: [f"model={config.model}"],
        about=lambda config, count: (
            f"{count} tunings of up to {config.max_steps} steps of one model towards {config.reward['name']}, each "
            f"measured every {config.checkpoint_every} steps on {config.evaluate_samples} plain samples from the same "
            f"noise (seed {config.seed})."
        ),
        measured_by=lambda config: {"num_samples": config.evaluate_samples, "num_steps": config.evaluate_steps},
        picture=_grid,
        paragraph="Samples before and after tuning, the same noise in every row.",
        has_curves=True,
    ),
}
