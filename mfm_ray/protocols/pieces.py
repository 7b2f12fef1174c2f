"""Long evaluations cut into pieces: each is made as a whole, anywhere, and is a function of its numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

Progress = Callable[[int], None]
"""Called with the items of a piece that are done."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Items first to first + count - 1 of a part ("nfe_2"); the index-th of `of` pieces of that part."""

    part: str
    index: int
    of: int
    first: int
    count: int


class Maker(Protocol):
    """Makes pieces; travels to the processes that work."""

    def move(self, device: str) -> None: ...

    def make(self, piece: Piece, progress: Progress) -> dict[str, Tensor]: ...


Pieces = Callable[[Maker, Sequence[Piece]], Iterator[dict[str, Tensor]]]
"""Where pieces are made: their tensors by name, on the CPU, in the order of the pieces."""


def plan(part: str, total: int, size: int) -> list[Piece]:
    """The pieces of `size` items, the last one smaller, of a part of `total`."""
    number = -(-total // size)
    return [
        Piece(part=part, index=index, of=number, first=index * size, count=min(size, total - index * size))
        for index in range(number)
    ]


def made_here(maker: Maker, pieces: Sequence[Piece]) -> Iterator[dict[str, Tensor]]:
    """One after the other in this process."""
    for piece in pieces:
        yield on_cpu(maker.make(piece, lambda done: None))


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def moved(device: str, *parts: Any) -> None:
    """Brings what can be moved (networks, rewards) to a device, in place."""
    for part in parts:
        if hasattr(part, "to"):
            part.to(device)
