"""The protocols of ImageNet's scale on the exact flow map of a mixture, where figures are about their floors."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mfm_ray.config import load_config
from mfm_ray.errors import InputError
from mfm_ray.metrics import RawFeatures
from mfm_ray.networks.gaussian import GaussianMixtureFlowMap, LinearObservation, isotropic_mixture
from mfm_ray.noise import KeyedNoise
from mfm_ray.protocols import build_protocol
from mfm_ray.protocols.imagenet import CleanRows, LargeMaterial, noisy_states, states_of, uniform_labels
from mfm_ray.protocols.imagenet_fid import evaluate_imagenet_fid, imagenet_fid_parquet
from mfm_ray.protocols.imagenet_finetuning import (
    evaluate_imagenet_finetuning,
    imagenet_finetuning_parquet,
    read_tuning_run,
)
from mfm_ray.protocols.imagenet_posterior import evaluate_imagenet_posterior, imagenet_posterior_parquet
from mfm_ray.protocols.imagenet_steering import arms, evaluate_imagenet_steering, imagenet_steering_parquet
from mfm_ray.protocols.imagenet_values import evaluate_imagenet_values
from mfm_ray.protocols.pieces import plan
from mfm_ray.protocols.values import values_parquet
from mfm_ray.reporting import imagenet as reports
from mfm_ray.reporting.provenance import Provenance
from mfm_ray.reporting.values import values_report, values_table

MEANS = torch.tensor([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]])
MIXTURE = isotropic_mixture(MEANS, variance=0.5)
REWARD = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=1.0)
PROVENANCE = Provenance(
    command="x", versions={}, settings={}, facts={}, history=[], train_seconds=None, total_seconds=1.0
)


def protocol(name, **changes):
    return build_protocol({**load_config("evaluate", [f"protocol={name}"]).protocol, **changes})


def sets(name, **changes):
    small = {"features": "raw", "inception": None, "kid_subsets": 10, "kid_subset_size": 300, "batch_size": 1000}
    return protocol(name, **{**small, "piece_size": 400, **changes})


def rows(count, seed=0):
    return CleanRows(MIXTURE.sample(count, generator=torch.Generator().manual_seed(seed)), None)


@pytest.fixture(scope="module")
def material():
    flow_map = GaussianMixtureFlowMap(MIXTURE, num_inner_steps=4)
    return LargeMaterial(flow_map, RawFeatures(), rows(900), rewards={"seen": REWARD})


def quiet(line):
    pass


def parquet(content):
    return pq.read_table(pa.BufferReader(content)).to_pylist()


@pytest.fixture(scope="module")
def posterior(material):
    settings = sets("imagenet_posterior", times=[0.0, 0.2, 0.6], num_contexts=900, map_steps=[1, 2], glass_steps=[1])
    return evaluate_imagenet_posterior(settings, material, log=quiet)


def test_posterior_draws_of_the_exact_map_are_data_again(posterior):
    """Two independent sets are a floor apart in the mean; three floors hold with room at this size."""
    for found in posterior.measured:
        if found.key.startswith("mfm"):
            assert found.frechet < 3 * posterior.floors[found.time] + 0.01, (found.key, found.time)
            assert abs(found.kid.value) < 5 * found.kid.half_width + 0.2
            assert min(found.precision, found.recall) > 0.93


def test_posterior_means_in_the_place_of_draws_are_far(posterior):
    blurred = {found.time: found for found in posterior.measured if found.key == "glass_1"}
    exact = {found.time: found for found in posterior.measured if found.key == "mfm_1"}
    assert set(blurred) == {0.2, 0.6}  # at 0 GLASS has nothing to go by
    for t, floor in ((0.2, 0.3), (0.6, 0.03)):
        assert blurred[t].frechet > max(floor, 5 * exact[t].frechet), (blurred[t].frechet, exact[t].frechet)
    assert blurred[0.2].recall < exact[0.2].recall - 0.1


def test_rollouts_are_a_reference_as_well(material):
    settings = sets(
        "imagenet_posterior",
        times=[0.3],
        num_contexts=600,
        map_steps=[1],
        against="rollouts",
        rollout_steps=40,
        piece_size=600,
    )
    found = evaluate_imagenet_posterior(settings, material, log=quiet)
    assert found.measured[0].frechet < 3 * found.floors[0.3] + 0.02
    assert found.measured[0].precision > 0.9


def test_samples_of_the_exact_map_are_data_at_any_number_of_calls(material):
    settings = sets("imagenet_fid", nfe=[1, 2, 4], num_samples=900)
    evaluation = evaluate_imagenet_fid(settings, material, log=quiet)
    assert [found.nfe for found in evaluation.measured] == [1, 2, 4]
    for found in evaluation.measured:
        assert found.frechet < 3 * evaluation.floor + 0.01
        assert min(found.precision, found.recall) > 0.93
    narrow = GaussianMixtureFlowMap(isotropic_mixture(MEANS, variance=0.02), num_inner_steps=8)
    other = evaluate_imagenet_fid(replace(settings, nfe=[1]), replace(material, flow_map=narrow), log=quiet)
    assert other.measured[0].recall < 0.3 < 0.9 < other.measured[0].precision
    assert other.metrics()["fid.nfe_1.fid"] > 5 * evaluation.metrics()["fid.nfe_1.fid"]


def test_pieces_and_batches_change_no_sample(material):
    settings = sets("imagenet_fid", nfe=[2], num_samples=90, piece_size=90)
    whole = evaluate_imagenet_fid(settings, material, log=quiet)
    cut = evaluate_imagenet_fid(replace(settings, piece_size=41, batch_size=16), material, log=quiet)
    assert cut.measured[0].frechet == pytest.approx(whole.measured[0].frechet, rel=1e-5)
    assert cut.measured[0].precision == whole.measured[0].precision


def test_pieces_cover_a_part_once():
    pieces = plan("a", 10, 4)
    assert [(piece.first, piece.count, piece.of) for piece in pieces] == [(0, 4, 3), (4, 4, 3), (8, 2, 3)]


@pytest.fixture(scope="module")
def values(material):
    settings = protocol(
        "imagenet_values",
        rewards=["seen"],
        label=None,
        cfg_scale=None,
        times=[0.2, 0.5],
        num_contexts=32,
        num_draws=96,
        map_steps=[1, 4],
        glass_steps=[8],
        truth_draws=96,
        truth_steps=40,
        batch_size=4096,
        piece_size=20,
    )
    return settings, evaluate_imagenet_values(settings, material, log=quiet)


def test_values_of_the_exact_map_follow_the_closed_form(material, values):
    _, evaluation = values
    for number, study in enumerate(evaluation.studies):
        keys = KeyedNoise.for_images(0, 32).fold_in(number)
        x_t = noisy_states(material.rows.states[:32], study.time, keys)
        exact = REWARD.value(MIXTURE, x_t, torch.full((32,), study.time))
        cheap = {row.estimator.key: row for row in study.figures}["mfm_1"]
        assert cheap.calls == 96
        assert float((cheap.values.value - exact).abs().max()) < 6 * float(cheap.values.standard_error.max())
        assert cheap.truth.correlation.value > min(0.98, study.ceiling - 0.05)
        assert cheap.truth.ranks.value > 0.85
        assert cheap.truth.within_both > 0.8


def test_draws_in_parts_are_the_same_draws(material, values):
    small = replace(values[0], times=[0.4], num_contexts=6, num_draws=9, truth_draws=9, truth_steps=3, glass_steps=[2])
    whole = evaluate_imagenet_values(small, material, log=quiet)
    cut = evaluate_imagenet_values(replace(small, batch_size=4, piece_size=4), material, log=quiet)
    for ours, theirs in zip(cut.studies, whole.studies, strict=True):
        torch.testing.assert_close(ours.truth.value, theirs.truth.value, rtol=1e-4, atol=1e-4)
        for a, b in zip(ours.figures, theirs.figures, strict=True):
            torch.testing.assert_close(a.values.value, b.values.value, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def steering(material):
    other = LinearObservation(torch.tensor([0.0, 1.0]), observation=3.0, noise=1.0)
    settings = protocol(
        "imagenet_steering",
        rewards=["seen", "held"],
        label=None,
        cfg_scale=None,
        num_images=40,
        num_steps=8,
        gradient_draws=[1, 4],
        gradient_free_draws=[1, 4],
        multipliers=[1.0, 5.0],
        search_particles=[2],
        best_of=[1, 8],
        pool_size=320,
        batch_size=512,
        piece_size=160,
    )
    flow_map = GaussianMixtureFlowMap(MIXTURE, num_inner_steps=2)
    return evaluate_imagenet_steering(
        settings, LargeMaterial(flow_map, rewards={"seen": REWARD, "held": other}), log=quiet
    )


def test_calls_are_the_papers(steering):
    """method.md 7.6: K + 4NK, K + 2NK, 4K, 2MNK and N(K + 1)."""
    nfe = {found.key: found.nfe for found in steering.of("seen")}
    steps = 8
    assert nfe["mfm_g_n4_l5"] == steps + 4 * 4 * steps
    assert nfe["mfm_gf_n4_l1"] == steps + 2 * 4 * steps
    assert nfe["dps_l1"] == 4 * steps
    assert nfe["search_m2"] == 2 * 2 * 1 * steps
    assert nfe["best_of_8"] == 8 * (steps + 1)


def test_steering_raises_its_own_reward_and_says_what_became_of_the_other(steering):
    means = {found.key: found.means for found in steering.of("seen")}
    unsteered = steering.unsteered.means["seen"]
    for key in ("mfm_g_n4_l1", "mfm_gf_n4_l5", "search_m2", "best_of_8"):
        assert means[key]["seen"].value > unsteered.value + unsteered.half_width, key
    assert means["best_of_8"]["seen"].value > means["best_of_1"]["seen"].value
    assert means["best_of_8"]["seen"].count == 40
    assert steering.metrics()["rewards.seen.best_of_8.held_out.held"] == means["best_of_8"]["held"].value


def test_what_a_factor_does_not_change_is_drawn_once(steering):
    """One draw of MFM-GF is unsteered; a rescaled gradient of one draw has only its direction."""
    found = {(arm.reward, arm.key): arm for arm in arms(steering.protocol, ("seen", "held"))}
    assert found["seen", "mfm_g_n1_l5"].part == found["seen", "mfm_g_n1_l1"].part
    assert found["seen", "dps_l5"].part == found["seen", "dps_l1"].part
    assert found["seen", "mfm_g_n4_l5"].part != found["seen", "mfm_g_n4_l1"].part
    own = arms(replace(steering.protocol, preset=None), ("seen",))
    parts = {arm.key: arm.part for arm in own}
    assert parts["dps_l5"] != parts["dps_l1"] and parts["mfm_gf_n1_l5"] == parts["mfm_gf_n1_l1"]


def tuning_run(folder, *, multiplier=10.0, every=True):
    folder.mkdir()
    config = {"reward": {"name": "hpsv2"}, "reward_multiplier": multiplier, "evaluate_samples": 64}
    (folder / "run.json").write_text(json.dumps({"job": "finetune", "config": config}))
    lines = [{"step": 0, "loss": 1.0}]
    for step in (0, 500, 1000, 500) if every else ():  # the last one after a resume
        figures = {"step": step, "reward": step / 1000 + multiplier, "reward_error": 0.1, "diversity": 3.0}
        figures |= {"judge.pickscore": 20 - step / 500, "judge.pickscore_error": 0.5}
        lines.append({"step": step, **{f"evaluation.{name}": value for name, value in figures.items()}})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def test_curves_of_fine_tuning_runs(tmp_path):
    places = [tuning_run(tmp_path / name, multiplier=value) for name, value in (("a", 10.0), ("b", 25.0))]
    evaluation = evaluate_imagenet_finetuning(protocol("imagenet_finetuning", runs=places), None)
    assert [run.title for run in evaluation.runs] == ["a, λ = 10", "b, λ = 25"]
    assert evaluation.runs[0].names == ["reward", "judge.pickscore"]
    assert [step for step, _ in evaluation.runs[0].curve("reward")] == [0, 500, 1000]
    figures = evaluation.metrics()
    assert figures["runs.1.reward.last"] == 26.0 and figures["runs.0.judge.pickscore.last"] == 18.0
    assert figures["runs.0.reward.last_half_width"] == pytest.approx(0.196)
    assert len(parquet(imagenet_finetuning_parquet(evaluation))) == 12
    page = reports.tuning_report(evaluation, PROVENANCE)
    assert "Held out: pickscore" in page and "Tuned reward" in page
    assert any("judge.pickscore" in line for line in reports.tuning_table(evaluation))


def test_what_is_no_tuning_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="metrics.jsonl is missing"):
        read_tuning_run(str(tmp_path))
    with pytest.raises(InputError, match="holds no evaluations"):
        read_tuning_run(tuning_run(tmp_path / "c", every=False))
    place = tuning_run(tmp_path / "d")
    (tmp_path / "d" / "run.json").write_text(json.dumps({"job": "train", "config": {}}))
    with pytest.raises(InputError, match="expected a run of jobs.finetune"):
        read_tuning_run(place)
    (tmp_path / "e").mkdir()
    place = tuning_run(tmp_path / "f")
    (tmp_path / "f" / "metrics.jsonl").write_text("{")
    with pytest.raises(InputError, match="line 1 of metrics.jsonl is not JSON"):
        read_tuning_run(place)


def test_reports_and_tables(material, posterior, values, steering):
    fid = evaluate_imagenet_fid(sets("imagenet_fid", nfe=[1, 2], num_samples=60), material, log=quiet)
    shown = [
        (reports.fid_report, reports.fid_table, imagenet_fid_parquet, fid),
        (reports.posterior_report, reports.posterior_table, imagenet_posterior_parquet, posterior),
        (reports.steering_report, reports.steering_table, imagenet_steering_parquet, steering),
    ]
    for report, table, write, evaluation in shown:
        page = report(evaluation, PROVENANCE)
        assert page.count("<svg") >= 2 and "<table>" in page
        assert len(table(evaluation)) > 3
        found = parquet(write(evaluation))
        assert all(row["value"] == row["value"] for row in found) and len(found) >= 8
    assert "seen" in values_report(values[1], PROVENANCE) and len(values_table(values[1])) > 5
    assert {row["rank_r"] for row in parquet(values_parquet(values[1]))} > {None}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("imagenet_fid", {"inception": "x", "features": "raw"}, "protocol.inception=x"),
        ("imagenet_fid", {}, "protocol.inception=null"),
        ("imagenet_fid", {"features": "raw", "nfe": [1, 1]}, "protocol.nfe"),
        ("imagenet_posterior", {"features": "raw", "times": [0.0], "against": "rollouts"}, "no rollout starts at 0"),
        ("imagenet_posterior", {"features": "raw", "map_steps": []}, "protocol.map_steps"),
        ("imagenet_values", {"rewards": []}, "protocol.rewards"),
        ("imagenet_values", {"times": [0.0]}, "protocol.times"),
        ("imagenet_steering", {"pool_size": 1000}, "protocol.pool_size=1000"),
        ("imagenet_steering", {"multipliers": []}, "protocol.multipliers"),
        ("imagenet_finetuning", {}, "protocol.runs"),
        ("imagenet_steering", {"searchs": 1}, "did you mean protocol.search"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, changes, message):
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        protocol(name, **changes)


def test_a_model_that_does_not_fit_is_refused(material):
    with pytest.raises(InputError, match="protocol.features=classifier: the model's samples are coordinates"):
        evaluate_imagenet_fid(sets("imagenet_fid", features="classifier"), material, log=quiet)
    with pytest.raises(InputError, match="protocol.num_contexts=50000: expected at most the 900"):
        evaluate_imagenet_posterior(sets("imagenet_posterior"), material, log=quiet)
    labelled = protocol("imagenet_values", rewards=["seen"], num_contexts=8)
    with pytest.raises(InputError, match="protocol.label=281"):
        evaluate_imagenet_values(labelled, material, log=quiet)
    with pytest.raises(InputError, match="protocol.label=281: expected null"):
        evaluate_imagenet_steering(protocol("imagenet_steering", rewards=["seen"]), material, log=quiet)


def test_labels_are_uniform_and_of_the_image_alone(material):
    class Labelled:
        num_classes = 10

    device = torch.device("cpu")
    labels = uniform_labels(Labelled(), 0, 0, 5000, device=device)
    assert torch.equal(labels[700:720], uniform_labels(Labelled(), 0, 700, 20, device=device))
    counts = torch.bincount(labels, minlength=10).double()
    assert float((counts - 500).square().sum() / 500) < 27.9  # chi-square, 9 degrees of freedom, 0.999
    assert uniform_labels(material.flow_map, 0, 0, 5, device=device) is None


def test_states_of_latents_are_scaled():
    from mfm_ray.data_space import DataSpace

    latents = torch.ones(2, 4, 3, 3)
    assert torch.equal(states_of(latents, DataSpace("latent", (4, 3, 3), 0.5)), latents * 0.5)
