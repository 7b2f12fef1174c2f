"""A sweep over settings of `jobs.sample`, `jobs.train` or `jobs.finetune`, to a front and presets: docs/sweeps.md.

python -m jobs.tune sweep=guidance_scale model=runs/digits/model
python -m jobs.tune sweep=methods model=runs/digits/model reward=brightness num_samples=256 prune_after=32
python -m jobs.tune sweep=methods model=runs/digits/model resume=true
python -m jobs.tune sweep=training experiment=digits num_trials=8 max_steps=1000 checkpoint_every=250
python -m jobs.tune sweep=finetune model=runs/digits/model reward=brightness
ray job submit --working-dir . -- python -m jobs.tune sweep=methods model=/shared/model storage=/shared/runs
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jobs import training_sweep
from jobs.cluster import ray_cluster
from jobs.contract import JobRun, Outcome, run_job
from jobs.run_folder import RunFolder
from jobs.sample_maker import draw_samples
from jobs.sample_pool import choose_workers
from jobs.sample_shards import checksum, deciding_settings, refuse_other_settings
from jobs.sweep_outcome import finish_sweep
from jobs.workbench import Workbench
from mfm_ray.config import SampleConfig, SweepConfig, TuneConfig, to_dict
from mfm_ray.errors import InputError
from mfm_ray.latent_models import NO_DECODING, Decoding, settled
from mfm_ray.settings import from_dict, nearest
from mfm_ray.storage import Storage

SWEEP, PICTURES = "sweep.json", "pictures"
_SWEPT = ("space", "search", "search_window", "num_trials", "objectives", "prune_after", "reduction_factor")
_MEASURED = ("distances", "data_path")
_MOST_REASONS = 500  # characters
_COMMON = {"job", "sweep", *_SWEPT, *_MEASURED, "log_to"}


def check(config: SweepConfig) -> None:
    """Every trial of the sweep can be made, and an earlier call of this name had the same settings."""
    _JOBS[config.job][0](config)


def body(run: JobRun) -> Outcome:
    """Makes the trials that are not there yet, and writes what all of them say."""
    return _JOBS[run.config.job][1](run)


def check_sampling(config: TuneConfig) -> None:
    """`check` of a sweep over `jobs.sample`: every trial can be built on the model."""
    if not config.objectives:
        raise InputError("objectives: empty; expected metrics such as {reward: max, nfe: min}")
    bench = Workbench(config.model, Decoding.of(config))
    if not any(config.scaling.resources_per_worker.values()):
        raise InputError("scaling.resources_per_worker: expected at least one resource above 0, such as {CPU: 1}")
    if config.scaling.num_workers == 0:
        raise InputError("scaling.num_workers=0: trials run on Ray workers; expected at least 1, or null")
    if config.num_samples < 2:
        raise InputError(f"num_samples={config.num_samples}: one sample has no interval; expected at least 2 a trial")
    if config.prune_after is not None and config.prune_after >= config.num_samples:
        raise InputError(f"prune_after={config.prune_after}: expected less than num_samples={config.num_samples}")
    heldout = bench.compared_with(config.data_path) if wanted_distances(config) else None
    known: set[str] | None = None
    for point in points_of_check(config):
        trial = from_dict(SampleConfig, settings_of(config, point))
        _, judges = bench.build(trial)
        bench.check(trial)
        if heldout is not None:
            heldout.of(trial.label)
        scores = {f"judge.{name}" for name in judges} | ({"reward"} if trial.reward["name"] != "none" else set())
        known = scores if known is None else known & scores
    _check_trackers(config)
    _check_objectives(config, known or set(), has_classifier=bench.has_classifier)
    if config.resume:
        run = RunFolder("tune", config).storage
        refuse_other_settings(_earlier_sweep(run), sweep_settings(config), where=run.uri)


def sweep_sampling(run: JobRun) -> Outcome:
    """`body` of a sweep over `jobs.sample`."""
    from mfm_ray.tuning.sweep import finished_trials

    began = time.monotonic()
    config: TuneConfig = run.config
    plan = sweep_plan(config)
    earlier = finished_trials(run.storage, plan) if config.resume else {}
    if config.resume:
        run.log(f"{len(earlier)} of {plan.search.most} trials are there already")
    records = _run_missing(run, plan, earlier)
    if all(record.status == "refused" for record in records.values()):
        reasons = sorted({str(record.reason) for record in records.values()})
        raise InputError(f"every trial was refused: {'; '.join(reasons)[:_MOST_REASONS]}")
    settings = {index: settings_of(config, record.point) for index, record in records.items()}
    return finish_sweep(run, settings, records, began=began)


def _run_missing(run: JobRun, plan: Any, earlier: Mapping[int, Any]) -> dict[int, Any]:
    from mfm_ray.training.launch import wait_for_resources
    from mfm_ray.tuning.sweep import is_complete, run_sweep
    from mfm_ray.tuning.trial import TrialSpec

    config: TuneConfig = run.config
    if is_complete(plan, earlier):
        return dict(earlier)
    num_missing = plan.search.most - len(earlier)
    with ray_cluster(run.log):
        workers = choose_workers(config.scaling, int(min(num_missing, plan.search.window)))
        wait_for_resources(1, workers.resources, workers.start_timeout_s, run.log)  # Tune would wait for ever
        run.storage.write_json(SWEEP, {"settings": sweep_settings(config)})
        run.log(f"{num_missing} trials on {workers.num} workers, {workers.resources} each")
        spec = TrialSpec(
            load=SamplerOfModel(
                config.model,
                workers.device,
                wanted_distances(config),
                config.data_path,
                settled(Storage(str(config.model)), Decoding.of(config)),
            ),
            rungs=plan.pruning.rungs,
            pictures=run.storage.child(PICTURES),
            objectives=tuple(config.objectives),
            threads=max(1, int(workers.resources.get("CPU", 1.0))),
        )
        return run_sweep(
            plan,
            spec,
            run.storage,
            earlier,
            settings_of=functools.partial(settings_of, config),
            num_workers=workers.num,
            resources=workers.resources,
            max_failures=workers.max_failures,
            watchers=_watchers(run, plan, earlier),
        )


def _watchers(run: JobRun, plan: Any, earlier: Mapping[int, Any]) -> list[Any]:
    """Who is told of the trials: the terminal and what `log_to` names, which gets those that are there already."""
    from mfm_ray.tuning.live import live_progress
    from mfm_ray.tuning.space import parse_space
    from mfm_ray.tuning.trackers import Tracked, open_trackers

    config: TuneConfig = run.config
    tracked = Tracked(
        name=config.sweep, settings=parse_space(config.space), objectives=config.objectives, run=run.storage
    )
    trackers = open_trackers(config.log_to, tracked)
    for tracker, index in itertools.product(trackers, sorted(earlier)):
        tracker.on_end(earlier[index])
    return [live_progress(config.sweep, plan, earlier, log=run.log), *trackers]


def _check_trackers(config: TuneConfig) -> None:
    from mfm_ray.tuning.trackers import check_trackers

    check_trackers(config.log_to, RunFolder("tune", config).storage)


@dataclasses.dataclass(frozen=True)
class SamplerOfModel:
    """Loads the model in a worker; travels there in its place."""

    model: str | None
    device: str
    distances: Sequence[str] = ()
    data_path: str | None = None
    decoding: Decoding = NO_DECODING

    def __call__(self) -> "ModelSampler":
        bench = Workbench(self.model, self.decoding)
        heldout = bench.compared_with(self.data_path) if self.distances else None
        return ModelSampler(bench, self.device, self.distances, heldout)


class ModelSampler:
    """A loaded model that draws the samples of any trial (`mfm_ray.tuning.trial.TrialSampler`)."""

    def __init__(self, bench: Workbench, device: str, distances: Sequence[str], heldout: Any) -> None:
        self._bench, self._device = bench, device
        self._distances, self._heldout = distances, heldout
        bench.flow_map.to(device)
        self.classifier = bench.classifier if bench.has_classifier else None
        self.makes_images = bench.flow_map.space.makes_images

    def draw(self, settings: Mapping[str, Any], *, first_image: int, count: int) -> Any:
        config = from_dict(SampleConfig, settings)
        steering, judges = self._bench.build(config)
        for module in (getattr(steering, "reward", None), *judges.values()):
            if hasattr(module, "to"):
                module.to(self._device)
        drawn = draw_samples(self._bench.flow_map, steering, judges, config, first_image=first_image, count=count)
        if drawn.rewards is not None and not bool(drawn.rewards.isfinite().all()):
            raise InputError("reward: not finite for some of the samples")
        return dataclasses.replace(drawn, images=drawn.images.cpu(), states=None, trace={})

    def compare(self, settings: Mapping[str, Any], images: Any) -> dict[str, float]:
        return self._heldout.distances(self._distances, images, label=settings["label"]) if self._distances else {}


def sweep_plan(config: TuneConfig) -> Any:
    """Points in their order, rungs, and the hash of what decides all trials."""
    from mfm_ray.tuning.sweep import Pruning, SweepPlan
    from mfm_ray.tuning.trial import rungs_of

    metric, mode = next(iter(config.objectives.items()))
    rungs = rungs_of(config.num_samples, config.prune_after, config.reduction_factor)
    return SweepPlan(
        search=_search(config),
        decided_by=checksum(sweep_settings(config)),
        pruning=Pruning(metric=metric, mode=mode, rungs=rungs, reduction_factor=config.reduction_factor),
    )


def settings_of(config: TuneConfig, point: Mapping[str, Any]) -> dict[str, Any]:
    """The plain configuration of `jobs.sample` at a point. InputError naming the key that is wrong."""
    from mfm_ray.tuning.space import settings_at

    common = {key: value for key, value in to_dict(config).items() if key not in _COMMON}
    return settings_at(common, dict(point))


def points_of_check(config: TuneConfig) -> Any:
    """Points that show every mistake of the space."""
    from mfm_ray.tuning.search import points_to_check
    from mfm_ray.tuning.space import parse_space

    return points_to_check(_search(config), parse_space(config.space))


def wanted_distances(config: TuneConfig) -> list[str]:
    from mfm_ray.tuning.heldout import DISTANCES

    return [name for name in DISTANCES if name in config.distances or name in config.objectives]


def sweep_settings(config: TuneConfig) -> dict[str, Any]:
    """Everything that the table of the sweep depends on."""
    from mfm_ray.data.shards import read_manifest
    from mfm_ray.tuning.search import Planned

    objectives = [list(item) for item in config.objectives.items()]
    asked = {key: getattr(config, key) for key in _SWEPT if key != "objectives"}
    # what is proposed hangs on all objectives, what is pruned on the first alone; the front can be drawn by others
    decisive = objectives[:1] if isinstance(_search(config), Planned) else objectives
    common = {key: value for key, value in deciding_settings(config).items() if key != "shard_size"}
    data = read_manifest(config.data_path).sha256 if config.data_path else None
    return {**common, **asked, "distances": wanted_distances(config), "data": data, "objectives": decisive}


def _search(config: TuneConfig) -> Any:
    from mfm_ray.tuning.search import SearchOptions, build_search
    from mfm_ray.tuning.space import parse_space

    options = SearchOptions(
        num_trials=config.num_trials, seed=config.seed, objectives=config.objectives, window=config.search_window
    )
    return build_search(config.search, parse_space(config.space), options)


def _check_objectives(config: TuneConfig, scores: set[str], *, has_classifier: bool) -> None:
    """scores: reward and judges that every trial has."""
    known = [*sorted(scores, reverse=True), "nfe", "seconds", "diversity", "frechet", "sliced_w2"]
    known += ["confidence"] if has_classifier else []
    for name in config.objectives:
        if name not in known:
            close = nearest(name, known)
            hint = f"; did you mean {close}?" if close else ""
            raise InputError(f"objectives.{name}: expected metrics of {', '.join(known)}{hint}")


def _earlier_sweep(run: Storage) -> dict[str, Any] | None:
    return run.read_json(SWEEP) if run.is_file(SWEEP) else None


_JOBS: dict[str, tuple[Callable[[Any], None], Callable[[JobRun], Outcome]]] = {
    "sample": (check_sampling, sweep_sampling),
    **dict.fromkeys(training_sweep.SWEPT, (training_sweep.check, training_sweep.body)),
}
"""Check and body by the job that is swept."""

if __name__ == "__main__":
    run_job("tune", body, check=check)
