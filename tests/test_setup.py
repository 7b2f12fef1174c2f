"""Set-up: what makes it act, what it repairs, and DeepSpeed's communication op. Only the last test installs."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mfm_ray.training import comm_op

ROOT = Path(__file__).resolve().parent.parent


def _load_environment():
    spec = importlib.util.spec_from_file_location("setup_environment", ROOT / "scripts" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


environment = _load_environment()
BUILT_OP = comm_op.op_directory()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with an environment that has Python alone, taken for complete, and its op for built."""
    for name in environment.INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    monkeypatch.setattr(environment, "NEEDED_MODULES", ("json",))
    monkeypatch.setattr(environment, "has_cuda", lambda: True)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    return tmp_path


def stamped(checkout: Path) -> Path:
    venv = checkout / ".venv"
    environment.write_stamp(checkout, venv, environment.probe(venv)["version"])
    return venv


def reason(checkout: Path) -> str | None:
    venv = checkout / ".venv"
    return environment.why_not_current(checkout, venv, environment.probe(venv))


def must_rebuild(checkout: Path, exactly: tuple[int, int] | None = None) -> str | None:
    venv = checkout / ".venv"
    return environment.why_rebuild(venv, environment.probe(venv), exactly)


# ---- when it acts --------------------------------------------------------------------------------------------------


def test_a_finished_environment_is_left_alone(checkout):
    stamped(checkout)
    assert reason(checkout) is None
    assert must_rebuild(checkout) is None


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_is_named(checkout, name):
    stamped(checkout)
    (checkout / name).write_text((checkout / name).read_text() + "\n# changed\n")
    assert reason(checkout) == f"{name} changed"
    assert must_rebuild(checkout) is None


def test_no_environment_and_an_empty_one_are_told_apart(checkout):
    shutil.rmtree(checkout / ".venv")
    assert reason(checkout) == "there is none"
    (checkout / ".venv").mkdir()
    assert reason(checkout) == "it is incomplete"
    assert must_rebuild(checkout) == "its Python does not run"


def test_an_interrupted_install_leaves_no_stamp(checkout, monkeypatch):
    stamped(checkout)
    (checkout / "constraints.txt").write_text("torch==2.13.0\n")

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        environment.refresh(checkout, checkout / ".venv", None)
    assert reason(checkout) == "its set-up was not finished"


def test_a_missing_package_is_named(checkout, monkeypatch):
    stamped(checkout)
    monkeypatch.setattr(environment, "NEEDED_MODULES", ("json", "no_such_package"))
    assert reason(checkout) == "no_such_package missing"


def test_an_environment_without_pip_gets_it_without_being_made_anew(checkout, monkeypatch):
    monkeypatch.setattr(environment, "NEEDED_MODULES", ("pip",))
    monkeypatch.setattr(environment, "install", lambda *_args: None)
    monkeypatch.setattr(environment, "build_op", lambda *_args: None)
    monkeypatch.setattr(environment, "make_venv", lambda *_args: pytest.fail("made anew"))
    environment.refresh(checkout, checkout / ".venv", None)
    assert reason(checkout) is None


# ---- what it makes anew --------------------------------------------------------------------------------------------


def test_an_interpreter_that_is_gone_is_broken(checkout):
    stamped(checkout)
    for link in (checkout / ".venv/bin").glob("python*"):
        link.unlink()
        link.symlink_to("/no/such/python")
    assert reason(checkout) == "it is incomplete"
    assert must_rebuild(checkout) == "its Python does not run"


def test_a_moved_environment_is_noticed_by_its_scripts(checkout):
    venv = stamped(checkout)
    (venv / "bin/pip").write_text("#!/somewhere/else/.venv/bin/python3\nimport sys\n")
    assert must_rebuild(checkout) == "it was made in /somewhere/else/.venv"
    moved = checkout.parent / f"{checkout.name}-moved"
    checkout.rename(moved)
    assert reason(moved) == "path changed"


def test_a_package_with_missing_files_is_damaged(checkout):
    site = Path(environment.probe(checkout / ".venv")["site"])
    info = site / "thing-1.0.dist-info"
    info.mkdir()
    assert must_rebuild(checkout) == "files of thing-1.0 are missing (an interrupted install?)"
    (info / "RECORD").write_text("thing/__init__.py,sha256=x,1\nthing/__pycache__/__init__.cpython-311.pyc,,\n")
    assert environment.damaged_packages(site) == ["thing-1.0"]
    (site / "thing").mkdir()
    (site / "thing/__init__.py").touch()
    assert environment.damaged_packages(site) == []


def test_an_explicit_python_of_another_version_makes_it_anew(checkout):
    stamped(checkout)
    version = (sys.version_info[0], sys.version_info[1])
    assert must_rebuild(checkout, exactly=version) is None
    assert must_rebuild(checkout, exactly=(3, 99)) == f"it holds Python {version[0]}.{version[1]}"


def test_a_second_set_up_waits_for_the_first(tmp_path, capsys):
    order: list[str] = []
    inside = threading.Event()

    def first():
        inside.set()
        time.sleep(0.3)
        order.append("first")

    thread = threading.Thread(target=environment.with_lock, args=(tmp_path / "lock", first))
    thread.start()
    inside.wait()
    environment.with_lock(tmp_path / "lock", lambda: order.append("second"))
    thread.join()
    assert order == ["first", "second"]
    assert "waiting" in capsys.readouterr().out


def test_a_pip_that_outlives_a_killed_set_up_keeps_the_lock(tmp_path):
    code = f"""
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("environment", {str(ROOT / "scripts/environment.py")!r})
environment = importlib.util.module_from_spec(spec)
spec.loader.exec_module(environment)
step = [sys.executable, "-c", "import os, time; os.kill(os.getppid(), 9); time.sleep(2)"]
log = environment.Path("{tmp_path}/log")
environment.with_lock("{tmp_path}/lock", lambda: environment.run_logged(step, log, "pip"))
"""
    killed = subprocess.run([sys.executable, "-c", code])
    assert killed.returncode == -9
    started = time.monotonic()
    environment.with_lock(tmp_path / "lock", lambda: None)
    assert time.monotonic() - started > 1


def test_a_failed_step_shows_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    command = [sys.executable, "-c", "print('no such package'); raise SystemExit(3)"]
    with pytest.raises(environment.SetupError, match="no such package"):
        environment.run_logged(command, tmp_path / "log", "installing packages")


# ---- the shell around it -------------------------------------------------------------------------------------------


def test_an_unsuitable_python_gets_one_line():
    done = subprocess.run(
        [ROOT / "scripts/setup.sh"], env={**os.environ, "PYTHON": "/bin/false"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "set-up: PYTHON=/bin/false is not a Python 3.10 to 3.13 with the venv module\n"


def recipe_environment(**given: str) -> str:
    """DS_ACCELERATOR as a recipe of the Makefile sees it; `unset` when it is not there."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", "MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        ["make", "--no-print-directory", "--eval=show:;@echo $${DS_ACCELERATOR-unset}", "show"],
        cwd=ROOT,
        env={**inherited, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_recipes_never_see_an_empty_accelerator():
    assert recipe_environment(DS_ACCELERATOR="cpu") == "cpu"
    found = "unset" if environment.has_cuda() else "cpu"
    assert recipe_environment(DS_ACCELERATOR="") == found
    assert recipe_environment() == found


# ---- DeepSpeed's CPU communication op ------------------------------------------------------------------------------


@pytest.fixture
def op(tmp_path, monkeypatch):
    """The op's directory in an empty extensions directory."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    comm_op.op_directory().mkdir()
    return comm_op.op_directory()


def stamp_op(op: Path, **changes: str) -> None:
    (op / f"{comm_op.OP_NAME}.so").touch()
    (op / "built.json").write_text(json.dumps({**comm_op._fingerprint(), **changes}))


def test_an_op_that_was_never_built_names_the_command(op):
    with pytest.raises(comm_op.CommOpError, match=r"is not built .*run `make setup`"):
        comm_op.check_comm_op()


def test_an_op_of_another_torch_is_refused_by_driver_and_worker(op):
    stamp_op(op)
    comm_op.check_comm_op()
    stamp_op(op, torch="1.0")
    with pytest.raises(comm_op.CommOpError, match=r"built for another torch .*run `make setup`"):
        comm_op.check_comm_op()
    with pytest.raises(comm_op.CommOpError, match="built for another torch"):
        comm_op.load_comm_op()


def test_a_stale_build_lock_is_named_and_set_up_removes_it(op, capsys):
    stamp_op(op)
    lock = op / "lock"
    lock.touch()
    with pytest.raises(comm_op.CommOpError) as caught:
        comm_op.check_comm_op()
    assert f"stale build lock {lock}" in str(caught.value)
    assert f"rm '{lock}'" in str(caught.value)
    assert "\n" not in str(caught.value)
    comm_op.build_comm_op()
    assert not lock.exists()
    assert f"removing the stale build lock {lock}" in capsys.readouterr().out


def test_a_lock_that_a_builder_holds_is_left_to_it(op):
    with open(op / "lock", "w") as lock:
        assert comm_op.lock_holders(Path(lock.name)) == [os.getpid()]
        with pytest.raises(comm_op.CommOpError, match=f"process {os.getpid()} is building it now"):
            comm_op.check_comm_op()
        with pytest.raises(comm_op.CommOpError, match=f"process {os.getpid()} has held the build lock"):
            comm_op.build_comm_op(timeout_s=0.0)
    assert (op / "lock").exists()


def test_set_up_sees_an_op_of_another_torch(op, monkeypatch):
    monkeypatch.setattr(environment, "has_cuda", lambda: False)
    stamp_op(op)
    installed = {name: comm_op._fingerprint()[name] for name in ("torch", "deepspeed")}
    assert environment.op_directory(Path("unused")) == op
    assert environment.why_op_not_ready(Path("unused"), installed) is None
    assert "another torch" in environment.why_op_not_ready(Path("unused"), {**installed, "torch": "1.0"})
    (op / "lock").touch()
    assert str(op / "lock") in environment.why_op_not_ready(Path("unused"), installed)
    shutil.rmtree(op)
    assert "not built" in environment.why_op_not_ready(Path("unused"), installed)


def test_a_worker_takes_the_built_op_with_no_compiler_no_ninja_and_a_lock_in_the_way(op):
    if not (BUILT_OP / "built.json").exists():
        pytest.skip("the op is not built in this environment (make setup)")
    shutil.copytree(BUILT_OP, op, dirs_exist_ok=True)
    (op / "lock").touch()
    code = (
        "from mfm_ray.training.comm_op import load_comm_op\n"
        "module = load_comm_op()\n"
        "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder\n"
        "assert ShareMemCommBuilder().load() is module\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PATH": "/nowhere"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


# ---- the real thing ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_clean_clone_sets_itself_up_once_and_goes_on_after_an_interruption(tmp_path):
    """Needs pip's package index, 2 GB of disk and about five minutes."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    outside = {k: v for k, v in os.environ.items() if k not in ("TORCH_EXTENSIONS_DIR", "PYTHON", "VIRTUAL_ENV")}

    def setup() -> tuple[str, float]:
        started = time.monotonic()
        done = subprocess.run(["make", "setup"], cwd=clone, env=outside, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, time.monotonic() - started

    interrupted = subprocess.Popen(["scripts/setup.sh"], cwd=clone, env=outside, start_new_session=True)
    time.sleep(20)
    os.killpg(interrupted.pid, 9)
    interrupted.wait()
    first, _ = setup()
    second, seconds = setup()
    assert "set-up: done" in first
    assert "set-up: done" not in second
    assert seconds < 10
    status = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert status.stdout == ""
    shutil.rmtree(clone)
