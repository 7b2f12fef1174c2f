"""The fast paths beside the form that everybody writes first: eager, attention written out in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.on_device import workloads
from benchmarks.on_device.bench import BATCH, MEMORY, MFU, OUTCOME, SECONDS, Bench, remark
from benchmarks.on_device.report import Column, Row, Section, number, spread
from benchmarks.on_device.timing import Call, Fitted, Spread, peak_memory, ratio
from benchmarks.on_device.training_sections import counted_flops
from benchmarks.on_device.workloads import DRAWS_A_STATE
from mfm_ray.networks.attention import written_out_attention
from mfm_ray.networks.computation import computed

OBJECTIVE = "eulerian_teacher"
EAGER = "attention written out in float32"
_COUNTED = 2


@dataclass(frozen=True)
class Form:
    """A way to make the same call, by batch. around: what every call is made inside."""

    name: str
    make: Callable[[int], Call]
    around: Callable[[], AbstractContextManager[None]] = nullcontext

    def at(self, batch: int) -> Call:
        call = self.make(batch)

        def within() -> object:
            with self.around():
                return call()

        return within


def float32_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scores, softmax and weights as whole matrices in float32."""
    with torch.autocast(query.device.type, enabled=False):
        return written_out_attention(query.float(), key.float(), value.float()).to(query.dtype)


in_float32 = partial(workloads.attention_as, float32_attention)


def fast_section(bench: Bench) -> Section:
    """6. The training step of the Eulerian objective with a teacher, and one-step draws, in each form."""
    section = Section(
        "fast_paths",
        "Fast paths beside attention written out in float32",
        [
            Column("call", "call"),
            Column("form", "form"),
            Column("largest_batch", "largest batch", str),
            BATCH,
            SECONDS,
            MFU,
            Column("slower", "times as slow", spread),
            MEMORY,
            Column("memory_ratio", "times the memory", number),
            OUTCOME,
        ],
        notes=[
            "bf16 autocast in all forms, repeats in turns at the largest batch that all of them hold; ratios are over "
            "`library`. MFU is over FLOPs that were counted (matrix products, convolutions, attention; backward passes "
            "and tangents included) in the library's form, for all forms alike. `graphs` replays CUDA graphs; on a CPU "
            f"it is `library`. Batch in training images, or in states of {DRAWS_A_STATE} draws."
        ],
    )
    _compare(bench, f"training step, {OBJECTIVE}", _training_forms(bench), bench.batch, section)
    _compare(bench, "one-step draws", _draw_forms(bench), bench.batch // DRAWS_A_STATE, section)
    return section


def _training_forms(bench: Bench) -> list[Form]:
    state = bench.training()
    step = partial(state.step, workloads.build_objective(OBJECTIVE, state.network))
    return [Form("library", step), Form(EAGER, step, in_float32)]


def _draw_forms(bench: Bench) -> list[Form]:
    network = workloads.build_frozen(bench.size, bench.device)

    def draws(execution: str) -> Callable[[int], Call]:
        flow_map = computed(network, precision="bf16", execution=execution)
        return lambda states: workloads.draws(flow_map, bench.size, states, bench.device)

    return [
        Form("library", draws("eager")),
        Form("graphs", draws("graphs")),
        Form(EAGER, draws("eager"), in_float32),
    ]


def _compare(bench: Bench, call: str, forms: list[Form], batch: int, section: Section) -> None:
    first, largest = len(section.rows), list[Fitted]()
    for form in forms:
        bench.row(section, {"call": call, "form": form.name}, partial(_largest, bench, form, batch, largest))
    if len(largest) < len(forms):
        return
    rows, common = section.rows[first:], min(fitted.batch for fitted in largest)
    try:
        _measure(bench, forms, common, rows)
    except torch.OutOfMemoryError:
        rows[-1]["outcome"] = f"out of memory at batch {common} beside the other forms"


def _largest(bench: Bench, form: Form, batch: int, largest: list[Fitted]) -> Row:
    largest.append(bench.fit(form.at, batch))
    return {"largest_batch": largest[-1].batch, "outcome": remark(largest[-1])}


def _measure(bench: Bench, forms: list[Form], batch: int, rows: list[Row]) -> None:
    flops = counted_flops(forms[0].at(_COUNTED)) / _COUNTED
    calls = [form.at(batch) for form in forms]
    seconds = bench.clock.alternate(calls)
    memory = [peak_memory(call, bench.device) for call in calls]
    for row, taken, peak in zip(rows, seconds, memory, strict=True):
        row |= {"batch": batch, "seconds": Spread.of(taken), "mfu": bench.mfu(flops * batch, Spread.of(taken))}
        row |= {"slower": ratio(taken, seconds[0]), "peak_memory": peak, "memory_ratio": peak / memory[0]}
