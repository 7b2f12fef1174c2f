"""What a sweep leaves: results.parquet, pareto.json, presets.yaml, report.html."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mfm_ray.config import SweepConfig, to_yaml
from mfm_ray.storage import Storage
from mfm_ray.tuning.front import HALF_WIDTH, Front, choose_presets, find_front
from mfm_ray.tuning.kinds import swept_job
from mfm_ray.tuning.live import in_words
from mfm_ray.tuning.report import SweepResults, sweep_report
from mfm_ray.tuning.sweep import TrialRecord

RESULTS, FRONT, PRESETS, REPORT = "results.parquet", "pareto.json", "presets.yaml", "report.html"
Settings = Mapping[int, Mapping[str, Any]]


def write_outputs(
    run: Storage,
    config: Any,
    settings: Settings,
    records: Mapping[int, TrialRecord],
    *,
    facts: Mapping[str, Any],
    log: Callable[[str], None],
    models: Mapping[int, str] | None = None,
) -> dict[str, float]:
    """Writes the four files and returns the figures of the sweep.

    config: the root that was swept; facts: command, versions, git, settings, seconds; models: where those of trials
    are, for jobs that make any.
    """
    ordered = [records[index] for index in sorted(records)]
    finished = {record.index: record.metrics for record in ordered if record.status == "ok"}
    pruned = [record.metrics for record in ordered if record.status == "pruned"]
    front = find_front(finished, config.objectives, unfinished=pruned)
    if front is None:
        reasons = sorted({record.reason for record in ordered if record.reason})
        raise RuntimeError(f"no trial came to its end: {'; '.join(reasons)[:500]}")
    presets = choose_presets(finished, front)
    run.write_bytes(RESULTS, results_parquet(config, settings, ordered, front, facts, models=models))
    run.write_json(FRONT, {**asdict(front), "presets": presets, "metrics": {i: finished[i] for i in front.trials}})
    chosen = {name: _preset(records[index], settings[index], config) for name, index in presets.items()}
    run.write_bytes(PRESETS, to_yaml(chosen).encode())
    results = SweepResults(config=config, records=ordered, front=front, presets=presets, settings=settings)
    run.write_bytes(REPORT, sweep_report(results, run, facts).encode())
    log("\n".join(["", *_table(results), "", f"report: {run.uri_of(REPORT)}"]))
    return _figures(config, ordered, front, presets)


def results_parquet(
    config: Any,
    settings: Settings,
    records: list[TrialRecord],
    front: Front,
    facts: Mapping[str, Any],
    *,
    models: Mapping[int, str] | None = None,
) -> bytes:
    """One row a trial: point, status, metrics with half widths, the words of the swept job that rerun it."""
    rows = [
        {
            "trial": record.index,
            "status": record.status,
            "reason": record.reason,
            "on_front": record.index in front.trials,
            "reward_hacking": record.index in front.hacked,
            **{f"param.{key}": record.point.get(key) for key in config.space},
            **record.metrics,
            "seed": config.seed,
            "words": swept_job(config).words(settings[record.index]),
            **({} if models is None else {"model": models.get(record.index), "exploits": json.dumps(record.exploits)}),
            "worker": record.worker,
            "losses": record.losses,
            **{f"version.{name}": str(version) for name, version in facts["versions"].items()},
            "git": facts["git"],
        }
        for record in records
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: _column([row.get(name) for row in rows]) for name in names}), sink)
    return sink.getvalue().to_pybytes()


def _column(values: list[Any]) -> pa.Array:
    """Values of one kind as they are; of several kinds (2 and "auto") as JSON."""
    kinds = {
        float if isinstance(value, int | float) and not isinstance(value, bool) else type(value) for value in values
    }
    is_one = len(kinds - {type(None)}) <= 1 and dict not in kinds
    return pa.array(values if is_one else [json.dumps(value) for value in values])


def _preset(record: TrialRecord, settings: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """What the swept job with `preset=presets.yaml#name` goes by, and what was measured with it."""
    return {
        "trial": record.index,
        "sweep": config.sweep,
        "words": swept_job(config).words(settings),
        "measured": {**swept_job(config).measured_by(config), **record.metrics},
    }


def _figures(
    config: SweepConfig, records: list[TrialRecord], front: Front, presets: Mapping[str, int]
) -> dict[str, float]:
    job = swept_job(config)  # type: ignore[arg-type]
    by_index = {record.index: record for record in records}
    counts = {
        status: sum(record.status == status for record in records) for status in ("ok", "pruned", "refused", "lost")
    }
    total = sum(record.history[-1][job.fidelity] for record in records if record.history)
    return {
        "trials": len(records),
        **{f"trials.{status}": count for status, count in counts.items()},
        job.total: total,
        "model_loads": sum(record.model_loads for record in records),
        "front": len(front.trials),
        "hypervolume": front.hypervolume,
        "reward_hacking": len(front.hacked),
        **{
            f"{name}.{metric}": value
            for name, index in presets.items()
            for metric, value in by_index[index].metrics.items()
            if metric == job.cost or metric in front.objectives
        },
    }


def _table(results: SweepResults) -> list[str]:
    """The front for the terminal, the cheapest first."""
    lines = [f"{len(results.front.trials)} trials on the front, hypervolume {results.front.hypervolume:.3f}:"]
    for index in results.front.trials:
        row = results.metrics[index]
        figures = ", ".join(
            f"{name} {row[name]:.4g}" + (f" ± {row[name + HALF_WIDTH]:.2g}" if name + HALF_WIDTH in row else "")
            for name in dict.fromkeys([*results.front.objectives, results.job.cost])
        )
        lines.append(f"  {results.names_of(index):<17} {in_words(results.points[index])}: {figures}")
    return lines
