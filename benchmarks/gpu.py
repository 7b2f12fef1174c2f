"""What one device makes of the library: training steps, posterior draws, steered images, torch.compile, kernels.

    python -m benchmarks.gpu [--size xl2|b2|toy] [--device cuda|cpu] [--batch N] [--no-compile] [--out FILE]

Needs torch and the library alone. XL/2 on a CUDA device takes about ten minutes and writes
benchmarks/results/gpu-<device>.md with a JSON file beside it, again after each section; a toy run, which is what a
machine without CUDA does, is printed, and written only where --out says. Figures are medians of 7 repeats with their
lowest and highest, repeats of things that are compared being taken in turns; batches are halved until they fit.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.on_device.bench import Bench
from benchmarks.on_device.fast_sections import fast_section
from benchmarks.on_device.kernel_sections import COMPILED, PROFILED, compile_section, profile_section
from benchmarks.on_device.progress import Progress
from benchmarks.on_device.report import Report, Section, device_facts, slug
from benchmarks.on_device.sampling_sections import KINDS, NUM_DRAWS, draws_section, steering_section
from benchmarks.on_device.timing import Clock, release_memory
from benchmarks.on_device.training_sections import eulerian_section, training_section
from benchmarks.on_device.workloads import SIZES
from mfm_ray.objectives import OBJECTIVES
from mfm_ray.training.device_peaks import device_peak

RESULTS = Path(__file__).parent / "results"
REPEATS = 7
_SECONDS = {"cuda": 7.0, "cpu": 0.7}  # of one figure, all repeats together
_FORMS = 2  # of the Eulerian objective
_FAST_FORMS = 5  # two of the training step, three of draws

# compilation last: what it may break is measured by then
SECTIONS: tuple[tuple[Callable[[Bench], Section], int], ...] = (
    (training_section, len(OBJECTIVES)),
    (eulerian_section, _FORMS),
    (draws_section, len(KINDS)),
    (steering_section, len(NUM_DRAWS)),
    (profile_section, len(PROFILED)),
    (fast_section, _FAST_FORMS),
    (compile_section, len(COMPILED)),
)
"""Each section, and how many parts its progress has."""


def main(words: Sequence[str] | None = None) -> Report:
    given = parse(sys.argv[1:] if words is None else words)
    # a search that fills the memory leaves holes that blocks of another size cannot use
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device = torch.device(given.device)
    size = SIZES[given.size]
    bench = Bench(
        size=size,
        device=device,
        clock=Clock(device, repeats=given.repeats, seconds=given.seconds),
        batch=given.batch or size.batch,
        optimizer=given.optimizer,
        peak_flops=device_peak(device, "bf16"),
        backend=given.compile_backend,
        progress=Progress(sum(parts for _, parts in SECTIONS)),
    )
    facts = {**device_facts(device), "command": shlex.join(["python", "-m", "benchmarks.gpu", *given.words])}
    report = run(bench, Report({**facts, "size": given.size, "optimizer": given.optimizer}), given.out)
    print(report.markdown())
    return report


def run(bench: Bench, report: Report, out: Path | None) -> Report:
    """All sections into the report, which is written after each where `out` names a file."""
    for section, _ in SECTIONS:
        report.sections.append(section(bench))
        release_memory(bench.device)
        report.complete = len(report.sections) == len(SECTIONS)
        if out is not None:
            report.write(out)
    return report


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Arguments with every default filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--size", choices=tuple(SIZES), help="xl2 on CUDA and toy on a CPU when not given")
    parser.add_argument("--batch", type=int, help="where the search for a batch that fits starts")
    parser.add_argument("--seconds", type=float, help="of each figure, all repeats together (7 on CUDA, 0.7 on a CPU)")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--optimizer", choices=("adam", "radam"), default="adam", help="adam is the fused one")
    parser.add_argument("--compile-backend", default="inductor", help="of torch.compile")
    parser.add_argument("--no-compile", dest="compile_backend", action="store_const", const=None)
    parser.add_argument("--out", type=Path, help="Markdown file, in place of benchmarks/results/gpu-<device>.md")
    given = parser.parse_args(words)
    if given.device == "cuda" and not cuda:
        parser.error("--device cuda: torch finds no CUDA device")
    given.words = list(words)
    given.size = given.size or ("xl2" if given.device == "cuda" else "toy")
    given.seconds = _SECONDS[given.device] if given.seconds is None else given.seconds
    given.out = given.out or default_path(given.device, given.size)
    return given


def default_path(device: str, size: str) -> Path | None:
    """Where real results go: those of the paper's sizes on a CUDA device."""
    if device != "cuda" or size == "toy":
        return None
    name = slug(torch.cuda.get_device_name())
    return RESULTS / (f"gpu-{name}.md" if size == "xl2" else f"gpu-{name}-{size}.md")


if __name__ == "__main__":
    main()
