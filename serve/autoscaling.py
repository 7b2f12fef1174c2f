"""Replicas by the true load: a request of 4 images and 16 draws counts as what it is, 64 rows a step.

Serve's own count would miss it: a sampler takes every request at once, and rewards are asked past Serve (listener.py).
"""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

ROWS, CALLS = "rows", "calls"


class LoadPolicy:
    """Replicas for which each one would have `target` of what it reports; a request that no replica has taken counts as
    one replica.

    of: `rows` or `calls` (of a sampler: requests), waiting and running. Delays, and the bounds of min_replicas and
    max_replicas, are applied by Serve.
    """

    def __init__(self, target: float, of: str = ROWS) -> None:
        self.target, self.of = target, of

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        reported = (context.aggregated_metrics or {}).get(self.of, {})
        queued = context.total_queued_requests or 0.0
        if not reported and not queued:  # nothing is known yet: as many as there are
            return context.target_num_replicas, {}
        return math.ceil(sum(reported.values()) / self.target + queued), {}


def with_policy(options: dict[str, Any], target_rows: int) -> dict[str, Any]:
    """A deployment's options, whose autoscaling, where it has one, counts rows unless the operator chose a policy.

    Where the operator set `target_ongoing_requests`, calls are counted against it, as Serve would.
    """
    config = options.get("autoscaling_config")
    if config is None or "policy" in config:
        return options
    calls = config.get("target_ongoing_requests")
    counted = {"target": target_rows, "of": ROWS} if calls is None else {"target": calls, "of": CALLS}
    policy = {"policy_function": "serve.autoscaling:LoadPolicy", "policy_kwargs": counted}
    return {**options, "autoscaling_config": {**config, "policy": policy}}
