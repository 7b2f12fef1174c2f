"""How much of a metric's spread each setting explains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_BINS = 4  # of settings with more different numbers than this


def importance(points: Sequence[Mapping[str, Any]], values: Sequence[float], keys: Sequence[str]) -> dict[str, float]:
    """Share of the variance of `values` between the groups that share a value of the key (eta squared), 0 to 1.

    Numbers that were drawn are grouped in quarters. Shares do not add up to one: settings interact, and a few trials
    explain something by chance.
    """
    y = np.asarray(values, dtype=float)
    total = float(((y - y.mean()) ** 2).sum())
    if total == 0:
        return dict.fromkeys(keys, 0.0)
    shares = {}
    for key in keys:
        groups: dict[Any, list[float]] = defaultdict(list)
        for group, value in zip(_groups([point.get(key) for point in points]), values, strict=True):
            groups[group].append(value)
        shares[key] = sum(len(part) * (np.mean(part) - y.mean()) ** 2 for part in groups.values()) / total
    return {key: float(share) for key, share in shares.items()}


def _groups(values: Sequence[Any]) -> list[Any]:
    numbers = [value for value in values if is_number(value)]
    if len(set(numbers)) <= _BINS or len(numbers) < len(values):
        return [str(value) for value in values]
    edges = np.quantile(numbers, np.linspace(0, 1, _BINS + 1)[1:-1])
    return [int(np.searchsorted(edges, value)) for value in values]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
