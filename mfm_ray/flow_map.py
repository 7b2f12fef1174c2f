"""The meta flow map: a stochastic flow map that draws x_1 ~ p(x_1 | x_t) in one network call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mfm_ray.interpolants import expand_time
from mfm_ray.noise import Noise, Stream, as_noise

if TYPE_CHECKING:
    from mfm_ray.data_space import DataSpace


class FlowMap(nn.Module, ABC):
    """Average velocity v_{s,u}(x_s; t, x_t) of the inner flow from N(0, Id) at s = 0 to p(x_1 | x_t) at u = 1.

    Everything else is a reading of that one function: the map is X_{s,u}(x) = x + (u - s) v_{s,u}(x), the inner
    velocity its diagonal s = u, a posterior draw X_{0,1}(eps), and the marginal drift b_t(x) the diagonal at
    conditioning time 0, where the outer state carries no information.

    Shapes: states (B, *event), times (B,) float in [0, 1], labels (B,) int64 in [0, num_classes] or None (the null
    class, which is index num_classes), cfg_scale a value of `cfg_scales`, one for each row (B,), or None.

    Args:
        space: the model's space, event shape and the way to data units.
        num_classes: number of labels; 0 for an unconditional model.
        cfg_scales: guidance scales that the network was trained with; empty when there were none.
    """

    def __init__(self, space: DataSpace, *, num_classes: int = 0, cfg_scales: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.space = space
        self.num_classes = num_classes
        self.cfg_scales = cfg_scales

    recomputes: ClassVar[bool] = False
    """Whether `recompute_activations` may be asked for."""

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.space.event_shape

    @abstractmethod
    def velocity(
        self,
        x_s: Tensor,
        s: Tensor,
        u: Tensor,
        *,
        t: Tensor,
        x_t: Tensor,
        label: Tensor | None = None,
        cfg_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Average velocity of the inner flow over [s, u], (B, *event); the instantaneous one where s = u."""

    @abstractmethod
    def posterior_spread(self, t: Tensor) -> Tensor:
        """Root of the total variance of p(x_1 | x_t), averaged over x_t in the Gaussian approximation, (B,)."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What `networks.build_network` needs to build this network again, JSON-able."""

    def in_full_precision(self) -> FlowMap:
        """The same map computed in float32, whatever autocast it is wrapped in."""
        return self

    def recompute_activations(self, on: bool = True) -> None:
        """Keep less for the backward pass and compute it again there, or no longer; nothing else changes.

        ValueError from a network that cannot (`recomputes`).
        """
        if on:
            raise ValueError(f"{type(self).__name__} has no blocks to compute again")

    def forward(
        self,
        x_s: Tensor,
        s: Tensor,
        u: Tensor,
        *,
        t: Tensor,
        x_t: Tensor,
        label: Tensor | None = None,
        cfg_scale: float | Tensor | None = None,
    ) -> Tensor:
        """The map X_{s,u}(x_s) = x_s + (u - s) v_{s,u}(x_s), (B, *event); x_s itself where s = u."""
        velocity = self.velocity(x_s, s, u, t=t, x_t=x_t, label=label, cfg_scale=cfg_scale)
        return x_s + expand_time(u - s, x_s) * velocity

    def drift(
        self, x_t: Tensor, t: Tensor, *, label: Tensor | None = None, cfg_scale: float | Tensor | None = None
    ) -> Tensor:
        """Marginal velocity b_t(x) = E[x_1 - x_0 | x_t = x], (B, *event): the diagonal at conditioning time 0."""
        zero = torch.zeros_like(t)
        return self.velocity(x_t, t, t, t=zero, x_t=torch.zeros_like(x_t), label=label, cfg_scale=cfg_scale)

    def label_or_null(self, label: Tensor | None, like: Tensor) -> Tensor:
        """The labels, or the null class for every row of `like` (B,) where there are none, (B,) int64."""
        if label is None:
            return torch.full(like.shape, self.num_classes, dtype=torch.int64, device=like.device)
        return label

    def posterior_draws(
        self,
        x_t: Tensor,
        t: Tensor,
        *,
        num_draws: int,
        generator: torch.Generator | Noise,
        label: Tensor | None = None,
        cfg_scale: float | Tensor | None = None,
        num_steps: int = 1,
        first_draw: int = 0,
    ) -> Tensor:
        """i.i.d. draws x_1 ~ p(x_1 | x_t), (B, num_draws, *event), differentiable in x_t at fixed inner noise.

        One step is X_{0,1}(eps); more compose the map over the uniform grid of `num_steps` steps. Exact when the
        map is. first_draw: number of the first draw, for keyed noise, so that draws can be made in parts. Raises
        ValueError for num_draws or num_steps below 1.
        """
        require_at_least_one(num_draws=num_draws, num_steps=num_steps)
        noise = as_noise(generator, like=x_t).fold_in(Stream.DRAW).spread(num_draws, first=first_draw)
        x = noise.normal(*self.event_shape).to(x_t).flatten(0, 1)
        times, states = t.repeat_interleave(num_draws), x_t.repeat_interleave(num_draws, dim=0)
        labels = None if label is None else label.repeat_interleave(num_draws)
        for step in range(num_steps):
            s, u = (torch.full_like(times, edge / num_steps) for edge in (step, step + 1))
            x = self(x, s, u, t=times, x_t=states, label=labels, cfg_scale=cfg_scale)
        return x.unflatten(0, (x_t.shape[0], num_draws))


def require_at_least_one(**counts: int) -> None:
    """ValueError naming the first argument that is not an integer of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value}: expected an integer of at least 1")
