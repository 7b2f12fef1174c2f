"""Metrics through Ray's own: no prompt and no request id in any label, so that their number stays bounded."""

from __future__ import annotations

import functools

from ray.util.metrics import Counter, Gauge, Histogram

_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
_ROWS = [1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0]
_SHARES = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0]


@functools.cache
def reward_seconds() -> Histogram:
    return Histogram(
        "mfm_reward_seconds", "one evaluation of a reward", boundaries=_SECONDS, tag_keys=("reward", "pass")
    )


@functools.cache
def requests_total() -> Counter:
    return Counter("mfm_requests_total", "requests answered", tag_keys=("outcome",))


class SamplerMetrics:
    """What one sampler replica tells, labelled by model."""

    def __init__(self) -> None:
        by_model = ("model",)
        self.requests_running = Gauge("mfm_requests_running", "requests being stepped", tag_keys=by_model)
        self.requests_waiting = Gauge("mfm_requests_waiting", "requests that no step has taken", tag_keys=by_model)
        self.step_rows = Histogram("mfm_step_rows", "rows of one pass", boundaries=_ROWS, tag_keys=by_model)
        self.step_seconds = Histogram("mfm_step_seconds", "one pass", boundaries=_SECONDS, tag_keys=by_model)
        self.posterior_draws = Counter("mfm_posterior_draws_total", "posterior draws", tag_keys=by_model)
        self.nfe = Counter("mfm_nfe_total", "network and reward calls, in rows", tag_keys=("model", "kind"))
        self.ess = Histogram(
            "mfm_ess_fraction", "effective share of posterior draws", boundaries=_SHARES, tag_keys=by_model
        )
