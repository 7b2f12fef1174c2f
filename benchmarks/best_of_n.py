"""How far must Best-of-N go to reach one steered sample? A pool of 100,000 digits against single-particle MFM-G.

    python -m benchmarks.best_of_n --model outputs/demo/model [--pool 100000]

No cluster; about ten minutes on two cores for the pool of 50 steps each. Writes benchmarks/results/best_of_n.md.
Best-of-N is the exact average over all groups of N of the pool, for N up to the pool itself; MFM-G takes one draw a
step and 10, 25 or 50 steps. The crossing is the N at which Best-of-N has the mean reward of MFM-G, linear in log N.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from jobs.prepare_data import make_dataset
from mfm_ray import metrics
from mfm_ray.pretrained import load_classifier, load_flow_map
from mfm_ray.protocols import comparison
from mfm_ray.protocols.comparison import Problem, SideBySide
from mfm_ray.protocols.digits import PROBLEMS, Material, make_problem
from mfm_ray.protocols.problems import choose_targets
from mfm_ray.samplers import sample
from mfm_ray.steering import GradientGuidance

RESULTS = Path(__file__).parent / "results" / "best_of_n.md"
STEP_COUNTS = (10, 25, 50)
POOL_STEPS, NUM_TARGETS, SAMPLES_A_TARGET = 50, 8, 16
_POOL_SEED, _TARGET_SEED, _STEERING_SEED = 1, 2, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory of digits with a classifier in it")
    parser.add_argument("--pool", type=int, default=100_000, help="samples of the pool")
    given = parser.parse_args()
    splits = make_dataset("digits").splits
    material = Material(load_flow_map(given.model), load_classifier(given.model), splits["train"], splits["heldout"])
    began = time.monotonic()
    pool = comparison.make_pool(
        material.flow_map,
        material.classifier,
        size=given.pool,
        num_steps=POOL_STEPS,
        seed=_POOL_SEED,
        progress=partial(_tell, began),
    )
    rows = choose_targets(material.heldout, NUM_TARGETS, seed=_TARGET_SEED)
    counts = [n for n in (1000, 10_000, 100_000) if n <= given.pool]
    lines = [_line(make_problem(name, material, rows, seed=_TARGET_SEED), material, pool, counts) for name in PROBLEMS]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(table(lines, counts, given.pool))
    print(RESULTS.read_text())


def _line(problem: Problem, material: Material, pool: comparison.Pool, counts: Sequence[int]) -> list[str]:
    """Cells of one reward."""
    rewards = comparison.pool_rewards(problem, pool)
    grid = sorted(
        {1, len(pool), *(round(10 ** (k / 4)) for k in range(4 * len(str(len(pool)))))} & set(range(1, len(pool) + 1))
    )
    best = {n: _best_of(rewards, n) for n in sorted({*grid, *counts})}
    cells = [problem.title, *(f"{best[n]:.3g}" for n in counts)]
    for steps in STEP_COUNTS:
        reached = _steered(problem, material, steps)
        cells.append(f"{reached:.3g} ({_crossing(best, reached)})")
    return cells


def _best_of(rewards: torch.Tensor, n: int) -> float:
    chance = metrics.best_of_n_probabilities(rewards, n)
    return float((chance * rewards.double()).sum(-1).mean())


def _steered(problem: Problem, material: Material, steps: int) -> float:
    rows = len(problem.targets) * (SAMPLES_A_TARGET if len(problem.targets) > 1 else 4 * SAMPLES_A_TARGET)
    reward = SideBySide([target.reward for target in problem.targets], problem.name)
    drawn = sample(
        material.flow_map,
        num_samples=rows,
        steering=GradientGuidance(reward, num_draws=1),
        num_steps=steps,
        seed=_STEERING_SEED,
        batch_size=rows,
    )
    assert drawn.rewards is not None
    return float(drawn.rewards.mean())


def _crossing(best: dict[int, float], reached: float) -> str:
    """The N whose Best-of-N has that mean reward, linear in log N between the measured ones."""
    counts = sorted(best)
    if best[counts[-1]] < reached:
        return f"above {counts[-1]:,}"
    for low, high in pairwise(counts):
        if best[high] >= reached:
            share = max(0.0, (reached - best[low]) / max(best[high] - best[low], 1e-12))
            return f"N = {math.exp((1 - share) * math.log(low) + share * math.log(high)):,.0f}"
    return "N = 1"


def table(lines: Sequence[Sequence[str]], counts: Sequence[int], pool: int) -> str:
    header = ["reward", *(f"Best-of-{n:,}" for n in counts)]
    header += [f"MFM-G, 1 draw, {steps} steps: {5 * steps} calls (crossing)" for steps in STEP_COUNTS]
    head = [
        f"Mean rewards; pool of {pool:,} samples of {POOL_STEPS} steps: Best-of-N costs {POOL_STEPS + 1} N calls.",
        "",
    ]
    head += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*head, *body, "", "Made by `python -m benchmarks.best_of_n`.", ""])


def _tell(began: float, done: int, total: int) -> None:
    spent = time.monotonic() - began
    if done % 10_000 < 1000:
        print(f"pool: {done:,} of {total:,}, {spent * (total - done) / done:.0f} s left", flush=True)


if __name__ == "__main__":
    main()
