"""Model directories: weights, configuration and model card; written whole, read strictly and without pickle.

    model.safetensors   weights and buffers, the preconditioning among them
    config.json         {"format": "mfm-ray-model", "format_version": 1, "network": {"name", ...}, "interpolant",
                         "data": {"name", "kind", "event_shape", "range", "num_classes", "class_names"},
                         "cfg_scales", "training": {...}}
    README.md           model card, with the pictures beside it
    autoencoder/        the autoencoder of a model of latents, where somebody put it there (`mfm_ray.latent_models`)
    classifier.safetensors, classifier.json   the data's own classifier, where there is one

Functions import `storage` themselves, since it loads pyarrow, which `import mfm_ray` does without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.flow_map import FlowMap
from mfm_ray.latent_models import AUTO, Decoding, decoded_space
from mfm_ray.networks import build_network
from mfm_ray.networks.classifier import DigitClassifier

if TYPE_CHECKING:
    from mfm_ray.storage import Storage

FORMAT = "mfm-ray-model"
FORMAT_VERSION = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
CLASSIFIER_FORMAT = "mfm-ray-classifier"
CLASSIFIER_CONFIG, CLASSIFIER_WEIGHTS = "classifier.json", "classifier.safetensors"
_NAMES_SHOWN = 3


def save_model(
    directory: str | Path | Storage,
    flow_map: FlowMap,
    *,
    config: Mapping[str, Any],
    card: str | None = None,
    metrics: Mapping[str, float] | None = None,
    pictures: Mapping[str, bytes] | None = None,
    classifier: DigitClassifier | None = None,
    heldout_accuracy: float | None = None,
) -> dict[str, Any]:
    """Writes a model directory in place of an older one, which stays until the new one is complete.

    config: at least `data` (`Manifest.description()`), and what `training` and others are worth telling; what the
    flow map knows itself (network, cfg_scales) is filled in. card: README.md; made from the rest when left out, with
    `metrics` as a table and `pictures` ({file name: PNG bytes}). classifier with its heldout_accuracy in [0, 1].

    Returns config.json's content. InputError for a target that holds something other than a model, for weights that
    are not finite, and for a config that contradicts the flow map.
    """
    from mfm_ray.storage import Storage

    storage, pictures = Storage(directory), dict(pictures or {})
    full = _full_config(flow_map, config)
    _check_pictures(pictures)
    if storage.exists() and not storage.exists(CONFIG) and (not storage.is_dir() or storage.listdir()):
        raise InputError(f"{storage} holds something other than a model, it is left as it is")
    weights = _weights(flow_map, "the flow map")
    with storage.replace_dir(marker=CONFIG) as folder:
        local = Storage(folder)
        local.write_bytes(WEIGHTS, weights)
        local.write_bytes(CARD, (card or model_card(full, metrics or {}, pictures)).encode())
        for name, content in pictures.items():
            local.write_bytes(name, content)
        if classifier is not None:
            save_classifier(local, classifier, heldout_accuracy=heldout_accuracy)
        local.write_json(CONFIG, full)
    return full


def load_flow_map(source: str | Path | Storage, *, autoencoder: str | Path | Decoding | None = AUTO) -> FlowMap:
    """The flow map of a model directory, on the CPU, in eval mode, its parameters frozen.

    autoencoder: of a model of latents, whose samples are then pictures: a folder or `hf://owner/name`; "auto": the
    model's own where it names or carries one (`mfm_ray.latent_models`); None: samples are latents.

    InputError naming the file for whatever is missing, truncated, of another format, or does not fit the network
    that config.json describes, tensor by tensor.
    """
    from mfm_ray.storage import Storage

    storage = Storage(source)
    config = read_model_config(storage)
    where = storage.uri_of(CONFIG)
    try:
        flow_map = build_network(
            config["network"],
            space=DataSpace.from_config(config["data"]),
            num_classes=int(config["data"].get("num_classes", 0)),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{where}: {_reason(error)}") from error
    load_weights(flow_map, _read(storage, WEIGHTS), where=storage.uri_of(WEIGHTS))
    flow_map.space = decoded_space(flow_map.space, storage, config["data"], Decoding.by(autoencoder))
    return flow_map.eval().requires_grad_(False)


def read_model_config(source: str | Path | Storage) -> dict[str, Any]:
    """config.json of a model directory; InputError when there is none or it is of another format or version."""
    from mfm_ray.storage import Storage

    storage = Storage(source)
    if not storage.exists():
        raise InputError(f"model={storage} does not exist, expected a model directory")
    return _read_config(storage, CONFIG, FORMAT, required=("network", "data"))


def save_classifier(
    directory: str | Path | Storage, classifier: DigitClassifier, *, heldout_accuracy: float | None = None
) -> None:
    """Writes classifier.safetensors and, last, classifier.json into a directory that may hold other files."""
    from mfm_ray.storage import Storage

    storage = Storage(directory)
    storage.write_bytes(CLASSIFIER_WEIGHTS, _weights(classifier, "the classifier"))
    head = {"format": CLASSIFIER_FORMAT, "format_version": FORMAT_VERSION}
    storage.write_json(CLASSIFIER_CONFIG, {**head, **classifier.config(), "heldout_accuracy": heldout_accuracy})


def load_classifier(model_dir: str | Path | Storage) -> DigitClassifier:
    """The classifier of a model directory, on the CPU, in eval mode, frozen; refusals as in `load_flow_map`."""
    from mfm_ray.storage import Storage

    storage = Storage(model_dir)
    if not storage.exists(CLASSIFIER_CONFIG):
        raise InputError(f"{storage.uri_of(CLASSIFIER_CONFIG)} is missing: this model comes without a classifier")
    config = _read_config(storage, CLASSIFIER_CONFIG, CLASSIFIER_FORMAT, required=("num_classes", "event_shape"))
    try:
        classifier = DigitClassifier(num_classes=config["num_classes"], event_shape=tuple(config["event_shape"]))
    except (ValueError, TypeError) as error:
        raise InputError(f"{storage.uri_of(CLASSIFIER_CONFIG)}: {_reason(error)}") from error
    content = _read(storage, CLASSIFIER_WEIGHTS)
    load_weights(classifier, content, where=storage.uri_of(CLASSIFIER_WEIGHTS))
    return classifier.eval().requires_grad_(False)


def load_weights(module: nn.Module, content: bytes, *, where: str) -> None:
    """Strictly loads the content of a safetensors file (called `where` in errors) into a module.

    InputError naming the file and the first tensors that are missing, unexpected, of another shape or type, or not
    finite. The module is left as it was in that case.
    """
    try:
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{where} is truncated or no safetensors file: {_reason(error)}") from error
    expected = module.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise InputError(f"{where} lacks {_listed(missing)} of {type(module).__name__}")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        raise InputError(f"{where} has {_listed(unexpected)} that {type(module).__name__} does not know")
    for name, own in sorted(expected.items()):
        tensor = tensors[name]
        if tensor.shape != own.shape:
            raise InputError(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {tuple(own.shape)}")
        if tensor.is_floating_point() != own.is_floating_point():
            raise InputError(f"{where}: {name} has type {tensor.dtype}, expected {own.dtype}")
    _check_finite(tensors, where)
    module.load_state_dict(tensors, strict=True)


def model_card(config: Mapping[str, Any], metrics: Mapping[str, float], pictures: Mapping[str, bytes]) -> str:
    """README.md of a model: what it is, its figures as a table, its pictures, how to use it."""
    data, network = config["data"], config["network"]
    kind = "class-conditional" if data.get("num_classes") else "unconditional"
    shape = "x".join(map(str, data["event_shape"]))
    lines = [
        f"# Meta flow map of {data.get('name', 'unnamed data')}",
        "",
        f"A {kind} meta flow map ({network['name']}) of {data['kind']} data of shape {shape}. One network call draws",
        "from the posterior of clean data given a noisy state, so that rewards can steer sampling.",
        "",
        "```python",
        "import mfm_ray as mfm",
        "",
        'flow_map = mfm.load_flow_map("path/of/this/folder")',
        "samples = mfm.sample(flow_map, num_samples=16, num_steps=25, seed=0)",
        "```",
    ]
    if metrics:
        lines += ["", "## Measured", "", "| figure | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    if pictures:
        lines += ["", "## Pictures", ""]
        lines += [f"![{Path(name).stem}]({name})" for name in pictures]
    if training := config.get("training"):
        lines += ["", "## Training", "", "```json", json.dumps(training, indent=2), "```"]
    return "\n".join(lines) + "\n"


def _full_config(flow_map: FlowMap, config: Mapping[str, Any]) -> dict[str, Any]:
    if "data" not in config:
        raise InputError("config has no 'data', expected what the data's manifest describes")
    own = {"network": flow_map.config(), "cfg_scales": list(flow_map.cfg_scales)}
    for key, value in own.items():
        if config.get(key, value) != value:
            raise InputError(f"config.{key}={config[key]} is not the flow map's own, {value}")
    space, num_classes = DataSpace.from_config(config["data"]), config["data"].get("num_classes", 0)
    if (space, num_classes) != (flow_map.space, flow_map.num_classes):
        described = f"{space} with {num_classes} classes"
        raise InputError(f"config.data is {described}, the flow map's is {flow_map.space} with {flow_map.num_classes}")
    head = {"format": FORMAT, "format_version": FORMAT_VERSION}
    return {**head, "network": own["network"], "interpolant": "linear", **config, "cfg_scales": own["cfg_scales"]}


def _check_pictures(pictures: Mapping[str, bytes]) -> None:
    for name in pictures:
        if Path(name).name != name or not name.endswith(".png"):
            raise InputError(f"pictures: {name!r} is not the name of a .png file")


def _weights(module: nn.Module, owner: str) -> bytes:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    _check_finite(tensors, owner)
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{where}: {name} holds NaN or infinity")


def _read_config(storage: Storage, name: str, expected: str, *, required: tuple[str, ...]) -> dict[str, Any]:
    where = storage.uri_of(name)
    try:
        config = storage.read_json(name)
    except FileNotFoundError as error:
        raise InputError(f"{where} is missing: not a model directory") from error
    if not isinstance(config, dict) or config.get("format") != expected:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{where} has format {found!r}, expected {expected!r}")
    if config.get("format_version") != FORMAT_VERSION:
        version = config.get("format_version")
        raise InputError(f"{where} has format_version {version}, this version of mfm-ray reads {FORMAT_VERSION}")
    for key in required:
        if key not in config:
            raise InputError(f"{where} has no {key!r}")
    return config


def _read(storage: Storage, name: str) -> bytes:
    try:
        return storage.read_bytes(name)
    except FileNotFoundError as error:
        raise InputError(f"{storage.uri_of(name)} is missing") from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"no {error}"
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
