"""Evaluations as library code: what `jobs.evaluate protocol=NAME` measures."""

from collections.abc import Mapping
from typing import Any

from mfm_ray.errors import InputError
from mfm_ray.protocols.digits import DigitsProtocol
from mfm_ray.protocols.finetune_digits import FinetuneDigitsProtocol
from mfm_ray.protocols.finetune_gmm import FinetuneGmmProtocol
from mfm_ray.protocols.gmm import GmmProtocol
from mfm_ray.protocols.imagenet_fid import ImagenetFidProtocol
from mfm_ray.protocols.imagenet_finetuning import ImagenetFinetuningProtocol
from mfm_ray.protocols.imagenet_posterior import ImagenetPosteriorProtocol
from mfm_ray.protocols.imagenet_steering import ImagenetSteeringProtocol
from mfm_ray.protocols.imagenet_values import ImagenetValuesProtocol
from mfm_ray.protocols.values import ValuesProtocol
from mfm_ray.settings import from_dict

PiecesProtocol = ImagenetFidProtocol | ImagenetPosteriorProtocol | ImagenetSteeringProtocol | ImagenetValuesProtocol
"""Made in pieces, by Ray workers where there are several."""
Protocol = (
    DigitsProtocol
    | FinetuneDigitsProtocol
    | FinetuneGmmProtocol
    | GmmProtocol
    | ImagenetFinetuningProtocol
    | PiecesProtocol
    | ValuesProtocol
)
PROTOCOLS: dict[str, type[Protocol]] = {
    "digits": DigitsProtocol,
    "finetune_digits": FinetuneDigitsProtocol,
    "finetune_gmm": FinetuneGmmProtocol,
    "gmm": GmmProtocol,
    "imagenet_fid": ImagenetFidProtocol,
    "imagenet_finetuning": ImagenetFinetuningProtocol,
    "imagenet_posterior": ImagenetPosteriorProtocol,
    "imagenet_steering": ImagenetSteeringProtocol,
    "imagenet_values": ImagenetValuesProtocol,
    "mnist": DigitsProtocol,
    "values": ValuesProtocol,
}


def build_protocol(settings: Mapping[str, Any]) -> Protocol:
    """The protocol that a mapping {"name": ..., **settings} describes, checked; InputError in one line."""
    name = settings.get("name")
    if name not in PROTOCOLS:
        raise InputError(f"protocol.name={name}: expected one of {', '.join(PROTOCOLS)}")
    protocol = from_dict(PROTOCOLS[str(name)], settings, prefix="protocol.")
    protocol.check()
    return protocol
