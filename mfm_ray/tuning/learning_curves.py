"""Metrics of all trials over their fidelity: what early stopping saw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mfm_ray.reporting import charts, page
from mfm_ray.tuning.sweep import TrialRecord

_FAMILIES = {"ok": "unsteered", "pruned": "muted"}


def learning_curves(
    records: Sequence[TrialRecord], metrics: Sequence[str], *, fidelity: str, best: Sequence[int]
) -> Iterator[str]:
    """A section with one chart a metric, a line a trial; `best` trials stand out. Nothing before the second report."""
    svgs = []
    for metric in metrics:
        lines = [_line(record, metric, fidelity, best) for record in records if len(_points(record, metric)) > 1]
        lines.sort(key=lambda line: (line.family == "mfm_g", not line.dashed))
        if lines:
            svgs.append(charts.curves(_named_once(lines), title=metric, x_label=fidelity, y_label=metric, wide=True))
    if svgs:
        yield page.heading("Learning curves")
        yield page.charts(
            svgs, "A line a trial; dashed ones were pruned, the coloured ones are on the front.", wide=True
        )


def _points(record: TrialRecord, metric: str) -> list[Mapping[str, float]]:
    return [reported for reported in record.history if metric in reported]


def _line(record: TrialRecord, metric: str, fidelity: str, best: Sequence[int]) -> charts.Line:
    reports = _points(record, metric)
    is_best = record.index in best
    label = "on the front" if is_best else "pruned" if record.status == "pruned" else "others"
    return charts.Line(
        [reported[fidelity] for reported in reports],
        [reported[metric] for reported in reports],
        label,
        "mfm_g" if is_best else _FAMILIES.get(record.status, "muted"),
        dashed=record.status == "pruned",
        marker="o",
    )


def _named_once(lines: Sequence[charts.Line]) -> list[charts.Line]:
    """A legend entry a kind of line; matplotlib leaves out labels that begin with an underscore."""
    from dataclasses import replace

    seen: set[Any] = set()
    named = []
    for line in lines:
        named.append(replace(line, label=f"_{line.label}") if line.label in seen else line)
        seen.add(line.label)
    return named
