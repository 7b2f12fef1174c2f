"""The reports of protocol=finetune_gmm and protocol=finetune_digits: what tuning reaches, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mfm_ray.protocols.finetune_digits import FinetuneDigitsEvaluation, RewardStudy, Sampled, TuningRun
from mfm_ray.protocols.finetune_gmm import TITLES, FinetuneGmmEvaluation, TunedFigures, Tuning
from mfm_ray.reporting import charts, page
from mfm_ray.reporting.page import number, text
from mfm_ray.reporting.provenance import Provenance, making_section
from mfm_ray.reporting.terminal import aligned

_LIMIT = 5.5
_FAMILIES = ("mfm_g", "mfm_gf", "resampling", "best_of_n", "muted", "unsteered")


def finetune_gmm_report(evaluation: FinetuneGmmEvaluation, provenance: Provenance) -> str:
    """The whole page."""
    return page.page(
        "Fine-tuning a mixture whose answer is known",
        [
            *_gmm_opening(evaluation),
            *_gmm_fixed_points(evaluation),
            *_gmm_tunings(evaluation),
            *_gmm_clouds(evaluation),
            *making_section(provenance, evaluation.seconds),
        ],
    )


def finetune_gmm_table(evaluation: FinetuneGmmEvaluation) -> list[str]:
    """Lines for the terminal."""
    points = [["fixed point", "error", "standard error", "within two"]]
    points += [
        [point.form, f"{point.error:.3g}", f"{point.standard_error:.3g}", f"{100 * point.covered:.0f}%"]
        for point in evaluation.fixed_points
    ]
    lines = [["tuned by", "sampler", "seconds", "over floor", "residual"]]
    lines += [[row.form, row.dynamics, *_gmm_cells(row, evaluation)] for row in evaluation.figures]
    lines += [[tuning.form, "", f"{tuning.seconds:.0f}", "diverged", ""] for tuning in _diverged(evaluation)]
    law = f"exact residual {evaluation.exact_residual_std:.3f}, floor {evaluation.floor.value:.3f} (sliced W2)"
    return [*(aligned(points) if evaluation.fixed_points else ()), "", *aligned(lines), "", law]


def finetune_digits_report(evaluation: FinetuneDigitsEvaluation, provenance: Provenance) -> str:
    """The whole page."""
    return page.page(
        "Fine-tuning digits to a reward",
        [
            *_digits_opening(evaluation),
            *(piece for study in evaluation.studies for piece in _study(study, evaluation)),
            *making_section(provenance, evaluation.seconds),
        ],
    )


def finetune_digits_table(evaluation: FinetuneDigitsEvaluation) -> list[str]:
    """Lines for the terminal."""
    lines = [["reward", "samples", "calls", "mean reward", "of the gain", "classes", "confidence"]]
    for study in evaluation.studies:
        for label, sampled, share in _rows(study):
            lines.append([study.problem.name, label, *_cells(sampled, share)])
        for run in study.runs:
            if run.sampled is None:
                lines.append([study.problem.name, TITLES[run.form], "", "diverged", "", "", ""])
    return list(aligned(lines, text_columns=2))


def _diverged(evaluation: FinetuneGmmEvaluation) -> list[Tuning]:
    return [tuning for tuning in evaluation.tunings if tuning.error is not None]


def _gmm_cells(row: TunedFigures, evaluation: FinetuneGmmEvaluation) -> list[str]:
    seconds = next(tuning.seconds for tuning in evaluation.tunings if tuning.form == row.form)
    interval = f"{row.over_floor.ratio:.2f} ({row.over_floor.lower:.2f} to {row.over_floor.upper:.2f})"
    return [f"{seconds:.0f}", interval, f"{row.residual_std:.3f}"]


def _gmm_opening(evaluation: FinetuneGmmEvaluation) -> Iterator[str]:
    yield '<header><p class="kicker">mfm-ray &middot; protocol finetune_gmm</p>'
    yield "<h1>Fine-tuning a mixture whose answer is known</h1>"
    yield page.paragraph(
        "Three Gaussians in the plane, and one noisy measurement of a weighted sum of the coordinates as reward. The "
        "tuned drift should sample <b>the tilted law</b>, which is known in closed form; no method sees it.",
        lede=True,
    )
    yield "</header>"
    best = min(evaluation.figures, key=lambda row: row.over_floor.ratio, default=None)
    items = [
        (number(evaluation.base_over_floor), "times the floor before tuning"),
        (number(evaluation.floor.value), "sliced W2 between two exact sets: the floor"),
    ]
    if best is not None:
        items.append((number(best.over_floor.ratio), f"times the floor, the nearest: {TITLES[best.form]}"))
    yield page.cards(items)


def _gmm_fixed_points(evaluation: FinetuneGmmEvaluation) -> Iterator[str]:
    if not evaluation.fixed_points:
        return
    yield page.heading("Where each form of the loss would end")
    yield page.paragraph(
        "At random times and states the fixed point of the regression is estimated from many independent targets, with "
        "the exact flow map, and held against the optimal drift. An exact form is off by its Monte Carlo error and "
        "within two standard errors 95 percent of the time. With sigma<sup>2</sup> = 200 in the place of "
        "2(1&nbsp;&minus;&nbsp;t)/t the published setting has another fixed point."
    )
    yield page.table(
        ["form", "error of the fixed point", "standard error", "within two of them"],
        [
            [
                text(TITLES[point.form]),
                number(point.error),
                number(point.standard_error),
                f"{100 * point.covered:.0f} %",
            ]
            for point in evaluation.fixed_points
        ],
    )


def _gmm_tunings(evaluation: FinetuneGmmEvaluation) -> Iterator[str]:
    yield page.heading("Samples of tuned models")
    yield page.paragraph(
        f"Every method was given {evaluation.protocol.max_calls:,} network and reward calls (rows, forward and "
        "backward). <b>Over the floor</b>: mean sliced W2 to exact samples over that between exact sets of the same "
        f"size. <b>Residual</b>: {evaluation.exact_residual_std:.3f} in the exact law."
    )
    lines = [
        [text(TITLES[row.form]), row.dynamics.upper(), number(row.nfe), *_gmm_cells(row, evaluation)]
        for row in evaluation.figures
    ]
    lines += [
        [text(TITLES[tuning.form]), "", "", f"{tuning.seconds:.0f}", f"diverged: {text(tuning.error)}", ""]
        for tuning in _diverged(evaluation)
    ]
    yield page.table(["tuned by", "sampler", "calls", "seconds of tuning", "over the floor", "residual"], lines)
    curves = [
        charts.Line(
            [step.calls / 1e6 for step in thinned],
            [step.loss for step in thinned],
            TITLES[tuning.form],
            _FAMILIES[index % len(_FAMILIES)],
        )
        for index, tuning in enumerate(evaluation.tunings)
        if (thinned := _thinned(tuning))
    ]
    if curves:
        chart = charts.curves(
            curves, title="Loss while tuning", x_label="million calls", y_label="loss", log=True, wide=True
        )
        yield page.charts(
            [chart], "Losses of different methods are in different units: look at each by itself.", wide=True
        )


def _thinned(tuning: Tuning) -> list:
    """Some eighty steps, those with a loss above zero."""
    steps = tuning.history[:: max(1, len(tuning.history) // 80)]
    return [step for step in steps if step.loss > 0]


def _gmm_clouds(evaluation: FinetuneGmmEvaluation) -> Iterator[str]:
    yield page.heading("What the samples look like")
    exact = [(float(x), float(y)) for x, y in evaluation.exact_samples]
    clouds = [("before tuning", evaluation.base_samples, "unsteered")]
    clouds += [
        (TITLES[row.form], row.samples, "mfm_g")
        for row in evaluation.figures
        if row.dynamics == evaluation.protocol.dynamics[0]
    ]
    yield page.charts(
        [
            charts.scatter(
                [("exact", "muted", exact), (label, family, [(float(x), float(y)) for x, y in samples])],
                title=label,
                limit=_LIMIT,
            )
            for label, samples, family in clouds
        ],
        f"Samples by the {evaluation.protocol.dynamics[0].upper()} over exact ones of the tilted law.",
    )


def _digits_opening(evaluation: FinetuneDigitsEvaluation) -> Iterator[str]:
    protocol = evaluation.protocol
    yield '<header><p class="kicker">mfm-ray &middot; protocol finetune_digits</p>'
    yield "<h1>Fine-tuning digits to a reward</h1>"
    yield page.paragraph(
        f"Steering pays at every sample, tuning once: {protocol.max_seconds:g} seconds for each reward, after which "
        f"plain samples cost {protocol.num_steps} calls, as those of the base model do. {text(evaluation.data)}.",
        lede=True,
    )
    yield "</header>"
    shares = [(study, study.share_of_gain(study.runs[0])) for study in evaluation.studies]
    yield page.cards(
        [
            (
                f"{100 * share:.0f} %",
                f"of the gain of steering with {protocol.steering_draws} draws: {study.problem.title}",
            )
            for study, share in shares
        ]
    )


def _study(study: RewardStudy, evaluation: FinetuneDigitsEvaluation) -> Iterator[str]:
    yield page.heading(study.problem.title)
    yield page.paragraph(text(study.problem.explanation))
    cells = []
    for label, sampled, _ in _rows(study):
        pictures = [page.picture(image, f"{label}, {number}") for number, image in enumerate(sampled.images)]
        cells += [
            page.row_name(label, f"mean reward {number(sampled.reward.value)}", family=sampled.family),
            page.strip(pictures, columns=len(pictures)),
        ]
    yield page.rows(cells, "The same noise in every row.")
    header = ["samples", "calls", "mean reward", "of the gain", "classes", "confidence", "diversity", "Fr&eacute;chet"]
    yield page.table(
        header,
        [
            [text(label), *_cells(sampled, share), number(sampled.diversity), number(sampled.frechet)]
            for label, sampled, share in _rows(study)
        ],
    )
    yield page.paragraph(
        "<b>Classes</b>: how many have at least 2 percent of the samples, as the classifier sees them. "
        "<b>Fr&eacute;chet</b>: of its features, to held-out digits; a law that is tilted is away from them with right."
    )
    for run in study.runs:
        if run.sampled is None:
            yield page.paragraph(f"{text(TITLES[run.form])} diverged: {text(run.error)}.")
    yield page.charts(
        [_curve(study.runs)], "Mean reward of the draws that targets are made of, and of the anchors.", wide=True
    )


def _curve(runs: Sequence[TuningRun]) -> str:
    lines = []
    for index, run in enumerate(runs):
        steps = run.history[:: max(1, len(run.history) // 80)]
        family = _FAMILIES[index % len(_FAMILIES)]
        lines.append(
            charts.Line([step.seconds for step in steps], [step.reward for step in steps], TITLES[run.form], family)
        )
    first = runs[0].history[:: max(1, len(runs[0].history) // 80)]
    lines.append(
        charts.Line(
            [step.seconds for step in first],
            [step.anchor_reward for step in first],
            "anchors of the first",
            "muted",
            dashed=True,
        )
    )
    return charts.curves(lines, title="Reward while tuning", x_label="seconds", y_label="mean reward", wide=True)


def _rows(study: RewardStudy) -> Iterator[tuple[str, Sampled, float | None]]:
    yield study.base.label, study.base, 0.0
    yield study.steered.label, study.steered, 1.0
    for run in study.runs:
        if run.sampled is not None:
            yield run.sampled.label, run.sampled, study.share_of_gain(run)


def _cells(sampled: Sampled, share: float | None) -> list[str]:
    reward = f"{sampled.reward.value:.2f} \N{PLUS-MINUS SIGN} {sampled.reward.half_width:.2f}"
    of_gain = "" if share is None else f"{100 * share:.0f} %"
    return [f"{sampled.nfe:,.0f}", reward, of_gain, f"{sampled.classes}", f"{sampled.confidence:.3f}"]
