"""The page of a sweep: the front, its pictures, how each setting acts, and what the presets are."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mfm_ray.reporting import charts, page
from mfm_ray.reporting.page import number, text
from mfm_ray.reporting.pictures import data_uri
from mfm_ray.reporting.provenance import Provenance, making_section
from mfm_ray.storage import Storage
from mfm_ray.tuning.front import COSTS, HALF_WIDTH, Front, judge_names
from mfm_ray.tuning.importance import importance, is_number
from mfm_ray.tuning.kinds import SweptJob, swept_job
from mfm_ray.tuning.learning_curves import learning_curves
from mfm_ray.tuning.space import Point
from mfm_ray.tuning.sweep import TrialRecord

_PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
_MOST_TICKS = 8  # values of a setting that are all marked on its axis
_LABELS = {
    "nfe": "calls an image",
    "confidence": "classifier confidence",
    "posterior_score": "posterior score (energy)",
    "posterior_error": "posterior error (sliced W2)",
    "sample_distance": "distance to held-out data (sliced W2)",
    "frechet": "Fréchet distance",
    "frechet_distance": "Fréchet distance to training data",
    "drift_change": "change of the drift",
}


@dataclass(frozen=True)
class SweepResults:
    """A sweep that came to its end."""

    config: Any
    records: Sequence[TrialRecord]
    front: Front
    presets: Mapping[str, int]
    settings: Mapping[int, Mapping[str, Any]]

    @cached_property
    def job(self) -> SweptJob:
        return swept_job(self.config)

    @cached_property
    def finished(self) -> list[TrialRecord]:
        return [record for record in self.records if record.status == "ok"]

    @cached_property
    def metrics(self) -> dict[int, dict[str, float]]:
        return {record.index: record.metrics for record in self.finished}

    def names_of(self, index: int) -> str:
        """The presets that a trial is."""
        return ", ".join(name for name, chosen in self.presets.items() if chosen == index)

    @cached_property
    def points(self) -> dict[int, Point]:
        return {record.index: record.point for record in self.records}


def sweep_report(results: SweepResults, run: Storage, facts: Mapping[str, Any]) -> str:
    """The whole page. facts: command, versions, settings, seconds."""
    provenance = Provenance(
        command=facts["command"],
        versions=facts["versions"],
        settings=facts["settings"],
        facts={"all numbers": "results.parquet beside this file, a row a trial"},
        total_seconds=facts["seconds"],
    )
    body = [
        *_opening(results),
        *_front_section(results),
        *_pictures(results, run),
        *_curves(results),
        *_responses(results),
        *_preset_section(results, run),
        *_failures(results),
        *making_section(provenance, {"sweep": facts["seconds"]}),
    ]
    return page.page(f"Sweep {results.config.sweep}", body)


def _opening(results: SweepResults) -> Iterator[str]:
    config, front = results.config, results.front
    yield '<header><p class="kicker">mfm-ray &middot; sweep</p>'
    yield f"<h1>{text(config.sweep)}</h1>"
    yield page.paragraph(text(results.job.about(config, len(results.records))), lede=True)
    yield "</header>"
    pruned = sum(record.status == "pruned" for record in results.records)
    yield page.cards(
        [
            (str(len(front.trials)), "trials on the front"),
            (number(front.hypervolume, 3), "hypervolume: share of the box between worst and best"),
            (str(pruned), "trials pruned before their end"),
            (str(len(front.hacked)), "trials whose judge fell while the reward rose"),
        ]
    )


def _front_section(results: SweepResults) -> Iterator[str]:
    yield page.heading("The front")
    names = list(results.front.objectives)
    first, others = names[0], names[1:] or [results.job.cost]
    yield page.charts(
        [_front_chart(results, first, other) for other in dict.fromkeys([*others, *_compared(results)[1:]])],
        "Finished trials with 95 percent intervals; those on the front are joined where the front has two objectives. "
        "Orange: the judge is clearly worse than that of a clearly less rewarded trial.",
    )
    yield page.table(
        ["", "trial", *(_heads(results)), *(text(label(name)) for name in _compared(results))],
        [_front_line(results, index) for index in results.front.trials],
    )


def _front_chart(results: SweepResults, first: str, other: str) -> str:
    dots = [
        charts.Dot(
            row[other],
            row[first],
            results.names_of(index),
            _family(results, index),
            row.get(first + HALF_WIDTH, 0.0),
            row.get(other + HALF_WIDTH, 0.0),
        )
        for index, row in results.metrics.items()
        if other in row and first in row
    ]
    joined = [(results.metrics[index].get(other, 0.0), results.metrics[index][first]) for index in results.front.trials]
    return charts.pareto(
        dots,
        sorted(joined) if set(results.front.objectives) == {first, other} else [],
        title=f"{label(first)} against {label(other)}",
        x_label=label(other),
        y_label=label(first),
        log_x=other in COSTS,
    )


def _family(results: SweepResults, index: int) -> str:
    if index in results.front.hacked:
        return "best_of_n"
    return "mfm_g" if index in results.front.trials else "unsteered"


def _front_line(results: SweepResults, index: int) -> list[str]:
    row, point = results.metrics[index], results.points[index]
    return [
        f"<b>{results.names_of(index)}</b>",
        str(index),
        *(text(_value(point.get(key, ""))) for key in results.config.space),
        *(_figure(row, name) for name in _compared(results)),
    ]


def _heads(results: SweepResults) -> Iterator[str]:
    """The settings by the last part of their key, where that is enough to tell them apart."""
    last = {key: key.rpartition(".")[2] for key in results.config.space}
    for key, short in last.items():
        name = short if list(last.values()).count(short) == 1 else key
        yield f'<span title="{text(key)}">{text(name)}</span>'


def _compared(results: SweepResults) -> list[str]:
    """The objectives, and what watches over them: a table of all metrics is wider than the page."""
    objectives = list(results.front.objectives)
    watching = judge_names(next(iter(results.metrics.values())), optimised=objectives[0])
    return list(dict.fromkeys([*objectives, *watching]))


def _shown(results: SweepResults) -> list[str]:
    """Metrics that some trial has, objectives first."""
    present = dict.fromkeys(name for row in results.metrics.values() for name in row)
    measured = [name for name in present if not name.endswith(HALF_WIDTH) and not name.startswith(results.job.hidden)]
    return list(dict.fromkeys([*results.front.objectives, *measured]))


def _figure(row: Mapping[str, float], name: str) -> str:
    if name not in row:
        return ""
    width = row.get(name + HALF_WIDTH)
    return number(row[name]) + (f" {_PLUS_MINUS} {number(width, 2)}" if width is not None else "")


def _value(value: Any) -> str:
    return number(value) if is_number(value) else str(value)


def label(name: str) -> str:
    """A metric in words."""
    return _LABELS.get(name, name)


def _curves(results: SweepResults) -> Iterator[str]:
    if results.job.has_curves:
        metrics = [name for name in results.front.objectives if name != results.job.cost]
        best = results.front.trials
        yield from learning_curves(results.records, metrics, fidelity=results.job.fidelity, best=best)


def _pictures(results: SweepResults, run: Storage) -> Iterator[str]:
    lines = []
    for index in results.front.trials:
        content = results.job.picture(run, index)
        if content is not None:
            source = data_uri(content)
            about = f"first samples of trial {index}"
            image = f'<img src="{source}" alt="{about}" title="{about}" style="width:100%;max-width:560px">'
            name, first = f"trial {index}", next(iter(results.front.objectives))
            cost = _figure(results.metrics[index], results.job.cost)
            lines.append([name, number(results.metrics[index][first]), cost, image])
    if lines:
        yield page.heading("Along the front")
        yield page.paragraph(results.job.paragraph)
        header = ["", text(label(next(iter(results.front.objectives)))), results.job.unit, "first samples"]
        yield page.table(header, lines)


def _responses(results: SweepResults) -> Iterator[str]:
    keys = [key for key in results.config.space if len({str(r.point.get(key)) for r in results.finished}) > 1]
    if not keys:
        return
    yield page.heading("What each setting does")
    for metric in results.front.objectives:
        numeric = [key for key in keys if all(is_number(r.point.get(key, 0)) for r in results.finished)]
        drawn = [_response_chart(results, key, metric) for key in numeric]
        if drawn:
            yield page.charts(drawn, f"Mean {text(label(metric))} over the other settings; the shade is their range.")
    yield page.paragraph(
        "Share of each objective's variance between trials that differ in one setting (eta squared; shares need not "
        "add up, and with few trials some of it is chance):"
    )
    shares = {
        metric: importance(
            [record.point for record in results.finished], [record.metrics[metric] for record in results.finished], keys
        )
        for metric in results.front.objectives
    }
    header = ["setting", *(text(label(metric)) for metric in shares)]
    yield page.table(header, [[text(key), *(f"{share[key]:.2f}" for share in shares.values())] for key in keys])


def _response_chart(results: SweepResults, key: str, metric: str) -> str:
    at: dict[float, list[float]] = {}
    for record in results.finished:
        if key in record.point:
            at.setdefault(float(record.point[key]), []).append(record.metrics[metric])
    x = sorted(at)
    y = [sum(at[value]) / len(at[value]) for value in x]
    band = ([min(at[value]) for value in x], [max(at[value]) for value in x])
    line = charts.Line(x, y, label(metric), "mfm_g", band=band, marker="o")
    is_wide = x[0] > 0 and x[-1] / x[0] >= 8
    is_cost = metric in COSTS and min(y) > 0 and max(y) / min(y) >= 8
    return charts.curves(
        [line],
        title=key,
        x_label=key,
        y_label=label(metric),
        log=is_cost,
        log_x=is_wide,
        x_ticks=x if is_wide and len(x) <= _MOST_TICKS else (),
    )


def _preset_section(results: SweepResults, run: Storage) -> Iterator[str]:
    yield page.heading("Presets")
    yield page.paragraph(
        "<b>low</b> is the cheapest trial of the front (with no cost among the objectives: the least of the first), "
        "<b>medium</b> its knee (closest to the best of every objective), <b>high</b> the best of the first objective, "
        "reward hackers left out."
    )
    lines = [
        [f"<b>{name}</b>", str(index), *(_figure(results.metrics[index], metric) for metric in _shown(results))]
        for name, index in results.presets.items()
    ]
    yield page.table(["", "trial", *(text(label(metric)) for metric in _shown(results))], lines)
    for name, index in results.presets.items():
        command = ["python", "-m", f"jobs.{results.config.job}", *results.job.model(results.config)]
        short = shlex.join([*command, f"preset={run.uri_of('presets.yaml')}#{name}"])
        whole = shlex.join([*command, *results.job.words(results.settings[index])])
        again = f"{name} again, with jobs.{results.config.job}"
        yield page.unfold(again, f"<pre>{text(short)}</pre><pre>{text(whole)}</pre>")


def _failures(results: SweepResults) -> Iterator[str]:
    failed = [record for record in results.records if record.reason]
    if failed:
        yield page.heading("Trials that failed")
        yield page.table(
            ["trial", "setting", "how", "why"],
            [[str(r.index), text(r.point), text(r.status), text(r.reason)] for r in failed],
        )
