import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mfm_ray.config import load_config
from mfm_ray.data.datasets import Split
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.networks.gaussian import LinearObservation
from mfm_ray.networks.residual_mlp import ResidualMLPFlowMap
from mfm_ray.protocols import build_protocol
from mfm_ray.protocols.digits import Material
from mfm_ray.protocols.finetune_digits import evaluate_finetune_digits, finetune_digits_parquet
from mfm_ray.protocols.finetune_gmm import FORMS, evaluate_finetune_gmm, finetune_gmm_parquet
from mfm_ray.reporting.finetuning import (
    finetune_digits_report,
    finetune_digits_table,
    finetune_gmm_report,
    finetune_gmm_table,
)
from mfm_ray.reporting.provenance import Provenance

PROVENANCE = Provenance(command="python -m jobs.evaluate", versions={}, settings={}, facts={}, total_seconds=1.0)
QUIET = {"log": lambda line: None}


def settings(name, **changes):
    return build_protocol({**load_config("evaluate", [f"protocol={name}"]).protocol, **changes})


@pytest.fixture(scope="module")
def on_points():
    torch.manual_seed(0)
    small = settings(
        "finetune_gmm",
        max_calls=20_000,
        batch_size=16,
        fixed_points=4,
        fixed_point_repeats=50,
        num_samples=64,
        num_seeds=2,
        floor_pairs=2,
        num_steps=4,
        dynamics=["ode"],
        noise=0.5,
    )
    flow_map = ResidualMLPFlowMap(space=DataSpace("coordinates", (2,)), width=16, num_blocks=1)
    return evaluate_finetune_gmm(small, flow_map, **QUIET)


@pytest.fixture(scope="module")
def on_digits():
    torch.manual_seed(0)
    space, images = DataSpace("image", (1, 8, 8)), torch.rand(40, 1, 8, 8)
    split = Split(images, torch.arange(40) % 10)
    flow_map = ResidualMLPFlowMap(space=space, width=16, num_blocks=1, num_classes=10)
    classifier = DigitClassifier(num_classes=10, event_shape=(1, 8, 8))
    small = settings(
        "finetune_digits",
        rewards=["symmetry", "masked"],
        rivals=["reward_weighted"],
        max_seconds=0.3,
        batch_size=8,
        num_steps=3,
        steering_draws=2,
        num_samples=16,
    )
    return evaluate_finetune_digits(small, Material(flow_map, classifier, split, split), **QUIET)


def test_every_form_is_tuned_sampled_and_told(on_points):
    figures = on_points.metrics()
    for form in FORMS:
        told = f"methods.{form}.ode.over_floor" in figures or any(
            tuning.form == form and tuning.error for tuning in on_points.tunings
        )
        assert told, form
        assert figures[f"tuning.{form}.calls"] > 0
    assert figures["methods.anchored.ode.nfe"] == 4
    page = finetune_gmm_report(on_points, PROVENANCE)
    assert "sigma" in page
    assert "fixed point" in page
    assert any("anchored" in line for line in finetune_gmm_table(on_points))
    parts = pq.read_table(pa.BufferReader(finetune_gmm_parquet(on_points))).column("part").to_pylist()
    assert {"method", "fixed_point", "step"} == set(parts)


def test_every_reward_has_its_three_samples_and_shares_of_the_gain(on_digits):
    figures = on_digits.metrics()
    for name in ("symmetry", "masked"):
        for key in ("base", "steered", "anchored"):
            assert 0 < figures[f"rewards.{name}.{key}.classes"] <= 10
        base, steered, tuned = (figures[f"rewards.{name}.{key}.reward"] for key in ("base", "steered", "anchored"))
        share = figures[f"rewards.{name}.anchored.share_of_gain"]
        assert share == pytest.approx((tuned - base) / (steered - base))
    # plain samples of a tuned model cost what those of the base do
    assert figures["rewards.symmetry.anchored.nfe"] == figures["rewards.symmetry.base.nfe"] == 3
    assert figures["rewards.symmetry.steered.nfe"] > 3
    page = finetune_digits_report(on_digits, PROVENANCE)
    assert page.count("<img") >= 6 * 16
    assert len(finetune_digits_table(on_digits)) >= 8
    assert json.dumps(figures)
    rows = pq.read_table(pa.BufferReader(finetune_digits_parquet(on_digits)))
    assert set(rows.column("part").to_pylist()) == {"samples", "step"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("finetune_gmm", {"direction": [0, 0]}, "protocol.direction"),
        ("finetune_gmm", {"methods": []}, "protocol.methods"),
        ("finetune_gmm", {"methods": ["ancored"]}, "protocol.methods"),
        ("finetune_digits", {"rivals": ["anchored"]}, "protocol.rivals"),
        ("finetune_digits", {"rewards": []}, "protocol.rewards"),
        ("finetune_digits", {"max_second": 1}, "protocol.max_second"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(name, changes, message):
    with pytest.raises(InputError, match=message):
        settings(name, **changes)


def test_a_model_of_images_is_refused_by_the_mixture():
    flow_map = ResidualMLPFlowMap(space=DataSpace("image", (1, 8, 8)), width=16, num_blocks=1)
    with pytest.raises(InputError, match="expected \\[2\\]"):
        evaluate_finetune_gmm(settings("finetune_gmm"), flow_map, **QUIET)


def test_a_method_that_diverges_is_told_and_every_other_error_surfaces(monkeypatch):
    torch.manual_seed(0)
    flow_map = ResidualMLPFlowMap(space=DataSpace("coordinates", (2,)), width=16, num_blocks=1)
    small = settings(
        "finetune_gmm",
        methods=["reinforce_adjoint"],
        max_calls=1_000_000,
        batch_size=16,
        fixed_points=0,
        learning_rate=1e4,
        num_samples=64,
        num_seeds=2,
        floor_pairs=2,
        num_steps=4,
    )
    diverged = evaluate_finetune_gmm(small, flow_map, **QUIET)
    assert diverged.tunings[0].error.startswith(("the tuned drift ran away", "the loss of step"))
    assert "diverged" in finetune_gmm_report(diverged, PROVENANCE)
    monkeypatch.setattr(LinearObservation, "__call__", lambda self, x: x.sum(1) * torch.nan)
    with pytest.raises(ValueError, match="returned NaN or infinity"):
        evaluate_finetune_gmm(small, flow_map, **QUIET)
