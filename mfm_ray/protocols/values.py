"""protocol=values: how well cheap estimates of the value function agree with rollouts of the memoryless SDE.

V_t(x) = log E[exp r(x_1) | x_t = x] steers everything, and every estimate of it is logsumexp_i r_i - log N over N
posterior draws. What differs is where the draws come from, and what they cost: one or a few steps of the meta flow map,
as many steps of the GLASS ODE of its drift, or the SDE, which counts as the truth. For the Gaussian mixture the value
is known in closed form besides, so that the SDE is judged as well.
"""
# ruff: noqa: RUF009 (`setting` only wraps dataclasses.field, it makes no shared default)

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mfm_ray import metrics
from mfm_ray.data.datasets import GMM_MEANS, GMM_VARIANCE, Split
from mfm_ray.errors import InputError
from mfm_ray.flow_map import FlowMap
from mfm_ray.metrics import Correlation
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.networks.gaussian import GaussianMixture, LinearObservation, isotropic_mixture
from mfm_ray.noise import KeyedNoise, Stream
from mfm_ray.protocols.posterior import Contexts, noisy_contexts
from mfm_ray.protocols.problems import mixture_problem, symmetry_problem
from mfm_ray.protocols.reference_draws import Progress, glass_draws, memoryless_draws
from mfm_ray.protocols.work import Work
from mfm_ray.rewards import WeightedSum
from mfm_ray.settings import setting
from mfm_ray.steering import Reward, score
from mfm_ray.values import ValueEstimate, estimate_value

if TYPE_CHECKING:
    from mfm_ray.protocols.imagenet_values import ImagenetValuesProtocol

IMAGE_REWARDS = ("class_mixture", "symmetry")
LINEAR = "linear_observation"
_ROWS_AT_ONCE = 8192
_CONTEXT_SEED = 5  # added to the seed of the job
_CHEAP, _TRUTH = 1, 2  # noise sources: all cheap estimators share one, so that they differ by their draws' law alone


@dataclass(frozen=True, kw_only=True)
class ValuesProtocol:
    """Settings of the evaluation; the defaults stand in conf/protocol/values.yaml."""

    name: str = setting("the protocol")
    experiment: str = setting("recipe that is trained when no model is given")
    rewards: list[str] = setting("whose value is estimated, of a model of images", choices=IMAGE_REWARDS)
    weights: dict[str, float] = setting("factor of a reward by its name; 1 for those left out", above=0)
    direction: list[float] = setting("a of the observation y = a . x + noise, the reward of the mixture")
    observation: float = setting("y")
    noise: float = setting("standard deviation of the observation's noise", above=0)
    times: list[float] = setting("times of the noised held-out data", above=0, below=1)
    num_contexts: int = setting("noised held-out data at each time", minimum=4)
    num_draws: int = setting("posterior draws of each cheap estimate", minimum=2)
    map_steps: list[int] = setting("inner steps of the meta flow map, each compared", minimum=1)
    glass_steps: list[int] = setting("Euler steps of the GLASS ODE, each compared", minimum=1)
    truth_draws: int = setting("rollouts of the SDE for each context", minimum=4)
    truth_steps: int = setting("steps of each rollout", minimum=1)

    def check(self) -> None:
        """InputError naming the first combination of settings that cannot work."""
        for key in ("rewards", "times", "map_steps"):
            if not getattr(self, key):
                raise InputError(f"protocol.{key}=[]: expected at least one")
        for key in ("rewards", "times", "map_steps", "glass_steps"):
            values = getattr(self, key)
            if len(set(values)) != len(values):
                raise InputError(f"protocol.{key}={values}: expected different ones")
        for name in self.weights:
            if name not in IMAGE_REWARDS:
                raise InputError(f"protocol.weights.{name}: expected one of {', '.join(IMAGE_REWARDS)}")
        if len(self.direction) != len(GMM_MEANS[0]) or not any(self.direction):
            raise InputError(f"protocol.direction={self.direction}: expected {len(GMM_MEANS[0])} numbers, not all 0")


@dataclass(frozen=True)
class ValuesMaterial:
    """What is evaluated: a model and data it was not trained on; the classifier of a model of images."""

    flow_map: FlowMap
    heldout: Split
    classifier: DigitClassifier | None = None


@dataclass(frozen=True)
class Estimator:
    """A source of posterior draws. family: "mfm" or "glass"; steps: network calls a draw."""

    family: str
    steps: int

    @property
    def key(self) -> str:
        return f"{self.family}_{self.steps}"

    @property
    def label(self) -> str:
        name = {"mfm": "Meta flow map", "glass": "GLASS ODE"}[self.family]
        return f"{name}, {self.steps} step{'s' if self.steps > 1 else ''}"


@dataclass(frozen=True)
class Agreement:
    """Of estimates with a truth, over contexts, in nats.

    correlation: Pearson's; ranks: Spearman's; bias and rms: of estimate - truth; within: share of the contexts whose
    truth lies within two standard errors of the estimate; within_both: within two of the difference, which counts the
    truth's own error too.
    """

    correlation: Correlation
    ranks: Correlation
    bias: float
    rms: float
    within: float
    within_both: float


@dataclass(frozen=True)
class EstimatorFigures:
    """What an estimator reached. calls: network rows of one estimate; exact: against the closed form where known."""

    estimator: Estimator
    calls: int
    values: ValueEstimate
    truth: Agreement
    exact: Agreement | None


@dataclass(frozen=True)
class ValueStudy:
    """One reward at one time.

    truth: by the SDE, (contexts,) each; ceiling: the correlation that a second, independent truth would have with it
    (Spearman-Brown from its two halves), about the most that as many independent draws can be expected to reach; exact:
    the closed form, (contexts,); truth_exact: how the SDE agrees with it.
    """

    reward: str
    time: float
    truth: ValueEstimate
    ceiling: float
    exact: Tensor | None
    truth_exact: Agreement | None
    figures: tuple[EstimatorFigures, ...]


@dataclass(frozen=True)
class ValuesEvaluation:
    """All that the report shows. truth_calls: network rows of one true value."""

    protocol: ValuesProtocol | ImagenetValuesProtocol
    rewards: tuple[str, ...]
    studies: tuple[ValueStudy, ...]
    truth_calls: int
    seconds: dict[str, float]

    def of(self, reward: str) -> list[ValueStudy]:
        """The studies of a reward, by time."""
        return [study for study in self.studies if study.reward == reward]

    def metrics(self) -> dict[str, float]:
        """Flat names to numbers; the first reward's without a prefix, others' as rewards.<name>.*."""
        named: dict[str, float] = {"values.truth_calls": self.truth_calls}
        for study in self.studies:
            prefix = "" if study.reward == self.rewards[0] else f"rewards.{study.reward}."
            base = f"{prefix}values.t{study.time:g}"
            named[f"{base}.ceiling"] = study.ceiling
            named[f"{base}.sde.effective_sample_size"] = float(study.truth.effective_sample_size.mean())
            if study.truth_exact is not None:
                named |= _named(f"{base}.sde", study.truth_exact, "_exact")
            for row in study.figures:
                named[f"{base}.{row.estimator.key}.calls"] = row.calls
                named |= _named(f"{base}.{row.estimator.key}", row.truth, "")
                if row.exact is not None:
                    named |= _named(f"{base}.{row.estimator.key}", row.exact, "_exact")
        return named


def _named(base: str, agreement: Agreement, suffix: str) -> dict[str, float]:
    r, ranks = agreement.correlation, agreement.ranks
    return {
        f"{base}.r{suffix}": r.value,
        f"{base}.r_lower{suffix}": r.lower,
        f"{base}.r_upper{suffix}": r.upper,
        f"{base}.rank_r{suffix}": ranks.value,
        f"{base}.rank_r_lower{suffix}": ranks.lower,
        f"{base}.rank_r_upper{suffix}": ranks.upper,
        f"{base}.bias{suffix}": agreement.bias,
        f"{base}.rms{suffix}": agreement.rms,
        f"{base}.within_2se{suffix}": agreement.within,
        f"{base}.within_2se_both{suffix}": agreement.within_both,
    }


def evaluate_values(
    protocol: ValuesProtocol, material: ValuesMaterial, *, seed: int = 0, log: Callable[[str], None] = print
) -> ValuesEvaluation:
    """Runs every estimator at every time. InputError where protocol, model and data do not fit."""
    protocol.check()
    flow_map, heldout = material.flow_map, material.heldout
    rewards, mixture = _rewards(protocol, material)
    if protocol.num_contexts > len(heldout):
        raise InputError(
            f"protocol.num_contexts={protocol.num_contexts}: expected at most {len(heldout)} held-out rows"
        )
    order = KeyedNoise.for_images(seed + _CONTEXT_SEED, len(heldout)).fold_in(Stream.SPLIT).uniform().argsort()
    clean = heldout.data[order[: protocol.num_contexts]]
    work = Work(_planned(protocol), log)
    studies = []
    for number, time in enumerate(protocol.times):
        contexts = noisy_contexts(clean, time, flow_map.space, seed=seed + _CONTEXT_SEED)
        keys = KeyedNoise.for_images(seed, len(clean)).fold_in(number)
        draw = _Draws(flow_map, contexts, keys, rewards, work)
        exact = {name: _exact(reward, mixture, contexts) for name, reward in rewards.items()}
        with work.stage(f"t={time:g} sde", f"true values at t = {time:g}"):
            truth = draw.rewards(protocol.truth_draws, _TRUTH, _rollouts(protocol))
        found = {}
        for estimator in _estimators(protocol):
            with work.stage(f"t={time:g} {estimator.key}", f"{estimator.label}, t = {time:g}"):
                found[estimator] = draw.rewards(protocol.num_draws, _CHEAP, _source(estimator))
        for name in rewards:
            cheap = {estimator: estimate_value(drawn[name]) for estimator, drawn in found.items()}
            studies.append(value_study(name, time, truth[name], cheap, exact[name], protocol.num_draws))
    studies.sort(key=lambda study: list(rewards).index(study.reward))
    return ValuesEvaluation(
        protocol=protocol,
        rewards=tuple(rewards),
        studies=tuple(studies),
        truth_calls=protocol.truth_draws * protocol.truth_steps,
        seconds=work.seconds,
    )


def agreement(estimate: Tensor, standard_error: Tensor, truth: Tensor, truth_error: Tensor | None = None) -> Agreement:
    """Of estimates (N,) and their standard errors with a truth (N,), known exactly when it has no error."""
    difference = estimate.double() - truth.double()
    own = standard_error.double()
    both = own if truth_error is None else torch.hypot(own, truth_error.double())
    return Agreement(
        correlation=metrics.pearson(estimate, truth),
        ranks=metrics.spearman(estimate, truth),
        bias=float(difference.mean()),
        rms=float(difference.square().mean().sqrt()),
        within=float((difference.abs() <= 2 * own).double().mean()),
        within_both=float((difference.abs() <= 2 * both).double().mean()),
    )


def _rewards(protocol: ValuesProtocol, material: ValuesMaterial) -> tuple[dict[str, Reward], GaussianMixture | None]:
    """Rewards by name, and the law of the data where it is known."""
    space = material.flow_map.space
    if space.event_shape == (len(GMM_MEANS[0]),):
        reward = LinearObservation(
            torch.tensor(protocol.direction), observation=protocol.observation, noise=protocol.noise
        )
        return {LINEAR: reward}, isotropic_mixture(torch.tensor(GMM_MEANS), variance=GMM_VARIANCE)
    if space.kind != "image":
        shape = list(space.event_shape)
        raise InputError(f"model: its samples are {space.kind} of shape {shape}, expected images, or [2] (gmm)")
    plain = {name: _image_reward(name, material.classifier) for name in protocol.rewards}
    weighted: dict[str, Reward] = {
        name: WeightedSum(rewards=[reward], weights=[protocol.weights.get(name, 1.0)], name=name)
        for name, reward in plain.items()
    }
    return weighted, None


def _image_reward(name: str, classifier: DigitClassifier | None) -> Reward:
    if name == "symmetry":
        return symmetry_problem().targets[0].reward
    if classifier is None:
        raise InputError(f"protocol.rewards={name}: needs a classifier beside the model; expected symmetry alone")
    return mixture_problem(classifier).targets[0].reward


def _exact(reward: Reward, mixture: GaussianMixture | None, contexts: Contexts) -> Tensor | None:
    if mixture is None:
        return None
    assert isinstance(reward, LinearObservation)
    return reward.value(mixture, contexts.x_t, contexts.t)


_Source = Callable[[FlowMap, Contexts, int, KeyedNoise, Progress], Tensor]
"""Posterior draws (B, K, *event) in model space of contexts, their number and noise."""


@dataclass(frozen=True)
class _Draws:
    """Draws for all contexts of one time, about 8,000 rows at once, of which only the rewards are kept."""

    flow_map: FlowMap
    contexts: Contexts
    keys: KeyedNoise
    score_by: dict[str, Reward]
    work: Work

    @torch.no_grad()
    def rewards(self, num_draws: int, noise: int, source: _Source) -> dict[str, Tensor]:
        """(contexts, num_draws) for each reward, of the same draws; scored as in steering, in data units unclamped."""
        keys, count = self.keys.fold_in(noise), len(self.contexts.x_t)
        parts: dict[str, list[Tensor]] = {name: [] for name in self.score_by}
        at_once = max(1, _ROWS_AT_ONCE // num_draws)
        for begin in range(0, count, at_once):
            part = slice(begin, min(begin + at_once, count))
            contexts = Contexts(self.contexts.x_t[part], self.contexts.time)
            drawn = source(self.flow_map, contexts, num_draws, keys[part], self.work.advance)
            samples = self.flow_map.space.to_data_units(drawn).flatten(0, 1)
            for name, reward in self.score_by.items():
                parts[name].append(score(reward, samples).unflatten(0, drawn.shape[:2]))
        return {name: torch.cat(rows) for name, rows in parts.items()}


def _source(estimator: Estimator) -> _Source:
    def mapped(flow_map: FlowMap, at: Contexts, num_draws: int, noise: KeyedNoise, progress: Progress) -> Tensor:
        drawn = flow_map.posterior_draws(at.x_t, at.t, num_draws=num_draws, num_steps=estimator.steps, generator=noise)
        progress(len(at.x_t) * num_draws * estimator.steps)
        return drawn

    def integrated(flow_map: FlowMap, at: Contexts, num_draws: int, noise: KeyedNoise, progress: Progress) -> Tensor:
        return glass_draws(
            flow_map,
            at.x_t,
            at.t,
            num_draws=num_draws,
            num_steps=estimator.steps,
            generator=noise,
            progress=progress,
        )

    return mapped if estimator.family == "mfm" else integrated


def _rollouts(protocol: ValuesProtocol) -> _Source:
    def rollouts(flow_map: FlowMap, at: Contexts, num_draws: int, noise: KeyedNoise, progress: Progress) -> Tensor:
        return memoryless_draws(
            flow_map,
            at.x_t,
            at.t,
            num_draws=num_draws,
            num_steps=protocol.truth_steps,
            generator=noise,
            progress=progress,
        )

    return rollouts


def _estimators(protocol: ValuesProtocol) -> Iterator[Estimator]:
    for family, lengths in (("mfm", protocol.map_steps), ("glass", protocol.glass_steps)):
        yield from (Estimator(family, steps) for steps in sorted(lengths))


def _planned(protocol: ValuesProtocol) -> dict[str, float]:
    """Network rows of each stage."""
    planned = {}
    for time in protocol.times:
        planned[f"t={time:g} sde"] = float(protocol.num_contexts * protocol.truth_draws * protocol.truth_steps)
        for estimator in _estimators(protocol):
            rows = protocol.num_contexts * protocol.num_draws * estimator.steps
            planned[f"t={time:g} {estimator.key}"] = float(rows)
    return planned


def value_study(
    name: str,
    time: float,
    rewards: Tensor,
    cheap: dict[Estimator, ValueEstimate],
    exact: Tensor | None,
    num_draws: int,
) -> ValueStudy:
    """How estimates agree with the value by the SDE. rewards: of its draws, (contexts, truth_draws)."""
    truth = estimate_value(rewards)

    def against_exact(values: ValueEstimate) -> Agreement | None:
        return None if exact is None else agreement(values.value, values.standard_error, exact)

    figures = tuple(
        EstimatorFigures(
            estimator=estimator,
            calls=num_draws * estimator.steps,
            values=values,
            truth=agreement(values.value, values.standard_error, truth.value, truth.standard_error),
            exact=against_exact(values),
        )
        for estimator, values in cheap.items()
    )
    return ValueStudy(name, time, truth, _ceiling(rewards), exact, against_exact(truth), figures)


def _ceiling(rewards: Tensor) -> float:
    half = rewards.shape[1] // 2
    first, second = (estimate_value(part).value for part in (rewards[:, :half], rewards[:, half : 2 * half]))
    r = max(0.0, metrics.pearson(first, second).value)
    return 2 * r / (1 + r)


def values_parquet(evaluation: ValuesEvaluation) -> bytes:
    """One row for each reward, time and estimator with the value of every context; the SDE is one of them."""
    sink = pa.BufferOutputStream()
    rows = [row for study in evaluation.studies for row in _parquet_rows(evaluation, study)]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


_AGREEMENT = (
    "r",
    "r_lower",
    "r_upper",
    "rank_r",
    "rank_r_lower",
    "rank_r_upper",
    "bias",
    "rms",
    "within_2se",
    "within_2se_both",
)
SCHEMA = pa.schema(
    [
        ("reward", pa.string()),
        ("time", pa.float64()),
        ("estimator", pa.string()),
        ("steps", pa.int64()),
        ("calls", pa.int64()),
        ("ceiling", pa.float64()),
        *((name, pa.float64()) for name in _AGREEMENT),
        *((f"{name}_exact", pa.float64()) for name in _AGREEMENT),
        *((name, pa.list_(pa.float64())) for name in ("value", "standard_error", "effective_sample_size")),
        ("exact", pa.list_(pa.float64())),
    ]
)


def _parquet_rows(evaluation: ValuesEvaluation, study: ValueStudy) -> Iterator[dict[str, object]]:
    sources: list[tuple[str, int, int, ValueEstimate, Agreement | None, Agreement | None]] = [
        ("sde", evaluation.protocol.truth_steps, evaluation.truth_calls, study.truth, None, study.truth_exact)
    ]
    sources += [
        (row.estimator.family, row.estimator.steps, row.calls, row.values, row.truth, row.exact)
        for row in study.figures
    ]
    for family, steps, calls, values, against_truth, against_exact in sources:
        named = {} if against_truth is None else _named("", against_truth, "")
        named |= {} if against_exact is None else _named("", against_exact, "_exact")
        yield {
            "reward": study.reward,
            "time": study.time,
            "estimator": family,
            "steps": steps,
            "calls": calls,
            "ceiling": study.ceiling,
            **{key.removeprefix("."): value for key, value in named.items()},
            "value": values.value.tolist(),
            "standard_error": values.standard_error.tolist(),
            "effective_sample_size": values.effective_sample_size.tolist(),
            "exact": None if study.exact is None else study.exact.tolist(),
        }
