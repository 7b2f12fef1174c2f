"""Training steps: every objective, and the Eulerian one beside its straightforward form."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.on_device import workloads
from benchmarks.on_device.bench import BATCH, MEMORY, MFU, OUTCOME, SECONDS, Bench, remark
from benchmarks.on_device.report import Column, Row, Section, number, spread
from benchmarks.on_device.timing import Call, Fitted, Spread, peak_memory, ratio
from benchmarks.on_device.workloads import Training
from mfm_ray.networks.flops import forward_flops
from mfm_ray.objectives import OBJECTIVES, Objective

_COUNTED_BATCH = 2


def training_section(bench: Bench) -> Section:
    """1. The training step of every objective."""
    section = Section(
        "training",
        "Training step of each objective",
        [
            Column("objective", "objective"),
            BATCH,
            SECONDS,
            Column("images_per_second", "images/s", spread),
            Column("forward_units", "forward passes, declared", number),
            Column("counted_units", "counted", number),
            MFU,
            MEMORY,
            OUTCOME,
        ],
        notes=[
            "Forward, backward, clipping, optimiser and moving average; network under bf16 autocast, weights, "
            "gradients and optimiser state float32. MFU is the FLOPs of a forward pass times the passes that the "
            "objective's terms declare (a backward pass counts two, a tangent one), over the dense bf16 peak. "
            "`counted` are the passes found by counting matrix products: with guidance, attention written out for "
            "tangents, and whatever else is done beyond what is declared."
        ],
    )
    state = bench.training()
    flops = forward_flops(state.network)
    for name in OBJECTIVES:
        bench.row(section, {"objective": name}, partial(_objective_figures, bench, state, name, flops))
    return section


def _objective_figures(bench: Bench, state: Training, name: str, flops: float) -> Row:
    objective = workloads.build_objective(name, state.network)
    fitted = bench.fit(partial(state.step, objective), bench.batch)
    seconds = bench.clock.spread(fitted.call)
    units = declared_units(objective)
    return {
        "batch": fitted.batch,
        "seconds": seconds,
        "images_per_second": seconds.inverse(fitted.batch),
        "forward_units": units,
        "counted_units": counted_flops(state.step(objective, _COUNTED_BATCH)) / (_COUNTED_BATCH * flops),
        "mfu": bench.mfu(units * flops * fitted.batch, seconds),
        "peak_memory": peak_memory(fitted.call, bench.device),
        "outcome": remark(fitted),
    }


def declared_units(objective: Objective) -> float:
    """Cost of the objective in forward passes of the batch."""
    return sum(weighted.term.forward_units for weighted in objective.terms)


def counted_flops(call: Call) -> float:
    """Matrix products, convolutions and attention of a call, backward passes included."""
    # as in networks/flops.py: the counter knows attention only when it is written out
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def eulerian_section(bench: Bench) -> Section:
    """1b. The Eulerian objective beside its straightforward form, at one batch that both can hold."""
    section = Section(
        "eulerian",
        "Eulerian objective: tangents that record nothing, beside torch.func.jvp in grad mode",
        [
            Column("form", "form"),
            Column("largest_batch", "largest batch", str),
            BATCH,
            SECONDS,
            MEMORY,
            Column("slower", "times as slow", spread),
            Column("memory_ratio", "times the memory", number),
            OUTCOME,
        ],
        notes=[
            "The same step and the same gradient. The straightforward form writes attention out, records the tangent "
            "beside the value and keeps both graphs until the backward pass. Repeats in turns, at the largest batch of "
            "the search that both hold."
        ],
    )
    state = bench.training()
    forms = {"library": workloads.build_objective("eulerian", state.network)}
    forms["straightforward"] = workloads.straightforward_eulerian()
    largest: dict[str, Fitted] = {}
    for form, objective in forms.items():
        bench.row(section, {"form": form}, partial(_largest, bench, state, objective, form, largest))
    if len(largest) == len(forms):
        _compare_forms(bench, state, forms, min(fitted.batch for fitted in largest.values()), section)
    return section


def _largest(bench: Bench, state: Training, objective: Objective, form: str, largest: dict[str, Fitted]) -> Row:
    largest[form] = bench.fit(partial(state.step, objective), bench.batch)
    return {"largest_batch": largest[form].batch, "outcome": remark(largest[form])}


def _compare_forms(bench: Bench, state: Training, forms: dict[str, Objective], batch: int, section: Section) -> None:
    """Times and memory at one batch into the rows that are there, ratios over the first form."""
    calls = [state.step(objective, batch) for objective in forms.values()]
    try:
        seconds = bench.clock.alternate(calls)
        memory = [peak_memory(call, bench.device) for call in calls]
    except torch.OutOfMemoryError:
        section.rows[-1]["outcome"] = f"out of memory at batch {batch} beside the other form"
        return
    for row, taken, peak in zip(section.rows, seconds, memory, strict=True):
        row |= {"batch": batch, "seconds": Spread.of(taken), "peak_memory": peak}
        row |= {"slower": ratio(taken, seconds[0]), "memory_ratio": peak / memory[0]}
