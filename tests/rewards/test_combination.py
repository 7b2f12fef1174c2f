import pytest
import torch

import mfm_ray as mfm
from mfm_ray.networks.gaussian import GaussianMixtureFlowMap, isotropic_mixture
from mfm_ray.rewards import (
    LinearGaussian,
    Minimum,
    RewardError,
    TargetBrightness,
    Thresholded,
    WeightedSum,
    check_rewards,
)


def bright(name="brightness"):
    return TargetBrightness(target=0.5, scale=0.1, name=name)


def linear():
    return LinearGaussian(direction=[1.0, -1.0], observation=0.0, noise=1.0)


def first_coordinate(samples):
    return samples[:, 0]


X = torch.tensor([[0.1, 0.2], [0.9, 0.4], [0.5, 0.5]])


def test_the_sum_is_its_weighted_parts():
    total = WeightedSum(rewards=[bright(), linear(), first_coordinate], weights=[2.0, 0.5, -1.0])
    parts = total.breakdown(X)
    assert list(parts) == ["brightness", "linear_gaussian", "first_coordinate"]
    assert torch.equal(parts["brightness"], bright()(X))
    torch.testing.assert_close(total(X), 2 * bright()(X) + 0.5 * linear()(X) - X[:, 0])
    assert torch.equal(total.total(parts), total(X))
    assert total(X).dtype == torch.float32


def test_one_weight_multiplies_one_reward():
    torch.testing.assert_close(WeightedSum(rewards=[bright()], weights=[3])(X), 3 * bright()(X))
    assert torch.equal(WeightedSum(rewards=[bright()])(X), bright()(X))


def test_gradients_flow_through_every_part():
    x = X.double().requires_grad_()
    total = WeightedSum(rewards=[bright(), linear()], weights=[2.0, 0.5])
    (gradient,) = torch.autograd.grad(total(x).sum(), x)
    (expected,) = torch.autograd.grad((2 * bright().log_weight(x) + 0.5 * linear().log_weight(x)).sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_module_parts_move_with_the_sum():
    total = WeightedSum(rewards=[bright(), linear()]).double()
    assert total.rewards["linear_gaussian"].direction.dtype == torch.float64


def test_sums_nest():
    inner = WeightedSum(rewards=[bright(), linear()], name="inner")
    torch.testing.assert_close(WeightedSum(rewards=[inner, first_coordinate])(X), inner(X) + X[:, 0])


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        ([], None, "none given"),
        ([bright(), bright()], None, "'brightness' occurs more than once"),
        ([bright()], [1.0, 2.0], "2 given for 1 rewards"),
        ([bright()], [float("nan")], "weight=nan of reward brightness"),
        ([bright()], ["a"], "weight=a of reward brightness"),
    ],
)
def test_sums_that_make_no_sense_are_refused(rewards, weights, message):
    for combination in (WeightedSum, Minimum):
        with pytest.raises(ValueError, match=message):
            combination(rewards=rewards, weights=weights)


def test_two_of_a_kind_are_told_apart_by_name():
    total = WeightedSum(rewards=[bright("left"), bright("right")])
    assert set(total.breakdown(X)) == {"left", "right"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([0.0, float("nan"), 0.0]), "returned nan for sample 1"),
        (torch.tensor([0.0, 0.0, float("-inf")]), "returned -inf for sample 2"),
        (torch.zeros(3, 1), r"returned \(3, 1\), expected one number for each sample, \(3,\)"),
        (torch.zeros(2), r"returned \(2,\)"),
        (torch.tensor(0.0), r"returned \(\)"),
        ([0.0, 0.0, 0.0], "returned list"),
    ],
)
def test_a_part_that_misbehaves_is_named(values, message):
    def broken(samples):
        return values

    for reward in (WeightedSum(rewards=[bright(), broken]), Minimum(rewards=[bright(), broken])):
        with pytest.raises(RewardError, match=rf"reward broken: {message}"):
            reward(X)
    with pytest.raises(RewardError, match=rf"reward broken: {message}"):
        Thresholded(reward=broken, threshold=0.0)(X)


def test_checked_rewards_keep_their_graph():
    values = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert check_rewards(values, "own").grad_fn is not None
    assert check_rewards(values, "own").dtype == torch.float32


def test_the_minimum_is_the_worst_weighted_part():
    worst = Minimum(rewards=[bright(), linear()], weights=[2.0, 0.5])
    assert torch.equal(worst(X), torch.minimum(2 * bright()(X), 0.5 * linear()(X)))
    assert {name: values.tolist() for name, values in worst.breakdown(X).items()} == {
        "brightness": bright()(X).tolist(),
        "linear_gaussian": linear()(X).tolist(),
    }
    assert torch.equal(worst.total(worst.breakdown(X)), worst(X))
    assert worst(X.half()).dtype == torch.float32
    assert worst.name == "minimum"


def test_the_gradient_of_a_minimum_is_that_of_its_smallest_part():
    x = X.double().requires_grad_()
    parts = [bright(), linear()]
    weighted = torch.stack([2 * parts[0].log_weight(x), 20 * parts[1].log_weight(x)])
    chosen = weighted.argmin(0)
    assert set(chosen.tolist()) == {0, 1}  # each part is the worst somewhere
    (expected,) = torch.autograd.grad(weighted.gather(0, chosen[None]).sum(), x)
    (gradient,) = torch.autograd.grad(Minimum(rewards=parts, weights=[2.0, 20.0])(x).sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_equally_small_parts_share_the_gradient():
    x = torch.tensor([[0.3, 0.3]], requires_grad=True)

    def second_coordinate(samples):
        return samples[:, 1]

    (gradient,) = torch.autograd.grad(Minimum(rewards=[first_coordinate, second_coordinate])(x).sum(), x)
    assert gradient.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("weight", [0, -1.0, float("inf"), True])
def test_a_minimum_takes_positive_weights_alone(weight):
    with pytest.raises(ValueError, match=f"weight={weight} of reward brightness: expected a finite number above 0"):
        Minimum(rewards=[bright()], weights=[weight])


def test_a_part_without_a_gradient_is_named_where_one_is_taken():
    def counted(samples):
        return samples.detach().sum(1)

    for combination in (Minimum, WeightedSum):
        reward = combination(rewards=[bright(), counted])
        with pytest.raises(RewardError, match="reward counted: has no gradient, unlike the other parts"):
            reward(X.clone().requires_grad_())
        with torch.no_grad():
            assert reward(X.clone().requires_grad_()).isfinite().all()
        assert reward(X).isfinite().all()


def test_a_thresholded_reward_neither_grows_nor_pulls_above_its_threshold():
    x = X.clone().requires_grad_()
    values = bright()(X)
    threshold = float(values.sort().values[1]) - 1e-3
    reward = Thresholded(reward=bright(), threshold=threshold)
    above = values > threshold
    assert above.tolist().count(True) == 2
    assert reward.name == "brightness"
    assert torch.equal(reward(X), torch.where(above, torch.tensor(threshold), values))
    (gradient,) = torch.autograd.grad(reward(x).sum(), x)
    (plain,) = torch.autograd.grad(bright()(x).sum(), x)
    assert torch.equal(gradient[above], torch.zeros(2, 2))
    assert torch.equal(gradient[~above], plain[~above])
    assert plain[~above].abs().max() > 0


@pytest.mark.parametrize("threshold", ["high", float("nan"), float("-inf"), True, None])
def test_thresholds_are_finite_numbers(threshold):
    with pytest.raises(ValueError, match=f"threshold={threshold}: expected a finite number"):
        Thresholded(reward=bright(), threshold=threshold)


def test_combinations_nest_and_move_as_modules():
    inner = Minimum(rewards=[linear(), bright()], name="inner")
    total = WeightedSum(rewards=[Thresholded(reward=inner, threshold=-0.01), first_coordinate], weights=[2.0, 1.0])
    torch.testing.assert_close(total(X), 2 * inner(X).clamp_max(-0.01) + X[:, 0])
    total.double()
    assert inner.rewards["linear_gaussian"].direction.dtype == torch.float64


def test_steering_by_a_reward_above_its_threshold_is_no_steering():
    flow_map = GaussianMixtureFlowMap(isotropic_mixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), variance=0.3))
    settings = {"num_samples": 8, "num_steps": 4, "dynamics": "ode", "seed": 3}
    unsteered = mfm.sample(flow_map, **settings).images
    for threshold, same in ((-1e5, True), (0.0, False)):
        reward = Thresholded(reward=linear(), threshold=threshold)
        steered = mfm.sample(flow_map, steering=mfm.GradientGuidance(reward, num_draws=2), **settings).images
        assert torch.allclose(steered, unsteered, atol=1e-5) == same
