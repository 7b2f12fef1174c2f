"""What an objective receives: one worker's part of a global batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from mfm_ray.data.datasets import Split
from mfm_ray.data.order import SampleOrder
from mfm_ray.data_space import DataSpace


@dataclass(frozen=True)
class Batch:
    """data: (B, *event) float32 in model space. label: (B,) int64, None for data without labels.

    rows: (B,) int64, positions within the global batch (not in the data set): they key the noise, so that losses
    do not depend on how the batch was split over workers and micro-batches.
    """

    data: Tensor
    label: Tensor | None
    rows: Tensor

    def __len__(self) -> int:
        return self.data.shape[0]

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.data, self.label, self.rows) if tensor is not None]

    def to(self, device: torch.device | str) -> "Batch":
        """A copy on the device. To a CUDA device it goes from pinned memory and is only enqueued on the stream."""
        label = None if self.label is None else _copy(self.label, torch.device(device))
        return Batch(_copy(self.data, torch.device(device)), label, _copy(self.rows, torch.device(device)))

    def split(self, sizes: Sequence[int]) -> Iterator["Batch"]:
        """Micro-batches of so many rows, in order."""
        for last, size in zip(accumulate(sizes), sizes, strict=True):
            part = slice(last - size, last)
            label = None if self.label is None else self.label[part]
            yield Batch(self.data[part], label, self.rows[part])


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    to_cuda = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if to_cuda else tensor.to(device)


def read_batch(
    split: Split, space: DataSpace, order: SampleOrder, step: int, *, rank: int = 0, world_size: int = 1
) -> Batch:
    """A worker's part of global batch `step`; the labels are None when no row of the split has one."""
    index = order.rows(step, rank, world_size)
    positions = order.positions(rank, world_size)
    return Batch(
        data=space.to_model_space(split.data[index]),
        label=split.labels[index] if bool((split.labels >= 0).any()) else None,
        rows=torch.arange(positions.start, positions.stop),
    )
