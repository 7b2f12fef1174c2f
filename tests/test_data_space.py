import pytest
import torch

from mfm_ray.data_space import DataSpace


def test_images_map_between_pixels_and_model_space_exactly():
    space = DataSpace(kind="image", event_shape=(1, 8, 8))
    pixels = torch.arange(0, 17, dtype=torch.float32) / 16
    assert torch.equal(space.to_data_units(space.to_model_space(pixels)), pixels)
    assert space.to_model_space(torch.tensor([0.0, 1.0])).tolist() == [-1.0, 1.0]
    assert space.clamp(torch.tensor([-0.5, 0.5, 2.0])).tolist() == [0.0, 0.5, 1.0]


def test_coordinates_are_left_as_they_are():
    space = DataSpace(kind="coordinates", event_shape=(2,))
    x = torch.tensor([[-7.0, 3.0]])
    assert torch.equal(space.to_data_units(x), x)
    assert torch.equal(space.to_model_space(x), x)
    assert torch.equal(space.clamp(x), x)


def test_latents_are_scaled_to_model_space():
    space = DataSpace(kind="latent", event_shape=(4, 2, 2), scale=0.18215)
    x = torch.tensor([2.0, -1.0])
    torch.testing.assert_close(space.to_model_space(x), 0.18215 * x)
    torch.testing.assert_close(space.to_data_units(space.to_model_space(x)), x)
    assert torch.equal(space.clamp(100 * x), 100 * x)
    assert space.data_range is None


@pytest.mark.parametrize(
    ("kind", "shape", "scale"), [("image", (1, 8, 8), 1), ("coordinates", (2,), 1), ("latent", (4, 8, 8), 0.18215)]
)
def test_config_round_trip(kind, shape, scale):
    space = DataSpace(kind=kind, event_shape=shape, scale=scale)
    assert DataSpace.from_config(space.config() | {"name": "x"}) == space


@pytest.mark.parametrize(("kind", "scale"), [("image", 1.0), ("latent", 0.25)])
def test_noise_scale_is_the_slope_of_the_map(kind, scale):
    space = DataSpace(kind=kind, event_shape=(1, 1, 1), scale=scale)
    step = space.to_data_units(torch.tensor(1.0)) - space.to_data_units(torch.tensor(0.0))
    assert step.item() == space.data_units_per_model_unit


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("picture", (1, 8, 8), "kind='picture'"),
        ("image", (8, 8), "event_shape"),
        ("coordinates", (0,), "event_shape"),
        ("latent", (4,), "event_shape"),
    ],
)
def test_refuses_impossible_spaces_naming_the_field(kind, shape, message):
    with pytest.raises(ValueError, match=message):
        DataSpace(kind=kind, event_shape=shape)


@pytest.mark.parametrize(("kind", "shape", "scale"), [("image", (1, 8, 8), 2.0), ("latent", (4, 8, 8), 0.0)])
def test_a_scale_that_cannot_be_is_refused(kind, shape, scale):
    with pytest.raises(ValueError, match=f"scale={scale}"):
        DataSpace(kind=kind, event_shape=shape, scale=scale)


def test_from_config_names_the_missing_key():
    with pytest.raises(ValueError, match="'scale'"):
        DataSpace.from_config({"kind": "latent", "event_shape": [4, 8, 8]})
    with pytest.raises(ValueError, match="'event_shape'"):
        DataSpace.from_config({"kind": "image"})
