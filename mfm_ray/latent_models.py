"""Which autoencoder belongs to a model of latents, and the space that decodes with it.

A model directory says in config.json what its latents were made with,

    "data": {"kind": "latent", "scale": ..., "autoencoder": {"source", "fingerprint", "image_size"}, ...}

and may carry that autoencoder itself in a folder `autoencoder/` (config.json and diffusion_pytorch_model.safetensors,
as diffusers writes them), which is then the one that is read: such a directory needs no network and no other place.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfm_ray.data_space import DataSpace
from mfm_ray.decoding import AT_ONCE
from mfm_ray.errors import InputError
from mfm_ray.hub import is_hub, local_folder

if TYPE_CHECKING:
    from mfm_ray.autoencoder import Autoencoder
    from mfm_ray.storage import Storage

AUTO, FOLDER = "auto", "autoencoder"


@dataclass(frozen=True)
class Decoding:
    """How pictures are made of latents.

    autoencoder: a folder or `hf://owner/name`; "auto": the model's own, where it has one; None: not at all, samples
    are latents. check: refuse an autoencoder of other weights than the model's latents were made with. at_once:
    pictures that are in the autoencoder at a time.
    """

    autoencoder: str | None = AUTO
    check: bool = True
    at_once: int = AT_ONCE

    @classmethod
    def by(cls, autoencoder: str | Path | Decoding | None) -> Decoding:
        """By what `load_flow_map` is given."""
        if isinstance(autoencoder, Decoding):
            return autoencoder
        return cls(None if autoencoder is None else str(autoencoder))

    @classmethod
    def of(cls, config: Any) -> Decoding:
        """From the keys of a job."""
        return cls(config.autoencoder, config.check_autoencoder, config.decode_at_once)


OWN_DECODING, NO_DECODING = Decoding(), Decoding(None)
"""By the model's own autoencoder where it has one; samples are what the model makes."""


def autoencoder_of(model: Storage, data: Mapping[str, Any], decoding: Decoding) -> str | None:
    """Where the autoencoder is: an absolute path, a URI below the model directory, `hf://...`, or None for none.

    data: of the model's config.json. A relative place is looked for in the model directory first. InputError where an
    autoencoder is asked for by a model that has no latents.
    """
    asked = decoding.autoencoder
    if asked is None or (asked == AUTO and data.get("kind") != "latent"):
        return None
    if data.get("kind") != "latent":
        raise InputError(f"autoencoder={asked}: {model} makes {data.get('kind')}, not latents; expected auto or null")
    if asked != AUTO:
        return _place(model, asked)
    if model.is_dir(FOLDER):
        return model.uri_of(FOLDER)
    described = data.get("autoencoder") or {}
    return _place(model, str(described["source"])) if described.get("source") else None


def settled(model: Storage, decoding: Decoding) -> Decoding:
    """The same for processes elsewhere: the autoencoder by its own place, whatever the working directory."""
    from mfm_ray.pretrained import read_model_config

    return replace(decoding, autoencoder=autoencoder_of(model, read_model_config(model)["data"], decoding))


def decoded_space(space: DataSpace, model: Storage, data: Mapping[str, Any], decoding: Decoding) -> DataSpace:
    """The space of a model directory with its decoder, or as it is where it has none. InputError for what cannot be
    read or is another autoencoder than the model's."""
    place = autoencoder_of(model, data, decoding)
    if place is None:
        return space
    autoencoder = _load(place, model, decoding)
    wanted = (data.get("autoencoder") or {}).get("fingerprint")
    if decoding.check and wanted is not None and autoencoder.fingerprint() != wanted:
        raise InputError(
            f"autoencoder={place}: other weights (SHA-256 {autoencoder.fingerprint()[:12]}...) than the latents of "
            f"{model} were made with ({str(wanted)[:12]}...); expected that one, or check_autoencoder=false"
        )
    _check_size(autoencoder.image_shape(space.event_shape), data, place)
    return space.with_decoder(autoencoder, at_once=decoding.at_once)


def sample_shape_of(model: Storage, data: Mapping[str, Any], decoding: Decoding) -> tuple[int, ...] | None:
    """Shape of the pictures of a model directory, known without any weights; None where it makes none."""
    from mfm_ray.autoencoder import read_outline

    space, place = DataSpace.from_config(data), autoencoder_of(model, data, decoding)
    if place is None:
        return space.event_shape if space.makes_images else None
    with _folder(place, model, decoding) as folder:
        shape = read_outline(folder).image_shape(space.event_shape)
    _check_size(shape, data, place)
    return shape


def autoencoder_checksum(model: Storage, decoding: Decoding) -> str | None:
    """SHA-256 of the files of the autoencoder that a model directory is decoded by, None where there is none."""
    from mfm_ray.autoencoder import CONFIG, WEIGHTS
    from mfm_ray.pretrained import read_model_config

    place = autoencoder_of(model, read_model_config(model)["data"], decoding)
    if place is None:
        return None
    digest = hashlib.sha256()
    with _folder(place, model, decoding) as source:
        folder = local_folder(source, key="autoencoder", files=(CONFIG, WEIGHTS))
        for name in (CONFIG, WEIGHTS):
            digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def located(model: Storage, data: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a model's data for another model directory: where its autoencoder is, wherever that lies."""
    place = autoencoder_of(model, data, Decoding())
    return (
        dict(data) if place is None else {**data, "autoencoder": {**(data.get("autoencoder") or {}), "source": place}}
    )


def require_pictures(space: DataSpace, *, key: str, value: object, model: object) -> None:
    """InputError where something looks at pictures and the model makes latents that nothing decodes."""
    if space.kind == "latent" and not space.makes_images:
        raise InputError(
            f"{key}={value}: is about pictures, and {model} makes latents without an autoencoder; "
            "expected autoencoder=<folder or hf://owner/name>"
        )


def _check_size(image_shape: tuple[int, ...], data: Mapping[str, Any], place: str) -> None:
    size = (data.get("autoencoder") or {}).get("image_size")
    if size is not None and image_shape[1:] != (size, size):
        raise InputError(
            f"autoencoder={place}: makes pictures of {image_shape[2]}x{image_shape[1]} of these latents, "
            f"which were made of {size}x{size}"
        )


def _place(model: Storage, source: str) -> str:
    if is_hub(source) or "://" in source:
        return source
    if not Path(source).is_absolute() and not source.startswith("..") and model.is_dir(source):
        return model.uri_of(source)
    return str(Path(source).absolute())


def _load(place: str, model: Storage, decoding: Decoding) -> Autoencoder:
    from mfm_ray.autoencoder import load_autoencoder

    with _folder(place, model, decoding) as folder:
        return load_autoencoder(folder)


@contextmanager
def _folder(place: str, model: Storage, decoding: Decoding) -> Iterator[str]:
    """What `load_autoencoder` reads; a folder below a URI is fetched for as long as the block lasts."""
    from mfm_ray.storage import Storage

    if is_hub(place) or "://" not in place:
        try:
            yield place
        except InputError as error:
            if decoding.autoencoder != AUTO:
                raise
            raise InputError(
                f"{error} (what the latents of {model} were made with; another place: autoencoder=<folder or "
                "hf://owner/name>; none, for latents as they are: autoencoder=null)"
            ) from error
        return
    with tempfile.TemporaryDirectory(prefix="mfm-ray-autoencoder-") as scratch:
        try:
            yield str(Storage(place).download_dir("", scratch))
        except FileNotFoundError as error:
            raise InputError(f"autoencoder={place} does not exist") from error
