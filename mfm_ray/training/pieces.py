"""Where the elements of each parameter lie on a rank: what makes a checkpoint free of stage and number of workers.

Every sharding of DeepSpeed cuts flattened parameters into contiguous runs. Written down by name and place within the
parameter, a run can be read by any other sharding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

Shards = Sequence[Tensor]
"""A rank's part of one kind of state (weights, a moment, an average), laid out as `ZeroEngine.fp32_shards`."""


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + count` of the flattened parameter `name`, at `offset` of shard `shard`."""

    name: str
    start: int
    count: int
    shard: int
    offset: int

    def of(self, shards: Shards) -> Tensor:
        """The piece's elements, (count,), a view."""
        return shards[self.shard].view(-1)[self.offset : self.offset + self.count]


def share_of(pieces: Sequence[Piece], rank: int, world_size: int) -> list[Piece]:
    """What rank `rank` writes of pieces that all ranks hold alike: an equal, contiguous part of all elements."""
    total = sum(piece.count for piece in pieces)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    share, passed = [], 0
    for piece in pieces:
        begin, end = max(first - passed, 0), min(last - passed, piece.count)
        if begin < end:
            share.append(replace(piece, start=piece.start + begin, count=end - begin, offset=piece.offset + begin))
        passed += piece.count
    return share


def key_of(kind: str, piece: Piece) -> str:
    """The name of a piece of one kind of state in a file."""
    return f"{kind}/{piece.name}:{piece.start}"


def parse_key(key: str) -> tuple[str, str, int]:
    """(kind, name, start) of such a name. ValueError for another one."""
    kind, slash, rest = key.partition("/")
    name, colon, start = rest.rpartition(":")
    if not (slash and colon and name):
        raise ValueError(f"{key!r}: expected kind/parameter:start")
    return kind, name, int(start)


def shapes_of(parameters: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Whole shapes by name, those that ZeRO-3 has taken apart too."""
    return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in parameters.items()}
