"""The application: one endpoint, one sampler, one deployment for each reward.

serve run serve.app:build_app model=runs/digits/model                 (from the project's folder)
serve run serve.app:build_app model=a/model,b/model rewards=symmetry,brightness
serve deploy serve/config.yaml                                        (to a running cluster)
"""

# No `from __future__ import annotations` here: Serve reads the type of build_app's argument as it stands.
import logging
from collections.abc import Mapping
from typing import Any

from ray import serve

from mfm_ray.errors import InputError
from mfm_ray.latent_models import Decoding

from .api import build_api
from .backend import ServeBackend
from .catalogue import KINDS, network_arguments, reads_prompts, rewards_of
from .errors import RETRY_AFTER_S, ApiError
from .keys import OPEN, Keys
from .models import ModelCard, read_models
from .presets import SteeringPreset, read_presets
from .resolve import Resolver
from .reward import reward_deployment
from .sampler import sampler_deployment
from .schema import GenerationRequest
from .settings import AppSettings, RewardSettings

log = logging.getLogger(__name__)


@serve.ingress()
class Endpoint:
    """The HTTP side: it judges requests and keeps what is needed to resume them; it computes nothing."""

    def __init__(
        self,
        resolver: Resolver,
        rewards: list[RewardSettings],
        settings: AppSettings,
        sampler: Any,
        handles: Mapping[str, Any],
    ) -> None:
        self._keys = Keys.load(settings.keys_file)
        if not self._keys:
            log.warning(OPEN)
        scorers = {r.name: (True, handles[r.name]) if r.name in handles else (False, sampler) for r in rewards}
        self._backend = ServeBackend(sampler, scorers, resume_attempts=settings.resume_attempts)
        self._resolver, self._settings = resolver, settings

    def __serve_build_asgi_app__(self) -> Any:
        return build_api(
            self._backend,
            self._resolver,
            self._keys,
            heartbeat_s=self._settings.heartbeat_s,
            names_requests=False,
            access_log=self._settings.access_log,
        )


def build_app(args: AppSettings) -> serve.Application:
    """The application of these settings. InputError, before any resource is taken, for what cannot be served."""
    cards = read_models(args.model, Decoding(args.autoencoder, check=args.check_autoencoder))
    rewards = _served_rewards(args, cards)
    resolver = _resolver(args, cards, rewards)
    Keys.load(args.keys_file)
    listed = list(cards.values())
    handles = {reward.name: reward_deployment(listed, reward) for reward in rewards if reward.placement == "deployment"}
    sampler = sampler_deployment(listed, args.sampler, rewards, handles, max_rows_waiting=args.limits.rows_waiting)
    # Serve's own refusals: where an operator bounds its queue, what is above gets 429 as it does from the endpoint
    refusals = {"status_code": 429, "retry_after_s": RETRY_AFTER_S}
    options = {"max_ongoing_requests": 2048, "backpressure_config": refusals, **args.ingress.options()}
    return serve.deployment(name="endpoint", **options)(Endpoint).bind(resolver, rewards, args, sampler, handles)


def _resolver(args: AppSettings, cards: Mapping[str, ModelCard], rewards: list[RewardSettings]) -> Resolver:
    """What judges requests. InputError for a preset that no request could have, such as one above the limits."""
    names = [reward.name for reward in rewards]
    resolver = Resolver(cards, names, args.limits, presets=read_presets(args.presets, cards))
    for model, presets in resolver.presets.items():
        allowed = [name for name in rewards_of(cards[model]) if name in names]
        for quality, preset in presets.items():
            try:
                resolver.generation(_request_of(model, quality, preset, allowed))
            except ApiError as error:
                raise InputError(f"presets: {quality} of {model}: {error.message}") from error
    return resolver


def _request_of(model: str, quality: str, preset: SteeringPreset, rewards: list[str]) -> GenerationRequest:
    """A request that leaves everything to the preset."""
    needed = rewards[:1] if preset.method != "none" else []
    wishes = [{"name": name, "params": {"prompt": "any"} if reads_prompts(name) else {}} for name in needed]
    steering = {"method": preset.method, "rewards": wishes}
    return GenerationRequest.model_validate({"model": model, "quality": quality, "steering": steering})


def _served_rewards(args: AppSettings, cards: Mapping[str, ModelCard]) -> list[RewardSettings]:
    """What the operator named, or everything that any of the models can have and that brings no network of its own."""
    possible = {name for card in cards.values() for name in rewards_of(card)}
    if args.rewards is None:
        own = [name for name, kind in KINDS.items() if name in possible and not kind.has_network]
        return [RewardSettings(name=name) for name in own]
    for reward in args.rewards:
        if reward.name not in possible:
            known = ", ".join(name for name in KINDS if name in possible)
            raise InputError(f"rewards: {reward.name} is not among those of the models served; expected {known}")
        network_arguments(reward.name, reward.weights)
    if len({reward.name for reward in args.rewards}) < len(args.rewards):
        raise InputError("rewards: a reward is named twice")
    return args.rewards
