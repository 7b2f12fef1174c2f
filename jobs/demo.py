"""The main job, end to end on real data: train on Ray, draw, steer, compare with Best-of-N, write one report.

python -m jobs.demo
python -m jobs.demo name=quick +training.max_steps=500
"""

import time
from collections.abc import Callable

from jobs.contract import JobRun, Outcome, run_job
from mfm_ray.config import DemoConfig, TrainConfig


def recipe(config: DemoConfig) -> TrainConfig:
    from jobs.recipe import training_config

    return training_config(
        config.experiment, config.training, seed=config.seed, scaling__num_workers=config.num_workers
    )


def check(config: DemoConfig) -> None:
    """The protocol's settings fit together, and so do those of the training."""
    from jobs.train import check as check_training
    from mfm_ray.protocols import build_protocol

    build_protocol(config.protocol)
    check_training(recipe(config))


def body(run: JobRun) -> Outcome:
    from jobs.evaluation import command_line, evaluate_model
    from jobs.recipe import model_of_recipe
    from mfm_ray.protocols import build_protocol

    began = time.monotonic()
    config: DemoConfig = run.config
    say = _stages(run.log, began)
    say("1 of 2", f"data and training: {config.experiment} on {config.num_workers} workers (Ray Train, DeepSpeed)")
    trained = model_of_recipe(recipe(config), run)
    say("2 of 2", "drawing, steering, measuring")
    workers = f"{config.num_workers} worker{'s' if config.num_workers > 1 else ''}"
    facts = {"training": f"on {workers}, {trained.config.max_steps:,} steps with Ray Train and DeepSpeed"}
    if trained.reused:
        facts["model"] = "taken from an earlier run of the same recipe and data, so nothing was trained this time"
    outcome = evaluate_model(
        run,
        build_protocol(config.protocol),
        trained.model,
        trained.data,
        command=command_line("demo"),
        history=trained.history,
        train_seconds=trained.seconds,
        facts=facts,
        began=began,
    )
    metrics = {"training_reused": int(trained.reused), **outcome.metrics}
    return Outcome(metrics=metrics, artifacts=outcome.artifacts)


def _stages(log: Callable[[str], None], began: float) -> Callable[[str, str], None]:
    def say(number: str, title: str) -> None:
        log(f"[{number}, {time.monotonic() - began:.0f} s] {title}")

    return say


if __name__ == "__main__":
    run_job("demo", body, check=check, keeps_old_run=True)
