"""The two scales a sample lives in: data units (what users see) and model space (what networks see)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

KINDS = ("image", "coordinates", "latent")


@dataclass(frozen=True)
class DataSpace:
    """Kind and shape of one sample, and the affine map between its two scales.

    image: event_shape (C, H, W); data units are pixels in [0, 1], model space is 2 * pixel - 1 in [-1, 1].
    coordinates: event_shape (D,); both scales are the coordinates as they are.
    latent: event_shape (C, H, W); data units are an autoencoder's own latents, model space is `scale` times those
    (0.18215 for the one of Stable Diffusion), which brings them to about unit variance.

    Methods take (..., *event) and are differentiable. ValueError for an unknown kind, an impossible shape or scale.
    """

    kind: str
    event_shape: tuple[int, ...]
    scale: float = 1.0
    """Model units in one data unit, of latents alone."""

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
        object.__setattr__(self, "event_shape", shape)
        object.__setattr__(self, "scale", scale)

    @property
    def data_range(self) -> tuple[float, float] | None:
        """Bounds of the data units: (0, 1) for images, None (unbounded) for the others."""
        return (0.0, 1.0) if self.kind == "image" else None

    @property
    def data_units_per_model_unit(self) -> float:
        """Length in data units of one unit of model space: 0.5 for images, 1 for coordinates, 1 / scale for latents."""
        return 0.5 if self.kind == "image" else 1.0 / self.scale

    def to_data_units(self, x: Tensor) -> Tensor:
        """Model space -> data units, unclamped (a gradient passes everywhere)."""
        return (x + 1.0) * 0.5 if self.kind == "image" else self._rescaled(x, 1.0 / self.scale)

    def to_model_space(self, x: Tensor) -> Tensor:
        """Data units -> model space."""
        return x * 2.0 - 1.0 if self.kind == "image" else self._rescaled(x, self.scale)

    def _rescaled(self, x: Tensor, factor: float) -> Tensor:
        return x * factor if self.kind == "latent" else x

    def clamp(self, x: Tensor) -> Tensor:
        """Samples in data units, brought into the data's range (only images have one)."""
        return x.clamp(0.0, 1.0) if self.kind == "image" else x

    def config(self) -> dict[str, Any]:
        """The JSON form: kind, event_shape, range, and the scale of latents; `from_config` reads it back."""
        bounds = self.data_range
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
