"""Latents become pictures: the decoder against the plain one, steering through it against closed forms, refusals."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfm_ray as mfm
from mfm_ray.autoencoder import load_autoencoder, read_outline
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.finetuning import (
    AdjointMatching,
    Anchors,
    DriftTargets,
    RewardMatching,
    RewardWeightedRegression,
    Tilt,
    TuningMethod,
)
from mfm_ray.flow_map import FlowMap
from mfm_ray.latent_models import Decoding, autoencoder_checksum, located, sample_shape_of
from mfm_ray.networks.gaussian import GaussianMixtureFlowMap, LinearObservation, isotropic_mixture
from mfm_ray.noise import KeyedNoise
from mfm_ray.pretrained import load_flow_map, read_model_config, save_model
from mfm_ray.steering import CallCounter, SteeringContext
from mfm_ray.storage import Storage

from .conftest import LatentModel, save_tiny_autoencoder

SCALE = 0.5


@pytest.fixture(scope="module")
def autoencoder(latent_model: LatentModel) -> Any:
    return load_autoencoder(latent_model.autoencoder)


@pytest.fixture(scope="module")
def space(autoencoder: Any) -> DataSpace:
    return DataSpace(kind="latent", event_shape=(4, 4, 4), scale=SCALE)


def decoded_with_gradient(space: DataSpace, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    pictures = space.to_data_units(x)
    (gradient,) = torch.autograd.grad(pictures.square().sum(), x)
    return pictures.detach(), gradient


def test_chunks_give_the_pictures_and_gradients_of_the_whole(space: DataSpace, autoencoder: Any) -> None:
    x = torch.randn(7, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    pictures, gradient = decoded_with_gradient(space.with_decoder(autoencoder, at_once=3), x)
    plain = x.clone().requires_grad_()
    whole = autoencoder.decode(plain / SCALE)
    (expected,) = torch.autograd.grad(whole.square().sum(), plain)
    torch.testing.assert_close(pictures, whole.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    for at_once in (1, 2, 100):
        others = decoded_with_gradient(space.with_decoder(autoencoder, at_once=at_once), x)
        assert torch.equal(others[0], pictures)
        assert torch.equal(others[1], gradient)


def test_a_picture_does_not_depend_on_its_batch(space: DataSpace, autoencoder: Any) -> None:
    decoded = space.with_decoder(autoencoder)
    x = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    whole = decoded.to_data_units(x)
    for row in range(5):
        assert torch.equal(decoded.to_data_units(x[row : row + 1])[0], whole[row])
    assert torch.equal(decoded.to_data_units(x.reshape(1, 5, 4, 4, 4)), whole.unsqueeze(0))
    assert decoded.to_data_units(x[:0]).shape == (0, 3, 8, 8)


def test_activations_are_not_kept_for_the_backward_pass(space: DataSpace, autoencoder: Any) -> None:
    def kept(act: Any) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            act(torch.randn(8, 4, 4, 4, requires_grad=True))
        return sum(sizes)

    assert kept(space.with_decoder(autoencoder, at_once=2).to_data_units) < 0.1 * kept(autoencoder.decode)


@pytest.mark.gpu
def test_memory_of_a_backward_pass_grows_by_the_pictures_alone(space: DataSpace, autoencoder: Any) -> None:
    decoded = space.with_decoder(autoencoder, at_once=2)

    def peak(act: Any, count: int) -> int:
        x = torch.randn(count, 4, 4, 4, device="cuda", requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        act(x).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    decoded.to_data_units(torch.zeros(1, 4, 4, 4, device="cuda"))
    peak(decoded.to_data_units, 4)  # whatever is allocated once
    pictures = 3 * 8 * 8 * 4 * (1024 - 128)
    ours = peak(decoded.to_data_units, 1024) - peak(decoded.to_data_units, 128)
    assert ours < 6 * pictures
    assert peak(autoencoder.decode, 1024) - peak(autoencoder.decode, 128) > 20 * pictures


class LinearDecoder(nn.Module):
    """An "autoencoder" with a closed form: pixels = 0.5 + contrast Q z, the columns of Q (12, 2) orthonormal."""

    SHAPE = (3, 2, 2)

    def __init__(self, contrast: float) -> None:
        super().__init__()
        noise = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
        self.basis, self.contrast = nn.Parameter(torch.linalg.qr(noise).Q, requires_grad=False), contrast

    def decode(self, latents: Tensor) -> Tensor:
        return 0.5 + self.contrast * (latents.flatten(1) @ self.basis.T).unflatten(1, self.SHAPE)

    def image_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        return self.SHAPE


class LatentMixture(FlowMap):
    """The exact flow map of a Gaussian mixture of the plane, whose states are called latents (2, 1, 1)."""

    def __init__(self, inner: GaussianMixtureFlowMap, space: DataSpace) -> None:
        super().__init__(space)
        self.inner = inner

    def velocity(self, x_s: Tensor, s: Tensor, u: Tensor, *, t: Tensor, x_t: Tensor, **condition: Any) -> Tensor:
        return self.inner.velocity(x_s.flatten(1), s, u, t=t, x_t=x_t.flatten(1)).reshape(x_s.shape)

    def posterior_spread(self, t: Tensor) -> Tensor:
        return self.inner.posterior_spread(t)

    def config(self) -> dict[str, Any]:
        return {}


class SeenInPixels:
    """Likelihood of a linear measurement of the picture, and the same of the plane that the picture is made of."""

    def __init__(self, decoder: LinearDecoder, plane: LinearObservation) -> None:
        self.decoder, self.name = decoder, "seen"
        # a . x of the plane, where x = scale z and z = Q^T (pixels - 0.5) / contrast
        direction = SCALE / decoder.contrast * decoder.basis @ plane.direction
        self.pixels = LinearObservation(direction, plane.observation + 0.5 * float(direction.sum()), plane.noise)

    def __call__(self, samples: Tensor) -> Tensor:
        return self.pixels(samples.flatten(1))


def plane_and_latents(
    contrast: float = 0.1,
) -> tuple[GaussianMixtureFlowMap, LatentMixture, LinearObservation, SeenInPixels]:
    mixture = isotropic_mixture(torch.tensor([[-1.5, -1.0], [0.5, 0.0], [1.0, 1.5]]), variance=0.5)
    plane = GaussianMixtureFlowMap(mixture, num_inner_steps=16)
    decoder = LinearDecoder(contrast)
    space = DataSpace(kind="latent", event_shape=(2, 1, 1), scale=SCALE).with_decoder(decoder, at_once=3)
    observed = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=1.0)
    return plane, LatentMixture(plane, space), observed, SeenInPixels(decoder, observed)


METHODS = {
    "gradient": lambda reward: mfm.GradientGuidance(reward, num_draws=4),
    "gradient_free": lambda reward: mfm.GradientFreeGuidance(reward, num_draws=4),
    "dps": lambda reward: mfm.DPS(reward),
    "search": lambda reward: mfm.Search(reward, num_particles=3, num_draws=2),
    "smc": lambda reward: mfm.SMC(reward, num_particles=3),
    "best_of_n": lambda reward: mfm.BestOfN(reward, num_particles=5),
}


@pytest.mark.parametrize("method", METHODS)
def test_steering_by_pixels_is_steering_of_the_plane_that_they_are_made_of(method: str) -> None:
    """Every method, through decoder and pixels, comes to where it comes in the plane itself with the same noise; with
    so little contrast that no pixel is clamped."""
    plane, latents, in_plane, in_pixels = plane_and_latents()
    settings: dict[str, Any] = {"num_samples": 3, "num_steps": 6, "seed": 5}
    expected = mfm.sample(plane, steering=METHODS[method](in_plane), **settings)
    found = mfm.sample(latents, steering=METHODS[method](in_pixels), **settings)
    assert found.states is not None
    assert found.rewards is not None
    torch.testing.assert_close(found.states.flatten(1), expected.images, rtol=1e-4, atol=1e-4)
    pixels = in_pixels.decoder.decode(expected.images.reshape(3, 2, 1, 1) / SCALE)
    assert found.images.shape == (3, 3, 2, 2)
    torch.testing.assert_close(found.images, pixels.clamp(0, 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.rewards, in_pixels(found.images)), "a reported reward is that of the picture returned"
    assert found.nfe == expected.nfe


def test_many_draws_give_the_exact_drift_of_the_tilted_law() -> None:
    plane, latents, in_plane, in_pixels = plane_and_latents()
    x_t, t = torch.tensor([[0.3, -0.4]]), torch.tensor([0.4])
    exact = in_plane.tilt(plane.mixture).velocity(x_t, t) - plane.drift(x_t, t)
    state = x_t.reshape(1, 2, 1, 1).expand(4, 2, 1, 1).contiguous()
    times = t.expand(4)
    context = SteeringContext(latents, KeyedNoise.for_images(0, 4), CallCounter())
    guidance = mfm.GradientGuidance(in_pixels, num_draws=1024, trust_region=None)
    correction = guidance.guide(state, times, velocity=latents.drift(state, times), context=context).correction
    error = correction.flatten(1).std(0) / 2
    assert bool(((correction.flatten(1).mean(0) - exact[0]).abs() < 4 * error + 0.01).all())
    assert bool((exact[0].abs() > 10 * error).all()), "the test would notice a missing correction"


TUNING: dict[str, TuningMethod] = {
    "anchored": RewardMatching(num_draws=3),
    "mixed": RewardMatching(num_draws=3, baseline="none", estimator="mixed"),
    "pathwise": RewardMatching(num_draws=3, baseline="none", estimator="pathwise", diffusion=100.0),
    "reward_weighted": RewardWeightedRegression(),
    "adjoint_matching": AdjointMatching(num_steps=8, states_per_path=2),
}


@pytest.mark.parametrize("method", TUNING)
def test_targets_of_tuning_by_pixels_are_those_of_the_plane(method: str) -> None:
    plane, latents, in_plane, in_pixels = plane_and_latents()
    x1 = plane.mixture.sample(8, generator=torch.Generator().manual_seed(2))
    noise = KeyedNoise.for_rows(0, torch.arange(8))
    wide = (8, 2, 1, 1)
    anchors = Anchors(x1, None, in_plane(x1).double())

    def made(tilt: Tilt, anchors: Anchors) -> DriftTargets:
        rewards = tilt.rewards(anchors.x1)
        anchors = replace(anchors, reward=rewards)
        return TUNING[method].targets(tilt, anchors, noise, drift=lambda x, t, label: tilt.flow_map.drift(x, t))

    expected = made(Tilt(plane, in_plane).with_normaliser(x1), anchors)
    found = made(Tilt(latents, in_pixels).with_normaliser(x1.reshape(wide)), replace(anchors, x1=x1.reshape(wide)))
    torch.testing.assert_close(found.x_t.flatten(1), expected.x_t)
    torch.testing.assert_close(found.target.flatten(1), expected.target, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.reward, expected.reward, rtol=1e-3, atol=1e-4)


def test_gradients_see_beyond_white_and_reports_do_not() -> None:
    _, latents, _, in_pixels = plane_and_latents(contrast=1.0)
    seen: list[tuple[bool, float]] = []

    def reward(samples: Tensor) -> Tensor:
        seen.append((samples.requires_grad, float(samples.detach().max())))
        return in_pixels(samples)

    mfm.sample(latents, num_samples=8, num_steps=4, steering=mfm.GradientGuidance(reward, num_draws=4))
    assert max(value for with_gradient, value in seen if with_gradient) > 1
    assert max(value for with_gradient, value in seen if not with_gradient) <= 1


def test_an_image_of_a_latent_model_does_not_depend_on_its_batch(latent_model: LatentModel) -> None:
    flow_map = load_flow_map(latent_model.model)
    steering = mfm.GradientGuidance(mfm.rewards.TargetBrightness(target=0.9, scale=0.1), num_draws=2)
    settings: dict[str, Any] = {"num_steps": 3, "seed": 2, "label": 1, "steering": steering}
    many = mfm.sample(flow_map, num_samples=5, **settings)
    assert many.images.shape == (5, 3, 8, 8)
    assert 0 <= float(many.images.min()) <= float(many.images.max()) <= 1
    for batch_size, first in ((1, 0), (2, 3)):
        few = mfm.sample(flow_map, num_samples=2, first_image=first, batch_size=batch_size, **settings)
        assert torch.equal(few.images, many.images[first : first + 2])
        assert few.rewards is not None
        assert many.rewards is not None
        assert torch.equal(few.rewards, many.rewards[first : first + 2])


def test_rewards_of_pictures_steer_latents_in_colour() -> None:
    _, latents, _, _ = plane_and_latents()
    mask = mfm.rewards.half_mask((3, 2, 2), "left")
    rewards = [
        mfm.rewards.TargetBrightness(target=0.6, scale=0.02),
        mfm.rewards.Symmetry(scale=0.05),
        mfm.rewards.MaskedObservation(observed=0.6 * mask, mask=mask, noise=0.05),
    ]
    plain = mfm.sample(latents, num_samples=16, num_steps=6).images
    for reward in rewards:
        steering = mfm.GradientGuidance(reward, num_draws=8)
        steered = mfm.sample(latents, num_samples=16, num_steps=6, steering=steering).rewards
        assert steered is not None
        assert float(steered.mean()) > 0.7 * float(reward(plain).mean()), reward.name  # both below 0


def test_refinement_makes_pictures(latent_model: LatentModel) -> None:
    flow_map = load_flow_map(latent_model.model)
    pictures = mfm.refine(flow_map, num_samples=3, num_steps=2, seed=1)
    latents = mfm.refine(load_flow_map(latent_model.model, autoencoder=None), num_samples=3, num_steps=2, seed=1)
    assert latents.shape == (3, 4, 4, 4)
    decoder = flow_map.space.decoder
    assert decoder is not None
    torch.testing.assert_close(pictures, decoder(latents).clamp(0, 1))


def test_the_autoencoder_is_no_part_of_a_models_weights(latent_model: LatentModel, tmp_path: Path) -> None:
    flow_map, plain = load_flow_map(latent_model.model), load_flow_map(latent_model.model, autoencoder=None)
    assert flow_map.state_dict().keys() == plain.state_dict().keys()
    assert sum(1 for _ in flow_map.modules()) == sum(1 for _ in plain.modules())
    assert copy.deepcopy(flow_map).space.decoder is flow_map.space.decoder, "copies that are trained share it"
    travelled = pickle.loads(pickle.dumps(flow_map))
    assert torch.equal(
        mfm.refine(travelled, num_samples=1, num_steps=1), mfm.refine(flow_map, num_samples=1, num_steps=1)
    )
    save_model(tmp_path / "again", flow_map, config={"data": read_model_config(latent_model.model)["data"]})
    assert load_flow_map(tmp_path / "again").space.sample_shape == (3, 8, 8)


def test_equality_is_of_what_the_model_makes(space: DataSpace, autoencoder: Any) -> None:
    decoded = space.with_decoder(autoencoder)
    assert (decoded, hash(decoded), decoded.config()) == (space, hash(space), space.config())
    assert (space.makes_images, decoded.makes_images) == (False, True)
    assert (space.sample_shape, decoded.sample_shape, decoded.event_shape) == ((4, 4, 4), (3, 8, 8), (4, 4, 4))
    assert (space.data_range, decoded.data_range) == (None, (0.0, 1.0))
    assert DataSpace.from_config(decoded.config()) == space


def test_what_a_decoder_cannot_say_is_refused(space: DataSpace, autoencoder: Any) -> None:
    decoded = space.with_decoder(autoencoder)
    with pytest.raises(ValueError, match="to_model_space: not known"):
        decoded.to_model_space(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="data_units_per_model_unit: not known"):
        _ = decoded.data_units_per_model_unit
    with pytest.raises(ValueError, match="its latents have 4 channels, those of the model 3"):
        DataSpace(kind="latent", event_shape=(3, 4, 4)).with_decoder(autoencoder)
    with pytest.raises(ValueError, match="the space is of image"):
        DataSpace(kind="image", event_shape=(4, 4, 4)).with_decoder(autoencoder)
    with pytest.raises(ValueError, match="at_once=0"):
        space.with_decoder(autoencoder, at_once=0)


def edited(latent_model: LatentModel, target: Path, **autoencoder: Any) -> Path:
    """A copy of the model directory that says something else of its autoencoder; nothing where there is nothing."""
    shutil.copytree(latent_model.model, target)
    config = json.loads((target / "config.json").read_text())
    config["data"]["autoencoder"] |= autoencoder
    if not autoencoder:
        del config["data"]["autoencoder"]
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_model_directory_may_carry_its_autoencoder(latent_model: LatentModel, tmp_path: Path) -> None:
    carried = edited(latent_model, tmp_path / "carried", source="hf://nobody/nothing")
    shutil.copytree(latent_model.autoencoder, carried / "autoencoder")
    shown = mfm.refine(load_flow_map(carried), num_samples=2, num_steps=1)
    assert torch.equal(shown, mfm.refine(load_flow_map(latent_model.model), num_samples=2, num_steps=1))
    relative = edited(latent_model, tmp_path / "relative", source="vae")
    shutil.copytree(latent_model.autoencoder, relative / "vae")
    assert load_flow_map(relative).space.sample_shape == (3, 8, 8)
    data = read_model_config(relative)["data"]
    assert located(Storage(relative), data)["autoencoder"] == {**data["autoencoder"], "source": str(relative / "vae")}
    by_uri = load_flow_map(f"file://{carried}")
    assert by_uri.space.sample_shape == (3, 8, 8)


def test_shapes_and_checksum_are_known_without_weights(latent_model: LatentModel) -> None:
    model, own = Storage(latent_model.model), Decoding()
    data = read_model_config(model)["data"]
    assert sample_shape_of(model, data, own) == (3, 8, 8)
    assert sample_shape_of(model, data, Decoding(None)) is None
    assert autoencoder_checksum(model, own) == autoencoder_checksum(model, Decoding(latent_model.autoencoder))
    assert autoencoder_checksum(model, Decoding(None)) is None
    outline = read_outline(latent_model.autoencoder)
    assert outline == load_autoencoder(latent_model.autoencoder).outline


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json is missing: not a diffusers AutoencoderKL"),
        ("[1", "config.json is no configuration of an AutoencoderKL"),
        ('{"_class_name": "UNet2DModel"}', "describes 'UNet2DModel', expected 'AutoencoderKL'"),
        ('{"_class_name": "AutoencoderKL"}', "config.json is no configuration of an AutoencoderKL: KeyError"),
    ],
)
def test_an_outline_that_cannot_be_read_is_told_in_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError) as refused:
        read_outline(tmp_path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_autoencoder_is_refused_unless_it_is_asked_for(latent_model: LatentModel, tmp_path: Path) -> None:
    save_tiny_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"other weights .* were made with .*check_autoencoder=false"):
        load_flow_map(latent_model.model, autoencoder=tmp_path / "other")
    asked = load_flow_map(latent_model.model, autoencoder=Decoding(str(tmp_path / "other"), check=False))
    own = load_flow_map(latent_model.model)
    assert not torch.equal(mfm.refine(asked, num_samples=1, num_steps=1), mfm.refine(own, num_samples=1, num_steps=1))


def test_what_cannot_be_decoded_is_told_in_one_line(latent_model: LatentModel, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    gone = edited(latent_model, tmp_path / "gone", source=str(tmp_path / "nowhere"))
    hub = edited(latent_model, tmp_path / "hub", source="hf://nobody/nothing")
    larger = edited(latent_model, tmp_path / "larger", image_size=16)
    unnamed = edited(latent_model, tmp_path / "unnamed")
    for model, message in (
        (gone, r"nowhere does not exist.*autoencoder=null"),
        (hub, r"autoencoder=hf://nobody/nothing.*autoencoder=null"),
        (larger, r"makes pictures of 8x8 of these latents, which were made of 16x16"),
    ):
        with pytest.raises(InputError, match=message) as refused:
            load_flow_map(model)
        assert "\n" not in str(refused.value)
        assert load_flow_map(model, autoencoder=None).space.sample_shape == (4, 4, 4)
    assert load_flow_map(unnamed).space.sample_shape == (4, 4, 4)
    assert load_flow_map(unnamed, autoencoder=latent_model.autoencoder).space.sample_shape == (3, 8, 8)


def test_a_model_of_pixels_takes_no_autoencoder(tiny_models: dict[str, str], latent_model: LatentModel) -> None:
    assert load_flow_map(tiny_models["tiny"]).space.decoder is None
    with pytest.raises(InputError, match=r"makes image, not latents; expected auto or null"):
        load_flow_map(tiny_models["tiny"], autoencoder=latent_model.autoencoder)


@pytest.mark.gpu
def test_on_a_gpu_pictures_agree_to_rounding(latent_model: LatentModel) -> None:
    space = load_flow_map(latent_model.model).space
    x = torch.randn(7, 4, 4, 4)
    expected = decoded_with_gradient(space, x)
    found = decoded_with_gradient(space, x.cuda())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))
    assert torch.equal(decoded_with_gradient(space, x)[0], expected[0]), "and back on the CPU"
