import pytest
import torch

from mfm_ray.rewards import LinearGaussian, RewardError, TargetBrightness, WeightedSum, check_rewards


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
    with pytest.raises(ValueError, match=message):
        WeightedSum(rewards=rewards, weights=weights)


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

    with pytest.raises(RewardError, match=rf"reward broken: {message}"):
        WeightedSum(rewards=[bright(), broken])(X)


def test_checked_rewards_keep_their_graph():
    values = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert check_rewards(values, "own").grad_fn is not None
    assert check_rewards(values, "own").dtype == torch.float32
