"""What comes out: sections of rows, as Markdown for people and as JSON beside it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.on_device.timing import Spread

Row = dict[str, Any]
"""Figures by key: numbers, `Spread`s, texts; None where there is none."""

_GPU_FACTS = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


@dataclass(frozen=True)
class Column:
    """A key of the rows, its heading, and how a figure of it is written."""

    key: str
    heading: str
    write: Callable[[Any], str] = str


@dataclass
class Section:
    """A table and what has to be said about it. `name` is its key in the JSON."""

    name: str
    title: str
    columns: Sequence[Column]
    notes: Sequence[str] = ()
    rows: list[Row] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", *(f"{note}\n" for note in self.notes)]
        lines.append("| " + " | ".join(column.heading for column in self.columns) + " |")
        lines.append("|" + "---|" * len(self.columns))
        lines += ["| " + " | ".join(self._cells(row)) + " |" for row in self.rows]
        return "\n".join([*lines, ""])

    def _cells(self, row: Row) -> list[str]:
        figures = [row.get(column.key) for column in self.columns]
        return [
            "–" if figure is None else column.write(figure).replace("|", "\\|")
            for column, figure in zip(self.columns, figures, strict=True)
        ]


@dataclass
class Report:
    """Where and with what command it was measured, and the sections so far."""

    facts: Mapping[str, Any]
    sections: list[Section] = field(default_factory=list)
    complete: bool = False

    def markdown(self) -> str:
        facts = [f"- {name}: {value}" for name, value in self.facts.items() if name != "command"]
        parts = [f"# {self.facts['device']}", "", *facts, ""]
        if not self.complete:
            parts += ["**Incomplete: the run had not ended when this was written.**", ""]
        parts += [section.markdown() for section in self.sections]
        return "\n".join([*parts, f"Made by `{self.facts['command']}`.", ""])

    def as_json(self) -> str:
        sections = {section.name: [_plain(row) for row in section.rows] for section in self.sections}
        return json.dumps({**self.facts, "complete": self.complete, "sections": sections}, indent=1) + "\n"

    def write(self, path: Path) -> None:
        """The Markdown file, and the JSON beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.markdown())
        path.with_suffix(".json").write_text(self.as_json())


def _plain(row: Row) -> Row:
    return {key: asdict(value) if isinstance(value, Spread) else value for key, value in row.items()}


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(value: Spread) -> str:
    return f"{number(value.median)} ({number(value.low)} to {number(value.high)})"


def milliseconds(value: Spread) -> str:
    return spread(Spread(1e3 * value.median, 1e3 * value.low, 1e3 * value.high))


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def gibibytes(value: float) -> str:
    return f"{value / 2**30:.2f}"


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, memory, software, and what the driver tells of itself and of the clocks just now."""
    if device.type != "cuda":
        return {"device": "CPU", "threads": torch.get_num_threads(), "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "multiprocessors": properties.multi_processor_count,
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        **driver_facts(properties),
    }


def driver_facts(properties: Any) -> dict[str, str]:
    """Driver, clocks and power limit as nvidia-smi has them; empty where it is missing or silent."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={_GPU_FACTS}", "--format=csv,noheader", f"--id=GPU-{properties.uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return {}
    values = done.stdout.strip().split(", ")
    names = _GPU_FACTS.replace(".", " ").replace("_", " ").split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def slug(name: str) -> str:
    """A device's name as part of a file's: nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
