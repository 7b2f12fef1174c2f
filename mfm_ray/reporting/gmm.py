"""The report of protocol=gmm: which law each method samples, at what price."""

from __future__ import annotations

from collections.abc import Iterator

from mfm_ray.protocols.gmm import GmmEvaluation, MethodFigures
from mfm_ray.reporting import charts, page
from mfm_ray.reporting.page import number, text
from mfm_ray.reporting.provenance import Provenance, making_section
from mfm_ray.reporting.terminal import aligned

_FAMILIES = {"mfm_g": "MFM-G", "mfm_gf": "MFM-GF", "resampling": "posterior resampling"}
_LIMIT = 5.5
_COVERAGE_COLOURS = ("muted", "resampling", "mfm_gf", "mfm_g")
_NORMAL_SHARE = 0.954  # of a normal law within two deviations


def gmm_report(evaluation: GmmEvaluation, provenance: Provenance) -> str:
    """The whole page."""
    return page.page(
        "Steering a mixture whose answer is known",
        [
            *_opening(evaluation),
            *_curves(evaluation),
            *_clouds(evaluation),
            *_table(evaluation),
            *_coverage(evaluation),
            *making_section(provenance, evaluation.seconds),
        ],
    )


def gmm_table(evaluation: GmmEvaluation) -> list[str]:
    """Lines for the terminal."""
    lines = [["method", "", "calls", "over floor", "residual", "law"]]
    lines += [["", row.method.label, *_cells(row, evaluation)] for row in evaluation.figures]
    law = f"exact residual {evaluation.exact_residual_std:.3f}, floor {evaluation.floor.value:.3f} (sliced W2)"
    return [*aligned(lines), "", law, *_coverage_lines(evaluation)]


def _coverage_lines(evaluation: GmmEvaluation) -> list[str]:
    """Shares of the values within two standard errors of the closed form, draws by time."""
    if not evaluation.coverage:
        return []
    times = evaluation.protocol.coverage_times
    lines = [["value within 2 standard errors", *(f"t = {time:g}" for time in times)]]
    for draws in evaluation.protocol.coverage_draws:
        cells = [cell for cell in evaluation.coverage if cell.draws == draws]
        lines.append([f"{draws} draws", *(f"{100 * cell.covered:.0f}%" for cell in cells)])
    return ["", *aligned(lines)]


def _cells(row: MethodFigures, evaluation: GmmEvaluation) -> list[str]:
    interval = f"{row.over_floor.ratio:.2f} ({row.over_floor.lower:.2f} to {row.over_floor.upper:.2f})"
    held = "yes" if evaluation.follows_the_law(row) else "no"
    return [f"{row.nfe:,.0f}", interval, f"{row.residual_std:.3f}", held]


def _opening(evaluation: GmmEvaluation) -> Iterator[str]:
    protocol = evaluation.protocol
    source = "the exact flow map of the mixture" if protocol.exact else "a trained model"
    yield '<header><p class="kicker">mfm-ray &middot; protocol gmm</p>'
    yield "<h1>Steering a mixture whose answer is known</h1>"
    yield page.paragraph(
        "Three Gaussians in the plane, and one noisy measurement of a weighted sum of the coordinates. What steering "
        "should return is known in closed form, so that every method can be asked whether it samples <b>the law</b> or "
        f"just collects reward. Steered is {source}.",
        lede=True,
    )
    yield "</header>"
    followers = [row for row in evaluation.figures if evaluation.follows_the_law(row)]
    cheapest = min(followers, key=lambda row: row.nfe, default=None)
    official = next((row for row in evaluation.figures if row.method.key.startswith("official")), None)
    items = [(number(evaluation.floor.value), "sliced W2 between two exact sets: the floor")]
    if cheapest is not None:
        about = f"calls a sample of the cheapest method that follows the law: {cheapest.method.label}"
        items.append((f"{cheapest.nfe:,.0f}", about))
    if official is not None:
        about = f"times the floor for the official recipe, at {official.nfe:,.0f} calls"
        items.append((number(official.over_floor.ratio), about))
    yield page.cards(items)
    yield page.paragraph(
        "<b>Over the floor</b>: mean sliced W2 to exact samples over that between exact sets of the same size; 1 is "
        "perfect. <b>Residual</b>: the deviation of the measured sum around the measurement, "
        f"{evaluation.exact_residual_std:.3f} in the exact law. Less means that the reward was over-optimised, which "
        "sliced W2 alone does not see. A method follows the law here when its distance is at most twice the floor "
        "(the lower end of its interval) and its residual within 15 percent."
    )


def _curves(evaluation: GmmEvaluation) -> Iterator[str]:
    yield page.heading("Quality against draws, and against calls")
    for dynamics in evaluation.protocol.dynamics:
        chains = {
            family: [
                row for row in evaluation.figures if row.method.family == family and row.method.dynamics == dynamics
            ]
            for family in _FAMILIES
        }
        shown = {family: _one_length(rows) for family, rows in chains.items() if rows}
        yield page.charts(
            [
                charts.curves(
                    [
                        charts.Line(
                            [row.method.draws for row in rows],
                            [row.over_floor.ratio for row in rows],
                            _FAMILIES[family],
                            family,
                        )
                        for family, rows in shown.items()
                    ],
                    title=f"Distance over the floor, {dynamics.upper()}",
                    x_label="posterior draws a step",
                    y_label="times the floor",
                    log=True,
                    log_x=True,
                    marker="o",
                    reference=1.0,
                ),
                charts.curves(
                    [
                        charts.Line(
                            [row.nfe for row in rows],
                            [row.residual_std for row in rows],
                            _FAMILIES[family],
                            family,
                        )
                        for family, rows in shown.items()
                    ],
                    title=f"Spread of the residual, {dynamics.upper()}",
                    x_label="calls for one sample",
                    y_label="standard deviation",
                    log_x=True,
                    marker="o",
                    reference=evaluation.exact_residual_std,
                ),
            ],
            "Left: the dotted line is what exact samples score. Right: the dotted line is the exact law's spread; "
            "below it a method over-optimises, above it has not arrived.",
        )


def _one_length(rows: list[MethodFigures]) -> list[MethodFigures]:
    """Of methods that were run at several numbers of steps, those with the most."""
    most = max(row.method.steps for row in rows)
    return sorted((row for row in rows if row.method.steps == most), key=lambda row: row.method.draws)


def _clouds(evaluation: GmmEvaluation) -> Iterator[str]:
    yield page.heading("What the samples look like")
    exact = ("exact", "muted", _points(evaluation.exact_samples))
    pictures = [
        charts.scatter(
            [("prior", "line", _points(evaluation.prior_samples)), exact], title="Prior and tilted law", limit=_LIMIT
        )
    ]
    for row in _pictured(evaluation):
        cloud = ("sampled", row.method.family if row.method.family != "muted" else "ink", _points(row.samples))
        pictures.append(charts.scatter([exact, cloud], title=row.method.label, limit=_LIMIT))
    yield page.charts(pictures, "Grey: exact samples of the tilted law. Colour: what the method returns.")


def _pictured(evaluation: GmmEvaluation) -> list[MethodFigures]:
    """The last of each family, the ones with the most draws, in the first dynamics."""
    first = evaluation.protocol.dynamics[0]
    kept: dict[str, MethodFigures] = {}
    for row in evaluation.figures:
        if row.method.dynamics in (first, "none", "sde") or row.method.key.startswith("official"):
            family = row.method.key.split("_")[0] if row.method.family == "muted" else row.method.family
            if family not in kept or row.method.dynamics != "ode" or first == "ode":
                kept[family] = row
    return list(kept.values())


def _points(x: object) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in x]  # type: ignore[attr-defined]


def _table(evaluation: GmmEvaluation) -> Iterator[str]:
    yield page.heading("All figures")
    header = ["method", "steps", "calls", "sliced W2", "over the floor", "MMD\N{SUPERSCRIPT TWO}", "residual"]
    header += ["shares of the components", "follows the law"]
    lines = []
    for row in evaluation.figures:
        calls, interval, residual, held = _cells(row, evaluation)
        shares = " ".join(f"{100 * share:.0f}" for share in row.weights)
        distance = f"{number(row.distance.value)} \N{PLUS-MINUS SIGN} {number(row.distance.half_width, 2)}"
        mmd = f"{row.mmd.value:.5f}"
        lines.append([text(row.method.label), str(row.method.steps), calls, distance, interval, mmd, residual, shares])
        lines[-1].append(held)
    exact = " ".join(f"{100 * share:.0f}" for share in evaluation.exact_weights)
    law = ["exact samples", "", "", number(evaluation.floor.value), "1.00", f"{evaluation.mmd_floor.value:.5f}"]
    lines.append([*law, f"{evaluation.exact_residual_std:.3f}", exact, ""])
    best = [place for place, row in enumerate(evaluation.figures) if evaluation.follows_the_law(row)]
    yield page.table(header, lines, best=best)
    yield page.paragraph(
        f"{evaluation.protocol.num_samples:,} samples a set, {evaluation.protocol.num_seeds} sampling seeds (the "
        "official recipe: one), 95 percent intervals over seeds. Shares in percent, by the nearest component mean."
    )


def _coverage(evaluation: GmmEvaluation) -> Iterator[str]:
    """Whether the standard error beside a value in the trace can be believed."""
    if not evaluation.coverage:
        return
    draws = evaluation.protocol.coverage_draws
    by_draws = {count: [cell for cell in evaluation.coverage if cell.draws == count] for count in draws}
    yield page.heading("Can the value's standard error be believed?")
    yield page.paragraph(
        "Each step of a steered run reports the value of its state and a standard error. Here the value is known in "
        "closed form: how often does it lie within two of these errors? An error that tells the truth covers about 95 "
        "percent. With few draws and a stiff reward it does not: where a single draw carries the weight, the spread of "
        "the others says nothing, and both the value and its error are <b>lower bounds</b>. The last two columns tell "
        "how often one draw carries it (an effective sample size below 2), and how often the closed form lies above "
        "the interval."
    )
    yield page.charts(
        [
            charts.curves(
                [
                    charts.Line(
                        [cell.time for cell in cells],
                        [cell.covered for cell in cells],
                        f"{count} draws",
                        _COVERAGE_COLOURS[place % len(_COVERAGE_COLOURS)],
                    )
                    for place, (count, cells) in enumerate(by_draws.items())
                ],
                title="Values within two standard errors",
                x_label="time",
                y_label="share of the states",
                marker="o",
                reference=_NORMAL_SHARE,
            ),
            charts.curves(
                [
                    charts.Line(
                        [cell.time for cell in cells],
                        [cell.error / max(cell.standard_error, 1e-12) for cell in cells],
                        f"{count} draws",
                        _COVERAGE_COLOURS[place % len(_COVERAGE_COLOURS)],
                    )
                    for place, (count, cells) in enumerate(by_draws.items())
                ],
                title="Error made over error told",
                x_label="time",
                y_label="ratio of root mean squares",
                marker="o",
                log=True,
                reference=1.0,
            ),
        ],
        f"{evaluation.protocol.coverage_states:,} states of the steered law at each time. Dotted: what a normal error "
        "would cover, and an error that is told as large as it is.",
    )
    header = ["draws", "time", "within 2 errors", "told, nats", "made, nats", "one draw counts", "true value above"]
    lines = [
        [
            str(cell.draws),
            f"{cell.time:g}",
            f"{100 * cell.covered:.0f}%",
            number(cell.standard_error),
            number(cell.error),
            f"{100 * cell.single:.0f}%",
            f"{100 * cell.above:.0f}%",
        ]
        for cell in evaluation.coverage
    ]
    yield page.table(header, sorted(lines, key=lambda line: (int(line[0]), float(line[1]))))
