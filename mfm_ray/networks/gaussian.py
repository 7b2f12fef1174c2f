"""Gaussian mixtures: a data law for which everything a meta flow map promises is known exactly.

For data sum_k w_k N(mu_k, S_k), state x at time t, M_k = t^2 S_k + (1 - t)^2 Id and d_k = x - t mu_k:

    responsibilities  gamma_k ~ w_k N(x; t mu_k, M_k)
    velocity          b_t(x)  = sum_k gamma_k (mu_k + (t S_k - (1 - t) Id) M_k^{-1} d_k)
    posterior         p(x_1 | x_t = x) = sum_k gamma_k N(mu_k + t S_k M_k^{-1} d_k, (1 - t)^2 S_k M_k^{-1})

The posterior is a mixture again, so the inner velocity is the same formula applied to it. S_k, M_k and the posterior's
covariance share their eigenvectors, which never change: nothing is inverted, and everything is differentiable in x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.interpolants import expand_time


@dataclass(frozen=True)
class GaussianMixture:
    """One mixture, or a batch of them.

    log_weights: (..., K), normalised; means: (..., K, D); variances: (..., K, D) along the columns of `axes`, which is
    (K, D, D) orthogonal, or (..., K, D, D). Leading dimensions, where there are any, are the rows (B,) of the states
    that methods take. `from_covariances` makes one from what is usually known.
    """

    log_weights: Tensor
    means: Tensor
    variances: Tensor
    axes: Tensor

    @classmethod
    def from_covariances(cls, log_weights: Tensor, means: Tensor, covariances: Tensor) -> GaussianMixture:
        """From symmetric covariances (..., K, D, D)."""
        variances, axes = torch.linalg.eigh(covariances)
        return cls(log_weights, means, variances, axes)

    @property
    def dim(self) -> int:
        return self.means.shape[-1]

    @property
    def covariances(self) -> Tensor:
        """S_k, (..., K, D, D)."""
        return torch.einsum("...kid,...kd,...kjd->...kij", self.axes, self.variances, self.axes)

    def to(self, like: torch.dtype | torch.device | Tensor) -> GaussianMixture:
        return GaussianMixture(*(part.to(like) for part in (self.log_weights, self.means, self.variances, self.axes)))

    def log_prob(self, x: Tensor) -> Tensor:
        """log density at x (B, D), (B,)."""
        return self.log_marginal(x, torch.ones_like(x[:, 0]))

    def log_marginal(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x) of the noised mixture, (B,)."""
        return torch.logsumexp(self._noised(x, t).log_joint, dim=-1)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """b_t(x) = E[x_1 - x_0 | x_t = x], (B, D); no division by 1 - t."""
        time, noised = t[:, None, None], self._noised(x, t)
        gain = (time * self.variances - (1 - time)) / noised.variances
        parts = self.means + self._along_axes(gain * noised.offsets)
        return torch.einsum("bk,bkd->bd", torch.softmax(noised.log_joint, dim=-1), parts)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x) = -sum_k gamma_k M_k^{-1} d_k, (B, D)."""
        noised = self._noised(x, t)
        parts = self._along_axes(noised.offsets / noised.variances)
        return -torch.einsum("bk,bkd->bd", torch.softmax(noised.log_joint, dim=-1), parts)

    def responsibilities(self, x: Tensor, t: Tensor) -> Tensor:
        """gamma_k(x), (B, K)."""
        return torch.softmax(self._noised(x, t).log_joint, dim=-1)

    def posterior(self, x: Tensor, t: Tensor) -> GaussianMixture:
        """p(x_1 | x_t = x), a batch of B mixtures."""
        time, noised = t[:, None, None], self._noised(x, t)
        gain = self.variances / noised.variances
        return GaussianMixture(
            log_weights=torch.log_softmax(noised.log_joint, dim=-1),
            means=self.means + self._along_axes(time * gain * noised.offsets),
            variances=(1 - time) ** 2 * gain,
            axes=self.axes,
        )

    def mean(self) -> Tensor:
        return torch.einsum("...k,...kd->...d", self.log_weights.exp(), self.means)

    def covariance(self) -> Tensor:
        """Covariance of the mixture, (..., D, D)."""
        centred = self.means - self.mean().unsqueeze(-2)
        between = torch.einsum("...k,...ki,...kj->...ij", self.log_weights.exp(), centred, centred)
        return between + torch.einsum("...k,...kij->...ij", self.log_weights.exp(), self.covariances)

    def sample(self, num_samples: int, *, generator: torch.Generator) -> Tensor:
        """Independent samples of one mixture, (num_samples, D)."""
        assert self.means.ndim == 2, "sample() draws from one mixture, not from a batch"
        component = torch.multinomial(self.log_weights.exp(), num_samples, replacement=True, generator=generator)
        white = torch.randn((num_samples, self.dim), generator=generator, dtype=self.means.dtype)
        scaled = self.variances[component].sqrt() * white
        return self.means[component] + torch.einsum("nij,nj->ni", self.axes[component], scaled)

    def _noised(self, x: Tensor, t: Tensor) -> _Noised:
        time = t[:, None, None]
        variances = time**2 * self.variances + (1 - time) ** 2
        offsets = torch.einsum("...kid,...ki->...kd", self.axes, x[:, None, :] - time * self.means)
        exponent = (offsets**2 / variances + variances.log()).sum(-1) + self.dim * math.log(2 * math.pi)
        return _Noised(offsets=offsets, variances=variances, log_joint=self.log_weights - 0.5 * exponent)

    def _along_axes(self, coordinates: Tensor) -> Tensor:
        return torch.einsum("...kid,...kd->...ki", self.axes, coordinates)


@dataclass(frozen=True)
class _Noised:
    """Components seen from a noised state x, in their own axes.

    offsets: d_k, (B, K, D); variances: of M_k, (B, K, D); log_joint: log w_k + log N(x; t mu_k, M_k), (B, K).
    """

    offsets: Tensor
    variances: Tensor
    log_joint: Tensor


def isotropic_mixture(means: Tensor, *, variance: float) -> GaussianMixture:
    """Equal components N(mean_k, variance Id), means (K, D)."""
    num, dim = means.shape
    weights = torch.full_like(means[:, 0], 1 / num)
    axes = torch.eye(dim, dtype=means.dtype, device=means.device).expand(num, dim, dim)
    return GaussianMixture(weights.log(), means, torch.full_like(means, variance), axes)


@dataclass(frozen=True)
class LinearObservation:
    """Likelihood reward r(x) = -(a . x - y)^2 / (2 sigma^2) and its closed forms under a mixture.

    direction: a, (D,); observation: y; noise: sigma, all in data units.
    """

    direction: Tensor
    observation: float
    noise: float

    def __call__(self, samples: Tensor) -> Tensor:
        return -((samples @ self.direction - self.observation) ** 2) / (2 * self.noise**2)

    def log_evidence(self, mixture: GaussianMixture) -> Tensor:
        """log E[exp r(x)] by component, weights included, (..., K); the value function's summands for a posterior.

        e^V = sum_k w_k sigma / sqrt(v_k) exp(-rho_k^2 / (2 v_k)), v_k = a^T S_k a + sigma^2, rho_k = y - a . mu_k.
        """
        along = torch.einsum("i,...kid->...kd", self.direction, mixture.axes)
        variance = (mixture.variances * along**2).sum(-1) + self.noise**2
        residual = self.observation - mixture.means @ self.direction
        return mixture.log_weights + 0.5 * torch.log(self.noise**2 / variance) - residual**2 / (2 * variance)

    def value(self, mixture: GaussianMixture, x: Tensor, t: Tensor) -> Tensor:
        """V_t(x) = log E[exp r(x_1) | x_t = x], (B,)."""
        return torch.logsumexp(self.log_evidence(mixture.posterior(x, t)), dim=-1)

    def tilt(self, mixture: GaussianMixture) -> GaussianMixture:
        """The mixture proportional to p(x) exp r(x): each component by Bayes' rule for a linear observation."""
        spread = torch.einsum("...kij,j->...ki", mixture.covariances, self.direction)
        variance = torch.einsum("...ki,i->...k", spread, self.direction) + self.noise**2
        residual = self.observation - mixture.means @ self.direction
        gain = spread / variance.unsqueeze(-1)
        return GaussianMixture.from_covariances(
            log_weights=torch.log_softmax(self.log_evidence(mixture), dim=-1),
            means=mixture.means + gain * residual.unsqueeze(-1),
            covariances=mixture.covariances - gain.unsqueeze(-1) * spread.unsqueeze(-2),
        )


class GaussianMixtureFlowMap(FlowMap):
    """The exact meta flow map of a Gaussian mixture: the oracle of the test suite.

    The diagonal is closed form; jumps integrate the inner flow with `num_inner_steps` Runge-Kutta 4 steps and are
    differentiable in x_t. Their error, in posterior spreads and at the default: 2e-5 up to t = 0.9, 2e-3 at 0.99, 3e-2
    at 0.999. Works in the precision of the mixture. Has no parameters.
    """

    def __init__(self, mixture: GaussianMixture, *, num_inner_steps: int = 40) -> None:
        super().__init__(DataSpace(kind="coordinates", event_shape=(mixture.dim,)))
        self.mixture = mixture
        self.num_inner_steps = num_inner_steps

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
        posterior = self.mixture.posterior(x_t, t)
        if torch.equal(s, u):
            return posterior.velocity(x_s, s)
        # A mean of slopes, not a difference of states over u - s: that would cancel for short steps.
        scale = self.posterior_spread(t) / math.sqrt(self.mixture.dim)
        mean, time = torch.zeros_like(x_s), s
        for share in _step_shares(s, u, scale, self.num_inner_steps).unbind(0):
            step = share * (u - s)
            slope = _runge_kutta_slope(posterior, x_s + expand_time(u - s, x_s) * mean, time, step)
            mean, time = mean + expand_time(share, x_s) * slope, time + step
        return mean

    def posterior_spread(self, t: Tensor) -> Tensor:
        variances = torch.linalg.eigvalsh(self.mixture.covariance()).to(t)
        time = t.unsqueeze(-1)
        return (variances * (1 - time) ** 2 / (time**2 * variances + (1 - time) ** 2)).sum(-1).sqrt()

    def config(self) -> dict[str, Any]:
        raise NotImplementedError("an exact oracle is built from its mixture, not from a configuration")


def _step_shares(s: Tensor, u: Tensor, scale: Tensor, num_steps: int) -> Tensor:
    """Shares of [s, u] by step, (num_steps, B): equal steps of the angle whose tangent is s scale / (1 - s).

    The flow towards a Gaussian of standard deviation `scale` turns at constant speed in that angle; near t = 1 all of
    its motion happens in the last 1 - s of the size of `scale`, which equal steps of s would miss.
    """
    scale = scale.clamp_min(1e-6)
    start, end = torch.atan2(s * scale, 1 - s), torch.atan2(u * scale, 1 - u)
    angles = start + torch.arange(num_steps + 1).to(s).unsqueeze(-1) / num_steps * (end - start)
    density = torch.sin(angles) + scale * torch.cos(angles)
    shares = 1 / (density[:-1] * density[1:])
    return shares / shares.sum(0)


def _runge_kutta_slope(mixture: GaussianMixture, x: Tensor, time: Tensor, step: Tensor) -> Tensor:
    """Mean velocity of one Runge-Kutta 4 step of dx = b_t(x) dt."""
    h = expand_time(step, x)
    k1 = mixture.velocity(x, time)
    k2 = mixture.velocity(x + h / 2 * k1, time + step / 2)
    k3 = mixture.velocity(x + h / 2 * k2, time + step / 2)
    k4 = mixture.velocity(x + h * k3, time + step)
    return (k1 + 2 * k2 + 2 * k3 + k4) / 6
