"""The two scales a sample lives in: data units (what users see) and model space (what networks see)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mfm_ray.decoding import AT_ONCE, Decoder, LatentDecoder

KINDS = ("image", "coordinates", "latent")


@dataclass(frozen=True)
class DataSpace:
    """Kind and shape of one sample, and the map between its two scales.

    image: event_shape (C, H, W); data units are pixels in [0, 1], model space is 2 * pixel - 1 in [-1, 1].
    coordinates: event_shape (D,); both scales are the coordinates as they are.
    latent: event_shape (C, H, W); data units are an autoencoder's own latents, model space is `scale` times those
    (0.18215 for the one of Stable Diffusion), which brings them to about unit variance. With a decoder
    (`with_decoder`) data units are pixels in [0, 1] of shape `sample_shape`: users and rewards see pictures.

    Without a decoder the map is affine. Methods take (..., *event) and are differentiable. Equality is of kind, shape
    and scale alone. ValueError for an unknown kind, an impossible shape or scale.
    """

    kind: str
    event_shape: tuple[int, ...]
    scale: float = 1.0
    """Model units in one data unit, of latents alone."""
    decoder: Decoder | None = field(default=None, compare=False, repr=False)
    """Makes pictures of latents; None: samples are what the model makes."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not a kind of data, expected one of {', '.join(KINDS)}")
        shape = tuple(int(size) for size in self.event_shape)
        num_dims = 1 if self.kind == "coordinates" else 3
        if len(shape) != num_dims or min(shape) < 1:
            wanted = "(dimensions,)" if self.kind == "coordinates" else "(channels, height, width)"
            raise ValueError(
                f"event_shape={list(shape)} is no shape of kind={self.kind!r}, expected {wanted}, all >= 1"
            )
        scale = float(self.scale)
        if not (math.isfinite(scale) and scale > 0) or (self.kind != "latent" and scale != 1):
            raise ValueError(f"scale={self.scale}: expected a number above 0, and 1 for all but kind='latent'")
        if self.decoder is not None and (self.kind, shape) != ("latent", self.decoder.latent_shape):
            theirs = self.decoder.latent_shape
            raise ValueError(f"decoder: of latents {list(theirs)}, the space is of {self.kind} {list(shape)}")
        object.__setattr__(self, "event_shape", shape)
        object.__setattr__(self, "scale", scale)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample in data units: `event_shape`, or the picture's where latents are decoded."""
        return self.event_shape if self.decoder is None else self.decoder.image_shape

    @property
    def makes_images(self) -> bool:
        """Whether samples in data units are pictures."""
        return self.kind == "image" or self.decoder is not None

    @property
    def data_range(self) -> tuple[float, float] | None:
        """Bounds of the data units: (0, 1) for pictures, None (unbounded) for the others."""
        return (0.0, 1.0) if self.makes_images else None

    @property
    def data_units_per_model_unit(self) -> float:
        """Length in data units of one unit of model space: 0.5 for images, 1 for coordinates, 1 / scale for latents.

        ValueError where latents are decoded: a decoder has no such number.
        """
        self._require_affine("data_units_per_model_unit")
        return 0.5 if self.kind == "image" else 1.0 / self.scale

    def with_decoder(self, autoencoder: LatentDecoder, *, at_once: int = AT_ONCE) -> "DataSpace":
        """The same space of latents with pictures as data units, at most `at_once` in the autoencoder at a time.

        ValueError for a space of anything but latents, and for latents that are not of the autoencoder's shape.
        """
        return replace(self, decoder=Decoder(autoencoder, latent_shape=self.event_shape, at_once=at_once))

    def to_data_units(self, x: Tensor) -> Tensor:
        """Model space -> data units, unclamped (a gradient passes everywhere)."""
        if self.kind == "image":
            return (x + 1.0) * 0.5
        rescaled = self._rescaled(x, 1.0 / self.scale)
        return rescaled if self.decoder is None else self.decoder(rescaled)

    def to_model_space(self, x: Tensor) -> Tensor:
        """Data units -> model space. ValueError where latents are decoded: a picture has no one latent."""
        self._require_affine("to_model_space")
        return x * 2.0 - 1.0 if self.kind == "image" else self._rescaled(x, self.scale)

    def in_range(self, x: Tensor) -> Tensor:
        """States (..., *event) in model space, as near as may be to what is reported of them: pixels are clamped."""
        return self.to_model_space(self.clamp(self.to_data_units(x))) if self.decoder is None else x

    def _rescaled(self, x: Tensor, factor: float) -> Tensor:
        return x * factor if self.kind == "latent" else x

    def _require_affine(self, what: str) -> None:
        if self.decoder is not None:
            raise ValueError(f"{what}: not known of pictures that a decoder makes of latents")

    def clamp(self, x: Tensor) -> Tensor:
        """Samples in data units, brought into the data's range (only pictures have one)."""
        return x.clamp(0.0, 1.0) if self.makes_images else x

    def config(self) -> dict[str, Any]:
        """The JSON form: kind, event_shape, range, and the scale of latents; `from_config` reads it back.

        Of what the model makes: a decoder is no part of it.
        """
        bounds = replace(self, decoder=None).data_range
        return {
            "kind": self.kind,
            "event_shape": list(self.event_shape),
            "range": None if bounds is None else list(bounds),
            **({"scale": self.scale} if self.kind == "latent" else {}),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DataSpace":
        """The space a mapping (data manifest, config.json) describes by `kind`, `event_shape` and `scale`."""
        missing = [key for key in ("kind", "event_shape") if key not in config]
        if missing:
            raise ValueError(f"the data's description has no {missing[0]!r}, expected kind and event_shape")
        kind = config["kind"]
        if kind == "latent" and "scale" not in config:
            raise ValueError("the data's description has no 'scale', which latents need")
        scale = config["scale"] if kind == "latent" else 1.0
        return cls(kind=kind, event_shape=tuple(config["event_shape"]), scale=scale)
