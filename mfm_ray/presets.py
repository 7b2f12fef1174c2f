"""Whole recipes by name: steps, times, dynamics, and how gradients are treated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mfm_ray.dynamics import Grid, PowerOfLinear, TimeGrid
from mfm_ray.steering import DPS, GradientGuidance, Search, Steering


@dataclass(frozen=True)
class Preset:
    """A recipe. dynamics None: what each method does best with. rescale: gradients get the norm of the drift, without
    a trust region. search_grid: of `Search`, where it has one of its own.
    """

    num_steps: int = 50
    grid: Grid = field(default_factory=TimeGrid)
    dynamics: str | None = None
    rescale: bool = False
    search_grid: Grid | None = None

    def dynamics_for(self, steering: Steering) -> str:
        return self.dynamics or steering.default_dynamics

    def grid_for(self, steering: Steering) -> Grid:
        own = self.search_grid if isinstance(steering, Search) else None
        return own or self.grid

    def apply(self, steering: Steering) -> Steering:
        if self.rescale and isinstance(steering, GradientGuidance):
            return replace(steering, renormalise="rescale", trust_region=None, estimator="pathwise")
        if self.rescale and isinstance(steering, DPS):
            return replace(steering, renormalise="rescale", trust_region=None)
        return steering


PRESETS = {
    # The paper's cap of (1 - t) / t at 25 changes nothing here: it is one factor a row, which rescaling divides out.
    "paper": Preset(
        num_steps=250,
        grid=TimeGrid(start=0.01, power=1.0),
        dynamics="ode",
        rescale=True,
        search_grid=PowerOfLinear(start=0.01, power=2.5),
    ),
}
