"""protocol=finetune_digits: what plain samples of a tuned model reach of what steering reaches, and who pays how much.

Each reward is steered for (MFM-G with many draws) and tuned for; then the tuned model is sampled as the base model is,
unsteered, at the same cost. Beside the reward stand what tuning may cost: classes that are lost, images that are no
digits any more, samples that are all alike.
"""
# ruff: noqa: RUF009 (`setting` only wraps dataclasses.field, it makes no shared default)

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from mfm_ray import metrics
from mfm_ray.errors import InputError
from mfm_ray.finetuning import DivergedError, build_method
from mfm_ray.finetuning.tuner import Progress, Recipe, tune
from mfm_ray.flow_map import FlowMap
from mfm_ray.metrics import Mean
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.protocols import problems
from mfm_ray.protocols.comparison import Problem
from mfm_ray.protocols.digits import Material
from mfm_ray.protocols.finetune_gmm import FORMS, TITLES
from mfm_ray.protocols.work import Work
from mfm_ray.samplers import Samples, sample
from mfm_ray.settings import setting
from mfm_ray.steering import GradientGuidance, Reward, Steering

REWARDS = ("symmetry", "brightness", "class_mixture", "combination", "masked")
SHOWN = 16
_TARGET_SEED, _STEERING_SEED = 2, 3
_BATCH_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class FinetuneDigitsProtocol:
    """Settings of the evaluation; the defaults stand in conf/protocol/finetune_digits.yaml."""

    name: str = setting("the protocol")
    experiment: str = setting("recipe that is trained when no model is given")
    rewards: list[str] = setting("tuned for, each", choices=REWARDS)
    method: str = setting("form that every reward is tuned with", choices=tuple(FORMS))
    rivals: list[str] = setting("further forms, tuned for the first reward", choices=tuple(FORMS))
    max_seconds: float = setting("of each tuning", above=0)
    batch_size: int = setting("rows of a tuning step", minimum=1)
    learning_rate: float = setting("of Adam, at the end of the warm-up", above=0)
    num_steps: int = setting("steps of all samplers", minimum=1)
    steering_draws: int = setting("posterior draws a step of the steering that tuning is held against", minimum=1)
    num_samples: int = setting("samples of each model and method; a multiple of 4", minimum=8)

    def check(self) -> None:
        """InputError naming the first combination of settings that cannot work."""
        if not self.rewards:
            raise InputError(f"protocol.rewards=[]: expected some of {', '.join(REWARDS)}")
        if self.method in self.rivals:
            raise InputError(f"protocol.rivals={self.rivals}: {self.method} is protocol.method already; leave it out")

    def recipe(self) -> Recipe:
        return Recipe(
            max_calls=2**62,
            max_seconds=self.max_seconds,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
        )


@dataclass(frozen=True)
class Sampled:
    """Samples of a model or a method. reward: mean with its interval; frequencies: share of each class as the
    classifier sees it; confidence: its mean; diversity: mean distance of two samples; frechet: distance of the
    classifier's features to held-out images; classes: how many have at least 2 percent of the samples.
    """

    label: str
    family: str
    nfe: float
    reward: Mean
    frequencies: Tensor
    confidence: float
    diversity: float
    frechet: float
    images: Tensor

    @property
    def classes(self) -> int:
        return int((self.frequencies >= 0.02).sum())


@dataclass(frozen=True)
class TuningRun:
    """A tuning for a reward and what its samples are."""

    form: str
    seconds: float
    history: list[Progress]
    sampled: Sampled | None
    error: str | None = None


@dataclass(frozen=True)
class RewardStudy:
    """One reward: unsteered, steered and tuned samples."""

    problem: Problem
    base: Sampled
    steered: Sampled
    runs: tuple[TuningRun, ...]

    def share_of_gain(self, run: TuningRun) -> float:
        """(tuned - base) / (steered - base) of the mean rewards."""
        if run.sampled is None:
            return float("nan")
        gain = self.steered.reward.value - self.base.reward.value
        return (run.sampled.reward.value - self.base.reward.value) / gain


@dataclass(frozen=True)
class FinetuneDigitsEvaluation:
    """All that the report shows."""

    protocol: FinetuneDigitsProtocol
    data: str
    studies: tuple[RewardStudy, ...]
    seconds: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """Flat figures by reward and form."""
        named: dict[str, float] = {}
        for study in self.studies:
            base = f"rewards.{study.problem.name}"
            for key, sampled in (("base", study.base), ("steered", study.steered)):
                named |= _flat(f"{base}.{key}", sampled)
            for run in study.runs:
                name = f"{base}.{run.form}"
                named[f"{name}.seconds"] = run.seconds
                named[f"{name}.steps"] = len(run.history)
                if run.sampled is not None:
                    named |= _flat(name, run.sampled)
                    named[f"{name}.share_of_gain"] = study.share_of_gain(run)
        return named


def _flat(name: str, sampled: Sampled) -> dict[str, float]:
    return {
        f"{name}.reward": sampled.reward.value,
        f"{name}.reward_half_width": sampled.reward.half_width,
        f"{name}.nfe": sampled.nfe,
        f"{name}.classes": sampled.classes,
        f"{name}.confidence": sampled.confidence,
        f"{name}.diversity": sampled.diversity,
        f"{name}.frechet": sampled.frechet,
    }


def evaluate_finetune_digits(
    protocol: FinetuneDigitsProtocol, material: Material, *, seed: int = 0, log: Callable[[str], None] = print
) -> FinetuneDigitsEvaluation:
    """Steers and tunes for every reward, and samples what came of it."""
    tunings = {f"{name} {form}": protocol.max_seconds for name, form in _planned(protocol)}
    sampling = {f"{name} samples": 0.2 * protocol.max_seconds for name in protocol.rewards}
    work = Work({**tunings, **sampling}, log)
    studies = tuple(
        _study(name, protocol, material, seed, work, first=index == 0) for index, name in enumerate(protocol.rewards)
    )
    return FinetuneDigitsEvaluation(protocol, material.name, studies, work.seconds)


def _planned(protocol: FinetuneDigitsProtocol) -> Iterator[tuple[str, str]]:
    for index, name in enumerate(protocol.rewards):
        yield name, protocol.method
        if index == 0:
            yield from ((name, rival) for rival in protocol.rivals)


def _study(
    name: str, protocol: FinetuneDigitsProtocol, material: Material, seed: int, work: Work, *, first: bool
) -> RewardStudy:
    problem = _problem(name, material, seed)
    reward = problem.targets[0].reward
    measure = _Measure(protocol, material, reward, seed + _STEERING_SEED)
    with work.stage(f"{name} samples", f"{problem.title}: unsteered and steered samples"):
        base = measure(material.flow_map, "the model, unsteered", "unsteered")
        label = f"MFM-G, {protocol.steering_draws} draws"
        steered = measure(
            material.flow_map, label, "mfm_g", GradientGuidance(reward, num_draws=protocol.steering_draws)
        )
    runs = []
    for form in (protocol.method, *(protocol.rivals if first else ())):
        with work.stage(f"{name} {form}", f"{problem.title}: tuning by {TITLES[form]}"):
            runs.append(_run(form, protocol, material, reward, measure, seed, work))
    return RewardStudy(problem, base, steered, tuple(runs))


def _run(
    form: str,
    protocol: FinetuneDigitsProtocol,
    material: Material,
    reward: Reward,
    measure: _Measure,
    seed: int,
    work: Work,
) -> TuningRun:
    space, history = material.flow_map.space, list[Progress]()
    began = time.monotonic()

    def on_step(progress: Progress) -> None:
        work.advance(progress.seconds - (history[-1].seconds if history else 0.0))
        history.append(progress)

    try:
        result = tune(
            material.flow_map,
            reward,
            data=space.to_model_space(material.train.data),
            labels=material.train.labels,
            method=build_method(FORMS[form]),
            recipe=protocol.recipe(),
            seed=seed,
            on_step=on_step,
        )
    except DivergedError as error:  # a result too, which the table says
        return TuningRun(form, time.monotonic() - began, history, None, str(error))
    seconds = time.monotonic() - began
    return TuningRun(form, seconds, history, measure(result.flow_map, f"tuned, {TITLES[form]}", "mfm_gf"))


class _Measure:
    """Samples a model and says what they are."""

    def __init__(self, protocol: FinetuneDigitsProtocol, material: Material, reward: Reward, seed: int) -> None:
        self._protocol, self._material, self._reward, self._seed = protocol, material, reward, seed

    def __call__(self, flow_map: FlowMap, label: str, family: str, steering: Steering | None = None) -> Sampled:
        drawn = sample(
            flow_map,
            num_samples=self._protocol.num_samples,
            steering=steering,
            num_steps=self._protocol.num_steps,
            seed=self._seed,
            judges={"reward": self._reward},
            batch_size=_BATCH_ROWS,
        )
        return self._sampled(drawn, label, family)

    def _sampled(self, drawn: Samples, label: str, family: str) -> Sampled:
        classifier: DigitClassifier = self._material.classifier
        images = drawn.images.clamp(0, 1)
        probabilities = metrics.class_probabilities(classifier, images)
        features = metrics.classifier_features(classifier, images)
        heldout = metrics.classifier_features(classifier, self._material.heldout.data)
        return Sampled(
            label=label,
            family=family,
            nfe=drawn.nfe,
            reward=metrics.mean_with_interval(drawn.judges["reward"]),
            frequencies=metrics.class_frequencies(probabilities),
            confidence=float(metrics.class_confidence(probabilities).mean()),
            diversity=float(metrics.mean_pairwise_distance(images)),
            frechet=metrics.frechet_distance(features, heldout),
            images=images[:SHOWN],
        )


def _problem(name: str, material: Material, seed: int) -> Problem:
    if name == "masked":
        row = problems.choose_targets(material.heldout, 1, seed=seed + _TARGET_SEED)
        return problems.masked_problem(material.heldout.data[row], material.heldout.labels[row], seed=seed)
    makers: dict[str, Callable[[], Problem]] = {
        "symmetry": problems.symmetry_problem,
        "brightness": lambda: problems.brightness_problem(material.train),
        "class_mixture": lambda: problems.mixture_problem(material.classifier),
        "combination": lambda: problems.combination_problem(material.classifier, material.train),
    }
    return makers[name]()


def finetune_digits_parquet(evaluation: FinetuneDigitsEvaluation) -> bytes:
    """One row a set of samples (part "samples") and a step of each tuning (part "step")."""
    rows = [row for study in evaluation.studies for row in _rows(study)]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _rows(study: RewardStudy) -> Iterator[Mapping[str, Any]]:
    named = [("base", study.base), ("steered", study.steered)]
    named += [(run.form, run.sampled) for run in study.runs if run.sampled is not None]
    for key, sampled in named:
        yield {
            "part": "samples",
            "reward_name": study.problem.name,
            "of": key,
            "nfe": sampled.nfe,
            "mean_reward": sampled.reward.value,
            "half_width": sampled.reward.half_width,
            "confidence": sampled.confidence,
            "diversity": sampled.diversity,
            "frechet": sampled.frechet,
            "frequencies": sampled.frequencies.tolist(),
            "images": sampled.images.flatten().tolist(),
        }
    for run in study.runs:
        for progress in run.history[:: max(1, len(run.history) // 200)]:
            yield {"part": "step", "reward_name": study.problem.name, "of": run.form, **vars(progress)}
