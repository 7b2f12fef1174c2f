"""Below the library: which kernels take the time, and what torch.compile makes of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.on_device import workloads
from benchmarks.on_device.bench import BATCH, MEMORY, OUTCOME, Bench, remark
from benchmarks.on_device.report import Column, Row, Section, milliseconds, number, percent, spread
from benchmarks.on_device.sampling_sections import KINDS
from benchmarks.on_device.timing import Call, Spread, peak_memory, ratio
from benchmarks.on_device.workloads import DRAWS_A_STATE
from mfm_ray.networks.computation import AutocastFlowMap
from mfm_ray.networks.dit import DiTFlowMap

_TOP_KERNELS = 12
_NAME_LENGTH = 90


@dataclass(frozen=True)
class Workload:
    """A call on a network whose blocks can be exchanged, by batch."""

    name: str
    network: DiTFlowMap
    make: Callable[[int], Call]
    batch: int


def training_workload(bench: Bench, objective: str) -> Workload:
    state = bench.training()
    make = partial(state.step, workloads.build_objective(objective, state.network))
    return Workload(f"training step, {objective}", state.network, make, bench.batch)


def draw_workload(bench: Bench, kind: str, make: Callable[..., Call]) -> Workload:
    network = workloads.build_frozen(bench.size, bench.device)
    flow_map = AutocastFlowMap(network)

    def call(num_states: int) -> Call:
        return make(flow_map, bench.size, num_states, bench.device)

    return Workload(f"draws {kind}", network, call, bench.batch // DRAWS_A_STATE)


COMPILED: tuple[Callable[[Bench], Workload], ...] = (
    *(partial(draw_workload, kind=kind, make=make) for kind, make, _ in KINDS),
    partial(training_workload, objective="semigroup"),
)
PROFILED: tuple[Callable[[Bench], Workload], ...] = (
    partial(training_workload, objective="semigroup"),
    partial(training_workload, objective="eulerian"),
    partial(draw_workload, kind=KINDS[0][0], make=KINDS[0][1]),
)


def compile_section(bench: Bench) -> Section:
    """4. torch.compile of the transformer's blocks beside the blocks as they are."""
    section = Section(
        "compile",
        "torch.compile of the transformer's blocks",
        [
            Column("call", "call"),
            BATCH,
            Column("eager", "eager, ms", milliseconds),
            Column("compiled", "compiled, ms", milliseconds),
            Column("speedup", "times as fast", spread),
            Column("compile_seconds", "first call, s", number),
            MEMORY,
            Column("compiled_memory", "compiled", lambda value: MEMORY.write(value)),
            OUTCOME,
        ],
        notes=[
            "Blocks alone are compiled, for fixed shapes; all of them share one program. Repeats in turns, on the same "
            "weights. `pays` where the slowest pair of repeats is faster compiled. Batch in states of "
            f"{DRAWS_A_STATE} draws, or in training images."
        ],
    )
    if bench.backend is None:
        section.rows = [{"call": "all", "outcome": "left out (--no-compile)"}]
        return section
    for make in COMPILED:
        workload = make(bench)
        bench.row(section, {"call": workload.name}, partial(_compile_figures, bench, workload, bench.backend))
    return section


def _compile_figures(bench: Bench, workload: Workload, backend: str) -> Row:
    fitted = bench.fit(workload.make, workload.batch)
    figures: Row = {"batch": fitted.batch, "peak_memory": peak_memory(fitted.call, bench.device)}
    torch.compiler.reset()  # programs of other shapes would count towards the limit of recompilations
    blocks = workloads.compiled_blocks(workload.network, backend)

    def compiled() -> None:
        with workloads.with_blocks(workload.network, blocks):
            fitted.call()

    try:
        figures["compile_seconds"] = _seconds_of_first(compiled, bench)
        figures["compiled_memory"] = peak_memory(compiled, bench.device)
        eager, fast = bench.clock.alternate([fitted.call, compiled])
    except compile_errors() as error:
        return {**figures, "eager": bench.clock.spread(fitted.call), "outcome": f"does not compile: {_line(error)}"}
    speedup = ratio(eager, fast)
    outcome = "; ".join(filter(None, [_verdict(speedup), remark(fitted)]))
    return {**figures, "eager": Spread.of(eager), "compiled": Spread.of(fast), "speedup": speedup, "outcome": outcome}


def compile_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises of its own: while it traces, and while its default backend makes kernels."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler, OperatorIssue

    # the backward pass may be compiled when it first runs, where nothing wraps the backend's errors
    return (TorchDynamoException, OperatorIssue, CppCompileError, InvalidCxxCompiler)


def _seconds_of_first(call: Call, bench: Bench) -> float:
    began = time.perf_counter()
    call()
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)
    return time.perf_counter() - began


def _verdict(speedup: Spread) -> str:
    if speedup.low > 1:
        return "pays"
    return "does not pay" if speedup.high < 1 else "no difference beyond the spread"


def _line(error: Exception) -> str:
    """Class and first line of an error, short enough for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def profile_section(bench: Bench) -> Section:
    """5. The kernels that take the time (on a CPU: the operations)."""
    section = Section(
        "profile",
        "Top kernels by time",
        [
            Column("call", "call"),
            BATCH,
            Column("kernel", "kernel"),
            Column("launches", "launches", str),
            Column("seconds", "ms", lambda value: number(1e3 * value)),
            Column("share", "share", percent),
            OUTCOME,
        ],
        notes=[
            "One call each under torch.profiler. `all` sums every kernel; its share is that of the call's own time "
            "measured without the profiler: what is missing to 100 % the device waited. The others are shares of the "
            "sum."
        ],
    )
    for make in PROFILED:
        _profile(bench, make(bench), section)
    return section


def _profile(bench: Bench, workload: Workload, section: Section) -> None:
    """A row for all kernels of a call and one for each of the longest."""
    kernels: list[Row] = []
    bench.row(section, {"call": workload.name, "kernel": "all"}, partial(_profile_figures, bench, workload, kernels))
    section.rows += [{"call": workload.name, **kernel} for kernel in kernels]


def _profile_figures(bench: Bench, workload: Workload, kernels: list[Row]) -> Row:
    fitted = bench.fit(workload.make, workload.batch)
    unprofiled = bench.clock.spread(fitted.call).median
    events = kernel_times(fitted.call, bench.device)
    total = sum(seconds for _, _, seconds in events)
    kernels += [
        {"batch": fitted.batch, "kernel": name, "launches": count, "seconds": seconds, "share": seconds / total}
        for name, count, seconds in events[:_TOP_KERNELS]
    ]
    launches = sum(count for _, count, _ in events)
    share = total / unprofiled
    return {"batch": fitted.batch, "launches": launches, "seconds": total, "share": share, "outcome": remark(fitted)}


def kernel_times(call: Call, device: torch.device) -> list[tuple[str, int, float]]:
    """Name, launches and seconds of every kernel of a call, longest first; on a CPU of every operation's own work."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        call()
        if cuda:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind and not event.is_user_annotation]
    times = [(_short(event.key), event.count, _own_seconds(event, cuda)) for event in events]
    return sorted(times, key=lambda item: -item[2])


def _own_seconds(event: Any, cuda: bool) -> float:
    return (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…"
