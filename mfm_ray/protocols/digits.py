"""protocol=digits and protocol=mnist: what a meta flow map of handwritten digits can do, measured and pictured.

Library code: `jobs.evaluate` and `jobs.demo` only bring the model, the data and a place for the report.
"""
# ruff: noqa: RUF009 (`setting` only wraps dataclasses.field, it makes no shared default)

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_ray import metrics
from mfm_ray.data.datasets import Split
from mfm_ray.errors import InputError
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.protocols import comparison, posterior, problems
from mfm_ray.protocols.annealing import Start, draw_start
from mfm_ray.protocols.comparison import Method, MethodScore, Pool, PoolRecipe, Problem, Steered, Study
from mfm_ray.protocols.quality import Judgement, Yardstick, cheapest_as_good, judge_study, sample_law
from mfm_ray.protocols.work import Work
from mfm_ray.samplers import refine
from mfm_ray.settings import setting

SHOWN = 8
"""Pictures of one method in a row of the report."""
MASKED = "masked"
MIXTURE = "class_mixture"
PROBLEMS = (MASKED, "symmetry", "brightness", MIXTURE, "combination")
_GALLERY_SIZE = 40
_CONFIDENCE_SAMPLES = 512
_NOVELTY_SHOWN = 16
_LIKELY_MOVES = 12  # of chains before the last ones, for the time left
_POOL_SEED, _TARGET_SEED, _STEERING_SEED, _CONTEXT_SEED = 1, 2, 3, 4  # added to the seed of the job
_LAW_SEED = 1_000_003


@dataclass(frozen=True, kw_only=True)
class DigitsProtocol:
    """Settings of the evaluation; the defaults stand in conf/protocol/digits.yaml and mnist.yaml."""

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
    mixture_samples: int = setting(
        "steered samples over draws of the class mixture; at most pool_size, a multiple of 4", minimum=4
    )
    mixture_draws: list[int] = setting("draws of the methods whose class proportions are compared", minimum=1)
    mixture_steps: int = setting("steps of MFM-G and MFM-GF there", minimum=1)
    curve_steps: list[int] = setting("further steps of MFM-G and MFM-GF on the curves over calls", minimum=1)
    curve_dps_steps: list[int] = setting("further steps of DPS on the curves", minimum=1)
    curve_draws_resampling: list[int] = setting("further draws of posterior resampling on the curves", minimum=1)
    curve_ode_steps: list[int] = setting("steps of the ODE of further pools for Best-of-n", minimum=1)
    curve_refine_steps: list[int] = setting("refinement steps of further pools for Best-of-n", minimum=1)
    official_rewards: list[str] = setting("comparisons with rows of the official recipe", choices=PROBLEMS)
    official_draws: list[int] = setting("posterior draws a step of the official recipe", minimum=1)
    official_samples: int = setting("most samples of the official recipe for a reward; a multiple of 4", minimum=4)
    law_rewards: list[str] = setting("whose tilted law is sampled by annealed chains", choices=PROBLEMS)
    law_size: int = setting("chains, in two independent halves; at most pool_size", minimum=8)
    law_start: int = setting("fresh samples that each half starts from; at most 10 pool_size", minimum=4)
    law_steps: int = setting("steps of the second-order ODE under the chains", minimum=1)
    law_moves: int = setting("last moves of the chains", minimum=0)
    novelty_samples: int = setting("samples compared with the training data; 0 for none", minimum=0)
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
        for key in ("samples_per_target", "samples_per_reward", "mixture_samples", "official_samples"):
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
        if MASKED in self.law_rewards:
            raise InputError(
                f"protocol.law_rewards={self.law_rewards}: {MASKED} has a target for each image; leave it out"
            )

    @property
    def chains(self) -> int:
        """Chains of a tilted law: no more than the pool, so that small settings make a small protocol."""
        return max(8, min(self.law_size, self.pool_size))

    @property
    def chain_starts(self) -> int:
        return max(self.chains, min(self.law_start, 10 * self.pool_size))

    @property
    def proportion_samples(self) -> int:
        return max(4, min(self.mixture_samples, self.pool_size) // 4 * 4)

    def samples_for(self, name: str) -> int:
        """Steered samples of each target of a comparison."""
        return self.samples_per_target if name == MASKED else self.samples_per_reward

    def official_samples_for(self, name: str) -> int:
        """As many as others where rewards are compared, more where class proportions are."""
        most = self.proportion_samples if name == MIXTURE else self.samples_for(name)
        return min(self.official_samples, most)


@dataclass(frozen=True)
class Material:
    """What is evaluated: a model of labelled images, the judge, and the data it was trained on and not trained on."""

    flow_map: FlowMap
    classifier: DigitClassifier
    train: Split
    heldout: Split

    @property
    def name(self) -> str:
        """The data in words."""
        height, width = self.train.data.shape[-2:]
        return f"{len(self.train) + len(self.heldout):,} real digits of {height} \N{MULTIPLICATION SIGN} {width} pixels"


@dataclass(frozen=True)
class Gallery:
    """Images (N, *event) in data units by kind, and the judge's mean confidence in many of that kind: in `samples`
    for those of the model.
    """

    images: dict[str, Tensor]
    confidence: dict[str, float]
    samples: dict[str, Tensor]


@dataclass(frozen=True)
class PosteriorGallery:
    """A held-out digit (*event), its noisy versions (T, *event) and their draws (T, K, *event), in data units."""

    clean: Tensor
    times: list[float]
    noisy: Tensor
    draws: Tensor


@dataclass(frozen=True)
class Novelty:
    """Whether samples are new, and differ: of each kind as many as held-out images are taken.

    memorisation: nearness to the training data beside that of held-out images; vendi: effective number of different
    images, in pixels under one bandwidth; samples: some (S, *event) with their nearest training images.
    """

    label: str
    count: int
    memorisation: metrics.Memorisation
    vendi: float
    samples: Tensor
    nearest: Tensor


@dataclass(frozen=True)
class DigitsEvaluation:
    """All that the report shows. data: the images in words; judgements: by study; novelty: by kind, real first."""

    protocol: DigitsProtocol
    data: str
    gallery: Gallery
    posterior_gallery: PosteriorGallery
    gaps: tuple[posterior.PosteriorGap, ...]
    studies: tuple[Study, ...]
    judgements: dict[str, Judgement]
    novelty: dict[str, Novelty]
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
            judgement = self.judgements[study.problem.name]
            figures |= {f"{prefix}{key}": value for key, value in _study_metrics(study, largest).items()}
            figures |= {f"{prefix}{key}": value for key, value in _quality_metrics(study, judgement).items()}
        for kind, novelty in self.novelty.items():
            figures[f"{kind}_nearest_ratio"] = novelty.memorisation.ratio
            figures[f"{kind}_vendi"] = novelty.vendi
        return figures

    def official_matches(self) -> Iterator[tuple[Study, MethodScore, MethodScore | None]]:
        """Each row of the official recipe with the cheapest method of ours whose error is no larger, if any."""
        for study in self.studies:
            judgement = self.judgements[study.problem.name]
            for score in study.all_scores:
                if is_official(score.method):
                    yield study, score, official_match(study, judgement, score)


def evaluate_digits(
    protocol: DigitsProtocol, material: Material, *, seed: int, log: Callable[[str], None]
) -> DigitsEvaluation:
    """Runs the protocol. InputError where protocol and data do not fit."""
    protocol.check()
    _check_material(protocol, material)
    work = Work(_planned(protocol), log)
    with work.stage("gallery", "real digits beside samples of one and four steps"):
        gallery = _gallery(material, seed)
        rows = problems.choose_targets(material.heldout, protocol.num_targets, seed=seed + _TARGET_SEED)
        posterior_gallery = _posterior_gallery(protocol, material, material.heldout.data[rows[0]], seed)
    studies, judgements = _studies(protocol, material, rows, work, seed)
    with work.stage("novelty", "nearest training images"):
        novelty = _novelty(protocol, material, gallery, studies)
    gaps = tuple(_gaps(protocol, material, work, seed))
    return DigitsEvaluation(
        protocol=protocol,
        data=material.name,
        gallery=gallery,
        posterior_gallery=posterior_gallery,
        gaps=gaps,
        studies=studies,
        judgements=judgements,
        novelty=novelty,
        seconds=dict(work.seconds),
    )


def make_problem(name: str, material: Material, rows: Tensor, *, seed: int) -> Problem:
    """A comparison by its name; `rows` are the held-out images of the masked observation."""
    if name == MASKED:
        return problems.masked_problem(material.heldout.data[rows], material.heldout.labels[rows], seed=seed)
    if name == "symmetry":
        return problems.symmetry_problem()
    if name == "brightness":
        return problems.brightness_problem(material.train)
    if name == MIXTURE:
        return problems.mixture_problem(material.classifier)
    return problems.combination_problem(material.classifier, material.train)


def _studies(
    protocol: DigitsProtocol, material: Material, rows: Tensor, work: Work, seed: int
) -> tuple[tuple[Study, ...], dict[str, Judgement]]:
    main = comparison.PoolRecipe(protocol.num_steps)
    pools = {recipe: _pool(recipe, protocol, material, work, seed) for recipe in (main, *_curve_pools(protocol))}
    starts = _law_starts(protocol, material, work, seed)
    yardstick = Yardstick.of(material.classifier, material.train)
    studies, judgements = [], {}
    for name in protocol.rewards:
        problem = make_problem(name, material, rows, seed=seed + _TARGET_SEED)
        with work.stage(name, f"steering by {name}"):
            study = _study(problem, protocol, material, pools, work, seed)
            law = None
            if starts is not None and name in protocol.law_rewards:
                law = sample_law(
                    material.flow_map,
                    material.classifier,
                    problem,
                    starts,
                    size=protocol.chains,
                    moves=protocol.law_moves,
                    seed=seed + _LAW_SEED,
                    advance=work.advance,
                )
            judgements[name] = judge_study(study, yardstick, law)
            studies.append(study)
    return tuple(studies), judgements


def _pool(recipe: PoolRecipe, protocol: DigitsProtocol, material: Material, work: Work, seed: int) -> Pool:
    done = 0

    def progress(images: int, _: int) -> None:
        nonlocal done
        work.advance((images - done) * recipe.num_steps)
        done = images

    with work.stage(_pool_stage(recipe), f"{protocol.pool_size:,} unsteered samples of {recipe.label} for Best-of-n"):
        return comparison.make_pool(
            material.flow_map,
            material.classifier,
            size=protocol.pool_size,
            num_steps=recipe.num_steps,
            refined=recipe.refined,
            seed=seed + _POOL_SEED,
            progress=progress,
        )


def _law_starts(protocol: DigitsProtocol, material: Material, work: Work, seed: int) -> tuple[Start, Start] | None:
    if not set(protocol.law_rewards) & set(protocol.rewards):
        return None
    with work.stage("law", "fresh samples for the chains of the tilted laws"):
        first, second = (
            draw_start(
                material.flow_map,
                size=protocol.chain_starts,
                num_steps=protocol.law_steps,
                seed=seed + _LAW_SEED + half,
                advance=work.advance,
            )
            for half in range(2)
        )
        return first, second


def _study(
    problem: Problem,
    protocol: DigitsProtocol,
    material: Material,
    pools: dict[PoolRecipe, Pool],
    work: Work,
    seed: int,
) -> Study:
    def steer(steered: Steered, per_target: int) -> Iterator[MethodScore]:
        for method, steering in steered.items():
            yield comparison.score_steered(
                problem,
                method,
                steering,
                material.flow_map,
                material.classifier,
                samples_per_target=per_target,
                num_steps=protocol.num_steps,
                dynamics=protocol.dynamics,
                seed=seed + _STEERING_SEED,
                shown=SHOWN,
            )
            work.advance(len(problem.targets) * per_target * _calls_a_sample({method: steering}, protocol))

    pool, samples = next(iter(pools.values())), protocol.samples_for(problem.name)
    scores = [comparison.score_unsteered(problem, pool, shown=SHOWN)]
    scores += [comparison.score_best_of(problem, pool, n, shown=SHOWN) for n in sorted(protocol.best_of)]
    scores += steer(_steered_methods(protocol), samples)
    further = [score for recipe, pool in pools.items() for score in _best_of_curve(problem, recipe, pool, protocol)]
    further += steer(_curve_methods(protocol), samples)
    if problem.name == MIXTURE:
        further += steer(_proportion_methods(protocol), protocol.proportion_samples)
    if problem.name in protocol.official_rewards:
        further += steer(_official_methods(protocol), protocol.official_samples_for(problem.name))
    return Study(problem, tuple(scores), comparison.tilted_law(problem, pool), tuple(further))


def _best_of_curve(problem: Problem, recipe: PoolRecipe, pool: Pool, protocol: DigitsProtocol) -> Iterator[MethodScore]:
    """Best-of-n of a pool for n of about 1, 3, 10, ... up to the pool; none where no curve is asked for."""
    if not _curve_pools(protocol):
        return
    rewards = comparison.pool_rewards(problem, pool)
    counts = {round(10 ** (half / 2)) for half in range(2 * len(str(len(pool))))} | {len(pool)}
    for n in sorted(n for n in counts if n <= len(pool)):
        yield comparison.score_best_of(problem, pool, n, shown=1, method=comparison.best_of(n, recipe), rewards=rewards)


def is_official(method: Method) -> bool:
    return method.key.startswith(comparison.OFFICIAL)


def official_match(study: Study, judgement: Judgement, score: MethodScore) -> MethodScore | None:
    """The cheapest of our methods whose error is at most that of a row of the official recipe, None where none is."""
    ours = [other.method.key for other in study.all_scores if other.method.family in ("mfm_g", "mfm_gf", "resampling")]
    return cheapest_as_good(study, judgement, score.method.key, among=ours)


def _novelty(
    protocol: DigitsProtocol, material: Material, gallery: Gallery, studies: Sequence[Study]
) -> dict[str, Novelty]:
    heldout, train = material.heldout.data, material.train.data
    count = min(protocol.novelty_samples, len(heldout), _CONFIDENCE_SAMPLES)
    if count < 2:
        return {}
    single = studies[0][comparison.SINGLE_DRAW]
    ode = studies[0][comparison.UNSTEERED]
    kinds = {
        "real": ("Held-out digits", heldout),
        "one_step": ("One step", gallery.samples["one_step"]),
        "four_step": ("Four steps", gallery.samples["four_step"]),
        "ode": (f"{protocol.num_steps} steps of the ODE", ode.samples),
        "steered": (f"{studies[0].problem.title}: {single.method.label}", single.samples),
    }
    bandwidth = metrics.median_distance(heldout)
    found = {}
    for kind, (label, images) in kinds.items():
        chosen = _at_intervals(images, count)
        shown = _at_intervals(chosen, _NOVELTY_SHOWN)
        found[kind] = Novelty(
            label=label,
            count=len(chosen),
            memorisation=metrics.memorisation(chosen, heldout, train),
            vendi=metrics.vendi_score(chosen, kernel="rbf", bandwidth=bandwidth),
            samples=shown,
            nearest=train[metrics.nearest_neighbours(shown, train).index],
        )
    return found


def _at_intervals(images: Tensor, count: int) -> Tensor:
    """At most `count` images, at equal intervals: those of one target or class stand together."""
    return images[torch.linspace(0, len(images) - 1, min(count, len(images)), dtype=torch.float64).round().long()]


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
    return Gallery({kind: batch[:_GALLERY_SIZE] for kind, batch in images.items()}, confidence, samples)


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
    """Calls of each stage."""
    planned = {"gallery": 5.0 * _CONFIDENCE_SAMPLES}
    for recipe in (PoolRecipe(protocol.num_steps), *_curve_pools(protocol)):
        planned[_pool_stage(recipe)] = float(protocol.pool_size * recipe.num_steps)
    if set(protocol.law_rewards) & set(protocol.rewards):
        planned["law"] = 2.0 * protocol.chain_starts * protocol.law_steps
    for name in protocol.rewards:
        planned[name] = _planned_steering(name, protocol)
        if name in protocol.law_rewards:
            planned[name] += (_LIKELY_MOVES + protocol.law_moves) * protocol.chains * protocol.law_steps
    each = posterior.num_calls(
        num_contexts=protocol.posterior_contexts,
        num_draws=protocol.posterior_draws,
        ode_steps=protocol.posterior_ode_steps,
    )
    return planned | {f"posterior {time:g}": each for time in protocol.posterior_times}


def _planned_steering(name: str, protocol: DigitsProtocol) -> float:
    calls = protocol.samples_for(name) * _calls_a_sample(
        _steered_methods(protocol) | _curve_methods(protocol), protocol
    )
    if name == MIXTURE:
        calls += protocol.proportion_samples * _calls_a_sample(_proportion_methods(protocol), protocol)
    if name in protocol.official_rewards:
        calls += protocol.official_samples_for(name) * _calls_a_sample(_official_methods(protocol), protocol)
    return float((protocol.num_targets if name == MASKED else 1) * calls)


def _calls_a_sample(steered: Steered, protocol: DigitsProtocol) -> float:
    """Network and reward calls of one sample of each of the methods."""
    return float(
        sum(
            steering(_no_reward).cost().total(comparison.steps_of(method, protocol.num_steps))
            for method, steering in steered.items()
        )
    )


def _no_reward(samples: Tensor) -> Tensor:
    raise AssertionError("only the price is asked for")


def _pool_stage(recipe: PoolRecipe) -> str:
    return f"pool {recipe.key}"


def _curve_pools(protocol: DigitsProtocol) -> list[PoolRecipe]:
    """Pools beside the one that all problems share."""
    ode = [PoolRecipe(steps) for steps in protocol.curve_ode_steps if steps != protocol.num_steps]
    return [*ode, *(PoolRecipe(steps, refined=True) for steps in protocol.curve_refine_steps)]


def _steered_methods(protocol: DigitsProtocol) -> Steered:
    return comparison.steered_methods(
        protocol.num_draws,
        protocol.num_draws_gradient_free,
        num_draws_resampling=protocol.num_draws_resampling,
        resampling_steps=protocol.resampling_steps,
    )


def _curve_methods(protocol: DigitsProtocol) -> Steered:
    """Further points of the curves over calls."""
    further_steps = {
        "mfm_g": protocol.curve_steps,
        "mfm_gf": protocol.curve_steps,
        "muted": protocol.curve_dps_steps,
        "resampling": [],
    }
    further: Steered = {}
    for method, steering in _steered_methods(protocol).items():
        steps = [k for k in further_steps[method.family] if k != protocol.num_steps]
        further |= comparison.at_steps({method: steering}, steps)
    few = [draws for draws in protocol.curve_draws_resampling if draws != protocol.num_draws_resampling]
    return further | comparison.resampling_over_draws(few, protocol.resampling_steps)


def _proportion_methods(protocol: DigitsProtocol) -> Steered:
    return comparison.over_draws(protocol.mixture_draws, protocol.mixture_steps, protocol.resampling_steps)


def _official_methods(protocol: DigitsProtocol) -> Steered:
    return comparison.official_methods(protocol.official_draws)


def _study_metrics(study: Study, largest: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for score in study.all_scores:
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


def _quality_metrics(study: Study, judgement: Judgement) -> dict[str, float]:
    """Distances by method, with the value that the reference has at that number of samples as `_floor`."""
    figures: dict[str, float] = {}
    for score in study.all_scores:
        for name, value in vars(judgement[score.method.key]).items():
            if value is not None:
                figures[f"{score.method.key}_{name}"] = value
        floor = judgement.floor(score)
        for name, value in vars(floor).items() if floor is not None else ():
            if value is not None:
                figures[f"{score.method.key}_{name}_floor"] = value
        if is_official(score.method) and (match := official_match(study, judgement, score)) is not None:
            figures[f"{score.method.key}_calls_ratio"] = match.nfe / score.nfe
    if judgement.law is not None:
        figures["law_reward"] = float(judgement.law.rewards.mean())
        figures["law_reward_std"] = float(judgement.law.rewards.std())
        figures["law_log_normaliser"] = sum(run.log_normaliser for run in judgement.law.runs) / 2
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
