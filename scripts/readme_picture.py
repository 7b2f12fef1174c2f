"""The picture at the top of the README, from a finished demo.

python -m scripts.readme_picture outputs/demo docs/images/demo.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import SubFigure
from torch import Tensor

from mfm_ray import metrics
from mfm_ray.data import Split, load_split
from mfm_ray.flow_map import FlowMap
from mfm_ray.pretrained import load_classifier, load_flow_map
from mfm_ray.protocols import comparison, posterior, problems
from mfm_ray.samplers import sample
from mfm_ray.steering import GradientGuidance

TIMES = (0.1, 0.3, 0.5, 0.7)
DRAWS = 10
TARGETS = 8
STEPS = 50


def main(demo: Path, output: Path) -> None:
    flow_map, heldout = load_flow_map(demo / "model"), load_split(demo / "data", "heldout")
    rows = problems.choose_targets(heldout, TARGETS, seed=2)
    figure = plt.figure(figsize=(10, 2.7), dpi=160, layout="constrained")
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=[DRAWS + 2, TARGETS + 3.6]))
    draw_posterior(left, flow_map, heldout.data[rows[:1]])
    draw_steering(right, flow_map, heldout, rows, load_classifier(demo / "model"))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, facecolor="white")


def draw_posterior(panel: SubFigure, flow_map: FlowMap, clean: Tensor) -> None:
    """A held-out digit at several noise levels, and what it may have been: one network call each."""
    rows, names = [], []
    for time in TIMES:
        contexts = posterior.noisy_contexts(clean, time, flow_map.space, seed=4)
        draws = posterior.gallery_draws(flow_map, contexts, num_draws=DRAWS, seed=4)[0]
        rows.append([flow_map.space.to_data_units(contexts.x_t)[0], *draws])
        names.append(f"t = {time:g}")
    draw_grid(panel, rows, names, "a noisy digit, and ten one-call draws of what it was")


def draw_steering(panel: SubFigure, flow_map: FlowMap, heldout: Split, rows: Tensor, judge: torch.nn.Module) -> None:
    """Half-hidden digits completed without steering, by Best-of-1000 and by one steered sample."""
    problem = problems.masked_problem(heldout.data[rows], heldout.labels[rows], seed=2)
    pool = comparison.make_pool(flow_map, judge, size=1000, num_steps=STEPS, seed=1)
    rewards = comparison.pool_rewards(problem, pool)
    reward = comparison.SideBySide([target.reward for target in problem.targets], problem.name)
    steered = sample(
        flow_map,
        num_samples=TARGETS,
        steering=GradientGuidance(reward, num_draws=1),
        num_steps=STEPS,
        dynamics="sde",
        batch_size=TARGETS,
    )
    assert steered.rewards is not None
    chosen = metrics.best_of_n_probabilities(rewards, 1000)
    best = f"Best-of-1000\n51,000 calls\nreward {float((chosen * rewards).sum(1).mean()):.0f}"
    ours = f"MFM-G\n{steered.nfe:g} calls\nreward {float(steered.rewards.mean()):.0f}"
    lines = {
        "seen": [target.pictures["observed"] for target in problem.targets],
        best: list(pool.images[rewards.argmax(1)]),
        ours: list(steered.images),
        "truth": list(heldout.data[rows]),
    }
    draw_grid(panel, list(lines.values()), list(lines), "the upper half is seen: who completes it best?")


def draw_grid(panel: SubFigure, rows: Sequence[Sequence[Tensor]], names: list[str], title: str) -> None:
    panel.suptitle(title, fontsize=10)
    axes = panel.subplots(len(rows), len(rows[0]), gridspec_kw={"wspace": 0.05, "hspace": 0.08})
    for line, images, name in zip(axes, rows, names, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.squeeze(0), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
