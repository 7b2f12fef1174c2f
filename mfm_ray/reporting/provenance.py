"""Where a report comes from, and the section that says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mfm_ray.reporting import page
from mfm_ray.reporting.page import duration, text


@dataclass(frozen=True)
class Provenance:
    """Where a report comes from. history: lines of metrics.jsonl; settings: flat configuration; facts: name to text."""

    command: str
    versions: Mapping[str, object]
    settings: Mapping[str, object]
    facts: Mapping[str, str] = field(default_factory=dict)
    history: Sequence[Mapping[str, float]] = ()
    train_seconds: float | None = None
    total_seconds: float | None = None


def making_section(provenance: Provenance, seconds: Mapping[str, float]) -> Iterator[str]:
    """Command, versions, settings; seconds: of each stage of the evaluation."""
    yield page.heading("How this page was made")
    yield f"<pre>{text(provenance.command)}</pre>"
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions.items() if version)
    total = "" if provenance.total_seconds is None else f" All in all it took {duration(provenance.total_seconds)}."
    yield page.paragraph(text(f"Versions: {versions}.{total}"))
    for name, fact in provenance.facts.items():
        yield page.paragraph(f"{text(name).capitalize()}: {text(fact)}.")
    stages = {name: f"{spent:.1f} s" for name, spent in seconds.items()}
    yield page.unfold("Seconds of each stage of the evaluation", page.settings_table(stages))
    yield page.unfold("Settings", page.settings_table(provenance.settings))
    yield "<footer>All numbers behind the figures are in data.parquet beside this file.</footer>"
