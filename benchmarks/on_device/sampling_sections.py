"""What a trained network is for: posterior draws and steered images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.on_device import workloads
from benchmarks.on_device.bench import MEMORY, MFU, OUTCOME, SECONDS, Bench, remark
from benchmarks.on_device.report import Column, Row, Section, milliseconds, spread
from benchmarks.on_device.timing import Call, Spread, peak_memory
from benchmarks.on_device.workloads import DRAWS_A_STATE
from mfm_ray.networks.computation import AutocastFlowMap
from mfm_ray.networks.flops import forward_flops

NUM_DRAWS = (0, 1, 4, 16)  # posterior draws a steering step; 0 is unsteered
STEPS_TIMED, STEPS_OF_A_SAMPLE = 4, 50
KINDS = (  # of draws, with their cost in forward passes
    ("without gradient", workloads.draws, 1),
    ("with the reward's gradient to x_t", workloads.draws_with_gradient, 2),
)


def draws_section(bench: Bench) -> Section:
    """2. One-step posterior draws."""
    section = Section(
        "draws",
        "One-step posterior draws",
        [
            Column("kind", "draws"),
            Column("rows", "draws a call", str),
            SECONDS,
            Column("draws_per_second", "draws/s", spread),
            MFU,
            MEMORY,
            OUTCOME,
        ],
        notes=[
            f"{DRAWS_A_STATE} draws of each state at guidance scale {workloads.CFG_SCALES[0]}, their noise included, "
            "frozen float32 weights under bf16 autocast. The gradient is that of a closed-form reward to x_t; MFU "
            "counts its backward pass as one forward pass, for no weight has a gradient."
        ],
    )
    network = workloads.build_frozen(bench.size, bench.device)
    flops = forward_flops(network)
    for kind, make, units in KINDS:
        bench.row(section, {"kind": kind}, partial(_draw_figures, bench, AutocastFlowMap(network), make, units * flops))
    return section


def _draw_figures(bench: Bench, flow_map: AutocastFlowMap, make: Callable[..., Call], flops_a_draw: float) -> Row:
    fitted = bench.fit(lambda states: make(flow_map, bench.size, states, bench.device), bench.batch // DRAWS_A_STATE)
    seconds, rows = bench.clock.spread(fitted.call), fitted.batch * DRAWS_A_STATE
    return {
        "rows": rows,
        "seconds": seconds,
        "draws_per_second": seconds.inverse(rows),
        "mfu": bench.mfu(flops_a_draw * rows, seconds),
        "peak_memory": peak_memory(fitted.call, bench.device),
        "outcome": remark(fitted, DRAWS_A_STATE),
    }


def steering_section(bench: Bench) -> Section:
    """3. Steered images."""
    section = Section(
        "steering",
        "Steered images: mfm.sample with GradientGuidance",
        [
            Column("num_draws", "draws a step"),
            Column("images", "images in flight", str),
            Column("step_seconds", "ms a step", milliseconds),
            Column("images_per_second", f"images/s at {STEPS_OF_A_SAMPLE} steps, extrapolated", spread),
            MFU,
            MEMORY,
            OUTCOME,
        ],
        notes=[
            f"Timed over {STEPS_TIMED} steps; the cost of a step does not depend on how many there are, and "
            f"images/s at {STEPS_OF_A_SAMPLE} steps is extrapolated from it. The reward is a closed form, so that "
            "these are the sampler's own costs; 0 draws is unsteered. Images in flight are chosen so that draws fill "
            "the batch of a network call."
        ],
    )
    network = workloads.build_frozen(bench.size, bench.device)
    flops = forward_flops(network)
    for num_draws in NUM_DRAWS:
        figures = partial(_steering_figures, bench, AutocastFlowMap(network), num_draws, flops)
        bench.row(section, {"num_draws": num_draws}, figures)
    return section


def _steering_figures(bench: Bench, flow_map: AutocastFlowMap, num_draws: int, flops: float) -> Row:
    def make(num_images: int) -> Call:
        return workloads.steered_images(flow_map, num_images, num_draws=num_draws, num_steps=STEPS_TIMED)

    fitted = bench.fit(make, bench.batch // max(1, num_draws))
    seconds = bench.clock.spread(fitted.call)
    step = Spread(*(part / STEPS_TIMED for part in (seconds.median, seconds.low, seconds.high)))
    # a step is one drift, and forward and backward of each draw
    return {
        "images": fitted.batch,
        "step_seconds": step,
        "images_per_second": step.inverse(fitted.batch / STEPS_OF_A_SAMPLE),
        "mfu": bench.mfu((1 + 2 * num_draws) * flops * fitted.batch, step),
        "peak_memory": peak_memory(fitted.call, bench.device),
        "outcome": remark(fitted),
    }
