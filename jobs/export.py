"""Makes a model directory from a checkpoint of a training run, whatever its ZeRO stage and number of workers,
or from a file of official weights (MFM, DMF, SiT), here or on the hub.

python -m jobs.export checkpoint=runs/digits                          (the newest checkpoint of that run)
python -m jobs.export checkpoint=runs/digits ema_decay=0.9999         (another of its moving averages)
python -m jobs.export checkpoint=runs/digits/checkpoints/checkpoint_2026-01-31_12-00-00.000000 output=models/early
python -m jobs.export checkpoint=mfm-xl2.pt output=models/mfm-xl2                     (official weights)
python -m jobs.export checkpoint=small.pt official.num_heads=6 official.encoder_depth=8 output=models/small
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
    official = official_weights(config)
    if official is None:
        _check_checkpoint(config)
    else:
        _check_official(config, official)
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


def official_weights(config: ExportConfig) -> Storage | None:
    """The file of bare weights that is named, downloaded from the hub where it is there; None for anything else."""
    from mfm_ray.hub import is_hub
    from mfm_ray.official import is_weights
    from mfm_ray.pretrained import model_place

    if config.checkpoint is None:
        return None
    if not is_hub(config.checkpoint):
        place = Storage(config.checkpoint)
        return place if is_weights(place) else None
    place = model_place(config.checkpoint, key="checkpoint")
    if not is_weights(place):
        raise InputError(f"checkpoint={config.checkpoint}: is a model directory already, expected bare weights")
    return place


def _check_checkpoint(config: ExportConfig) -> None:
    from mfm_ray.training.checkpoint import check_decay, read_state

    for name, value in vars(config.official).items():
        if value is not None:
            raise InputError(f"official.{name}={value}: checkpoint={config.checkpoint} is no official file")
    place = checkpoint_of(config)
    check_decay(place, read_state(place), config.ema_decay)


def _check_official(config: ExportConfig, place: Storage) -> None:
    from mfm_ray.official import read_weights

    if config.ema_decay is not None:
        raise InputError(f"ema_decay={config.ema_decay}: {place} is no checkpoint of a run; expected official.ema")
    facts = dict(vars(config.official))
    weights = read_weights(place, ema=facts.pop("ema"))
    weights.config(**facts)
    weights.check()


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
    official = official_weights(config)
    if official is not None:
        figures = export_official(official, target, config)
    else:
        figures = export_checkpoint(checkpoint_of(config), target, ema_decay=config.ema_decay)
    run.log(f"wrote {target}")
    return Outcome(metrics=figures, artifacts={"model": target.uri})


def export_official(place: Storage, target: Storage, config: ExportConfig) -> dict[str, float]:
    """Writes the model directory of bare weights; config.json says which file it was, by its hash."""
    from mfm_ray.official import read_weights, sha256_of
    from mfm_ray.pretrained import save_model

    facts = dict(vars(config.official))
    weights = read_weights(place, ema=facts.pop("ema"))
    flow_map = weights.flow_map(**facts)
    source = {"weights": config.checkpoint, "sha256": sha256_of(place), "layout": weights.layout.kind}
    save_model(target, flow_map, config={"data": weights.config(**facts)["data"], "training": source})
    return {"parameters": sum(each.numel() for each in flow_map.parameters())}


if __name__ == "__main__":
    run_job("export", body, check=check)
