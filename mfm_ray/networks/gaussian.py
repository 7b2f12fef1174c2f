"""Gaussian mixtures: a data law for which everything a meta flow map promises is known exactly.

For data sum_k w_k N(mu_k, S_k), state x at time t, M_k = t^2 S_k + (1 - t)^2 Id and d_k = x - t mu_k:

    responsibilities  gamma_k ~ w_k N(x; t mu_k, M_k)
    velocity          b_t(x)  = sum_k gamma_k (mu_k + (t S_k - (1 - t) Id) M_k^{-1} d_k)
    posterior         p(x_1 | x_t = x) = sum_k gamma_k N(mu_k + t S_k M_k^{-1} d_k, (1 - t)^2 S_k M_k^{-1})

The posterior is a mixture again, so the inner velocity is the same formula applied to it.
"""

from __future__ import annotations

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

    log_weights: (..., K), normalised; means: (..., K, D); covariances: (..., K, D, D). Leading dimensions, where
    there are any, are the rows (B,) of the states that methods take.
    """

    log_weights: Tensor
    means: Tensor
    covariances: Tensor

    @property
    def dim(self) -> int:
        return self.means.shape[-1]

    def to(self, dtype: torch.dtype) -> GaussianMixture:
        return GaussianMixture(self.log_weights.to(dtype), self.means.to(dtype), self.covariances.to(dtype))

    def log_prob(self, x: Tensor) -> Tensor:
        """log density at x (B, D), (B,)."""
        return torch.logsumexp(self._joint_log_prob(x, torch.ones_like(x[:, 0])), dim=-1)

    def log_marginal(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x) of the noised mixture, (B,)."""
        return torch.logsumexp(self._joint_log_prob(x, t), dim=-1)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """b_t(x) = E[x_1 - x_0 | x_t = x], (B, D); no division by 1 - t."""
        time = t[:, None, None]
        solved = self._solve(x, t)
        pulled = torch.einsum("...kij,...kj->...ki", self.covariances, solved)
        parts = self.means + time * pulled - (1 - time) * solved
        return torch.einsum("bk,bkd->bd", self.responsibilities(x, t), parts)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x) = -sum_k gamma_k M_k^{-1} d_k, (B, D)."""
        return -torch.einsum("bk,bkd->bd", self.responsibilities(x, t), self._solve(x, t))

    def responsibilities(self, x: Tensor, t: Tensor) -> Tensor:
        """gamma_k(x), (B, K)."""
        return torch.softmax(self._joint_log_prob(x, t), dim=-1)

    def posterior(self, x: Tensor, t: Tensor) -> GaussianMixture:
        """p(x_1 | x_t = x), a batch of B mixtures."""
        time = t[:, None, None]
        gain = torch.einsum("...kij,bkjl->bkil", self.covariances, torch.linalg.inv(self._noised_covariances(t)))
        means = self.means + time * torch.einsum("bkij,bkj->bki", gain, self._offsets(x, t))
        return GaussianMixture(
            log_weights=torch.log_softmax(self._joint_log_prob(x, t), dim=-1),
            means=means,
            covariances=(1 - time[..., None]) ** 2 * gain,
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
        factor = torch.linalg.cholesky(self.covariances)
        return self.means[component] + torch.einsum("nij,nj->ni", factor[component], white)

    def _noised_covariances(self, t: Tensor) -> Tensor:
        time = t[:, None, None, None]
        eye = torch.eye(self.dim, dtype=self.means.dtype, device=self.means.device)
        return time**2 * self.covariances + (1 - time) ** 2 * eye

    def _offsets(self, x: Tensor, t: Tensor) -> Tensor:
        return x[:, None, :] - t[:, None, None] * self.means

    def _solve(self, x: Tensor, t: Tensor) -> Tensor:
        """M_k^{-1} d_k, (B, K, D)."""
        return torch.linalg.solve(self._noised_covariances(t), self._offsets(x, t).unsqueeze(-1)).squeeze(-1)

    def _joint_log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """log w_k + log N(x; t mu_k, M_k) without the constant (2 pi)^{-D/2}'s logarithm left out, (B, K)."""
        quadratic = torch.einsum("bkd,bkd->bk", self._offsets(x, t), self._solve(x, t))
        log_det = torch.logdet(self._noised_covariances(t))
        constant = self.dim * torch.log(torch.tensor(2 * torch.pi, dtype=self.means.dtype))
        return self.log_weights - 0.5 * (quadratic + log_det + constant)


def isotropic_mixture(means: Tensor, *, variance: float) -> GaussianMixture:
    """Equal components N(mean_k, variance Id), means (K, D)."""
    num, dim = means.shape
    weights = torch.full((num,), 1 / num, dtype=means.dtype)
    return GaussianMixture(weights.log(), means, variance * torch.eye(dim, dtype=means.dtype).expand(num, dim, dim))


@dataclass(frozen=True)
class LinearObservation:
    """Likelihood reward r(x) = -(a . x - y)^2 / (2 sigma^2) and its closed forms under a mixture.

    direction: a, (D,); observation: y; noise: sigma, all in data units.
    """

    direction: Tensor
    observation: float
    noise: float

    def __call__(self, x: Tensor) -> Tensor:
        return -((x @ self.direction - self.observation) ** 2) / (2 * self.noise**2)

    def log_evidence(self, mixture: GaussianMixture) -> Tensor:
        """log E[exp r(x)] by component, weights included, (..., K); the value function's summands for a posterior.

        e^V = sum_k w_k sigma / sqrt(v_k) exp(-rho_k^2 / (2 v_k)), v_k = a^T S_k a + sigma^2, rho_k = y - a . mu_k.
        """
        spread = torch.einsum("i,...kij,j->...k", self.direction, mixture.covariances, self.direction)
        variance = spread + self.noise**2
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
        return GaussianMixture(
            log_weights=torch.log_softmax(self.log_evidence(mixture), dim=-1),
            means=mixture.means + gain * residual.unsqueeze(-1),
            covariances=mixture.covariances - gain.unsqueeze(-1) * spread.unsqueeze(-2),
        )


class GaussianMixtureFlowMap(FlowMap):
    """The exact meta flow map of a Gaussian mixture: the oracle of the test suite.

    The diagonal is closed form; jumps integrate the inner flow with `num_inner_steps` Runge-Kutta 4 steps and are
    differentiable in x_t. Works in the precision of the mixture. Has no parameters.
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
        cfg_scale: float | None = None,
    ) -> Tensor:
        posterior = self.mixture.posterior(x_t, t)
        if torch.equal(s, u):
            return posterior.velocity(x_s, s)
        span = expand_time(u - s, x_s)
        moved = self._integrate(posterior, x_s, s, u) - x_s
        return torch.where(span > 0, moved / span.clamp_min(1e-30), posterior.velocity(x_s, s))

    def _integrate(self, posterior: GaussianMixture, x: Tensor, s: Tensor, u: Tensor) -> Tensor:
        step = (u - s) / self.num_inner_steps
        h = expand_time(step, x)
        for i in range(self.num_inner_steps):
            time = s + i * step
            k1 = posterior.velocity(x, time)
            k2 = posterior.velocity(x + h / 2 * k1, time + step / 2)
            k3 = posterior.velocity(x + h / 2 * k2, time + step / 2)
            k4 = posterior.velocity(x + h * k3, time + step)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x

    def posterior_spread(self, t: Tensor) -> Tensor:
        variances = torch.linalg.eigvalsh(self.mixture.covariance()).to(t)
        time = t.unsqueeze(-1)
        return (variances * (1 - time) ** 2 / (time**2 * variances + (1 - time) ** 2)).sum(-1).sqrt()

    def config(self) -> dict[str, Any]:
        raise NotImplementedError("an exact oracle is built from its mixture, not from a configuration")
