"""The order in which training reads its samples: a function of (seed, epoch) alone."""

import numpy as np
import torch
from torch import Tensor

from mfm_ray.errors import InputError

_MASK_64 = (1 << 64) - 1


class SampleOrder:
    """Endless concatenation of one permutation of all rows per epoch; global batch i is its i-th consecutive slice.

    Within an epoch no row is dropped or repeated, and a batch may reach over an epoch's end. A worker's part is the
    rank-th of world_size contiguous pieces of the global batch, which differ by at most one row, so the union over
    workers does not depend on their number. Nothing is remembered from step to step: to resume, ask for the next step.

    The permutation of epoch e sorts the raw 64-bit words of Philox with key (seed, e), a stream that numpy guarantees
    on every platform and in every version.

    num_rows: rows of the split. global_batch_size: rows of one step over all workers, any size.
    """

    def __init__(self, *, num_rows: int, seed: int, global_batch_size: int) -> None:
        for name, value in {"num_rows": num_rows, "global_batch_size": global_batch_size}.items():
            if value < 1:
                raise InputError(f"{name}={value}: expected an integer of at least 1")
        self.num_rows, self.seed, self.global_batch_size = num_rows, seed, global_batch_size
        self._permutations: dict[int, Tensor] = {}

    def rows(self, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
        """Data-set rows of a worker's part of global batch `step` (from 0): (rows of that part,) int64."""
        part = self.positions(rank, world_size)
        first = step * self.global_batch_size + part.start
        pieces, end = [], first + len(part)
        while first < end:
            epoch, offset = divmod(first, self.num_rows)
            count = min(end - first, self.num_rows - offset)
            pieces.append(self._permutation(epoch)[offset : offset + count])
            first += count
        return torch.cat(pieces)

    def positions(self, rank: int = 0, world_size: int = 1) -> range:
        """A worker's rows within the global batch: what keys their noise, whatever the number of workers."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: expected 0 to {world_size - 1}")
        size = self.global_batch_size
        return range(size * rank // world_size, size * (rank + 1) // world_size)

    def epoch(self, step: int) -> int:
        """The epoch in which global batch `step` begins."""
        return step * self.global_batch_size // self.num_rows

    def _permutation(self, epoch: int) -> Tensor:
        found = self._permutations.get(epoch)
        if found is None:
            key = np.array([self.seed & _MASK_64, epoch], dtype=np.uint64)
            words = np.random.Philox(key=key).random_raw(self.num_rows)
            found = torch.from_numpy(np.argsort(words, kind="stable"))
            # the newest two; replaced and never changed, because another thread may be reading them
            self._permutations = dict([*self._permutations.items(), (epoch, found)][-2:])
        return found
