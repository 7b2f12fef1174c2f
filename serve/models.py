"""What is known of a served model without its weights: enough to judge a request before anything is queued."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from mfm_ray.errors import InputError
from mfm_ray.hub import is_hub
from mfm_ray.latent_models import AUTO, NO_DECODING, OWN_DECODING, Decoding, sample_shape_of
from mfm_ray.pretrained import CLASSIFIER_CONFIG, read_model_config
from mfm_ray.storage import Storage


@dataclass(frozen=True)
class ModelCard:
    """A model by its id. source: directory or URI; sample_shape: of its pictures; num_heldout: held-out images of
    bundled data of its kind; decoding: how pictures are made of its latents, if it makes those."""

    id: str
    source: str
    sample_shape: tuple[int, ...]
    data_name: str
    num_classes: int
    class_names: tuple[str, ...]
    cfg_scales: tuple[float, ...]
    has_classifier: bool
    num_heldout: int
    decoding: Decoding = NO_DECODING

    @property
    def size(self) -> str:
        """Width x height, as requests write it."""
        _, height, width = self.sample_shape
        return f"{width}x{height}"

    def description(self) -> dict[str, Any]:
        """The entry of GET /v1/models."""
        return {
            "id": self.id,
            "object": "model",
            "created": 0,
            "owned_by": "mfm-ray",
            "size": self.size,
            "channels": self.sample_shape[0],
            "data": self.data_name,
            "class_names": list(self.class_names),
            "cfg_scales": list(self.cfg_scales),
        }


def read_models(
    model: Mapping[str, str] | Sequence[str] | str, decoding: Decoding = OWN_DECODING
) -> dict[str, ModelCard]:
    """Cards by id, the first being the default. decoding: of those among them that make latents.

    InputError for what is no model of pictures, or two of one id.
    """
    if isinstance(model, Mapping):
        named = list(model.items())
    else:
        sources = [model] if isinstance(model, str) else list(model)
        named = [(_own_id(source), source) for source in sources]
    if not named:
        raise InputError("model=[]: expected at least one model directory")
    cards: dict[str, ModelCard] = {}
    for name, source in named:
        if name in cards:
            raise InputError(f"model: two models have the id {name}; name them, as {{id: directory, ...}}")
        cards[name] = _read(name, source, decoding)
    return cards


def _own_id(source: str) -> str:
    """The name of the directory, or of the run that it lies in."""
    path = PurePosixPath(str(source).rstrip("/"))
    return path.parent.name if path.name == "model" and path.parent.name else path.name or "model"


def _read(name: str, source: str, decoding: Decoding) -> ModelCard:
    storage = Storage(source)
    config = read_model_config(storage)
    data = config["data"]
    if data.get("kind") != "latent":
        decoding = NO_DECODING
    try:
        shape = sample_shape_of(storage, data, decoding)
    except ValueError as error:
        raise InputError(f"model={source}: {error}") from error
    if shape is None or shape[:1] not in ((1,), (3,)):
        found = f"{data.get('kind')} of shape {list(shape or data.get('event_shape', ()))}"
        if data.get("kind") == "latent" and shape is None:
            found += " without an autoencoder (autoencoder=...)"
        raise InputError(f"model={source}: {found}; expected images of 1 or 3 channels")
    classes = int(data.get("num_classes", 0))
    return ModelCard(
        id=name,
        source=_portable(source, storage),
        sample_shape=shape,
        data_name=str(data.get("name", "")),
        num_classes=classes,
        class_names=tuple(data.get("class_names") or map(str, range(classes))),
        cfg_scales=tuple(config.get("cfg_scales", ())),
        has_classifier=storage.exists(CLASSIFIER_CONFIG),
        num_heldout=len(heldout_images(str(data.get("name", "")))),
        decoding=replace(decoding, autoencoder=_portable_autoencoder(decoding.autoencoder)),
    )


def _portable(source: str, storage: Storage) -> str:
    """The place as replicas should look for it: absolute, but relative within a working directory that Ray unpacked,
    which lies elsewhere on every node."""
    unpacked = "/runtime_resources/" in os.getcwd()
    return source if unpacked and "://" not in source and not os.path.isabs(source) else storage.uri


def _portable_autoencoder(source: str | None) -> str | None:
    """Likewise; what is said of the model's own is looked for beside it on every node."""
    if source is None or source == AUTO or is_hub(source):
        return source
    return _portable(source, Storage(source))


def heldout_images(data_name: str) -> Any:
    """Held-out images (N, C, H, W) in data units of bundled data, an empty list for other data."""
    from jobs.prepare_data import BUNDLED, make_dataset

    return make_dataset(data_name).splits["heldout"].data if data_name in BUNDLED else []
