"""From a request to a `Generation` with nothing left open: names looked up, defaults taken, limits kept."""

from __future__ import annotations

import dataclasses
import functools
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import yaml
from torch import Tensor

from mfm_ray.building import STEERING, build_steering
from mfm_ray.errors import InputError
from mfm_ray.settings import nearest
from mfm_ray.steering import SMC, AutoDraws, Steering, Unguided
from mfm_ray.steering.budget import within_budget
from mfm_ray.steering.draws import most_draws

from .catalogue import reads_prompts, resolve_params, rewards_of, titles
from .errors import from_input_error, unknown_model, unknown_reward, wrong_value
from .generation import COMBINED, Generation, RewardChoice
from .models import ModelCard
from .presets import NOT_ASKED, SteeringPreset
from .schema import MAX_SEED, GenerationRequest, RewardRequest, SteeringRequest
from .settings import Limits


@dataclass(frozen=True)
class Quality:
    """What a quality means for any method. draws_factor: on the method's own number of posterior draws."""

    num_steps: int
    draws_factor: int = 1


BUILT_IN = {"low": Quality(25), "medium": Quality(50), "high": Quality(100, draws_factor=4)}
"""Where no sweep says better."""
AUTO = "medium"
_NOT_OF_THE_METHOD = {
    "method",
    "rewards",
    "combine",
    "num_steps",
    "dynamics",
    "max_nfe",
    "deadline_s",
    "on_reward_failure",
}


@dataclass(frozen=True)
class _Plan:
    """What a request comes to: the method, cut to its budget, and its steps."""

    method: Steering
    num_steps: int
    max_nfe: int | None


@dataclass(frozen=True)
class Resolver:
    """What is served, and how much of it one request may have.

    rewards: names that are served. presets: of sweeps, by model and quality; `BUILT_IN` where there are none.
    """

    models: Mapping[str, ModelCard]
    rewards: Sequence[str]
    limits: Limits
    presets: Mapping[str, Mapping[str, SteeringPreset]] = field(default_factory=dict)

    def model(self, name: str | None) -> ModelCard:
        """The model that a request names, or the only one. ApiError 404, or 400 where a name is missing."""
        known = list(self.models)
        if name is None and len(known) > 1:
            raise wrong_value("model", f"model: missing; expected one of {', '.join(known)}")
        card = self.models.get(known[0] if name is None else name)
        if card is None:
            raise unknown_model(str(name), known)
        return card

    def reward_params(
        self, name: str, card: ModelCard, given: Mapping[str, Any], *, place: str, of: str, prompt: str = ""
    ) -> dict[str, Any]:
        """Resolved parameters. place: field of the reward's parameters; of: field of its name.

        prompt: of the request, for a reward that reads one and has none of its own.
        """
        known = [reward for reward in rewards_of(card) if reward in self.rewards]
        if name not in known:
            raise unknown_reward(name, known, param=of)
        if reads_prompts(name) and given.get("prompt", "") == "":
            given = {**given, "prompt": prompt}
        try:
            resolved = resolve_params(name, card, given, place=place, max_pixels=self.limits.image_pixels)
        except InputError as error:
            raise from_input_error(error, within=place) from error
        at_most(f"{place}.prompt", len(resolved.get("prompt", "")), self.limits.prompt_chars, "characters")
        return resolved

    def generation(self, request: GenerationRequest, *, key: str = "", seed: int | None = None) -> Generation:
        """The resolved request. seed: for a request without one. ApiError naming the field that is wrong."""
        card, limits = self.model(request.model), self.limits
        steering = request.steering or SteeringRequest()
        at_most("prompt", len(request.prompt), limits.prompt_chars, "characters")
        at_most("n", request.n or 1, limits.images, "images")
        if request.size not in (None, "auto", card.size):
            raise wrong_value("size", f"size={request.size}: expected auto or {card.size}")
        quality = AUTO if request.quality in (None, "auto") else str(request.quality)
        rewards = self._rewards(steering, card, prompt=_wish(request, card))
        preset = self._preset(card, quality, steering, any_rewards=bool(rewards))
        plan = self._plan(steering, quality, preset, any_rewards=bool(rewards))
        method = plan.method
        generation = Generation(
            model=card.id,
            source=card.source,
            method=_name_of(method),
            arguments=_arguments_of(method),
            rewards=() if isinstance(method, Unguided) else rewards,
            num_images=request.n or 1,
            num_steps=plan.num_steps,
            dynamics=_dynamics(steering, preset, method),
            seed=_seed(request.seed, seed),
            label=_label(request, card, free_text=any(reads_prompts(reward.name) for reward in rewards)),
            cfg_scale=_cfg_scale(request, preset, card),
            max_nfe=plan.max_nfe,
            deadline_s=self._deadline(steering),
            on_reward_failure=steering.on_reward_failure,
            combine=steering.combine,
            key=key,
            previews=(request.partial_images or 0) if request.stream else 0,
            include=tuple(dict.fromkeys(request.include)),
            quality=quality,
            size=card.size,
        )
        at_most("steering", row_steps(generation), limits.row_steps, "n x particles x draws x steps")
        return generation

    def _rewards(self, steering: SteeringRequest, card: ModelCard, *, prompt: str) -> tuple[RewardChoice, ...]:
        requested = steering.rewards
        at_most("steering.rewards", len(requested), self.limits.rewards, "rewards")
        chosen = []
        for index, (reward, title) in enumerate(zip(requested, titles([r.name for r in requested]), strict=True)):
            place = f"steering.rewards[{index}]"
            _require_weight(reward, steering.combine, place)
            params = self.reward_params(
                reward.name, card, reward.params, place=f"{place}.params", of=f"{place}.name", prompt=prompt
            )
            chosen.append(RewardChoice(title, reward.name, reward.weight, params))
        return tuple(chosen)

    def _preset(
        self, card: ModelCard, quality: str, steering: SteeringRequest, *, any_rewards: bool
    ) -> SteeringPreset | None:
        """The sweep's preset of that quality, where there is one and it is of the request's method."""
        preset = self.presets.get(card.id, {}).get(quality)
        return preset if preset is not None and preset.suits(steering.method, any_rewards=any_rewards) else None

    def _plan(
        self, steering: SteeringRequest, quality: str, preset: SteeringPreset | None, *, any_rewards: bool
    ) -> _Plan:
        """The method (around a reward that stands in) and its steps, cut to max_nfe where there is one."""
        by_rewards = "gradient" if any_rewards else "none"
        name = steering.method or (preset.method if preset else by_rewards)
        if any_rewards and name == "none":
            raise wrong_value("steering.method", "steering.method=none: takes no rewards; choose a method that steers")
        if not any_rewards and name != "none":
            raise wrong_value("steering.rewards", f"steering.rewards=[]: steering.method={name} needs at least one")
        _refuse_unknown(steering)
        given = {key: getattr(steering, key) for key in steering.model_fields_set - _NOT_OF_THE_METHOD}
        stated = {key: value for key, value in given.items() if value is not None or key == "trust_region"}
        arguments = {**(preset.arguments if preset else _defaults(name, BUILT_IN[quality])), **stated}
        num_steps = steering.num_steps or (preset or BUILT_IN[quality]).num_steps
        max_nfe = preset.max_nfe if preset and "max_nfe" not in steering.model_fields_set else steering.max_nfe
        self._limit(arguments, num_steps)
        try:
            method = build_steering({"name": name, **arguments}, _stand_in) or Unguided()
            if max_nfe is not None:
                method, num_steps = within_budget(method, num_steps, max_nfe)
        except ValueError as error:
            raise from_input_error(error, within="steering") from error
        return _Plan(method, num_steps, max_nfe)

    def _limit(self, arguments: Mapping[str, Any], num_steps: int) -> None:
        draws, particles = arguments.get("num_draws"), arguments.get("num_particles")
        if isinstance(draws, int):
            at_most("steering.num_draws", draws, self.limits.draws, "draws")
        if isinstance(particles, int):
            at_most("steering.num_particles", particles, self.limits.particles, "particles")
        at_most("steering.num_steps", num_steps, self.limits.steps, "steps")

    def _deadline(self, steering: SteeringRequest) -> float:
        longest = self.limits.deadline_s
        if steering.deadline_s is not None and steering.deadline_s > longest:
            raise wrong_value(
                "steering.deadline_s", f"steering.deadline_s={steering.deadline_s:g}: at most {longest:g}"
            )
        return steering.deadline_s or longest


def row_steps(generation: Generation) -> int:
    """Rows that the sampler's network sees, at most: images x particles x draws x steps."""
    return rows_of(generation) * generation.num_steps


def rows_of(generation: Generation) -> int:
    """Rows of one step: images x particles x draws."""
    draws = most_draws(generation.arguments.get("num_draws", 1))
    return generation.num_images * generation.arguments.get("num_particles", 1) * draws


def _require_weight(reward: RewardRequest, combine: str, place: str) -> None:
    try:
        COMBINED[combine].require_weight(reward.weight)
    except InputError as error:
        raise from_input_error(error, within=place) from error


def at_most(param: str, value: int, limit: int, what: str) -> None:
    if value > limit:
        raise wrong_value(param, f"{param}: {value} {what}; expected at most {limit}")


def _stand_in(samples: Tensor) -> Tensor:
    """Stands where the reward will be while a method is only being judged."""
    raise AssertionError("a request is judged without a reward")


@functools.cache
def configured(method: str) -> dict[str, Any]:
    """The method's own file of `mfm_ray/conf/steering`, where defaults stand."""
    configured = yaml.safe_load((resources.files("mfm_ray.conf") / "steering" / f"{method}.yaml").read_text())
    return {key: value for key, value in configured.items() if key not in ("name", *NOT_ASKED)}


def _refuse_unknown(steering: SteeringRequest) -> None:
    """Names that no method has; those of another method are refused by the constructor."""
    methods = {field.name for cls in STEERING.values() for field in dataclasses.fields(cls)} - set(NOT_ASKED)
    known = {*SteeringRequest.model_fields, *methods}
    for name, value in (steering.model_extra or {}).items():
        if name not in known:
            close = nearest(name, known)
            hint = f"; did you mean {close}?" if close else f"; expected {', '.join(sorted(known))}"
            raise wrong_value(f"steering.{name}", f"steering.{name}: unknown field{hint}")
        if not isinstance(value, str | int | float | None):
            raise wrong_value(f"steering.{name}", f"steering.{name}: expected a number, a text or null")


def _defaults(method: str, quality: Quality) -> dict[str, Any]:
    defaults = dict(configured(method))
    if isinstance(defaults.get("num_draws"), int):
        defaults["num_draws"] *= quality.draws_factor
    return defaults


def _name_of(method: Steering) -> str:
    return next((name for name, cls in STEERING.items() if type(method) is cls), "none")


def _arguments_of(method: Steering) -> dict[str, Any]:
    """The arguments that make the method again, but its reward; draws_at_once is the sampler's own business."""
    if isinstance(method, Unguided) or not dataclasses.is_dataclass(method):
        return {}
    own = [field.name for field in dataclasses.fields(method) if field.name not in NOT_ASKED]
    return {name: _plain(getattr(method, name)) for name in own}


def _plain(value: Any) -> Any:
    return "auto" if isinstance(value, AutoDraws) else value


def _dynamics(steering: SteeringRequest, preset: SteeringPreset | None, method: Steering) -> str:
    dynamics = steering.dynamics or (preset.dynamics if preset else None) or method.default_dynamics
    if isinstance(method, SMC) and dynamics == "ode":
        raise wrong_value("steering.dynamics", "steering.dynamics=ode: expected sde; smc weighs random transitions")
    return dynamics


def _seed(given: int | None, otherwise: int | None) -> int:
    if given is not None:
        return given
    return secrets.randbelow(MAX_SEED + 1) if otherwise is None else otherwise


def _wish(request: GenerationRequest, card: ModelCard) -> str:
    """What rewards read that have no prompt of their own: the request's, or the name of its class."""
    chosen = request.class_label
    if request.prompt.strip() or chosen is None or chosen >= len(card.class_names):
        return request.prompt
    return card.class_names[chosen]


def _label(request: GenerationRequest, card: ModelCard, *, free_text: bool) -> int | None:
    """The class, by number or by its name in the prompt. free_text: a reward reads the prompt, which may be any."""
    if request.class_label is not None and request.class_label >= card.num_classes:
        allowed = f"0 to {card.num_classes - 1}" if card.num_classes else "null: this model has no classes"
        raise wrong_value("class_label", f"class_label={request.class_label}: expected {allowed}")
    prompt = request.prompt.strip()
    if not prompt:
        return request.class_label
    if prompt not in card.class_names:
        if free_text:
            return request.class_label
        close = nearest(prompt, card.class_names)
        allowed = f"a class, one of {', '.join(card.class_names)}, or nothing" if card.class_names else "nothing"
        hint = f"; did you mean {close}?" if close else ""
        raise wrong_value("prompt", f"prompt={prompt[:40]}: {card.id} has no text encoder; expected {allowed}{hint}")
    label = card.class_names.index(prompt)
    if request.class_label not in (None, label):
        raise wrong_value("prompt", f"prompt={prompt}: is class {label}, but class_label={request.class_label}")
    return label


def _cfg_scale(request: GenerationRequest, preset: SteeringPreset | None, card: ModelCard) -> float | None:
    given = request.cfg_scale
    if preset is not None and "cfg_scale" not in request.model_fields_set:
        given = preset.cfg_scale
    if given is not None and given not in card.cfg_scales:
        known = ", ".join(map(str, card.cfg_scales)) or "null alone: this model has none"
        raise wrong_value("cfg_scale", f"cfg_scale={given:g}: expected one of {known}")
    return given
