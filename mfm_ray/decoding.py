"""From latents to pictures in bounded memory, with gradients, and without a picture depending on its batch."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mfm_ray.errors import require

AT_ONCE = 4
"""Pictures of one call of an autoencoder where nothing else is said."""


class LatentDecoder(Protocol):
    """What is asked of an autoencoder; `mfm_ray.autoencoder.Autoencoder` is one."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (N, C, H, W) of latents (N, c, h, w) in the autoencoder's own units, unclamped, differentiable."""

    def image_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, H, W) of the picture of a latent of shape (c, h, w)."""


class Decoder:
    """Pictures of latents: x = decode(z), for any number of them.

    At most `at_once` latents are in the autoencoder at a time, and where a gradient is wanted their activations are not
    kept but made again in the backward pass (checkpointing), so that memory beyond the pictures themselves does not
    grow with their number. On a CPU each latent is decoded alone: its picture and its gradient are the same to the bit
    for every `at_once` and whatever else is in the batch. On a GPU they agree to rounding.

    The autoencoder is no part of any flow map's weights. It is shared by copies of the flow map, and moves to the
    device of the latents.
    """

    def __init__(self, autoencoder: LatentDecoder, *, latent_shape: tuple[int, ...], at_once: int = AT_ONCE) -> None:
        require(isinstance(at_once, int) and at_once >= 1, "at_once", at_once, "an integer of at least 1")
        self._autoencoder, self.latent_shape, self.at_once = autoencoder, tuple(latent_shape), at_once
        self.image_shape = autoencoder.image_shape(self.latent_shape)
        self._turn = threading.Lock()  # several threads of one engine decode, and memory is for one of them
        self._device: torch.device | None = None

    def __call__(self, latents: Tensor) -> Tensor:
        """Pixels (..., C, H, W), about [0, 1] and unclamped, of latents (..., c, h, w) in the autoencoder's units."""
        rows, leading = latents.reshape(-1, *self.latent_shape), latents.shape[: -len(self.latent_shape)]
        if not len(rows):
            return latents.new_zeros(*leading, *self.image_shape)
        self._follow(rows.device)
        wants_gradient = rows.requires_grad and torch.is_grad_enabled()
        decode = self._again_in_backward if wants_gradient else self._decode
        # on a CPU one by one: convolutions choose their kernels, and so their last bits, by the size of the batch
        size = 1 if rows.device.type == "cpu" else self.at_once
        pictures = [decode(part) for part in rows.split(size)]
        return torch.cat(pictures).reshape(*leading, *self.image_shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoder:
        return self  # nothing here ever changes but the device, and flow maps are copied to be trained

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._autoencoder, self.latent_shape, self.at_once)

    def _again_in_backward(self, part: Tensor) -> Tensor:
        pictures: Tensor = checkpoint(self._decode, part, use_reentrant=False, preserve_rng_state=False)
        return pictures

    def _decode(self, part: Tensor) -> Tensor:
        with self._turn:
            return self._autoencoder.decode(part)

    def _follow(self, device: torch.device) -> None:
        with self._turn:
            if self._device != device and hasattr(self._autoencoder, "to"):
                self._autoencoder.to(device)
            self._device = device


def _restored(autoencoder: LatentDecoder, latent_shape: tuple[int, ...], at_once: int) -> Decoder:
    return Decoder(autoencoder, latent_shape=latent_shape, at_once=at_once)
