"""The closed-form flow map of a Gaussian, which a network is asked only to correct."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_FLOOR = 1e-12  # of a variance that vanishes only at s = t = 1
# Of the data's own variances, as a share of their mean. Images have pixels that almost never vary: taken at its word,
# the Gaussian is certain of them near t = 1, and the one image that differs outweighs a thousand others in the loss.
_RELATIVE_FLOOR = 3e-3


@dataclass(frozen=True)
class GaussianVelocity:
    """The Gaussian part of a velocity and whitened inputs for the network, all (B, D) in principal coordinates.

    velocity: average velocity over [s, u] of the exact map towards the Gaussian posterior.
    scale: standard deviation of x_1 - eps given (x_s, x_t), the natural size of a correction.
    inner: x_s less its posterior mean path, of unit variance under the Gaussian. outer, merged: x_t, and x_s and x_t
    merged into one observation, each whitened and times its correlation with x_1 (0 at t = 0, where x_t says nothing).
    merged_time: (B,), the time at which the merged observation stands.
    """

    velocity: Tensor
    scale: Tensor
    inner: Tensor
    outer: Tensor
    merged: Tensor
    merged_time: Tensor


class GaussianPreconditioner(nn.Module):
    """Exact meta flow map of N(mean, U diag(variances) U^T), in the coordinates y = U^T x.

    The noise is isotropic, so that rotating keeps every formula and makes each diagonal. For one coordinate, with
    N_t = t^2 L + (1 - t)^2 and L the variance:

        posterior given x_t:  m = mu + t L / N_t (x_t - t mu),   C = L (1 - t)^2 / N_t
        inner marginal:       M_s = s^2 C + (1 - s)^2, mean s m
        average velocity:     m + (C (u + s) - (2 - u - s)) / (sqrt(M_s) (sqrt(M_s) + sqrt(M_u))) (x_s - s m)

    with no division by u - s or 1 - s.

    Args:
        mean: (D,); variances: (D,), at least 0, raised to `_RELATIVE_FLOOR` of their mean: where the data never vary (a
            pixel that is always black) the velocity would be singular at s = 1 as well; basis: (D, D) orthogonal,
            columns are principal directions.
    """

    mean: Tensor
    variances: Tensor
    basis: Tensor

    def __init__(self, *, mean: Tensor, variances: Tensor, basis: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", (mean.double() @ basis.double()).float())
        floor = (_RELATIVE_FLOOR * variances.float().mean()).clamp_min(_FLOOR)
        self.register_buffer("variances", torch.maximum(variances.float(), floor))
        self.register_buffer("basis", basis.float())

    def rotate(self, x: Tensor) -> Tensor:
        """(B, *event) to principal coordinates (B, D); never in the half precision that autocast would choose."""
        with torch.autocast(x.device.type, enabled=False):
            return x.flatten(1) @ self.basis

    def rotate_back(self, y: Tensor, like: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            return (y @ self.basis.T).reshape(like.shape)

    def posterior_variances(self, t: Tensor) -> Tensor:
        """Variances of p(x_1 | x_t) along the principal directions, (B, D)."""
        t = t.unsqueeze(-1)
        return self.variances * (1 - t) ** 2 / (t**2 * self.variances + (1 - t) ** 2).clamp_min(_FLOOR)

    def __call__(self, y_s: Tensor, s: Tensor, u: Tensor, *, y_t: Tensor, t: Tensor) -> GaussianVelocity:
        return super().__call__(y_s, s, u, y_t=y_t, t=t)

    def forward(self, y_s: Tensor, s: Tensor, u: Tensor, *, y_t: Tensor, t: Tensor) -> GaussianVelocity:
        """States (B, D) in principal coordinates, times (B,)."""
        s, u, t = s.unsqueeze(-1), u.unsqueeze(-1), t.unsqueeze(-1)
        variance, mean = self.variances, self.mean
        outer_variance = (t**2 * variance + (1 - t) ** 2).clamp_min(_FLOOR)
        posterior_mean = mean + t * variance / outer_variance * (y_t - t * mean)
        posterior_variance = variance * (1 - t) ** 2 / outer_variance
        root_s = torch.sqrt((s**2 * posterior_variance + (1 - s) ** 2).clamp_min(_FLOOR))
        root_u = torch.sqrt((u**2 * posterior_variance + (1 - u) ** 2).clamp_min(_FLOOR))
        inner = (y_s - s * posterior_mean) / root_s
        slope = (posterior_variance * (u + s) - ((1 - u) + (1 - s))) / (root_s + root_u)
        merged_time, merged = self._merge(y_s, s, y_t, t)
        return GaussianVelocity(
            velocity=posterior_mean + slope * inner,
            scale=torch.sqrt(posterior_variance) / root_s,
            inner=inner,
            outer=t * torch.sqrt(variance) / outer_variance * (y_t - t * mean),
            merged=merged,
            merged_time=merged_time.squeeze(-1),
        )

    def _merge(self, y_s: Tensor, s: Tensor, y_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The single state that tells what (y_s, y_t) tell together (glass.py), and its time, whitened."""
        radius = torch.sqrt((t * (1 - s)) ** 2 + (s * (1 - t)) ** 2 + _FLOOR)
        time = radius / (radius + (1 - t) * (1 - s))
        weight_t, weight_s = t * (1 - s) ** 2 / radius, s * (1 - t) ** 2 / radius
        state = (weight_t * y_t + weight_s * y_s) / (radius + (1 - t) * (1 - s))
        # at s = t = 0 nothing is observed; the interpolant's own state there is noise, which says as little as 0 does
        scale = torch.sqrt(time**2 * self.variances + (1 - time) ** 2)
        return time, (state - time * self.mean) / scale * (time * torch.sqrt(self.variances) / scale)
