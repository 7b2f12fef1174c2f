"""The end of a sweep over any job: files, figures and artifacts."""

import time
from collections.abc import Mapping
from typing import Any

from jobs.contract import JobRun, Outcome
from jobs.evaluation import REPORT, command_line
from jobs.provenance import git_commit, versions
from mfm_ray.config import flatten, to_dict


def finish_sweep(
    run: JobRun,
    settings: Mapping[int, Mapping[str, Any]],
    records: Mapping[int, Any],
    *,
    began: float,
    models: Mapping[int, str] | None = None,
) -> Outcome:
    """Writes table, front, presets and report. settings: of the swept job by trial; began: time.monotonic() of the
    start; models: places of the models that trials have left.
    """
    from mfm_ray.tuning import outputs

    values = flatten(to_dict(run.config))
    facts = {
        "command": command_line("tune"),
        "versions": versions(),
        "git": git_commit(),
        "settings": {key: value for key, value in values.items() if not isinstance(value, Mapping)},
        "seconds": time.monotonic() - began,
    }
    metrics = outputs.write_outputs(run.storage, run.config, settings, records, facts=facts, log=run.log, models=models)
    return Outcome(
        metrics=metrics,
        artifacts={
            "results": run.storage.uri_of(outputs.RESULTS),
            "pareto": run.storage.uri_of(outputs.FRONT),
            "presets": run.storage.uri_of(outputs.PRESETS),
            "report": run.storage.uri_of(REPORT),
        },
    )
