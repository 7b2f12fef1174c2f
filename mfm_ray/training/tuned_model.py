"""The model directory of a fine-tuning: the frozen map and its tuned drift, with a card that says what they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import safetensors.torch

from mfm_ray.errors import InputError
from mfm_ray.finetuning import build_adapter
from mfm_ray.latent_models import located
from mfm_ray.networks.tuned import TunedFlowMap
from mfm_ray.pretrained import (
    CLASSIFIER_CONFIG,
    WEIGHTS,
    load_classifier,
    load_flow_map,
    model_card,
    save_model,
)
from mfm_ray.storage import Storage
from mfm_ray.training.checkpoint import CheckpointModel

_ADAPTED = """

Of the {parameters:,} weights only corrections of rank {rank} of {layers} layers were tuned, {tuned_parameters:,}
numbers (`{name}`, alpha {alpha:g}); they are merged into the weights."""
_OTHER_LAW = "With `method.diffusion` given they follow another law, pushed further towards the reward. "
_UNGUIDED = "Draws were made with a guidance scale and the drift was tuned without one. "
_MERGED = {"name": "none"}
"""The adapter of weights that are those of the whole network, as evaluations keep the best ones."""
BEST, BEST_WEIGHTS, BEST_FIGURES = "best", "weights.safetensors", "figures.json"
_ABOUT = """
## What was tuned

The drift of [{base}]({base}) (weights' SHA-256 {sha256}) was tuned by `{method}` towards the reward
`{reward}`, times {multiplier:g}. Plain samples of this model, `mfm.sample(flow_map, ...)` without any steering, are
meant to follow

    p(x) exp({multiplier:g} r(x)) / Z,

p being the law of the model before tuning. {caveat}Its cost is that of the model before tuning.{adapter}

Its posterior draws are still those of the model before tuning, p(x_1 | x_t): they come from the frozen map, which lies
in this folder too. Steering this model adds a further reward to the tuned drift, by draws of the law before tuning.
A flow map whose draws are those of the tuned law is distilled from this one, which is asked for its drift alone:

```
python -m jobs.train experiment=... objective=lagrangian_teacher objective.teacher=<this folder> \\
    objective.diagonal=teacher
```
"""


def weights_sha256(model: Storage) -> str:
    """SHA-256 of the weights of a model directory. InputError when there are none."""
    if not model.is_file(WEIGHTS):
        raise InputError(f"{model.uri_of(WEIGHTS)} is missing")
    return hashlib.sha256(model.read_bytes(WEIGHTS)).hexdigest()


def build_tuned(found: CheckpointModel) -> TunedFlowMap:
    """The pair that a checkpoint of a fine-tuning describes: the base model from where it lies, the averaged weights.

    InputError when the base model is gone or another one lies there.
    """
    base_model, wanted = Storage(found.state.config["model"]), found.state.model["tuning"]["base_sha256"]
    if weights_sha256(base_model) != wanted:
        raise InputError(f"model={base_model}: other weights than those that were tuned (SHA-256 {wanted[:12]}...)")
    base = load_flow_map(base_model, autoencoder=None)
    # a checkpoint of before there were adapters says nothing of them
    adapter = build_adapter(found.state.config.get("adapter", _MERGED))
    return TunedFlowMap(base, adapter.merged(base, found.state_dict))


def with_best(found: CheckpointModel, best: Storage) -> CheckpointModel:
    """The same with the best weights of the run's evaluations in the place of the last, and their figures."""
    figures = best.read_json(BEST_FIGURES)
    told = {f"evaluation.{name}": value for name, value in figures.items()}
    config = {**found.state.config, "adapter": _MERGED}
    state = replace(found.state, config=config, step=int(figures["step"]), figures={**found.state.figures, **told})
    return replace(found, state_dict=safetensors.torch.load(best.read_bytes(BEST_WEIGHTS)), state=state)


def best_step(run: Storage) -> int:
    """The step whose weights a run's evaluations found the best."""
    return int(run.child(BEST).read_json(BEST_FIGURES)["step"])


def save_tuned_model(
    target: Storage, flow_map: TunedFlowMap, found: CheckpointModel, *, pictures: Mapping[str, bytes]
) -> None:
    """Write the model directory, the class judge of the base model beside it."""
    base_model = Storage(found.state.config["model"])
    config = {key: value for key, value in found.state.model.items() if key != "tuning"}
    config |= {"data": located(base_model, config["data"]), "training": tuning_summary(found)}
    judge, accuracy = None, None
    if base_model.is_file(CLASSIFIER_CONFIG):
        judge, accuracy = load_classifier(base_model), base_model.read_json(CLASSIFIER_CONFIG)["heldout_accuracy"]
    card = model_card({**config, "network": flow_map.config()}, found.state.figures, pictures)
    save_model(
        target,
        flow_map,
        config=config,
        card=card + tuning_card(found),
        pictures=pictures,
        classifier=judge,
        heldout_accuracy=accuracy,
    )


def tuning_summary(found: CheckpointModel) -> dict[str, Any]:
    """What config.json tells about how the weights came to be."""
    state = found.state
    told = ("reward", "reward_multiplier", "method", "anchors", "cfg_scale", "label_dropout", "global_batch_size")
    return {
        "steps": state.step,
        "seconds": round(state.seconds, 3),
        "num_workers": state.world_size,
        "zero_stage": state.stage,
        "base_model": state.config["model"],
        "base_sha256": state.model["tuning"]["base_sha256"],
        "adapter": state.model["tuning"].get("adapter"),
        **{key: state.config[key] for key in (*told, "optimizer", "precision", "seed")},
        "ema_decay": found.decay,
        "data_sha256": state.data_sha256,
    }


def tuning_card(found: CheckpointModel) -> str:
    """What the card of a tuned model says beyond that of any model."""
    config, adapter = found.state.config, found.state.model["tuning"].get("adapter")
    return _ABOUT.format(
        base=config["model"],
        sha256=found.state.model["tuning"]["base_sha256"][:12],
        method=json.dumps(config["method"]),
        reward=json.dumps(config["reward"]),
        multiplier=config["reward_multiplier"],
        caveat="".join(
            [
                _OTHER_LAW if config["method"].get("diffusion") is not None else "",
                _UNGUIDED if config["cfg_scale"] is not None and not config.get("guided_drifts", True) else "",
            ]
        ),
        adapter="" if adapter is None else _ADAPTED.format(**adapter),
    )
