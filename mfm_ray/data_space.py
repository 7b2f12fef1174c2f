"""The two scales a sample lives in: data units (what users see) and model space (what networks see)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

KINDS = ("image", "coordinates")


@dataclass(frozen=True)
class DataSpace:
    """Kind and shape of one sample, and the affine map between its two scales.

    image: event_shape (C, H, W); data units are pixels in [0, 1], model space is 2 * pixel - 1 in [-1, 1].
    coordinates: event_shape (D,); both scales are the coordinates as they are.

    Methods take (..., *event) and are differentiable. ValueError for an unknown kind or an impossible shape.
    """

    kind: str
    event_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not a kind of data, expected one of {', '.join(KINDS)}")
        shape = tuple(int(size) for size in self.event_shape)
        num_dims = 3 if self.kind == "image" else 1
        if len(shape) != num_dims or min(shape) < 1:
            wanted = "(channels, height, width)" if self.kind == "image" else "(dimensions,)"
            raise ValueError(
                f"event_shape={list(shape)} is no shape of kind={self.kind!r}, expected {wanted}, all >= 1"
            )
        object.__setattr__(self, "event_shape", shape)

    @property
    def data_range(self) -> tuple[float, float] | None:
        """Bounds of the data units: (0, 1) for images, None (unbounded) for coordinates."""
        return (0.0, 1.0) if self.kind == "image" else None

    @property
    def data_units_per_model_unit(self) -> float:
        """Length in data units of one unit of model space: 0.5 for images, 1 for coordinates."""
        return 0.5 if self.kind == "image" else 1.0

    def to_data_units(self, x: Tensor) -> Tensor:
        """Model space -> data units, unclamped (a gradient passes everywhere)."""
        return (x + 1.0) * 0.5 if self.kind == "image" else x

    def to_model_space(self, x: Tensor) -> Tensor:
        """Data units -> model space."""
        return x * 2.0 - 1.0 if self.kind == "image" else x

    def clamp(self, x: Tensor) -> Tensor:
        """Samples in data units, brought into the data's range (coordinates have none)."""
        return x.clamp(0.0, 1.0) if self.kind == "image" else x

    def config(self) -> dict[str, Any]:
        """The JSON form: kind, event_shape and range; `from_config` reads it back."""
        bounds = self.data_range
        return {
            "kind": self.kind,
            "event_shape": list(self.event_shape),
            "range": None if bounds is None else list(bounds),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DataSpace":
        """The space a mapping (data manifest, config.json) describes by `kind` and `event_shape`."""
        missing = [key for key in ("kind", "event_shape") if key not in config]
        if missing:
            raise ValueError(f"the data's description has no {missing[0]!r}, expected kind and event_shape")
        return cls(kind=config["kind"], event_shape=tuple(config["event_shape"]))
