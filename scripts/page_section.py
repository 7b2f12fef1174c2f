"""A part of a page that a program writes: what stands between two comments with its name."""

from __future__ import annotations

from pathlib import Path


def replace_section(page: Path, name: str, text: str) -> None:
    """Puts `text` between `<!-- name -->` and `<!-- /name -->`. ValueError when the page has no such place."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, opened, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"{page}: has no {begin} ... {end}")
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")
