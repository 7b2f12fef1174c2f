"""Measures a model by a protocol and writes a report; without a model the protocol's own recipe is trained first.

python -m jobs.evaluate protocol=digits model=runs/digits/model
python -m jobs.evaluate protocol=digits
"""

import time

from jobs.contract import JobRun, Outcome, run_job
from mfm_ray.config import EvaluateConfig
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage


def check(config: EvaluateConfig) -> None:
    """The protocol's settings fit together, and model and data are there and whole."""
    from jobs.evaluation import evaluator, needs_model, recipe_of
    from jobs.large_evaluation import check_scaling
    from jobs.recipe import training_config
    from jobs.train import check as check_training
    from mfm_ray.pretrained import model_place
    from mfm_ray.protocols import build_protocol
    from mfm_ray.protocols.imagenet_finetuning import ImagenetFinetuningProtocol

    protocol = build_protocol(config.protocol)
    if not evaluator(protocol.name).in_pieces:
        check_scaling(config)
    if not needs_model(protocol):
        exact = getattr(protocol, "exact", False)
        _check_nothing_trained(config, "protocol.exact=true" if exact else f"protocol={protocol.name}")
        if isinstance(protocol, ImagenetFinetuningProtocol):
            evaluator(protocol.name).evaluate(protocol, None)  # reads the runs
        return
    if config.model is None:
        recipe = recipe_of(protocol)
        if config.data_path is not None:
            raise InputError(
                "data_path: belongs to a model; a recipe is trained on its own data (+training.data.path=...)"
            )
        check_training(training_config(recipe, config.training, seed=config.seed))
        return
    if config.training:
        raise InputError(
            f"training.{next(iter(config.training))}: with model= nothing is trained; leave one of them out"
        )
    data = None if config.data_path is None else Storage(config.data_path)
    evaluator(protocol.name).load(protocol, model_place(config.model), data, config.seed)


def _check_nothing_trained(config: EvaluateConfig, cause: str) -> None:
    """For a protocol without a model: no settings of one."""
    for key in ("model", "data_path", "training"):
        if getattr(config, key):
            raise InputError(f"{key}: nothing is trained or loaded with {cause}; leave one of them out")


def body(run: JobRun) -> Outcome:
    from jobs.evaluation import command_line, evaluate_model, needs_model, recipe_of
    from jobs.recipe import model_of_recipe, training_config
    from mfm_ray.pretrained import model_place
    from mfm_ray.protocols import build_protocol

    began = time.monotonic()
    config: EvaluateConfig = run.config
    protocol, command = build_protocol(config.protocol), command_line("evaluate")
    if not needs_model(protocol):
        return evaluate_model(run, protocol, None, None, command=command, began=began)
    if config.model is not None:
        data = None if config.data_path is None else Storage(config.data_path)
        return evaluate_model(run, protocol, model_place(config.model), data, command=command, began=began)
    trained = model_of_recipe(training_config(recipe_of(protocol), config.training, seed=config.seed), run)
    return evaluate_model(
        run,
        protocol,
        trained.model,
        trained.data,
        command=command,
        history=trained.history,
        train_seconds=trained.seconds,
        began=began,
    )


if __name__ == "__main__":
    run_job("evaluate", body, check=check)
