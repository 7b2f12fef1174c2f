"""What a method can do within a given number of calls: the plan is made before the first call, so it cannot overrun."""

from __future__ import annotations

from mfm_ray.flow_map import require_at_least_one
from mfm_ray.steering.guidance import Unguided
from mfm_ray.steering.method import Steering
from mfm_ray.steering.selection import BestOfN

FEWEST_STEPS = 5
"""Draws and particles are halved before a run gets shorter than this."""


def within_budget(steering: Steering, num_steps: int, max_nfe: int) -> tuple[Steering, int]:
    """The method and number of steps that fit into max_nfe calls an image (counted as `Samples.nfe` does).

    Best-of-N takes fewer candidates of full length. Every other method takes fewer steps, down to `FEWEST_STEPS`, then
    half the draws or particles, again and again, then fewer steps still; where one step with one draw is too much, what
    is left goes into unsteered steps. ValueError for max_nfe below 1.
    """
    require_at_least_one(max_nfe=max_nfe)
    if isinstance(steering, BestOfN):
        affordable = min(steering.num_particles, max_nfe // (num_steps + 1))
        if affordable >= 1:
            return BestOfN(steering.reward, num_particles=affordable), num_steps
    while steering.cost().steps_within(max_nfe) < min(num_steps, FEWEST_STEPS):
        thriftier = steering.thriftier()
        if thriftier is None:
            break
        steering = thriftier
    steps = min(num_steps, steering.cost().steps_within(max_nfe))
    return (steering, steps) if steps >= 1 else (Unguided(), min(num_steps, max_nfe))
