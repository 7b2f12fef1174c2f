"""One-step posterior draws of Gaussian-mixture models against the exact posterior.

    python -m benchmarks.gmm_posterior --models runs/gmm/model [DIR ...]

No cluster, one thread, about a minute for the floor and one for each model. Writes benchmarks/results/gmm_posterior.md.
For each time t: 16 contexts x_t of the exact mixture, 2,048 one-step draws for each of them, sliced W2 (256
projections) to as many exact draws, summed over the contexts and divided by their number; mean and 95 % interval over
sampling seeds 0 to 9. The floor is the same figure between two exact sets, mean over 20 independent pairs. A bar holds
when the interval's lower end does not exceed the bar times the floor.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mfm_ray.data.datasets import GMM_MEANS, GMM_VARIANCE
from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.metrics import Mean, mean_with_interval, sliced_w2
from mfm_ray.networks.gaussian import GaussianMixture, isotropic_mixture
from mfm_ray.noise import KeyedNoise
from mfm_ray.pretrained import load_flow_map
from mfm_ray.protocols.posterior import Contexts, noisy_contexts

RESULTS = Path(__file__).parent / "results" / "gmm_posterior.md"
BARS = {0.0: 1.3, 0.1: 1.3, 0.2: 1.3, 0.5: 1.5, 0.8: 1.5}  # largest ratio to the floor, by t
NUM_CONTEXTS, NUM_DRAWS, NUM_SEEDS, NUM_PAIRS = 16, 2048, 10, 20
_CONTEXT_SEED = 1
_FLOOR_SEED = 1000  # exact sets of the floor; those that models are compared with have the sampling seeds


@dataclass(frozen=True)
class Row:
    """One model at one time: sliced W2 to the exact posterior, and between exact sets, in data units."""

    time: float
    distance: Mean
    floor: Mean

    @property
    def ratio(self) -> float:
        return self.distance.value / self.floor.value

    @property
    def holds(self) -> bool:
        return self.distance.value - self.distance.half_width <= BARS[self.time] * self.floor.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="model directories")
    torch.set_num_threads(1)
    models = {name: load_flow_map(name) for name in parser.parse_args().models}
    floors = {time: floor(posterior_of(contexts(time))) for time in BARS}
    rows = {model_name(name): [measure(model, time, floors[time]) for time in BARS] for name, model in models.items()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(table(rows))
    print(RESULTS.read_text())


def mixture() -> GaussianMixture:
    """The law of `data=gmm`, float64."""
    return isotropic_mixture(torch.tensor(GMM_MEANS, dtype=torch.float64), variance=GMM_VARIANCE)


def contexts(time: float, *, seed: int = _CONTEXT_SEED) -> Contexts:
    """Noisy states of fresh samples of the mixture; the same samples and noise at every time."""
    clean = mixture().sample(NUM_CONTEXTS, generator=torch.Generator().manual_seed(seed)).float()
    return noisy_contexts(clean, time, DataSpace(kind="coordinates", event_shape=(2,)), seed=seed)


def posterior_of(given: Contexts) -> GaussianMixture:
    """The exact posterior of each context, a batch of mixtures."""
    return mixture().posterior(given.x_t.double(), given.t.double())


def exact_draws(posterior: GaussianMixture, *, seed: int) -> Tensor:
    """Independent draws of each of a batch of mixtures, (contexts, NUM_DRAWS, 2) float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([one.sample(NUM_DRAWS, generator=generator) for one in members(posterior)]).float()


def members(batch: GaussianMixture) -> Iterator[GaussianMixture]:
    """The mixtures of a batch, one after another."""
    for log_weights, means, variances in zip(batch.log_weights, batch.means, batch.variances, strict=True):
        yield GaussianMixture(log_weights, means, variances.expand_as(means), batch.axes)


def floor(posterior: GaussianMixture, *, num_pairs: int = NUM_PAIRS) -> Mean:
    """Distance between two exact sets, over independent pairs of them."""
    seeds = [(_FLOOR_SEED + 2 * pair, _FLOOR_SEED + 2 * pair + 1) for pair in range(num_pairs)]
    sets = ((exact_draws(posterior, seed=a), exact_draws(posterior, seed=b)) for a, b in seeds)
    return mean_with_interval(torch.stack([sliced_w2(a, b).mean() for a, b in sets]))


@torch.no_grad()
def distances(flow_map: FlowMap, given: Contexts, *, num_seeds: int = NUM_SEEDS) -> Tensor:
    """Mean over contexts of the distance of one-step draws to exact ones, for each sampling seed, (num_seeds,)."""
    posterior = posterior_of(given)
    found = []
    for seed in range(num_seeds):
        noise = KeyedNoise.for_images(seed, NUM_CONTEXTS)
        drawn = flow_map.posterior_draws(given.x_t, given.t, num_draws=NUM_DRAWS, generator=noise)
        found.append(sliced_w2(drawn, exact_draws(posterior, seed=seed)).mean())
    return torch.stack(found)


def measure(flow_map: FlowMap, time: float, floor_there: Mean) -> Row:
    return Row(time, mean_with_interval(distances(flow_map, contexts(time))), floor_there)


def model_name(directory: str) -> str:
    """`gmm-0` of `.../gmm-0/model`: results name no place on a machine."""
    path = Path(directory.rstrip("/"))
    return path.parent.name if path.name == "model" else path.name


def table(rows: Mapping[str, Sequence[Row]]) -> str:
    return "\n".join(
        [
            f"S-W2 of one-step draws to the exact posterior, {NUM_CONTEXTS} contexts x {NUM_DRAWS} draws, sampling "
            f"seeds 0 to {NUM_SEEDS - 1}; floor of {NUM_PAIRS} pairs of exact sets.",
            "",
            "| model | t | floor | S-W2 | ratio | bar | |",
            "|---|---|---|---|---|---|---|",
            *(line(name, row) for name, of_model in rows.items() for row in of_model),
            "",
            "Made by `python -m benchmarks.gmm_posterior --models DIR ...`.",
            "",
        ]
    )


def line(name: str, row: Row) -> str:
    return (
        f"| {name} | {row.time:g} | {row.floor.value:.4f} ± {row.floor.half_width:.4f} | "
        f"{row.distance.value:.4f} ± {row.distance.half_width:.4f} | {row.ratio:.2f} | {BARS[row.time]:g} | "
        f"{'holds' if row.holds else 'missed'} |"
    )


if __name__ == "__main__":
    main()
