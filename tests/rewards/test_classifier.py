import pytest
import torch

from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.rewards import ClassMixture, ClassProbability

PAPER_WEIGHTS = [0, 1, 0, 1, 0, 2, 0, 2, 0, 4]


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    model = DigitClassifier(num_classes=10, event_shape=(1, 8, 8))
    with torch.no_grad():
        model.layers[-1].weight.mul_(20)
    return model


def samples(num=3, dtype=torch.float32):
    return torch.rand(num, 1, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))


def both(classifier):
    return [
        ClassProbability(classifier=classifier, label=3),
        ClassMixture(classifier=classifier, weights=PAPER_WEIGHTS),
    ]


def test_class_probabilities_sum_to_one(classifier):
    rewards = torch.stack([ClassProbability(classifier=classifier, label=label)(samples()) for label in range(10)])
    torch.testing.assert_close(rewards.exp().sum(0), torch.ones(3))


def test_class_mixture_is_the_weighted_probability(classifier):
    probabilities = torch.softmax(classifier(samples()), 1)
    expected = (probabilities * torch.tensor(PAPER_WEIGHTS) / 10).sum(1).log()
    torch.testing.assert_close(ClassMixture(classifier=classifier, weights=PAPER_WEIGHTS)(samples()), expected)


def test_class_mixture_of_one_class_is_its_probability(classifier):
    mixture = ClassMixture(classifier=classifier, weights=[0.0] * 3 + [7.0] + [0.0] * 6)
    assert torch.equal(mixture(samples()), ClassProbability(classifier=classifier, label=3)(samples()))
    assert mixture.weights[3] == 1.0


def test_gradients_match_finite_differences(classifier):
    for reward in both(classifier.double()):
        x = samples(2, torch.float64).requires_grad_()
        torch.autograd.gradcheck(reward.log_weight, (x,))
        (gradient,) = torch.autograd.grad(reward(x).sum(), x)
        assert gradient.abs().max() > 1e-3


def test_rewards_stay_finite_far_from_the_data(classifier):
    for reward in both(classifier):
        x = (samples() * 1e4).requires_grad_()
        values = reward(x)
        values.sum().backward()
        assert values.isfinite().all()
        assert x.grad.isfinite().all()


def test_the_reward_holds_a_frozen_copy_in_eval_mode(classifier):
    classifier.train()
    for reward in both(classifier):
        reward.train()
        assert not any(module.training for module in reward.modules())
        assert not any(parameter.requires_grad for parameter in reward.parameters())
        before = reward(samples())
        with torch.no_grad():
            classifier.layers[0].weight.add_(1.0)
        assert torch.equal(reward(samples()), before)
    assert classifier.training
    assert all(parameter.requires_grad for parameter in classifier.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_give_float32(classifier, dtype):
    for reward in both(classifier):
        values = reward(samples(dtype=torch.float32).to(dtype))
        assert values.dtype == torch.float32
        assert values.shape == (3,)


@pytest.mark.parametrize("label", [-1, 10, 2.0, True, "3"])
def test_labels_out_of_range_are_refused(classifier, label):
    with pytest.raises(ValueError, match=r"label=.*expected an integer of 0 to 9"):
        ClassProbability(classifier=classifier, label=label)


@pytest.mark.parametrize("weights", [[1.0], [0.0] * 10, [-1.0] + [1.0] * 9, [float("nan")] * 10, "abc", [[1.0] * 10]])
def test_weights_that_are_no_mixture_are_refused(classifier, weights):
    with pytest.raises(ValueError, match="weights"):
        ClassMixture(classifier=classifier, weights=weights)


def test_images_of_another_size_are_refused_naming_the_reward(classifier):
    with pytest.raises(ValueError, match="reward class_probability: samples of shape"):
        ClassProbability(classifier=classifier, label=0)(torch.rand(2, 1, 28, 28))
