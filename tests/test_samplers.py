import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mfm_ray as mfm
from mfm_ray.data_space import DataSpace
from mfm_ray.dynamics import AdaptedGrid, Dynamics, MemorylessDiffusion, PowerOfLinear, ProbabilityFlow, TimeGrid
from mfm_ray.flow_map import FlowMap
from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.networks.gaussian import GaussianMixture, GaussianMixtureFlowMap, LinearObservation, isotropic_mixture
from mfm_ray.networks.residual_mlp import ResidualMLPFlowMap
from mfm_ray.noise import KeyedNoise
from mfm_ray.samplers import (
    OuterSampler,
    diagonal_posterior_draws,
)
from mfm_ray.steering import (
    DPS,
    SMC,
    AutoDraws,
    BestOfN,
    CallCounter,
    GradientFreeGuidance,
    GradientGuidance,
    GuidedDrift,
    PosteriorResampling,
    Search,
    SteeringContext,
    Unguided,
)
from mfm_ray.steering.budget import within_budget


def mixture() -> GaussianMixture:
    return isotropic_mixture(torch.tensor([[-1.5, -1.0], [0.5, 0.0], [1.0, 1.5]]), variance=0.5)


def oracle(*, num_inner_steps: int = 8) -> FlowMap:
    return GaussianMixtureFlowMap(mixture(), num_inner_steps=num_inner_steps)


def observation() -> LinearObservation:
    return LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=0.5)


def drift_step(dynamics: Dynamics, x, t, t_next, velocity, correction, noise) -> Tensor:
    """A step along a steered drift: the clean sample is the steered posterior mean."""
    return dynamics.step(x, LinearInterpolant().posterior_mean(x, velocity + correction, t), t, t_next, noise)


def brightness(pixels: Tensor) -> Tensor:
    return -20 * (pixels.mean((1, 2, 3)) - 0.7) ** 2 + pixels[:, 0, 0, 0]


def network() -> FlowMap:
    """A class-conditional image network with random weights in every layer, as large as trained ones."""
    torch.manual_seed(0)
    space = DataSpace(kind="image", event_shape=(1, 8, 8))
    flow_map = ResidualMLPFlowMap(
        space=space,
        width=128,
        num_blocks=2,
        num_classes=10,
        mean=torch.randn(64) * 0.3,
        variances=torch.linspace(1, 0.0, 64),
        basis=torch.linalg.qr(torch.randn(64, 64))[0],
    )
    for layer in (flow_map.network.project, *(block.contract for block in flow_map.network.blocks)):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return flow_map.eval().requires_grad_(False)


class ExactGuidance(Unguided):
    """The exact correction b* - b of a linear observation on a mixture."""

    def guide(self, x_t: Tensor, t: Tensor, velocity: Tensor, context: SteeringContext) -> GuidedDrift:
        return GuidedDrift(correction=observation().tilt(mixture()).velocity(x_t, t) - velocity, value=None)


def assert_moments(x: Tensor, law: GaussianMixture, *, bias: float) -> None:
    """Mean and variances of a law within 4 standard errors plus `bias` standard deviations (of discretisation)."""
    exact = law.covariance().diagonal()
    allowed = (4 / math.sqrt(len(x)) + bias) * exact.sqrt()
    assert ((x.mean(0) - law.mean()).abs() < allowed).all(), (x.mean(0), law.mean())
    squares = (x - law.mean()).square()
    allowed = 4 * squares.std(0) / math.sqrt(len(x)) + 2 * bias * exact
    assert ((squares.mean(0) - exact).abs() < allowed).all(), (squares.mean(0), exact)


@pytest.mark.parametrize("dynamics", [ProbabilityFlow(), MemorylessDiffusion()])
@pytest.mark.parametrize("guidance", [Unguided(), ExactGuidance()])
def test_with_the_exact_drift_both_dynamics_reach_the_law(dynamics, guidance):
    """The data's law unsteered, the tilted law steered, with 200 steps."""
    sampler = OuterSampler(oracle(), dynamics, TimeGrid().times(200))
    particles, _ = sampler.run(guidance, KeyedNoise.for_images(0, 4000).spread(1), None, CallCounter())
    x1 = particles.rows
    law = observation().tilt(mixture()) if isinstance(guidance, ExactGuidance) else mixture()
    assert_moments(x1, law, bias=0.03)


@pytest.mark.parametrize("dynamics", ["ode", "sde"])
def test_estimated_guidance_comes_close_to_the_tilted_law(dynamics):
    """Gradient-free, 32 draws, 25 steps: the mean along the observation, within a tenth of the prior's spread."""
    steering, flow_map = GradientFreeGuidance(observation(), num_draws=32), oracle(num_inner_steps=4)
    samples = mfm.sample(flow_map, num_samples=400, steering=steering, num_steps=25, dynamics=dynamics, batch_size=400)
    tilted, a = observation().tilt(mixture()), observation().direction
    spread = torch.sqrt(a @ mixture().covariance() @ a)
    assert ((samples.images @ a).mean() - tilted.mean() @ a).abs() < 0.1 * spread


def test_a_bridge_step_agrees_with_euler_maruyama_to_first_order():
    """Halving the step quarters the difference of the means, and of the variances."""
    g = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(64, 2, generator=g, dtype=torch.float64) for _ in range(3))
    t = torch.full((64,), 0.4, dtype=torch.float64)

    class Still:
        """Noise that is zero, or one."""

        def __init__(self, value: float) -> None:
            self.value = value

        def fold_in(self, value):
            return self

        def normal(self, *event):
            return torch.full((64, *event), self.value)

    differences = []
    for dt in (0.02, 0.01):
        mean = drift_step(MemorylessDiffusion(), x, t, t + dt, b, c, Still(0.0))
        variance = (drift_step(MemorylessDiffusion(), x, t, t + dt, b, c, Still(1.0)) - mean).square()
        euler = x + dt * (2 * b - x / t[:, None] + 2 * c)
        differences.append(((mean - euler).norm(), (variance - 2 * (1 - 0.4) / 0.4 * dt).norm()))
    for coarse, fine in zip(*differences, strict=True):
        assert 3.5 < coarse / fine < 4.5


def test_a_bridge_step_to_the_end_returns_the_posterior_mean_and_any_step_is_stable():
    x, b, c = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(0))
    t, noise = torch.full((8,), 0.001), KeyedNoise.for_images(0, 8)
    end = drift_step(MemorylessDiffusion(), x, t, torch.ones(8), b, c, noise)
    torch.testing.assert_close(end, x + 0.999 * (b + c))
    assert drift_step(MemorylessDiffusion(), x, t, torch.full((8,), 0.5), b, c, noise).abs().max() < 10


def test_a_bridge_step_is_the_interpolants_conditional_law():
    """For a point mass at m, x_t' given x_t has the bridge's mean and variance: joint Gaussian conditioning."""
    t, later, m, x = 0.3, 0.45, 1.7, 0.2
    covariance = (t / later) * (1 - later) ** 2  # of the reverse process from x_t' to x_t, whose drift is x / t
    gain = covariance / (1 - t) ** 2
    mean, variance = later * m + gain * (x - t * m), (1 - later) ** 2 - gain * covariance
    n = 20_000
    state = torch.full((n, 1), x)
    times = [torch.full((n,), value) for value in (t, later)]
    velocity = torch.full((n, 1), (m - x) / (1 - t))
    stepped = drift_step(MemorylessDiffusion(), state, *times, velocity, 0 * state, KeyedNoise.for_images(0, n))
    assert abs(stepped.mean() - mean) < 4 * math.sqrt(variance / n)
    assert abs(stepped.var() / variance - 1) < 4 * math.sqrt(2 / n)


def test_the_memoryless_diffusion_reaches_the_exact_posterior_and_no_other_does():
    """1-D mixture from t = 0.1: the exact posterior variance is met; sigma^2 = 1 would give half of it."""
    data = isotropic_mixture(torch.tensor([[-2.0], [1.0], [2.5]]), variance=0.3)
    flow_map, n, start = GaussianMixtureFlowMap(data), 10_000, 0.1
    x, noise = torch.full((n, 1), 0.3), KeyedNoise.for_images(0, n)
    exact = data.posterior(x[:1], torch.tensor([start]))
    times = torch.linspace(start, 1, 201)
    for step, (now, then) in enumerate(itertools.pairwise(times)):
        t, t_next = now.expand(n), then.expand(n)
        x = drift_step(MemorylessDiffusion(), x, t, t_next, flow_map.drift(x, t), 0 * x, noise.fold_in(step))
    squares = (x - exact.mean()).square()
    variance = exact.covariance()[0, 0, 0]
    assert (x.mean() - exact.mean()[0, 0]).abs() < (4 / math.sqrt(n) + 0.01) * variance.sqrt()
    assert (squares.mean() - variance).abs() < 4 * squares.std() / math.sqrt(n) + 0.015 * variance


@pytest.mark.parametrize("num_steps", [1, 4])
def test_refinement_with_the_exact_map_preserves_the_law_at_any_number_of_steps(num_steps):
    flow_map = GaussianMixtureFlowMap(mixture(), num_inner_steps=16)
    assert_moments(mfm.refine(flow_map, num_samples=4000, num_steps=num_steps), mixture(), bias=0.0)


def test_fine_steps_of_the_diagonal_follow_the_map():
    g = torch.Generator().manual_seed(0)
    x_t, t, noise = torch.randn(8, 2, generator=g), torch.linspace(0.1, 0.7, 8), KeyedNoise.for_images(0, 8)
    flow_map = GaussianMixtureFlowMap(mixture(), num_inner_steps=40)
    jumps = flow_map.posterior_draws(x_t, t, num_draws=3, generator=noise)
    errors = [
        (diagonal_posterior_draws(flow_map, x_t, t, num_draws=3, generator=noise, num_steps=k) - jumps).abs().mean()
        for k in (16, 64)
    ]
    assert errors[1] < 0.003
    assert 10 < errors[0] / errors[1] < 22  # the midpoint rule: second order


METHODS = {
    "unsteered": None,
    "gradient": GradientGuidance(brightness, num_draws=3),
    "gradient_free": GradientFreeGuidance(brightness, num_draws=5),
    "best_of_n": BestOfN(brightness, num_particles=3),
    "gradient_auto": GradientGuidance(brightness, num_draws=AutoDraws(effective=2.5, first=2, most=8)),
    "dps": DPS(brightness),
    "resampling": PosteriorResampling(brightness, num_draws=5),
    "search": Search(brightness, num_particles=3, num_draws=2),
    "search_alone": Search(
        brightness, num_particles=2, num_draws=3, resampling="max_per_particle", transition="deterministic"
    ),
    "smc": SMC(brightness, num_particles=5, resample_threshold=0.9),
    "smc_draws": SMC(brightness, num_particles=3, num_draws=2, potential="feynman_kac", resample_threshold=1.0),
    "smc_value": SMC(brightness, num_particles=3, num_draws=2, potential="value"),
}
ODE_METHODS = [name for name in METHODS if not name.startswith("smc")]


@pytest.mark.parametrize(
    ("method", "dynamics"), [(name, "sde") for name in METHODS] + [(name, "ode") for name in ODE_METHODS]
)
def test_an_image_is_the_same_to_the_bit_whatever_else_is_sampled(method, dynamics):
    """Over the number of samples, the batch size, the position in a batch and the cut into calls."""
    flow_map, labels = network(), torch.arange(33) % 10
    settings = {"steering": METHODS[method], "num_steps": 4, "dynamics": dynamics, "seed": 11}
    reference = mfm.sample(flow_map, num_samples=33, label=labels, batch_size=256, **settings)
    for num_samples, batch_size in [(1, 256), (2, 1), (7, 3), (33, 4), (33, 10), (33, 64)]:
        other = mfm.sample(
            flow_map, num_samples=num_samples, label=labels[:num_samples], batch_size=batch_size, **settings
        )
        assert torch.equal(other.images, reference.images[:num_samples]), (num_samples, batch_size)
        if method != "unsteered":
            assert torch.equal(other.rewards, reference.rewards[:num_samples]), (num_samples, batch_size)
        for name, values in other.trace.items():
            assert torch.equal(values, reference.trace[name][:, :num_samples]), name
    later = mfm.sample(flow_map, num_samples=5, label=labels[20:25], first_image=20, **settings)
    assert torch.equal(later.images, reference.images[20:25])


def test_refined_images_are_the_same_to_the_bit_whatever_else_is_sampled():
    flow_map, labels = network(), torch.arange(30) % 10
    reference = mfm.refine(flow_map, num_samples=30, num_steps=3, label=labels)
    for num_samples, batch_size in [(1, 1024), (7, 3), (30, 8)]:
        other = mfm.refine(
            flow_map, num_samples=num_samples, num_steps=3, label=labels[:num_samples], batch_size=batch_size
        )
        assert torch.equal(other, reference[:num_samples])


def test_seeds_labels_and_images_differ():
    flow_map, settings = network(), {"num_samples": 2, "num_steps": 3}
    reference = mfm.sample(flow_map, **settings, label=1).images
    assert not torch.allclose(reference[0], reference[1], atol=1e-3)
    assert not torch.allclose(reference, mfm.sample(flow_map, **settings, label=1, seed=1).images, atol=1e-3)
    assert not torch.allclose(reference, mfm.sample(flow_map, **settings, label=2).images, atol=1e-3)
    assert not torch.allclose(reference, mfm.sample(flow_map, **settings).images, atol=1e-3)
    assert torch.equal(reference, mfm.sample(flow_map, **settings, label=torch.tensor([1, 1])).images)


@pytest.mark.parametrize("num_samples", [1, 4, 7])
@pytest.mark.parametrize(
    ("steering", "nfe"),
    [
        (None, 6),  # K
        (GradientGuidance(brightness, num_draws=3), 6 + 4 * 3 * 6),  # K + 4 N K
        (GradientFreeGuidance(brightness, num_draws=3), 6 + 2 * 3 * 6),  # K + 2 N K
        (BestOfN(brightness, num_particles=5), 6 * 5 + 5),  # K N + N
        (DPS(brightness), 4 * 6),  # 4 K
        (Search(brightness, num_particles=3, num_draws=2), 2 * 3 * 2 * 6),  # 2 M N K
        (PosteriorResampling(brightness, num_draws=3), 2 * 3 * 6),  # 2 N K
        (SMC(brightness, num_particles=3), 4 * 3 * 6 + 3),  # 4 P K + P
        (SMC(brightness, num_particles=3, num_draws=2, potential="feynman_kac"), 5 * 3 * 6 + 3),
        (SMC(brightness, num_particles=3, num_draws=2, potential="value"), 9 * 3 * 6 + 3),
    ],
)
def test_network_and_reward_calls_are_counted_as_the_paper_counts_them(steering, nfe, num_samples):
    samples = mfm.sample(network(), num_samples=num_samples, steering=steering, num_steps=6, batch_size=10)
    assert samples.nfe == nfe
    assert sum(samples.calls.values()) == nfe
    assert (steering or Unguided()).cost().total(6) == nfe
    if steering is None or isinstance(steering, GradientGuidance | GradientFreeGuidance | DPS):
        assert samples.calls["drift"] == 6


def test_best_of_n_returns_the_particle_with_the_highest_reward():
    samples = mfm.sample(
        network(), num_samples=6, steering=BestOfN(brightness, num_particles=5), num_steps=3, keep_particles=True
    )
    assert samples.particles.shape == (6, 5, 1, 8, 8)
    assert torch.equal(samples.rewards, samples.particle_rewards.max(dim=1).values)
    best = samples.particle_rewards.argmax(dim=1)
    assert torch.equal(samples.images, samples.particles[torch.arange(6), best])
    torch.testing.assert_close(brightness(samples.images), samples.rewards)


def test_particles_are_kept_on_request_only():
    steering = BestOfN(brightness, num_particles=5)
    samples = mfm.sample(network(), num_samples=2, steering=steering, num_steps=2)
    assert samples.particles is None
    assert samples.particle_rewards is None


def test_the_first_particle_of_best_of_n_is_the_unsteered_sample():
    steering = BestOfN(brightness, num_particles=2)
    particles = mfm.sample(network(), num_samples=3, steering=steering, num_steps=3, keep_particles=True).particles
    assert torch.equal(particles[:, 0], mfm.sample(network(), num_samples=3, num_steps=3).images)


def test_gradient_free_guidance_with_one_draw_is_exactly_the_base_dynamics():
    for dynamics in ("ode", "sde"):
        settings = {"num_samples": 4, "num_steps": 5, "dynamics": dynamics}
        steered = mfm.sample(network(), steering=GradientFreeGuidance(brightness, num_draws=1), **settings)
        assert torch.equal(steered.images, mfm.sample(network(), **settings).images)


def test_images_are_in_data_units_with_rewards_of_those_images_and_a_trace_of_every_step():
    steering = GradientGuidance(brightness, num_draws=2)
    samples = mfm.sample(network(), num_samples=5, steering=steering, num_steps=4)
    assert samples.images.shape == (5, 1, 8, 8)
    assert 0 <= samples.images.min() < samples.images.max() <= 1
    torch.testing.assert_close(samples.rewards, brightness(samples.images))
    assert set(samples.trace) == {"value", "standard_error", "effective_sample_size", "guidance_ratio"}
    assert all(values.shape == (4, 5) and torch.isfinite(values).all() for values in samples.trace.values())


def test_unsteered_samples_have_neither_rewards_nor_trace():
    samples = mfm.sample(network(), num_samples=2, num_steps=2)
    assert samples.rewards is None
    assert samples.trace == {}


def test_the_default_dynamics_are_the_sde_where_a_drift_is_steered_and_the_ode_elsewhere():
    for method, steering in METHODS.items():
        settings = {"num_samples": 4, "num_steps": 3, "steering": steering}
        expected = "ode" if method in ("unsteered", "best_of_n") else "sde"
        given = mfm.sample(network(), dynamics=expected, **settings)
        assert torch.equal(mfm.sample(network(), **settings).images, given.images)


def test_the_papers_search_has_its_own_times():
    steering = Search(brightness, num_particles=2, num_draws=2)
    paper = mfm.sample(network(), num_samples=2, steering=steering, preset="paper", num_steps=4)
    by_hand = mfm.sample(network(), num_samples=2, steering=steering, num_steps=4, grid=PowerOfLinear(0.01, 2.5))
    assert torch.equal(paper.images, by_hand.images)
    assert PowerOfLinear(0.01, 2.5).times(2) == [0.01**2.5, 0.505**2.5, 1.0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_nfe", [1, 2, 3, 7, 20, 50, 119, 10_000])
def test_a_budget_is_never_exceeded_and_a_sample_always_returned(method, max_nfe):
    settings = {"num_samples": 3, "steering": METHODS[method], "num_steps": 8}
    samples = mfm.sample(network(), max_nfe=max_nfe, **settings)
    assert 1 <= samples.nfe <= max_nfe
    assert torch.isfinite(samples.images).all()
    if max_nfe == 10_000:
        assert torch.equal(samples.images, mfm.sample(network(), **settings).images)


def test_a_budget_is_used_and_costs_steps_before_draws():
    gradient = GradientGuidance(brightness, num_draws=4)  # 17 calls a step
    assert within_budget(gradient, 50, 17 * 20 + 16) == (gradient, 20)
    assert within_budget(gradient, 50, 60) == (replace(gradient, num_draws=2), 6)
    assert within_budget(gradient, 3, 17 * 3) == (gradient, 3)
    assert within_budget(gradient, 50, 12) == (replace(gradient, num_draws=1), 2)
    assert within_budget(BestOfN(brightness, num_particles=100), 10, 56) == (BestOfN(brightness, num_particles=5), 10)


def test_judges_score_the_images_and_are_not_counted():
    samples = mfm.sample(network(), num_samples=3, num_steps=2, judges={"brightness": brightness})
    torch.testing.assert_close(samples.judges["brightness"], brightness(samples.images))
    assert samples.nfe == 2


def test_steps_of_second_order_follow_the_exact_drift_an_order_better_at_the_same_calls():
    """ODE of the exact drift against 3200 Euler steps: halving the step divides the error by 2, or by more than 2.4."""
    flow_map, settings = oracle(), {"num_samples": 64, "dynamics": "ode"}
    exact = mfm.sample(flow_map, num_steps=3200, **settings).images
    error = {
        (order, steps): (mfm.sample(flow_map, num_steps=steps, order=order, **settings).images - exact).norm()
        for order in (1, 2)
        for steps in (25, 50)
    }
    assert 1.7 < error[1, 25] / error[1, 50] < 2.3
    assert error[2, 25] / error[2, 50] > 2.4  # 2^1.5: the steps grow along the grid
    assert error[2, 25] < error[1, 25] / 6
    assert mfm.sample(flow_map, num_samples=1, num_steps=7, order=2).nfe == 7


def test_an_adapted_grid_puts_its_times_where_the_clean_estimate_changes():
    grid = AdaptedGrid(knots=[0.1, 0.5, 0.7, 1.0], change=[0.0, 3.0, 1.0])
    times = grid.times(4)
    assert times[0] == 0.1
    assert times[-1] == 1.0
    assert times == sorted(set(times))
    torch.testing.assert_close(
        torch.tensor(times[1:3]), torch.tensor([0.5 + 0.2 / 3, 0.5 + 0.4 / 3]), atol=1e-3, rtol=0
    )
    pilot = mfm.adapt_grid(network(), GradientGuidance(brightness, num_draws=2), num_steps=12, num_images=4)
    again = mfm.adapt_grid(network(), GradientGuidance(brightness, num_draws=2), num_steps=12, num_images=4)
    assert pilot == again
    steered = mfm.sample(network(), num_samples=2, num_steps=6, grid=pilot)
    assert steered.nfe == 6


def test_progress_counts_images():
    seen = []
    mfm.sample(
        network(), num_samples=5, num_steps=1, batch_size=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_the_time_grid_runs_from_its_start_to_exactly_one():
    times = TimeGrid(start=0.01, power=2.0).times(7)
    assert times[0] == 0.01
    assert times[-1] == 1.0
    assert len(times) == 8
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert min(gaps) > 0
    assert gaps == sorted(gaps)


def test_the_papers_preset_is_250_linear_steps_with_the_correction_at_the_drifts_norm():
    steering = GradientGuidance(brightness, num_draws=1, guidance_scale=0.5)
    flow_map = network()
    paper = mfm.sample(flow_map, num_samples=4, steering=steering, preset="paper", num_steps=3)
    by_hand = mfm.sample(
        flow_map,
        num_samples=4,
        steering=replace(steering, renormalise="rescale", trust_region=None),
        num_steps=3,
        dynamics="ode",
        grid=TimeGrid(start=0.01, power=1.0),
    )
    assert torch.equal(paper.images, by_hand.images)
    torch.testing.assert_close(paper.trace["guidance_ratio"], torch.full((3, 4), 0.5))
    assert mfm.sample(flow_map, num_samples=1, preset="paper").nfe == 250
    assert mfm.sample(flow_map, num_samples=1).nfe == 50


def sample_with(**settings: object) -> object:
    return mfm.sample(network(), **({"num_samples": 2, "num_steps": 1} | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples=0: expected an integer of at least 1"),
        ({"num_steps": 0}, "num_steps=0: expected an integer of at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected an integer of at least 1"),
        ({"order": 3}, "order=3: expected 1 or 2"),
        ({"max_nfe": 0}, "max_nfe=0: expected an integer of at least 1"),
        ({"steering": SMC(brightness, num_particles=2), "dynamics": "ode"}, "dynamics=ode: expected sde: SMC weighs"),
        ({"dynamics": "pde"}, "dynamics='pde': expected one of ode, sde"),
        ({"preset": "fast"}, "preset='fast': expected one of paper"),
        ({"label": 10}, "label=10: expected an integer from 0 to 9"),
        ({"label": -1}, "label=-1: expected an integer from 0 to 9"),
        ({"label": torch.tensor([1, 2, 3])}, r"label of shape \(3,\): expected one class, or one for each of 2"),
        ({"seed": 2**63}, "seed=9223372036854775808: expected an integer"),
        ({"cfg_scale": 2.0}, "cfg_scale=2.0"),
    ],
)
def test_impossible_arguments_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        sample_with(**settings)


def test_impossible_grids_refinements_and_labels_are_refused_by_name():
    with pytest.raises(ValueError, match=r"start=0: expected a time in \(0, 1\)"):
        TimeGrid(start=0)
    with pytest.raises(ValueError, match="power=-1.0: expected a finite number above 0"):
        TimeGrid(power=-1.0)
    with pytest.raises(ValueError, match="num_steps=0: expected an integer of at least 1"):
        mfm.refine(network(), num_samples=1, num_steps=0)
    with pytest.raises(ValueError, match="label=1: this model has no classes"):
        mfm.sample(oracle(), num_samples=1, label=1)


def test_a_reward_that_fails_stops_the_run_and_names_itself():
    def broken(samples: Tensor) -> Tensor:
        return torch.full((len(samples),), math.nan)

    for steering in (GradientFreeGuidance(broken, num_draws=2), BestOfN(broken, num_particles=2)):
        with pytest.raises(ValueError, match="reward function: returned NaN"):
            sample_with(steering=steering)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_samples_stay_there_and_match_the_cpus(method):
    settings = {"num_samples": 6, "steering": METHODS[method], "num_steps": 4, "label": 3, "dynamics": "sde"}
    on_gpu = mfm.sample(network().to("cuda"), **settings)
    assert on_gpu.images.device.type == "cuda"
    torch.testing.assert_close(on_gpu.images.cpu(), mfm.sample(network(), **settings).images, rtol=0, atol=1e-3)
