"""Faults done to real trainings: each starts `jobs.train`, breaks something, and tells what the run made of it.

Shared by `python -m benchmarks.drills.training`, which prints a table, and tests/jobs/test_faults.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS, CHECKPOINT_EVERY = 400, 100
FAULT_STEP = 150
"""The fault comes in the first step after this one that is seen: between two checkpoints."""
RECIPE = [
    "experiment=digits",
    "network.width=96",
    "network.num_blocks=2",
    "global_batch_size=256",
    "precision=fp32",
    "zero.stage=2",
    f"max_steps={STEPS}",
    f"checkpoint_every={CHECKPOINT_EVERY}",
    "log_every=5",
    "sample_every=0",
    "classifier_steps=0",
    "scaling.max_failures=3",
]
HANG_TIMEOUT_S = 10
PATIENCE_S = 600.0
"""For anything that a drill waits for: a loaded machine is slow, and one that waits for ever says nothing."""


@dataclass(frozen=True)
class Outcome:
    """What a run made of a fault.

    lost_steps: steps that were made twice; seconds: from the fault to the end of the next step that was not made
    before; same: whether the final weights are those of the undisturbed run, to the bit; said: what the driver
    logged about it; attempts: how often workers were started.
    """

    fault: str
    lost_steps: int
    seconds: float
    same: bool
    attempts: int
    said: list[str]


@dataclass
class Run:
    """A training in a process of its own."""

    folder: Path
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def attempts(self) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError):
            return [json.loads(line) for line in (self.folder / "attempts.jsonl").read_text().splitlines()]
        return []

    @property
    def step(self) -> int:
        """The last step in the history, -1 without one."""
        with contextlib.suppress(OSError):
            text = (self.folder / "metrics.jsonl").read_text()
            lines = text[: text.rfind("\n") + 1].splitlines()  # the last one may be half there
            return int(json.loads(lines[-1])["step"]) if lines else -1
        return -1

    @property
    def starts(self) -> list[dict[str, Any]]:
        return [event for event in self.attempts if event["event"] == "start"]

    def said(self, *words: str) -> list[str]:
        """Lines of the driver's log that hold all the words."""
        return [line for line in self.log.read_text().splitlines() if all(word in line for word in words)]

    def wait(self, condition: Callable[[], Any], what: str, *, pause_s: float = 0.02) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(
                    f"the run ended ({self.process.returncode}) before {what}:\n{self.log.read_text()}"
                )
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} in {PATIENCE_S:g} s:\n{self.log.read_text()}")
            time.sleep(pause_s)

    def reach(self, step: int) -> None:
        self.wait(lambda: self.step >= step, f"step {step}")

    def worker(self, rank: int) -> int:
        """Process id of a worker of the newest attempt."""
        self.wait(lambda: self.starts, "record of the workers")
        return next(worker["process"] for worker in self.starts[-1]["workers"] if worker["rank"] == rank)

    def finish(self) -> None:
        try:
            code = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end in {PATIENCE_S:g} s:\n{self.log.read_text()}") from None
        assert code == 0, self.log.read_text()

    def end(self) -> None:
        """Whatever is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Drill:
    """A folder for the runs, and the undisturbed one that all others are compared with.

    env: of the trainings, added to this process's; words: of their command line.
    """

    storage: Path
    env: Mapping[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()

    @contextlib.contextmanager
    def run(self, name: str, *words: str, storage: Path | None = None, append: bool = False) -> Iterator[Run]:
        where = storage or self.storage
        log = self.storage / f"{name}.log"
        if not append:
            shutil.rmtree(where / name, ignore_errors=True)  # of a drill that was cut short
        scratch = self.storage / "tmp"
        scratch.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch), "RAY_ADDRESS": "local", **self.env}
        command = [sys.executable, "-m", "jobs.train", f"storage={where}", f"name={name}", *RECIPE, *self.words, *words]
        with log.open("ab" if append else "wb") as file:
            process = subprocess.Popen(
                command, cwd=self.storage, env=env, stdout=file, stderr=file, start_new_session=True
            )
        run = Run(where / name, process, log)
        try:
            yield run
        finally:
            run.end()

    def undisturbed(self, steps: int = STEPS) -> Path:
        """The run of so many steps without a fault, made once."""
        folder = self.storage / f"undisturbed-{steps}"
        if not (folder / "model").exists():
            with replace(self, env={}, words=()).run(folder.name, f"max_steps={steps}") as run:
                run.finish()
        return folder

    def outcome(
        self, fault: str, run: Run, *, at: float, step: int, seconds: float | None = None, steps: int = STEPS
    ) -> Outcome:
        """What became of a fault at a time (UNIX) and a step, once the run of `steps` steps has ended well."""
        restarts = [event for event in run.attempts if event["event"] == "step" and event["first_step_at"] > at]
        reached = [event["step"] for event in run.attempts if event["event"] in ("failure", "hang") and "step" in event]
        started = restarts[0]["start"] if restarts else None
        return Outcome(
            fault=fault,
            lost_steps=0 if started is None else max(0, max([step, *reached]) - started),
            seconds=restarts[0]["first_step_at"] - at if seconds is None else seconds,
            same=same_weights(self.undisturbed(steps), run.folder),
            attempts=len(run.starts),
            said=run.said("training worker"),
        )


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same model, to the bit."""
    weights = [safetensors.torch.load_file(run / "model" / "model.safetensors") for run in (one, other)]
    return weights[0].keys() == weights[1].keys() and all(
        torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items()
    )


def rank_killed(drill: Drill) -> Outcome:
    """SIGKILL to a worker in the middle of its steps."""
    with drill.run("rank-killed") as run:
        run.reach(FAULT_STEP)
        return _signalled(drill, run, "a rank, kill -9 mid-step", signal.SIGKILL)


def rank_hangs(drill: Drill) -> Outcome:
    """SIGSTOP to a worker: alive for everybody, and all others wait for it."""
    with drill.run("rank-hangs", f"faults.hang_timeout_s={HANG_TIMEOUT_S}") as run:
        run.reach(FAULT_STEP)
        return _signalled(drill, run, f"a rank hangs (SIGSTOP, hang_timeout_s={HANG_TIMEOUT_S})", signal.SIGSTOP)


def rank_told_to_end(drill: Drill) -> Outcome:
    """SIGTERM to a worker: a checkpoint of that very step, then it leaves."""
    with drill.run("rank-told-to-end") as run:
        run.reach(FAULT_STEP)
        return _signalled(drill, run, "notice: SIGTERM to a rank", signal.SIGTERM)


def _signalled(drill: Drill, run: Run, fault: str, number: signal.Signals) -> Outcome:
    at, step = time.time(), run.step
    os.kill(run.worker(1), number)
    run.finish()
    return drill.outcome(fault, run, at=at, step=step)


def rank_killed_while_writing(drill: Drill) -> Outcome:
    """SIGKILL to a worker while its files of the second checkpoint are being written."""
    with drill.run("rank-killed-writing") as run:
        run.reach(FAULT_STEP)
        worker, folders = run.worker(1), run.folder / "checkpoints"
        run.wait(lambda: _is_begun(folders), "writing", pause_s=0.0002)  # it takes a few milliseconds
        at, step = time.time(), run.step
        os.kill(worker, signal.SIGKILL)
        run.finish()
        return drill.outcome("a rank, kill -9 while it writes a checkpoint", run, at=at, step=step)


def _is_begun(folders: Path) -> bool:
    """Whether the newest checkpoint holds anything, but not yet the manifest of the second worker."""
    with contextlib.suppress(OSError):  # one that is being removed
        names = {path.name for path in max(folders.glob("*-step-*")).iterdir()}
        return bool(names) and "manifest-rank-1.json" not in names
    return False


def driver_killed(drill: Drill) -> Outcome:
    """SIGKILL to the driver, whose local Ray goes with it; then the same words with resume=true."""
    with drill.run("driver-killed") as run:
        run.reach(FAULT_STEP)
        workers = [run.worker(rank) for rank in (0, 1)]
        at, step = time.time(), run.step
        run.process.kill()
        run.process.wait()
        deadline = time.monotonic() + PATIENCE_S
        while any(_alive(worker) for worker in workers):
            assert time.monotonic() < deadline, "the workers outlived their driver"
            time.sleep(0.1)
        step = max(step, run.step)
    with drill.run("driver-killed", "resume=true", append=True) as run:
        run.finish()
        return drill.outcome("the driver, kill -9, then resume=true", run, at=at, step=step)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def storage_away(drill: Drill, *, seconds: float = 8.0) -> Outcome:
    """The run's folder is gone over the next checkpoint, with a file in its place, and comes back."""
    with drill.run("storage-away", "faults.storage_timeout_s=300") as run:
        run.reach(FAULT_STEP)
        at, step = time.time(), run.step
        hidden = run.folder.with_name("hidden")
        run.folder.rename(hidden)
        run.folder.write_text("not a folder")
        try:
            run.wait(lambda: run.said("trying again"), "refusal")
            time.sleep(seconds)
        finally:
            run.folder.unlink()
            hidden.rename(run.folder)
        return _waited_for(drill, run, f"storage away over a checkpoint for {seconds:g} s", at, step)


def disk_full(drill: Drill) -> Outcome:
    """The run's file system has no room for the next checkpoint, until somebody makes room."""
    disk = drill.storage / "disk"
    with small_disk(disk, megabytes=64), drill.run("disk-full", "faults.storage_timeout_s=300", storage=disk) as run:
        run.reach(FAULT_STEP)
        at, step = time.time(), run.step
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        run.wait(lambda: run.said("trying again"), "refusal")
        time.sleep(3.0)
        ballast.unlink()
        return _waited_for(drill, run, "disk full at a checkpoint, then room again", at, step)


def _waited_for(drill: Drill, run: Run, fault: str, at: float, step: int) -> Outcome:
    """The outcome of a fault that workers sit out."""
    next_checkpoint = (step // CHECKPOINT_EVERY + 1) * CHECKPOINT_EVERY
    run.wait(lambda: run.step > next_checkpoint, "step after the checkpoint")
    seconds = time.time() - at
    run.finish()
    restarted = [event for event in run.attempts if event["event"] == "step" and event["first_step_at"] > at]
    return drill.outcome(fault, run, at=at, step=step, seconds=None if restarted else seconds)


def may_mount() -> bool:
    """Whether this process may mount file systems, as `small_disk` does."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@contextlib.contextmanager
def small_disk(place: Path, *, megabytes: int) -> Iterator[None]:
    """A file system of its own at `place`."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "mfm-ray-drill", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


_FAST_NOTICE = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
"""Ray looks for drained nodes every five seconds, in which these small runs make hundreds of steps."""


@contextlib.contextmanager
def cluster_of_nodes(drill: Drill) -> Iterator[tuple[Drill, Any, list[Any]]]:
    """A head and three nodes with room for one worker each, on this machine; the drill for runs on it."""
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, **memory})
    try:
        nodes = [
            cluster.add_node(num_cpus=2, resources={"trainer": 1}, object_store_memory=80 * 2**20) for _ in range(3)
        ]
        env = {**drill.env, "RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled", **_FAST_NOTICE}
        words = (*drill.words, "+scaling.resources_per_worker.trainer=1")
        yield Drill(drill.storage, env, words), cluster, nodes
    finally:
        cluster.shutdown()


def node_killed(drill: Drill) -> Outcome:
    """All processes of a node at once, without a word; a third node takes its place."""
    with cluster_of_nodes(drill) as (there, cluster, nodes), there.run("node-killed") as run:
        run.reach(FAULT_STEP)
        node = _node_of(nodes, run.worker(1))
        at, step = time.time(), run.step
        cluster.remove_node(node, allow_graceful=False)
        run.finish()
        return there.outcome("a node, all its processes killed", run, at=at, step=step)


def node_drained(drill: Drill, *, seconds: int = 12, steps: int = 2000) -> Outcome:
    """Ray's notice that a node will be taken away in `seconds`, as a cloud gives it for a spot instance."""
    with cluster_of_nodes(drill) as (there, cluster, nodes), there.run("node-drained", f"max_steps={steps}") as run:
        run.reach(FAULT_STEP)
        node = _node_of(nodes, run.worker(1))
        at, step = time.time(), run.step
        ray = str(Path(sys.executable).parent / "ray")
        command = [ray, "drain-node", "--address", cluster.address, "--node-id", node.node_id]
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "drill"]
        env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        subprocess.run([*command, *why, "--deadline-remaining-seconds", str(seconds)], check=True, env=env)
        run.finish()
        return there.outcome(f"notice: a node is drained, {seconds} s left", run, at=at, step=step, steps=steps)


def _node_of(nodes: list[Any], worker: int) -> Any:
    """The node whose raylet is the worker's parent."""
    import psutil

    above = {parent.pid for parent in psutil.Process(worker).parents()}
    for node in nodes:
        if any(info.process.pid in above for infos in node.all_processes.values() for info in infos):
            return node
    raise AssertionError(f"process {worker} belongs to no node")


FAULTS: dict[str, Callable[[Drill], Outcome]] = {
    "rank_killed": rank_killed,
    "rank_killed_while_writing": rank_killed_while_writing,
    "driver_killed": driver_killed,
    "node_killed": node_killed,
    "node_drained": node_drained,
    "rank_told_to_end": rank_told_to_end,
    "rank_hangs": rank_hangs,
    "disk_full": disk_full,
    "storage_away": storage_away,
}
