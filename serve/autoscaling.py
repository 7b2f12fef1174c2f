"""Samplers by the rows that wait and run: a request of 4 images and 16 draws counts as what it is, 64 rows a step."""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

ROWS = "rows"


class RowsPolicy:
    """Replicas for which each one would have `target_rows`; a request that no replica has taken counts as so many.

    Delays, and the bounds of min_replicas and max_replicas, are applied by Serve.
    """

    def __init__(self, target_rows: float) -> None:
        self.target_rows = target_rows

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        reported = (context.aggregated_metrics or {}).get(ROWS, {})
        queued = context.total_queued_requests or 0.0
        if not reported and not queued:  # nothing is known yet: as many as there are
            return context.target_num_replicas, {}
        return math.ceil(sum(reported.values()) / self.target_rows + queued), {}


def with_policy(options: dict[str, Any], target_rows: int) -> dict[str, Any]:
    """A sampler's options, whose autoscaling, where it has one, counts rows unless the operator chose a policy."""
    config = options.get("autoscaling_config")
    if config is None or "policy" in config:
        return options
    policy = {"policy_function": "serve.autoscaling:RowsPolicy", "policy_kwargs": {"target_rows": target_rows}}
    return {**options, "autoscaling_config": {**config, "policy": policy}}
