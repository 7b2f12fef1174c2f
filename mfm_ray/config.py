"""The typed root of every job's configuration, and its composition from the YAML files of `mfm_ray/conf`.

A root covers what has no constructor: budget, cadence, storage, resources. `network`, `objective`, `reward`
and `steering` are plain dicts, because the constructor that they name is their schema. Default values stand
in the YAML files alone; types, bounds and meaning stand here. Nothing else imports Hydra.
"""
# ruff: noqa: RUF009 (`setting` only wraps dataclasses.field, it makes no shared default)

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mfm_ray.errors import InputError
from mfm_ray.settings import from_dict, leaves, nearest, setting, unknown_key
from mfm_ray.sweep_files import words_of_trial


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What every job takes."""

    name: str = setting("folder of this run below storage")
    storage: str = setting("folder or URI that holds the runs; absolute when submitted with ray job submit")
    seed: int = setting("seed of every random choice", minimum=0, maximum=2**31 - 1)
    resume: bool = setting("go on with the run of this name")
    overwrite: bool = setting("replace the run of this name")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    name: str = setting("name of the data set")
    path: str | None = setting("folder or URI of shards; null: bundled data, prepared in the run's own folder")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    rate: float = setting("share of the training images that are jittered; 0: none", minimum=0, maximum=1)
    rotation: float = setting("largest turn, radians", minimum=0, below=1)
    scale: float = setting("largest relative change of size", minimum=0, below=1)
    shift: float = setting("largest move, in widths of the image", minimum=0, below=1)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: str = setting("optimiser", choices=("radam", "adam", "adamw"))
    learning_rate: float = setting("learning rate after warm-up", above=0, maximum=10)
    betas: list[float] = setting("decay of the two moments", minimum=0, below=1, length=2)
    eps: float = setting("added to the root of the second moment", above=0)
    weight_decay: float = setting("decoupled for adamw and radam, L2 for adam", minimum=0)


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    stage: int = setting("DeepSpeed ZeRO stage", choices=(0, 1, 2, 3))
    offload: bool = setting("keep optimiser state (stage 3: parameters too) in host memory; GPUs only")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    num_workers: int | list[int] = setting("training workers; [least, most]: as many as there is room for", minimum=1)
    resize_interval_s: float = setting("seconds between looks for room for more of them", above=0)
    use_gpu: bool | None = setting("one GPU for each worker; null: when there are enough of them")
    resources_per_worker: dict[str, float] = setting("Ray resources of one worker", minimum=0)
    start_timeout_s: float = setting("seconds to wait for the workers' resources", above=0)
    max_failures: int = setting("how often a lost worker restarts the group from its last checkpoint", minimum=0)


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    hang_timeout_s: float = setting(
        "seconds without progress after which a worker that hangs is named and ended; the first step may take 3 times",
        minimum=5,
    )
    storage_timeout_s: float = setting("seconds for which storage that refuses to be written is tried again", minimum=0)


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How pictures are made of the latents of a model (`mfm_ray.latent_models.Decoding`)."""

    autoencoder: str | None = setting(
        "of a model of latents: folder or hf://owner/name; auto: the model's own; null: none, samples are latents"
    )
    check_autoencoder: bool = setting("refuse an autoencoder that the model's latents were not made with")
    decode_at_once: int = setting("pictures that are in the autoencoder at a time, on a GPU; bounds memory", minimum=1)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(JobConfig, DecodingConfig):
    """What every training of a network takes, from data or towards a reward."""

    max_steps: int = setting("optimiser steps", minimum=1)
    max_seconds: float | None = setting("stop after so many seconds of training; null: never", above=0)
    global_batch_size: int = setting("rows of one optimiser step, all workers together", minimum=1)
    micro_batch_size: int | None = setting("rows of one forward pass of one worker; null: all of its part", minimum=1)
    optimizer: OptimizerConfig = setting("optimiser")
    warmup_steps: int = setting("steps in which the learning rate rises linearly from 0", minimum=0)
    learning_rate_schedule: str = setting(
        "after warm-up: constant, or a cosine to 0 at max_steps", choices=("constant", "cosine")
    )
    gradient_clipping: float = setting("largest global gradient norm; 0: no clipping", minimum=0)
    ema_decay: float | list[float] = setting(
        "decay of the averaged weights, fp32; 0: the last weights; of a list the first is the model",
        minimum=0,
        below=1,
    )
    precision: str = setting("arithmetic of the network", choices=("fp32", "bf16"))
    execution: str = setting(
        "how the network is computed: eager, or compiled by torch.compile", choices=("eager", "compiled")
    )
    activation_checkpointing: bool = setting("keep a block's inputs alone and compute it again in the backward pass")
    zero: ZeroConfig = setting("sharding")
    scaling: ScalingConfig = setting("workers and their resources")
    faults: FaultsConfig = setting("what is waited for, and for how long")
    checkpoint_every: int = setting("steps between checkpoints", minimum=1)
    checkpoints_to_keep: int = setting("checkpoints kept, the newest", minimum=1)
    best_checkpoints_to_keep: int = setting("checkpoints kept beside them, the best by checkpoint_score", minimum=0)
    checkpoint_score: str = setting("figure of metrics.jsonl that says which checkpoints are the best")
    checkpoint_score_order: str = setting("whether the best is the smallest or the largest", choices=("min", "max"))
    log_every: int = setting("steps between lines of metrics.jsonl", minimum=1)
    sample_every: int = setting("steps between sample grids; 0: none", minimum=0)
    trackers: list[str] = setting("where metrics go as well: mlflow, wandb", choices=("mlflow", "wandb"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainingConfig):
    """Root of `jobs.train`. Its plain form (`to_dict`) is what workers get and every checkpoint carries."""

    experiment: str = setting("recipe that the defaults come from")
    data: DataConfig = setting("training data")
    augmentation: AugmentationConfig = setting("jitter of training images")
    network: dict[str, Any] = setting("network by name, with its constructor's arguments")
    init_from: str | None = setting(
        "weights to begin with: a model directory, or an official MFM, DMF or SiT file; null: at random"
    )
    objective: dict[str, Any] = setting("objective by name, with its constructor's arguments")
    classifier_steps: int = setting("training steps of the class judge saved beside the model; 0: none", minimum=0)


@dataclass(frozen=True, kw_only=True)
class TuningDataConfig:
    path: str | None = setting("prepared data; null: bundled data of the kind the model was trained on")
    from_model: bool = setting("no data: one-step samples of the model in their place")


@dataclass(frozen=True, kw_only=True)
class AnchorsConfig:
    chains: int = setting("clean samples that each row of a batch keeps and moves in turn", minimum=1)
    restart: float = setting("share of the visits that begin again where the chain began", minimum=0, maximum=1)
    start_steps: int = setting("sampler steps of the steered samples where chains begin; 0: at data", minimum=0)
    start_draws: int = setting("posterior draws of each of their steps", minimum=1)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Root of `jobs.finetune`. Its plain form (`to_dict`) is what workers get and every checkpoint carries."""

    model: str | None = setting("model directory that is tuned: folder or URI")
    preset: str | None = setting(
        "named recipe of the tuning, or a trial of a sweep: FILE/presets.yaml#low, FILE/results.parquet#12",
        choices=("paper",),
    )
    reward: dict[str, Any] = setting("reward by name, with its constructor's arguments")
    reward_app: str | None = setting("application of Ray Serve in the same cluster that answers; null: the workers do")
    reward_model: str | None = setting("id of the model there whose rewards are asked; null: that of `model`'s folder")
    reward_multiplier: float = setting("the paper's lambda: samples follow p exp(reward_multiplier * reward)", above=0)
    method: dict[str, Any] = setting("tuning method by name, with its constructor's arguments")
    adapter: dict[str, Any] = setting("which weights are tuned, with its constructor's arguments")
    anchors: AnchorsConfig = setting("clean samples that states are made around")
    data: TuningDataConfig = setting("samples of the law before tuning")
    cfg_scale: float | None = setting("classifier-free guidance of draws and of both drifts; null: none")
    guided_drifts: bool = setting("false: both drifts without cfg_scale, as in the paper's code; not the tilted law")
    judges: list[Any] = setting("rewards that evaluations score and nothing is tuned to, as reward.parts are written")
    evaluate_every: int = setting("steps between evaluations, off the training workers; 0: none", minimum=0)
    evaluate_samples: int = setting("plain samples of one evaluation", minimum=8)
    evaluate_steps: int = setting("steps of their sampler", minimum=1)
    evaluate_cpus: float = setting("CPUs of the process that evaluates", above=0)
    best_metric: str | None = setting("figure of the evaluations whose best weights become the model; null: the last")
    stop_on_hacking: bool = setting("end when the reward rises while a judge falls clearly")
    label_dropout: float = setting("share of the rows that are tuned at the null class", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class OfficialConfig:
    """What the shapes of bare weights do not say."""

    num_heads: int | None = setting("attention heads; null: of the published size, else 16", minimum=1)
    encoder_depth: int | None = setting("blocks of the encoder; null: of the published size, else 20", minimum=1)
    cfg_scales: list[float] | None = setting("guidance scales of the rows after the first; null: [2.5]", above=0)
    time_flip: bool | None = setting("the network's time runs from data to noise; null: unless it is a SiT")
    scale: float | None = setting("model units in one unit of the latents; null: 0.18215", above=0)
    ema: bool | None = setting("averaged weights, or those beside them; null: the averaged where there are any")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(JobConfig):
    checkpoint: str | None = setting(
        "checkpoint folder, the folder of a training run: its newest; or an official MFM, DMF or SiT file, or hf://"
    )
    official: OfficialConfig = setting("of an official file alone")
    ema_decay: float | None = setting(
        "which moving average, by its decay; null: the first of the run's ema_decay", minimum=0, below=1
    )
    output: str | None = setting("folder or URI of the model; null: model/ in the run's own folder")


@dataclass(frozen=True, kw_only=True)
class SampleScalingConfig:
    num_workers: int | None = setting(
        "Ray workers; 0: none, this process; null: 0 for a single shard, else as many as the cluster has room for",
        minimum=0,
    )
    use_gpu: bool | None = setting("one GPU for each worker; null: when there are enough of them")
    resources_per_worker: dict[str, float] = setting("Ray resources of one worker; one thread a CPU", minimum=0)
    start_timeout_s: float = setting("seconds in which the first worker must be ready", above=0)
    max_failures: int = setting("how often a shard whose worker was lost is given to another one", minimum=0)


@dataclass(frozen=True, kw_only=True)
class PrepareDataConfig(JobConfig):
    data: DataConfig = setting("data to prepare")
    source: str | None = setting("folder of the raw files; null for bundled data")
    output: str | None = setting("folder or URI of the shards; null: data.path, or data/<name>")
    source_kind: str = setting(
        "images: what the source holds; auto: by its files", choices=("auto", "folder", "parquet", "webdataset")
    )
    labels: str | None = setting("images: CSV file with file_name,label; null: the source's own labels")
    image_column: str | None = setting("images: column of Parquet files; null: found by name and type")
    label_column: str | None = setting("images: column of Parquet files; null: found by name")
    autoencoder: str | None = setting("images: folder of a diffusers AutoencoderKL, or hf://owner/name")
    image_size: int = setting("images: side of the central square that is encoded", minimum=1, maximum=4096)
    interpolation: str = setting("images: filter of the resize", choices=("bilinear", "bicubic", "lanczos"))
    row_form: str = setting(
        "images: what is stored beside the mean of a latent", choices=("mean_log_variance", "mean_std")
    )
    dtype: str = setting("images: stored numbers", choices=("float16", "float32"))
    heldout_share: float = setting("images: share that is held out, by a hash of the name", minimum=0, maximum=0.5)
    batch_size: int = setting("images: that are encoded at once", minimum=1)
    shard_size: int = setting("images: of one part, which is made and resumed as a whole", minimum=1)
    encoder_threads: int = setting(
        "images: CPU threads of a worker's autoencoder; other numbers give other last bits. Its CPUs decode images",
        minimum=1,
    )
    scaling: SampleScalingConfig = setting("images: workers and their resources")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(JobConfig, DecodingConfig):
    model: str | None = setting("model directory: folder or URI")
    num_samples: int = setting("samples", minimum=1)
    num_steps: int | None = setting("steps of the sampler; null: the preset's, or 50", minimum=1)
    dynamics: str | None = setting("null: what the method does best with", choices=("ode", "sde"))
    order: int = setting("order of the drift's steps; 2 costs no further call", minimum=1, maximum=2)
    max_nfe: int | None = setting("calls an image that are never exceeded; null: no limit", minimum=1)
    preset: str | None = setting(
        "named recipe of the sampler, or a trial of a sweep: FILE/presets.yaml#low, FILE/results.parquet#12",
        choices=("paper",),
    )
    label: int | None = setting("class of all samples; null: unconditional", minimum=0)
    cfg_scale: float | None = setting("classifier-free guidance; null: none")
    batch_size: int = setting("samples that share one network call", minimum=1)
    precision: str = setting("arithmetic of the network", choices=("fp32", "bf16"))
    execution: str = setting(
        "how the network is computed: eager, compiled by torch.compile, or graphs (CUDA graphs of calls that need no "
        "gradient; on a CPU as eager)",
        choices=("eager", "compiled", "graphs"),
    )
    shard_size: int = setting("samples of one file, which is made and resumed as a whole", minimum=1)
    scaling: SampleScalingConfig = setting("workers and their resources")
    steering: dict[str, Any] = setting("steering method by name, with its constructor's arguments")
    reward: dict[str, Any] = setting("reward by name, with its constructor's arguments")
    judges: list[Any] = setting("rewards that score the samples and are not optimised, as reward.parts are written")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What every sweep takes beside the keys of the job that it sweeps, which are what all trials have in common."""

    job: str = setting(
        "job whose settings are tried; the sweep file says which", choices=("sample", "train", "finetune")
    )
    sweep: str = setting("question asked: a file of tune_configs/")
    space: dict[str, Any] = setting(
        "values to try by key of the swept job: {grid|choice|uniform|loguniform|integers: []}"
    )
    num_trials: int = setting(
        "times that the grid is run through, other kinds drawn anew each time; with Optuna: trials", minimum=1
    )
    objectives: dict[str, str] = setting("metrics of the front; the first one decides pruning", choices=("max", "min"))


@dataclass(frozen=True, kw_only=True)
class TuneConfig(SampleConfig, SweepConfig):
    """Root of `jobs.tune` over `jobs.sample`. `num_samples` is of one trial."""

    search: str = setting("where points come from: grid, random (grids are crossed), optuna (TPE), optuna_nsga2")
    search_window: int = setting("trials that Optuna proposes before it knows the result of the first", minimum=1)
    distances: list[str] = setting(
        "distances to held-out data that are measured beside those in objectives", choices=("frechet", "sliced_w2")
    )
    data_path: str | None = setting(
        "prepared data whose held-out part is meant; null: bundled data of the model's kind"
    )
    log_to: list[str] = setting("where trials go as well", choices=("tensorboard", "mlflow", "optuna"))
    prune_after: int | None = setting("samples after which a trial may be pruned (ASHA); null: no pruning", minimum=2)
    reduction_factor: int = setting("one trial in so many goes on beyond a rung", minimum=2)


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    num_rows: int = setting("held-out rows that a model is measured on", minimum=8)
    num_draws: int = setting("one-step posterior draws for each row and time", minimum=2)


@dataclass(frozen=True, kw_only=True)
class TrainingSweepConfig(TrainingConfig, SweepConfig):
    """What every sweep over trainings takes. `scaling` is of one trial, `checkpoint_every` also when it is measured."""

    scheduler: dict[str, Any] = setting("what stops or perturbs trials, by name, with its settings")
    concurrent_trials: int | None = setting("trials at once; null: as many as the cluster has room for", minimum=1)
    models_to_keep: int = setting("best trials whose checkpoints and model stay", minimum=1)


@dataclass(frozen=True, kw_only=True)
class TrainSweepConfig(TrainConfig, TrainingSweepConfig):
    """Root of `jobs.tune` over `jobs.train`."""

    heldout: HeldOutConfig = setting("measurement of a trial at each of its checkpoints")


@dataclass(frozen=True, kw_only=True)
class FinetuneSweepConfig(FinetuneConfig, TrainingSweepConfig):
    """Root of `jobs.tune` over `jobs.finetune`. `evaluate_samples`, `evaluate_steps` and `judges` measure trials."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(JobConfig):
    protocol: dict[str, Any] = setting("what is measured, by name, with its settings")
    model: str | None = setting("model directory; null: the protocol's own recipe is trained")
    data_path: str | None = setting("prepared data to compare the model with; null: bundled data of its own kind")
    training: dict[str, Any] = setting("keys of jobs.train when there is no model: +training.max_steps=500")
    scaling: SampleScalingConfig = setting("workers of a protocol that is made in pieces (imagenet_*)")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(JobConfig):
    experiment: str = setting("training recipe of the demo's model")
    protocol: dict[str, Any] = setting("what is measured and drawn in the report")
    num_workers: int = setting("training workers", minimum=1)
    training: dict[str, Any] = setting("keys of jobs.train beside the recipe's: +training.max_steps=500")


@dataclass(frozen=True, kw_only=True)
class DeployConfig(JobConfig):
    model: str | list[str] | None = setting("model directory, or a list of them; null: what the config says")
    rewards: list[str] | None = setting("rewards that are served, by name; null: what the config says")
    presets: str | None = setting("presets.yaml of a sweep, which quality means; null: what the config says")
    config: str = setting("file in Ray Serve's own schema: replicas, resources, scaling, limits")
    autoencoder: str | None = setting(
        "of models of latents: folder or hf://owner/name; auto: the model's own; null: what the config says"
    )
    keys_file: str | None = setting("file of accepted keys, one a line; null: MFM_RAY_API_KEYS alone")
    port: int | None = setting("HTTP port; null: what the config says", minimum=1, maximum=65535)
    start_timeout_s: float = setting("seconds in which everything must be ready", above=0)


ROOTS: dict[str, type[JobConfig]] = {
    "train": TrainConfig,
    "finetune": FinetuneConfig,
    "prepare_data": PrepareDataConfig,
    "export": ExportConfig,
    "sample": SampleConfig,
    "tune": TuneConfig,
    "evaluate": EvaluateConfig,
    "demo": DemoConfig,
    "deploy": DeployConfig,
}

SWEPT_JOBS: dict[str, type[JobConfig]] = {
    "sample": TuneConfig,
    "train": TrainSweepConfig,
    "finetune": FinetuneSweepConfig,
}
"""Root of `jobs.tune` by the job that a sweep is over; `conf/job/<name>.yaml` has its defaults."""

FINETUNE_PRESETS: dict[str, list[str]] = {
    # arXiv 2601.14430 and its code: one draw, its pathwise gradient, a constant sigma^2 = 200, no baseline; labelled
    # data as they are, drifts without the guidance of the draws. Not the tilted law.
    "paper": [
        "method=mfm_ft",
        "method.num_draws=1",
        "method.estimator=pathwise",
        "method.baseline=none",
        "method.diffusion=100",
        "method.max_time=0.99999",
        "guided_drifts=false",
        "label_dropout=0",
        "anchors.restart=1",
        "anchors.start_steps=0",
        "optimizer.name=radam",
        "optimizer.learning_rate=1e-4",
        "warmup_steps=250",
        "learning_rate_schedule=constant",
        "ema_decay=0.999",
        "precision=bf16",
        "gradient_clipping=1.5",
        "max_steps=10000",
        "evaluate_samples=512",
        "evaluate_steps=250",
    ]
}
"""Words of `jobs.finetune` by the preset that stands for them; other words of the command line win over them."""

_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)

SWEEPS = "tune_configs"
"""Folder of sweep files."""

# Where keys that the YAML does not list may be added (`+reward.weight=2`): the constructor is the schema of
# the first six, the resources of a worker are named by the cluster, `training` holds keys of another root, and
# `objectives` names metrics.
ADDABLE = (
    "network",
    "objective",
    "reward",
    "steering",
    "method",
    "adapter",
    "scaling.resources_per_worker",
    "training",
    "objectives",
)


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A composed root: its values as a plain nested dict, and the choice made in each of its groups."""

    values: dict[str, Any]
    choices: dict[str, str | None]


def load_config(root: str, overrides: Sequence[str] = ()) -> JobConfig:
    """The validated configuration of the job `root` with the words of a command line (`key=value`).

    Raises:
        InputError: one line that names key, value, what is allowed and, for a name, the nearest valid one.
    """
    composed = compose(root, overrides)
    for group, what in (("experiment", "every training starts from a recipe"), ("sweep", "every sweep from a file")):
        if composed.choices.get(group, "") is None:
            raise InputError(f"{group}: missing; {what}, one of {', '.join(group_choices(group))}")
    return from_dict(root_class(root, composed), composed.values)


def root_class(root: str, composed: "Composed") -> type[JobConfig]:
    """The class of a composed root: that of `jobs.tune` depends on the job that is swept."""
    return SWEPT_JOBS[str(composed.choices["job"])] if root == "tune" else ROOTS[root]


def compose(root: str, overrides: Sequence[str] = ()) -> Composed:
    """Composes the YAML files of a root; types and bounds are not yet checked."""
    if root in SWEPT_JOBS:
        overrides = with_preset(overrides)
    if root == "finetune":
        overrides = with_finetune_preset(overrides)
    words = [_quote_text(root, word) for word in overrides]
    parsed = [_parse(word, given) for word, given in zip(words, overrides, strict=True)]
    for override in parsed:
        if choices := group_choices(override.key_or_group):
            _check_choice(override, choices)
    opened = [part for word, override in zip(words, parsed, strict=True) for part in _opened(word, override)]
    try:
        return _compose(root, opened)
    except _COMPOSITION_ERRORS as error:
        raise _refusal(root, words, parsed, error) from error


def _refusal(root: str, words: Sequence[str], parsed: Sequence[Override], error: Exception) -> InputError:
    """One line for what cannot be composed: the word to blame, else what Hydra says of the files that words chose."""
    try:
        _name_the_culprit(root, words, parsed)
    except InputError as named:
        return named
    except _COMPOSITION_ERRORS as of_a_file:
        error = of_a_file
    for override in parsed:
        if override.key_or_group.startswith("space."):
            return InputError(
                f"{override.input_line}: keys of a space have dots of their own; "
                "expected space={KEY: {grid: [...]}}"
            )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return InputError(f"{root}: {' '.join(lines[:2]) if lines[0].endswith(':') else lines[0]}")


def with_preset(words: Sequence[str]) -> list[str]:
    """The words of a sweep's trial in the place of `preset=FILE#trial`; words of the command line win over them."""
    found = [word for word in words if word.startswith("preset=") and "#" in word]
    if not found:
        return list(words)
    place, _, trial = found[-1].removeprefix("preset=").strip("'\"").rpartition("#")
    return [*words_of_trial(place, trial), *(word for word in words if word not in found)]


def with_finetune_preset(words: Sequence[str]) -> list[str]:
    """The words that `preset=NAME` stands for, before those of the command line."""
    named = [word.removeprefix("preset=").strip("'\"") for word in words if word.startswith("preset=")]
    return [*(FINETUNE_PRESETS.get(named[-1], []) if named else []), *words]


def group_choices(group: str) -> list[str]:
    """The names that `group=` takes, from the files of the package, those of sweeps from `tune_configs/`."""
    if group == "sweep":
        return sorted(sweep_files())
    folder = resources.files("mfm_ray.conf") / group
    if not folder.is_dir():
        return []
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def sweep_files() -> dict[str, Path]:
    """Sweep files by name: those beside the package, and those of the working directory's own `tune_configs/`."""
    folders = [Path(__file__).resolve().parents[1] / SWEEPS, Path(SWEEPS)]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def group_defaults(group: str, name: str) -> dict[str, Any]:
    """What `group=name` gives before any other word. InputError for an unknown name."""
    choices = group_choices(group)
    if name not in choices:
        close = nearest(name, choices)
        hint = f"; did you mean {close}?" if close else ""
        raise InputError(f"{group}={name}: expected one of {', '.join(choices)}{hint}")
    text = (resources.files("mfm_ray.conf") / group / f"{name}.yaml").read_text()
    values = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text)))
    for base in reversed([base for base in values.pop("defaults", []) if base != "_self_"]):
        values = {**group_defaults(group, base), **values}
    return _with_filled_parts(values) if group == "reward" else values


def _register_sweep(name: str, file: Path) -> None:
    """Makes a file of `tune_configs/` a choice of the group `sweep`, which writes into the root like a recipe."""
    try:
        content = OmegaConf.load(file)
    except (YAMLError, OSError) as error:
        raise InputError(f"sweep={name}: {file} cannot be read as YAML") from error
    if not isinstance(content, DictConfig):
        raise InputError(f"sweep={name}: {file}: expected its content to be a group of keys")
    for key, kind, what in (
        ("space", DictConfig, "a group of keys"),
        ("objectives", DictConfig, "a group of keys"),
        ("defaults", ListConfig, "a list [...] of choices"),
    ):
        if key in content and not isinstance(content.get(key), kind):
            raise InputError(f"sweep={name}: {file}: expected {key} to be {what}")
    node = OmegaConf.merge({"sweep": name}, content)
    _check_groups(name, node)
    _choose_job(name, node)
    ConfigStore.instance().store(group="sweep", name=name, node=node, package="_global_")


def _check_groups(sweep: str, node: Any) -> None:
    """The choices that a file makes (`override /steering: gradient`) are ones that there are."""
    entries = [entry for entry in node.get("defaults", []) if isinstance(entry, DictConfig)]
    for key, choice in (item for entry in entries for item in entry.items()):
        group = str(key).removeprefix("override ").strip("/ ")
        choices = group_choices(group)
        if choices and choice not in choices:
            close = nearest(str(choice), choices)
            hint = f"; did you mean {close}?" if close else ""
            raise InputError(
                f"{group}={choice}: in the file of sweep={sweep}, expected one of {', '.join(choices)}{hint}"
            )


def _choose_job(sweep: str, node: Any) -> None:
    """`job: train` is a plain key to whoever writes a sweep file, and the choice of a group to Hydra."""
    job = node.pop("job", None)
    if job is None:
        return
    if job not in SWEPT_JOBS:
        close = nearest(str(job), SWEPT_JOBS)
        hint = f"; did you mean {close}?" if close else ""
        raise InputError(f"job={job}: in the file of sweep={sweep}, expected one of {', '.join(SWEPT_JOBS)}{hint}")
    node["defaults"] = [{"override /job": job}, *node.get("defaults", [])]


def _compose(root: str, words: Sequence[str]) -> Composed:
    if root == "tune":  # the file that is asked for alone: what stands in the others is no concern of this sweep
        chosen = {word.partition("=")[2].strip("'\"") for word in words if word.startswith("sweep=")}
        for name, file in sweep_files().items():
            if name in chosen:
                _register_sweep(name, file)
    with initialize_config_module("mfm_ray.conf", version_base="1.3"):
        full = hydra_compose(root, overrides=list(words), return_hydra_config=True)
    choices = {str(group): choice for group, choice in full.hydra.runtime.choices.items() if "hydra" not in str(group)}
    OmegaConf.set_struct(full, False)
    del full["hydra"]
    values = typing.cast(dict[str, Any], OmegaConf.to_container(full, resolve=True, throw_on_missing=True))
    if isinstance(values.get("reward"), dict):
        values["reward"] = _with_filled_parts(values["reward"])
    if isinstance(values.get("objectives"), dict):  # objectives.judge.x=max is of the metric judge.x
        leaves_of = flatten(values["objectives"])
        values["objectives"] = {name: mode for name, mode in leaves_of.items() if not isinstance(mode, dict)}
    if isinstance(values.get("judges"), list):
        values["judges"] = [filled_reward(judge) for judge in values["judges"]]
    return Composed(values=values, choices=choices)


def _with_filled_parts(reward: dict[str, Any]) -> dict[str, Any]:
    """A combined reward whose parts have, for what they leave out, the defaults of `conf/reward/<name>.yaml`.

    A part may be its name alone. What is no reward stays as it is: `mfm_ray.building` refuses it by its place.
    """
    parts = reward.get("parts")
    return {**reward, "parts": [filled_reward(part) for part in parts]} if isinstance(parts, list) else reward


def filled_reward(part: Any) -> Any:
    """A reward given by its name, or by some keys, with the defaults of `conf/reward/<name>.yaml` for the others."""
    given = {"name": part} if isinstance(part, str) else part
    if not isinstance(given, dict) or given.get("name") not in group_choices("reward"):
        return given
    return _with_filled_parts({**group_defaults("reward", given["name"]), **given})


def _quote_text(root: str, word: str) -> str:
    """Takes the value of a text key as it stands (`storage=s3://a/b?c=d`, `name=007`), unlike Hydra."""
    key, equals, value = word.partition("=")
    classes = SWEPT_JOBS.values() if root == "tune" else [ROOTS[root]]
    hint = next((found[key][0] for found in map(leaves, classes) if key in found), None)
    is_text = hint in (str, str | None)
    is_plain = value not in ("", "null") and value[0] not in "'\"" and "${" not in value
    if not (equals and is_text and is_plain) or group_choices(key):
        return word
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def _parse(word: str, given: str) -> Override:
    """Reads one word; refuses what no job can use."""
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise InputError(f"{given}: cannot be read; expected key=value, with quotes around other signs") from error
    if override.is_sweep_override():
        raise InputError(
            f"{given}: expected one value, not a sweep; a list is written [a,b], a text with a comma quoted"
        )
    key = override.key_or_group
    if key == "hydra" or key.startswith("hydra."):
        raise InputError(f"{given}: a job writes only below storage/name, so hydra's own keys are not taken")
    if override.is_delete():
        raise InputError(f"{given}: keys cannot be removed; set the key to null where that is allowed")
    if key == "reward.parts" and isinstance(override.value(), dict):
        raise InputError(f"{given}: expected a list [...] of {{name: ..., weight: ...}}")
    if override.package is not None:
        raise InputError(f"{given}: expected group=choice, without @package")
    if override.is_add() and not key.startswith(tuple(f"{parent}." for parent in ADDABLE)):
        raise InputError(f"{given}: only below {', '.join(ADDABLE)} can keys be added; write {given.lstrip('+')}")
    return override


def _opened(word: str, override: Override) -> list[str]:
    """`objective.weighting={name: adaptive, power: 1}` as one word for each key: Hydra adds none by itself."""
    key, value = override.key_or_group, override.value()
    takes_more = key.startswith(tuple(f"{parent}." for parent in ADDABLE)) or (
        key in ADDABLE and not group_choices(key)
    )
    if not isinstance(value, dict) or not takes_more:
        return [word]
    return [f"++{key}.{name}={json.dumps(item)}" for name, item in value.items()]


def _name_the_culprit(root: str, words: Sequence[str], parsed: Sequence[Override]) -> None:
    """Raises for the first word that names an unknown choice or key; returns where all are known."""
    chosen: list[str] = []
    for _ in range(2):  # the choice of a sweep brings the groups of its job
        composed = _compose(root, chosen)
        groups = composed.choices
        chosen = [word for word, override in zip(words, parsed, strict=True) if override.key_or_group in groups]
    known = flatten(_compose(root, chosen).values)
    for override in parsed:
        if not override.is_add() and override.key_or_group not in {*known, *groups}:
            raise unknown_key(override.key_or_group, [*known, *groups])


def _check_choice(override: Override, choices: list[str]) -> None:
    group, value = override.key_or_group, override.get_value_element_as_str()
    if value in choices or not isinstance(override.value(), str | list | None):
        return  # a dict of keys, `data={path: x}`, is left to the check of types
    close = nearest(value, choices)
    hint = f"; did you mean {close}?" if close else ""
    raise InputError(f"{group}={value}: expected one of {', '.join(choices)}{hint}")


def flatten(values: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Every node of a nested dict by dotted key, groups included."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found[f"{prefix}{key}"] = value
        if isinstance(value, Mapping):
            found |= flatten(value, prefix=f"{prefix}{key}.")
    return found


def to_dict(config: JobConfig) -> dict[str, Any]:
    """The plain nested form: dicts, lists, numbers, texts; JSON-able."""
    return dataclasses.asdict(config)


def to_yaml(values: Mapping[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(dict(values)))
