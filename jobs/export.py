"""Makes a model directory from a checkpoint of a training run, whatever its ZeRO stage and number of workers.

python -m jobs.export checkpoint=runs/digits                          (the newest checkpoint of that run)
python -m jobs.export checkpoint=runs/digits ema_decay=0.9999         (another of its moving averages)
python -m jobs.export checkpoint=runs/digits/checkpoints/checkpoint_2026-01-31_12-00-00.000000 output=models/early
ray job submit --working-dir . -- python -m jobs.export checkpoint=/shared/runs/digits storage=/shared/runs
"""

import os

from jobs.contract import JobRun, Outcome, run_job
from jobs.run_folder import is_submitted
from mfm_ray.config import ExportConfig
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage


def check(config: ExportConfig) -> None:
    """The checkpoint is there and whole and has the average, the output is no file or folder of another kind."""
    from mfm_ray.training.checkpoint import check_decay, read_state

    place = checkpoint_of(config)
    check_decay(place, read_state(place), config.ema_decay)
    if config.output is None:
        return
    if is_submitted() and "://" not in config.output and not os.path.isabs(config.output):
        raise InputError(
            f"output={config.output}: a submitted job's working directory is temporary; "
            "expected an absolute path or a URI"
        )
    output = Storage(config.output)
    if not output.exists() or (output.is_dir() and not output.listdir()):
        return
    if not output.is_dir() or not output.exists("config.json"):
        raise InputError(f"output={output}: holds something other than a model; choose another folder")
    if not (config.overwrite or config.resume):
        raise InputError(f"output={output}: exists; overwrite=true replaces it")


def checkpoint_of(config: ExportConfig) -> Storage:
    """The checkpoint folder that is named, or the newest one of the run that is.

    Raises:
        InputError: nothing is named, or nothing is there.
    """
    from mfm_ray.training.checkpoint_store import CHECKPOINTS, newest_checkpoint

    if config.checkpoint is None:
        raise InputError("checkpoint=null: expected a checkpoint folder, or the folder of a training run")
    place = Storage(config.checkpoint)
    if not place.is_dir():
        raise InputError(f"checkpoint={place}: does not exist, expected a checkpoint folder or a run's folder")
    if not place.is_dir(CHECKPOINTS):
        return place
    newest = newest_checkpoint(place)
    if newest is None:
        raise InputError(f"checkpoint={place}: this run has no checkpoint yet")
    return newest.storage


def body(run: JobRun) -> Outcome:
    from mfm_ray.training.final_model import export_checkpoint

    config: ExportConfig = run.config
    target = Storage(config.output) if config.output else run.storage.child("model")
    figures = export_checkpoint(checkpoint_of(config), target, ema_decay=config.ema_decay)
    run.log(f"wrote {target}")
    return Outcome(metrics=figures, artifacts={"model": target.uri})


if __name__ == "__main__":
    run_job("export", body, check=check)
