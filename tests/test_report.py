"""protocol=digits and its report, on a network that is not trained: right shapes, one file, nothing fetched."""

import re
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mfm_ray import metrics
from mfm_ray.config import compose
from mfm_ray.data import data_moments, digits
from mfm_ray.data.datasets import Dataset, Split
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.networks import build_network
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.protocols import build_protocol
from mfm_ray.protocols.digits import Material, evaluate_digits
from mfm_ray.protocols.quality import error_at
from mfm_ray.protocols.table import SCHEMA, evaluation_parquet
from mfm_ray.reporting import charts, page, pictures
from mfm_ray.reporting.digits import _terms, digits_report, headline
from mfm_ray.reporting.provenance import Provenance
from mfm_ray.reporting.terminal import evaluation_table

SHORT = (
    "num_targets=3",
    "num_steps=3",
    "samples_per_target=4",
    "samples_per_reward=4",
    "num_draws_gradient_free=2",
    "num_draws_resampling=2",
    "resampling_steps=2",
    "pool_size=40",
    "best_of=[1,10]",
    "mixture_samples=8",
    "mixture_draws=[1,2]",
    "mixture_steps=2",
    "curve_steps=[2]",
    "curve_dps_steps=[2]",
    "curve_draws_resampling=[1]",
    "curve_ode_steps=[2]",
    "curve_refine_steps=[1]",
    "official_rewards=[masked]",
    "official_samples=4",
    "official_draws=[1]",
    "law_rewards=[symmetry]",
    "law_steps=2",
    "law_moves=1",
    "novelty_samples=16",
    "posterior_times=[0.5]",
    "posterior_contexts=2",
    "posterior_draws=16",
    "posterior_ode_steps=2",
)
HISTORY = [
    {"step": s, "loss": 1 / s, "squared_error.diagonal": 2 / s, "squared_error.semigroup": 1 / s} for s in (1, 2, 3)
]


def settings(*words, protocol="digits"):
    return compose("evaluate", [f"protocol={protocol}", *(f"protocol.{word}" for word in words)]).values["protocol"]


def random_images(side, count=60):
    """A data set of that name whose images are noise: what is bundled must not be assumed."""
    images = torch.rand(2, count, 1, side, side, generator=torch.Generator().manual_seed(0))
    train, heldout = (Split(half, torch.arange(count) % 10) for half in images)
    splits = {"train": train, "heldout": heldout}
    return Dataset("mnist", DataSpace("image", (1, side, side)), splits, tuple("0123456789"))


@pytest.fixture(scope="module")
def evaluation():
    return evaluate(digits(), *SHORT)


def evaluate(data, *words, protocol="digits"):
    train, heldout = data.splits["train"], data.splits["heldout"]
    moments = data_moments(data.space.to_model_space(train.data.flatten(1).double())).preconditioning()
    torch.manual_seed(0)
    network = {"name": "residual_mlp", "width": 16, "num_blocks": 1}
    flow_map = build_network(network, space=data.space, num_classes=10, moments=moments)
    judge = DigitClassifier(num_classes=10, event_shape=data.space.event_shape)
    material = Material(flow_map.eval().requires_grad_(False), judge.eval().requires_grad_(False), train, heldout)
    lines = []
    done = evaluate_digits(build_protocol(settings(*words, protocol=protocol)), material, seed=0, log=lines.append)
    assert any("left" in line for line in lines)
    return done


@pytest.fixture(scope="module")
def report(evaluation):
    return report_of(evaluation)


def report_of(evaluation):
    provenance = Provenance(
        command="python -m jobs.demo name='<b>'",
        versions={"python": "3.11", "ray": None},
        settings={"seed": 0},
        facts={"training": "on 2 workers"},
        history=HISTORY,
        train_seconds=61.0,
        total_seconds=99.0,
    )
    return digits_report(evaluation, provenance)


def test_the_chart_of_terms_shows_squared_errors_alone():
    """Other metrics of a line end in the terms' names too."""
    history = [line | {"flops_per_second.diagonal": 1e9, "flops_per_second.semigroup": 1e9} for line in HISTORY]
    assert list(_terms(history)) == ["squared_error.diagonal", "squared_error.semigroup"]


def test_the_metrics_have_the_promised_names(evaluation):
    figures = evaluation.metrics()
    promised = ["unsteered_reward", "mfm_g_reward", "mfm_gf_reward", "best_of_1_reward", "best_of_10_reward"]
    promised += ["mfm_g_nfe", "best_of_10_nfe", "nfe_ratio", "mfm_g_wins", "classifier_confidence"]
    names = ["symmetry", "brightness", "class_mixture", "combination"]
    wanted = [*promised, *(f"rewards.{name}.{key}" for name in names for key in promised)]
    assert set(wanted) <= set(figures)
    assert {"posterior_sw2", "posterior_sw2_floor", "posterior_sw2.t0.5", "posterior_sw2_floor.t0.5"} <= set(figures)
    assert figures["mfm_g_nfe"] == 3 + 4 * 3
    assert figures["best_of_10_nfe"] == 3 * 10 + 10
    assert figures["nfe_ratio"] == pytest.approx(40 / 15)
    assert figures["unsteered_reward"] == figures["best_of_1_reward"]
    assert 0 <= figures["mfm_g_wins"] <= 3


def test_targets_are_held_out_digits_of_different_classes(evaluation):
    targets = evaluation.study("masked").problem.targets
    assert len({target.title for target in targets}) == 3
    observed = targets[0].pictures["observed"]
    assert bool((observed[:, 4:] == 0).all())
    assert not torch.equal(observed[:, :4], targets[0].pictures["truth"][:, :4])  # the noise is really there


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for key, value in attrs if key in ("src", "href", "xlink:href") and value]
        self.open.append(tag)


def test_the_report_is_one_file_that_asks_nobody_for_anything(report):
    found = Links()
    found.feed(report)
    assert len([source for source in found.sources if source.startswith("data:image/png")]) > 100
    assert all(source.startswith(("data:", "#")) for source in found.sources)
    assert not re.search(r"url\((?!#)", report)
    assert "<script" not in report
    assert "#0d0e0f" not in report  # every stand-in colour became a variable


def test_the_report_tells_what_was_measured_and_how_to_make_it_again(evaluation, report):
    assert "&lt;b&gt;" in report
    assert "python -m jobs.demo" in report
    assert "1:01 min" in report
    for study in evaluation.studies:
        assert study.problem.title in report
        for score in study.scores:
            assert page.number(score.reward) in report
    # training, posterior, two a reward and one over draws, and curves over calls: of distance where there is a law
    assert report.count("<svg") == 2 + 1 + (2 * 5 + 1) + (5 + 3)
    assert "1,797 real digits of 8 × 8 pixels" in report
    for heading in ("The official recipe, and ours at equal quality", "Copies, or new digits?"):
        assert heading in report


def test_distances_stand_beside_rewards_with_their_floors(evaluation):
    figures = evaluation.metrics()
    for key in ("mfm_g", "mfm_gf", "dps", "mfm_g_k2", "refine_1_best_of_3", "ode_3_best_of_1"):
        assert figures[f"{key}_reward_w1"] >= 0
        assert f"rewards.symmetry.{key}_mmd_law" in figures or "best_of" in key  # few of a pool count
    assert figures["mfm_g_frechet_data"] > 0
    assert figures["mfm_g_frechet_data_floor"] > 0
    assert "mfm_g_frechet_law" not in figures  # no chains where every image has a reward of its own
    assert 0 <= figures["rewards.class_mixture.proportions_mfm_g_2_k2_pmf"] <= 2**0.5
    assert figures["rewards.class_mixture.mfm_g_pmf_floor"] > 0
    assert figures["official_1_nfe"] == 250 * 5
    assert figures["official_1_plain_nfe"] == 250 * 5
    assert figures["dps_k2_nfe"] == 4 * 2
    assert figures["refine_1_best_of_10_nfe"] == 2 * 10
    assert {"one_step_vendi", "steered_nearest_ratio"} <= set(figures)


def test_the_curves_are_in_the_parquet_file(evaluation):
    rows = pq.read_table(pa.BufferReader(evaluation_parquet(evaluation, HISTORY))).to_pylist()
    law = [row for row in rows if row["section"] == "law" and row["reward"] == "symmetry"]
    assert {"mean_reward", "frechet_data", "frechet_law", "mmd_law", "mmd_law_floor"} <= {
        row["quantity"] for row in law
    }
    points = {row["method"]: (row["x"], row["value"]) for row in law if row["quantity"] == "mean_reward"}
    assert points["mfm_g_k2"][0] == 2 + 4 * 2
    assert len([row for row in law if row["quantity"] == "chain_reward"]) == 40


def test_no_two_methods_of_a_study_share_a_key(evaluation):
    for study in evaluation.studies:
        keys = [score.method.key for score in study.all_scores]
        assert len(set(keys)) == len(keys)


def test_the_mixture_is_the_paper_s_and_its_floor_that_of_exact_draws(evaluation):
    study = evaluation.study("class_mixture")
    assert study.problem.wanted.tolist() == pytest.approx([0, 0.1, 0, 0.1, 0, 0.2, 0, 0.2, 0, 0.4])
    assert len(study["proportions_mfm_gf_2_k2"].samples) == 8
    floor = evaluation.judgements["class_mixture"].floor(study["proportions_mfm_gf_2_k2"])
    assert floor.pmf == pytest.approx(metrics.pmf_floor(study.problem.wanted, 8))
    # at as few samples as another method has: the mean over groups
    groups = study["proportions_mfm_gf_2_k2"].classes.split(4)
    apart = [(torch.bincount(part, minlength=10) / 4 - study.problem.wanted).norm().item() for part in groups]
    judgement = evaluation.judgements["class_mixture"]
    assert error_at(study, judgement, "proportions_mfm_gf_2_k2", 4) == pytest.approx(sum(apart) / 2)
    assert error_at(study, judgement, "proportions_mfm_gf_2_k2", 9) is None


def test_mnist_is_the_same_protocol_on_larger_images_and_counts_of_its_own():
    few = [word for word in SHORT if not word.startswith(("num_targets", "posterior_contexts", "law_", "official_"))]
    done = evaluate(
        random_images(28),
        "num_targets=2",
        "posterior_contexts=1",
        "rewards=[masked,class_mixture]",
        *few,
        protocol="mnist",
    )
    assert done.protocol.name == "mnist"
    page_of_it = report_of(done)
    assert "120 real digits of 28 × 28 pixels" in page_of_it
    assert "protocol mnist" in page_of_it
    assert "The official recipe" not in page_of_it  # nothing of it in these settings
    assert "mixture_pmf" not in done.metrics()
    assert done.metrics()["rewards.class_mixture.proportions_mfm_gf_2_k2_pmf"] >= 0
    # half a picture of 28 x 28 pixels: chi^2 of 392 degrees
    assert done.study("masked").problem.exact_reward == (-196.0, 14.0)


def test_all_data_behind_the_report_is_in_one_parquet_file(evaluation):
    table = pq.read_table(pa.BufferReader(evaluation_parquet(evaluation, HISTORY)))
    assert table.schema.names == SCHEMA.names
    rows = table.to_pylist()
    rewards = [row for row in rows if row["quantity"] == "reward" and row["method"] == "mfm_g"]
    assert len([row for row in rewards if row["reward"] == "masked"]) == 3
    mean = sum(row["value"] for row in rewards if row["reward"] == "masked") / 3
    assert mean == pytest.approx(evaluation.metrics()["mfm_g_reward"])
    assert len([row for row in rows if row["quantity"] == "draw"]) == 5 * 16
    assert all(len(row["image"]) == 64 for row in rows if row["image"] is not None)


def test_the_terminal_shows_reward_calls_and_confidence_in_columns(evaluation):
    lines = evaluation_table(evaluation)
    assert lines[0].split() == ["reward", "method", "mean", "reward", "calls", "judge", "FD,", "data"]
    assert sum("MFM-G, 1 draw" in line for line in lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert "of 3 half-hidden digits" in headline(evaluation)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("pool_size=5", r"protocol.best_of=\[1, 10, 100, 1000\]: expected numbers of at most protocol.pool_size=5"),
        ("samples_per_target=6", "protocol.samples_per_target=6: expected a multiple of 4"),
        ("num_draws=[4]", r"protocol.num_draws=\[4\]: expected different numbers with 1 among them"),
        ("rewards=[symmetry]", "expected masked among them"),
        ("rewards=[masked,symetry]", "did you mean|expected one of"),
        ("posterior_times=[1.5]", "protocol.posterior_times"),
        ("mixture_samples=6", "protocol.mixture_samples=6: expected a multiple of 4"),
        ("law_rewards=[masked]", "masked has a target for each image"),
        ("curve_step=[1]", "curve_step"),
    ],
)
def test_settings_that_cannot_work_are_named(word, message):
    with pytest.raises(InputError, match=message):
        build_protocol(settings(word))


def test_a_model_of_other_images_is_refused(evaluation):
    data = digits()
    other = build_network(
        {"name": "residual_mlp", "width": 8, "num_blocks": 1}, space=type(data.space)("coordinates", (2,))
    )
    judge = DigitClassifier(num_classes=10, event_shape=(1, 8, 8))
    material = Material(other, judge, data.splits["train"], data.splits["heldout"])
    with pytest.raises(InputError, match="model: makes coordinates of shape"):
        evaluate_digits(evaluation.protocol, material, seed=0, log=lambda line: None)


def test_pictures_keep_every_pixel():
    image = torch.tensor([[[0.0, 1.0], [0.5, 2.0]]])
    array = pictures.pixels(image, visible=torch.tensor([[[1.0, 1.0], [0.0, 1.0]]]))
    assert array[:, :, 0].tolist() == [[0, 255], [128, 255]]
    assert array[:, :, 3].tolist() == [[255, 255], [0, 255]]
    assert pictures.png(array).startswith(b"\x89PNG")
    sheet = pictures.grid(image.expand(3, 1, 2, 2), columns=2, gap=1, zoom=3)
    assert sheet.shape == (2 * 6 + 1, 2 * 6 + 1, 4)
    assert sheet[:6, :6, 3].min() == 255
    assert sheet[7:, 7:, 3].max() == 0  # no fourth image
    with pytest.raises(ValueError, match="expected"):
        pictures.pixels(torch.zeros(2, 4, 4))


def test_names_in_a_chart_do_not_cover_each_other():
    assert charts._overlap((0, 0, 2, 2), (1, 1, 3, 3)) == 1
    assert charts._overlap((0, 0, 1, 1), (2, 0, 3, 1)) == 0
    dots = [charts.Dot(100.0, -10.0 - place / 10, f"method {place}", "mfm_g") for place in range(3)]
    svg = charts.reward_against_calls(dots, title="A & B", reference=-9.0)
    assert svg.startswith("<svg")
    assert "A &amp; B" in svg


@pytest.mark.parametrize(
    ("value", "shown"), [(-12.34, "−12.3"), (51000.0, "51,000"), (0.00004, "0.000"), (0.1234, "0.123"), (-0.5, "−0.5")]
)
def test_numbers_are_short(value, shown):
    assert page.number(value) == shown
