"""Metrics through Ray's own: no prompt and no request id in any label, so that their number stays bounded."""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter as Tally
from queue import SimpleQueue

from ray.util.metrics import Counter, Gauge, Histogram

from mfm_ray.engine import Pass

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


class PassRecorder:
    """Passes as metrics, told a moment later by a thread of its own.

    A few dozen microseconds a metric would else be part of every step: 0.2 ms of a lone request's 6 on two cores.
    """

    _PAUSE_S = 0.25

    def __init__(self, metrics: SamplerMetrics) -> None:
        self._metrics, self._passes = metrics, SimpleQueue[tuple[str, Pass]]()
        threading.Thread(target=self._run, name="pass-metrics", daemon=True).start()

    def note(self, model: str, done: Pass) -> None:
        """From an engine's thread."""
        self._passes.put((model, done))

    def _run(self) -> None:
        while True:
            taken = [self._passes.get()]
            time.sleep(self._PAUSE_S)
            while not self._passes.empty():
                taken.append(self._passes.get())
            self._tell(taken)

    def _tell(self, taken: list[tuple[str, Pass]]) -> None:
        calls = Tally[tuple[str, str]]()
        for model, done in taken:
            tags = {"model": model}
            self._metrics.step_rows.observe(done.rows, tags=tags)
            self._metrics.step_seconds.observe(done.seconds, tags=tags)
            if done.effective_share is not None:
                self._metrics.ess.observe(done.effective_share, tags=tags)
            calls.update({(model, kind): count for kind, count in vars(done.calls).items() if count})
        for (model, kind), count in calls.items():
            self._metrics.nfe.inc(count, tags={"model": model, "kind": kind})
            if kind == "draw":
                self._metrics.posterior_draws.inc(count, tags={"model": model})
