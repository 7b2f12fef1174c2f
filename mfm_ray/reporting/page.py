"""Pieces of an HTML page: every function returns markup, every text given to it is escaped unless it says markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from mfm_ray.reporting.pictures import data_uri, pixels, png
from mfm_ray.reporting.style import CSS


def page(title: str, body: Iterable[str]) -> str:
    """The whole document: one file, no requests to anywhere (and none allowed)."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">",
            f"<title>{text(title)}</title>",
            f"<style>{CSS}</style></head><body><main>",
            *body,
            "</main></body></html>",
            "",
        ]
    )


def text(value: object) -> str:
    return html.escape(str(value))


def paragraph(*sentences: str, lede: bool = False) -> str:
    """Sentences are markup, so that they may hold <b> and <code>."""
    kind = ' class="lede"' if lede else ""
    return f"<p{kind}>{' '.join(sentences)}</p>"


def heading(title: str, *, level: int = 2, anchor: str | None = None) -> str:
    place = f' id="{text(anchor)}"' if anchor else ""
    return f"<h{level}{place}>{text(title)}</h{level}>"


def cards(items: Sequence[tuple[str, str]]) -> str:
    """Large figures with a line about each."""
    inner = "".join(
        f'<div class="card"><b>{text(figure)}</b><span>{text(about)}</span></div>' for figure, about in items
    )
    return f'<div class="cards">{inner}</div>'


def charts(svgs: Sequence[str], caption: str, *, wide: bool = False) -> str:
    """Charts side by side where there is room, wide ones below each other; the caption is markup."""
    kind = "charts wide" if wide else "charts single" if len(svgs) == 1 else "charts"
    inner = "".join(f"<div>{svg}</div>" for svg in svgs)
    return f'<figure><div class="{kind}">{inner}</div><figcaption>{caption}</figcaption></figure>'


def picture(image: Tensor, about: str, *, visible: Tensor | None = None) -> str:
    """An image (C, H, W) in [0, 1]; `about` is shown when it is pointed at, and read aloud."""
    source = data_uri(png(pixels(image, visible=visible)))
    return f'<img class="px" src="{source}" alt="{text(about)}" title="{text(about)}">'


def strip(pictures: Sequence[str], *, columns: int, wrap: bool = False) -> str:
    """Pictures in a row of `columns`; with `wrap` ten in a row on a phone."""
    kind = "strip wrap" if wrap else "strip"
    return f'<div class="{kind}" style="--n:{columns}">{"".join(pictures)}</div>'


def row_name(name: str, about: str = "", *, family: str | None = None) -> str:
    dot = f'<span class="dot {family}"></span>' if family else ""
    small = f"<small>{text(about)}</small>" if about else ""
    return f'<div class="name">{dot}{text(name)}{small}</div>'


def rows(cells: Sequence[str], caption: str, *, kind: str = "") -> str:
    """Named rows of pictures; cells alternate between names and strips, the caption is markup."""
    inner = "".join(cells)
    return f'<figure><div class="rows {kind}">{inner}</div><figcaption>{caption}</figcaption></figure>'


RULE = '<div class="rule"></div>'


def table(header: Sequence[str], lines: Sequence[Sequence[str]], *, best: Sequence[int] = ()) -> str:
    """Cells are markup; the lines numbered in `best` are set in bold."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=best' if number in best else ''}>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>"
        for number, line in enumerate(lines)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def definitions(items: Sequence[tuple[str, str, str]]) -> str:
    """(family, name, markup) of each method."""
    inner = "".join(
        f'<dt><span class="dot {family}"></span>{text(name)}</dt><dd>{about}</dd>' for family, name, about in items
    )
    return f'<dl class="methods">{inner}</dl>'


def unfold(summary: str, inner: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{inner}</details>"


def settings_table(values: Mapping[str, object]) -> str:
    lines = [[f"<code>{text(key)}</code>", f"<code>{text(value)}</code>"] for key, value in values.items()]
    return table(["setting", "value"], lines)


def number(value: float, digits: int = 3) -> str:
    """A figure with `digits` significant digits, a real minus sign and thousands separated."""
    if abs(value) >= 1000:
        shown = f"{value:,.0f}"
    else:
        shown = f"{value:.{digits}g}"
        if "e" in shown:
            shown = f"{value:.{digits}f}"
    return shown.replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
