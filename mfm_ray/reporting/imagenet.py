"""The reports of the protocols of ImageNet's scale: base FID, posterior FID, steering, fine-tuning curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from mfm_ray.metrics import Mean
from mfm_ray.presets import PRESETS
from mfm_ray.protocols.imagenet import SetDistance, SetsProtocol
from mfm_ray.protocols.imagenet_fid import FidEvaluation
from mfm_ray.protocols.imagenet_finetuning import TuningEvaluation
from mfm_ray.protocols.imagenet_posterior import PAIRS, PosteriorEvaluation
from mfm_ray.protocols.imagenet_steering import FAMILIES, SteeredScore, SteeringEvaluation
from mfm_ray.reporting import charts, page
from mfm_ray.reporting.page import number, text
from mfm_ray.reporting.provenance import Provenance, making_section
from mfm_ray.reporting.terminal import aligned

_FEATURES = {
    "inception": "the 2,048 pooled features of FID's Inception",
    "classifier": "the features of the classifier beside the model (comparable for its kind of data only)",
    "raw": "the numbers of a sample themselves (comparable for this kind of data only)",
}
_COLOURS = {"mfm_g": "mfm_g", "mfm_gf": "mfm_gf", "dps": "muted", "search": "resampling", "best_of_n": "best_of_n"}
_HEADER = ["KID × 1000", "precision", "recall"]
_ORDER = ("mfm_g", "mfm_gf", "resampling", "best_of_n", "muted")


def fid_report(evaluation: FidEvaluation, provenance: Provenance) -> str:
    """The whole page of protocol=imagenet_fid."""
    protocol = evaluation.protocol
    body = [
        *_header(protocol.name, "How good are samples of few calls?"),
        page.paragraph(
            f"<b>{protocol.num_samples:,} samples</b> at each number of network calls, by the kernel sampler: draw a "
            "clean sample from the present state, noise it to the next time, and again. Classes are drawn uniformly.",
            lede=True,
        ),
        "</header>",
        page.cards(
            [
                *((number(found.frechet), f"{_name(protocol)} at {found.label}") for found in evaluation.measured),
                *_floor_card(evaluation.floor),
            ]
        ),
        page.paragraph(
            f"Compared with <b>{_reference(evaluation)}</b> through {_FEATURES[protocol.features]}.",
            _what_figures_mean(protocol),
        ),
        page.heading("Figures"),
        page.charts(
            _distance_charts(
                {"Samples": evaluation.measured}, evaluation.floor, x_label="network calls for one sample"
            ),
            f"{_name(protocol)} (lower is better) and precision and recall (higher is better) over network calls. The "
            "dotted line is the floor.",
        ),
        page.table(["samples", _name(protocol), *_HEADER], [_cells(found) for found in evaluation.measured]),
    ]
    body += _pictures(
        [("Reference", evaluation.reference_images), *((found.label, found.images) for found in evaluation.measured)]
    )
    return page.page(f"{_name(protocol)} of few-call samples", [*body, *making_section(provenance, evaluation.seconds)])


def fid_table(evaluation: FidEvaluation) -> list[str]:
    """Lines for the terminal."""
    return _terminal(evaluation.protocol, [("", evaluation.measured)], {None: evaluation.floor})


def posterior_report(evaluation: PosteriorEvaluation, provenance: Provenance) -> str:
    """The whole page of protocol=imagenet_posterior."""
    protocol = evaluation.protocol
    against = (
        "the clean data behind the noise"
        if protocol.against == PAIRS
        else f"rollouts of the memoryless SDE from the same states ({protocol.rollout_steps} steps)"
    )
    body = [
        *_header(protocol.name, "Do posterior draws look like data?"),
        page.paragraph(
            f"<b>{protocol.num_contexts:,} held-out data</b> are noised to each time, and from each state one clean "
            f"sample is drawn. As a set, exact draws are data again, whatever the time. They are compared with "
            f"{against}.",
            lede=True,
        ),
        "</header>",
        page.cards(
            [
                (number(found.frechet), f"{_name(protocol)} of one-call draws at t = {found.time:g}")
                for found in evaluation.measured
                if found.key == f"mfm_{min(protocol.map_steps)}"
            ]
        ),
        page.paragraph(
            f"Draws and data are compared through {_FEATURES[protocol.features]}.",
            _what_figures_mean(protocol),
            "A draw and the datum behind its state are alike where little noise was added, so that at late times "
            "figures fall below the floor, which is between independent sets."
            if protocol.against == PAIRS
            else "",
        ),
        page.heading("Figures"),
    ]
    for t in protocol.times:
        families = _families(evaluation, t)
        body.append(page.heading(f"t = {t:g}", level=3))
        body.append(
            page.charts(
                _distance_charts(families, evaluation.floors.get(t), x_label="network calls for one draw"),
                "Over network calls. The dotted line is the floor.",
            )
        )
    lines = [[f"{found.time:g}", *_cells(found)] for found in evaluation.measured]
    body.append(page.table(["t", "draws", _name(protocol), *_HEADER], lines))
    shown = [(f"t = {found.time:g}, {found.label}", found.images) for found in evaluation.measured]
    body += _pictures([("Clean data", evaluation.pairs), *shown])
    return page.page("Posterior draws as a set", [*body, *making_section(provenance, evaluation.seconds)])


def posterior_table(evaluation: PosteriorEvaluation) -> list[str]:
    """Lines for the terminal."""
    groups = [
        (f"t = {t:g}", [found for found in evaluation.measured if found.time == t]) for t in evaluation.protocol.times
    ]
    return _terminal(evaluation.protocol, groups, evaluation.floors)


def steering_report(evaluation: SteeringEvaluation, provenance: Provenance) -> str:
    """The whole page of protocol=imagenet_steering."""
    protocol = evaluation.protocol
    what = "without a class" if protocol.label is None else f"of class {protocol.label}"
    body = [
        *_header(protocol.name, "What does a reward cost?"),
        page.paragraph(
            f"<b>{protocol.num_images} images {what}</b> by each method, towards each of {len(evaluation.rewards)} "
            "rewards; the rewards that a method was not steered towards are held out, and say whether it still makes "
            "good images or plays its reward.",
            lede=True,
        ),
        "</header>",
        page.cards(list(_steering_cards(evaluation))),
        page.paragraph(
            f"{protocol.num_steps} outer steps"
            + (f", preset <code>{text(protocol.preset)}</code>" if protocol.preset else "")
            + f". <b>Best-of-N</b> takes the best of disjoint groups of one pool of {protocol.pool_size:,} unsteered "
            "samples of the same sampler, at most as many groups as there are images. <b>Calls</b> are counted for one "
            "returned image: network and reward calls one each, a backward pass one more. Intervals are 95 percent, "
            "over images."
        ),
    ]
    for reward in evaluation.rewards:
        body += _steered_section(evaluation, reward)
    return page.page("Steering towards rewards", [*body, *making_section(provenance, evaluation.seconds)])


def steering_table(evaluation: SteeringEvaluation) -> list[str]:
    """Lines for the terminal."""
    lines = [["reward", "method", "mean reward", "calls", *(f"on {name}" for name in evaluation.rewards)]]
    for reward in evaluation.rewards:
        title = reward
        for found in [evaluation.unsteered, *evaluation.of(reward)]:
            means = [number(found.means[name].value) for name in evaluation.rewards]
            lines.append([title, found.label, _mean(found.means[reward]), f"{found.nfe:,.0f}", *means])
            title = ""
    return list(aligned(lines))


def tuning_report(evaluation: TuningEvaluation, provenance: Provenance) -> str:
    """The whole page of protocol=imagenet_finetuning."""
    names = list(dict.fromkeys(name for run in evaluation.runs for name in run.names))
    body = [
        *_header(evaluation.protocol.name, "What fine-tuning moved"),
        page.paragraph(
            "Figures of plain samples of the tuned model while it was tuned: the <b>reward</b> that it was tuned to, "
            "and <b>held-out</b> ones, which fall where the reward is only played. Bands are 95 percent intervals over "
            "the samples of an evaluation.",
            lede=True,
        ),
        "</header>",
        page.cards(
            [
                (number(run.curve("reward")[-1][1].value), f"{run.reward} at the end of {run.title}")
                for run in evaluation.runs
                if run.curve("reward")
            ]
        ),
        page.charts(
            [_tuning_chart(evaluation, name) for name in names],
            "Over optimiser steps. Step 0, where there is one, is the model before tuning.",
        ),
        page.table(
            ["run", "figure", "first", "last", "at step"],
            [
                [text(run.title), text(name), _mean(curve[0][1]), _mean(curve[-1][1]), f"{curve[-1][0]:,.0f}"]
                for run in evaluation.runs
                for name in run.names
                for curve in [run.curve(name)]
            ],
        ),
    ]
    return page.page("Fine-tuning curves", [*body, *making_section(provenance, evaluation.seconds)])


def tuning_table(evaluation: TuningEvaluation) -> list[str]:
    """Lines for the terminal."""
    lines = [["run", "figure", "first", "last", "at step"]]
    for run in evaluation.runs:
        title = run.title
        for name in run.names:
            curve = run.curve(name)
            lines.append([title, name, _mean(curve[0][1]), _mean(curve[-1][1]), f"{curve[-1][0]:,.0f}"])
            title = ""
    return list(aligned(lines))


def _header(name: str, title: str) -> Iterator[str]:
    yield f'<header><p class="kicker">mfm-ray &middot; protocol {text(name)}</p>'
    yield f"<h1>{text(title)}</h1>"


def _name(protocol: SetsProtocol) -> str:
    return "FID" if protocol.features == "inception" else "Fréchet distance"


def _reference(evaluation: FidEvaluation) -> str:
    place = evaluation.protocol.reference
    if place is None:
        return f"the {evaluation.reference_count:,} held-out data"
    name = text(place.rpartition("/")[2])
    return (
        f"{name} ({evaluation.reference_count:,} pictures)" if evaluation.reference_count else f"the moments of {name}"
    )


def _what_figures_mean(protocol: SetsProtocol) -> str:
    return (
        f"<b>{_name(protocol)}</b> compares means and covariances; it falls with the number of samples, so that only "
        "sets of one size compare. <b>KID</b> has no such bias: 0 in the mean for equal laws, here over "
        f"{protocol.kid_subsets} subsets of at most {protocol.kid_subset_size:,}. <b>Precision</b> is the share of "
        "samples that lie among the data, <b>recall</b> the share of data that lie among samples "
        f"(k = {protocol.neighbours}, at most {protocol.manifold_rows:,} of each). The <b>floor</b> is half of the "
        "distance between the two halves of what samples are compared with: about what two independent sets of that "
        "size differ by."
    )


def _floor_card(floor: float | None) -> list[tuple[str, str]]:
    return [] if floor is None else [(number(floor), "floor: data against data of the same size")]


def _families(evaluation: PosteriorEvaluation, t: float) -> dict[str, Sequence[SetDistance]]:
    at = [found for found in evaluation.measured if found.time == t]
    families = {
        "Meta flow map": [found for found in at if found.key.startswith("mfm")],
        "GLASS ODE": [found for found in at if found.key.startswith("glass")],
    }
    return {name: rows for name, rows in families.items() if rows}


def _distance_charts(groups: dict[str, Sequence[SetDistance]], floor: float | None, *, x_label: str) -> list[str]:
    ordered = {name: sorted(rows, key=lambda found: found.nfe) for name, rows in groups.items()}
    ticks = sorted({found.nfe for rows in ordered.values() for found in rows})

    def chart(title: str, figures: Sequence[tuple[str, Callable[[SetDistance], float | None]]], **more: object) -> str:
        lines: list[charts.Line] = []
        for name, rows in ordered.items():
            for label, figure in figures:
                values = [(found.nfe, figure(found)) for found in rows]
                known = [(x, y) for x, y in values if y is not None]
                if known:
                    full = " ".join(part for part in (name if len(ordered) > 1 else "", label) if part)
                    x, y = zip(*known, strict=True)
                    lines.append(charts.Line(list(x), list(y), full or name, _ORDER[len(lines) % len(_ORDER)]))
        return charts.curves(
            lines,
            title=title,
            x_label=x_label,
            y_label="",
            log_x=len(ticks) > 1,
            x_ticks=ticks,
            marker="o",
            **more,  # type: ignore[arg-type]
        )

    drawn = [chart("Distance", [("", lambda found: found.frechet)], reference=floor)]
    if any(found.precision is not None for rows in ordered.values() for found in rows):
        shares = [("precision", lambda found: found.precision), ("recall", lambda found: found.recall)]
        drawn.append(chart("Precision and recall", shares))
    return drawn


def _cells(found: SetDistance) -> list[str]:
    kid = "" if found.kid is None else _mean(Mean(1000 * found.kid.value, 1000 * found.kid.half_width, found.kid.count))
    shares = ["" if share is None else f"{share:.3f}" for share in (found.precision, found.recall)]
    return [text(found.label), number(found.frechet), kid, *shares]


def _terminal(
    protocol: SetsProtocol,
    groups: Sequence[tuple[str, Sequence[SetDistance]]],
    floors: Mapping[Any, float | None],
) -> list[str]:
    lines = [["", "samples", _name(protocol), "KID x 1000", "precision", "recall"]]
    for title, rows in groups:
        name = title
        for found in rows:
            lines.append([name, *_cells(found)])
            name = ""
        floor = floors.get(rows[0].time)
        if floor is not None:
            lines.append(["", "floor", number(floor), "", "", ""])
    return list(aligned(lines))


def _mean(mean: Mean) -> str:
    """With its interval, where more than one value says something of it."""
    return number(mean.value) if mean.count == 1 else f"{number(mean.value)} ± {number(mean.half_width, 2)}"


def _pictures(named: Sequence[tuple[str, Tensor]], *, shown: int = 10) -> list[str]:
    """Rows of pictures, of those sets that have any."""
    cells: list[str] = []
    for name, images in named:
        if images.dim() == 4 and len(images):
            pictures = [page.picture(image.float() / 255, name) for image in images[:shown]]
            cells += [page.row_name(name), page.strip(pictures, columns=shown)]
    return [page.heading("Pictures"), page.rows(cells, "The first of each set, not chosen.")] if cells else []


def _steering_cards(evaluation: SteeringEvaluation) -> Iterator[tuple[str, str]]:
    for reward in evaluation.rewards:
        steered = [found for found in evaluation.of(reward) if found.family != "best_of_n"]
        if steered:
            best = max(steered, key=lambda found: found.means[reward].value)
            yield number(best.means[reward].value), f"{reward}: highest mean, {best.label}, {best.nfe:,.0f} calls"
        groups = [found for found in evaluation.of(reward) if found.family == "best_of_n"]
        if groups:
            largest = max(groups, key=lambda found: found.nfe)
            yield number(largest.means[reward].value), f"{reward}: {largest.label}, {largest.nfe:,.0f} calls"


def _steered_section(evaluation: SteeringEvaluation, reward: str) -> Iterator[str]:
    scores = evaluation.of(reward)
    yield page.heading(reward, anchor=reward)
    multipliers = evaluation.protocol.multipliers or [1.0]
    yield page.charts(
        [_steering_chart(evaluation, reward, multiplier) for multiplier in multipliers],
        "Mean reward over calls for one image, with 95 percent intervals; the dotted line is the mean of unsteered "
        "samples. Search and Best-of-N know no λ and are the same in every chart"
        + ("; where gradients are rescaled, so are DPS and MFM-G of one draw." if _rescales(evaluation) else "."),
    )
    header = [
        "method",
        "calls",
        *(f"<b>{text(name)}</b>" if name == reward else text(name) for name in evaluation.rewards),
    ]
    lines = [
        [text(found.label), f"{found.nfe:,.0f}", *(_mean(found.means[name]) for name in evaluation.rewards)]
        for found in [evaluation.unsteered, *scores]
    ]
    yield page.table(header, lines)
    shown = [("Unsteered", evaluation.unsteered.images), *((found.label, found.images) for found in scores)]
    cells: list[str] = []
    for name, images in shown:
        if images.dim() == 4 and len(images):
            strip = page.strip([page.picture(image.float() / 255, name) for image in images], columns=10)
            cells += [page.row_name(name), strip]
    if cells:
        yield page.unfold("Pictures", page.rows(cells, "The first images of each method, not chosen, of equal seeds."))


def _rescales(evaluation: SteeringEvaluation) -> bool:
    preset = evaluation.protocol.preset
    return preset is not None and PRESETS[preset].rescale


def _steering_chart(evaluation: SteeringEvaluation, reward: str, multiplier: float) -> str:
    suffix = f"_l{multiplier:g}"
    lines: list[charts.Line] = []
    for family, label in {**FAMILIES, "best_of_n": "Best-of-N"}.items():
        rows = [
            found
            for found in evaluation.of(reward)
            if found.family == family and (family in ("search", "best_of_n") or found.key.endswith(suffix))
        ]
        if rows:
            lines.append(_reward_line(sorted(rows, key=lambda found: found.nfe), reward, label, _COLOURS[family]))
    return charts.curves(
        lines,
        title=f"λ = {multiplier:g}",
        x_label="network and reward calls for one image",
        y_label="mean reward",
        log_x=True,
        marker="o",
        reference=evaluation.unsteered.means[reward].value,
    )


def _reward_line(rows: Sequence[SteeredScore], reward: str, label: str, colour: str) -> charts.Line:
    means = [found.means[reward] for found in rows]
    band = ([mean.value - mean.half_width for mean in means], [mean.value + mean.half_width for mean in means])
    return charts.Line([found.nfe for found in rows], [mean.value for mean in means], label, colour, band=band)


def _tuning_chart(evaluation: TuningEvaluation, name: str) -> str:
    lines = []
    for number_of, run in enumerate(evaluation.runs):
        curve = run.curve(name)
        if curve:
            means = [mean for _, mean in curve]
            band = ([mean.value - mean.half_width for mean in means], [mean.value + mean.half_width for mean in means])
            colour = _ORDER[number_of % len(_ORDER)]
            lines.append(charts.Line([x for x, _ in curve], [m.value for m in means], run.title, colour, band=band))
    title = "Tuned reward" if name == "reward" else name.replace("judge.", "Held out: ").replace("_", " ")
    return charts.curves(lines, title=title, x_label="optimiser steps", y_label="mean", marker="o")
