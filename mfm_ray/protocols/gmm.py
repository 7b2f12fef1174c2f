"""protocol=gmm: which law each method really samples, on a mixture whose tilted law is known in closed form.

Prior: three equal Gaussians; reward: the log-likelihood of one linear observation. The tilted law is a mixture again,
so that every figure has its floor: the distance between two independent sets of exact samples.
"""
# ruff: noqa: RUF009 (`setting` only wraps dataclasses.field, it makes no shared default)

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mfm_ray import metrics
from mfm_ray.data.datasets import GMM_MEANS, GMM_VARIANCE
from mfm_ray.errors import InputError
from mfm_ray.flow_map import FlowMap
from mfm_ray.metrics import Mean, OverFloor
from mfm_ray.networks.gaussian import GaussianMixture, GaussianMixtureFlowMap, LinearObservation, isotropic_mixture
from mfm_ray.protocols.coverage import Coverage, value_coverage
from mfm_ray.protocols.work import Work
from mfm_ray.samplers import refine, sample
from mfm_ray.settings import setting
from mfm_ray.steering import (
    DPS,
    SMC,
    GradientFreeGuidance,
    GradientGuidance,
    PosteriorResampling,
    Steering,
)

_SHOWN = 600
_FLOOR_SEED, _EXACT_SEED, _PRIOR_SEED, _COVERAGE_SEED = 10_000, 20_000, 30_000, 40_000
_RANGE = (0.85, 1.15)
"""Of the residual's deviation over the exact one, for a law that is neither too narrow nor too wide."""


@dataclass(frozen=True, kw_only=True)
class GmmProtocol:
    """Settings of the evaluation; the defaults stand in conf/protocol/gmm.yaml."""

    name: str = setting("the protocol")
    experiment: str = setting("recipe that is trained when no model is given")
    exact: bool = setting("steer the exact flow map of the mixture, without a model")
    direction: list[float] = setting("a of the observation y = a . x + noise")
    observation: float = setting("y")
    noise: float = setting("standard deviation of the observation's noise", above=0)
    num_samples: int = setting("samples of each set", minimum=16)
    num_seeds: int = setting("sampling seeds of each method", minimum=1)
    floor_pairs: int = setting("pairs of exact sets that the floor is the mean of", minimum=2)
    num_steps: int = setting("steps of the methods that steer a drift", minimum=1)
    resampling_steps: list[int] = setting("steps of posterior resampling, each compared", minimum=1)
    dynamics: list[str] = setting("of the methods that have a choice, each compared", choices=("ode", "sde"))
    draws_gradient: list[int] = setting("posterior draws a step of MFM-G", minimum=1)
    draws_gradient_free: list[int] = setting("posterior draws a step of MFM-GF", minimum=1)
    draws_resampling: list[int] = setting("posterior draws a step of posterior resampling", minimum=1)
    best_of: list[int] = setting("the n of Best-of-n, of one-step samples", minimum=1)
    smc_particles: int = setting("particles of the SMC references; 0 leaves them out", minimum=0)
    smc_draws: int = setting("posterior draws of each particle of Feynman-Kac SMC", minimum=1)
    paper_draws: int = setting("draws of the paper's recipe (250 linear steps from 0.01); 0 leaves it out", minimum=0)
    coverage_draws: list[int] = setting("draws whose value estimates are held against the closed form", minimum=2)
    coverage_times: list[float] = setting("times at which they are", minimum=0, maximum=0.99)
    coverage_states: int = setting("states of the steered law at each of these times", minimum=16)

    def check(self) -> None:
        """InputError naming the first combination of settings that cannot work."""
        if len(self.direction) != len(GMM_MEANS[0]) or not any(self.direction):
            raise InputError(f"protocol.direction={self.direction}: expected {len(GMM_MEANS[0])} numbers, not all 0")
        if not self.dynamics:
            raise InputError("protocol.dynamics=[]: expected ode, sde or both")

    @property
    def needs_model(self) -> bool:
        return not self.exact

    def reward(self) -> LinearObservation:
        return LinearObservation(torch.tensor(self.direction), observation=self.observation, noise=self.noise)


@dataclass(frozen=True)
class Method:
    """A way to get a set of samples. family: its colour; sample: seed to (num_samples, 2) and calls for one sample."""

    key: str
    label: str
    family: str
    draws: int
    steps: int
    dynamics: str
    sample: Callable[[int], tuple[Tensor, float]]
    rows: float
    one_seed: bool = False


@dataclass(frozen=True)
class MethodFigures:
    """What a method reached.

    nfe: calls for one sample; distance: sliced W2 to exact samples; over_floor: its ratio; mmd: unbiased multi-scale
    MMD^2 (0 when the laws are equal); residual: mean and deviation of a . x - y; weights: share of the samples nearest
    to each component of the tilted law; samples: some of them.
    """

    method: Method
    nfe: float
    distance: Mean
    over_floor: OverFloor
    mmd: Mean
    residual_mean: float
    residual_std: float
    weights: list[float]
    samples: Tensor


@dataclass(frozen=True)
class GmmEvaluation:
    """All that the report shows. exact_*: of the tilted law itself."""

    protocol: GmmProtocol
    floor: Mean
    mmd_floor: Mean
    exact_residual_mean: float
    exact_residual_std: float
    exact_weights: list[float]
    exact_samples: Tensor
    prior_samples: Tensor
    figures: tuple[MethodFigures, ...]
    coverage: tuple[Coverage, ...]
    seconds: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """Flat figures, by the method's key."""
        named = {"floor": self.floor.value, "exact_residual_std": self.exact_residual_std}
        for row in self.figures:
            base = f"methods.{row.method.key}"
            named[f"{base}.nfe"] = row.nfe
            named[f"{base}.sliced_w2"] = row.distance.value
            named[f"{base}.over_floor"] = row.over_floor.ratio
            named[f"{base}.over_floor_lower"] = row.over_floor.lower
            named[f"{base}.mmd"] = row.mmd.value
            named[f"{base}.residual_std"] = row.residual_std
        for draws in self.protocol.coverage_draws:
            shares = [cell.covered for cell in self.coverage if cell.draws == draws]
            if shares:
                named[f"coverage.{draws}_draws"] = sum(shares) / len(shares)
        return named

    def follows_the_law(self, row: MethodFigures, bar: float = 2.0) -> bool:
        """At most `bar` times the floor, and the residual's deviation within 15 percent of the exact one."""
        low, high = _RANGE
        return row.over_floor.holds(bar) and low <= row.residual_std / self.exact_residual_std <= high


def evaluate_gmm(
    protocol: GmmProtocol, flow_map: FlowMap | None, *, seed: int = 0, log: Callable[[str], None] = print
) -> GmmEvaluation:
    """Runs every method for every sampling seed.

    flow_map: None where the protocol steers the exact one. InputError for a model of anything but points in the plane.
    """
    mixture = isotropic_mixture(torch.tensor(GMM_MEANS), variance=GMM_VARIANCE)
    steered = GaussianMixtureFlowMap(mixture, num_inner_steps=8) if protocol.exact else flow_map
    if steered is None:
        raise InputError("model: none given, and protocol.exact=false")
    if steered.event_shape != (2,):
        raise InputError(f"model: its samples are of shape {list(steered.event_shape)}, expected [2] (experiment=gmm)")
    reward = protocol.reward()
    tilted = reward.tilt(mixture)
    methods = list(_methods(protocol, steered, reward, seed))
    seeds = {method.key: 1 if method.one_seed else protocol.num_seeds for method in methods}
    planned = {method.key: method.rows * seeds[method.key] for method in methods}
    work = Work({**planned, "coverage": _coverage_rows(protocol)}, log)
    count = protocol.num_samples

    def exact(number: int, base: int) -> Tensor:
        return tilted.sample(count, generator=torch.Generator().manual_seed(base + number))

    floor = metrics.distance_floor(
        lambda a, b: float(metrics.sliced_w2(a, b)), lambda k: exact(k, _FLOOR_SEED), pairs=protocol.floor_pairs
    )
    mmd_floor = metrics.distance_floor(
        metrics.squared_mmd, lambda k: exact(k, _FLOOR_SEED), pairs=min(10, protocol.floor_pairs)
    )
    figures = []
    for method in methods:
        with work.stage(method.key, method.label):
            sets, nfe = [], 0.0
            for number in range(seeds[method.key]):
                x, nfe = method.sample(seed + number)
                sets.append(x)
                work.advance(method.rows)
            references = [exact(number, _EXACT_SEED) for number in range(len(sets))]
            figures.append(_figures(method, nfe, sets, references, tilted, reward, floor))
    with work.stage("coverage", "value estimates against their closed form"):
        coverage = value_coverage(
            steered,
            mixture,
            reward,
            draws=protocol.coverage_draws,
            times=protocol.coverage_times,
            states=protocol.coverage_states,
            seed=seed + _COVERAGE_SEED,
        )
        work.advance(_coverage_rows(protocol))
    large = tilted.sample(200_000, generator=torch.Generator().manual_seed(_EXACT_SEED - 1))
    residual = _residual(large, reward)
    return GmmEvaluation(
        protocol=protocol,
        floor=floor,
        mmd_floor=mmd_floor,
        exact_residual_mean=float(residual.mean()),
        exact_residual_std=float(residual.std()),
        exact_weights=_nearest_shares(large, tilted),
        exact_samples=exact(0, _EXACT_SEED)[:_SHOWN],
        prior_samples=mixture.sample(_SHOWN, generator=torch.Generator().manual_seed(_PRIOR_SEED)),
        figures=tuple(figures),
        coverage=coverage,
        seconds=work.seconds,
    )


def _methods(protocol: GmmProtocol, flow_map: FlowMap, reward: LinearObservation, seed: int) -> Iterator[Method]:
    count, steps = protocol.num_samples, protocol.num_steps

    def steer(key: str, label: str, family: str, steering: Steering, draws: int, steps: int, dynamics: str) -> Method:
        def run(number: int) -> tuple[Tensor, float]:
            drawn = sample(
                flow_map,
                num_samples=count,
                steering=steering,
                num_steps=steps,
                dynamics=dynamics,
                seed=number,
                batch_size=_images_at_once(draws),
            )
            return drawn.images, drawn.nfe

        rows = count * steering.cost().total(steps)
        return Method(f"{key}_{dynamics}", f"{label}, {dynamics.upper()}", family, draws, steps, dynamics, run, rows)

    for dynamics in protocol.dynamics:
        for draws in protocol.draws_gradient:
            gradient = GradientGuidance(reward, num_draws=draws)
            yield steer(f"mfm_g_{draws}", f"MFM-G, {_draws(draws)}", "mfm_g", gradient, draws, steps, dynamics)
        for draws in protocol.draws_gradient_free:
            free = GradientFreeGuidance(reward, num_draws=draws)
            yield steer(f"mfm_gf_{draws}", f"MFM-GF, {_draws(draws)}", "mfm_gf", free, draws, steps, dynamics)
        for length in protocol.resampling_steps:
            for draws in protocol.draws_resampling:
                resampling = PosteriorResampling(reward, num_draws=draws)
                key, label = f"resampling_{draws}_k{length}", f"Resampling, {_draws(draws)}, {length} steps"
                yield steer(key, label, "resampling", resampling, draws, length, dynamics)
        yield steer("dps", "DPS", "muted", DPS(reward), 1, steps, dynamics)
    for n in protocol.best_of:
        yield _best_of(protocol, flow_map, reward, n)
    if protocol.smc_particles:
        yield _smc(protocol, flow_map, SMC(reward, num_particles=protocol.smc_particles), "tds", "TDS")
        weighed = SMC(
            reward, num_particles=protocol.smc_particles, potential="feynman_kac", num_draws=protocol.smc_draws
        )
        yield _smc(protocol, flow_map, weighed, "feynman_kac", f"Feynman-Kac SMC, {_draws(protocol.smc_draws)}")
    if protocol.paper_draws:
        yield _paper(protocol, flow_map, reward)


def _coverage_rows(protocol: GmmProtocol) -> float:
    return 2.0 * sum(protocol.coverage_draws) * len(protocol.coverage_times) * protocol.coverage_states


def _images_at_once(draws: int) -> int:
    """Network calls of about 8,000 rows: larger ones leave the cache of a CPU."""
    return max(64, 8192 // draws)


def _draws(num: int) -> str:
    return f"{num} draw{'s' if num > 1 else ''}"


def _best_of(protocol: GmmProtocol, flow_map: FlowMap, reward: LinearObservation, n: int) -> Method:
    """The best of n one-step samples: one call each, and one for its reward."""
    count = protocol.num_samples

    def run(number: int) -> tuple[Tensor, float]:
        best, best_reward = torch.zeros(count, 2), torch.full((count,), -math.inf)
        for candidate in range(n):
            x = refine(flow_map, num_samples=count, num_steps=1, seed=1_000_003 * (number + 1) + candidate)
            rewards = reward(x)
            better = rewards > best_reward
            best, best_reward = torch.where(better.unsqueeze(1), x, best), torch.maximum(rewards, best_reward)
        return best, 2.0 * n

    return Method(f"best_of_{n}", f"Best-of-{n:,}, 1 step", "best_of_n", n, 1, "none", run, rows=2.0 * count * n)


def _smc(protocol: GmmProtocol, flow_map: FlowMap, steering: SMC, key: str, name: str) -> Method:
    """One population; as many particles as samples are compared, drawn by their final weights."""
    count, particles = protocol.num_samples, steering.num_particles

    def run(number: int) -> tuple[Tensor, float]:
        drawn = sample(
            flow_map,
            num_samples=1,
            steering=steering,
            num_steps=protocol.num_steps,
            seed=number,
            keep_particles=True,
            batch_size=particles,
        )
        assert drawn.particles is not None
        assert drawn.particle_log_weights is not None
        share = torch.softmax(drawn.particle_log_weights[0], 0)
        chosen = torch.multinomial(share, count, replacement=True, generator=torch.Generator().manual_seed(number))
        return drawn.particles[0][chosen], drawn.nfe / count

    rows = float(steering.cost().total(protocol.num_steps))
    label = f"{name}, {particles:,} particles"
    return Method(key, label, "unsteered", particles, protocol.num_steps, "sde", run, rows)


def _paper(protocol: GmmProtocol, flow_map: FlowMap, reward: LinearObservation) -> Method:
    """The official grid and start, as the paper runs its mixture: Euler, not renormalised; one seed, for its price."""
    from mfm_ray.dynamics import TimeGrid

    draws, count = protocol.paper_draws, protocol.num_samples
    steering = GradientGuidance(reward, num_draws=draws, trust_region=None, estimator="pathwise")

    def run(number: int) -> tuple[Tensor, float]:
        grid = TimeGrid(start=0.01, power=1.0)
        drawn = sample(
            flow_map,
            num_samples=count,
            steering=steering,
            num_steps=250,
            dynamics="ode",
            grid=grid,
            seed=number,
            batch_size=_images_at_once(draws),
        )
        return drawn.images, drawn.nfe

    rows = float(count * steering.cost().total(250))
    label = f"official recipe, {_draws(draws)}"
    return Method(f"official_{draws}", label, "muted", draws, 250, "ode", run, rows, one_seed=True)


def _figures(
    method: Method,
    nfe: float,
    sets: list[Tensor],
    references: list[Tensor],
    tilted: GaussianMixture,
    reward: LinearObservation,
    floor: Mean,
) -> MethodFigures:
    pairs = list(zip(sets, references, strict=True))
    distance = metrics.mean_with_interval(torch.stack([metrics.sliced_w2(a, b) for a, b in pairs]))
    mmd = metrics.mean_with_interval(torch.tensor([metrics.squared_mmd(a, b) for a, b in pairs[:3]]))
    residual = torch.stack([_residual(x, reward) for x in sets])
    return MethodFigures(
        method=method,
        nfe=nfe,
        distance=distance,
        over_floor=metrics.over_floor(distance, floor),
        mmd=mmd,
        residual_mean=float(residual.mean()),
        residual_std=float(residual.std(1).mean()),
        weights=_nearest_shares(torch.cat(sets), tilted),
        samples=sets[0][:_SHOWN],
    )


def _residual(x: Tensor, reward: LinearObservation) -> Tensor:
    return x @ reward.direction - reward.observation


def _nearest_shares(x: Tensor, tilted: GaussianMixture) -> list[float]:
    nearest = torch.cdist(x, tilted.means).argmin(1)
    return (torch.bincount(nearest, minlength=len(tilted.means)) / len(x)).tolist()


def gmm_parquet(evaluation: GmmEvaluation) -> bytes:
    """One row a method with its figures and shown samples (part "method"), then one a cell of the coverage."""
    methods: list[dict[str, object]] = [
        {
            "part": "method",
            "method": row.method.key,
            "label": row.method.label,
            "draws": row.method.draws,
            "steps": row.method.steps,
            "dynamics": row.method.dynamics,
            "nfe": row.nfe,
            "sliced_w2": row.distance.value,
            "sliced_w2_half_width": row.distance.half_width,
            "seeds": row.distance.count,
            "floor": evaluation.floor.value,
            "over_floor": row.over_floor.ratio,
            "mmd": row.mmd.value,
            "residual_mean": row.residual_mean,
            "residual_std": row.residual_std,
            "exact_residual_std": evaluation.exact_residual_std,
            "weights": row.weights,
            "samples": row.samples.flatten().tolist(),
        }
        for row in evaluation.figures
    ]
    cells: list[dict[str, object]] = [{"part": "coverage", **asdict(cell)} for cell in evaluation.coverage]
    names = dict.fromkeys(name for row in (*methods, *cells) for name in row)
    columns = {name: [row.get(name) for row in (*methods, *cells)] for name in names}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue().to_pybytes()
