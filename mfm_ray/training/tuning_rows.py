"""Where the anchors of a fine-tuning begin: prepared data, samples of the frozen model, samples steered already."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mfm_ray.finetuning import Tilt
from mfm_ray.finetuning.start import steered_samples
from mfm_ray.flow_map import FlowMap
from mfm_ray.noise import KeyedNoise, Stream
from mfm_ray.training.feed import TrainingData


class TuningRows(Protocol):
    """Where anchors begin: this worker's part of each step, with its noise. sha256: of what they come from."""

    sha256: str

    def batch(self, step: int) -> tuple[Tensor, Tensor | None, KeyedNoise]:
        """Clean samples (B, *event) in model space, labels (B,) or None, and noise of B rows, on the device."""

    def first(self, count: int) -> Tensor:
        """At most so many clean samples, the same on all workers."""


class DataRows:
    """Rows of prepared data. label_dropout: share of them that is given the null class."""

    def __init__(self, data: TrainingData, *, label_dropout: float, num_classes: int) -> None:
        self._data, self._share, self._null = data, label_dropout, num_classes
        self.sha256 = data.sha256

    def batch(self, step: int) -> tuple[Tensor, Tensor | None, KeyedNoise]:
        ((batch, noise),) = self._data.micro_batches(step)
        return batch.data, _with_dropout(batch.label, self._share, self._null, noise), noise

    def first(self, count: int) -> Tensor:
        return self._data.samples(torch.arange(min(count, len(self._data.x)))).to(self._data.device)


class ModelRows:
    """One-step samples of the frozen model itself, of classes drawn at random where it has any."""

    def __init__(
        self, flow_map: FlowMap, *, seed: int, rows: range, label_dropout: float, sha256: str, device: torch.device
    ) -> None:
        self._flow_map, self._seed, self._share = flow_map, seed, label_dropout
        self._rows, self._device, self.sha256 = torch.arange(rows.start, rows.stop, device=device), device, sha256

    def batch(self, step: int) -> tuple[Tensor, Tensor | None, KeyedNoise]:
        noise = KeyedNoise.for_rows(self._seed, self._rows).fold_in(step)
        num_classes = self._flow_map.num_classes
        label = None
        if num_classes:
            drawn = (noise.fold_in(Stream.START).uniform() * num_classes).long().clamp_(max=num_classes - 1)
            label = _with_dropout(drawn, self._share, num_classes, noise)
        return self._samples(noise, label), label, noise

    def first(self, count: int) -> Tensor:
        return self._samples(KeyedNoise.for_images(self._seed, count, device=self._device), None)

    @torch.no_grad()
    def _samples(self, noise: KeyedNoise, label: Tensor | None) -> Tensor:
        time = torch.zeros(noise.keys.shape, device=self._device)
        state = torch.zeros(*noise.keys.shape, *self._flow_map.event_shape, device=self._device)
        start = noise.fold_in(Stream.START)
        return self._flow_map.posterior_draws(state, time, num_draws=1, generator=start, label=label)[:, 0].float()


def _with_dropout(label: Tensor | None, share: float, null: int, noise: KeyedNoise) -> Tensor | None:
    if label is None:
        return None
    return torch.where(noise.fold_in(Stream.LABEL).uniform() < share, torch.full_like(label, null), label)


class SteeredRows:
    """Samples that follow the tilted law already, about, one for each chain of each row; labels as other rows have.

    Drawn once, when they are first asked for; image i of the seed is that of chain i // batch, row i % batch.
    """

    def __init__(
        self,
        others: TuningRows,
        tilt: Tilt,
        *,
        chains: int,
        rows: range,
        batch_size: int,
        num_steps: int,
        num_draws: int,
        seed: int,
    ) -> None:
        self._others, self._tilt, self._chains, self._rows, self._batch_size = others, tilt, chains, rows, batch_size
        self._num_steps, self._num_draws, self._seed = num_steps, num_draws, seed
        self._drawn: list[tuple[Tensor, Tensor | None]] = []
        self.sha256 = others.sha256

    def batch(self, step: int) -> tuple[Tensor, Tensor | None, KeyedNoise]:
        if not self._drawn:
            self._drawn = [self._draw(chain) for chain in range(self._chains)]
        x1, label = self._drawn[step % self._chains]
        return x1, label, self._others.batch(step)[2]

    def first(self, count: int) -> Tensor:
        """Of the law before tuning."""
        return self._others.first(count)

    def _draw(self, chain: int) -> tuple[Tensor, Tensor | None]:
        _, label, noise = self._others.batch(chain)
        samples = steered_samples(
            self._tilt,
            label,
            count=len(self._rows),
            num_steps=self._num_steps,
            num_draws=self._num_draws,
            seed=self._seed,
            first_image=chain * self._batch_size + self._rows.start,
        )
        return samples.to(noise.keys.device), label
