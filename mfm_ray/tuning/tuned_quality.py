"""How good a tuned model is: the figures of `jobs.finetune`'s evaluations, of the averaged model at each checkpoint.

All models of a sweep are sampled from the same noise (common random numbers) and start from the same frozen model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mfm_ray.training.evaluation import LOWER_IS_BETTER, EvaluationPlan, SampleScores
from mfm_ray.tuning.front import HALF_WIDTH

_ERROR = "_error"
_INTERVAL = 1.96
# sweeps call the classifier's figure so whatever the job
_RENAMED = {"class_confidence": "confidence"}


@dataclass(frozen=True)
class TunedQuality:
    """Measures a tuned model; travels to the workers (`mfm_ray.training.session.Measure`), read there once."""

    plan: EvaluationPlan

    def __call__(self, flow_map: Any) -> dict[str, float]:
        return in_words_of_sweeps(self._scores.of(flow_map))

    @cached_property
    def _scores(self) -> SampleScores:
        return SampleScores(self.plan)


def in_words_of_sweeps(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures of an evaluation with half of the 95 percent interval in the place of the standard error."""
    found = {}
    for name, value in figures.items():
        metric = name.removesuffix(_ERROR)
        is_error = metric != name and metric in figures
        title = _RENAMED.get(metric, metric) if is_error else _RENAMED.get(name, name)
        found[title + HALF_WIDTH if is_error else title] = _INTERVAL * value if is_error else value
    return found


def figures_of(metrics: list[str]) -> dict[str, str]:
    """What a sweep over fine-tunings can be judged by, and whether it is to be small or large.

    metrics: of an evaluation (`mfm_ray.training.finetune_launch.metrics_of`).
    """
    modes = {_RENAMED.get(name, name): "min" if name in LOWER_IS_BETTER else "max" for name in metrics}
    return {**modes, "seconds": "min"}
