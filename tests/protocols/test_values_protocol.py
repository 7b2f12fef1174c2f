"""protocol=values on the exact flow map of a mixture, whose value function is known in closed form."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mfm_ray.config import load_config
from mfm_ray.data import digits, gmm
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.metrics import pearson
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.networks.gaussian import GaussianMixtureFlowMap, isotropic_mixture
from mfm_ray.networks.residual_mlp import ResidualMLPFlowMap
from mfm_ray.noise import KeyedNoise
from mfm_ray.protocols import build_protocol, values
from mfm_ray.protocols.reference_draws import glass_draws, memoryless_draws
from mfm_ray.protocols.values import ValuesEvaluation, ValuesMaterial, ValuesProtocol, agreement, evaluate_values
from mfm_ray.reporting.provenance import Provenance
from mfm_ray.reporting.values import values_report, values_table

MEANS = torch.tensor([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]])


def protocol(**changes: object) -> ValuesProtocol:
    """The packaged settings, small."""
    settings = load_config("evaluate", ["protocol=values"]).protocol
    small = {
        "times": [0.2, 0.5],
        "num_contexts": 48,
        "num_draws": 128,
        "map_steps": [1, 4],
        "glass_steps": [1, 32],
        "truth_draws": 128,
        "truth_steps": 60,
        "noise": 1.0,
    }
    return build_protocol({**settings, **small, **changes})


def flow_map(means: torch.Tensor = MEANS) -> GaussianMixtureFlowMap:
    return GaussianMixtureFlowMap(isotropic_mixture(means, variance=0.5), num_inner_steps=4)


def quiet(line: str) -> None:
    pass


def run(settings: ValuesProtocol, model: GaussianMixtureFlowMap) -> ValuesEvaluation:
    return evaluate_values(settings, ValuesMaterial(model, gmm(rows=2, heldout_rows=64).splits["heldout"]), log=quiet)


def figures(evaluation: ValuesEvaluation, place: int) -> dict:
    return {row.estimator.key: row for row in evaluation.studies[place].figures}


@pytest.fixture(scope="module")
def evaluation() -> ValuesEvaluation:
    return run(protocol(), flow_map())


@pytest.mark.parametrize("place", [0, 1])
def test_draws_of_the_exact_map_give_the_value_within_their_standard_errors(evaluation, place):
    for key in ("mfm_1", "mfm_4"):
        row = figures(evaluation, place)[key]
        assert row.exact.correlation.lower > 0.9
        assert row.exact.within >= 0.95 - 3 * (0.95 * 0.05 / 48) ** 0.5
        assert row.exact.rms < 1.5 * float(row.values.standard_error.square().mean().sqrt())
        assert row.truth.correlation.value > evaluation.studies[place].ceiling - 0.05


@pytest.mark.parametrize("place", [0, 1])
def test_rollouts_agree_with_the_closed_form_within_their_standard_errors(evaluation, place):
    study = evaluation.studies[place]
    error = float(study.truth.standard_error.square().mean().sqrt())
    assert study.truth_exact.correlation.lower > 0.9
    assert study.truth_exact.rms < 1.5 * error
    assert abs(study.truth_exact.bias) < 4 * error / 48**0.5
    assert study.truth_exact.within >= 0.95 - 3 * (0.95 * 0.05 / 48) ** 0.5


def test_the_ceiling_is_what_an_exact_estimate_of_the_same_size_reaches(evaluation):
    for study in evaluation.studies:
        noise = float(study.truth.standard_error.square().mean() / study.exact.var())
        assert abs(study.ceiling - 1 / (1 + noise)) < 0.02


@pytest.mark.parametrize("place", [0, 1])
def test_a_correlation_does_not_see_that_one_glass_step_ignores_the_spread(evaluation, place):
    rows = figures(evaluation, place)
    assert rows["glass_1"].exact.correlation.value > 0.95
    assert rows["glass_1"].exact.rms > 4 * rows["mfm_1"].exact.rms
    assert rows["glass_1"].exact.within == 0
    assert rows["glass_32"].exact.rms < 1.5 * rows["mfm_1"].exact.rms


def test_glass_draws_approach_the_exact_map_at_first_order():
    model, keys = flow_map(), KeyedNoise.for_images(0, 8)
    x_t, t = keys.fold_in(3).normal(2), torch.full((8,), 0.3)
    exact = model.posterior_draws(x_t, t, num_draws=16, num_steps=8, generator=keys)
    errors = [
        float((glass_draws(model, x_t, t, num_draws=16, num_steps=steps, generator=keys) - exact).square().mean())
        for steps in (32, 64, 128)
    ]
    assert errors[2] ** 0.5 < 0.02
    assert 1.7 < (errors[0] / errors[1]) ** 0.5 < 2.3
    assert 1.7 < (errors[1] / errors[2]) ** 0.5 < 2.3


def test_one_glass_step_is_the_posterior_mean():
    model, keys = flow_map(), KeyedNoise.for_images(0, 8)
    x_t, t = keys.fold_in(3).normal(2), torch.full((8,), 0.3)
    drawn = glass_draws(model, x_t, t, num_draws=4, num_steps=1, generator=keys)
    mean = model.mixture.posterior(x_t, t).mean().unsqueeze(1).expand_as(drawn)
    torch.testing.assert_close(drawn, mean, atol=1e-5, rtol=1e-5)


def test_memoryless_rollouts_end_in_the_posterior():
    model, x_t, t = flow_map(), torch.tensor([[0.4, 0.1]]), torch.tensor([0.3])
    drawn = memoryless_draws(model, x_t, t, num_draws=4000, num_steps=100, generator=KeyedNoise.for_images(0, 1))[0]
    posterior = model.mixture.posterior(x_t, t)
    spread = float(posterior.covariance()[0].trace()) ** 0.5
    assert float((drawn.mean(0) - posterior.mean()[0]).norm()) < 4 * spread / 4000**0.5
    torch.testing.assert_close(torch.cov(drawn.T), posterior.covariance()[0], rtol=0.1, atol=0.1)


def test_values_do_not_depend_on_how_many_contexts_are_run_at_once(monkeypatch):
    settings = protocol(times=[0.3], num_contexts=6, num_draws=8, glass_steps=[2], truth_draws=8, truth_steps=3)
    whole = run(settings, flow_map())
    monkeypatch.setattr(values, "_ROWS_AT_ONCE", 16)
    for a, b in zip(whole.studies, run(settings, flow_map()).studies, strict=True):
        torch.testing.assert_close(a.truth.value, b.truth.value)
        for left, right in zip(a.figures, b.figures, strict=True):
            torch.testing.assert_close(left.values.value, right.values.value)


def test_calls_are_draws_times_steps(evaluation):
    calls = {key: row.calls for key, row in figures(evaluation, 0).items()}
    assert calls == {"mfm_1": 128, "mfm_4": 512, "glass_1": 128, "glass_32": 4096}
    assert evaluation.truth_calls == 128 * 60


def test_pearson_and_its_interval():
    x = torch.randn(103, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(103, generator=torch.Generator().manual_seed(1))
    r = pearson(x, x + noise)
    assert abs(r.value - float(torch.corrcoef(torch.stack([x, x + noise]))[0, 1])) < 1e-6
    z = torch.atanh(torch.tensor([r.value, r.lower, r.upper]))
    torch.testing.assert_close(z[1:] - z[0], torch.tensor([-0.196, 0.196]), atol=1e-4, rtol=0)
    assert pearson(x, -2 * x + 1).value == pytest.approx(-1)
    constant = pearson(x, torch.ones(103))
    assert (constant.value, constant.lower, constant.upper) == (0, -1, 1)


def test_agreement_counts_the_errors_of_either_side():
    truth, off = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.0, 0.1, 0.3, -1.0])
    found = agreement(truth + off, torch.full((4,), 0.1), truth, torch.full((4,), 0.2))
    assert found.bias == pytest.approx(-0.15)
    assert found.rms == pytest.approx((1.10 / 4) ** 0.5)
    assert (found.within, found.within_both) == (0.5, 0.75)


def test_report_table_data_and_metrics_hold_every_estimator(evaluation):
    provenance = Provenance(command="python -m jobs.evaluate protocol=values", versions={}, settings={})
    page, table, named = values_report(evaluation, provenance), values_table(evaluation), evaluation.metrics()
    assert page.count("<svg") == 3 * 2
    rows = pq.read_table(pa.BufferReader(values.values_parquet(evaluation))).to_pylist()
    assert len(rows) == 2 * (4 + 1)
    for row in rows:
        assert len(row["value"]) == len(row["exact"]) == 48
    for study in evaluation.studies:
        for row in study.figures:
            assert row.estimator.label in page
            assert any(row.estimator.label in line for line in table)
            base = f"values.t{study.time:g}.{row.estimator.key}"
            assert named[f"{base}.r"] == row.truth.correlation.value
            assert named[f"{base}.within_2se_exact"] == row.exact.within
        assert named[f"values.t{study.time:g}.sde.rms_exact"] == study.truth_exact.rms


@pytest.fixture(scope="module")
def images() -> ValuesMaterial:
    data = digits()
    torch.manual_seed(0)
    model = ResidualMLPFlowMap(space=data.space, num_classes=10, width=16, num_blocks=1)
    judge = DigitClassifier(num_classes=10, event_shape=(1, 8, 8))
    return ValuesMaterial(
        model.eval().requires_grad_(False), data.splits["heldout"], judge.eval().requires_grad_(False)
    )


SMALL = {
    "times": [0.3],
    "num_contexts": 8,
    "num_draws": 4,
    "map_steps": [1, 2],
    "glass_steps": [2],
    "truth_draws": 4,
    "truth_steps": 3,
}


def test_images_are_scored_by_each_reward_at_its_weight(images):
    plain = evaluate_values(protocol(**SMALL, weights={}), images, log=quiet)
    assert plain.rewards == ("class_mixture", "symmetry")
    assert {study.exact for study in plain.studies} == {None}
    assert {"values.t0.3.mfm_1.r", "rewards.symmetry.values.t0.3.glass_2.rms"} <= plain.metrics().keys()
    # log mean exp(w r) <= w log mean exp(r) for w <= 1 (Jensen), here of the same draws
    halved = evaluate_values(protocol(**SMALL, weights={"symmetry": 0.5}), images, log=quiet)
    value, whole = halved.of("symmetry")[0].truth.value, plain.of("symmetry")[0].truth.value
    assert bool((value <= 0.5 * whole).all())
    assert bool((value < 0.5 * whole).any())
    torch.testing.assert_close(halved.of("class_mixture")[0].truth.value, plain.of("class_mixture")[0].truth.value)
    page = values_report(plain, Provenance(command="", versions={}, settings={}))
    assert page.count("<svg") == 2 * 3


def test_other_models_and_too_many_contexts_are_refused(images):
    with pytest.raises(InputError, match=r"protocol.rewards=class_mixture: needs a classifier"):
        evaluate_values(protocol(**SMALL), replace(images, classifier=None), log=quiet)
    evaluate_values(protocol(**SMALL, rewards=["symmetry"]), replace(images, classifier=None), log=quiet)
    with pytest.raises(InputError, match=r"protocol.num_contexts=65: expected at most 64 held-out rows"):
        run(protocol(num_contexts=65), flow_map())
    space = DataSpace(kind="coordinates", event_shape=(3,))
    with pytest.raises(InputError, match=r"model: its samples are coordinates of shape \[3\], expected images"):
        run(protocol(), ResidualMLPFlowMap(space=space, width=16, num_blocks=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": []}, r"protocol.times=\[\]: expected at least one"),
        ({"times": [0.0]}, r"protocol.times=\[0.0\]"),
        ({"times": [1.0]}, r"protocol.times=\[1.0\]"),
        ({"map_steps": []}, r"protocol.map_steps=\[\]: expected at least one"),
        ({"glass_steps": [2, 2]}, r"protocol.glass_steps=\[2, 2\]: expected different ones"),
        ({"rewards": ["symetry"]}, r"protocol.rewards=.*expected"),
        ({"weights": {"brightness": 1.0}}, r"protocol.weights.brightness: expected one of class_mixture, symmetry"),
        ({"num_contexts": 3}, "protocol.num_contexts=3"),
        ({"num_draws": 1}, "protocol.num_draws=1"),
        ({"direction": [0.0, 0.0]}, "not all 0"),
        ({"noise": 0.0}, "protocol.noise=0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(changes, message):
    with pytest.raises(InputError, match=message):
        protocol(**changes)
