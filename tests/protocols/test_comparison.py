"""The comparison of methods, on the exact flow map of a Gaussian mixture."""

import pytest
import torch

from mfm_ray.networks.gaussian import GaussianMixtureFlowMap, isotropic_mixture
from mfm_ray.protocols import comparison
from mfm_ray.protocols.comparison import Problem, SideBySide, Target
from mfm_ray.rewards import LinearGaussian


@pytest.fixture(scope="module")
def flow_map():
    return GaussianMixtureFlowMap(isotropic_mixture(torch.tensor([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]]), variance=0.5))


STEERED = comparison.steered_methods([1], 2, num_draws_resampling=8, resampling_steps=3)


def judge(points):
    """Classes left and right of the middle."""
    return torch.stack([-points[:, 0], points[:, 0]], dim=1)


def towards(observation):
    direction = torch.tensor([1.0, 0.0])
    return Target(LinearGaussian(direction=direction, observation=observation, noise=0.5), f"{observation:g}")


PROBLEM = Problem("linear", "Linear", "", targets=(towards(-3.0), towards(3.0)))


@pytest.fixture(scope="module")
def pool(flow_map):
    return comparison.make_pool(flow_map, judge, size=400, num_steps=10, seed=0)


def test_rewards_side_by_side_reach_their_own_rows():
    together = SideBySide([target.reward for target in PROBLEM.targets], "both")
    points = torch.tensor([[-3.0, 0.0], [-3.0, 1.0], [3.0, 0.0], [3.0, 1.0]])
    assert together(points).tolist() == [0.0] * 4
    assert together(-points).max() < -10


def test_steering_moves_each_target_to_its_side_with_the_paper_s_call_count(flow_map):
    method, steering = next(iter(STEERED.items()))
    score = comparison.score_steered(
        PROBLEM, method, steering, flow_map, judge, samples_per_target=8, num_steps=10, dynamics="sde", seed=1, shown=3
    )
    assert method.key == "mfm_g"
    assert score.nfe == 10 + 4 * 10  # K + 4 N K
    assert score.images.shape == (2, 3, 2)
    assert score.images[0, :, 0].max() < 0 < score.images[1, :, 0].min()


def test_best_of_n_counts_calls_and_shows_winners_of_disjoint_groups(pool):
    score = comparison.score_best_of(PROBLEM, pool, 100, shown=8)
    assert score.nfe == 10 * 100 + 100  # K N + N
    assert score.images.shape == (2, 4, 2)
    shown, rewards = score.images[0], comparison.pool_rewards(PROBLEM, pool)[0]
    best = {tuple(pool.images[100 * g + int(rewards[100 * g : 100 * (g + 1)].argmax())].tolist()) for g in range(4)}
    assert {tuple(image.tolist()) for image in shown} == best
    unsteered = comparison.score_unsteered(PROBLEM, pool, shown=4)
    assert unsteered.nfe == 10
    assert unsteered.reward < score.reward


def test_the_tilted_law_says_how_much_of_the_pool_counts(pool):
    law = comparison.tilted_law(PROBLEM, pool)
    assert 20 < law.sample_size < 200  # a third of the pool lies on the side of each target
    assert law.frequencies.sum() == pytest.approx(1)
    assert law.reward > comparison.score_unsteered(PROBLEM, pool, shown=1).reward


def test_wins_count_targets(flow_map, pool):
    steered = [
        comparison.score_steered(
            PROBLEM,
            method,
            steering,
            flow_map,
            judge,
            samples_per_target=4,
            num_steps=5,
            dynamics="ode",
            seed=1,
            shown=1,
        )
        for method, steering in STEERED.items()
    ]
    study = comparison.Study(
        PROBLEM, (comparison.score_best_of(PROBLEM, pool, 1, shown=1), *steered), comparison.tilted_law(PROBLEM, pool)
    )
    assert study.wins(over="best_of_1") == 2
    assert study["mfm_gf"].method.label == "MFM-GF, 2 draws"
    assert study["resampling"].nfe == 2 * 8 * 3  # 2 N K, in steps of its own
    assert study["dps"].nfe == 4 * 5  # 4 K
