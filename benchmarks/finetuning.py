"""What a reward in its own deployment costs a fine-tuning step, against the same reward in the training worker.

    python -m benchmarks.finetuning --model outputs/demo/model

Runs of `jobs.finetune` on one worker, alternating: rewards local, and asked of `reward_<name>` of Serve on
the same machine. Seconds a step from the runs' own metrics, the first steps left out. One thread in every process.
Writes benchmarks/results/finetuning.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray import serve

from jobs.cluster import ray_cluster
from jobs.contract import JobRun
from jobs.finetune import body
from mfm_ray.config import load_config
from mfm_ray.storage import Storage
from serve.models import read_models
from serve.reward import reward_deployment
from serve.settings import RewardSettings

RESULTS = Path(__file__).parent / "results" / "finetuning.md"
APP = "rewards-of-the-benchmark"
REWARDS = ("symmetry", "class_probability")
BATCH, WARM_UP = 128, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory of images")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each, alternating")
    parser.add_argument("--steps", type=int, default=50, help="steps of each run")
    given = parser.parse_args()
    with ray_cluster(print), tempfile.TemporaryDirectory(prefix="mfm-ray-benchmark-") as scratch:
        rows = [measure(given.model, reward, given, Path(scratch)) for reward in REWARDS]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(table(rows))
    print(RESULTS.read_text())


def measure(model: str, reward: str, given: argparse.Namespace, scratch: Path) -> tuple[str, float, float]:
    """(reward, seconds a step with the local, with the remote one), medians."""
    seconds: dict[str, list[float]] = {"local": [], "remote": []}
    with served(model, reward):
        for number in range(given.repeats):
            for place, words in (("local", []), ("remote", [f"reward_app={APP}", f"reward_model={APP}"])):
                folder = scratch / f"{reward}-{place}-{number}"
                seconds[place].append(step_seconds(model, reward, given.steps, folder, words))
                print(f"{reward}, {place}: {1000 * seconds[place][-1]:.1f} ms a step", flush=True)
    return reward, statistics.median(seconds["local"]), statistics.median(seconds["remote"])


@contextmanager
def served(model: str, reward: str) -> Iterator[None]:
    """The reward's deployment alone, for the model under the application's name."""
    cards = list(read_models({APP: model}).values())
    settings = RewardSettings.model_validate({"name": reward, "ray_actor_options": {"num_cpus": 0.1}})
    serve.start(proxy_location="Disabled")
    serve.run(reward_deployment(cards, settings), name=APP, route_prefix=None)
    yield
    serve.shutdown()


def step_seconds(model: str, reward: str, steps: int, folder: Path, words: list[str]) -> float:
    config = load_config(
        "finetune",
        [
            f"model={model}",
            f"reward={reward}",
            f"max_steps={WARM_UP + steps}",
            f"global_batch_size={BATCH}",
            f"log_every={WARM_UP}",
            f"checkpoint_every={WARM_UP + steps}",
            "scaling.num_workers=1",
            "sample_every=0",
            "anchors.start_steps=0",
            "overwrite=true",
            *words,
        ],
    )
    body(JobRun(config=config, storage=Storage(folder), log=lambda line: None))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (lines[-1]["seconds"] - lines[0]["seconds"]) / (lines[-1]["step"] - lines[0]["step"])


def table(rows: list[tuple[str, float, float]]) -> str:
    lines = [
        "| reward | step, reward in the worker, ms | in its own deployment, ms | ratio |",
        "|---|---|---|---|",
        *(f"| {name} | {1000 * a:.1f} | {1000 * b:.1f} | {b / a:.2f} |" for name, a, b in rows),
    ]
    command = "`python -m benchmarks.finetuning --model outputs/demo/model`"
    return "\n".join(["# Fine-tuning with a remote reward", "", command, "", *lines, ""])


if __name__ == "__main__":
    main()
