"""Which objective, which weighting? The same network, data, batch and CPU seconds for each, on the Gaussian mixture.

    python -m benchmarks.objectives [--seconds 60] [--only NAME ...]

One thread, no cluster, about `seconds` for each of the candidates and half a minute to measure it. Writes
benchmarks/results/objectives.md: the sliced W2 of one-step posterior draws over its floor (as benchmarks.gmm_posterior,
three sampling seeds) at each conditioning time. Teachers are the exact mixture: what is compared is distillation.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gmm_posterior import BARS, contexts, distances, floor, posterior_of
from benchmarks.gmm_posterior import mixture as mixture_of_the_data
from mfm_ray.data import Batch, data_moments
from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks import build_network
from mfm_ray.networks.gaussian import GaussianMixture, GaussianMixtureFlowMap
from mfm_ray.noise import KeyedNoise
from mfm_ray.objectives import named_objective

RESULTS = Path(__file__).parent / "results" / "objectives.md"
ROWS, SLOW, SEEDS = 1024, 0.66, 3
ADAPTIVE = {"name": "adaptive", "power": 1.0}


@dataclass(frozen=True)
class Candidate:
    objective: str
    settings: dict[str, Any] = field(default_factory=dict)
    max_time_frequency: float = SLOW


CANDIDATES = {
    "semigroup": Candidate("semigroup"),
    "semigroup, fast time features": Candidate("semigroup", max_time_frequency=9.5),
    "semigroup, adaptive consistency": Candidate("semigroup", {"consistency_weighting": ADAPTIVE}),
    "lagrangian": Candidate("lagrangian", {"consistency_scale": 1.0}),
    "eulerian": Candidate("eulerian", {"consistency_scale": 1.0}),
    "eulerian, fast time features": Candidate("eulerian", {"consistency_scale": 1.0}, 9.5),
    "eulerian, adaptive consistency": Candidate(
        "eulerian", {"consistency_scale": 1.0, "consistency_weighting": ADAPTIVE}
    ),
    "mean_flow": Candidate("mean_flow", {"consistency_scale": 1.0}),
    "mean_flow, adaptive consistency": Candidate(
        "mean_flow", {"consistency_scale": 1.0, "consistency_weighting": ADAPTIVE}
    ),
    "lagrangian_teacher": Candidate("lagrangian_teacher", {"consistency_scale": 1.0, "diagonal": "teacher"}),
    "eulerian_teacher": Candidate("eulerian_teacher", {"consistency_scale": 1.0, "diagonal": "teacher"}),
    "eulerian_teacher, adaptive": Candidate(
        "eulerian_teacher",
        {
            "consistency_scale": 1.0,
            "diagonal": "teacher",
            "consistency_weighting": ADAPTIVE,
            "diagonal_weighting": ADAPTIVE,
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of training for each candidate")
    parser.add_argument("--only", nargs="*", choices=list(CANDIDATES), help="these candidates alone, printed")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)
    floors = {time: floor(posterior_of(contexts(time))).value for time in BARS}
    lines = [
        f"| objective, {given.seconds:.0f} CPU seconds | steps | "
        + " | ".join(f"t = {time:g}" for time in BARS)
        + " |",
        "|---|---|" + "---|" * len(BARS),
    ]
    for name in given.only or CANDIDATES:
        flow_map, steps = train(CANDIDATES[name], given.seconds)
        ratios = [float(distances(flow_map, contexts(time), num_seeds=SEEDS).mean()) / floors[time] for time in BARS]
        lines.append(f"| {name} | {steps} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
        print(lines[-1], flush=True)
    if not given.only:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("\n".join([*lines, "", "Made by `python -m benchmarks.objectives`.", ""]))
        print(RESULTS)


def train(candidate: Candidate, seconds: float) -> tuple[FlowMap, int]:
    """Adam with warm-up, a cosine over the CPU seconds, clipping and a moving average; the average and its steps."""
    data = GaussianMixture(*(tensor.float() for tensor in dataclasses.astuple(mixture_of_the_data())))
    generator = torch.Generator().manual_seed(0)
    moments = data_moments(data.sample(20_000, generator=generator)).preconditioning()
    torch.manual_seed(0)
    network = {"name": "residual_mlp", "width": 96, "num_blocks": 3, "max_time_frequency": candidate.max_time_frequency}
    flow_map = build_network(network, space=DataSpace("coordinates", (2,)), moments=moments)
    settings = {"time_power": 1.5, **candidate.settings}
    teacher = GaussianMixtureFlowMap(data) if "teacher" in candidate.objective else None
    objective = named_objective(candidate.objective, teacher=teacher, **settings)
    average = copy.deepcopy(flow_map).requires_grad_(False)
    optimizer = torch.optim.Adam(flow_map.parameters(), lr=2e-3, fused=True)
    began, step = time.process_time(), 0
    while (spent := (time.process_time() - began) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * spent))
        batch = Batch(data.sample(ROWS, generator=generator), None, torch.arange(ROWS))
        losses = objective(flow_map, batch, noise=KeyedNoise.for_rows(0, batch.rows).fold_in(step), step=step)
        optimizer.zero_grad()
        losses.total.mean().backward()
        torch.nn.utils.clip_grad_norm_(flow_map.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(flow_map.parameters()), 1 - decay)
        step += 1
    return average, step


if __name__ == "__main__":
    main()
