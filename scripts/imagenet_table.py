"""Table of docs/imagenet.md: memory and time of the ImageNet recipes on 1, 8 and 64 GPUs.

    python -m scripts.imagenet_table            # prints it
    python -m scripts.imagenet_table --write    # puts it into docs/imagenet.md

Arithmetic alone, by the formulas of docs/scaling.md with bf16, ZeRO 1 and activation checkpointing; no GPU is asked.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from mfm_ray.config import TrainConfig, load_config
from mfm_ray.networks.gaussian import GaussianMixture, GaussianMixtureFlowMap
from mfm_ray.objectives import build_objective, needs_teacher
from mfm_ray.training.footprint import DiT, Layout, Machine, Objective, memory, step_time
from scripts.page_section import replace_section

PAGE = Path(__file__).resolve().parent.parent / "docs" / "imagenet.md"
RECIPES = ("imagenet_b2", "imagenet_xl2", "imagenet_xl2_distilled")
GPUS = (1, 8, 64)
GB, HOUR = 1e9, 3600.0
MACHINE = Machine(flops=989.4e12, mfu=0.4, bandwidth=50e9, memory=80e9)
_TEACHER_BYTES = 6
"""Of each of the teacher's weights: float32, and the bfloat16 copy of a call."""


@dataclass(frozen=True)
class Recipe:
    name: str
    network: DiT
    objective: Objective
    rows: int
    steps: int
    teacher_bytes: float

    @classmethod
    def of(cls, name: str) -> Recipe:
        config = load_config("train", [f"experiment={name}", "init_from=start.pt"])
        assert isinstance(config, TrainConfig)
        shape = config.network
        network = DiT(width=shape["hidden_size"], depth=shape["depth"], num_heads=shape["num_heads"])
        distilled = needs_teacher(config.objective)
        # only the costs of the terms are read, so any flow map will do for a teacher
        teacher = _any_flow_map() if distilled else None
        terms = build_objective(config.objective, teacher=teacher).terms
        objective = Objective(
            forward_units=sum(weighted.term.forward_units for weighted in terms),
            calls=2 * len(terms),
            gradient_calls=len(terms),
        )
        held = _TEACHER_BYTES * network.parameters if distilled else 0
        return cls(name, network, objective, config.global_batch_size, config.max_steps, held)

    def layout(self, gpus: int) -> Layout | None:
        """The largest micro-step that fits, rows being split evenly; None where none does."""
        share = self.rows // gpus
        for rows in sorted((n for n in range(1, share + 1) if share % n == 0), reverse=True):
            layout = Layout(stage=1, gpus=gpus, rows=rows, micro_steps=share // rows)
            if self.bytes(layout) <= MACHINE.memory:
                return layout
        return None

    def bytes(self, layout: Layout) -> float:
        return memory(self.network, self.objective, layout, recompute=True).total + self.teacher_bytes

    def seconds(self, layout: Layout) -> float:
        """Of one step; each graph's forward pass is made twice, which activation checkpointing costs."""
        again = Objective(
            forward_units=self.objective.forward_units + self.objective.gradient_calls,
            calls=self.objective.calls,
            gradient_calls=self.objective.gradient_calls,
        )
        return step_time(self.network, again, layout, MACHINE).total


def _any_flow_map() -> GaussianMixtureFlowMap:
    return GaussianMixtureFlowMap(
        GaussianMixture.from_covariances(torch.zeros(1), torch.zeros(1, 2), torch.eye(2).unsqueeze(0))
    )


def table() -> str:
    lines = [
        f"GPUs of {MACHINE.flops / 1e12:g} TFLOP/s at an assumed MFU of {MACHINE.mfu:g}, {MACHINE.memory / GB:g} GB, "
        f"{MACHINE.bandwidth / GB:g} GB/s each way; ZeRO 1, bf16, activation checkpointing.",
        "",
        "| recipe | GPUs | global batch | `micro_batch_size` | memory, GB | step, s | the recipe's 100,000 steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in RECIPES:
        recipe = Recipe.of(name)
        lines += [_row(recipe, gpus) for gpus in GPUS]
    return "\n".join(lines)


def _row(recipe: Recipe, gpus: int) -> str:
    whole = recipe.rows // gpus * gpus
    layout = recipe.layout(gpus)
    if layout is None:
        return f"| `{recipe.name}` | {gpus} | {whole} | does not fit | | | |"
    seconds = recipe.seconds(layout)
    hours = seconds * recipe.steps / HOUR
    length = f"{hours / 24:.1f} days" if hours > 48 else f"{hours:.0f} h"
    return (
        f"| `{recipe.name}` | {gpus} | {whole} | {layout.rows} | {recipe.bytes(layout) / GB:.0f} "
        f"| {seconds:.2f} | {length} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/imagenet.md instead of stdout")
    if parser.parse_args().write:
        replace_section(PAGE, "scripts.imagenet_table", table())
    else:
        print(table())


if __name__ == "__main__":
    main()
