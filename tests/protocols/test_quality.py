"""Distances to the tilted law, on laws whose answer is known."""

import math

import pytest
import torch

from mfm_ray import metrics
from mfm_ray.data.datasets import Split
from mfm_ray.networks.gaussian import GaussianMixtureFlowMap, isotropic_mixture
from mfm_ray.protocols import comparison
from mfm_ray.protocols.annealing import draw_start
from mfm_ray.protocols.comparison import Problem, Study, Target
from mfm_ray.protocols.problems import half_chi_square
from mfm_ray.protocols.quality import Yardstick, cheapest_as_good, judge_study, sample_law
from mfm_ray.rewards import LinearGaussian

FLOW_MAP = GaussianMixtureFlowMap(isotropic_mixture(torch.tensor([[0.0, 0.0]]), variance=1.0), num_inner_steps=4)
PROBLEM = Problem(
    "linear",
    "Linear",
    "",
    (Target(LinearGaussian(direction=torch.tensor([1.0, 0.0]), observation=1.0, noise=1.0), ""),),
)


def judge(points):
    return points


@pytest.fixture(scope="module")
def judged():
    """A normal prior observed at 1 with noise 1: the tilted law is N((1/2, 0), diag(1/2, 1))."""
    pool = comparison.make_pool(FLOW_MAP, judge, size=2000, num_steps=10, seed=0)
    scores = [
        comparison.score_unsteered(PROBLEM, pool, shown=1),
        comparison.score_best_of(PROBLEM, pool, 1000, shown=1),
    ]
    for method, steering in comparison.at_steps(
        comparison.steered_methods([1, 16], 32, num_draws_resampling=64, resampling_steps=3), [5]
    ).items():
        scores.append(
            comparison.score_steered(
                PROBLEM,
                method,
                steering,
                FLOW_MAP,
                judge,
                samples_per_target=400,
                num_steps=5,
                dynamics="sde",
                seed=1,
                shown=1,
            )
        )
    starts = tuple(draw_start(FLOW_MAP, size=3000, num_steps=20, seed=2 + half) for half in range(2))
    law = sample_law(FLOW_MAP, judge, PROBLEM, starts, size=1600, moves=10, seed=2, advance=lambda rows: None)
    study = Study(PROBLEM, tuple(scores), comparison.tilted_law(PROBLEM, pool))
    train = Split(torch.randn(3000, 2, generator=torch.Generator().manual_seed(5)), torch.zeros(3000).long())
    return study, judge_study(study, Yardstick.of(judge, train), law)


def test_the_chains_are_the_tilted_law(judged):
    _, judgement = judged
    features = judgement.law.all_features
    torch.testing.assert_close(features.mean(0), torch.tensor([0.5, 0.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(features.var(0), torch.tensor([0.5, 1.0]), atol=0.12, rtol=0)


def test_a_method_that_follows_the_law_is_at_the_floor_and_the_model_itself_is_not(judged):
    study, judgement = judged
    good = study["resampling_k5"]
    floor = judgement.floor(good)
    assert abs(judgement["resampling_k5"].mmd_law) < 4 * floor.mmd_law
    assert judgement["resampling_k5"].frechet_law < 4 * floor.frechet_law
    assert judgement["resampling_k5"].reward_w1 < 3 * floor.reward_w1
    unsteered = judgement["unsteered"]
    assert unsteered.mmd_law > 10 * floor.mmd_law
    # means apart by 1/2, deviations 1 and sqrt(1/2): (1/2)^2 + (1 - sqrt(1/2))^2
    assert unsteered.frechet_law == pytest.approx(0.25 + (1 - math.sqrt(0.5)) ** 2, rel=0.25)
    assert unsteered.frechet_data < 0.2 * unsteered.frechet_law


def test_few_effective_members_of_a_pool_carry_no_distance_between_images(judged):
    _, judgement = judged
    best = judgement["best_of_1000"]
    assert best.mmd_law is None
    assert best.frechet_data is None
    assert best.reward_w1 > 0


def test_the_cheapest_as_good_has_no_larger_error(judged):
    study, judgement = judged
    keys = [score.method.key for score in study.scores if score.weights is None]
    match = cheapest_as_good(study, judgement, "dps_k5", among=keys)
    assert match.nfe == min(study[key].nfe for key in keys if judgement[key].error <= judgement["dps_k5"].error)
    assert cheapest_as_good(study, judgement, "unsteered", among=keys) is None  # of 400 samples, fewer than the pool
    # below the floor an error is chance: whoever is at the floor is as good, and nobody else
    best = min(keys, key=lambda key: judgement[key].error)
    floor = judgement.floor(study[best]).error
    assert judgement[best].error < floor
    assert judgement[cheapest_as_good(study, judgement, best, among=keys).method.key].error <= floor
    above = [key for key in keys if judgement[key].error > floor]
    assert cheapest_as_good(study, judgement, best, among=above) is None


def test_half_chi_square_has_its_moments():
    values = half_chi_square(32)
    assert float(values.mean()) == pytest.approx(-16, abs=0.1)
    assert float(values.std()) == pytest.approx(4, abs=0.1)
    assert metrics.wasserstein_1(values, values + 1) == pytest.approx(1)
