"""The tuner of one process, and the flow map that it leaves, on a Gaussian that a fresh network is exact for."""

import pytest
import torch

from mfm_ray.data_space import DataSpace
from mfm_ray.finetuning import Tilt, build_method
from mfm_ray.finetuning.start import steered_samples
from mfm_ray.finetuning.tuner import Recipe, tune
from mfm_ray.networks.gaussian import LinearObservation, isotropic_mixture
from mfm_ray.networks.residual_mlp import ResidualMLPFlowMap
from mfm_ray.networks.tuned import TunedFlowMap
from mfm_ray.noise import KeyedNoise
from mfm_ray.samplers import sample

MEAN, VARIANCE = torch.tensor([0.5, -0.5]), 0.8
LAW = isotropic_mixture(MEAN.unsqueeze(0), variance=VARIANCE)
REWARD = LinearObservation(torch.tensor([1.0, 0.5]), observation=1.5, noise=0.5)
DATA = LAW.sample(4096, generator=torch.Generator().manual_seed(0))


def network(seed=0):
    """Its correction is zero at first, so that it is the exact flow map of the Gaussian."""
    torch.manual_seed(seed)
    return ResidualMLPFlowMap(
        space=DataSpace("coordinates", (2,)),
        width=32,
        num_blocks=1,
        mean=MEAN,
        variances=torch.full((2,), VARIANCE),
        basis=torch.eye(2),
    )


def recipe(**changes):
    return Recipe(**{"max_calls": 250_000, "batch_size": 256, "learning_rate": 3e-3, "start_steps": 8, **changes})


@pytest.mark.parametrize("method", ["mfm_ft", "reward_weighted"])
def test_samples_of_the_tuned_drift_follow_the_tilted_law(method):
    base = network()
    result = tune(base, REWARD, data=DATA, method=build_method({"name": method}), recipe=recipe(), seed=1)
    tilted = REWARD.tilt(LAW)
    images = sample(result.flow_map, num_samples=2048, num_steps=40, seed=3, batch_size=2048).images
    before = sample(base, num_samples=2048, num_steps=40, seed=3, batch_size=2048).images
    moved = (before.mean(0) - tilted.mean()).norm()
    assert (images.mean(0) - tilted.mean()).norm() < 0.25 * moved
    torch.testing.assert_close(torch.cov(images.T), tilted.covariance(), rtol=0.25, atol=0.06)
    assert result.history[-1].calls >= 250_000


def test_a_tuning_is_a_function_of_its_seed():
    small = recipe(max_calls=12_000)
    runs = [
        tune(network(), REWARD, data=DATA, method=build_method({"name": "mfm_ft"}), recipe=small, seed=seed)
        for seed in (1, 1, 2)
    ]
    losses = [[step.loss for step in run.history] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_the_drift_is_the_tuned_networks_and_the_draws_are_the_bases():
    base, other = network(), network(seed=1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tuned = TunedFlowMap(base, other)
    x, t = torch.randn(6, 2), torch.rand(6)
    noise = KeyedNoise.for_rows(0, torch.arange(6))
    assert torch.equal(tuned.drift(x, t), other.drift(x, t))
    draws = {"num_draws": 3, "generator": noise}
    assert torch.equal(tuned.posterior_draws(x, t, **draws), base.posterior_draws(x, t, **draws))
    # one call about both, as a server merges them
    zero, s = torch.zeros(6), torch.rand(6)
    at, inner = torch.cat([zero, t]), torch.cat([s, s])
    both = tuned.velocity(torch.cat([x, x]), inner, inner, t=at, x_t=torch.cat([zero.unsqueeze(1) * x, x]))
    torch.testing.assert_close(both[:6], other.drift(x, s))
    torch.testing.assert_close(both[6:], base.velocity(x, s, s, t=t, x_t=x))


def test_flow_maps_of_different_kinds_are_refused():
    with pytest.raises(ValueError, match="expected one of"):
        TunedFlowMap(network(), ResidualMLPFlowMap(space=DataSpace("coordinates", (3,)), width=8, num_blocks=1))


def test_chains_begin_near_the_tilted_law_with_and_without_a_gradient():
    tilted = REWARD.tilt(LAW)
    for reward in (REWARD, lambda x: REWARD(x).detach()):
        begun = steered_samples(Tilt(network(), reward), None, count=512, num_steps=16, num_draws=8, seed=0)
        assert (begun.mean(0) - tilted.mean()).norm() < 0.35 * (LAW.mean() - tilted.mean()).norm()
