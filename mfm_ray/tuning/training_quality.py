"""How good a model is on data that it was not trained on: what trials of different objectives are compared by.

A loss says nothing here: each objective has its own unit. All figures are of one-step draws, in data units, and all
models of a sweep see the same rows and the same noise (common random numbers).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfm_ray import metrics
from mfm_ray.data.datasets import GMM_MEANS, GMM_VARIANCE
from mfm_ray.data.latents import draw
from mfm_ray.data.shards import load_split, read_manifest
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.gaussian import GaussianMixture, isotropic_mixture
from mfm_ray.noise import KeyedNoise
from mfm_ray.protocols.posterior import Contexts, noisy_contexts
from mfm_ray.storage import Storage
from mfm_ray.tuning.front import HALF_WIDTH

TIMES = (0.0, 0.25, 0.5, 0.75)
_EXACT_TIMES, _EXACT_CONTEXTS, _EXACT_DRAWS = (0.25, 0.5, 0.75), 16, 256
_PARTS = 4  # of the held-out rows, each with its own distance: where the interval comes from
_ROWS_AT_ONCE = 4096


def figures_of(data_name: str, *, has_classifier: bool) -> dict[str, str]:
    """The figures that a sweep over trainings can be judged by, and whether they are to be small or large."""
    judged = {"confidence": "max", "frechet": "min"} if has_classifier else {}
    exact = {"posterior_error": "min"} if data_name == "gmm" else {}
    return {"posterior_score": "min", **exact, "sample_distance": "min", **judged, "seconds": "min"}


@dataclass(frozen=True, kw_only=True)
class HeldOutQuality:
    """Measures a model; travels to the workers (`mfm_ray.training.session.Measure`).

    data: shards with a held-out split, of which the first `num_rows` rows are taken; num_draws: one-step draws for
    each row and time; seed: of all noise; classifier: judge of images, or None.
    """

    data: Storage
    num_rows: int
    num_draws: int
    seed: int
    classifier: Any = None

    def __call__(self, flow_map: FlowMap) -> dict[str, float]:
        clean = self._clean()
        draws = {time: self._draws(flow_map, clean, time) for time in TIMES}
        scores = torch.stack([energy_score(drawn, clean) for drawn in draws.values()]).mean(0)
        samples = draws[0.0][:, 0]
        found = {**_mean("posterior_score", scores), **_mean("sample_distance", _distances(samples, clean))}
        if read_manifest(self.data).name == "gmm":
            found |= _mean("posterior_error", exact_errors(flow_map, clean, seed=self.seed))
        if self.classifier is not None:
            confidence = metrics.class_confidence(metrics.class_probabilities(self.classifier, samples))
            features = [metrics.classifier_features(self.classifier, images) for images in (samples, clean)]
            found |= {**_mean("confidence", confidence), "frechet": metrics.frechet_distance(*features)}
        return found

    def _clean(self) -> Tensor:
        """Held-out rows in data units; of stored posteriors one draw each, always the same."""
        rows = load_split(self.data, "heldout").data[: self.num_rows]
        return draw(rows, read_manifest(self.data).row_form, KeyedNoise.for_images(self.seed, len(rows)))

    def _draws(self, flow_map: FlowMap, clean: Tensor, time: float) -> Tensor:
        contexts = noisy_contexts(clean, time, flow_map.space, seed=self.seed)
        return one_step_draws(flow_map, contexts, num_draws=self.num_draws, seed=self.seed)


@torch.no_grad()
def one_step_draws(flow_map: FlowMap, contexts: Contexts, *, num_draws: int, seed: int) -> Tensor:
    """Draws as they are delivered, (B, num_draws, *event) in data units, clamped; on the CPU."""
    device = next(flow_map.parameters()).device
    noise, parts = KeyedNoise.for_images(seed, len(contexts.x_t), device=device), []
    for rows in torch.arange(len(contexts.x_t)).split(max(1, _ROWS_AT_ONCE // num_draws)):
        x_t, t = contexts.x_t[rows].to(device), contexts.t[rows].to(device)
        drawn = flow_map.posterior_draws(x_t, t, num_draws=num_draws, generator=noise[rows.to(device)])
        parts.append(flow_map.space.clamp(flow_map.space.to_data_units(drawn)).float().cpu())
    return torch.cat(parts)


def energy_score(draws: Tensor, truth: Tensor) -> Tensor:
    """The energy score of draws (B, M, *event), M at least 2, for what was the case (B, *event): (B,),

        mean_i |y_i - x| - sum_{i != j} |y_i - y_j| / (2 M (M - 1)).

    Its mean over x ~ p(x_1 | x_t) is smallest where the draws have that law, and nowhere else (a strictly proper
    score: Gneiting and Raftery 2007, section 4.3). Unbiased in M, so that few draws for each of many rows are enough.
    """
    y, x = draws.flatten(2).double(), truth.flatten(1).double().unsqueeze(1)
    num_draws = y.shape[1]
    if num_draws < 2:
        raise ValueError(f"energy_score: {num_draws} draws for each row, expected at least 2")
    return (y - x).norm(dim=2).mean(1) - torch.cdist(y, y).sum((1, 2)) / (2 * num_draws * (num_draws - 1))


def exact_errors(flow_map: FlowMap, clean: Tensor, *, seed: int) -> Tensor:
    """Sliced W2 of one-step draws to as many of the Gaussian mixture's exact posterior: the mean over times, (16,).

    One figure a context, because its times share noise. Two exact sets of this size are apart too, the same for all
    models of a sweep.
    """
    mixture = isotropic_mixture(torch.tensor(GMM_MEANS, dtype=torch.float64), variance=GMM_VARIANCE)
    found = []
    for time in _EXACT_TIMES:
        contexts = noisy_contexts(clean[:_EXACT_CONTEXTS], time, flow_map.space, seed=seed)
        drawn = one_step_draws(flow_map, contexts, num_draws=_EXACT_DRAWS, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        posteriors = _members(mixture.posterior(contexts.x_t.double(), contexts.t.double()))
        exact = torch.stack([one.sample(_EXACT_DRAWS, generator=generator) for one in posteriors])
        found.append(metrics.sliced_w2(drawn.double(), exact))
    return torch.stack(found).mean(0)


def _members(batch: GaussianMixture) -> Iterator[GaussianMixture]:
    """The mixtures of a batch, one after another."""
    for log_weights, means, variances in zip(batch.log_weights, batch.means, batch.variances, strict=True):
        yield GaussianMixture(log_weights, means, variances.expand_as(means), batch.axes)


def _distances(samples: Tensor, clean: Tensor) -> Tensor:
    """Sliced W2 between the same quarters of two sets, (4,)."""
    size = len(clean) // _PARTS
    pairs = zip(samples.flatten(1).split(size), clean.flatten(1).split(size), strict=True)
    return torch.stack([metrics.sliced_w2(a, b) for a, b in list(pairs)[:_PARTS]])


def _mean(name: str, values: Tensor) -> Mapping[str, float]:
    mean = metrics.by_students_t(metrics.mean_with_interval(values))
    return {name: mean.value, name + HALF_WIDTH: mean.half_width}
