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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.flow_map import FlowMap
from mfm_ray.hub import is_hub, local_folder
from mfm_ray.latent_models import AUTO, Decoding, decoded_space
from mfm_ray.networks import build_network
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.official import SUFFIXES, is_weights, only_weights_in, read_weights

if TYPE_CHECKING:
    from mfm_ray.storage import Storage

FORMAT = "mfm-ray-model"
FORMAT_VERSION = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
CLASSIFIER_FORMAT = "mfm-ray-classifier"
CLASSIFIER_CONFIG, CLASSIFIER_WEIGHTS = "classifier.json", "classifier.safetensors"
_NAMES_SHOWN = 3
_HUB_FILES = ("*.json", "*.md", "*.png", *(f"*{suffix}" for suffix in SUFFIXES))


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


def load_flow_map(
    source: str | Path | Storage,
    *,
    num_heads: int | None = None,
    encoder_depth: int | None = None,
    cfg_scales: Sequence[float] | None = None,
    time_flip: bool | None = None,
    scale: float | None = None,
    ema: bool | None = None,
    autoencoder: str | Path | Decoding | None = AUTO,
) -> FlowMap:
    """The flow map of a model directory or a file of bare weights, on the CPU, in eval mode, its parameters frozen.

    source: a model directory; an official MFM, DMF or SiT file (`.pt`, `.safetensors`); a URI of either; or
    `hf://owner/name[@revision]`, a repository that is a model directory or holds one such file.

    The keywords are of bare weights, for what their shapes do not say. num_heads, encoder_depth: None for those of the
    published size that it is, else XL/2's, 16 and 20. cfg_scales: guidance scales of the rows after the first, [2.5].
    time_flip: whether the network's time runs from data to noise: True, but for SiT's files with a learned sigma.
    scale: model units in one unit of the autoencoder's latents, 0.18215. ema: averaged weights (True), those beside
    them (False); None: the averaged ones where the file has both.

    autoencoder: of a model of latents, whose samples are then pictures: a folder or `hf://owner/name`; "auto": the
    model's own where it names or carries one (`mfm_ray.latent_models`); None: samples are latents.

    InputError naming the file for whatever is missing, truncated, of another format, or does not fit the network
    tensor by tensor, and for keywords that contradict it.
    """
    place = model_place(source)
    facts: dict[str, Any] = {
        "num_heads": num_heads,
        "encoder_depth": encoder_depth,
        "cfg_scales": cfg_scales,
        "time_flip": time_flip,
        "scale": scale,
    }
    if is_weights(place):
        file = read_weights(place, ema=ema)
        flow_map, data = file.flow_map(**facts), file.config(**facts)["data"]
    else:
        config = read_model_config(place, ema=ema, **facts)
        flow_map, data = _of_directory(place, config), config["data"]
    flow_map.space = decoded_space(flow_map.space, place, data, Decoding.by(autoencoder))
    return flow_map.eval().requires_grad_(False)


def _of_directory(place: Storage, config: Mapping[str, Any]) -> FlowMap:
    """The network that config.json of a model directory describes, with its weights."""
    where = place.uri_of(CONFIG)
    try:
        flow_map = build_network(
            config["network"],
            space=DataSpace.from_config(config["data"]),
            num_classes=int(config["data"].get("num_classes", 0)),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{where}: {_reason(error)}") from error
    load_weights(flow_map, _read(place, WEIGHTS), where=place.uri_of(WEIGHTS))
    return flow_map


def read_model_config(source: str | Path | Storage, **facts: Any) -> dict[str, Any]:
    """config.json of a model directory, or what that of bare weights would say with these keywords of `load_flow_map`.

    InputError when there is none, it is of another format or version, or the keywords contradict the weights.
    """
    place = model_place(source)
    if is_weights(place):
        ema = facts.pop("ema", None)
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        return {**head, **read_weights(place, ema=ema).config(**facts)}
    if not place.exists():
        raise InputError(f"model={place} does not exist, expected a model directory or a file of weights")
    config = _read_config(place, CONFIG, FORMAT, required=("network", "data"))
    _check_facts(config, facts, where=place.uri_of(CONFIG))
    return config


def model_place(source: str | Path | Storage, *, key: str = "model") -> Storage:
    """Where a model is: its directory, or the file of bare weights; one of the hub is downloaded first.

    A folder without a config.json in which there is one file of weights stands for that file. InputError for what
    cannot be had of the hub; whether anything is at a place is not checked.
    """
    from mfm_ray.storage import Storage

    if isinstance(source, str | Path) and is_hub(source):
        folder = Storage(local_folder(source, key=key, files=_HUB_FILES))
        return folder if folder.exists(CONFIG) and not _is_foreign(folder) else only_weights_in(folder)
    place = Storage(source)
    if place.is_dir() and not place.exists(CONFIG):
        names = [name for name in place.listdir() if name.endswith(SUFFIXES)]
        return place.child(names[0]) if len(names) == 1 else place
    return place


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
    storage = model_place(model_dir)
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

    InputError as `checked_weights` raises; the module is left as it was in that case.
    """
    module.load_state_dict(checked_weights(module, content, where=where), strict=True)


def checked_weights(module: nn.Module, content: bytes, *, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, when they are those of the module, which may be on no device.

    InputError naming the file and the first tensors that are missing, unexpected, of another shape or type, or not
    finite.
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
    return tensors


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


def _check_facts(config: Mapping[str, Any], facts: Mapping[str, Any], *, where: str) -> None:
    """InputError for a keyword of bare weights that is not what config.json says itself."""
    said = {**_mapping(config["network"]), "scale": _mapping(config["data"]).get("scale")}
    for name, value in facts.items():
        given = list(value) if isinstance(value, tuple) else value
        if given is not None and said.get(name) != given:
            raise InputError(f"{name}={value}: {where} says {said.get(name, 'nothing of it')}")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_foreign(folder: Storage) -> bool:
    """Whether config.json is that of another library, as many repositories have one beside their weights."""
    config = folder.read_json(CONFIG)
    return not isinstance(config, dict) or config.get("format") != FORMAT


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
