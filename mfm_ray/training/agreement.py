"""What may fail on one rank and must then fail on all: a rank that raises alone leaves the others waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from mfm_ray.errors import InputError
from mfm_ray.training.checkpoint import CheckpointError

Result = TypeVar("Result")


def agree(work: Callable[[], Result]) -> Result:
    """work() on every rank, or CheckpointError on all of them when it raised InputError on one: the first rank's line.

    Collective.
    """
    error: str | None = None
    try:
        done = work()
    except InputError as found:
        error = str(found)
    errors: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    first = next((text for text in errors if text is not None), None)
    if first is not None:
        raise CheckpointError(first)
    return done
