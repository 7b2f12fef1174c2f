"""`ray job submit` as the README shows it: a head with Ray's default token authentication, a training sent to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).parent / "ray")
TINY = ["experiment=digits", "network.width=32", "network.num_blocks=1", "max_steps=20", "sample_every=0"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def client_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head of its own, on ports of its own, for a user of its own, and what a client's shell has set for it."""
    home = tmp_path_factory.mktemp("home")
    # sockets below temp-dir must have short paths, which pytest's own folders do not promise
    scratch = Path("/tmp") / f"mfm-ray-submit-{os.getpid()}"
    port, dashboard = free_port(), free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    env |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    # docs/serving.md, for a cluster of one's own: what Serve's proxies refuse has OpenAI's shape
    env |= {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.edge:middlewares", "PYTHONPATH": str(ROOT)}
    subprocess.run([RAY, "get-auth-token", "--generate"], env=env, check=True, capture_output=True, timeout=120)
    # a port of its own for the agent as well: without one, a head beside another cluster cannot take jobs
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
    options = [*ports, f"--temp-dir={scratch}", "--num-cpus=8"]
    with (home / "head.log").open("w") as log:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--disable-usage-stats", "--object-store-memory=300000000", *options],
            env=env,
            cwd=home,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_until_listening(dashboard, head, home / "head.log")
        yield env
    finally:
        head.send_signal(signal.SIGTERM)  # the head ends what it started; no `ray stop`, which would end other clusters
        try:
            head.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        subprocess.run(["rm", "-rf", str(scratch)], check=True)


def _wait_until_listening(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert head.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"the head's dashboard did not come up:\n{log.read_text()}")


def submit(env: dict[str, str], *words: str, job: str = "train") -> subprocess.CompletedProcess[str]:
    recipe = TINY if job == "train" else []
    command = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "-m", f"jobs.{job}", *recipe, *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)


def test_a_submitted_training_leaves_its_model_in_the_storage_it_was_given(
    client_environment: dict[str, str], tmp_path: Path
) -> None:
    done = submit(client_environment, f"storage={tmp_path}", "name=submitted")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"RESULT {tmp_path}/submitted/result.json" in done.stdout
    result = json.loads((tmp_path / "submitted" / "result.json").read_text())
    assert result["status"] == "ok"
    assert (Path(result["artifacts"]["model"]) / "model.safetensors").is_file()


def test_a_submitted_deployment_stays_up_after_its_job(
    client_environment: dict[str, str], tmp_path: Path, tiny_models: dict[str, str]
) -> None:
    port = free_port()
    words = [f"model={tiny_models['tiny']}", "rewards=[symmetry]", f"storage={tmp_path}", f"port={port}"]
    done = submit(client_environment, *words, job="deploy")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads((tmp_path / "deploy" / "result.json").read_text())
    assert result["status"] == "ok"
    endpoint = result["artifacts"]["endpoint"]
    assert endpoint == f"http://127.0.0.1:{port}"
    body = json.dumps({"seed": 1, "steering": {"rewards": [{"name": "symmetry"}], "num_steps": 4}}).encode()
    headers = {"content-type": "application/json"}
    asked = urllib.request.Request(f"{endpoint}/v1/images/generations", data=body, headers=headers)
    with urllib.request.urlopen(asked, timeout=60) as answer:
        assert json.load(answer)["data"][0]["rewards"]["symmetry"] <= 0
    asked.add_header("x-request-timeout-seconds", "0.0001")
    with pytest.raises(urllib.error.HTTPError) as late:
        urllib.request.urlopen(asked, timeout=60)
    with late.value as refusal:
        assert (refusal.code, json.load(refusal)["error"]["code"]) == (504, "deadline_exceeded")


@pytest.mark.slow
def test_a_submitted_sweep_leaves_its_table_and_presets(
    client_environment: dict[str, str], tmp_path: Path, tiny_models: dict[str, str]
) -> None:
    words = [f"model={tiny_models['tiny']}", f"storage={tmp_path}", "num_samples=8", "num_steps=2"]
    done = submit(client_environment, "sweep=num_draws", *words, "scaling.num_workers=2", job="tune")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"RESULT {tmp_path}/sweep_num_draws/result.json" in done.stdout
    result = json.loads((tmp_path / "sweep_num_draws" / "result.json").read_text())
    assert result["status"] == "ok"
    assert result["metrics"]["trials.ok"] == 5
    assert result["metrics"]["model_loads"] <= 2
    assert all(Path(place).is_file() for place in result["artifacts"].values())


def test_a_submitted_job_refuses_a_relative_storage_because_its_folder_is_temporary(
    client_environment: dict[str, str],
) -> None:
    done = submit(client_environment, "storage=runs")
    assert done.returncode != 0
    assert "storage=runs" in done.stdout + done.stderr
    assert "exit code 2" in done.stdout + done.stderr


def test_a_client_without_the_token_is_turned_away(client_environment: dict[str, str], tmp_path: Path) -> None:
    stranger = {**client_environment, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    done = submit(stranger, f"storage={tmp_path}")
    assert done.returncode != 0
    assert not (tmp_path / "digits").exists()


@pytest.mark.slow
def test_a_submitted_finetuning_leaves_a_tuned_model(
    client_environment: dict[str, str], tiny_models: dict[str, str], tmp_path: Path
) -> None:
    words = ["reward=symmetry", "global_batch_size=16", "max_steps=4", "evaluate_every=4", "evaluate_samples=8"]
    done = submit(
        client_environment,
        f"model={tiny_models['tiny']}",
        f"storage={tmp_path}",
        "evaluate_steps=2",
        "sample_every=0",
        *words,
        job="finetune",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "finetune" / "result.json").read_text())
    assert result["status"] == "ok"
    config = json.loads((Path(result["artifacts"]["model"]) / "config.json").read_text())
    assert config["network"]["name"] == "tuned"
    assert result["metrics"]["evaluation.step"] == 4
