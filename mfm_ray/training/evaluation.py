"""Evaluation of a model while it is tuned, in an actor of its own: training hands over weights and goes on.

Rank 0 submits averaged weights (`Evaluations`), the actor (`Evaluator`) draws plain samples and scores them, and the
figures join the next line of the history as `evaluation.*`, with the step that they are of.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import safetensors.torch
import torch
from torch import Tensor

from mfm_ray.data.shards import load_split
from mfm_ray.finetuning import Adapter
from mfm_ray.flow_map import FlowMap
from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.latent_models import Decoding
from mfm_ray.metrics import (
    class_confidence,
    class_probabilities,
    classifier_features,
    frechet_distance,
    mean_pairwise_distance,
)
from mfm_ray.networks.tuned import TunedFlowMap
from mfm_ray.noise import KeyedNoise, Stream
from mfm_ray.pretrained import CLASSIFIER_CONFIG, load_classifier, load_flow_map
from mfm_ray.samplers import sample
from mfm_ray.steering import Reward, score
from mfm_ray.storage import Storage
from mfm_ray.training.finetuning import MakeReward
from mfm_ray.training.tuned_model import BEST, BEST_FIGURES, BEST_WEIGHTS

LOWER_IS_BETTER = ("frechet_distance", "drift_change")
_PENDING = 2
_CLEARLY = 4.0


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated and how; travels to the actor.

    base: the model that is tuned; decoding: how pictures are made of its latents; adapter: which of its weights; data:
    what samples are compared with, None for nothing; judges: by name, not tuned towards. best_metric: decides which
    weights are kept as the best, None for none.
    """

    base: Storage
    decoding: Decoding
    adapter: Adapter
    run: Storage
    data: Storage | None
    make_reward: MakeReward
    judges: Mapping[str, Reward]
    num_samples: int
    num_steps: int
    cfg_scale: float | None
    labelled: bool
    seed: int
    num_cpus: float
    best_metric: str | None


class SampleScores:
    """Scores plain samples of tuned models, the same noise for all of them."""

    def __init__(self, plan: EvaluationPlan) -> None:
        self._plan = plan
        self._reward = plan.make_reward()
        self._judge = load_classifier(plan.base) if plan.base.is_file(CLASSIFIER_CONFIG) else None
        self._data = None if plan.data is None else load_split(plan.data, "train").data

    def of(self, flow_map: TunedFlowMap) -> dict[str, float]:
        """Figures by name; those that are means with their standard error as `<name>_error`."""
        plan, space, device = self._plan, flow_map.space, next(flow_map.parameters()).device
        classes = flow_map.num_classes
        label = torch.arange(plan.num_samples, device=device) % classes if plan.labelled and classes else None
        samples = sample(
            flow_map,
            num_samples=plan.num_samples,
            num_steps=plan.num_steps,
            seed=plan.seed,
            label=label,
            cfg_scale=plan.cfg_scale,
        )
        assert samples.states is not None
        drawn, images = samples.images, samples.images.cpu()
        figures = _scores("reward", score(_on(self._reward, device), drawn))
        for name, judge in plan.judges.items():
            figures |= _scores(f"judge.{name}", score(_on(judge, device), drawn))
        figures["diversity"] = mean_pairwise_distance(images)
        if self._judge is not None:
            figures |= _scores("class_confidence", class_confidence(class_probabilities(self._judge, images)))
        if self._data is not None and space.kind != "latent":  # stored latents are not what samples are
            rows = space.clamp(self._data[: plan.num_samples]) if self._data.shape[1:] == images.shape[1:] else None
            if rows is not None:
                figures["frechet_distance"] = frechet_distance(self._features(images), self._features(rows))
        figures["drift_change"] = self._drift_change(flow_map, samples.states, label)
        return figures

    def _features(self, images: Tensor) -> Tensor:
        return images.flatten(1) if self._judge is None else classifier_features(self._judge, images)

    @torch.no_grad()
    def _drift_change(self, flow_map: TunedFlowMap, x1: Tensor, label: Tensor | None) -> float:
        """Mean squared difference of tuned and frozen drift, a dimension, at states around the samples."""
        noise = KeyedNoise.for_images(self._plan.seed, len(x1), device=x1.device)
        t = 0.01 + 0.98 * noise.fold_in(Stream.TIME).uniform()
        x_t = LinearInterpolant().sample(noise.fold_in(Stream.OUTER).normal(*x1.shape[1:]), x1, t).x_t
        ours, theirs = (
            each.drift(x_t, t, label=label, cfg_scale=self._plan.cfg_scale) for each in (flow_map.tuned, flow_map.base)
        )
        return float((ours - theirs).square().mean())


def _on(reward: Any, device: torch.device) -> Reward:
    """The reward where the samples are. In a training worker it may be the very object that is tuned towards."""
    return reward.to(device) if hasattr(reward, "to") else reward


class Evaluator:
    """Draws and scores; keeps the best weights below the run's folder."""

    def __init__(self, plan: EvaluationPlan) -> None:
        torch.set_num_threads(max(1, int(plan.num_cpus)))
        self._plan = plan
        self._base = load_flow_map(plan.base, autoencoder=plan.decoding)
        self._scores = SampleScores(plan)
        best = plan.run.child(BEST)
        self._best = best.read_json(BEST_FIGURES) if best.is_file(BEST_FIGURES) else None

    def ready(self) -> bool:
        return True

    def evaluate(self, step: int, weights: dict[str, Tensor] | None) -> dict[str, float]:
        """Figures of the model with these weights of its tuned drift, those of the frozen one for None."""
        tuned = copy.deepcopy(self._base) if weights is None else self._plan.adapter.merged(self._base, weights)
        figures = {"step": float(step), **self._scores.of(TunedFlowMap(self._base, tuned.eval().requires_grad_(False)))}
        self._keep_if_best(figures, tuned)
        return figures

    def forget_after(self, step: int) -> None:
        """The best weights do not count when they are of a step that a resumed run has not reached."""
        if self._best is not None and self._best["step"] > step:
            self._plan.run.delete(BEST)
            self._best = None

    def _keep_if_best(self, figures: dict[str, float], tuned: FlowMap) -> None:
        metric = self._plan.best_metric
        if metric is None or (self._best is not None and not is_better(figures, self._best, metric)):
            return
        best = self._plan.run.child(BEST)
        best.write_bytes(BEST_WEIGHTS, safetensors.torch.save(dict(tuned.state_dict())))
        best.write_json(BEST_FIGURES, figures)
        self._best = figures


def _scores(name: str, values: Tensor) -> dict[str, float]:
    """Mean and its standard error."""
    values = values.double()
    return {name: float(values.mean()), f"{name}_error": float(values.std() / math.sqrt(len(values)))}


def is_better(figures: Mapping[str, float], than: Mapping[str, float], metric: str) -> bool:
    """Whether figures have the better value of a metric; nothing is better than what is as good."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    return sign * figures[metric] > sign * than[metric]


def start_evaluator(plan: EvaluationPlan) -> Any:
    """Handle of the actor, which outlives the training workers and starts again when its node dies."""
    actor = ray.remote(Evaluator).options(num_cpus=plan.num_cpus, max_restarts=-1, max_task_retries=1)
    return actor.remote(plan)


def hacked(history: Sequence[Mapping[str, float]]) -> str | None:
    """The judge that falls clearly while the reward rises, None while there is none.

    Clearly: by more than four standard errors of the difference below the best it was, where the reward was lower than
    now by as many. history: figures of evaluations in order.
    """
    if not history:
        return None
    now = history[-1]
    for name in (key for key in now if key.startswith("judge.") and f"{key}_error" in now):
        best = max(history, key=lambda figures: figures[name])
        if _difference(best, now, name) > _CLEARLY and _difference(now, best, "reward") > _CLEARLY:
            return name.removeprefix("judge.")
    return None


def _difference(a: Mapping[str, float], b: Mapping[str, float], name: str) -> float:
    """a - b in standard errors."""
    error = math.hypot(a[f"{name}_error"], b[f"{name}_error"])
    gap = a[name] - b[name]
    return gap / error if error > 0 else math.copysign(math.inf, gap) if gap else 0.0


class Evaluations:
    """Rank 0's side: what was submitted and is not told yet. Never waits for the actor but at the end."""

    def __init__(self, actor: Any, *, start: int) -> None:
        self._actor = actor
        self._pending: list[Any] = []
        self.history: list[dict[str, float]] = []
        self.skipped = 0
        actor.forget_after.remote(start)

    def submit(self, step: int, weights: Mapping[str, Tensor] | None) -> None:
        """Hand over weights; left out, and counted, while two evaluations wait."""
        if len(self._pending) >= _PENDING:
            self.skipped += 1
            return
        self._pending.append(self._actor.evaluate.remote(step, weights))

    def collect(self, *, wait: bool) -> list[dict[str, float]]:
        """Figures that have come, by metric name. An evaluation that failed raises here."""
        found = []
        while self._pending:
            done, _ = ray.wait(self._pending[:1], timeout=None if wait else 0)
            if not done:
                break
            self.history.append(ray.get(self._pending.pop(0)))
            found.append({f"evaluation.{name}": value for name, value in self.history[-1].items()})
        if found and self.skipped:
            found[-1]["evaluation.skipped"] = float(self.skipped)
        return found
