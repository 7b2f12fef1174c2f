"""protocol=finetune_gmm: which law a tuned drift samples, on a mixture whose tilted law is known in closed form.

Two questions, apart: is a method's fixed point the optimal drift (asked of the exact flow map, so that nothing but the
method can be wrong), and what does tuning of a trained model reach, all methods given the same network calls?
"""
# ruff: noqa: RUF009 (`setting` only wraps dataclasses.field, it makes no shared default)

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mfm_ray import metrics
from mfm_ray.data.datasets import GMM_MEANS, GMM_VARIANCE
from mfm_ray.errors import InputError
from mfm_ray.finetuning import Anchors, DivergedError, RewardMatching, Tilt, build_method
from mfm_ray.finetuning.tuner import Progress, Recipe, tune
from mfm_ray.flow_map import FlowMap
from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.metrics import Mean, OverFloor
from mfm_ray.networks.gaussian import GaussianMixture, GaussianMixtureFlowMap, LinearObservation, isotropic_mixture
from mfm_ray.noise import KeyedNoise
from mfm_ray.protocols.work import Work
from mfm_ray.samplers import sample
from mfm_ray.settings import setting

FORMS: dict[str, dict[str, Any]] = {
    "anchored": {"name": "mfm_ft"},
    "pointwise": {"name": "mfm_ft", "num_draws": 8, "baseline": "leave_one_out", "estimator": "mixed"},
    "official": {
        "name": "mfm_ft",
        "num_draws": 1,
        "baseline": "none",
        "estimator": "pathwise",
        "diffusion": 100.0,
    },
    "adjoint_matching": {"name": "adjoint_matching", "states_per_path": 5},
    "reinforce_adjoint": {"name": "reinforce_adjoint", "group": 64},
    "reward_weighted": {"name": "reward_weighted"},
}
"""What is compared, by the name it has in the figures."""
TITLES = {
    "anchored": "MFM-FT, weights over draws and anchor",
    "pointwise": "MFM-FT, weights exact at each state",
    "official": "MFM-FT as published, sigma^2 = 200",
    "adjoint_matching": "adjoint matching",
    "reinforce_adjoint": "Reinforce Adjoint Matching",
    "reward_weighted": "reward-weighted regression",
}
_FIXED_POINT_FORMS = ("anchored", "pointwise", "official")
_FLOOR_SEED, _EXACT_SEED, _POINT_SEED, _PRIOR_SEED = 10_000, 20_000, 50_000, 30_000
_SHOWN = 600


@dataclass(frozen=True, kw_only=True)
class FinetuneGmmProtocol:
    """Settings of the evaluation; the defaults stand in conf/protocol/finetune_gmm.yaml."""

    name: str = setting("the protocol")
    experiment: str = setting("recipe that is trained when no model is given")
    direction: list[float] = setting("a of the observation y = a . x + noise")
    observation: float = setting("y")
    noise: float = setting("standard deviation of the observation's noise", above=0)
    methods: list[str] = setting("tuned and compared", choices=tuple(FORMS))
    max_calls: int = setting("network and reward calls of each tuning, in rows", minimum=1)
    batch_size: int = setting("rows of a tuning step", minimum=1)
    learning_rate: float = setting("of Adam, at the end of the warm-up", above=0)
    fixed_points: int = setting("random (t, x) at which fixed points are computed; 0: none", minimum=0)
    fixed_point_repeats: int = setting("independent targets at each of them", minimum=2)
    num_samples: int = setting("samples of each set", minimum=16)
    num_seeds: int = setting("sampling seeds of each tuned model", minimum=1)
    floor_pairs: int = setting("pairs of exact sets that the floor is the mean of", minimum=2)
    num_steps: int = setting("steps of the tuned model's sampler", minimum=1)
    dynamics: list[str] = setting("of the sampler, each compared", choices=("ode", "sde"))

    def check(self) -> None:
        """InputError naming the first combination of settings that cannot work."""
        if len(self.direction) != len(GMM_MEANS[0]) or not any(self.direction):
            raise InputError(f"protocol.direction={self.direction}: expected {len(GMM_MEANS[0])} numbers, not all 0")
        for key in ("dynamics", "methods"):
            if not getattr(self, key):
                raise InputError(f"protocol.{key}=[]: expected at least one")

    def reward(self) -> LinearObservation:
        return LinearObservation(torch.tensor(self.direction), observation=self.observation, noise=self.noise)

    def recipe(self) -> Recipe:
        return Recipe(max_calls=self.max_calls, batch_size=self.batch_size, learning_rate=self.learning_rate)


@dataclass(frozen=True)
class FixedPoint:
    """What a form of the method would converge to at random (t, x), from the exact flow map.

    error: root mean square of (fixed point - optimal drift) over points and coordinates; standard_error: the same of
    its Monte Carlo error; covered: share of the coordinates within two standard errors, 0.954 of an exact one.
    """

    form: str
    error: float
    standard_error: float
    covered: float


@dataclass(frozen=True)
class TunedFigures:
    """Samples of a tuned model's drift by one dynamics. nfe: network calls of a sample."""

    form: str
    dynamics: str
    nfe: float
    distance: Mean
    over_floor: OverFloor
    residual_std: float
    samples: Tensor


@dataclass(frozen=True)
class Tuning:
    """A tuning: seconds and calls it took, and what its steps said."""

    form: str
    seconds: float
    calls: int
    history: list[Progress]
    error: str | None = None


@dataclass(frozen=True)
class FinetuneGmmEvaluation:
    """All that the report shows. base: of the model before tuning; exact_*: of the tilted law itself."""

    protocol: FinetuneGmmProtocol
    floor: Mean
    exact_residual_std: float
    exact_samples: Tensor
    base_samples: Tensor
    base_over_floor: float
    fixed_points: tuple[FixedPoint, ...]
    tunings: tuple[Tuning, ...]
    figures: tuple[TunedFigures, ...]
    seconds: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """Flat figures, by form and dynamics."""
        named = {
            "floor": self.floor.value,
            "exact_residual_std": self.exact_residual_std,
            "base.over_floor": self.base_over_floor,
        }
        for point in self.fixed_points:
            base = f"fixed_point.{point.form}"
            named[f"{base}.error"] = point.error
            named[f"{base}.standard_error"] = point.standard_error
            named[f"{base}.covered"] = point.covered
        for tuning in self.tunings:
            named[f"tuning.{tuning.form}.seconds"] = tuning.seconds
            named[f"tuning.{tuning.form}.calls"] = tuning.calls
        for row in self.figures:
            base = f"methods.{row.form}.{row.dynamics}"
            named[f"{base}.nfe"] = row.nfe
            named[f"{base}.sliced_w2"] = row.distance.value
            named[f"{base}.over_floor"] = row.over_floor.ratio
            named[f"{base}.over_floor_lower"] = row.over_floor.lower
            named[f"{base}.over_floor_upper"] = row.over_floor.upper
            named[f"{base}.residual_std"] = row.residual_std
        return named


def evaluate_finetune_gmm(
    protocol: FinetuneGmmProtocol, flow_map: FlowMap, *, seed: int = 0, log: Callable[[str], None] = print
) -> FinetuneGmmEvaluation:
    """Fixed points, tunings and samples. InputError for a model of anything but points in the plane."""
    if flow_map.event_shape != (2,):
        raise InputError(f"model: its samples are of shape {list(flow_map.event_shape)}, expected [2] (experiment=gmm)")
    mixture = isotropic_mixture(torch.tensor(GMM_MEANS), variance=GMM_VARIANCE)
    reward = protocol.reward()
    tilted = reward.tilt(mixture)
    work = Work(_planned(protocol), log)
    exact = _ExactSets(tilted, protocol.num_samples)
    floor = metrics.distance_floor(
        lambda a, b: float(metrics.sliced_w2(a, b)), exact.floor_set, pairs=protocol.floor_pairs
    )
    fixed_points: tuple[FixedPoint, ...] = ()
    if protocol.fixed_points:
        with work.stage("fixed points", "fixed points at random (t, x)"):
            fixed_points = tuple(fixed_point(form, protocol, mixture, seed) for form in _FIXED_POINT_FORMS)
    base = _samples(flow_map, protocol, protocol.dynamics[0], seed)
    tunings, figures = [], []
    data = mixture.sample(50_000, generator=torch.Generator().manual_seed(_PRIOR_SEED + seed))
    for form in protocol.methods:
        with work.stage(form, f"tuning by {TITLES[form]}"):
            tuning, tuned = _tuned(form, protocol, flow_map, reward, data, seed, work)
            tunings.append(tuning)
        if tuned is not None:
            with work.stage(f"{form} samples", f"samples of {TITLES[form]}"):
                figures += [
                    _figures(form, tuned, dynamics, protocol, exact, reward, floor, seed)
                    for dynamics in protocol.dynamics
                ]
    large = tilted.sample(200_000, generator=torch.Generator().manual_seed(_EXACT_SEED - 1))
    return FinetuneGmmEvaluation(
        protocol=protocol,
        floor=floor,
        exact_residual_std=float(_residual(large, reward).std()),
        exact_samples=exact(0)[:_SHOWN],
        base_samples=base[0][:_SHOWN],
        base_over_floor=float(metrics.sliced_w2(base[0], exact(0))) / floor.value,
        fixed_points=fixed_points,
        tunings=tuple(tunings),
        figures=tuple(figures),
        seconds=work.seconds,
    )


def fixed_point(form: str, protocol: FinetuneGmmProtocol, mixture: GaussianMixture, seed: int) -> FixedPoint:
    """Where a form's regression would end at random (t, x), with the exact flow map in the place of a trained one.

    Points: t uniform on [.05, .95], x of the tilted law's noised samples. Anchors are exact samples of the tilted
    posterior given x, as a chain has in the long run.
    """
    reward = protocol.reward()
    tilted = reward.tilt(mixture)
    count, repeats = protocol.fixed_points, protocol.fixed_point_repeats
    generator = torch.Generator().manual_seed(_POINT_SEED + seed)
    t = 0.05 + 0.9 * torch.rand(count, generator=generator)
    x0 = torch.randn(count, 2, generator=generator)
    x = LinearInterpolant().sample(x0, tilted.sample(count, generator=generator), t).x_t
    method = build_method(FORMS[form])
    assert isinstance(method, RewardMatching)
    tilt = Tilt(GaussianMixtureFlowMap(mixture, num_inner_steps=8), reward)
    tilt = tilt.with_normaliser(mixture.sample(4096, generator=generator))
    anchors = posterior_samples(tilted, x, t, repeats, generator=generator).flatten(0, 1)
    rows = torch.arange(count * repeats)
    targets = method.at(
        tilt,
        x.repeat_interleave(repeats, 0),
        t.repeat_interleave(repeats),
        Anchors(anchors, None, tilt.rewards(anchors)),
        KeyedNoise.for_rows(seed, rows),
    )
    weight = targets.weight.double().view(count, repeats, 1)
    target = targets.target.double().view(count, repeats, 2)
    point = (weight * target).sum(1) / weight.sum(1)
    spread = (weight * (target - point.unsqueeze(1))).square().sum(1).sqrt() / weight.sum(1)
    error = point - tilted.velocity(x, t).double()
    return FixedPoint(
        form=form,
        error=float(error.square().mean().sqrt()),
        standard_error=float(spread.square().mean().sqrt()),
        covered=float((error.abs() <= 2 * spread).double().mean()),
    )


def posterior_samples(law: GaussianMixture, x: Tensor, t: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
    """Exact samples of p(x_1 | x_t = x) of a mixture, (B, count, D), for x (B, D) and t (B,)."""
    posterior = law.posterior(x, t)
    component = torch.multinomial(posterior.log_weights.exp(), count, replacement=True, generator=generator)
    rows = torch.arange(len(x)).unsqueeze(1)
    white = torch.randn(len(x), count, law.dim, generator=generator)
    scaled = posterior.variances[rows, component].sqrt() * white
    axes = posterior.axes[component] if posterior.axes.ndim == 3 else posterior.axes[rows, component]
    return posterior.means[rows, component] + torch.einsum("bnij,bnj->bni", axes, scaled)


def _planned(protocol: FinetuneGmmProtocol) -> dict[str, float]:
    """Work by stage, in rows."""
    fixed = 60.0 * protocol.fixed_points * protocol.fixed_point_repeats
    drawn = float(protocol.num_samples * protocol.num_seeds * protocol.num_steps * len(protocol.dynamics))
    tunings = {form: float(protocol.max_calls) for form in protocol.methods}
    return {"fixed points": fixed, **tunings, **{f"{form} samples": drawn for form in protocol.methods}}


def _tuned(
    form: str,
    protocol: FinetuneGmmProtocol,
    flow_map: FlowMap,
    reward: LinearObservation,
    data: Tensor,
    seed: int,
    work: Work,
) -> tuple[Tuning, FlowMap | None]:
    """A tuning and its model; that a method diverges is a result too."""
    steps: list[Progress] = []

    def on_step(progress: Progress) -> None:
        work.advance(progress.calls - (steps[-1].calls if steps else 0))
        steps.append(progress)

    error, tuned = None, None
    try:
        result = tune(
            flow_map,
            reward,
            data=data,
            method=build_method(FORMS[form]),
            recipe=protocol.recipe(),
            seed=seed,
            on_step=on_step,
        )
        tuned = result.flow_map
    except DivergedError as failure:
        error = str(failure)
    last = steps[-1] if steps else None
    return Tuning(form, last.seconds if last else 0.0, last.calls if last else 0, steps, error), tuned


def _samples(flow_map: FlowMap, protocol: FinetuneGmmProtocol, dynamics: str, seed: int) -> tuple[Tensor, float]:
    drawn = sample(
        flow_map,
        num_samples=protocol.num_samples,
        num_steps=protocol.num_steps,
        dynamics=dynamics,
        seed=seed,
        batch_size=4096,
    )
    return drawn.images, drawn.nfe


def _figures(
    form: str,
    tuned: FlowMap,
    dynamics: str,
    protocol: FinetuneGmmProtocol,
    exact: _ExactSets,
    reward: LinearObservation,
    floor: Mean,
    seed: int,
) -> TunedFigures:
    sets, nfe = [], 0.0
    for number in range(protocol.num_seeds):
        x, nfe = _samples(tuned, protocol, dynamics, seed + number)
        # of a drift that has run away: its distance stays a number, far beyond any other
        sets.append(x.nan_to_num(nan=0.0, posinf=1e3, neginf=-1e3).clamp(-1e3, 1e3))
    distance = metrics.mean_with_interval(
        torch.stack([metrics.sliced_w2(x, exact(number)) for number, x in enumerate(sets)])
    )
    residual = torch.stack([_residual(x, reward) for x in sets])
    return TunedFigures(
        form=form,
        dynamics=dynamics,
        nfe=nfe,
        distance=distance,
        over_floor=metrics.over_floor(distance, floor),
        residual_std=float(residual.std(1).mean()),
        samples=sets[0][:_SHOWN],
    )


class _ExactSets:
    """Independent exact sample sets of the tilted law."""

    def __init__(self, tilted: GaussianMixture, size: int) -> None:
        self._tilted, self._size = tilted, size

    def __call__(self, number: int) -> Tensor:
        return self._tilted.sample(self._size, generator=torch.Generator().manual_seed(_EXACT_SEED + number))

    def floor_set(self, number: int) -> Tensor:
        return self._tilted.sample(self._size, generator=torch.Generator().manual_seed(_FLOOR_SEED + number))


def _residual(x: Tensor, reward: LinearObservation) -> Tensor:
    return x @ reward.direction - reward.observation


def finetune_gmm_parquet(evaluation: FinetuneGmmEvaluation) -> bytes:
    """One row a sampled model, a fixed point, and a step of each tuning (`part` says which)."""
    rows = [*_figure_rows(evaluation), *_point_rows(evaluation), *_step_rows(evaluation)]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _figure_rows(evaluation: FinetuneGmmEvaluation) -> Iterator[Mapping[str, Any]]:
    for row in evaluation.figures:
        yield {
            "part": "method",
            "form": row.form,
            "dynamics": row.dynamics,
            "nfe": row.nfe,
            "sliced_w2": row.distance.value,
            "sliced_w2_half_width": row.distance.half_width,
            "over_floor": row.over_floor.ratio,
            "residual_std": row.residual_std,
            "samples": row.samples.flatten().tolist(),
        }


def _point_rows(evaluation: FinetuneGmmEvaluation) -> Iterator[Mapping[str, Any]]:
    for point in evaluation.fixed_points:
        yield {"part": "fixed_point", **vars(point)}


def _step_rows(evaluation: FinetuneGmmEvaluation) -> Iterator[Mapping[str, Any]]:
    for tuning in evaluation.tunings:
        for progress in tuning.history[:: max(1, math.ceil(len(tuning.history) / 200))]:
            yield {"part": "step", "form": tuning.form, **vars(progress)}
