"""A drill in a process of its own: `python -m tests.training.elastic_drill FOLDER`.

A cluster of a head and two nodes with room for one worker each trains with scaling.num_workers=[1,2]; one of the nodes
dies, later another one comes. FOLDER/told.json then says when, and which checkpoint had how many workers.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from mfm_ray.config import load_config, to_dict
from mfm_ray.storage import Storage
from mfm_ray.training.checkpoint import CheckpointError, read_state
from mfm_ray.training.checkpoint_store import CHECKPOINTS, folders
from mfm_ray.training.launch import run_training

EVERY = 20
WORDS = [
    "experiment=digits",
    "network.width=256",
    "network.num_blocks=2",
    "global_batch_size=129",  # two workers have 64 and 65 rows
    "micro_batch_size=40",
    "zero.stage=2",
    "learning_rate_schedule=constant",
    "max_steps=100000",
    f"checkpoint_every={EVERY}",
    f"log_every={EVERY}",
    "checkpoints_to_keep=10000",
    "sample_every=0",
    "classifier_steps=0",
    "scaling.use_gpu=false",
    "scaling.max_failures=4",
    "scaling.resize_interval_s=3",
    "+scaling.resources_per_worker.slot=1",
]


def sizes(run: Storage) -> list[tuple[int, int]]:
    """(step, workers) of the checkpoints that are complete, the newest last."""
    found = []
    for name in folders(run):
        try:
            state = read_state(run.child(CHECKPOINTS, name))
        except CheckpointError:
            continue
        found.append((state.step, state.world_size))
    return found


def wait_for(what: str, condition: Callable[[], bool], trainer: threading.Thread, *, seconds: float) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not condition():
        assert trainer.is_alive(), f"training ended while waiting for {what}"
        assert time.monotonic() < began + seconds, f"no {what} within {seconds} s"
        time.sleep(0.2)
    return time.monotonic() - began


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
    node = {"num_cpus": 1, "resources": {"slot": 1}, "object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 150 * 2**20},
    )
    nodes = [cluster.add_node(**node) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    run, told = Storage(folder / "run"), dict[str, Any]()
    config = to_dict(load_config("train", [*WORDS, "scaling.num_workers=[1,2]"]))
    trainer = threading.Thread(target=run_training, args=(config, run, False, print), daemon=True)
    trainer.start()
    wait_for("checkpoint of two workers", lambda: len(sizes(run)) >= 2, trainer, seconds=150)
    last = sizes(run)[-1][0]
    told["step_before_loss"] = last
    cluster.remove_node(nodes[1])
    told["seconds_to_shrink"] = wait_for(
        "checkpoint of one worker", lambda: sizes(run)[-1][1] == 1, trainer, seconds=150
    )
    told["step_after_loss"] = sizes(run)[-1][0]
    cluster.add_node(**node)
    told["seconds_to_grow"] = wait_for(
        "checkpoint of two workers again", lambda: sizes(run)[-1][1] == 2, trainer, seconds=200
    )
    wait_for("steps after it", lambda: [size for _, size in sizes(run)][-2:] == [2, 2], trainer, seconds=100)
    told["sizes"] = sizes(run)
    (folder / "told.json").write_text(json.dumps(told))
    os._exit(0)  # the run has no end of its own; the cluster's processes watch this one


if __name__ == "__main__":
    main()
