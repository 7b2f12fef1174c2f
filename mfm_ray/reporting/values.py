"""The report of protocol=values: what an estimate of the value function is worth, at what price."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mfm_ray.metrics import Correlation
from mfm_ray.protocols.values import Agreement, EstimatorFigures, ValuesEvaluation, ValueStudy
from mfm_ray.reporting import charts, page
from mfm_ray.reporting.page import number, text
from mfm_ray.reporting.provenance import Provenance, making_section
from mfm_ray.reporting.terminal import aligned

_FAMILIES = {"mfm": ("Meta flow map", "mfm_g"), "glass": ("GLASS ODE", "best_of_n")}
_TITLES = {
    "class_mixture": "A chosen mix of classes",
    "symmetry": "Mirror symmetry",
    "linear_observation": "One noisy measurement",
}
_MINUS = "\N{MINUS SIGN}"


def values_report(evaluation: ValuesEvaluation, provenance: Provenance) -> str:
    """The whole page."""
    body = [*_opening(evaluation)]
    for reward in evaluation.rewards:
        body += _reward_section(evaluation, reward)
    return page.page("What is a state worth?", [*body, *making_section(provenance, evaluation.seconds)])


def values_table(evaluation: ValuesEvaluation) -> list[str]:
    """Lines for the terminal."""
    lines = [["reward", "estimator", "t", "calls", "r", "bias", "rms", "within 2 se"]]
    for study in evaluation.studies:
        name = study.reward
        for row in study.figures:
            cells = [f"{study.time:g}", f"{row.calls:,}", _interval(row.truth.correlation), *_errors(row.truth)]
            lines.append([name, row.estimator.label, *cells])
            name = ""
        truth = ["", f"truth: SDE, ceiling {study.ceiling:.3f}", f"{study.time:g}", f"{evaluation.truth_calls:,}"]
        if study.truth_exact is None:
            lines.append([*truth, "", "", "", ""])
        else:
            lines.append([*truth, _interval(study.truth_exact.correlation), *_errors(study.truth_exact)])
    about = "r, bias and rms (nats) are against the SDE's values"
    exact = any(study.exact is not None for study in evaluation.studies)
    return [*aligned(lines), "", f"{about}; the SDE's own line is against the closed form" if exact else about]


def _errors(agreement: Agreement) -> list[str]:
    bias = f"{agreement.bias:+.3f}".replace("-", _MINUS)
    return [bias, f"{agreement.rms:.3f}", f"{100 * agreement.within:.0f} %"]


def _interval(r: Correlation) -> str:
    return f"{r.value:.3f} ({r.lower:.3f} to {r.upper:.3f})".replace("-", _MINUS)


def _opening(evaluation: ValuesEvaluation) -> Iterator[str]:
    protocol = evaluation.protocol
    yield f'<header><p class="kicker">mfm-ray &middot; protocol {text(protocol.name)}</p>'
    yield "<h1>What is a noisy state worth?</h1>"
    yield page.paragraph(
        "Steering needs the value of a noisy state: <b>V = log of the mean of exp(reward)</b> over the clean samples "
        "it may end in. The slow way to know is to simulate many ends. Here cheap estimates are held against it, from "
        "posterior draws of one or a few network calls each.",
        lede=True,
    )
    yield "</header>"
    yield page.cards(list(_cards(evaluation)))
    yield page.paragraph(
        f"<b>Truth</b>: {protocol.truth_draws} rollouts of the memoryless SDE, {protocol.truth_steps} steps each, from "
        f"each of {protocol.num_contexts} noised held-out data at each time. <b>Estimates</b>: "
        f"{protocol.num_draws} draws by the meta flow map in 1 to {max(protocol.map_steps)} inner steps, or by Euler's "
        "rule along the GLASS velocity of the same model's drift. <b>r</b> is Pearson's correlation over the data, "
        "with a 95 percent interval (Spearman's is in the tables); it forgives estimates that are all too high or too "
        "flat, so <b>bias</b> and "
        "<b>rms</b> of estimate minus truth, in nats, stand beside it. <b>Ceiling</b>: the r that a second set of "
        "rollouts would reach; only estimates with less noise of their own, such as a posterior mean's, exceed it."
    )


def _cards(evaluation: ValuesEvaluation) -> Iterator[tuple[str, str]]:
    studies = evaluation.of(evaluation.rewards[0])
    cheapest = [min(study.figures, key=lambda row: (row.calls, row.estimator.family != "mfm")) for study in studies]
    values = [row.truth.correlation.value for row in cheapest]
    low, high = (f"{value:.2f}".replace("-", _MINUS) for value in (min(values), max(values)))
    label = cheapest[0].estimator.label
    yield f"{low} to {high}", f"r of {label}, over the times ({_title(evaluation.rewards[0]).lower()})"
    yield number(sum(study.ceiling for study in studies) / len(studies), 2), "mean ceiling: rollouts against rollouts"
    yield f"{evaluation.truth_calls / cheapest[0].calls:,.0f} times", "fewer network calls than the rollouts"
    if cheapest[0].exact is not None:
        covered = sum(row.exact.within for row in cheapest if row.exact is not None) / len(cheapest)
        yield f"{100 * covered:.0f} %", f"closed-form values within two standard errors of {label}"


def _reward_section(evaluation: ValuesEvaluation, reward: str) -> Iterator[str]:
    studies = evaluation.of(reward)
    yield page.heading(_title(reward), anchor=reward)
    sizes = [float(study.truth.effective_sample_size.mean()) for study in studies]
    among = f"of {evaluation.protocol.truth_draws} rollouts"
    yield page.paragraph(
        f"Effective number {among}, by time: "
        + ", ".join(f"{number(size, 2)} (t = {study.time:g})" for size, study in zip(sizes, studies, strict=True))
        + ". The fewer, the more a value hangs on its luckiest draw, in truth and estimates alike."
    )
    yield page.charts(
        [_correlation_chart(study) for study in studies],
        "Correlation with the rollouts' value against network calls for one estimate, with 95 percent intervals. The "
        "dotted line is the ceiling, itself estimated from the two halves of the rollouts.",
    )
    yield page.charts(
        [_error_chart(study) for study in studies],
        "Root mean square of estimate minus truth, in nats. The dotted line is the standard error that the truth has "
        "itself.",
    )
    yield page.charts(
        [_scatter(study) for study in studies],
        "Each dot is a noised datum: estimates of the fewest steps against the truth, in nats."
        + (" The truth here is the closed form." if studies[0].exact is not None else ""),
    )
    yield from _tables(evaluation, studies)


def _title(reward: str) -> str:
    return _TITLES.get(reward, reward)


def _lines(study: ValueStudy) -> Iterator[tuple[str, str, list[EstimatorFigures]]]:
    for family, (label, colour) in _FAMILIES.items():
        rows = [row for row in study.figures if row.estimator.family == family]
        if rows:
            yield label, colour, rows


def _correlation_chart(study: ValueStudy) -> str:
    lines = [
        charts.Line(
            [row.calls for row in rows],
            [row.truth.correlation.value for row in rows],
            label,
            colour,
            band=([row.truth.correlation.lower for row in rows], [row.truth.correlation.upper for row in rows]),
        )
        for label, colour, rows in _lines(study)
    ]
    return charts.curves(
        lines,
        title=f"t = {study.time:g}",
        x_label="network calls for one estimate",
        y_label="Pearson r",
        log_x=True,
        marker="o",
        reference=study.ceiling,
    )


def _error_chart(study: ValueStudy) -> str:
    return charts.curves(
        [
            charts.Line([row.calls for row in rows], [row.truth.rms for row in rows], label, colour)
            for label, colour, rows in _lines(study)
        ],
        title=f"t = {study.time:g}",
        x_label="network calls for one estimate",
        y_label="rms error (nats)",
        log_x=True,
        marker="o",
        reference=float(study.truth.standard_error.square().mean().sqrt()),
    )


def _scatter(study: ValueStudy) -> str:
    truth = study.truth.value if study.exact is None else study.exact
    clouds = [
        (rows[0].estimator.label, colour, _points(truth, rows[0].values.value)) for _, colour, rows in _lines(study)
    ]
    if study.exact is not None:
        clouds.insert(0, ("SDE rollouts", "unsteered", _points(truth, study.truth.value)))
    return charts.agreement(clouds[::-1], title=f"t = {study.time:g}", x_label="true value", y_label="estimate")


def _points(truth: Tensor, estimate: Tensor) -> list[tuple[float, float]]:
    return list(zip(truth.tolist(), estimate.tolist(), strict=True))


def _tables(evaluation: ValuesEvaluation, studies: list[ValueStudy]) -> Iterator[str]:
    header = ["estimator", "t", "calls", "r", "rank r", "bias", "rms", "truth within 2 se", "within 2 of both se"]
    known = studies[0].exact is not None
    if known:
        header += ["r, closed form", "bias", "rms", "within 2 se"]
    lines = []
    for study in studies:
        for row in study.figures:
            both = f"{100 * row.truth.within_both:.0f} %"
            cells = [
                f"{study.time:g}",
                f"{row.calls:,}",
                _interval(row.truth.correlation),
                _interval(row.truth.ranks),
                *_errors(row.truth),
                both,
            ]
            lines.append([text(row.estimator.label), *cells, *_exact_cells(row.exact)])
        cells = [f"{study.time:g}", f"{evaluation.truth_calls:,}", f"ceiling {study.ceiling:.3f}", "", "", "", "", ""]
        lines.append(["SDE rollouts", *cells, *_exact_cells(study.truth_exact)])
    yield page.unfold("All figures", page.table(header, lines))


def _exact_cells(agreement: Agreement | None) -> list[str]:
    return [] if agreement is None else [_interval(agreement.correlation), *_errors(agreement)]
