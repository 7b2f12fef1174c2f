"""Which network for 8x8 images? The same data, objective, batch and CPU seconds for each; the held-out loss decides.

    python -m benchmarks.networks [--seconds 120]

One thread, no cluster. Writes benchmarks/results/networks.md. `held-out` is the diagonal squared error per image on
digits that were never trained on (lower: a better posterior mean), `memorised` the gap to the same figure on training
images, `confident` the share of one-step samples that the classifier reads with more than 0.9, `steered` the mean
reward of single-draw MFM-G (SDE, 50 steps) on eight half-hidden held-out digits, where the truth has about -16.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mfm_ray.data import Batch, Dataset, SampleOrder, data_moments, digits, read_batch
from mfm_ray.data.augment import AffineJitter
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks import build_network
from mfm_ray.networks.classifier import DigitClassifier, train_classifier
from mfm_ray.noise import KeyedNoise
from mfm_ray.objectives import named_objective
from mfm_ray.protocols import comparison, problems
from mfm_ray.samplers import refine, sample
from mfm_ray.steering import GradientGuidance

RESULTS = Path(__file__).parent / "results" / "networks.md"
MLP = {"name": "residual_mlp", "num_blocks": 4}
DIT = {"name": "dit", "patch_size": 2, "depth": 4, "num_heads": 4, "encoder_depth": 3}
CANDIDATES: dict[str, tuple[dict[str, Any], float, float]] = {  # network, share of jittered images, budgets
    "residual MLP, 256 wide": ({**MLP, "width": 256}, 0.7, 1),
    "residual MLP, 512 wide": ({**MLP, "width": 512}, 0.7, 1),
    "DiT, 64 wide": ({**DIT, "hidden_size": 64}, 0.7, 1),
    "residual MLP, 256 wide, 3 times as long": ({**MLP, "width": 256}, 0.7, 3),
    "the same without jitter": ({**MLP, "width": 256}, 0.0, 3),
}
BATCH = 256


@dataclass(frozen=True)
class Row:
    name: str
    parameters: int
    steps: int
    heldout: float
    training: float
    confident: float
    steered: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of training for each network")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    data = digits()
    train, heldout = data.splits["train"], data.splits["heldout"]
    judge = train_classifier(
        train.data, train.labels, heldout_data=heldout.data, heldout_labels=heldout.labels, num_classes=10
    ).classifier
    rows = []
    for name, (network, jitter, budgets) in CANDIDATES.items():
        rows.append(measure(name, network, jitter, data, judge, budgets * seconds))
        print(rows[-1], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(table(rows, seconds))
    print(RESULTS.read_text())


def measure(
    name: str, network: dict[str, Any], jitter: float, data: Dataset, judge: DigitClassifier, seconds: float
) -> Row:
    """Train one candidate for `seconds` of CPU time, fp32 master weights under bf16 autocast, and judge its average."""
    moments = data_moments(data.space.to_model_space(data.splits["train"].data).flatten(1)).preconditioning()
    torch.manual_seed(0)
    flow_map = build_network(network, space=data.space, num_classes=10, moments=moments)
    average, steps = train(flow_map, data, AffineJitter(rate=jitter, rotation=0.12, scale=0.06, shift=0.03), seconds)
    with torch.no_grad():
        images = refine(average, num_samples=512, num_steps=1, seed=1)
        confidence = judge(images).softmax(1).max(1).values
    return Row(
        name=name,
        parameters=sum(parameter.numel() for parameter in flow_map.parameters()),
        steps=steps,
        heldout=diagonal_error(average, data, "heldout"),
        training=diagonal_error(average, data, "train"),
        confident=float((confidence > 0.9).float().mean()),
        steered=steered_reward(average, data),
    )


def train(flow_map: FlowMap, data: Dataset, jitter: AffineJitter, seconds: float) -> tuple[FlowMap, int]:
    """Adam with warm-up and a moving average until the CPU seconds are spent; the learning rate falls with them."""
    objective, average = named_objective("semigroup"), copy.deepcopy(flow_map).requires_grad_(False)
    optimiser = torch.optim.Adam(flow_map.parameters(), lr=1e-3, fused=True)
    order = SampleOrder(num_rows=len(data.splits["train"]), seed=0, global_batch_size=BATCH)
    began, step = time.process_time(), 0
    while (spent := (time.process_time() - began) / seconds) < 1:
        optimiser.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 100, 20 * (1 - spent))
        batch = read_batch(data.splits["train"], data.space, order, step)
        noise = KeyedNoise.for_rows(0, batch.rows).fold_in(step)
        images = jitter(data.space.to_data_units(batch.data), noise)
        batch = Batch(data.space.to_model_space(images), batch.label, batch.rows)
        with torch.autocast("cpu", torch.bfloat16):
            losses = objective(flow_map, batch, noise=noise)
        optimiser.zero_grad()
        losses.total.mean().backward()
        torch.nn.utils.clip_grad_norm_(flow_map.parameters(), 1.0)
        optimiser.step()
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(flow_map.parameters()), 1 - decay)
        step += 1
    return average, step


@torch.no_grad()
def diagonal_error(flow_map: FlowMap, data: Dataset, split: str) -> float:
    """Mean diagonal squared error over 1,960 draws of (image, times, noise), the same ones for every network."""
    images = data.splits[split].data[:196].repeat(10, 1, 1, 1)
    batch = Batch(data.space.to_model_space(images), None, torch.arange(len(images)))
    losses = named_objective("semigroup")(flow_map, batch, noise=KeyedNoise.for_rows(99, batch.rows))
    return float(losses.squared_errors["diagonal"].mean())


def steered_reward(flow_map: FlowMap, data: Dataset) -> float:
    """Mean reward of 8 x 16 single-draw MFM-G samples."""
    heldout = data.splits["heldout"]
    rows = problems.choose_targets(heldout, 8, seed=2)
    targets = problems.masked_problem(heldout.data[rows], heldout.labels[rows], seed=2).targets
    reward = comparison.SideBySide([target.reward for target in targets], "masked")
    steering = GradientGuidance(reward, num_draws=1)
    drawn = sample(flow_map, num_samples=128, steering=steering, num_steps=50, dynamics="sde", batch_size=128)
    assert drawn.rewards is not None
    return float(drawn.rewards.mean())


def table(rows: list[Row], seconds: float) -> str:
    line: Callable[[Row], str] = lambda row: (  # noqa: E731
        f"| {row.name} | {row.parameters / 1e6:.2f} M | {row.steps} | {row.heldout:.2f} | "
        f"{row.heldout - row.training:+.2f} | {100 * row.confident:.0f} % | {row.steered:.1f} |"
    )
    return "\n".join(
        [
            f"Digits, {seconds:g} CPU seconds of one thread each, batch {BATCH}, bf16 autocast.",
            "",
            "| network | parameters | steps | held-out | memorised | confident | steered |",
            "|---|---|---|---|---|---|---|",
            *map(line, rows),
            "",
            "Made by `python -m benchmarks.networks`.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
