"""The faults of benchmarks/drills/faults.py, one after another, as a table in docs/resilience.md.

    python -m benchmarks.drills.training [fault ...] [--folder DIR]

About a quarter of an hour on two idle cores. `disk_full` mounts a small file system and needs root. Exit code 1 when a
run ended otherwise than the undisturbed one, lost more than a checkpoint interval, or not at all as it should.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.drills.faults import CHECKPOINT_EVERY, FAULTS, STEPS, Drill, Outcome, may_mount
from scripts.page_section import replace_section

PAGE = Path(__file__).resolve().parents[2] / "docs" / "resilience.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="fault", help=f"of {', '.join(FAULTS)}; all by default")
    parser.add_argument("--folder", type=Path, help="where the runs go; outcomes that lie there are not made again")
    given = parser.parse_args()
    unknown = sorted(set(given.faults) - set(FAULTS))
    if unknown:
        parser.error(f"{unknown[0]}: expected one of {', '.join(FAULTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    with tempfile.TemporaryDirectory(prefix="mfm-ray-drill-") as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = [outcome_of(name, folder) for name in given.faults or FAULTS if name != "disk_full" or may_mount()]
    text = table(outcomes)
    print(text)
    if not given.faults:
        replace_section(PAGE, "benchmarks.drills.training", text)
    sys.exit(0 if all(one.same and one.lost_steps <= CHECKPOINT_EVERY for one in outcomes) else 1)


def outcome_of(name: str, folder: Path) -> Outcome:
    """What lies in the folder of an earlier call, else a new drill."""
    kept = folder / f"{name}.json"
    if kept.exists():
        return Outcome(**json.loads(kept.read_text()))
    outcome = FAULTS[name](Drill(folder))
    kept.write_text(json.dumps(asdict(outcome)))
    print(name, *outcome.said, sep="\n  ", flush=True)
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| fault | lost steps | from the fault to the next new step, s | starts of the workers | final weights equal |",
        "|---|---|---|---|---|",
    ]
    for one in outcomes:
        same = "to the bit" if one.same else "NO"
        lines.append(f"| {one.fault} | {one.lost_steps} | {one.seconds:.0f} | {one.attempts} | {same} |")
    return "\n".join(
        [
            f"Two workers, {STEPS} steps, a checkpoint every {CHECKPOINT_EVERY}.",
            "",
            *lines,
            "",
            "Made by `python -m benchmarks.drills.training`.",
        ]
    )


if __name__ == "__main__":
    main()
