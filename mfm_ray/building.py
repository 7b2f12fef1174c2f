"""Steering methods and rewards from plain mappings {"name": ..., **arguments}: what configurations and requests hold.

The constructors are the schema; here only what a mapping cannot hold is supplied: a classifier, a held-out image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mfm_ray.errors import InputError, refuse_unknown_arguments
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.noise import KeyedNoise, Stream
from mfm_ray.rewards import (
    Aesthetic,
    ClassMixture,
    ClassProbability,
    ClipScore,
    Combination,
    HPSv2,
    ImageReward,
    LinearGaussian,
    MaskedObservation,
    Minimum,
    PickScore,
    Symmetry,
    TargetBrightness,
    Thresholded,
    WeightedSum,
    half_mask,
)
from mfm_ray.settings import nearest
from mfm_ray.steering import (
    DPS,
    SMC,
    BestOfN,
    GradientFreeGuidance,
    GradientGuidance,
    PosteriorResampling,
    Reward,
    Search,
    Steering,
)

STEERING: dict[str, Any] = {
    "gradient": GradientGuidance,
    "gradient_free": GradientFreeGuidance,
    "dps": DPS,
    "resampling": PosteriorResampling,
    "search": Search,
    "smc": SMC,
    "best_of_n": BestOfN,
}
"""Methods by name; "none" is unsteered."""
ANALYTIC_REWARDS: dict[str, Any] = {
    "brightness": TargetBrightness,
    "linear_gaussian": LinearGaussian,
    "symmetry": Symmetry,
}
CLASS_REWARDS: dict[str, Any] = {"class_probability": ClassProbability, "class_mixture": ClassMixture}
PROMPT_REWARDS: dict[str, Any] = {
    "pickscore": PickScore,
    "hpsv2": HPSv2,
    "image_reward": ImageReward,
    "clip_score": ClipScore,
    "aesthetic": Aesthetic,
}
"""Published networks that score images, all but the aesthetic score for a prompt."""
COMBINED_REWARDS: dict[str, type[Combination]] = {"weighted_sum": WeightedSum, "minimum": Minimum}
SCORING_REWARDS = ("masked_observation", *ANALYTIC_REWARDS, *CLASS_REWARDS, *PROMPT_REWARDS, *COMBINED_REWARDS)
REWARDS = ("none", *SCORING_REWARDS)
_OF_EVERY_REWARD = ("weight", "threshold")
MakeElsewhere = Callable[[str, str, Mapping[str, Any], str], Reward]
"""From a reward's name, the title it is told apart by, its parameters (threshold included) and its place in the
configuration to the reward."""


def build_steering(steering: Mapping[str, Any], reward: Reward | None) -> Steering | None:
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
    elsewhere: MakeElsewhere | None = None,
) -> Reward | None:
    """The reward of that name, None for "none".

    Every reward takes `threshold` (`Thresholded`, in its own units) and `weight` (the paper's lambda, after the
    threshold); weighted_sum and minimum take `parts`, a list of such mappings. InputError naming the key that is wrong.

    load_classifier: the classifier beside the model. load_heldout: held-out images (N, C, H, W) in data units of
    prepared data at a place, or of the model's own kind for None. seed: of the noise of an observation. elsewhere:
    makes every reward that is no combination in the place of its constructor, such as one that a server answers.
    """
    name, arguments = _named(reward, "reward", REWARDS)
    if name == "none":
        _refuse_arguments("reward", name, arguments)
        return None
    weight = _weight(reward, "reward", WeightedSum)
    built = _scoring_reward(reward, "reward", _Sources(load_classifier, load_heldout, seed, elsewhere))
    return built if weight == 1 else WeightedSum(rewards=[built], weights=[weight], name=name)


def build_judges(
    judges: Sequence[Mapping[str, Any]],
    *,
    load_classifier: Callable[[], DigitClassifier],
    load_heldout: Callable[[str | None], Tensor],
    seed: int = 0,
) -> dict[str, Reward]:
    """Rewards by name that score samples and are never optimised; two of a kind are told apart as x, x_2."""
    built: dict[str, Reward] = {}
    seen: Counter[str] = Counter()
    for index, judge in enumerate(judges):
        place = f"judges[{index}]"
        if not isinstance(judge, Mapping):
            raise InputError(f"{place}={judge}: expected a reward {{name: ...}}")
        name, _ = _named(judge, place, SCORING_REWARDS)
        seen[name] += 1
        title = name if seen[name] == 1 else f"{name}_{seen[name]}"
        built[title] = _scoring_reward(judge, place, _Sources(load_classifier, load_heldout, seed), title=title)
    return built


@dataclass(frozen=True)
class _Sources:
    """Where rewards get what no mapping holds."""

    load_classifier: Callable[[], DigitClassifier]
    load_heldout: Callable[[str | None], Tensor]
    seed: int
    elsewhere: MakeElsewhere | None = None


def _scoring_reward(reward: Mapping[str, Any], group: str, sources: _Sources, *, title: str | None = None) -> Reward:
    """The reward with its threshold, before its weight. title: its name among the parts of a combination."""
    name, given = _named(reward, group, SCORING_REWARDS)
    if sources.elsewhere is not None and name not in COMBINED_REWARDS:
        parameters = {key: value for key, value in given.items() if key != "weight"}
        return sources.elsewhere(name, title or name, parameters, group)
    threshold = given.pop("threshold", None)
    given.pop("weight", None)  # whoever combines the reward applies it
    arguments = {"name": title or name, **given}
    built: Any
    if name == "masked_observation":
        built = _masked_observation(arguments, group, sources)
    elif name in COMBINED_REWARDS:
        built = _combination(COMBINED_REWARDS[name], arguments, group, sources)
    elif name in CLASS_REWARDS:
        classifier = sources.load_classifier()
        built = _construct(CLASS_REWARDS[name], group, arguments, further=_OF_EVERY_REWARD, classifier=classifier)
    else:
        built = _construct({**ANALYTIC_REWARDS, **PROMPT_REWARDS}[name], group, arguments, further=_OF_EVERY_REWARD)
    if threshold is None:
        return built
    return _construct(Thresholded, group, {"threshold": threshold}, reward=built)


def _combination(cls: type[Combination], arguments: Mapping[str, Any], group: str, sources: _Sources) -> Combination:
    """The parts and their weights; two of a kind are told apart as symmetry, symmetry_2."""
    _refuse_unknown(arguments, group, ("parts", *_OF_EVERY_REWARD))
    parts = arguments.get("parts")
    if not isinstance(parts, list | tuple) or not parts:
        raise InputError(f"{group}.parts={parts}: expected a list [...] of at least one {{name: ..., weight: ...}}")
    seen: Counter[str] = Counter()
    rewards, weights = [], []
    for index, part in enumerate(parts):
        place = f"{group}.parts[{index}]"
        if not isinstance(part, Mapping):
            raise InputError(f"{place}={part}: expected a reward {{name: ..., weight: ...}}")
        name, _ = _named(part, place, SCORING_REWARDS)
        seen[name] += 1
        title = name if seen[name] == 1 else f"{name}_{seen[name]}"
        weights.append(_weight(part, place, cls))
        rewards.append(_scoring_reward(part, place, sources, title=title))
    return cls(rewards=rewards, weights=weights, name=arguments["name"])


def _weight(reward: Mapping[str, Any], group: str, combined_as: type[Combination]) -> float:
    weight = reward.get("weight", 1.0)
    try:
        combined_as.require_weight(weight)
    except InputError as error:
        raise InputError(f"{group}.{error}") from error
    return float(weight)


def _masked_observation(arguments: Mapping[str, Any], group: str, sources: _Sources) -> MaskedObservation:
    """One half of a held-out image, seen through noise that is really added."""
    _refuse_unknown(arguments, group, ("data", "half", "noise", "row", *_OF_EVERY_REWARD))
    row, noise = arguments.get("row", 0), arguments.get("noise", 0.1)
    images = sources.load_heldout(arguments.get("data"))
    if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < len(images):
        raise InputError(f"{group}.row={row}: expected a held-out row, 0 to {len(images) - 1}")
    try:
        mask = half_mask(tuple(images.shape[1:]), arguments.get("half", "upper"))
        reward = MaskedObservation(observed=images[row], mask=mask, noise=noise, name=arguments["name"])
    except ValueError as error:
        raise InputError(f"{group}.{str(error).splitlines()[0]}") from error
    key = KeyedNoise.for_images(sources.seed, 1, first=row).fold_in(Stream.OUTER)
    reward.observed = mask * (images[row] + noise * key.normal(*images.shape[1:])[0])
    return reward


def _named(mapping: Mapping[str, Any], group: str, names: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    arguments = dict(mapping)
    name = arguments.pop("name", None)
    if name not in names:
        close = nearest(str(name), names)
        hint = f"; did you mean {close}?" if close else ""
        raise InputError(f"{group}.name={name}: expected one of {', '.join(names)}{hint}")
    return str(name), arguments


def _refuse_arguments(group: str, name: str, arguments: Mapping[str, Any]) -> None:
    if arguments:
        raise InputError(f"{group}.{next(iter(arguments))}: unknown key; {group}={name} takes none")


def _refuse_unknown(arguments: Mapping[str, Any], group: str, known: tuple[str, ...]) -> None:
    if unknown := sorted(set(arguments) - {"name", *known}):
        close = nearest(unknown[0], known)
        hint = f"; did you mean {close}?" if close else ""
        raise InputError(f"{group}.{unknown[0]}: unknown key; expected {', '.join(known)}{hint}")


def _construct(
    cls: Any, group: str, arguments: Mapping[str, Any], *, further: tuple[str, ...] = (), **supplied: Any
) -> Any:
    """Calls the constructor; its refusals come back with the group in front."""
    refuse_unknown_arguments(arguments, cls, group=group, supplied=supplied, further=further)
    try:
        return cls(**supplied, **arguments)
    except (ValueError, TypeError) as error:
        raise InputError(f"{group}.{str(error).splitlines()[0]}") from error
