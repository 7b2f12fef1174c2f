"""The equations of reward fine-tuning, against closed forms of a Gaussian mixture."""

import math

import pytest
import torch

from mfm_ray import metrics
from mfm_ray.data.datasets import GMM_MEANS, GMM_VARIANCE
from mfm_ray.errors import InputError
from mfm_ray.finetuning import (
    AdjointMatching,
    Anchors,
    ReinforceAdjointMatching,
    RewardMatching,
    RewardWeightedRegression,
    Tilt,
    TiltedChains,
    build_method,
    regression_loss,
)
from mfm_ray.finetuning.reward_matching import leave_one_out
from mfm_ray.networks.gaussian import (
    GaussianMixture,
    GaussianMixtureFlowMap,
    LinearObservation,
    isotropic_mixture,
)
from mfm_ray.noise import KeyedNoise
from mfm_ray.protocols.finetune_gmm import FORMS, FinetuneGmmProtocol, fixed_point

MIXTURE = isotropic_mixture(torch.tensor(GMM_MEANS), variance=GMM_VARIANCE)
REWARD = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=0.7)
TILTED = REWARD.tilt(MIXTURE)
EXACT = GaussianMixtureFlowMap(MIXTURE, num_inner_steps=8)
PROTOCOL = FinetuneGmmProtocol(
    name="finetune_gmm",
    experiment="gmm",
    direction=[1.2, -0.8],
    observation=-1.0,
    noise=0.2,
    methods=["anchored"],
    max_calls=1000,
    batch_size=8,
    learning_rate=1e-3,
    fixed_points=16,
    fixed_point_repeats=300,
    num_samples=64,
    num_seeds=1,
    floor_pairs=2,
    num_steps=5,
    dynamics=["ode"],
)


def tilt_of(reward, mixture=MIXTURE, flow_map=EXACT):
    generator = torch.Generator().manual_seed(1)
    return Tilt(flow_map, reward).with_normaliser(mixture.sample(8192, generator=generator))


def noise_of(rows, seed=0):
    return KeyedNoise.for_rows(seed, torch.arange(rows))


def anchors_of(law, rows, reward, seed=2):
    x1 = law.sample(rows, generator=torch.Generator().manual_seed(seed))
    return Anchors(x1, None, reward(x1).double())


def orthogonality(targets, optimal, features=3):
    """E[w (target - b*(x_t)) f(x_t)] for f = 1, x_1, x_2, in standard errors: small where b* is the fixed point."""
    error = targets.weight.unsqueeze(1) * (targets.target - optimal(targets.x_t, targets.t))
    scores = []
    for feature in [torch.ones_like(targets.t), *targets.x_t.unbind(1)][:features]:
        product = (error * feature.unsqueeze(1)).double()
        scores.append(product.mean(0) / (product.std(0) / math.sqrt(len(product))))
    return torch.cat(scores)


@pytest.mark.parametrize("form", ["anchored", "pointwise"])
def test_the_fixed_point_is_the_optimal_drift_at_random_states(form):
    point = fixed_point(form, PROTOCOL, MIXTURE, seed=0)
    assert point.error < 2 * point.standard_error
    assert point.covered > 0.85


def test_the_published_setting_has_another_fixed_point():
    point = fixed_point("official", PROTOCOL, MIXTURE, seed=0)
    assert point.error > 3 * point.standard_error
    assert point.covered < 0.7


@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize("estimator", ["score", "pathwise", "mixed"])
def test_any_number_of_draws_is_unbiased_for_states_of_any_law(num_draws, estimator):
    method = RewardMatching(num_draws=num_draws, baseline="leave_one_out", estimator=estimator, max_time=0.9)
    targets = method.targets(tilt_of(REWARD), anchors_of(MIXTURE, 6000, REWARD), noise_of(6000))
    assert orthogonality(targets, TILTED.velocity).abs().max() < 4.5


@pytest.mark.parametrize("num_draws", [1, 4])
def test_weights_over_draws_and_anchor_are_unbiased_for_tilted_anchors(num_draws):
    method = RewardMatching(num_draws=num_draws, max_time=0.95)
    targets = method.targets(tilt_of(REWARD), anchors_of(TILTED, 8000, REWARD), noise_of(8000))
    assert orthogonality(targets, TILTED.velocity).abs().max() < 4.5
    # and they rest on that law: anchors of the prior give another fixed point
    wrong = method.targets(tilt_of(REWARD), anchors_of(MIXTURE, 8000, REWARD), noise_of(8000))
    assert orthogonality(wrong, TILTED.velocity).abs().max() > 8


def test_the_weighted_loss_has_the_gradient_of_the_papers_form():
    tilt, rows = Tilt(EXACT, REWARD), 16
    method = RewardMatching(num_draws=1, baseline="none", estimator="pathwise", diffusion=0.7)
    targets = method.targets(tilt, anchors_of(TILTED, rows, REWARD), noise_of(rows))
    base = tilt.base_drift(targets.x_t, targets.t, None)
    tuned = (base + torch.randn(rows, 2, generator=torch.Generator().manual_seed(3))).requires_grad_()
    (ours,) = torch.autograd.grad(regression_loss(tuned, targets).sum(), tuned)
    exp_reward = targets.weight.unsqueeze(1)
    slope = exp_reward * (targets.target - base)  # (sigma^2 / 2) grad_x exp r
    published = base - (exp_reward - 1) * (tuned.detach() - base) + slope
    (theirs,) = torch.autograd.grad((tuned - published).square().mean(1).sum(), tuned)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_leave_one_out_looks_at_all_but_its_own_draw():
    rewards = torch.randn(5, 4, dtype=torch.float64) * 3
    anchor = torch.tensor([0.3, -2.0, math.nan, 1.0, math.nan], dtype=torch.float64)
    found = leave_one_out(rewards, anchor)
    for row in range(5):
        for own in range(4):
            others = [rewards[row, i] for i in range(4) if i != own]
            others += [] if anchor[row].isnan() else [anchor[row]]
            expected = torch.stack(others).exp().mean().log()
            torch.testing.assert_close(found[row, own], expected)
    assert leave_one_out(rewards[:, :1], torch.full((5,), math.nan)).eq(0).all()


def test_chains_keep_the_tilted_law_and_find_it_from_the_prior():
    rows, tilt = 2048, tilt_of(REWARD)
    method = RewardMatching(num_draws=4)
    exact = TILTED.sample(rows, generator=torch.Generator().manual_seed(9))
    floor = float(metrics.sliced_w2(exact, TILTED.sample(rows, generator=torch.Generator().manual_seed(10))))

    def moved(start, steps):
        chains = TiltedChains(rows=rows, event_shape=(2,), chains=1, restart=0.0)
        for step in range(steps):
            noise = noise_of(rows, seed=4).fold_in(step)
            anchors = chains.anchors(tilt, start, None, noise, step)
            chains.advance(method.targets(tilt, anchors, noise), step)
        return float(metrics.sliced_w2(chains.state()["x1"][0], exact))

    prior = MIXTURE.sample(rows, generator=torch.Generator().manual_seed(11))
    kept = moved(TILTED.sample(rows, generator=torch.Generator().manual_seed(12)), 3)
    assert kept < 2.5 * floor
    assert moved(prior, 8) < 0.5 * float(metrics.sliced_w2(prior, exact))


def test_chains_are_resumed_and_split_over_workers_to_the_bit():
    tilt, method, rows = tilt_of(REWARD), RewardMatching(num_draws=2), 8
    data = MIXTURE.sample(rows, generator=torch.Generator().manual_seed(5))

    def run(chains, part, steps):
        for step in steps:
            noise = noise_of(rows, seed=6)[part].fold_in(step)
            anchors = chains.anchors(tilt, data[part], None, noise, step)
            chains.advance(method.targets(tilt, anchors, noise), step)
        return chains.state()

    def fresh(size):
        return TiltedChains(rows=size, event_shape=(2,), chains=2, restart=0.3)

    whole = run(fresh(rows), slice(0, rows), range(6))
    halves = [run(fresh(rows // 2), part, range(6)) for part in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(torch.cat([half["x1"] for half in halves], 1), whole["x1"], rtol=1e-5, atol=1e-6)
    resumed = fresh(rows)
    resumed.load_state(run(fresh(rows), slice(0, rows), range(3)))
    assert torch.equal(run(resumed, slice(0, rows), range(3, 6))["x1"], whole["x1"])
    with pytest.raises(ValueError, match="chains of shape"):
        fresh(4).load_state(whole)


def test_reward_weighted_regression_has_the_tilted_drift_as_fixed_point():
    method = RewardWeightedRegression(max_time=0.95)
    targets = method.targets(tilt_of(REWARD), anchors_of(MIXTURE, 60_000, REWARD), noise_of(60_000))
    assert orthogonality(targets, TILTED.velocity).abs().max() < 4.5


def test_adjoint_matching_rests_at_the_optimal_drift():
    method = AdjointMatching(num_steps=60, states_per_path=10)
    rows = 6000
    targets = method.targets(
        tilt_of(REWARD), anchors_of(MIXTURE, rows, REWARD), noise_of(rows), drift=lambda x, t, _: TILTED.velocity(x, t)
    )
    error = (targets.target - TILTED.velocity(targets.x_t, targets.t)).mean(0)
    size = (TILTED.velocity(targets.x_t, targets.t) - MIXTURE.velocity(targets.x_t, targets.t)).square().mean().sqrt()
    assert error.abs().max() < 0.15 * size


def test_reinforce_adjoint_matching_is_exact_for_a_linear_reward_of_a_gaussian():
    single = isotropic_mixture(torch.tensor([[0.4, -0.3]]), variance=0.8)
    slope = torch.tensor([0.5, -0.4])
    shifted = GaussianMixture(single.log_weights, single.means + 0.8 * slope, single.variances, single.axes)
    tilt = Tilt(GaussianMixtureFlowMap(single, num_inner_steps=4), lambda x: x @ slope)
    method = ReinforceAdjointMatching(num_steps=60, noisings=4, largest_advantage=100.0, max_time=0.95)
    rows = 40_000
    data = Anchors(torch.zeros(rows, 2), None, torch.zeros(rows))
    targets = method.targets(tilt, data, noise_of(rows), drift=lambda x, t, _: shifted.velocity(x, t))
    assert orthogonality(targets, shifted.velocity, features=1).abs().max() < 5


def test_a_reward_that_is_not_finite_is_named():
    tilt = Tilt(EXACT, lambda x: torch.full((len(x),), math.nan))
    with pytest.raises(ValueError, match="returned NaN or infinity"):
        RewardMatching().targets(tilt, anchors_of(MIXTURE, 8, REWARD), noise_of(8))
    huge = Tilt(EXACT, lambda x: 1e3 + 0 * x[:, 0])
    with pytest.raises(ValueError, match="reward_multiplier"):
        RewardMatching(baseline="none").targets(huge, anchors_of(MIXTURE, 8, REWARD), noise_of(8))


@pytest.mark.parametrize("method", [RewardMatching(baseline="none", estimator="pathwise"), AdjointMatching()])
def test_a_reward_without_the_gradient_that_a_method_takes_is_named(method):
    tilt = Tilt(EXACT, lambda x: REWARD(x).detach())
    with pytest.raises(ValueError, match="has no gradient, which this method takes"):
        method.targets(
            tilt, anchors_of(MIXTURE, 10, REWARD), noise_of(10), drift=lambda x, t, _: MIXTURE.velocity(x, t)
        )


@pytest.mark.parametrize("form", FORMS)
def test_every_compared_form_can_be_built(form):
    arguments = {name: value for name, value in FORMS[form].items() if name != "name"}
    assert vars(build_method(FORMS[form])).items() >= arguments.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mfm"}, "method.name='mfm': expected one of"),
        ({"name": "mfm_ft", "num_draw": 2}, "method.num_draw: unknown key"),
        ({"name": "mfm_ft", "num_draws": 0}, "num_draws=0"),
        ({"name": "mfm_ft", "estimator": "pathwise"}, "estimator=pathwise: expected score with baseline=anchored"),
        ({"name": "mfm_ft", "baseline": "mean"}, "baseline=mean: expected one of anchored, leave_one_out, none"),
        ({"name": "mfm_ft", "baseline": "none", "diffusion": 1.0}, "diffusion=1.0: expected null unless"),
        ({"name": "adjoint_matching", "num_steps": 3}, "states_per_path=4: expected at most num_steps=3"),
    ],
)
def test_a_method_that_cannot_be_is_refused_by_name(arguments, message):
    with pytest.raises((InputError, ValueError), match=message):
        build_method(arguments)
