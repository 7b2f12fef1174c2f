"""Tables of docs/scaling.md: memory, communication and step time of DiT-XL/2 and one ten times as large.

    python -m scripts.scaling            # prints the tables
    python -m scripts.scaling --write    # puts them into docs/scaling.md
    python -m scripts.scaling --mfu 0.5 --bandwidth 25 --flops 312 --memory 80 --rows 256

Arithmetic alone (mfm_ray/training/footprint.py); no GPU is asked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mfm_ray.training.footprint import SEMIGROUP, DiT, Layout, Machine, memory, sent, step_time
from scripts.page_section import replace_section

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
NETWORKS = {
    "XL/2": DiT(width=1152, depth=28, num_heads=16),
    "10 x XL/2": DiT(width=2560, depth=56, num_heads=40),
}
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
STAGES = (0, 1, 2, 3)
GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md instead of stdout")
    parser.add_argument("--flops", type=float, default=989.4, help="dense bf16 peak of a GPU, TFLOP/s")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached")
    parser.add_argument("--bandwidth", type=float, default=50.0, help="of a GPU in a ring over all, GB/s each way")
    parser.add_argument("--overlap", type=float, default=0.0, help="share of communication hidden behind computing")
    parser.add_argument("--memory", type=float, default=80.0, help="of a GPU, GB")
    parser.add_argument("--rows", type=int, default=1024, help="global batch, all GPUs together")
    given = parser.parse_args()
    machine = Machine(
        flops=given.flops * 1e12,
        mfu=given.mfu,
        bandwidth=given.bandwidth * GB,
        overlap=given.overlap,
        memory=given.memory * GB,
    )
    text = tables(machine, given.rows)
    if given.write:
        replace_section(PAGE, "scripts.scaling", text)
    else:
        print(text)


def tables(machine: Machine, rows: int) -> str:
    """A table for each network."""
    parts = [
        f"GPUs of {machine.flops / 1e12:g} TFLOP/s at an MFU of {machine.mfu:g}, {machine.bandwidth / GB:g} GB/s each "
        f"way for a GPU, {machine.overlap:.0%} of the communication hidden, {machine.memory / GB:g} GB; global batch "
        f"{rows}, latents 32x32x4, objective semigroup, one average.",
    ]
    for name, network in NETWORKS.items():
        micro = {gpus: split(network, gpus, machine, rows) for gpus in GPUS}
        parts += ["", f"### {name}", ""]
        parts.append(
            f"{network.parameters / 1e6:,.0f} million parameters, {network.width} x {network.depth}, "
            f"{network.forward_flops / 1e9:,.0f} GFLOP a row and call."
        )
        parts += ["", *table(micro, network, machine, rows)]
    return "\n".join(parts)


def layout_of(stage: int, gpus: int, micro_rows: int, rows: int) -> Layout:
    return Layout(stage=stage, gpus=gpus, rows=micro_rows, micro_steps=rows // gpus // micro_rows)


def split(network: DiT, gpus: int, machine: Machine, rows: int) -> dict[int, int]:
    """Rows of a micro-step by stage: the most, by halving, that fit; 0 where not even one does."""
    found = {}
    for stage in STAGES:
        micro = rows // gpus
        while micro and memory(network, SEMIGROUP, Layout(stage, gpus, micro)).total > machine.memory:
            micro //= 2
        found[stage] = micro
    return found


def table(micro: dict[int, dict[int, int]], network: DiT, machine: Machine, rows: int) -> list[str]:
    lines = [
        "| GPUs | stage | state, GB | rows x micro-steps | in all, GB | with recomputing | sent a step, GB | "
        "compute, s | communication, s | step, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for gpus in GPUS:
        for stage in STAGES:
            state = memory(network, SEMIGROUP, Layout(stage, gpus, 1)).state / GB
            if not (chosen := micro[gpus][stage]):
                lines.append(f"| {gpus} | {stage} | {state:.1f} | does not fit | | | | | | |")
                continue
            layout = layout_of(stage, gpus, chosen, rows)
            total = memory(network, SEMIGROUP, layout).total / GB
            again = memory(network, SEMIGROUP, layout, recompute=True).total / GB
            time = step_time(network, SEMIGROUP, layout, machine)
            volume = sent(network.parameters, SEMIGROUP, layout) / GB
            lines.append(
                f"| {gpus} | {stage} | {state:.1f} | {layout.rows} x {layout.micro_steps} | {total:.1f} | "
                f"{again:.1f} | {volume:.1f} | {time.compute:.3f} | {time.communication:.3f} | {time.total:.3f} |"
            )
    return lines


if __name__ == "__main__":
    main()
