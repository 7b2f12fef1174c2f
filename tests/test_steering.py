import math

import pytest
import torch
from torch import Tensor

from mfm_ray.networks.gaussian import GaussianMixture, GaussianMixtureFlowMap, LinearObservation, isotropic_mixture
from mfm_ray.noise import KeyedNoise
from mfm_ray.steering import (
    AutoDraws,
    BestOfN,
    CallCounter,
    GradientFreeGuidance,
    GradientGuidance,
    Guidance,
    SteeringContext,
    Unguided,
    limit_shift,
    score,
)
from mfm_ray.steering.guidance import ESTIMATORS
from mfm_ray.steering.limits import automatic_radius


def mixture() -> GaussianMixture:
    return isotropic_mixture(torch.tensor([[-1.5, -1.0], [0.5, 0.0], [1.0, 1.5]]), variance=0.5)


def reward() -> LinearObservation:
    return LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=1.0)


def contexts(repeats: int, *, t: float = 0.4, seed: int = 0, inner_steps: int = 16) -> dict[str, object]:
    """One state x_t seen `repeats` times, with noise of its own each time."""
    flow_map = GaussianMixtureFlowMap(mixture(), num_inner_steps=inner_steps)
    x_t = torch.tensor([[0.3, -0.4]]).expand(repeats, 2).contiguous()
    time = torch.full((repeats,), t)
    context = SteeringContext(flow_map, KeyedNoise.for_images(seed, repeats), CallCounter())
    return {"x_t": x_t, "t": time, "velocity": flow_map.drift(x_t, time), "context": context}


def corrections(guidance: Guidance, repeats: int, **settings: float) -> Tensor:
    return guidance.guide(**contexts(repeats, **settings)).correction


def exact_correction(t: float = 0.4) -> Tensor:
    x = contexts(1, t=t)
    return (reward().tilt(mixture()).velocity(x["x_t"], x["t"]) - x["velocity"])[0]


def test_unguided_adds_nothing():
    guided = Unguided().guide(**contexts(3))
    assert torch.equal(guided.correction, torch.zeros(3, 2))
    assert guided.value is None


@pytest.mark.parametrize(
    "guidance",
    [
        GradientGuidance(reward(), num_draws=4096, trust_region=None),
        GradientFreeGuidance(reward(), num_draws=4096),
    ],
)
def test_guidance_converges_to_the_exact_correction(guidance):
    """Mean of 16 estimates from 4,096 draws, within 4 standard errors and half a percent."""
    found = corrections(guidance, 16, inner_steps=12)
    standard_error = found.std(0) / math.sqrt(16)
    assert ((found.mean(0) - exact_correction()).abs() < 4 * standard_error + 0.005 * exact_correction().norm()).all()


@pytest.mark.parametrize("method", [GradientGuidance, GradientFreeGuidance])
def test_its_error_falls_as_one_over_the_root_of_the_draws(method):
    """Slope of log error against log draws, -1/2 within 0.12, over 64 to 1,024 draws and 100 repeats."""
    settings = {"trust_region": None} if method is GradientGuidance else {}
    errors = {}
    for num_draws in (64, 1024):
        found = corrections(method(reward(), num_draws=num_draws, **settings), 100, inner_steps=6)
        errors[num_draws] = (found - exact_correction()).square().sum(1).mean().sqrt()
    slope = math.log(errors[1024] / errors[64]) / math.log(1024 / 64)
    assert -0.62 < slope < -0.38


def test_the_sde_needs_twice_what_the_ode_needs_and_both_come_from_the_values_gradient():
    """correction = (1 - t) / t grad V = (sigma^2 / 2) grad V."""
    x = contexts(1)
    state = x["x_t"].double().requires_grad_()
    exact = mixture().to(torch.float64)
    observed = LinearObservation(reward().direction.double(), reward().observation, reward().noise)
    (gradient,) = torch.autograd.grad(observed.value(exact, state, x["t"].double()).sum(), state)
    torch.testing.assert_close((0.6 / 0.4 * gradient[0]).float(), exact_correction(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_draws", "kept"), [(1, 0.0), (2, 0.5), (4, 0.75), (8, 0.875)])
def test_gradient_free_guidance_keeps_k_minus_1_over_k_of_a_weak_reward(num_draws, kept):
    """Along the exact correction, within 4 standard errors (measured once: 0, 0.504, 0.748, 0.868)."""
    weak = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=30.0)
    precise = LinearObservation(weak.direction.double(), weak.observation, weak.noise)
    x, exact_mixture = contexts(1), mixture().to(torch.float64)
    state, time = x["x_t"].double(), x["t"].double()
    exact = (precise.tilt(exact_mixture).velocity(state, time) - exact_mixture.velocity(state, time))[0]
    repeats = 24_000
    found = corrections(GradientFreeGuidance(weak, num_draws=num_draws), repeats, inner_steps=6).double()
    ratio = found @ exact / exact.square().sum()
    assert abs(ratio.mean() - kept) < 4 * ratio.std() / math.sqrt(repeats) + 0.005


def test_gradient_free_guidance_with_one_draw_is_exactly_no_guidance():
    assert torch.equal(corrections(GradientFreeGuidance(reward(), num_draws=1), 8), torch.zeros(8, 2))


def test_the_value_reported_is_that_of_the_state():
    x = contexts(8)
    value = GradientGuidance(reward(), num_draws=2048).guide(**x).value
    exact = reward().value(mixture(), x["x_t"], x["t"])
    assert ((value.value - exact).abs() < 4 * value.standard_error).all()
    assert not value.value.requires_grad


def test_the_guidance_scale_multiplies_last():
    for method in (GradientGuidance, GradientFreeGuidance):
        plain, scaled = (corrections(method(reward(), num_draws=4, guidance_scale=c), 8) for c in (1.0, 2.5))
        torch.testing.assert_close(scaled, 2.5 * plain)
    rescaled = GradientGuidance(reward(), num_draws=4, renormalise="rescale", guidance_scale=2.0)
    x = contexts(8)
    torch.testing.assert_close(rescaled.guide(**x).correction.norm(dim=1), 2 * x["velocity"].norm(dim=1))


def test_rescaling_gives_the_drifts_norm_and_clipping_at_most_that_both_keeping_directions():
    stiff = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=0.3)
    x = contexts(64)
    free, rescaled, clipped = (
        GradientGuidance(stiff, num_draws=2, trust_region=None, renormalise=name).guide(**x).correction
        for name in ("none", "rescale", "clip")
    )
    drift = x["velocity"].norm(dim=1)
    torch.testing.assert_close(rescaled.norm(dim=1), drift)
    torch.testing.assert_close(clipped.norm(dim=1), torch.minimum(free.norm(dim=1), drift))
    for changed in (rescaled, clipped):
        torch.testing.assert_close(torch.cosine_similarity(changed, free), torch.ones(64))


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-9])
@pytest.mark.parametrize("t", [0.001, 0.3, 0.99])
def test_the_trust_region_bounds_the_implied_shift_of_the_posterior_mean(noise, t):
    stiff = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=noise)
    guidance = GradientGuidance(stiff, num_draws=2, trust_region=1.5, estimator="pathwise")
    x = contexts(32, t=t)
    shift = (1 - t) * guidance.guide(**x).correction.norm(dim=1)
    bound = 1.5 * x["context"].flow_map.posterior_spread(x["t"])
    assert (shift <= bound * (1 + 1e-5)).all()
    if noise < 1e-2:
        torch.testing.assert_close(shift, bound)


def test_the_trust_region_is_inactive_when_the_correction_is_small():
    weak = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=10.0)
    limited, free = (corrections(GradientGuidance(weak, num_draws=4, trust_region=k), 32) for k in (4.0, None))
    assert torch.equal(limited, free)


def test_the_automatic_trust_region_leaves_as_draws_grow():
    """It stops binding pathwise gradients, and narrows where their share falls."""
    draws = torch.tensor([1.0, 4.0, 16.0])
    torch.testing.assert_close(automatic_radius(draws, 1), torch.tensor([4.0, 8.0, 16.0]))
    torch.testing.assert_close(automatic_radius(draws, 2), torch.tensor([4.0, 2.0, 1.0]))


def test_gradients_of_many_draws_shift_the_mean_by_no_more_than_the_radius_over_the_effective_sample_size():
    stiff = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=1e-3)
    x = contexts(32)
    mixed = GradientGuidance(stiff, num_draws=4, trust_region=1.5).guide(**x)
    free = GradientFreeGuidance(stiff, num_draws=4).guide(**x)
    shift = 0.6 * (mixed.correction - free.correction).norm(dim=1)
    bound = 1.5 * x["context"].flow_map.posterior_spread(x["t"]) / mixed.value.effective_sample_size
    torch.testing.assert_close(shift, bound, rtol=1e-4, atol=1e-4)


def test_with_one_draw_mixed_and_pathwise_estimates_are_one_bit_for_bit():
    stiff = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=0.2)
    mixed, pathwise = (corrections(GradientGuidance(stiff, num_draws=1, estimator=e), 64) for e in ESTIMATORS)
    assert torch.equal(mixed, pathwise)


@pytest.mark.parametrize("num_draws", [2, 5])
@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_mixed_and_pathwise_estimates_have_one_mean_at_any_number_of_draws(num_draws, noise):
    """Same draws: the mean difference, within 4 of its standard errors."""
    observed = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=noise)
    settings = {"num_draws": num_draws, "trust_region": None}
    mixed, pathwise = (
        corrections(GradientGuidance(observed, **settings, estimator=e), 40_000, inner_steps=6).double()
        for e in ESTIMATORS
    )
    difference = mixed - pathwise
    assert (difference.mean(0).abs() < 4 * difference.std(0) / math.sqrt(40_000) + 1e-3).all()
    if noise < 1:
        assert mixed.var(0).sum() < pathwise.var(0).sum()


def test_limiting_a_shift_survives_corrections_whose_squares_overflow():
    huge = torch.tensor([[3e25, -4e25], [0.0, 0.0]])
    limited = limit_shift(huge, torch.tensor([0.5, 0.5]), radius=torch.ones(2))
    torch.testing.assert_close(limited, torch.tensor([[1.2, -1.6], [0.0, 0.0]]))


def test_calls_are_counted_in_rows():
    x = contexts(5)
    GradientGuidance(reward(), num_draws=3).guide(**x)
    assert x["context"].calls == CallCounter(drift=0, draw=15, draw_backward=15, reward=15, reward_backward=15)
    x = contexts(5)
    GradientFreeGuidance(reward(), num_draws=3).guide(**x)
    assert x["context"].calls == CallCounter(drift=0, draw=15, draw_backward=0, reward=15, reward_backward=0)


class Named:
    name = "broken"

    def __init__(self, function) -> None:
        self.function = function

    def __call__(self, samples: Tensor) -> Tensor:
        return self.function(samples)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_an_error_that_names_it(bad):
    broken = Named(lambda x: torch.where(torch.arange(len(x)) == 1, bad, x.sum(1)))
    with pytest.raises(ValueError, match="reward broken: returned NaN or infinity"):
        score(broken, torch.zeros(3, 2))
    for method in (GradientGuidance, GradientFreeGuidance):
        with pytest.raises(ValueError, match="reward broken"):
            method(broken, num_draws=2).guide(**contexts(2))


def test_a_reward_of_the_wrong_shape_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"reward broken: returned shape \(4, 1\) for 4 samples"):
        score(Named(lambda x: x.sum(1, keepdim=True)), torch.zeros(4, 2))


def test_a_reward_without_a_gradient_is_refused_by_gradient_guidance_alone():
    flat = Named(lambda x: (x[:, 0] > 0).float())
    with pytest.raises(ValueError, match="reward broken: has no gradient; use one that has, or GradientFreeGuidance"):
        GradientGuidance(flat, num_draws=2).guide(**contexts(2))
    assert torch.isfinite(GradientFreeGuidance(flat, num_draws=2).guide(**contexts(2)).correction).all()


def test_a_reward_whose_gradient_is_nan_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="reward broken: its gradient is NaN or infinity"):
        GradientGuidance(Named(lambda x: (0 * x).sum(1).sqrt()), num_draws=2).guide(**contexts(2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GradientGuidance(reward(), num_draws=0), "num_draws=0: expected an integer of at least 1"),
        (lambda: GradientFreeGuidance(reward(), num_draws=-2), "num_draws=-2: expected an integer of at least 1"),
        (lambda: GradientGuidance(reward(), num_draws=1.5), "num_draws=1.5: expected an integer of at least 1"),
        (lambda: BestOfN(reward(), num_particles=0), "num_particles=0: expected an integer of at least 1"),
        (
            lambda: GradientGuidance(reward(), num_draws=1, guidance_scale=-1.0),
            "guidance_scale=-1.0: expected a finite number of at least 0",
        ),
        (
            lambda: GradientFreeGuidance(reward(), num_draws=1, guidance_scale=math.nan),
            "guidance_scale=nan: expected a finite number of at least 0",
        ),
        (
            lambda: GradientGuidance(reward(), num_draws=1, renormalise="norm"),
            "renormalise='norm': expected one of none, rescale, clip",
        ),
        (
            lambda: GradientGuidance(reward(), num_draws=1, trust_region=0.0),
            "trust_region=0.0: expected 'auto', a number above 0, or none",
        ),
        (
            lambda: GradientGuidance(reward(), num_draws=1, trust_region="wide"),
            "trust_region='wide': expected 'auto', a number above 0, or none",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("method", [GradientGuidance, GradientFreeGuidance])
@pytest.mark.parametrize("at_once", [1, 3, 8, 100])
def test_draws_made_in_parts_add_up_exactly_and_cost_the_same(method, at_once):
    stiff = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=0.05)
    x, y = contexts(6), contexts(6)
    whole = method(stiff, num_draws=8).guide(**x)
    parts = method(stiff, num_draws=8, draws_at_once=at_once).guide(**y)
    torch.testing.assert_close(parts.correction, whole.correction, rtol=1e-4, atol=1e-5)
    for name in ("value", "standard_error", "effective_sample_size"):
        torch.testing.assert_close(getattr(parts.value, name), getattr(whole.value, name), rtol=1e-4, atol=1e-5)
    assert x["context"].calls == y["context"].calls


@pytest.mark.parametrize("method", [GradientGuidance, GradientFreeGuidance])
def test_automatic_draws_stop_row_by_row_when_enough_of_them_count(method):
    """A row has either reached the effective size or spent the most draws, and equals a fixed number of draws."""
    stiff = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=0.4)
    auto = AutoDraws(effective=5.0, first=4, most=32)
    x = contexts(40)
    guided = method(stiff, num_draws=auto, trust_region=None).guide(**x) if method is GradientGuidance else None
    guided = guided or method(stiff, num_draws=auto).guide(**x)
    size = guided.value.effective_sample_size
    fixed = {}
    for num_draws in (4, 8, 16, 32):
        steering = method(stiff, num_draws=num_draws, **({"trust_region": None} if method is GradientGuidance else {}))
        fixed[num_draws] = steering.guide(**contexts(40))
    spent = 0
    for row in range(40):
        enough = [n for n, other in fixed.items() if other.value.effective_sample_size[row] >= 5.0]
        draws = min(enough, default=32)
        spent += draws
        torch.testing.assert_close(guided.correction[row], fixed[draws].correction[row], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(size[row], fixed[draws].value.effective_sample_size[row], rtol=1e-4, atol=1e-4)
    assert x["context"].calls.draw == x["context"].calls.reward == spent
    assert 4 * 40 < spent < 32 * 40
