"""Writes a data set as shards with a manifest that vouches for every byte; only images need a cluster.

python -m jobs.prepare_data data=digits
python -m jobs.prepare_data data=mnist source=/data/mnist-idx output=/data/mnist
python -m jobs.prepare_data data=images source=/data/imagenet/train autoencoder=/models/sd-vae output=/data/latents
ray job submit --working-dir . -- python -m jobs.prepare_data data=gmm storage=/shared/runs output=/shared/gmm
"""

import os

from jobs.contract import JobRun, Outcome, run_job
from jobs.encode_images import check_images, encode_images, has_unfinished, refuse_own_keys
from jobs.run_folder import is_submitted
from mfm_ray.config import PrepareDataConfig
from mfm_ray.data.datasets import Dataset, digits, gmm, mnist
from mfm_ray.data.shards import verify_shards, write_shards
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage

BUNDLED = ("digits", "gmm")
FROM_FILES = ("mnist",)
ENCODED = "images"


def make_dataset(name: str, *, source: str | None = None, seed: int = 0) -> Dataset:
    """The data set of that name, in memory.

    Raises:
        InputError: the name is unknown, or `source` is missing, superfluous or damaged.
    """
    if name in BUNDLED:
        if source is not None:
            raise InputError(f"source={source}: {name} is bundled data, expected null")
        return digits() if name == "digits" else gmm(seed=seed)
    if name not in FROM_FILES:
        raise InputError(f"data.name={name}: expected one of {', '.join((*BUNDLED, *FROM_FILES, ENCODED))}")
    if source is None:
        raise InputError(f"source=null: expected the folder with the files of {name}")
    return mnist(source)


def output_of(config: PrepareDataConfig) -> Storage:
    """Where the shards go: `output`, else the path the data's own file names, else `data/<name>`."""
    named = config.name != f"prepare-{config.data.name}"
    default = f"data/{config.name}" if named else config.data.path or f"data/{config.data.name}"
    place = config.output or default
    if is_submitted() and "://" not in place and not os.path.isabs(place):
        raise InputError(
            f"output={place}: a submitted job's working directory is temporary; expected an absolute path or a URI"
        )
    return Storage(place)


def check(config: PrepareDataConfig) -> None:
    """The output is free, or prepared data that this call may verify or replace."""
    output = output_of(config)
    encodes = config.data.name == ENCODED
    if encodes and has_unfinished(output):
        if not (config.resume or config.overwrite):
            raise InputError(f"output={output}: is not finished; resume=true goes on, overwrite=true begins anew")
    elif output.exists() and (not output.is_dir() or output.listdir()):
        present = _name_of(output)
        if present is None:
            raise InputError(f"output={output}: holds something other than prepared data; choose another folder")
        if not (config.resume or config.overwrite):
            raise InputError(f"output={output}: exists; resume=true verifies it, overwrite=true replaces it")
        if config.resume and present != config.data.name:
            raise InputError(f"output={output}: holds {present}, expected {config.data.name}")
    if encodes:
        check_images(config, output)
        return
    refuse_own_keys(config)
    if not config.resume:
        make_dataset(config.data.name, source=config.source, seed=config.seed)


def body(run: JobRun) -> Outcome:
    config: PrepareDataConfig = run.config
    output = output_of(config)
    if config.data.name == ENCODED:
        return encode_images(run, output)
    if config.resume and output.exists("manifest.json"):
        manifest = verify_shards(output)
        run.log(f"{output} is complete and unaltered")
    else:
        manifest = write_shards(output, make_dataset(config.data.name, source=config.source, seed=config.seed))
        run.log(f"wrote {output}")
    rows = {f"{split}.rows": manifest.rows(split) for split in manifest.files}
    return Outcome(metrics={**rows, "num_classes": manifest.num_classes}, artifacts={"shards": output.uri})


def _name_of(output: Storage) -> str | None:
    """Name of the prepared data in a folder, None where it holds something else."""
    if not output.is_dir() or not output.exists("manifest.json"):
        return None
    manifest = output.read_json("manifest.json")
    is_ours = isinstance(manifest, dict) and {"schema_version", "name", "splits"} <= manifest.keys()
    return str(manifest["name"]) if is_ours else None


if __name__ == "__main__":
    run_job("prepare_data", body, check=check)
