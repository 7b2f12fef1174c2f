"""Two Ray nodes with addresses of their own, a training over both, and a cable between them that is pulled.

    python -m benchmarks.drills.two_nodes [--short 8] [--long 45]

Two network namespaces stand for two machines, a veth pair for the cable. In each runs `ray start`, kept up as a
service manager would keep it; the training is sent to the first by `ray job submit` and has one worker in each, which
talk over the cable by gloo. The cable is cut twice: shortly, and for longer than the watchdog waits. Writes its
table into docs/resilience.md. Needs root; leaves nothing behind, whatever happens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.drills.faults import same_weights
from scripts.page_section import replace_section

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "resilience.md"
RAY = str(Path(sys.executable).parent / "ray")
CABLE = "mfm0"
STEPS, CHECKPOINT_EVERY = 900, 100
SHORT_CUT_AT, LONG_CUT_AT = 150, 450
HANG_TIMEOUT_S = 20
PATIENCE_S = 900.0
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
    "scaling.max_failures=5",
    "scaling.start_timeout_s=300",
    "+scaling.resources_per_worker.machine=1",
    f"faults.hang_timeout_s={HANG_TIMEOUT_S}",
]


def refusal() -> str | None:
    """Why the drill cannot run here, in one line."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if shutil.which("ip") is None:
        return "needs the program ip (Debian: apt-get install iproute2)"
    probe = subprocess.run(["ip", "netns", "add", f"mfm-probe-{os.getpid()}"], capture_output=True, text=True)
    if probe.returncode:
        return f"network namespaces cannot be made here: {probe.stderr.strip()}"
    ip("netns", "del", f"mfm-probe-{os.getpid()}")
    return None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Machine:
    """A namespace with one end of the cable, and the Ray node in it, which is started again when it ends."""

    name: str
    address: str
    command: list[str]
    env: dict[str, str]
    log: Path
    starts: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _over: threading.Event = field(default_factory=threading.Event)
    _keeper: threading.Thread | None = None

    def inside(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command]

    def start(self) -> None:
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def _keep(self) -> None:
        while not self._over.is_set():
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    self.inside(*self.command), env=self.env, stdout=log, stderr=log, start_new_session=True
                )
            self.starts += 1
            self._process.wait()
            self._over.wait(2.0)

    def end(self) -> None:
        """Every process in the namespace: all of them are this drill's."""
        self._over.set()
        for _ in range(50):
            listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
            if not listed.stdout.split():
                break
            for process in listed.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            time.sleep(0.1)
        if self._keeper is not None:
            self._keeper.join(timeout=10.0)


@dataclass
class Site:
    """The two machines and the cable."""

    machines: list[Machine]
    folder: Path

    def cut(self) -> None:
        ip("-n", self.machines[0].name, "link", "set", CABLE, "down")

    def mend(self) -> None:
        ip("-n", self.machines[0].name, "link", "set", CABLE, "up")

    def submit(self, name: str) -> subprocess.Popen[bytes]:
        """`ray job submit` of the training, from the first machine."""
        head = self.machines[0]
        words = [f"storage={self.folder}", f"name={name}", *RECIPE]
        address = ["--address", f"http://{head.address}:8265"]
        command = [
            RAY,
            "job",
            "submit",
            *address,
            "--working-dir",
            str(ROOT),
            "--",
            "python",
            "-m",
            "jobs.train",
            *words,
        ]
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(head.inside(*command), env=head.env, stdout=log, stderr=log)

    def events(self, name: str) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError):
            return [json.loads(line) for line in (self.folder / name / "attempts.jsonl").read_text().splitlines()]
        return []

    def step(self, name: str) -> int:
        with contextlib.suppress(OSError):
            text = (self.folder / name / "metrics.jsonl").read_text()
            lines = text[: text.rfind("\n") + 1].splitlines()  # the last one may be half there
            return int(json.loads(lines[-1])["step"]) if lines else -1
        return -1

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def reach(self, name: str, step: int, job: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.step(name) < step:
            if job.poll() is not None:
                raise RuntimeError(f"{name} ended ({job.returncode}) before step {step}:\n{self.log(name)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name}: no step {step} in {PATIENCE_S:g} s:\n{self.log(name)}")
            time.sleep(0.05)

    def finish(self, name: str, job: subprocess.Popen[bytes]) -> None:
        if job.wait(PATIENCE_S):
            raise RuntimeError(f"{name} failed:\n{self.log(name)}")


@contextlib.contextmanager
def site(folder: Path) -> Iterator[Site]:
    """Both machines with their nodes; gone again at the end of the block, however it ends."""
    names = [f"mfm-{side}-{os.getpid()}" for side in ("a", "b")]
    addresses = ["10.213.7.1", "10.213.7.2"]
    machines: list[Machine] = []
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", name, "link", "set", CABLE, "up")
        machines += [
            machine(name, address, addresses[0], folder) for name, address in zip(names, addresses, strict=True)
        ]
        for one in machines:
            one.start()
        wait_for_nodes(machines)
        yield Site(machines, folder)
    finally:
        for one in machines:
            one.end()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)  # the cable goes with them
            shutil.rmtree(f"/tmp/{name}", ignore_errors=True)


def machine(name: str, address: str, head: str, folder: Path) -> Machine:
    scripts = str(Path(sys.executable).parent)
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {
        "PATH": os.pathsep.join([scripts, env.get("PATH", "")]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "GLOO_SOCKET_IFNAME": CABLE,  # the machine's name resolves to an address that is not in here
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    options = [f"--node-ip-address={address}", "--num-cpus=4", '--resources={"machine": 1}', "--block"]
    options += ["--object-store-memory=100000000", "--disable-usage-stats"]
    if address == head:
        # sockets below it must have short paths
        options += ["--head", "--port=6379", "--dashboard-host=0.0.0.0", f"--temp-dir=/tmp/{name}"]
    else:
        options += [f"--address={head}:6379"]
    return Machine(name, address, [RAY, "start", *options], env, folder / f"{name}.log")


def wait_for_nodes(machines: list[Machine]) -> None:
    """Until the jobs' address answers and both nodes are known."""
    head = machines[0]
    join = f"ray.init(address='{head.address}:6379', log_to_driver=False, logging_level='ERROR')"
    count = f"import ray; {join}; print(len(ray.nodes()))"
    deadline = time.monotonic() + 180
    while True:
        asked = subprocess.run(
            head.inside(sys.executable, "-c", count), env=head.env, capture_output=True, text=True, timeout=120
        )
        if asked.returncode == 0 and asked.stdout.strip().endswith("2"):
            return
        if time.monotonic() > deadline:
            logs = "\n".join(one.log.read_text() for one in machines)
            raise RuntimeError(f"the nodes did not find each other:\n{asked.stderr}\n{logs}")
        time.sleep(1.0)


@dataclass(frozen=True)
class Cut:
    """A cut of the cable: seconds it lasted, steps made twice, seconds from its end to the next new step, events."""

    seconds: float
    lost_steps: int
    after_s: float
    what: str


def cut(place: Site, name: str, job: subprocess.Popen[bytes], *, at: int, seconds: float) -> Cut:
    place.reach(name, at, job)
    before = len(place.events(name))
    place.cut()
    time.sleep(seconds)
    step = place.step(name)  # nobody gets further while the cable is cut
    place.mend()
    mended = time.time()
    place.reach(name, step + 5, job)
    after = time.time() - mended
    place.reach(name, (step // CHECKPOINT_EVERY + 1) * CHECKPOINT_EVERY + 5, job)
    new = place.events(name)[before:]
    restarts = [event for event in new if event["event"] == "step"]
    lost = step - restarts[-1]["start"] if restarts else 0
    after = restarts[-1]["first_step_at"] - mended if restarts else after
    said = [f"rank {event['rank']} {event['event']}" for event in new if event["event"] in ("hang", "failure")]
    return Cut(seconds, lost, after, "; ".join([*dict.fromkeys(said), f"{len(restarts)} restarts"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=float, default=8.0, help="seconds of the first cut")
    parser.add_argument("--long", type=float, default=45.0, help="seconds of the second cut")
    parser.add_argument("--no-page", action="store_true", help="prints only")
    given = parser.parse_args()
    if (reason := refusal()) is not None:
        print(f"two_nodes: {reason}", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is removed
    with tempfile.TemporaryDirectory(prefix="mfm-ray-two-nodes-") as scratch, site(Path(scratch)) as place:
        try:
            job = place.submit("undisturbed")
            place.finish("undisturbed", job)
            job = place.submit("cut")
            cuts = [
                cut(place, "cut", job, at=SHORT_CUT_AT, seconds=given.short),
                cut(place, "cut", job, at=LONG_CUT_AT, seconds=given.long),
            ]
            place.finish("cut", job)
        finally:
            for name in ("undisturbed", "cut"):
                if (place.folder / f"{name}.log").exists():
                    print(f"--- {name}\n{place.log(name)}", flush=True)
        same = same_weights(place.folder / "undisturbed", place.folder / "cut")
        nodes = {
            worker["node"] for event in place.events("cut") if event["event"] == "start" for worker in event["workers"]
        }
        text = table(cuts, same=same, nodes=sorted(nodes), starts=[one.starts for one in place.machines])
    print(text)
    if not given.no_page:
        replace_section(PAGE, "benchmarks.drills.two_nodes", text)
    sys.exit(0 if same and all(one.lost_steps <= CHECKPOINT_EVERY for one in cuts) else 1)


def table(cuts: list[Cut], *, same: bool, nodes: list[str], starts: list[int]) -> str:
    ended = "equal to the bit to those of the undisturbed run on the same nodes" if same else "DIFFER"
    lines = [
        f"Two nodes, {' and '.join(nodes)}, one worker on each, gloo; {STEPS} steps, a checkpoint every "
        f"{CHECKPOINT_EVERY}, hang_timeout_s={HANG_TIMEOUT_S}. Final weights {ended}; `ray start` ran "
        f"{' and '.join(str(count) for count in starts)} times.",
        "",
        "| cable cut for, s | what happened | lost steps | from its mending to the next new step, s |",
        "|---|---|---|---|",
    ]
    for one in cuts:
        lines.append(f"| {one.seconds:g} | {one.what} | {one.lost_steps} | {one.after_s:.0f} |")
    return "\n".join([*lines, "", "Made by `python -m benchmarks.drills.two_nodes`."])


if __name__ == "__main__":
    main()
