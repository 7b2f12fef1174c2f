"""The job contract from outside: exit codes, the one line on stderr, result.json, the RESULT line, and stopping."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.contract import _Job
from jobs.run_folder import SUBMITTED_JOB, RunFolder
from mfm_ray.config import ExportConfig, load_config
from mfm_ray.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SUBMITTED = json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}})

# A job in one file: it plays the root of jobs.export, and its name says what becomes of it.
BODY = textwrap.dedent(
    """
    import time
    from jobs.contract import JobRun, Outcome, run_job
    from mfm_ray.errors import InputError

    def check(config):
        if config.checkpoint == "bad":
            raise ValueError("checkpoint=bad: expected a good one")

    def body(run: JobRun) -> Outcome:
        run.log("working")
        if run.config.name == "broken":
            raise RuntimeError("it broke")
        if run.config.name == "refused":
            raise InputError("output=x: refused")
        while run.config.name == "stubborn":
            try:
                time.sleep(60)
            except BaseException:
                pass
        if run.config.name == "slow":
            time.sleep(60)
        if run.config.name.startswith("server"):
            run.publish(Outcome(metrics={"loss": 0.5}, artifacts={"endpoint": "http://127.0.0.1:1"}))
            if run.config.name == "server-broken":
                raise RuntimeError("it broke later")
            time.sleep(60)
        return Outcome(metrics={"loss": 0.5, "nothing": float("nan")}, artifacts={"model": "some/model"})

    run_job("export", body, check=check)
    """
)


class Finished:
    """Exit code and output of a job, and its result.json where there is one."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.stdout, self.stderr = process.communicate(timeout=60)
        self.code = process.returncode
        path = folder / "result.json"
        self.result: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        self.announced = self.stdout.splitlines()[-1:] == [f"RESULT {path}"]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the job of BODY in an empty folder."""

    def start(*words: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", BODY, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_success_writes_the_whole_result_and_announces_it_last(tmp_path: Path, start: Any) -> None:
    job = Finished(start("name=good", "seed=3"), tmp_path / "runs/good")
    assert job.code == 0, job.stderr
    assert job.announced
    assert job.result is not None
    head = ["job", "status", "error", "name", "seed", "started", "seconds"]
    assert list(job.result) == [*head, "config", "versions", "git", "metrics", "artifacts"]
    assert (job.result["status"], job.result["error"], job.result["seed"]) == ("ok", None, 3)
    assert job.result["metrics"] == {"loss": 0.5}, "a metric that is no number is left out"
    assert job.result["artifacts"] == {"model": str(tmp_path / "some/model")}
    assert job.result["config"]["storage"] == "runs"
    assert set(job.result["versions"]) == {"python", "torch", "ray", "deepspeed", "mfm_ray"}
    assert job.result["started"].endswith("Z")
    assert not (tmp_path / "outputs").exists(), "no folders of Hydra's own"

    before = (tmp_path / "runs/good/result.json").read_bytes()
    again = Finished(start("name=good"), tmp_path / "runs/good")
    assert again.code == 2
    assert again.stderr.count("\n") == 1
    assert "name=good" in again.stderr
    assert "overwrite=true" in again.stderr
    assert not again.announced
    assert (tmp_path / "runs/good/result.json").read_bytes() == before


def test_failure_is_one_line_and_a_log_with_the_traceback(tmp_path: Path, start: Any) -> None:
    job = Finished(start("name=broken"), tmp_path / "runs/broken")
    assert job.code == 1
    assert job.stderr == "jobs.export: RuntimeError: it broke\n"
    assert job.announced
    assert job.result is not None
    assert job.result["status"] == "failed"
    assert "RuntimeError: it broke" in (tmp_path / "runs/broken/error.log").read_text()


def test_mistake_is_exit_2_and_frees_the_name(tmp_path: Path, start: Any) -> None:
    processes = {
        "key": start("name=key", "seeed=1"),
        "checked": start("name=checked", "checkpoint=bad"),
        "refused": start("name=refused"),
    }
    lines = {
        "key": "jobs.export: seeed: unknown key; did you mean seed?\n",
        "checked": "jobs.export: checkpoint=bad: expected a good one\n",
        "refused": "jobs.export: output=x: refused\n",
    }
    for name, process in processes.items():
        job = Finished(process, tmp_path / "runs" / name)
        assert (job.code, job.stderr) == (2, lines[name])
        assert job.announced
        assert job.result is not None
        assert job.result["status"] == "invalid"
    assert Finished(start("name=key"), tmp_path / "runs/key").code == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["slow", "stubborn"])
def test_signal_stops_a_job_within_three_seconds(tmp_path: Path, start: Any, name: str, number: int) -> None:
    process = start(f"name={name}")
    assert process.stdout.readline() == "working\n"
    began = time.monotonic()
    process.send_signal(number)
    job = Finished(process, tmp_path / "runs" / name)
    assert time.monotonic() - began < 10, "2 s by the clock of an idle machine"
    assert job.code == 1
    assert job.result is not None
    assert job.result["status"] == "stopped"
    assert job.announced
    assert job.stderr.count("\n") == 1


def test_a_job_that_serves_says_its_result_at_once_and_ends_well_when_it_is_stopped(tmp_path: Path, start: Any) -> None:
    process = start("name=server")
    folder = tmp_path / "runs" / "server"
    said = [process.stdout.readline() for _ in range(2)]
    assert said == ["working\n", f"RESULT {folder}/result.json\n"]
    running = json.loads((folder / "result.json").read_text())
    assert (running["status"], running["artifacts"]) == ("ok", {"endpoint": "http://127.0.0.1:1"})
    process.send_signal(signal.SIGINT)
    job = Finished(process, folder)
    assert job.code == 0
    assert job.announced
    assert job.stderr == ""
    assert job.result is not None
    assert job.result["artifacts"] == running["artifacts"]


def test_a_job_that_serves_and_breaks_has_failed(tmp_path: Path, start: Any) -> None:
    job = Finished(start("name=server-broken"), tmp_path / "runs" / "server-broken")
    assert job.code == 1
    assert job.announced
    assert "it broke later" in job.stderr
    assert job.result is not None
    assert job.result["status"] == "failed"


def test_submitted_job_refuses_relative_storage(tmp_path: Path, start: Any) -> None:
    job = Finished(start("name=a", **{SUBMITTED_JOB: SUBMITTED}), tmp_path / "runs/a")
    assert job.code == 2
    assert job.stderr.startswith("jobs.export: storage=runs: a submitted job's working directory is temporary")
    assert job.result is None
    assert list(tmp_path.iterdir()) == []


def config(tmp_path: Path, **changes: Any) -> ExportConfig:
    words = [f"storage={tmp_path}", *(f"{key}={value}" for key, value in changes.items())]
    loaded = load_config("export", words)
    assert isinstance(loaded, ExportConfig)
    return loaded


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".", " ", "-a", "a b", "x" * 300])
def test_name_is_one_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="name="):
        RunFolder("export", config(tmp_path, name=name))


def occupy(folder: Path, job: str, status: str, *others: str) -> None:
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"job": job, "status": status}))
    for name in others:
        (folder / name).write_text("")


def test_folder_is_only_used_by_runs_of_its_own_job(tmp_path: Path) -> None:
    occupy(tmp_path / "mine", "export", "ok")
    occupy(tmp_path / "other", "train", "ok")
    occupy(tmp_path / "mistake", "train", "invalid")
    occupy(tmp_path / "worked", "train", "invalid", "model")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()

    def claim(name: str, **how: bool) -> None:
        RunFolder("export", config(tmp_path, name=name)).claim(
            resume=how.get("resume", False), overwrite=how.get("overwrite", False)
        )

    for name in ("new", "empty", "mistake"):
        claim(name)
    claim("mine", overwrite=True)
    claim("mine", resume=True)
    with pytest.raises(InputError, match="exists"):
        claim("mine")
    with pytest.raises(InputError, match="is a file"):
        claim("file", overwrite=True)
    for name, reason in {"other": r"jobs\.train", "worked": r"jobs\.train", "foreign": "no run"}.items():
        with pytest.raises(InputError, match=reason):
            claim(name, overwrite=True)


def test_killed_run_is_known_by_its_marker(tmp_path: Path) -> None:
    folder = RunFolder("export", config(tmp_path, name="killed"))
    folder.begin({"job": "export"}, clear=False)
    (tmp_path / "killed/half").write_text("")
    assert folder.occupant().job == "export"
    assert folder.occupant().status is None
    folder.begin({"job": "export"}, clear=True)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["run.json"]


def test_mistake_never_replaces_a_good_result(tmp_path: Path) -> None:
    occupy(tmp_path / "good", "export", "ok")
    before = (tmp_path / "good/result.json").read_bytes()
    for words in (["resume=true", "seed=x"], ["overwrite=true", "nope=1"], ["resume=true", "overwrite=true"]):
        job = _Job("export", [f"storage={tmp_path}", "name=good", *words], keeps_old_run=False)
        assert job.run(_unreachable, None, _NoSignals()) == 2  # type: ignore[arg-type]
        assert not job.written
    assert (tmp_path / "good/result.json").read_bytes() == before


def test_storage_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    job = _Job("export", [f"storage={tmp_path}/file"], keeps_old_run=False)
    assert job.run(_unreachable, None, _NoSignals()) == 2  # type: ignore[arg-type]
    assert job.error is not None
    assert str(tmp_path / "file") in job.error


@pytest.mark.parametrize("flag", ["--help", "--cfg job"])
def test_flags_answer_and_write_nothing(
    tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = _Job("train", ["experiment=digits", "max_steps=7", *flag.split()], keeps_old_run=False)
    assert job.run(_unreachable, None, _NoSignals()) == 0  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert "max_steps" in shown
    assert "7" in shown
    assert list(tmp_path.iterdir()) == []


def test_unknown_flag_is_a_mistake(tmp_path: Path) -> None:
    job = _Job("export", [f"storage={tmp_path}", "--multirun"], keeps_old_run=False)
    assert job.run(_unreachable, None, _NoSignals()) == 2  # type: ignore[arg-type]


class _NoSignals:
    received = False

    def shield(self) -> None:
        pass


def _unreachable(run: object) -> Any:
    raise AssertionError("the body must not run")
