"""Metrics of a trial, its rungs, and ASHA going on where an earlier call left it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mfm_ray.metrics import mean_pairwise_distance
from mfm_ray.samplers import Samples
from mfm_ray.tuning.importance import importance
from mfm_ray.tuning.sweep import Pruning, TrialRecord
from mfm_ray.tuning.trial import measure, rungs_of


def samples(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 4, 4, generator=generator)
    return Samples(
        images=images, rewards=images.flatten(1).mean(1), nfe=5.0, calls={}, judges={"x": images[:, 0, 0, 0]}
    )


def test_rungs_rise_by_the_factor_and_end_with_all_samples():
    assert rungs_of(100, None, 2) == [100]
    assert rungs_of(100, 16, 2) == [16, 32, 64, 100]
    assert rungs_of(64, 16, 4) == [16, 64]


def test_metrics_are_those_of_the_joined_samples():
    parts = [samples(20), samples(30, seed=1)]
    found = measure(parts, None, seconds=10.0)
    images = torch.cat([part.images for part in parts])
    assert found["reward"] == pytest.approx(float(images.double().mean()), rel=1e-5)
    assert found["judge.x"] == pytest.approx(float(images[:, 0, 0, 0].double().mean()), rel=1e-5)
    assert found["diversity"] == pytest.approx(mean_pairwise_distance(images), rel=1e-4)
    assert (found["nfe"], found["seconds"]) == (5.0, 0.2)
    assert all(found[f"{name}_half_width"] > 0 for name in ("reward", "judge.x", "diversity"))


def test_the_interval_of_diversity_covers_its_expectation():
    """Of 200 sets of 40 images, about 95 percent have the mean over all sets within their interval."""
    found = [measure([samples(40, seed=seed)], None, seconds=1.0) for seed in range(200)]
    truth = sum(row["diversity"] for row in found) / len(found)
    covered = sum(abs(row["diversity"] - truth) <= row["diversity_half_width"] for row in found) / len(found)
    assert 0.89 <= covered <= 0.99  # four standard errors of a share of 0.95, and a little for the pilot mean


def test_unsteered_samples_and_single_ones_lack_what_cannot_be_said():
    alone = Samples(images=torch.zeros(1, 1, 4, 4), rewards=None, nfe=5.0, calls={})
    assert set(measure([alone], None, seconds=1.0)) == {"nfe", "seconds"}


def test_a_resumed_sweep_prunes_by_the_rungs_of_the_earlier_call():
    pruning = Pruning(metric="reward", mode="max", rungs=[10, 20, 40], reduction_factor=2)
    earlier = [
        TrialRecord(
            index=index,
            point={},
            status="pruned",
            metrics={},
            settings="",
            history=[{"num_samples": 10.0, "reward": float(index)}],
        )
        for index in range(1, 5)
    ]
    decisions = []
    for reward in (0.0, 9.0):
        scheduler: Any = pruning.scheduler(earlier)
        trial = SimpleNamespace(trial_id="new")
        scheduler.on_trial_add(None, trial)
        decisions.append(scheduler.on_trial_result(None, trial, {"num_samples": 10, "reward": reward}))
    assert decisions == ["STOP", "CONTINUE"]


def test_importance_is_the_share_of_variance_between_groups():
    points = [{"a": a, "b": b} for a in (1, 2) for b in (1, 2, 3)]
    shares = importance(points, [float(point["a"]) for point in points], ["a", "b"])
    assert shares == {"a": pytest.approx(1.0), "b": pytest.approx(0.0)}
    assert importance(points, [1.0] * 6, ["a"]) == {"a": 0.0}
