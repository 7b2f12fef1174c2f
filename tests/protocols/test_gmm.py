from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mfm_ray.config import load_config
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.networks.gaussian import GaussianMixtureFlowMap, LinearObservation, isotropic_mixture
from mfm_ray.networks.residual_mlp import ResidualMLPFlowMap
from mfm_ray.protocols import build_protocol
from mfm_ray.protocols.coverage import value_coverage
from mfm_ray.protocols.gmm import GmmEvaluation, GmmProtocol, evaluate_gmm, gmm_parquet
from mfm_ray.reporting.gmm import gmm_report, gmm_table
from mfm_ray.reporting.provenance import Provenance


def protocol(**changes: object) -> GmmProtocol:
    """The packaged settings, small."""
    settings = load_config("evaluate", ["protocol=gmm"]).protocol
    small = {
        "num_samples": 256,
        "num_seeds": 2,
        "floor_pairs": 4,
        "num_steps": 8,
        "draws_gradient": [1, 2],
        "draws_gradient_free": [8],
        "draws_resampling": [1, 64],
        "best_of": [50],
        "smc_particles": 64,
        "smc_draws": 2,
        "paper_draws": 0,
        "coverage_draws": [4, 32],
        "coverage_times": [0.3, 0.7],
        "coverage_states": 64,
        "noise": 0.5,
    }
    return build_protocol({**settings, **small, **changes})


def flow_map() -> GaussianMixtureFlowMap:
    means = torch.tensor([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]])
    return GaussianMixtureFlowMap(isotropic_mixture(means, variance=0.5), num_inner_steps=4)


@pytest.fixture(scope="module")
def evaluation() -> GmmEvaluation:
    return evaluate_gmm(protocol(), flow_map(), log=lambda line: None)


def test_a_good_method_is_near_the_floor_and_none_or_too_much_steering_is_not(evaluation):
    rows = {row.method.key: row for row in evaluation.figures}
    assert rows["resampling_64_k5_sde"].over_floor.ratio < 2
    assert rows["resampling_1_k5_sde"].over_floor.ratio > 4
    assert evaluation.follows_the_law(rows["resampling_64_k5_sde"])
    assert not evaluation.follows_the_law(rows["resampling_1_k5_sde"])
    over_optimised = rows["best_of_50"]
    assert over_optimised.residual_std < 0.6 * evaluation.exact_residual_std
    assert not evaluation.follows_the_law(over_optimised)


def test_calls_are_those_of_the_methods(evaluation):
    nfe = {row.method.key: row.nfe for row in evaluation.figures}
    assert nfe["mfm_g_2_ode"] == 8 + 4 * 2 * 8
    assert nfe["mfm_gf_8_sde"] == 8 + 2 * 8 * 8
    assert nfe["resampling_64_k5_ode"] == 2 * 64 * 5
    assert nfe["dps_sde"] == 32
    assert nfe["best_of_50"] == 100


def test_the_exact_law_is_described_exactly(evaluation):
    reward = protocol().reward()
    tilted = reward.tilt(flow_map().mixture)
    along = tilted.covariance() @ reward.direction @ reward.direction
    assert abs(evaluation.exact_residual_std / float(along) ** 0.5 - 1) < 0.02
    assert evaluation.figures[0].method.key in " ".join(evaluation.metrics())


def test_report_table_and_data_hold_every_method(evaluation):
    provenance = Provenance(command="python -m jobs.evaluate protocol=gmm", versions={}, settings={})
    page, table = gmm_report(evaluation, provenance), "\n".join(gmm_table(evaluation))
    rows = pq.read_table(pa.BufferReader(gmm_parquet(evaluation))).to_pylist()
    methods = [row["method"] for row in rows if row["part"] == "method"]
    assert methods == [row.method.key for row in evaluation.figures]
    assert [row["covered"] for row in rows if row["part"] == "coverage"] == [
        cell.covered for cell in evaluation.coverage
    ]
    assert "Can the value" in page
    assert "value within 2 standard errors" in table
    for row in evaluation.figures:
        assert row.method.label in page
        assert row.method.label in table
    assert page.count("<svg") >= 6


def test_the_exact_map_needs_no_model():
    alone = protocol(
        exact=True,
        dynamics=["sde"],
        num_seeds=1,
        best_of=[],
        smc_particles=0,
        draws_resampling=[16],
        draws_gradient=[1],
    )
    assert not alone.needs_model
    assert evaluate_gmm(alone, None, log=lambda line: None).coverage
    with pytest.raises(InputError, match="model: none given"):
        evaluate_gmm(protocol(), None, log=lambda line: None)


def test_the_standard_error_covers_the_closed_form_when_enough_draws_count():
    """A soft likelihood: 2 standard errors hold 95 percent, give or take 4 deviations of that share."""
    soft = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=3.0)
    cells = value_coverage(flow_map(), flow_map().mixture, soft, draws=[128], times=[0.2, 0.6], states=1024, seed=0)
    for cell in cells:
        assert abs(cell.covered - 0.954) < 4 * (0.954 * 0.046 / 1024) ** 0.5 + 0.01
        assert cell.single == 0
        assert abs(cell.error / cell.standard_error - 1) < 0.15


def test_where_one_draw_carries_the_weight_the_error_is_too_small_and_the_value_too_low():
    stiff = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=0.05)
    (cell,) = value_coverage(flow_map(), flow_map().mixture, stiff, draws=[4], times=[0.2], states=512, seed=0)
    assert cell.single > 0.5
    assert cell.covered < 0.8
    assert cell.above > 5 * cell.below
    assert cell.error > 2 * cell.standard_error


def test_another_likelihood_moves_the_law():
    other = evaluate_gmm(
        protocol(direction=[0.5, 1.0], observation=2.0, dynamics=["sde"], num_seeds=1, best_of=[], smc_particles=0),
        flow_map(),
        log=lambda line: None,
    )
    row = next(row for row in other.figures if row.method.key == "resampling_64_k5_sde")
    assert row.over_floor.ratio < 2.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": [1.0]}, r"protocol.direction=\[1.0\]: expected 2 numbers"),
        ({"direction": [0.0, 0.0]}, "not all 0"),
        ({"dynamics": []}, r"protocol.dynamics=\[\]: expected ode, sde or both"),
        ({"noise": 0.0}, "protocol.noise=0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(changes, message):
    with pytest.raises(InputError, match=message):
        protocol(**changes)


def test_a_model_of_images_is_refused():
    images = ResidualMLPFlowMap(space=DataSpace(kind="image", event_shape=(1, 8, 8)), width=16, num_blocks=1)
    with pytest.raises(InputError, match=r"model: its samples are of shape \[1, 8, 8\], expected \[2\]"):
        evaluate_gmm(replace(protocol(), num_samples=16), images, log=lambda line: None)
