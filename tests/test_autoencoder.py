"""Autoencoders from diffusers' folders: the numbers of diffusers itself, files of old releases, every damage named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mfm_ray.autoencoder import CONFIG, WEIGHTS, load_autoencoder
from mfm_ray.errors import InputError

from .conftest import LatentModel

Weights = dict[str, Tensor]
OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
KERNEL = "encoder.conv_in.weight"


@pytest.fixture
def folder(latent_model: LatentModel, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(latent_model.autoencoder, tmp_path / "vae"))


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file(change({name: tensor.clone() for name, tensor in weights.items()}), folder / WEIGHTS)


def with_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def test_both_ways_are_those_of_diffusers(latent_model: LatentModel) -> None:
    """Bit for bit: pixels in [0, 1] here are 2 x - 1 there; of the posterior mean and clamped log-variance."""
    from diffusers import AutoencoderKL

    ours, theirs = load_autoencoder(latent_model.autoencoder), AutoencoderKL.from_pretrained(latent_model.autoencoder)
    pixels = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    mean, log_variance = ours.posterior(pixels)
    with torch.no_grad():
        law = theirs.eval().encode(2 * pixels - 1).latent_dist
        decoded = theirs.decode(law.mean).sample
    assert mean.shape == log_variance.shape == (3, 4, 4, 6)
    assert torch.equal(mean, law.mean)
    assert torch.equal(log_variance, law.logvar)
    assert torch.equal(ours.decode(mean), (decoded + 1) / 2)
    assert ours.scale == theirs.config["scaling_factor"] == 0.18215
    assert (ours.latent_channels, ours.downsampling, ours.latent_shape(32)) == (4, 2, (4, 16, 16))
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_autocast_and_training_mode_change_nothing(latent_model: LatentModel) -> None:
    autoencoder = load_autoencoder(latent_model.autoencoder)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = autoencoder.posterior(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = autoencoder.train().posterior(pixels)
        decoded = autoencoder.decode(plain[0])
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))
    assert torch.equal(decoded, autoencoder.decode(plain[0]))
    assert not any(module.training for module in autoencoder.modules())


def test_attention_is_read_by_the_names_of_old_releases(folder: Path, latent_model: LatentModel) -> None:
    def renamed(weights: Weights) -> Weights:
        found = {}
        for name, tensor in weights.items():
            for new, old in OLD_NAMES.items():
                name = name.replace(new, old)
            found[name] = tensor
        return found

    rewrite(folder, renamed)
    assert any(".proj_attn." in name for name in load_file(folder / WEIGHTS))
    old, new = load_autoencoder(folder), load_autoencoder(latent_model.autoencoder)
    assert old.fingerprint() == new.fingerprint()
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(old.posterior(pixels)[0], new.posterior(pixels)[0])


def test_the_fingerprint_is_of_every_weight(latent_model: LatentModel) -> None:
    autoencoder = load_autoencoder(latent_model.autoencoder)
    found = {"as it is": autoencoder.fingerprint()}
    for name, tensor in autoencoder.network.state_dict().items():
        last = tensor.view(-1)[-1]
        before = last.clone()
        last.copy_(torch.nextafter(before, torch.tensor(torch.inf)))
        found[name] = autoencoder.fingerprint()
        last.copy_(before)
    assert len(found) == 1 + len(autoencoder.network.state_dict()) > 50
    assert len(set(found.values())) == len(found)
    assert autoencoder.fingerprint() == found["as it is"]


def gone(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def without_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def no_safetensors(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"abc")


def short_of_one(folder: Path) -> None:
    rewrite(folder, lambda weights: {name: tensor for name, tensor in weights.items() if name != KERNEL})


def one_too_many(folder: Path) -> None:
    rewrite(folder, lambda weights: {**weights, "encoder.surplus": torch.zeros(1)})


def of_another_shape(folder: Path) -> None:
    rewrite(folder, lambda weights: {**weights, KERNEL: torch.zeros(8, 3, 5, 5)})


def not_a_number(folder: Path) -> None:
    rewrite(folder, lambda weights: {**weights, KERNEL: torch.full_like(weights[KERNEL], torch.nan)})


def no_configuration(folder: Path) -> None:
    (folder / CONFIG).write_text("[1")


def of_another_class(folder: Path) -> None:
    with_config(folder, _class_name="VQModel")


def of_another_size(folder: Path) -> None:
    with_config(folder, latent_channels=8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (gone, f"{WEIGHTS} is missing: not a diffusers AutoencoderKL"),
        (without_config, f"{CONFIG} is missing: not a diffusers AutoencoderKL"),
        (cut, f"{WEIGHTS} cannot be read as an AutoencoderKL"),
        (no_safetensors, f"{WEIGHTS} cannot be read as an AutoencoderKL"),
        (short_of_one, f"{WEIGHTS}: missing keys: ['{KERNEL}']"),
        (one_too_many, f"{WEIGHTS}: unexpected keys: ['encoder.surplus']"),
        (of_another_shape, WEIGHTS),
        (of_another_size, WEIGHTS),
        (not_a_number, f"{WEIGHTS}: {KERNEL} holds NaN or infinity"),
        (no_configuration, f"{CONFIG} is no configuration of an AutoencoderKL"),
        (of_another_class, f"{CONFIG} describes 'VQModel', expected 'AutoencoderKL'"),
    ],
)
def test_each_damage_is_one_line_that_names_the_file(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(InputError) as refused:
        load_autoencoder(folder)
    assert str(folder / (CONFIG if CONFIG in message else WEIGHTS)) in str(refused.value)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("size", [0, -2, 7])
def test_a_size_that_it_cannot_halve_is_refused(latent_model: LatentModel, size: int) -> None:
    with pytest.raises(InputError, match=f"image_size={size}: expected a multiple of 2"):
        load_autoencoder(latent_model.autoencoder).latent_shape(size)
