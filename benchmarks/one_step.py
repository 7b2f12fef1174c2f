"""Does a model draw digits in one network call? A judge reads its samples, beside real images.

    python -m benchmarks.one_step --model runs/mnist/model --data data/mnist [--picture FILE]

No cluster, one thread, about a minute. Writes benchmarks/results/one_step.md. The judge is the classifier beside the
model, trained on real digits. `confident` is the share of images that it reads with more than 0.9, `nearest` the median
distance (root of summed squares, pixels 0 to 1) to the nearest training image: samples that lie much nearer than
held-out digits do are copies. `velocity` is the ODE of the marginal velocity in 50 steps: what is missing there has not
been learned of the velocity, what one step has less than that has not been learned of the jump. With labels (as many of
each class) and without; `right` is the share read as its label. --picture draws 100 one-step samples, a class a column,
not selected.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mfm_ray.data.shards import load_split
from mfm_ray.flow_map import FlowMap
from mfm_ray.metrics import class_confidence, class_frequencies, class_probabilities
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.networks.flops import forward_flops
from mfm_ray.pretrained import load_classifier, load_flow_map, read_model_config
from mfm_ray.reporting.pictures import grid, png
from mfm_ray.samplers import refine, sample

RESULTS = Path(__file__).parent / "results" / "one_step.md"
STEP_COUNTS = (1, 2, 4)
NUM_SAMPLES, NUM_SHOWN = 1000, 100
_ONE_STEP = "1 step, labelled"
CONFIDENT = 0.9
_LABELLED, _REAL = "labelled", "held-out digits"
_SAMPLING_SEED = 1


@dataclass(frozen=True)
class Row:
    """What a judge says of a set of images, and how far they are from the training images."""

    name: str
    confident: float
    confidence: float
    right: float | None
    frequencies: Tensor
    nearest: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory with a classifier in it")
    parser.add_argument("--data", required=True, help="the prepared data it was trained on")
    parser.add_argument("--picture", type=Path, help="PNG of one-step samples to write")
    given = parser.parse_args()
    torch.set_num_threads(1)
    flow_map, judge = load_flow_map(given.model), load_classifier(given.model)
    train, heldout_split = load_split(given.data, "train").data, load_split(given.data, "heldout")
    images = draw(flow_map) | {_REAL: heldout_split.data}
    labels = {name: heldout_split.labels if name == _REAL else _labels_of(name) for name in images}
    rows = [measure(name, drawn, labels[name], judge, train) for name, drawn in images.items()]
    training = read_model_config(given.model)["training"]
    heading = f"{training['steps']} steps, {forward_flops(flow_map) / 1e6:.0f} MFLOP a call, {NUM_SAMPLES:,} samples."
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(table(heading, rows))
    print(RESULTS.read_text())
    if given.picture is not None:
        given.picture.write_bytes(png(grid(images[_ONE_STEP][:NUM_SHOWN], columns=10, zoom=2)))


def draw(flow_map: FlowMap) -> dict[str, Tensor]:
    """Samples by name: of one and of a few steps of the map, and of the ODE of its velocity."""
    drawn = {}
    for kind in (_LABELLED, "unlabelled"):
        settings = {"num_samples": NUM_SAMPLES, "seed": _SAMPLING_SEED, "label": _labels_of(kind)}
        for steps in STEP_COUNTS:
            drawn[f"{steps} step{'s' * (steps > 1)}, {kind}"] = refine(flow_map, num_steps=steps, **settings)
        ode = sample(flow_map, num_steps=50, dynamics="ode", **settings)
        drawn[f"velocity, 50 steps, {kind}"] = ode.images
    return drawn


def _labels_of(name: str) -> Tensor | None:
    """The classes that were asked for, in turn; None for samples without."""
    return torch.arange(NUM_SAMPLES) % 10 if name.split(", ")[-1] == _LABELLED else None


def measure(name: str, images: Tensor, labels: Tensor | None, judge: DigitClassifier, train: Tensor) -> Row:
    probabilities = class_probabilities(judge, images)
    confidence = class_confidence(probabilities)
    return Row(
        name=name,
        confident=float((confidence > CONFIDENT).double().mean()),
        confidence=float(confidence.mean()),
        right=None if labels is None else float((probabilities.argmax(1) == labels).double().mean()),
        frequencies=class_frequencies(probabilities),
        nearest=float(nearest_distances(images, train).median()),
    )


def nearest_distances(images: Tensor, train: Tensor) -> Tensor:
    """Euclidean distance from each image to the nearest of `train`, (N,)."""
    return torch.cat([torch.cdist(part.flatten(1), train.flatten(1)).min(1).values for part in images.split(256)])


def table(heading: str, rows: Sequence[Row]) -> str:
    return "\n".join([heading, "", *_lines(rows), "", "Made by `python -m benchmarks.one_step`.", ""])


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    yield "| images | confident | mean confidence | right | share of each class, 0 to 9, in percent | nearest |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        shares = " ".join(f"{100 * share:.0f}" for share in row.frequencies)
        right = "" if row.right is None else f"{100 * row.right:.1f} %"
        judged = f"{100 * row.confident:.1f} % | {row.confidence:.3f} | {right}"
        yield f"| {row.name} | {judged} | {shares} | {row.nearest:.2f} |"


if __name__ == "__main__":
    main()
