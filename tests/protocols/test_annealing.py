"""Chains of the tilted law against its closed form on a mixture of Gaussians, where the drift is exact."""

import pytest
import torch

from mfm_ray.networks.gaussian import GaussianMixtureFlowMap, LinearObservation, isotropic_mixture
from mfm_ray.protocols.annealing import anneal, draw_start, push_forward

MIXTURE = isotropic_mixture(torch.tensor([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]]), variance=0.5)
REWARD = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=0.2)


@pytest.fixture(scope="module")
def flow_map():
    return GaussianMixtureFlowMap(MIXTURE, num_inner_steps=8)


def run(flow_map, seed=0):
    start = draw_start(flow_map, size=4000, num_steps=40, seed=seed)
    return anneal(flow_map, REWARD, start, count=1000, final_moves=20, seed=seed)


def test_chains_end_in_the_tilted_law_and_know_its_normaliser(flow_map):
    found = run(flow_map)
    tilted = REWARD.tilt(MIXTURE)
    nearest = torch.cdist(found.samples, tilted.means).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / 1000
    exact = tilted.sample(200_000, generator=torch.Generator().manual_seed(0))
    wanted = torch.bincount(torch.cdist(exact, tilted.means).argmin(1), minlength=3) / len(exact)
    torch.testing.assert_close(shares, wanted, atol=0.07, rtol=0)  # chains share ancestors: a few hundred count
    residual, exact_residual = (x @ REWARD.direction - REWARD.observation for x in (found.samples, exact))
    assert float(residual.mean()) == pytest.approx(float(exact_residual.mean()), abs=0.03)
    assert float(residual.std()) == pytest.approx(float(exact_residual.std()), rel=0.1)
    assert found.log_normaliser == pytest.approx(float(torch.logsumexp(REWARD.log_evidence(MIXTURE), 0)), abs=0.1)
    assert 0.1 < found.acceptance < 0.6
    assert found.moves == 2 * found.temperatures + 20


def test_chains_of_no_reward_are_the_model_and_the_same_seed_gives_the_same_ones(flow_map):
    start = draw_start(flow_map, size=64, num_steps=10, seed=1)
    free = anneal(flow_map, lambda x: torch.zeros(len(x)), start, count=64, final_moves=0, seed=1)
    assert free.temperatures == 1
    assert free.log_normaliser == 0
    again = anneal(flow_map, lambda x: torch.zeros(len(x)), start, count=64, final_moves=0, seed=1)
    assert torch.equal(free.samples, again.samples)


def test_the_push_forward_is_of_second_order(flow_map):
    z = torch.randn(200, 2, generator=torch.Generator().manual_seed(2))
    exact = push_forward(flow_map, z, 800)
    few, many = ((push_forward(flow_map, z, k) - exact).square().mean().sqrt() for k in (20, 80))
    assert few / many > 6  # 16 of second order, 4 of first
