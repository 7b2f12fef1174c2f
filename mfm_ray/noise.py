"""Noise as a pure function of its key, so that a picture does not depend on what else is in the batch.

`KeyedNoise` is a counter-based generator (Philox4x32-10, Salmon et al. 2011) written in torch integer
arithmetic: every row of a batch carries a 64-bit key, derived from (seed, image, step, particle, draw) by
`fold_in` and `spread`, and row i of the output is a function of key i alone. `GeneratorNoise` gives an
ordinary `torch.Generator` the same face; there the numbers follow the order of the calls.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_GOLDEN = -7046029254386353131  # 2^64 / golden ratio as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # the multipliers of splitmix64's finaliser (Steele et al. 2014)
_MIX_2 = -7723592293110705685
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10


class Stream(IntEnum):
    """What a deviate is for. Two purposes never share a key."""

    START = 1  # the initial state x_0
    DRAW = 2  # the inner noise of a posterior draw
    DIFFUSION = 3  # the Brownian increment of an SDE step
    RENOISE = 4  # fresh outer noise of a refinement or search step
    TIME = 5  # training times
    OUTER = 6  # training noise of the outer state
    INNER = 7  # training noise of the inner state
    LABEL = 8  # label dropout
    SPLIT = 9  # the split point of the semigroup objective
    RESAMPLE = 10  # particle resampling
    AUGMENT = 11  # changes to training images
    LATENT = 12  # the sample of a stored posterior
    CHAIN = 13  # when a chain of anchors begins again


class Noise(Protocol):
    """A source of deviates for the rows of a batch; rows may have any number of leading dimensions."""

    def fold_in(self, value: int | Tensor) -> Noise: ...

    def spread(self, num: int, *, first: int = 0) -> Noise: ...

    def __getitem__(self, index: slice | Tensor) -> Noise: ...

    def normal(self, *event: int) -> Tensor: ...

    def uniform(self) -> Tensor: ...


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64's own >> would copy the sign bit


def _offset(value: int | Tensor) -> int | Tensor:
    """What is added for an index: (value + 1) times the golden ratio's bits, as signed 64-bit integers.

    + 1: key 0 (image 0 of seed 0) would otherwise fold 0 into itself and share noise between steps.
    """
    if isinstance(value, Tensor):
        return (value.to(torch.int64) + 1) * _GOLDEN
    return ((value + 1) * _GOLDEN + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser: a bijection of 64-bit integers in which every input bit moves every output bit."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _philox(keys: Tensor, counters: Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32-10 of 64-bit keys (*rows,) at counters (4, *rows, blocks) of 32-bit words.

    Returns output words 0 and 2, and words 1 and 3, each (2, *rows, blocks) int64: the two halves of a round are the
    same arithmetic, so that they share a tensor.
    """
    shape = (2,) + (1,) * (keys.ndim + 1)
    multiplier = torch.tensor(_PHILOX_MULTIPLIERS, device=keys.device).reshape(shape)
    weyl = torch.tensor(_PHILOX_WEYL, device=keys.device).reshape(shape)
    key = torch.stack([keys & _MASK32, _shift_right(keys, 32)]).unsqueeze(-1)
    even, odd = counters[0::2], counters[1::2]
    for _ in range(_PHILOX_ROUNDS):
        product = (even * multiplier).flip(0)
        even = (product >> 32).bitwise_and_(_MASK32).bitwise_xor_(odd).bitwise_xor_(key)
        odd = product.bitwise_and_(_MASK32)
        key = (key + weyl) & _MASK32
    return even, odd


class KeyedNoise:
    """Deviates that are a function of a row's key alone.

    Args:
        keys: int64 of any shape, one key a row.

    `normal(*event)` is (*rows, *event) float32 with rows = keys.shape; `uniform()` is (*rows,) float32 in (0, 1).
    Calling either twice gives the same numbers: `fold_in` a `Stream`, a step or a tensor of indices to get others.
    Computed in float64 and rounded, so that vector width and position in the tensor cannot change a result.
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys
        self._mixed: Tensor | None = None  # every fold begins with it, and a step folds several streams

    @classmethod
    def for_rows(cls, seed: int, rows: Tensor) -> KeyedNoise:
        """One key a row, from one seed and integer row indices (B,): image numbers or rows of a training set.

        Raises ValueError for a seed that is not a signed 64-bit integer.
        """
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed={seed}: expected an integer from -2^63 to 2^63 - 1")
        return cls(_mix(torch.full_like(rows, seed, dtype=torch.int64))).fold_in(rows)

    @classmethod
    def for_images(
        cls, seed: int, num_images: int, *, first: int = 0, device: torch.device | str = "cpu"
    ) -> KeyedNoise:
        """Keys of images first .. first + num_images - 1 of a seed."""
        return cls.for_rows(seed, torch.arange(first, first + num_images, device=device))

    def fold_in(self, value: int | Tensor) -> KeyedNoise:
        """New keys from the old ones and an integer, or one integer a row (broadcast against the rows)."""
        if self._mixed is None:
            self._mixed = _mix(self.keys)
        return self._of(_mix(self._mixed + _offset(value)))

    def spread(self, num: int, *, first: int = 0) -> KeyedNoise:
        """Give every row `num` independent rows of its own, numbered from `first`, in a new last dimension."""
        return self._of(self.keys.unsqueeze(-1)).fold_in(torch.arange(first, first + num, device=self.keys.device))

    def __getitem__(self, index: slice | Tensor) -> KeyedNoise:
        return self._of(self.keys[index])

    def flatten(self) -> KeyedNoise:
        return self._of(self.keys.reshape(-1))

    def _of(self, keys: Tensor) -> KeyedNoise:
        """Noise of the same kind for other keys."""
        return KeyedNoise(keys)

    def normal(self, *event: int) -> Tensor:
        size = math.prod(event)
        counters = torch.zeros(4, *self.keys.shape, -(-size // 4), dtype=torch.int64, device=self.keys.device)
        counters[0] = torch.arange(counters.shape[-1], device=self.keys.device)
        pairs = _box_muller(*_philox(self.keys, counters))  # (2, *rows, blocks, 2)
        flat = pairs.movedim(0, -2).reshape(*self.keys.shape, -1)
        return flat[..., :size].reshape(*self.keys.shape, *event)

    def uniform(self) -> Tensor:
        # One more key is random enough for a single number, at a tenth of Philox's cost. 23 bits and a half step:
        # never 0, and never rounded up to 1 in float32.
        return ((_shift_right(self.fold_in(-2).keys, 41).double() + 0.5) / 2**23).float()


def _box_muller(a: Tensor, b: Tensor) -> Tensor:
    """Two normals, in a new last dimension, from each pair of 32-bit words."""
    radius = torch.sqrt(-2 * torch.log((a.double() + 0.5) / 2**32))
    angle = b.double() * (2 * math.pi / 2**32)
    return torch.stack([(radius * torch.cos(angle)).float(), (radius * torch.sin(angle)).float()], dim=-1)


class GeneratorNoise:
    """A `torch.Generator` with the face of `Noise`; numbers follow the order of the calls, keys are ignored."""

    def __init__(self, generator: torch.Generator, rows: tuple[int, ...], device: torch.device | None = None) -> None:
        self.generator = generator
        self.rows = rows
        self.device = device if device is not None else generator.device

    def fold_in(self, value: int | Tensor) -> GeneratorNoise:
        return self

    def spread(self, num: int, *, first: int = 0) -> GeneratorNoise:
        return GeneratorNoise(self.generator, (*self.rows, num), self.device)

    def __getitem__(self, index: slice | Tensor) -> GeneratorNoise:
        rows = torch.empty(self.rows, device="meta")[index if isinstance(index, slice) else index.to("meta")]
        return GeneratorNoise(self.generator, tuple(rows.shape), self.device)

    def normal(self, *event: int) -> Tensor:
        shape = (*self.rows, *event)
        return torch.randn(shape, generator=self.generator, device=self.generator.device).to(self.device)

    def uniform(self) -> Tensor:
        return torch.rand(self.rows, generator=self.generator, device=self.generator.device).to(self.device)


def as_noise(generator: torch.Generator | Noise, *, like: Tensor) -> Noise:
    """The noise source for the rows of `like` (B, *event), from a `torch.Generator` or keyed noise of B rows."""
    if isinstance(generator, torch.Generator):
        return GeneratorNoise(generator, (like.shape[0],), like.device)
    return generator
