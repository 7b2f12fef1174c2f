"""How far a trial's samples are from held-out data: Fréchet distance and sliced W2, with intervals by bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_ray.errors import InputError
from mfm_ray.metrics import frechet_distance, sliced_w2
from mfm_ray.tuning.front import HALF_WIDTH

_REPEATS = 30
_INTERVAL = 1.96
_AT_LEAST = 2  # rows, for a covariance


@dataclass(frozen=True)
class HeldOut:
    """Data that no model was trained on: data (M, *event) with labels (M,).

    features: what the Fréchet distance sees of data, (N, *event) to (N, D); None: the numbers themselves.
    """

    data: Tensor
    labels: Tensor
    features: Callable[[Tensor], Tensor] | None = None

    def distances(self, names: Sequence[str], samples: Tensor, *, label: int | None = None) -> dict[str, float]:
        """The distances of that name (keys of `DISTANCES`) from samples (N, *event), with half of their 95 percent
        interval: 1.96 deviations over samples that are drawn again from these. {} for a single sample.

        label: the held-out data are those of this class. Both fall to a floor above 0 that exact samples have too.
        """
        held = self.of(label)
        if len(samples) < _AT_LEAST:
            return {}
        found: dict[str, float] = {}
        for name in names:
            found |= DISTANCES[name](self, samples, held)
        return found

    def of(self, label: int | None) -> Tensor:
        """The data of a class, all for None. InputError where too little was held out."""
        held = self.data if label is None else self.data[self.labels == label]
        if len(held) < _AT_LEAST:
            raise InputError(f"label={label}: {len(held)} held-out samples, expected at least {_AT_LEAST}")
        return held

    def _seen(self, data: Tensor) -> Tensor:
        return (data if self.features is None else self.features(data)).flatten(1).double()


def _frechet(heldout: HeldOut, samples: Tensor, held: Tensor) -> dict[str, float]:
    reference = heldout._seen(held)
    return _with_interval("frechet", lambda rows: frechet_distance(rows, reference), heldout._seen(samples))


def _sliced_w2(heldout: HeldOut, samples: Tensor, held: Tensor) -> dict[str, float]:
    """Of sets of equal size, the first of both."""
    count = min(len(samples), len(held))
    reference = held[:count].flatten(1).double()
    return _with_interval(
        "sliced_w2", lambda rows: float(sliced_w2(rows, reference)), samples[:count].flatten(1).double()
    )


DISTANCES: Mapping[str, Callable[[HeldOut, Tensor, Tensor], dict[str, float]]] = {
    "frechet": _frechet,
    "sliced_w2": _sliced_w2,
}


def _with_interval(name: str, distance: Callable[[Tensor], float], rows: Tensor) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    again = [distance(rows[torch.randint(len(rows), (len(rows),), generator=generator)]) for _ in range(_REPEATS)]
    spread = float(torch.tensor(again, dtype=torch.float64).std())
    return {name: distance(rows), name + HALF_WIDTH: _INTERVAL * spread}
