"""What the endpoint asks of a sampler, and what a sampler answers: plain values that both sides know."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mfm_ray.rewards import Minimum, WeightedSum

COMBINED: dict[str, type[WeightedSum] | type[Minimum]] = {"sum": WeightedSum, "minimum": Minimum}
"""What several rewards of a request amount to, by the name that requests give it."""


@dataclass(frozen=True)
class RewardChoice:
    """A reward of a request. title: its name among several of a kind; params: all of them, resolved."""

    title: str
    name: str
    weight: float
    params: dict[str, Any]


@dataclass(frozen=True)
class Generation:
    """A request with nothing left open: equal generations give equal images.

    method, arguments: as `mfm_ray.building.build_steering` takes them. combine: a name in `COMBINED`. key: who asks,
    for fairness. previews: how many times posterior draws are shown on the way. include: what is answered beside the
    images, such as "trace". source: checkpoint of the model.
    """

    model: str
    method: str
    arguments: dict[str, Any]
    rewards: tuple[RewardChoice, ...]
    num_images: int
    num_steps: int
    dynamics: str
    seed: int
    label: int | None = None
    cfg_scale: float | None = None
    max_nfe: int | None = None
    deadline_s: float | None = None
    on_reward_failure: str = "fail"
    combine: str = "sum"
    key: str = ""
    previews: int = 0
    include: tuple[str, ...] = ()
    source: str = ""
    quality: str = "auto"
    size: str = "auto"

    def without(self, title: str) -> Generation:
        """As if that reward had never been asked for."""
        kept = tuple(choice for choice in self.rewards if choice.title != title)
        return replace(self, rewards=kept) if kept else replace(self, rewards=(), method="none", arguments={})

    def steering(self) -> dict[str, Any]:
        """As it is returned: every choice, given or not."""
        rewards = [{"name": r.name, "weight": r.weight, "params": r.params} for r in self.rewards]
        return {
            "method": self.method,
            "rewards": rewards,
            "combine": self.combine,
            **self.arguments,
            "num_steps": self.num_steps,
            "dynamics": self.dynamics,
            "max_nfe": self.max_nfe,
            "deadline_s": self.deadline_s,
            "on_reward_failure": self.on_reward_failure,
        }


@dataclass(frozen=True)
class Accepted:
    """The sampler has the request."""


@dataclass(frozen=True)
class Progress:
    """A step boundary, and the state there, from which another sampler can go on."""

    step: int
    snapshot: bytes = field(repr=False)


@dataclass(frozen=True)
class Preview:
    """Posterior draws of the current states, (n, C, H, W) in data units; number: which preview, from 0; step: steps
    that lie behind it."""

    number: int
    images: np.ndarray
    step: int = 0


@dataclass(frozen=True)
class Finished:
    """images (n, C, H, W) in data units; reward (n,) of all together, None when unsteered; rewards by title.

    dropped: titles of rewards that failed and were left out, as the request allowed. trace: diagnostics (steps, n) by
    name, empty where the request did not include them. timing: seconds of the sampler that finished the request.
    """

    images: np.ndarray
    reward: np.ndarray | None
    rewards: dict[str, np.ndarray]
    nfe: float
    calls: dict[str, float]
    dropped: tuple[str, ...] = ()
    trace: dict[str, np.ndarray] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """The sampler takes no more for now."""

    message: str


@dataclass(frozen=True)
class Failed:
    """The request was not done. kind: "invalid" (the request's fault), "reward_down", "reward_failed", "internal", or
    "lost" (the sampler is ending; another one can go on); reward: title of the one that is to blame."""

    kind: str
    message: str
    reward: str | None = None


Event = Accepted | Progress | Preview | Finished | Refused | Failed
