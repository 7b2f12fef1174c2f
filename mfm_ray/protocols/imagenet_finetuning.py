"""protocol=imagenet_finetuning: the reward that models were tuned to, and those they were not, over the steps.

Reads what fine-tuning runs wrote: `evaluation.*` of their metrics.jsonl (`jobs.finetune evaluate_every=...`).
"""
# ruff: noqa: RUF009 (`setting` only wraps dataclasses.field, it makes no shared default)

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mfm_ray.errors import InputError
from mfm_ray.metrics import Mean
from mfm_ray.protocols.imagenet import figures_parquet
from mfm_ray.settings import setting
from mfm_ray.storage import Storage

METRICS, RUN = "metrics.jsonl", "run.json"
_PREFIX, _TUNED, _HELD_OUT = "evaluation.", "reward", "judge."


@dataclass(frozen=True, kw_only=True)
class ImagenetFinetuningProtocol:
    """Settings of the evaluation; the defaults stand in conf/protocol/imagenet_finetuning.yaml."""

    name: str = setting("the protocol")
    runs: list[str] = setting("folders or URIs of fine-tuning runs, one for each lambda")

    def check(self) -> None:
        """InputError for no runs and for the same one twice."""
        if not self.runs or len(set(self.runs)) != len(self.runs):
            raise InputError(f"protocol.runs={self.runs}: expected at least one fine-tuning run, each once")


@dataclass(frozen=True)
class TuningRun:
    """What a run wrote. title: its name, and lambda where it says it; lines: figures of its evaluations, by step."""

    title: str
    reward: str
    samples: int
    lines: tuple[Mapping[str, float], ...]

    def curve(self, name: str) -> list[tuple[float, Mean]]:
        """(step, mean with its interval) of a figure with a standard error beside it."""
        return [
            (line["step"], Mean(line[name], 1.96 * line[f"{name}_error"], self.samples))
            for line in self.lines
            if name in line and f"{name}_error" in line
        ]

    @property
    def names(self) -> list[str]:
        """The tuned reward's figure first, then held-out ones, then what else has an error."""
        found = {name for line in self.lines for name in line if f"{name}_error" in line}
        return sorted(found, key=lambda name: (name != _TUNED, not name.startswith(_HELD_OUT), name))


@dataclass(frozen=True)
class TuningEvaluation:
    """All that the report shows."""

    protocol: ImagenetFinetuningProtocol
    runs: tuple[TuningRun, ...]
    seconds: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Flat names to numbers: `runs.0.reward.first`, `.last`, `.last_half_width`, `.last_step`."""
        named: dict[str, float] = {}
        for number, run in enumerate(self.runs):
            for name in run.names:
                curve, base = run.curve(name), f"runs.{number}.{name}"
                named[f"{base}.first"] = curve[0][1].value
                named[f"{base}.last"] = curve[-1][1].value
                named[f"{base}.last_half_width"] = curve[-1][1].half_width
                named[f"{base}.last_step"] = curve[-1][0]
        return named


def read_tuning_run(place: str) -> TuningRun:
    """InputError naming the run for what is no fine-tuning run, is damaged, or was not evaluated."""
    storage, where = Storage(place), f"protocol.runs={place}"
    for name in (METRICS, RUN):
        if not storage.is_file(name):
            raise InputError(f"{where}: {name} is missing, expected the folder of a jobs.finetune run")
    marker = storage.read_json(RUN)
    config = marker.get("config") if isinstance(marker, dict) and marker.get("job") == "finetune" else None
    if not isinstance(config, dict):
        raise InputError(f"{where}: expected a run of jobs.finetune")
    lines = []
    for number, text in enumerate(storage.read_bytes(METRICS).decode().splitlines(), start=1):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise InputError(f"{where}: line {number} of {METRICS} is not JSON") from error
        figures = {key.removeprefix(_PREFIX): value for key, value in found.items() if key.startswith(_PREFIX)}
        if "step" in figures:
            lines.append(figures)
    if not lines:
        raise InputError(f"{where}: holds no evaluations, expected a run with evaluate_every above 0")
    multiplier = config.get("reward_multiplier")
    title = storage.name if multiplier is None else f"{storage.name}, λ = {multiplier:g}"
    by_step = {line["step"]: line for line in lines}  # a resumed run evaluates some steps again
    ordered = tuple(by_step[step] for step in sorted(by_step))
    reward = str((config.get("reward") or {}).get("name", "reward"))
    return TuningRun(title, reward, int(config.get("evaluate_samples", 0)), ordered)


def evaluate_imagenet_finetuning(
    protocol: ImagenetFinetuningProtocol,
    material: Sequence[TuningRun] | None,
    *,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> TuningEvaluation:
    """material: the runs, read already; None: they are read here. Nothing is drawn, so `seed` changes nothing."""
    began = time.monotonic()
    runs = tuple(material) if material is not None else tuple(read_tuning_run(place) for place in protocol.runs)
    return TuningEvaluation(protocol, runs, {"reading": time.monotonic() - began})


def imagenet_finetuning_parquet(evaluation: TuningEvaluation) -> bytes:
    return figures_parquet(
        [
            {
                "section": "finetuning",
                "reward": run.reward,
                "method": run.title,
                "x": step,
                "quantity": name,
                "value": mean.value,
                "half_width": mean.half_width,
                "count": mean.count,
            }
            for run in evaluation.runs
            for name in run.names
            for step, mean in run.curve(name)
        ]
    )
