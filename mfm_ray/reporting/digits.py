"""The report of protocol=digits: what a newcomer sees after `make demo`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mfm_ray.protocols.comparison import SINGLE_DRAW, best_of
from mfm_ray.protocols.digits import MASKED, DigitsEvaluation
from mfm_ray.reporting import charts, page
from mfm_ray.reporting.page import duration, number, text
from mfm_ray.reporting.provenance import Provenance, making_section
from mfm_ray.reporting.steering import official_section, steering_section, summary_section

_SQUARED_ERROR = "squared_error."
"""Of a term, in the lines of the training's history."""


def digits_report(evaluation: DigitsEvaluation, provenance: Provenance) -> str:
    """The whole page."""
    return page.page(
        "Meta Flow Maps on handwritten digits",
        [
            *_opening(evaluation, provenance),
            *_training(provenance),
            *_samples(evaluation),
            *_posterior(evaluation),
            *_distance(evaluation),
            *steering_section(evaluation),
            *summary_section(evaluation),
            *official_section(evaluation),
            *_novelty(evaluation),
            *making_section(provenance, evaluation.seconds),
        ],
    )


def _opening(evaluation: DigitsEvaluation, provenance: Provenance) -> Iterator[str]:
    figures = evaluation.metrics()
    masked, largest = evaluation.study(MASKED), max(evaluation.protocol.best_of)
    targets = len(masked.problem.targets)
    yield '<header><p class="kicker">mfm-ray &middot; protocol ' + text(evaluation.protocol.name) + "</p>"
    yield "<h1>Meta Flow Maps on handwritten digits</h1>"
    yield page.paragraph(
        "A flow model turns noise into an image in many small steps. A <b>meta flow map</b> can also jump: from any "
        "noisy image it draws, in one network call, a clean image that may lie behind it. So a reward can be asked "
        "about the <b>end</b> at every step, and each step bent towards a better one. This page shows what that buys, "
        f"on {text(evaluation.data)} and on nothing larger than a laptop.",
        lede=True,
    )
    yield "</header>"
    items = [
        (
            f"{figures['mfm_g_wins']:.0f} of {targets}",
            f"half-hidden digits on which steering with one draw a step beats Best-of-{largest:,}",
        ),
        (f"{figures['nfe_ratio']:.0f}×", f"fewer calls for one image than Best-of-{largest:,}"),
        (
            f"{figures['classifier_confidence']:.2f}",
            "mean confidence of a classifier that the steered images are digits",
        ),
    ]
    if evaluation.gaps:
        blurred = figures["posterior_sw2_mean"] / figures["posterior_sw2_floor"]
        items.append(
            (
                f"{figures['posterior_sw2_ratio']:.1f} floors",
                f"from one-step draws to those of a fine ODE; their blurred mean lies at {blurred:.0f}",
            )
        )
    if provenance.train_seconds is not None:
        items.append((_clock(provenance.train_seconds), f"of training {provenance.facts.get('training', '')}".strip()))
    yield page.cards(items)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min"


def _training(provenance: Provenance) -> Iterator[str]:
    history = [line for line in provenance.history if "step" in line and "loss" in line]
    if len(history) < 2:
        return
    steps = [float(line["step"]) for line in history]
    loss = charts.Line(steps, _smooth([float(line["loss"]) for line in history]), "loss", "accent")
    drawn = [charts.curves([loss], title="Training loss", x_label="optimiser step", y_label="loss", log=True)]
    terms = _terms(history)
    if terms:
        families = ("mfm_g", "best_of_n")
        lines = [
            charts.Line(steps, _smooth([float(line[name]) for line in history]), label, family)
            for (name, label), family in zip(terms.items(), families, strict=False)
        ]
        drawn.append(
            charts.curves(lines, title="Its terms", x_label="optimiser step", y_label="squared error", log=True)
        )
    yield page.heading("Training")
    yield page.paragraph(
        "The network learns one function: the average velocity between two inner times, given a noisy image. On the "
        "<b>diagonal</b> (no time between them) the data teach it directly. The <b>semigroup</b> term asks that one "
        "long jump equal two shorter ones, and so carries that knowledge over to jumps of any length."
    )
    spent = duration(provenance.train_seconds) if provenance.train_seconds is not None else "a few minutes"
    yield page.charts(
        drawn,
        f"Means over logged steps, smoothed. The diagonal error does not go to zero: it holds the spread of the clean "
        f"images that one noisy image allows. Training took {spent}.",
    )


def _terms(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Squared errors of the terms, by key and name, as far as every line has them."""
    named = {f"{_SQUARED_ERROR}{name}": name for name in ("diagonal", "semigroup")}
    return {key: name for key, name in named.items() if all(line.get(key, 0) > 0 for line in history)}


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over a fiftieth of the curve."""
    width = max(1, len(values) // 50)
    return [sum(values[max(0, i - width) : i + 1]) / len(values[max(0, i - width) : i + 1]) for i in range(len(values))]


def _samples(evaluation: DigitsEvaluation) -> Iterator[str]:
    names = {"real": "Real digits", "one_step": "One step", "four_step": "Four steps"}
    cells = []
    for kind, name in names.items():
        images = evaluation.gallery.images[kind]
        confidence = f"judge {evaluation.gallery.confidence[kind]:.2f}"
        pictures = [page.picture(image, f"{name}, number {i + 1}") for i, image in enumerate(images)]
        cells += [page.row_name(name, confidence), page.strip(pictures, columns=20, wrap=True)]
    yield page.heading("One step makes a digit")
    yield page.paragraph(
        "From pure noise, the jump to the end is a sample of everything the model knows. More steps refine it: jump, "
        "add noise again, jump from there."
    )
    yield page.rows(
        cells,
        "None is picked by hand: the first of a fixed seed, and the first of the held-out images. "
        "<b>Judge</b> is a small classifier trained on the real digits; the figure is the mean of its largest class "
        "probability, over 512 samples or all held-out images.",
    )


def _posterior(evaluation: DigitsEvaluation) -> Iterator[str]:
    shown = evaluation.posterior_gallery
    cells = [
        '<div class="name"><small>time</small></div>',
        '<div class="name"><small>noisy</small></div>',
        f'<div class="name"><small>{shown.draws.shape[1]} draws, one network call each</small></div>',
    ]
    for time, noisy, draws in zip(shown.times, shown.noisy, shown.draws, strict=True):
        pictures = [page.picture(draw, f"draw {i + 1} at t = {time:g}") for i, draw in enumerate(draws)]
        cells += [
            page.row_name(f"{time:g}"),
            f"<div>{page.picture(noisy, f'noisy digit at t = {time:g}')}</div>",
            page.strip(pictures, columns=len(pictures)),
        ]
    cells += [page.row_name("1"), f"<div>{page.picture(shown.clean, 'the held-out digit')}</div>", "<div></div>"]
    yield page.heading("What could this have been?")
    yield page.paragraph(
        "A held-out digit is buried in noise (t = 0 is noise alone, t = 1 the digit). Each picture beside it is one "
        "independent answer to the question what the digit could have been. Where little is visible the answers "
        "differ; as it clears up they agree. None is the blur that a denoiser gives, the average of all answers."
    )
    yield page.rows(
        cells, "Draws from p(x₁ | x<sub>t</sub>) of a digit the model was not trained on.", kind="posterior"
    )


def _distance(evaluation: DigitsEvaluation) -> Iterator[str]:
    gaps, protocol = evaluation.gaps, evaluation.protocol
    if not gaps:
        return
    times = [gap.time for gap in gaps]
    families = {
        "mean": ("their blurred mean", "unsteered"),
        "one_step": ("one step of the map", "mfm_g"),
        "few_step": ("four steps of the map", "mfm_gf"),
        "floor": ("floor: ODE against ODE", "best_of_n"),
    }
    lines = [
        charts.Line(times, [float(getattr(gap, key).mean()) for gap in gaps], label, family, dashed=key == "floor")
        for key, (label, family) in families.items()
    ]
    figure = charts.curves(
        lines, title="Distance to the ODE's draws", x_label="time t of the noisy digit", y_label="sliced W₂", marker="o"
    )
    header = ["t", "one step", "four steps", "floor", "one step / floor", "blurred mean"]
    body = [
        [
            f"{gap.time:g}",
            *(number(float(value.mean())) for value in (gap.one_step, gap.few_step, gap.floor)),
            number(gap.ratio),
            number(float(gap.mean.mean())),
        ]
        for gap in gaps
    ]
    yield page.heading("Are one-step draws the real thing?")
    yield page.paragraph(
        "The same network can also be followed slowly, as an ODE with many small steps. Jumping should give the same "
        "distribution. The sliced Wasserstein distance says how far two sets of images are apart; because sets are "
        "finite, even two sets from the very same ODE are not at zero. That <b>floor</b> is what to compare with."
    )
    yield page.charts(
        [figure],
        f"{protocol.posterior_contexts} held-out digits at each t, {protocol.posterior_draws:,} draws for each; ODE of "
        f"{protocol.posterior_ode_steps} midpoint steps; 256 projections; pixels in [0, 1].",
    )
    yield page.table(header, body)


def _novelty(evaluation: DigitsEvaluation) -> Iterator[str]:
    """Are the samples copies of training images, and do they differ?"""
    if not evaluation.novelty:
        return
    body, cells = [], []
    for found in evaluation.novelty.values():
        memory = found.memorisation
        body.append(
            [text(found.label), f"{found.count}", number(memory.samples), f"{memory.ratio:.2f}", number(found.vendi)]
        )
    for kind in ("ode", "steered"):
        found = evaluation.novelty[kind]
        columns = len(found.samples)
        drawn = [page.picture(image, f"{found.label}, sample {i + 1}") for i, image in enumerate(found.samples)]
        near = [page.picture(image, f"nearest to sample {i + 1}") for i, image in enumerate(found.nearest)]
        cells += [page.row_name(found.label), page.strip(drawn, columns=columns)]
        cells += [page.row_name("nearest in training"), page.strip(near, columns=columns), page.RULE]
    yield page.heading("Copies, or new digits?")
    yield page.paragraph(
        "For each sample the nearest training image: were the samples copies, the distance would be far below that of "
        "held-out digits, which are no copies. The <b>Vendi score</b> is the effective number of different images "
        "among as many samples; below that of the held-out digits, samples resemble each other more than they should."
    )
    yield page.table(["samples", "count", "nearest, median", "over held-out", "Vendi score"], body)
    yield page.rows(cells[:-1], "Samples, not picked, above their nearest training images.")


def headline(evaluation: DigitsEvaluation) -> str:
    """The result in one sentence, for a terminal."""
    figures, largest = evaluation.metrics(), max(evaluation.protocol.best_of)
    masked = evaluation.study(MASKED)
    return (
        f"steering with one posterior draw a step beats Best-of-{largest:,} on {figures['mfm_g_wins']:.0f} of "
        f"{len(masked.problem.targets)} half-hidden digits with {figures['nfe_ratio']:.0f} times fewer calls "
        f"({masked[SINGLE_DRAW].nfe:,.0f} against {masked[best_of(largest).key].nfe:,.0f})"
    )
