"""Distances of posterior draws: an exact map stands at the floor."""

import torch

from mfm_ray.networks.gaussian import GaussianMixtureFlowMap, isotropic_mixture
from mfm_ray.protocols.posterior import noisy_contexts, num_calls, posterior_gap


def exact_map():
    return GaussianMixtureFlowMap(isotropic_mixture(torch.tensor([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]]), variance=0.5))


def test_draws_of_an_exact_map_are_at_the_floor_and_their_mean_is_not():
    flow_map = exact_map()
    clean = torch.tensor([[-3.0, -3.0], [3.0, 3.0], [0.0, 0.0], [0.5, 0.0]])
    contexts = noisy_contexts(clean, 0.3, flow_map.space, seed=0)
    done = []
    gap = posterior_gap(flow_map, contexts, num_draws=512, ode_steps=8, seed=0, progress=done.append)
    assert gap.floor.shape == (4,)
    assert 0.6 < gap.ratio < 1.6
    assert float(gap.mean.sum()) > 3 * float(gap.floor.sum())
    assert sum(done) == num_calls(num_contexts=4, num_draws=512, ode_steps=8)
