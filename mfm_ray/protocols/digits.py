"""protocol=digits: what a meta flow map of handwritten digits can do, measured and pictured.

Library code: `jobs.evaluate` and `jobs.demo` only bring the model, the data and a place for the report.
"""
# ruff: noqa: RUF009 (`setting` only wraps dataclasses.field, it makes no shared default)

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_ray import metrics
from mfm_ray.data.datasets import Split
from mfm_ray.errors import InputError
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.protocols import comparison, posterior, problems
from mfm_ray.protocols.comparison import Method, Problem, Study
from mfm_ray.protocols.work import Work
from mfm_ray.samplers import refine
from mfm_ray.settings import setting
from mfm_ray.steering import Reward, Steering

SHOWN = 8
"""Pictures of one method in a row of the report."""
MASKED = "masked"
PROBLEMS = (MASKED, "symmetry", "brightness", "class_mixture", "combination")
_GALLERY_SIZE = 40
_CONFIDENCE_SAMPLES = 512
_POOL_SEED, _TARGET_SEED, _STEERING_SEED, _CONTEXT_SEED = 1, 2, 3, 4  # added to the seed of the job


@dataclass(frozen=True, kw_only=True)
class DigitsProtocol:
    """Settings of the evaluation; the defaults stand in conf/protocol/digits.yaml."""

    name: str = setting("the protocol")
    experiment: str = setting("recipe that is trained when no model is given")
    num_targets: int = setting("held-out digits whose upper half is observed", minimum=1)
    num_steps: int = setting("steps of every sampler that is compared", minimum=1)
    dynamics: str = setting("of the steered samplers; the pool of Best-of-n is made by the ODE", choices=("ode", "sde"))
    samples_per_target: int = setting("steered samples of each held-out digit; a multiple of 4", minimum=4)
    samples_per_reward: int = setting("steered samples for each other reward; a multiple of 4", minimum=4)
    num_draws: list[int] = setting("posterior draws a step of MFM-G, each compared; 1 is always among them", minimum=1)
    num_draws_gradient_free: int = setting("posterior draws a step of MFM-GF", minimum=2)
    num_draws_resampling: int = setting("posterior draws a step of posterior resampling", minimum=2)
    resampling_steps: int = setting("steps of posterior resampling, which needs few", minimum=1)
    pool_size: int = setting("unsteered samples that all rewards and all n of Best-of-n share", minimum=1)
    best_of: list[int] = setting("the n of Best-of-n", minimum=1)
    rewards: list[str] = setting("which comparisons to make", choices=PROBLEMS)
    gallery_times: list[float] = setting("times of the noisy digit whose posterior is drawn", minimum=0, maximum=0.99)
    gallery_draws: int = setting("posterior draws pictured at each time", minimum=1)
    posterior_times: list[float] = setting("times at which draws are compared with the ODE's", minimum=0, maximum=0.99)
    posterior_contexts: int = setting("noisy digits at each of these times", minimum=1)
    posterior_draws: int = setting("draws for each noisy digit", minimum=2)
    posterior_ode_steps: int = setting("steps of the fine ODE, two calls each", minimum=1)

    def check(self) -> None:
        """InputError naming the first combination of settings that cannot work."""
        for key in ("samples_per_target", "samples_per_reward"):
            if getattr(self, key) % 4:
                raise InputError(f"protocol.{key}={getattr(self, key)}: expected a multiple of 4")
        if 1 not in self.num_draws or len(set(self.num_draws)) != len(self.num_draws):
            raise InputError(f"protocol.num_draws={self.num_draws}: expected different numbers with 1 among them")
        if not self.best_of or max(self.best_of) > self.pool_size:
            raise InputError(
                f"protocol.best_of={self.best_of}: expected numbers of at most protocol.pool_size={self.pool_size}"
            )
        if MASKED not in self.rewards:
            raise InputError(f"protocol.rewards={self.rewards}: expected {MASKED} among them")


@dataclass(frozen=True)
class Material:
    """What is evaluated: a model of labelled images, the judge, and the data it was trained on and not trained on."""

    flow_map: FlowMap
    classifier: DigitClassifier
    train: Split
    heldout: Split


@dataclass(frozen=True)
class Gallery:
    """Images (N, *event) in data units by kind, and the judge's mean confidence in many of that kind."""

    images: dict[str, Tensor]
    confidence: dict[str, float]


@dataclass(frozen=True)
class PosteriorGallery:
    """A held-out digit (*event), its noisy versions (T, *event) and their draws (T, K, *event), in data units."""

    clean: Tensor
    times: list[float]
    noisy: Tensor
    draws: Tensor


@dataclass(frozen=True)
class DigitsEvaluation:
    """All that the report shows."""

    protocol: DigitsProtocol
    gallery: Gallery
    posterior_gallery: PosteriorGallery
    gaps: tuple[posterior.PosteriorGap, ...]
    studies: tuple[Study, ...]
    seconds: dict[str, float]

    def study(self, name: str) -> Study:
        return next(study for study in self.studies if study.problem.name == name)

    def metrics(self) -> dict[str, float]:
        """Flat names to numbers; the masked observation's without a prefix, other rewards' as rewards.<name>.*."""
        figures = _gap_metrics(self.gaps)
        for kind, confidence in self.gallery.confidence.items():
            figures[f"{kind}_confidence"] = confidence
        largest = max(self.protocol.best_of)
        for study in self.studies:
            prefix = "" if study.problem.name == MASKED else f"rewards.{study.problem.name}."
            figures |= {f"{prefix}{key}": value for key, value in _study_metrics(study, largest).items()}
        return figures


def evaluate_digits(
    protocol: DigitsProtocol, material: Material, *, seed: int, log: Callable[[str], None]
) -> DigitsEvaluation:
    """Runs the protocol. InputError where protocol and data do not fit; about a minute and a half on two cores."""
    protocol.check()
    _check_material(protocol, material)
    work = Work(_planned(protocol), log)
    with work.stage("gallery", "real digits beside samples of one and four steps"):
        gallery = _gallery(material, seed)
        rows = problems.choose_targets(material.heldout, protocol.num_targets, seed=seed + _TARGET_SEED)
        posterior_gallery = _posterior_gallery(protocol, material, material.heldout.data[rows[0]], seed)
    studies = tuple(_studies(protocol, material, rows, work, seed))
    gaps = tuple(_gaps(protocol, material, work, seed))
    return DigitsEvaluation(protocol, gallery, posterior_gallery, gaps, studies, dict(work.seconds))


def make_problem(name: str, material: Material, rows: Tensor, *, seed: int) -> Problem:
    """A comparison by its name; `rows` are the held-out images of the masked observation."""
    if name == MASKED:
        return problems.masked_problem(material.heldout.data[rows], material.heldout.labels[rows], seed=seed)
    if name == "symmetry":
        return problems.symmetry_problem()
    if name == "brightness":
        return problems.brightness_problem(material.train)
    if name == "class_mixture":
        return problems.mixture_problem(material.classifier)
    return problems.combination_problem(material.classifier, material.train)


def _studies(protocol: DigitsProtocol, material: Material, rows: Tensor, work: Work, seed: int) -> Iterator[Study]:
    flow_map, judge, steps = material.flow_map, material.classifier, protocol.num_steps
    with work.stage("pool", f"{protocol.pool_size:,} unsteered samples for all Best-of-n"):
        done = 0

        def progress(images: int, _: int) -> None:
            nonlocal done
            work.advance((images - done) * steps)
            done = images

        pool = comparison.make_pool(
            flow_map, judge, size=protocol.pool_size, num_steps=steps, seed=seed + _POOL_SEED, progress=progress
        )
    steered = _steered_methods(protocol)
    for name in protocol.rewards:
        problem = make_problem(name, material, rows, seed=seed + _TARGET_SEED)
        count = len(problem.targets)
        per_target = protocol.samples_per_target if name == MASKED else protocol.samples_per_reward
        with work.stage(name, f"steering by {name}"):
            scores = [comparison.score_unsteered(problem, pool, shown=SHOWN)]
            scores += [comparison.score_best_of(problem, pool, n, shown=SHOWN) for n in sorted(protocol.best_of)]
            for method, steering in steered.items():
                scores.append(
                    comparison.score_steered(
                        problem,
                        method,
                        steering,
                        flow_map,
                        judge,
                        samples_per_target=per_target,
                        num_steps=steps,
                        dynamics=protocol.dynamics,
                        seed=seed + _STEERING_SEED,
                        shown=SHOWN,
                    )
                )
                work.advance(count * per_target * _rows_a_sample(method, protocol))
        yield Study(problem, tuple(scores), comparison.tilted_law(problem, pool))


def _gallery(material: Material, seed: int) -> Gallery:
    samples = {
        "one_step": refine(material.flow_map, num_samples=_CONFIDENCE_SAMPLES, num_steps=1, seed=seed),
        "four_step": refine(material.flow_map, num_samples=_CONFIDENCE_SAMPLES, num_steps=4, seed=seed),
    }
    images = {"real": material.heldout.data, **samples}
    confidence = {
        kind: float(metrics.class_confidence(metrics.class_probabilities(material.classifier, batch)).mean())
        for kind, batch in images.items()
    }
    return Gallery({kind: batch[:_GALLERY_SIZE] for kind, batch in images.items()}, confidence)


def _posterior_gallery(protocol: DigitsProtocol, material: Material, clean: Tensor, seed: int) -> PosteriorGallery:
    space, times = material.flow_map.space, sorted(protocol.gallery_times)
    noisy, draws = [], []
    for time in times:
        contexts = posterior.noisy_contexts(clean.unsqueeze(0), time, space, seed=seed + _CONTEXT_SEED)
        noisy.append(space.clamp(space.to_data_units(contexts.x_t[0])))
        draws.append(
            posterior.gallery_draws(material.flow_map, contexts, num_draws=protocol.gallery_draws, seed=seed)[0]
        )
    return PosteriorGallery(clean, times, torch.stack(noisy), torch.stack(draws))


def _gaps(protocol: DigitsProtocol, material: Material, work: Work, seed: int) -> Iterator[posterior.PosteriorGap]:
    clean = material.heldout.data[-protocol.posterior_contexts :]
    for time in sorted(protocol.posterior_times):
        with work.stage(f"posterior {time:g}", f"posterior draws against a fine ODE at t = {time:g}"):
            contexts = posterior.noisy_contexts(clean, time, material.flow_map.space, seed=seed + _CONTEXT_SEED)
            yield posterior.posterior_gap(
                material.flow_map,
                contexts,
                num_draws=protocol.posterior_draws,
                ode_steps=protocol.posterior_ode_steps,
                seed=seed,
                progress=work.advance,
            )


def _planned(protocol: DigitsProtocol) -> dict[str, float]:
    """Network rows of each stage."""
    a_sample = sum(_rows_a_sample(method, protocol) for method in _steered_methods(protocol))
    planned = {"gallery": 5.0 * _CONFIDENCE_SAMPLES, "pool": float(protocol.pool_size * protocol.num_steps)}
    for name in protocol.rewards:
        is_masked = name == MASKED
        samples = protocol.num_targets * protocol.samples_per_target if is_masked else protocol.samples_per_reward
        planned[name] = float(samples * a_sample)
    each = posterior.num_calls(
        num_contexts=protocol.posterior_contexts,
        num_draws=protocol.posterior_draws,
        ode_steps=protocol.posterior_ode_steps,
    )
    return planned | {f"posterior {time:g}": each for time in protocol.posterior_times}


def _steered_methods(protocol: DigitsProtocol) -> dict[Method, Callable[[Reward], Steering]]:
    return comparison.steered_methods(
        protocol.num_draws,
        protocol.num_draws_gradient_free,
        num_draws_resampling=protocol.num_draws_resampling,
        resampling_steps=protocol.resampling_steps,
    )


def _rows_a_sample(method: Method, protocol: DigitsProtocol) -> int:
    """Network rows of one steered sample; a backward pass costs two."""
    if method.key == comparison.RESAMPLING:
        return protocol.resampling_steps * protocol.num_draws_resampling
    if method.key == comparison.BASELINE:
        return 3 * protocol.num_steps
    if method.key == comparison.GRADIENT_FREE:
        return protocol.num_steps * (1 + protocol.num_draws_gradient_free)
    draws = 1 if method.key == comparison.SINGLE_DRAW else int(method.key.rpartition("_")[2])
    return protocol.num_steps * (1 + 3 * draws)


def _study_metrics(study: Study, largest: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for score in study.scores:
        figures[f"{score.method.key}_reward"] = score.reward
        figures[f"{score.method.key}_reward_std"] = score.spread
        figures[f"{score.method.key}_nfe"] = score.nfe
        figures[f"{score.method.key}_confidence"] = float(score.confidence.mean())
        figures[f"{score.method.key}_class_distance"] = study.class_distance(score.method.key)
    figures["tilted_reward"] = study.tilted.reward
    figures["tilted_sample_size"] = study.tilted.sample_size
    over, single = comparison.best_of(largest).key, study[comparison.SINGLE_DRAW]
    figures["nfe_ratio"] = study[over].nfe / single.nfe
    figures["mfm_g_wins"] = study.wins(over=over)
    figures["classifier_confidence"] = float(single.confidence.mean())
    return figures


def _gap_metrics(gaps: tuple[posterior.PosteriorGap, ...]) -> dict[str, float]:
    """Distances as means over contexts (and over times, without a suffix)."""
    if not gaps:
        return {}
    figures = {}
    for name, attribute in {"": "one_step", "_few_step": "few_step", "_floor": "floor", "_mean": "mean"}.items():
        by_time = {gap.time: float(getattr(gap, attribute).mean()) for gap in gaps}
        figures[f"posterior_sw2{name}"] = sum(by_time.values()) / len(by_time)
        figures |= {f"posterior_sw2{name}.t{time:g}": value for time, value in by_time.items()}
    figures["posterior_sw2_ratio"] = figures["posterior_sw2"] / figures["posterior_sw2_floor"]
    return figures


def _check_material(protocol: DigitsProtocol, material: Material) -> None:
    space = material.flow_map.space
    if space.kind != "image" or material.heldout.data.shape[1:] != space.event_shape:
        raise InputError(
            f"model: makes {space.kind} of shape {list(space.event_shape)}, "
            f"the data has {list(material.heldout.data.shape[1:])}"
        )
    needed = max(protocol.num_targets, protocol.posterior_contexts)
    if len(material.heldout) < needed:
        raise InputError(f"protocol: needs {needed} held-out images, the data has {len(material.heldout)}")
    assert math.prod(space.event_shape) > 1
