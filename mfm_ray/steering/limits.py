"""What keeps a gradient estimate from throwing a sample off the data: trust region and renormalisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfm_ray.interpolants import expand_time


def automatic_radius(num_draws: Tensor, power: int) -> Tensor:
    """The cap "auto" in posterior spreads, from the draws (B,) of each row.

    4 / sqrt(num_draws) where the gradient's share falls with the draws (power 2); else 4 sqrt(num_draws), which stops
    binding as the estimate gets better. One draw has 4 either way.
    """
    return 4.0 * num_draws ** (-0.5 if power == 2 else 0.5)


def limit_shift(correction: Tensor, t: Tensor, *, radius: Tensor) -> Tensor:
    """Shrink corrections (B, *event) so that the posterior mean moves by at most `radius` (B,), keeping directions.

    The shift of E[x_1 | x_t] that an ODE correction stands for is (1 - t) * correction, exactly.
    """
    shift = (1 - t) * _norm(correction)
    return correction * expand_time((radius / shift.clamp_min(1e-20)).clamp_max(1.0), correction)


def _keep(correction: Tensor, velocity: Tensor) -> Tensor:
    return correction


def _rescale(correction: Tensor, velocity: Tensor) -> Tensor:
    return correction * expand_time(_norm(velocity) / (_norm(correction) + 1e-8), correction)


def _clip(correction: Tensor, velocity: Tensor) -> Tensor:
    factor = _norm(velocity) / (_norm(correction) + 1e-8)
    return correction * expand_time(factor.clamp_max(1.0), correction)


RENORMALISATIONS = {"none": _keep, "rescale": _rescale, "clip": _clip}
"""How a correction is brought to the norm of the drift, by the name `renormalise` takes."""


def _norm(x: Tensor) -> Tensor:
    # squares of a stiff reward's gradient leave the range of float32
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64).to(x.dtype)


def check_scale(guidance_scale: float) -> None:
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f"guidance_scale={guidance_scale}: expected a finite number of at least 0")


def check_renormalise(renormalise: str) -> None:
    if renormalise not in RENORMALISATIONS:
        raise ValueError(f"renormalise={renormalise!r}: expected one of {', '.join(RENORMALISATIONS)}")


def check_trust_region(trust_region: float | str | None) -> None:
    if trust_region is None or trust_region == "auto":
        return
    if isinstance(trust_region, str) or not trust_region > 0:
        raise ValueError(f"trust_region={trust_region!r}: expected 'auto', a number above 0, or none")
