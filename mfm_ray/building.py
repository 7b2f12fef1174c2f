"""Steering methods and rewards from plain mappings {"name": ..., **arguments}: what configurations and requests hold.

The constructors are the schema; here only what a mapping cannot hold is supplied: a classifier, a held-out image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mfm_ray.errors import InputError, refuse_unknown_arguments
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.noise import KeyedNoise, Stream
from mfm_ray.rewards import ClassMixture, ClassProbability, MaskedObservation, Symmetry, TargetBrightness, half_mask
from mfm_ray.steering import BestOfN, GradientFreeGuidance, GradientGuidance, Guidance, Reward

STEERING: dict[str, Any] = {
    "gradient": GradientGuidance,
    "gradient_free": GradientFreeGuidance,
    "best_of_n": BestOfN,
}
"""Methods by name; "none" is unsteered."""
ANALYTIC_REWARDS: dict[str, Any] = {"brightness": TargetBrightness, "symmetry": Symmetry}
CLASS_REWARDS: dict[str, Any] = {"class_probability": ClassProbability, "class_mixture": ClassMixture}
REWARDS = ("none", "masked_observation", *ANALYTIC_REWARDS, *CLASS_REWARDS)


def build_steering(steering: Mapping[str, Any], reward: Reward | None) -> Guidance | BestOfN | None:
    """The method of that name around the reward, None for "none". InputError naming the key that is wrong."""
    name, arguments = _named(steering, "steering", ("none", *STEERING))
    if name == "none":
        _refuse_arguments("steering", name, arguments)
        return None
    if reward is None:
        raise InputError(f"reward=none: steering={name} needs a reward")
    return _construct(STEERING[name], "steering", arguments, reward=reward)


def build_reward(
    reward: Mapping[str, Any],
    *,
    load_classifier: Callable[[], DigitClassifier],
    load_heldout: Callable[[str | None], Tensor],
    seed: int = 0,
) -> Reward | None:
    """The reward of that name, None for "none".

    load_classifier: the classifier beside the model. load_heldout: held-out images (N, C, H, W) in data units of
    prepared data at a place, or of the model's own kind for None. seed: of the noise of an observation.
    """
    name, arguments = _named(reward, "reward", REWARDS)
    if name == "none":
        _refuse_arguments("reward", name, arguments)
        return None
    if name == "masked_observation":
        return _masked_observation(arguments, load_heldout, seed)
    if name in CLASS_REWARDS:
        return _construct(CLASS_REWARDS[name], "reward", arguments, classifier=load_classifier())
    return _construct(ANALYTIC_REWARDS[name], "reward", arguments)


def _masked_observation(
    arguments: Mapping[str, Any], load_heldout: Callable[[str | None], Tensor], seed: int
) -> MaskedObservation:
    """One half of a held-out image, seen through noise that is really added."""
    known = {"half", "noise", "row", "data"}
    if unknown := sorted(set(arguments) - known):
        raise InputError(f"reward.{unknown[0]}: unknown key; expected {', '.join(sorted(known))}")
    row, noise = arguments.get("row", 0), arguments.get("noise", 0.1)
    images = load_heldout(arguments.get("data"))
    if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < len(images):
        raise InputError(f"reward.row={row}: expected a held-out row, 0 to {len(images) - 1}")
    mask = half_mask(tuple(images.shape[1:]), arguments.get("half", "upper"))
    reward = MaskedObservation(observed=images[row], mask=mask, noise=noise, name="masked_observation")
    key = KeyedNoise.for_images(seed, 1, first=row).fold_in(Stream.OUTER)
    reward.observed = mask * (images[row] + noise * key.normal(*images.shape[1:])[0])
    return reward


def _named(mapping: Mapping[str, Any], group: str, names: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    arguments = dict(mapping)
    name = arguments.pop("name", None)
    if name not in names:
        raise InputError(f"{group}.name={name}: expected one of {', '.join(names)}")
    return str(name), arguments


def _refuse_arguments(group: str, name: str, arguments: Mapping[str, Any]) -> None:
    if arguments:
        raise InputError(f"{group}.{next(iter(arguments))}: unknown key; {group}={name} takes none")


def _construct(cls: Any, group: str, arguments: Mapping[str, Any], **supplied: Any) -> Any:
    """Calls the constructor; its refusals come back with the group in front."""
    refuse_unknown_arguments(arguments, cls, group=group, supplied=supplied)
    try:
        return cls(**supplied, **arguments)
    except (ValueError, TypeError) as error:
        raise InputError(f"{group}.{str(error).splitlines()[0]}") from error
