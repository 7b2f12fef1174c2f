"""Charts as inline SVG whose colours are CSS variables, so that one figure suits light and dark pages and any zoom.

Figures are drawn small (a phone's width) and laid out side by side by the page. Matplotlib draws, without pyplot and
without global state.
"""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib import transforms as mtransforms
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Stand-ins that no other colour equals; the page replaces them by its variables.
COLOURS = {
    "ink": "#010203",
    "muted": "#040506",
    "line": "#070809",
    "unsteered": "#0a0b0c",
    "best_of_n": "#0d0e0f",
    "mfm_g": "#101112",
    "mfm_gf": "#131415",
    "resampling": "#191a1b",
    "accent": "#161718",
}
_POINTS_A_LETTER = 4.7  # of a name at 8.5 points
_SPREAD = 5.0
_WIDTH, _HEIGHT = 4.3, 3.1  # inches; a point is 1/72 of one
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mfm-ray",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "text.color": COLOURS["ink"],
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["muted"],
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Dot:
    """One method in a chart: where it stands, its deviation upwards and downwards (x_spread: sideways), its name."""

    x: float
    y: float
    label: str
    family: str
    spread: float = 0.0
    x_spread: float = 0.0


@dataclass(frozen=True)
class Line:
    """A named curve; band: lower and upper ends of an interval around it, drawn as a shade; marker: of its own."""

    x: Sequence[float]
    y: Sequence[float]
    label: str
    family: str
    dashed: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None
    marker: str = ""


def curves(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log: bool = False,
    log_x: bool = False,
    x_ticks: Sequence[float] = (),
    marker: str = "",
    reference: float | None = None,
    wide: bool = False,
) -> str:
    """Curves over a common axis; `log` for the y axis, `log_x` for the other; `reference` is a dotted level; x_ticks:
    where the x axis is marked, where Matplotlib's own choice is not wanted.

    A log y axis of values that are all negative is one of their size, up still being better. wide: a chart for a
    whole line of the page with its legend beside it.
    """
    with _drawing(width=2 * _WIDTH if wide else _WIDTH, height=1.15 * _HEIGHT if wide else _HEIGHT) as (figure, axes):
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                color=COLOURS[line.family],
                label=line.label,
                linewidth=1.8,
                linestyle="--" if line.dashed else "-",
                marker=line.marker or marker or None,
                markersize=5,
            )
            if line.band is not None:
                axes.fill_between(line.x, *line.band, color=COLOURS[line.family], alpha=0.15, linewidth=0)
        values = [y for line in lines for y in line.y] + ([] if reference is None else [reference])
        if log and max(values) < 0:
            _log_of_size(axes)
            _log_reward_ticks(axes, values)
        elif log:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(_plain))
            _thin_log_ticks(axes, values)
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(_plain))
            axes.xaxis.set_minor_formatter(NullFormatter())
        if len(x_ticks):
            axes.set_xticks(list(x_ticks))
            axes.set_xticks([], minor=True)
        if reference is not None:
            axes.axhline(reference, color=COLOURS["muted"], linestyle=(0, (1, 2)), linewidth=1.2)
        axes.grid(axis="y")
        _label(axes, title, x_label, y_label)
        if wide:
            figure.legend(loc="outside right center")
        elif len(lines) > 1:
            axes.legend(loc="best")
        return _svg(figure, title)


def reward_against_calls(dots: Sequence[Dot], *, title: str, reference: float | None = None) -> str:
    """Mean reward (up is better) against network calls for one image, on a log axis; Best-of-n joined by a line.

    Rewards that are all negative are spread on a log scale of their size. `reference` is drawn as a dashed line.
    """
    with _drawing() as (figure, axes):
        values = [dot.y for dot in dots] + ([] if reference is None else [reference])
        is_log = spans_sizes(values)
        if is_log:
            _log_of_size(axes)
        chain = sorted((dot for dot in dots if dot.family == "best_of_n"), key=lambda dot: dot.x)
        axes.plot([d.x for d in chain], [d.y for d in chain], color=COLOURS["best_of_n"], linewidth=1.5, zorder=2)
        for dot in dots:
            axes.scatter([dot.x], [dot.y], s=_size(dot), color=COLOURS[dot.family], zorder=3, linewidths=0)
        if reference is not None:
            axes.axhline(reference, color=COLOURS["muted"], linestyle=(0, (4, 3)), linewidth=1)
        axes.set_xscale("log")
        low, high = min(dot.x for dot in dots), max(dot.x for dot in dots)
        axes.set_xlim(low / 1.8, high * 6)
        axes.xaxis.set_major_locator(LogLocator(base=10))
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if is_log:
            _log_reward_ticks(axes, values)
        else:
            span = (max(values) - min(values)) or 1.0
            axes.set_ylim(min(values) - 0.12 * span, max(values) + 0.12 * span)
        _name_dots(axes, dots)
        axes.grid(axis="y")
        _label(axes, title, "network and reward calls for one image", "mean reward")
        return _svg(figure, title)


def pareto(
    dots: Sequence[Dot],
    front: Sequence[tuple[float, float]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> str:
    """Trials with the deviation of y, and the points of a front joined by a line; dots with a name carry it."""
    with _drawing() as (figure, axes):
        if front:
            axes.plot(*zip(*front, strict=True), color=COLOURS["mfm_g"], linewidth=1.5, zorder=2)
        for dot in dots:
            colour = COLOURS[dot.family]
            axes.errorbar([dot.x], [dot.y], [dot.spread], [dot.x_spread], color=colour, linewidth=1, zorder=2)
            axes.scatter([dot.x], [dot.y], s=34, color=colour, zorder=3, linewidths=0)
            if dot.label:
                axes.annotate(dot.label, (dot.x, dot.y), (6, 6), textcoords="offset points", fontsize=9, zorder=4)
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(_plain))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xticks(_log_ticks([dot.x for dot in dots]))
        axes.margins(x=0.12)
        axes.grid(axis="y")
        _label(axes, title, x_label, y_label)
        return _svg(figure, title)


def spans_sizes(values: Sequence[float]) -> bool:
    """Whether values are all negative and spread so far that a log scale of their size shows them better."""
    return max(values) < 0 and min(values) / max(values) > _SPREAD


def confidence_against_reward(dots: Sequence[Dot], *, title: str) -> str:
    """Does it still look like a digit? Mean confidence of the judge (y) for each method (x in the order given)."""
    with _drawing() as (figure, axes):
        for place, dot in enumerate(reversed(dots)):
            axes.plot([0, dot.y], [place, place], color=COLOURS["line"], linewidth=1, zorder=1)
            axes.scatter([dot.y], [place], s=_size(dot), color=COLOURS[dot.family], zorder=3, linewidths=0)
            axes.annotate(
                f"{dot.y:.2f}", (dot.y, place), (7, 0), textcoords="offset points", va="center", fontsize=9
            ).set_color(COLOURS["muted"])
        axes.set_yticks(range(len(dots)), [dot.label for dot in reversed(dots)])
        axes.tick_params(axis="y", length=0)
        low = min(dot.y for dot in dots)
        axes.set_xlim(max(0.0, min(0.7, low - 0.08)), 1.06)
        axes.set_xticks([tenth / 10 for tenth in range(int(10 * min(0.7, low - 0.08)) + 1, 11)])
        axes.spines["left"].set_visible(False)
        _label(axes, title, "mean confidence of the judge", "")
        return _svg(figure, title)


def grouped_bars(
    groups: Sequence[str], series: Sequence[tuple[str, str, Sequence[float]]], *, title: str, y_label: str, x_label: str
) -> str:
    """Bars for each group (x) and series (label, family, values); the first series is drawn as outlines behind."""
    with _drawing() as (figure, axes):
        (label, family, values), *others = series
        axes.bar(
            range(len(groups)),
            values,
            width=0.86,
            label=label,
            facecolor="none",
            edgecolor=COLOURS[family],
            linewidth=1.4,
        )
        width = 0.7 / max(1, len(others))
        for place, (label, family, values) in enumerate(others):
            offset = (place - (len(others) - 1) / 2) * width
            x = [group + offset for group in range(len(groups))]
            axes.bar(x, values, width=0.86 * width, label=label, color=COLOURS[family])
        axes.set_xticks(range(len(groups)), groups)
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, 1.5 * max(value for _, _, values in series for value in values))
        axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 1.0])
        axes.legend(loc="upper right")
        axes.grid(axis="y")
        _label(axes, title, x_label, y_label)
        return _svg(figure, title)


def scatter(clouds: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], *, title: str, limit: float) -> str:
    """Points in the plane by (label, family, points), later clouds on top, within +-limit."""
    with _drawing() as (figure, axes):
        for label, family, points in clouds:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=3, color=COLOURS[family], alpha=0.55, linewidths=0, label=label)
        axes.set_xlim(-limit, limit)
        axes.set_ylim(-limit, limit)
        axes.set_aspect("equal")
        axes.legend(loc="upper left", markerscale=3)
        _label(axes, title, "", "")
        return _svg(figure, title)


def agreement(
    clouds: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], *, title: str, x_label: str, y_label: str
) -> str:
    """Points by (label, family, points) on equal axes around the line where both sides agree; later clouds on top."""
    with _drawing() as (figure, axes):
        for label, family, points in clouds:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=9, color=COLOURS[family], alpha=0.6, linewidths=0, label=label)
        values = [value for _, _, points in clouds for point in points for value in point]
        margin = 0.04 * (max(values) - min(values)) or 1.0
        limits = (min(values) - margin, max(values) + margin)
        axes.plot(limits, limits, color=COLOURS["muted"], linestyle=(0, (1, 2)), linewidth=1.2, zorder=0)
        axes.set_xlim(limits)
        axes.set_ylim(limits)
        axes.set_aspect("equal")
        axes.legend(loc="best", markerscale=1.6, handletextpad=0.1)
        _label(axes, title, x_label, y_label)
        return _svg(figure, title)


@contextmanager
def _drawing(*, width: float = _WIDTH, height: float = _HEIGHT) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def _label(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, pad=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def _size(dot: Dot) -> float:
    return 70 if dot.family in ("mfm_g", "mfm_gf") else 42


def _name_dots(axes: Axes, dots: Sequence[Dot]) -> None:
    """A name beside each dot, where it hides neither dots nor names already written (greedy, in points)."""
    figure = axes.get_figure()
    assert figure is not None
    figure.draw_without_rendering()  # type: ignore[union-attr]  # the layout is known from here on
    points = [axes.transData.transform((dot.x, dot.y)) * 72 / figure.dpi for dot in dots]
    frame = axes.get_window_extent().transformed(mtransforms.Affine2D().scale(72 / figure.dpi))
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for line in axes.lines:
        ends = line.get_transform().transform(line.get_xydata()) * 72 / figure.dpi
        for start, end in itertools.pairwise(ends):
            along = [start + (end - start) * step / 40 for step in range(41)]
            taken += [(x - 1.5, y - 1.5, x + 1.5, y + 1.5) for x, y in along]
    for dot, (x, y) in zip(dots, points, strict=True):
        wide = _POINTS_A_LETTER * len(dot.label)
        places = [(x + 8, y - 4), (x - 8 - wide, y - 4), (x - wide / 2, y + 7), (x - wide / 2, y - 15)]
        places += [(x + 8, y + 6), (x + 8, y - 14), (x - 8 - wide, y + 6), (x - 8 - wide, y - 14)]
        boxes = [(left, low, left + wide, low + 9) for left, low in places]
        cost = [
            sum(_overlap(box, other) for other in taken)
            + 1000 * (box[0] < frame.x0 or box[2] > frame.x1 + 4 or box[1] < frame.y0 or box[3] > frame.y1)
            for box in boxes
        ]
        best = cost.index(min(cost))
        taken.append(boxes[best])
        offset = (places[best][0] - x, places[best][1] - y)
        note = axes.annotate(dot.label, (dot.x, dot.y), offset, textcoords="offset points", fontsize=8.5, zorder=4)
        note.set_color(COLOURS[dot.family])


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area that two boxes (left, low, right, high) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _log_of_size(axes: Axes) -> None:
    """A scale for negative values: logarithmic in their size, the smallest size at the top."""
    axes.set_yscale("function", functions=(lambda y: -_log(-y), lambda z: -np.exp(-z)))


def _log_reward_ticks(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    axes.set_ylim(low * 1.8, high / 1.8)
    ticks = [-step * 10.0**power for power in range(-3, 7) for step in (1, 3)]
    axes.set_yticks([tick for tick in ticks if low * 1.8 <= tick <= high / 1.8])
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))


def _thin_log_ticks(axes: Axes, values: Sequence[float]) -> None:
    axes.set_yticks(_log_ticks(values))


def _log_ticks(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    steps = (1, 2, 5) if high / low < 100 else (1,)
    ticks = [step * 10.0**power for power in range(-6, 7) for step in steps]
    return [tick for tick in ticks if 0.8 * low <= tick <= 1.25 * high]


def _plain(value: float, _: object = None) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _log(value: Any) -> Any:
    return np.log(np.maximum(value, 1e-12))


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" class="chart" ', 1)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name.replace('_', '-')})")
    return re.sub(r"\n\s*", "\n", text)
