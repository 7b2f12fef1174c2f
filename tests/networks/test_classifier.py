import pytest
import torch

from mfm_ray.data.datasets import digits
from mfm_ray.errors import InputError
from mfm_ray.networks.classifier import DigitClassifier, augment, heldout_accuracy, train_classifier


def train(num_rows, **settings):
    splits = digits().splits
    train, heldout = splits["train"], splits["heldout"]
    return train_classifier(
        train.data[:num_rows],
        train.labels[:num_rows],
        heldout_data=heldout.data,
        heldout_labels=heldout.labels,
        num_classes=10,
        **settings,
    )


@pytest.mark.parametrize(
    ("epochs", "accuracy"), [(10, 0.95), pytest.param(40, 0.98, marks=pytest.mark.slow)], ids=["short", "full"]
)
def test_it_tells_heldout_digits_apart_and_knows_how_sure_it_is(epochs, accuracy):
    trained = train(None, epochs=epochs)
    heldout = digits().splits["heldout"]
    assert trained.heldout_accuracy >= accuracy
    noise = 0.1 * torch.randn(heldout.data.shape, generator=torch.Generator().manual_seed(0))
    for images in (heldout.data, heldout.data + noise):
        confidence = torch.softmax(trained.classifier(images), 1).max(1).values.mean()
        assert abs(confidence - heldout_accuracy(trained.classifier, images, heldout.labels)) < 0.04


def test_training_is_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    first = train(200, epochs=2, seed=5).classifier.state_dict()
    torch.manual_seed(2)
    untouched = torch.random.get_rng_state()
    again, other = (train(200, epochs=2, seed=seed).classifier.state_dict() for seed in (5, 6))
    assert torch.equal(torch.random.get_rng_state(), untouched)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_it_is_small_and_takes_every_size(shape):
    classifier = DigitClassifier(num_classes=10, event_shape=shape)
    assert sum(parameter.numel() for parameter in classifier.parameters()) < 100_000
    assert classifier(torch.rand(3, *shape)).shape == (3, 10)


def test_an_images_logits_do_not_depend_on_its_neighbours():
    classifier = DigitClassifier(num_classes=10, event_shape=(1, 8, 8))
    images = torch.rand(8, 1, 8, 8)
    torch.testing.assert_close(classifier(images)[2:4], classifier(images[2:4]))


def test_augmentation_moves_and_blurs_a_little():
    images = digits().splits["heldout"].data
    moved = augment(images, generator=torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    change = (moved - images).flatten(1).square().mean(1).sqrt()
    assert change.min() > 0.02
    assert change.mean() < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1, "event_shape": (1, 8, 8)}, "num_classes=1"),
        ({"num_classes": 10, "event_shape": (2,)}, "event_shape"),
        ({"num_classes": 10, "event_shape": (1, 4, 8)}, "event_shape"),
    ],
)
def test_impossible_classifiers_are_refused_by_field(arguments, message):
    with pytest.raises(InputError, match=message):
        DigitClassifier(**arguments)


def test_data_it_cannot_learn_from_is_refused():
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, -1])
    heldout = {"heldout_data": images, "heldout_labels": labels, "num_classes": 10}
    with pytest.raises(InputError, match="labels: expected 0 to 9"):
        train_classifier(images, labels, **heldout)
    with pytest.raises(InputError, match="no rows"):
        train_classifier(images[:0], labels[:0], **heldout)
