"""The rewards that can be served: their parameters with ranges and defaults, and how they are built from them.

A request names a reward and its parameters; nothing that it says is a path, a URL or a Python name.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from mfm_ray.building import PROMPT_REWARDS, build_reward
from mfm_ray.errors import InputError, refuse_unknown_arguments
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.pretrained import load_classifier
from mfm_ray.rewards import MaskedObservation, Thresholded, half_mask
from mfm_ray.settings import Allowed, expected, from_dict, leaves
from mfm_ray.steering import Reward

from .models import ModelCard, heldout_images
from .pictures import decode_mask, decode_png

Parameters = dict[str, tuple[Any, Allowed]]
"""Type and bounds of each parameter of a reward."""

_JSON_TYPES = {
    float: "number",
    int: "integer",
    str: "string",
    bool: "boolean",
    list: "array",
    types.NoneType: "null",
}
_OF_A_REQUEST = ("prompt", "name")
"""Arguments of a prompt reward's constructor that no operator gives."""
_CEILING = Allowed(doc="no gain above this value, in the reward's own units; null: no such ceiling")


@dataclass(frozen=True)
class RewardKind:
    """A reward that can be served. parameters: as a model has them; needs: whether a model can have this reward.

    has_network: a published network scores, which is served only where the operator names the reward.
    """

    doc: str
    parameters: Callable[[ModelCard], Parameters]
    needs: Callable[[ModelCard], bool] = lambda card: True
    has_network: bool = False


def _symmetry(card: ModelCard) -> Parameters:
    return {
        "scale": (float, Allowed(doc="deviation of a pair of mirrored pixels", above=0)),
        "axis": (str, Allowed(doc="what is mirrored", choices=("horizontal", "vertical"))),
    }


def _brightness(card: ModelCard) -> Parameters:
    return {
        "target": (float, Allowed(doc="mean pixel, 0 black to 1 white", minimum=0, maximum=1)),
        "scale": (float, Allowed(doc="deviation around the target", above=0)),
    }


def _masked_observation(card: ModelCard) -> Parameters:
    return {
        "half": (str, Allowed(doc="the half that is seen", choices=("upper", "lower", "left", "right"))),
        "noise": (float, Allowed(doc="deviation of a pixel's noise, in data units", above=0)),
        "row": (int, Allowed(doc="which held-out image is seen", minimum=0, maximum=card.num_heldout - 1)),
        "observed": (str | None, Allowed(doc="the image that is seen, a PNG in base64; null: held-out image `row`")),
        "mask": (str | None, Allowed(doc="pixels of `observed` that are seen, white in a PNG in base64; null: `half`")),
    }


def _class_probability(card: ModelCard) -> Parameters:
    return {"label": (int, Allowed(doc="the class", minimum=0, maximum=card.num_classes - 1))}


def _class_mixture(card: ModelCard) -> Parameters:
    weights = Allowed(doc="one weight for each class, not all 0", minimum=0, length=card.num_classes)
    return {"weights": (list[float], weights)}


def _prompt(card: ModelCard) -> Parameters:
    return {"prompt": (str, Allowed(doc="what the image should show; empty: the request's prompt, or its class"))}


KINDS: dict[str, RewardKind] = {
    "symmetry": RewardKind("log-likelihood of mirrored pixels being equal up to noise", _symmetry),
    "brightness": RewardKind("log-likelihood of the mean pixel being near a target", _brightness),
    "masked_observation": RewardKind(
        "log-likelihood of seeing a part of an image through noise (inpainting)",
        _masked_observation,
        needs=lambda card: card.num_heldout > 0,
    ),
    "class_probability": RewardKind(
        "log-probability of a class, by the model's classifier",
        _class_probability,
        needs=lambda card: card.has_classifier,
    ),
    "class_mixture": RewardKind(
        "log-probability of a mixture of classes, by the model's classifier",
        _class_mixture,
        needs=lambda card: card.has_classifier,
    ),
    "pickscore": RewardKind("PickScore: preference of people for a prompt", _prompt, has_network=True),
    "hpsv2": RewardKind("HPSv2.1: preference of people for a prompt", _prompt, has_network=True),
    "image_reward": RewardKind("ImageReward: preference of people for a prompt", _prompt, has_network=True),
    "clip_score": RewardKind("100 times the cosine of CLIP's image and text features", _prompt, has_network=True),
    "aesthetic": RewardKind("LAION's aesthetic score, of the image alone", lambda card: {}, has_network=True),
}


def reads_prompts(name: str) -> bool:
    """Whether a reward has the parameter `prompt`."""
    return KINDS[name].parameters is _prompt


def network_arguments(name: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Where a reward's network comes from: what the operator gave, the rest as in its file of `mfm_ray/conf/reward`.

    Empty for a reward without one. InputError naming `rewards.<name>.weights.key` for what its constructor lacks.
    """
    if not KINDS[name].has_network:
        if weights:
            raise InputError(f"rewards.{name}.weights: this reward has no network of its own; expected none")
        return {}
    constructor, place = PROMPT_REWARDS[name], f"rewards.{name}.weights"
    supplied = [key for key in _OF_A_REQUEST if key != "prompt" or reads_prompts(name)]
    refuse_unknown_arguments(weights, constructor, group=place, supplied=supplied)
    own = (key for key in inspect.signature(constructor).parameters if key not in supplied)
    configured = _configured(name)
    return {key: weights.get(key, configured[key]) for key in own}


def rewards_of(card: ModelCard) -> list[str]:
    """Names of the rewards that a model can have."""
    return [name for name, kind in KINDS.items() if kind.needs(card)]


@functools.cache
def schema(name: str, card: ModelCard) -> type:
    """The parameters of a reward as a typed setting, the form that `from_dict` checks."""
    parameters = {**KINDS[name].parameters(card), "threshold": (float | None, _CEILING)}
    fields = [(key, hint, dataclasses.field(metadata={"allowed": a})) for key, (hint, a) in parameters.items()]
    return dataclasses.make_dataclass(name, fields, frozen=True)


@functools.cache
def _configured(name: str) -> dict[str, Any]:
    """The reward's own file of `mfm_ray/conf/reward`, where defaults stand."""
    return yaml.safe_load((resources.files("mfm_ray.conf") / "reward" / f"{name}.yaml").read_text())


def defaults(name: str, card: ModelCard) -> dict[str, Any]:
    """Defaults of all parameters, those of the reward's file brought to the model's own range of classes."""
    configured = _configured(name)
    return {
        key: _default(key, configured.get(key), allowed) for key, (_, allowed) in leaves(schema(name, card)).items()
    }


def _default(key: str, value: Any, allowed: Allowed) -> Any:
    """The default, or where it is out of this model's range: the last class, or all classes alike."""
    if value is None or allowed.admits(value):
        return value
    return [1.0] * allowed.length if allowed.length is not None else allowed.maximum


def resolve_params(
    name: str, card: ModelCard, given: Mapping[str, Any], *, place: str, max_pixels: int
) -> dict[str, Any]:
    """All parameters of a reward, given ones checked and the others at their defaults.

    InputError that begins with `place.key` for the first one that is wrong.
    """
    resolved = dataclasses.asdict(from_dict(schema(name, card), {**defaults(name, card), **given}, prefix=f"{place}."))
    for picture, decode in (("observed", decode_png), ("mask", decode_mask)):
        if resolved.get(picture) is not None:
            try:
                decode(resolved[picture], event_shape=card.sample_shape, max_pixels=max_pixels)
            except ValueError as error:
                raise InputError(f"{place}.{picture}: {error}") from error
    if resolved.get("mask") is not None and resolved["observed"] is None:
        raise InputError(f"{place}.mask: says which pixels of {place}.observed are seen; expected both or neither")
    if reads_prompts(name) and not resolved["prompt"].strip():
        raise InputError(f"{place}.prompt: empty; expected a text here, or as the request's prompt")
    if "weights" in resolved and not any(resolved["weights"]):
        raise InputError(f"{place}.weights={resolved['weights']}: expected at least one above 0")
    return resolved


def describe(name: str, cards: Sequence[ModelCard]) -> dict[str, Any]:
    """The entry of GET /v1/rewards; parameters are those of the first model that has the reward."""
    having = [card for card in cards if name in rewards_of(card)]
    values = defaults(name, having[0])
    return {
        "id": name,
        "object": "reward",
        "description": KINDS[name].doc,
        "models": [card.id for card in having],
        "parameters": {
            key: {"default": values[key], **_described(hint, allowed)}
            for key, (hint, allowed) in leaves(schema(name, having[0])).items()
        },
    }


def _described(hint: Any, allowed: Allowed) -> dict[str, Any]:
    bounds = {
        "minimum": allowed.minimum,
        "maximum": allowed.maximum,
        "exclusive_minimum": allowed.above,
        "enum": allowed.choices,
        "length": allowed.length,
    }
    stated = {key: value for key, value in bounds.items() if value is not None}
    return {"description": allowed.doc, "type": _json_type(hint), "expected": expected(hint, allowed), **stated}


def _json_type(hint: Any) -> list[str]:
    """The kinds of value in JSON Schema's words: `["number", "null"]`."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [_JSON_TYPES[typing.get_origin(member) or member] for member in members]


def titles(names: Sequence[str]) -> list[str]:
    """Names by which several rewards are told apart: symmetry, symmetry_2."""
    seen: Counter[str] = Counter()
    told_apart = []
    for name in names:
        seen[name] += 1
        told_apart.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return told_apart


class RewardSource:
    """Builds the rewards of one model, with what no request holds: its classifier, held-out images, and weights.

    weights: of rewards with a network, by their name, as `network_arguments` takes them.
    """

    def __init__(self, card: ModelCard, weights: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.card, self._weights = card, weights or {}
        self._classifier: DigitClassifier | None = None

    def build(self, name: str, params: Mapping[str, Any]) -> Reward:
        """The reward of resolved parameters. InputError that names `reward.key` where they do not fit together."""
        if params.get("observed") is not None:
            return self._observation(name, params)
        given = {key: value for key, value in params.items() if key not in ("observed", "mask")}
        built = build_reward(
            {"name": name, **given, **network_arguments(name, self._weights.get(name, {}))},
            load_classifier=self._load_classifier,
            load_heldout=lambda place: heldout_images(self.card.data_name),
        )
        assert built is not None, name
        return built

    def _observation(self, name: str, params: Mapping[str, Any]) -> Reward:
        """A part of an image that the request brought: it is the observation as it is, nothing is added to it."""
        shape = self.card.sample_shape
        pixels, drawn = shape[1] * shape[2], params.get("mask")
        observed = decode_png(params["observed"], event_shape=shape, max_pixels=pixels)
        if drawn is None:
            mask = half_mask(shape, params["half"])
        else:
            mask = decode_mask(drawn, event_shape=shape, max_pixels=pixels)
        reward = MaskedObservation(observed=mask * observed, mask=mask, noise=params["noise"], name=name)
        ceiling = params.get("threshold")
        return reward if ceiling is None else Thresholded(reward=reward, threshold=ceiling)

    def _load_classifier(self) -> DigitClassifier:
        if self._classifier is None:
            self._classifier = load_classifier(self.card.source)
        return self._classifier
