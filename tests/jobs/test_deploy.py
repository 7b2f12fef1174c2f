"""jobs.deploy where there is no cluster: it holds its own, says where it serves, and serves until it is stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_result_is_said_while_the_job_serves(tmp_path: Path, tiny_models: dict[str, str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [f"model={tiny_models['tiny']}", "rewards=[symmetry]", f"port={port}", f"config={ROOT}/serve/config.yaml"]
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.deploy", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert job.stdout is not None
        said = ""
        while not said.startswith("RESULT "):
            said = job.stdout.readline()
            assert said, f"the job ended with {job.wait()}"
        result = json.loads(Path(said.removeprefix("RESULT ").strip()).read_text())
        assert (result["status"], result["artifacts"]) == ("ok", {"endpoint": f"http://127.0.0.1:{port}"})
        with urllib.request.urlopen(f"{result['artifacts']['endpoint']}/v1/rewards", timeout=60) as answer:
            assert [reward["id"] for reward in json.load(answer)["data"]] == ["symmetry"]
        job.send_signal(signal.SIGINT)
        rest, _ = job.communicate(timeout=60)
        assert rest.splitlines()[-1] == said.strip()
        assert job.returncode == 0
    finally:
        if job.poll() is None:
            job.terminate()
            job.communicate(timeout=60)
