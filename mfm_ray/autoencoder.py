"""The autoencoder between pixels and latents: diffusers' AutoencoderKL, read strictly, frozen, in float32.

    posterior:  pixels (N, 3, H, W) in [0, 1]  ->  mean and log-variance of q(z | image), (N, C, H / f, W / f) each
    decode:     latents z                      ->  pixels, about [0, 1], unclamped and differentiable

z are the autoencoder's own latents, the data units of `DataSpace(kind="latent")`; a network sees `scale` times those
(0.18215 for Stable Diffusion's), which have about unit variance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfm_ray.errors import InputError
from mfm_ray.hub import local_folder

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Outline:
    """Shapes on both sides of an autoencoder; downsampling: pixels along a side for one place of the latent."""

    latent_channels: int
    image_channels: int
    downsampling: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Outline:
        """From a diffusers config. KeyError, TypeError or ValueError for one that is none."""
        return cls(
            latent_channels=int(config["latent_channels"]),
            image_channels=int(config["out_channels"]),
            downsampling=2 ** (len(config["block_out_channels"]) - 1),
        )

    def image_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, H, W) of the picture of a latent (c, h, w); InputError for another number of channels."""
        channels, height, width = latent_shape
        if channels != self.latent_channels:
            raise InputError(
                f"autoencoder: its latents have {self.latent_channels} channels, those of the model {channels}"
            )
        return self.image_channels, height * self.downsampling, width * self.downsampling


def read_outline(source: str | Path, *, key: str = "autoencoder") -> Outline:
    """The shapes of an autoencoder, from its config.json alone; InputError as in `load_autoencoder`."""
    folder = local_folder(source, key=key, files=(CONFIG,))
    try:
        config = json.loads((folder / CONFIG).read_text())
        _check_class(config, folder)
        return Outline.of(config)
    except OSError as error:
        raise InputError(f"{folder / CONFIG} is missing: not a diffusers AutoencoderKL") from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / CONFIG} is no configuration of an AutoencoderKL: {error!r}"[:300]) from error


class Autoencoder(nn.Module):
    """A frozen AutoencoderKL with images in [0, 1].

    network: the diffusers module. source: where it was loaded from, for descriptions.
    """

    def __init__(self, network: nn.Module, *, source: str) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.source = source
        self.scale = float(network.config.scaling_factor)  # type: ignore[union-attr,arg-type]
        self.outline = Outline.of(network.config)  # type: ignore[arg-type]
        self.latent_channels, self.downsampling = self.outline.latent_channels, self.outline.downsampling

    def train(self, mode: bool = True) -> Autoencoder:
        """Never leaves eval mode: an autoencoder is a fixed function here."""
        return super().train(False)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a square image; InputError for a size that is no multiple of the factor."""
        if image_size < 1 or image_size % self.downsampling:
            raise InputError(f"image_size={image_size}: expected a multiple of {self.downsampling}, the autoencoder's")
        side = image_size // self.downsampling
        return self.latent_channels, side, side

    def image_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, H, W) of the picture of a latent (c, h, w); InputError for latents of another number of channels."""
        return self.outline.image_shape(latent_shape)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent of pixels (N, 3, H, W) in [0, 1]."""
        with _in_full_precision(pixels):
            law = self.network.encode(pixels.float() * 2 - 1).latent_dist  # type: ignore[operator]
        return law.mean, law.logvar

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) of the autoencoder's own latents, in [0, 1] but for overshoot; not clamped."""
        with _in_full_precision(latents):
            decoded = self.network.decode(latents.float()).sample  # type: ignore[operator]
        return (decoded + 1) * 0.5

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and bytes of all weights: which autoencoder latents belong to."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def load_autoencoder(source: str | Path, *, key: str = "autoencoder") -> Autoencoder:
    """The autoencoder of a diffusers folder (config.json and diffusion_pytorch_model.safetensors), or `hf://...`.

    On the CPU, float32. Files of older releases, whose attention has other names, are read as well.
    InputError naming the file for whatever is missing, damaged, of another class, or does not fit tensor by tensor.
    """
    folder = local_folder(source, key=key, files=(CONFIG, WEIGHTS))
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing: not a diffusers AutoencoderKL")
    return Autoencoder(_read(folder), source=str(source))


def _read(folder: Path) -> nn.Module:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise InputError("autoencoders need diffusers: pip install 'mfm_ray[rewards]'") from error
    read_outline(folder)  # its refusals are one line each
    try:
        network, found = AutoencoderKL.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(f"{folder / WEIGHTS} cannot be read as an AutoencoderKL: {reason}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found.get(what):
            raise InputError(f"{folder / WEIGHTS}: {what.replace('_', ' ')}: {list(found[what])[:3]!s}")
    for name, tensor in network.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{folder / WEIGHTS}: {name} holds NaN or infinity")
    return network


def _check_class(config: Any, folder: Path) -> None:
    found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
    if found != "AutoencoderKL":
        raise InputError(f"{folder / CONFIG} describes {found!r}, expected 'AutoencoderKL'")


def _in_full_precision(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)
