"""Squared errors by conditioning time: a term that is wrong at one end of [0, 1] hides in its mean over all times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_BUCKETS = 4


def bucket_sums(errors: Tensor, time: Tensor) -> Tensor:
    """Sums of errors (terms, B) by equal buckets of time (B,), and in the last row the samples: (terms + 1, 4).

    A bucket holds its lower end: the atom at t = 0 is in the first, and t = 1 counts to the last.
    """
    bucket = (time * NUM_BUCKETS).long().clamp_(0, NUM_BUCKETS - 1)
    counted = torch.cat([errors, torch.ones_like(time).unsqueeze(0)])
    return counted.new_zeros(len(counted), NUM_BUCKETS).index_add_(1, bucket, counted)


def bucket_name(term: str, bucket: int) -> str:
    """The metric of a term in one bucket, such as squared_error.semigroup.t0-0.25."""
    return f"squared_error.{term}.t{bucket / NUM_BUCKETS:g}-{(bucket + 1) / NUM_BUCKETS:g}"


class BucketWindow:
    """`bucket_sums` of the micro-batches since the last flush, added up on the device in float64."""

    def __init__(self, terms: Sequence[str]) -> None:
        self._terms = tuple(terms)
        self._sums: Tensor | None = None

    def add(self, sums: Tensor) -> None:
        """sums: (terms + 1, 4), flat or not."""
        sums = sums.reshape(-1, NUM_BUCKETS)
        self._sums = sums.double() if self._sums is None else self._sums.add_(sums)

    def flush(self) -> dict[str, float]:
        """Mean squared error of all samples of a bucket, over steps, micro-batches and ranks, by metric name.

        A bucket without samples is left out. Collective.
        """
        if self._sums is None:
            return {}
        torch.distributed.all_reduce(self._sums)
        *sums, counts = self._sums.tolist()
        self._sums = None
        return {
            bucket_name(term, bucket): row[bucket] / count
            for term, row in zip(self._terms, sums, strict=True)
            for bucket, count in enumerate(counts)
            if count
        }
