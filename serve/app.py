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

from .api import build_api
from .backend import ServeBackend
from .catalogue import KINDS, rewards_of
from .keys import OPEN, Keys
from .models import ModelCard, read_models
from .resolve import Resolver
from .reward import reward_deployment
from .sampler import sampler_deployment
from .settings import AppSettings, RewardSettings

log = logging.getLogger(__name__)


@serve.ingress()
class Endpoint:
    """The HTTP side: it judges requests and keeps what is needed to resume them; it computes nothing."""

    def __init__(
        self,
        cards: Mapping[str, ModelCard],
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
        self._resolver = Resolver(cards, [reward.name for reward in rewards], settings.limits)

    def __serve_build_asgi_app__(self) -> Any:
        return build_api(self._backend, self._resolver, self._keys, names_requests=False)


def build_app(args: AppSettings) -> serve.Application:
    """The application of these settings. InputError, before any resource is taken, for what cannot be served."""
    cards = read_models(args.model)
    rewards = _served_rewards(args, cards)
    Keys.load(args.keys_file)
    listed = list(cards.values())
    handles = {reward.name: reward_deployment(listed, reward) for reward in rewards if reward.placement == "deployment"}
    sampler = sampler_deployment(listed, args.sampler, rewards, handles, max_rows_waiting=args.limits.rows_waiting)
    options = {"name": "endpoint", "max_ongoing_requests": 2048, **args.ingress.options()}
    return serve.deployment(**options)(Endpoint).bind(cards, rewards, args, sampler, handles)


def _served_rewards(args: AppSettings, cards: Mapping[str, ModelCard]) -> list[RewardSettings]:
    """What the operator named, or everything that any of the models can have."""
    possible = {name for card in cards.values() for name in rewards_of(card)}
    if args.rewards is None:
        return [RewardSettings(name=name) for name in KINDS if name in possible]
    for reward in args.rewards:
        if reward.name not in possible:
            known = ", ".join(name for name in KINDS if name in possible)
            raise InputError(f"rewards: {reward.name} is not among those of the models served; expected {known}")
    if len({reward.name for reward in args.rewards}) < len(args.rewards):
        raise InputError("rewards: a reward is named twice")
    return args.rewards
