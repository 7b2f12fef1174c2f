"""Keeps `.venv` ready for every make target; called through setup.sh, standard library only.

What decides is a stamp, `.venv/set-up.json`, written last: a hash of each file that says what to install, the Python
version, and the path of the environment (its scripts hold that path). As long as it fits, this takes a fraction of a
second. Otherwise, in this order and each only when needed: make the environment, install the project into it with pip,
build DeepSpeed's CPU communication op, write the stamp. An environment that pip cannot repair (no interpreter, files of
a package missing, made elsewhere) is made anew. One set-up runs at a time; a second one waits for it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ("pyproject.toml", "constraints.txt", "scripts/environment.py")
SUPPORTED = ((3, 10), (3, 13))
NEEDED_MODULES = (
    "pip",
    "torch",
    "ray",
    "deepspeed",
    "hydra",
    "pyarrow",
    "optuna",
    "peft",
    "diffusers",
    "pytest",
    "mfm_ray",
)

# Run by the environment's interpreter. Prints the facts that the decision needs; finding a module does not import it.
PROBE = """
import importlib.metadata, importlib.util, json, sys, sysconfig
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
print(json.dumps({
    "version": list(sys.version_info[:3]), "prefix": sys.prefix, "isolated": sys.prefix != sys.base_prefix,
    "missing": [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None],
    "site": sysconfig.get_path("purelib"),
    "op": {name: version(name) for name in ("torch", "deepspeed")},
}))
"""


class SetupError(Exception):
    """Set-up cannot go on; the message is one line that says why and what to do."""


def say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


# ---- what is there -------------------------------------------------------------------------------------------------


def probe(venv: Path) -> dict | None:
    """Facts about the environment's interpreter, None when it does not run."""
    try:
        done = subprocess.run(
            [venv / "bin/python", "-I", "-c", PROBE, *NEEDED_MODULES], capture_output=True, text=True, timeout=60
        )
        return json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def fingerprint(root: Path, venv: Path, version: list[int]) -> dict[str, str]:
    """What the stamp must say: content of the inputs, Python version, place."""
    stamp = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in INPUTS}
    return {**stamp, "python": ".".join(map(str, version)), "path": str(venv)}


def why_not_current(root: Path, venv: Path, facts: dict | None) -> str | None:
    """None when nothing is to be done, else the reason in a few words."""
    if facts is None:
        return "there is none" if not venv.exists() else "it is incomplete"
    try:
        stamp = json.loads((venv / "set-up.json").read_text())
    except FileNotFoundError:
        return "its set-up was not finished"
    except (OSError, ValueError):
        return "its stamp is unreadable"
    wanted = fingerprint(root, venv, facts["version"])
    if changed := [name for name in wanted if stamp.get(name) != wanted[name]]:
        return f"{', '.join(changed)} changed"
    if facts["missing"]:
        return f"{', '.join(facts['missing'])} missing"
    return why_op_not_ready(venv, facts["op"])


def is_ready(root: Path, venv: Path, exactly: tuple[int, int] | None) -> bool:
    facts = probe(venv)
    if facts is None or why_not_current(root, venv, facts) is not None:
        return False
    return exactly is None or exactly == tuple(facts["version"][:2])


def why_rebuild(venv: Path, facts: dict | None, exactly: tuple[int, int] | None) -> str | None:
    """None when pip can work in the environment, else why it has to be made anew."""
    if facts is None:
        return "its Python does not run"
    low, high = SUPPORTED
    version = (facts["version"][0], facts["version"][1])
    if not low <= version <= high or (exactly is not None and version != exactly):
        return f"it holds Python {version[0]}.{version[1]}"
    if not facts["isolated"] or os.path.realpath(facts["prefix"]) != os.path.realpath(venv):
        return "it is not a virtual environment of its own"
    if elsewhere := made_elsewhere(venv):
        return f"it was made in {elsewhere}"
    if damaged := damaged_packages(Path(facts["site"])):
        return f"files of {', '.join(damaged[:3])} are missing (an interrupted install?)"
    return None


def made_elsewhere(venv: Path) -> str | None:
    """The path a copied or moved environment was made for: its scripts name their interpreter by that."""
    for script in sorted((venv / "bin").glob("pip*")):
        try:
            first = script.read_bytes()[:512].split(b"\n", 1)[0].decode(errors="replace")
        except OSError:
            continue
        interpreter = first.removeprefix("#!").strip().strip('"')
        if first.startswith("#!/") and interpreter != "/bin/sh":
            made_in = os.path.dirname(os.path.dirname(interpreter))
            return None if os.path.realpath(made_in) == os.path.realpath(venv) else made_in
    return None


def damaged_packages(site: Path) -> list[str]:
    """Distributions whose list of files is missing, or names files that are: what an interrupted pip leaves behind."""
    damaged = [path.name for path in site.glob("~*") if path.is_dir()]  # pip's name for what it was replacing
    for info in sorted(site.glob("*.dist-info")):
        try:
            rows = (info / "RECORD").read_text(encoding="utf-8").splitlines()
        except OSError:
            damaged.append(info.name.removesuffix(".dist-info"))
            continue
        files = (row.rsplit(",", 2)[0].strip('"').replace('""', '"') for row in rows)
        if any(name and not name.endswith(".pyc") and not (site / name).exists() for name in files):
            damaged.append(info.name.removesuffix(".dist-info"))
    return damaged


def has_cuda() -> bool:
    return any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def op_directory(venv: Path) -> Path:
    """As mfm_ray/training/comm_op.py has it; repeated since that module's checks need the environment."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or venv / "torch_extensions") / "deepspeed_shm_comm"


def why_op_not_ready(venv: Path, versions: dict[str, str]) -> str | None:
    """None when the op's own stamp names the installed torch and deepspeed and no builder's lock lies beside it."""
    if has_cuda():
        return None
    directory = op_directory(venv)
    if (directory / "lock").exists():
        return f"DeepSpeed's CPU communication op has a build lock, {directory / 'lock'}"
    try:
        built = json.loads((directory / "built.json").read_text())
    except (OSError, ValueError):
        return "DeepSpeed's CPU communication op is not built"
    return None if versions.items() <= built.items() else "DeepSpeed's CPU communication op is of another torch"


# ---- what is done --------------------------------------------------------------------------------------------------


def check_tools() -> None:
    """The compiler and headers, asked for before minutes of download; on a CUDA machine the op is not needed."""
    if has_cuda():
        return
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++")):
        raise SetupError("g++ is missing, DeepSpeed's CPU communication op needs it; on Debian: apt-get install g++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise SetupError(
            f"{header} is missing, DeepSpeed's CPU communication op needs it; on Debian: apt-get install python3-dev"
        )


def environment() -> dict[str, str]:
    """The caller's environment without what would lead pip or Python elsewhere."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX")}
    return {**kept, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}


def run_logged(command: list[str | Path], log: Path, doing: str) -> None:
    """Runs a step with its output in the log, a sign of life every 20 seconds, the log's end when it fails."""
    started = time.monotonic()
    with open(log, "a") as out:
        out.write(f"\n$ {' '.join(map(str, command))}\n")
        out.flush()
        step = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(),
            close_fds=False,
        )
        try:
            while True:
                try:
                    code = step.wait(timeout=20)
                    break
                except subprocess.TimeoutExpired:
                    say(f"... {doing}, {time.monotonic() - started:.0f} s")
        except BaseException:
            step.terminate()
            step.wait()
            raise
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        raise SetupError(
            f"{doing} failed, the end of {log}:\n{tail}\nset-up: {doing} failed; the next make tries again"
        )


def make_venv(venv: Path) -> None:
    if venv.exists() and not venv.is_dir():
        raise SetupError(f"{venv} is a file, not a folder: remove it, then run make again")
    done = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", venv], capture_output=True, text=True, env=environment()
    )
    if done.returncode != 0:
        text = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        raise SetupError(f"python -m venv failed: {text[-1]}; on Debian: apt-get install python3-venv")


def install(venv: Path, log: Path) -> None:
    pip = ["-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    run_logged([venv / "bin/python", *pip, "-c", "constraints.txt", "-e", ".[dev]"], log, "installing packages")


def build_op(venv: Path, log: Path) -> None:
    try:
        run_logged(
            [venv / "bin/python", "-m", "mfm_ray.training.comm_op"], log, "building DeepSpeed's CPU communication op"
        )
    except SetupError as error:
        if not has_cuda():
            raise
        say(f"this machine trains on GPUs only: {str(error).splitlines()[-1]}")


def write_stamp(root: Path, venv: Path, version: list[int]) -> None:
    partial = venv / "set-up.json.part"
    partial.write_text(json.dumps(fingerprint(root, venv, version), indent=1) + "\n")
    os.replace(partial, venv / "set-up.json")


def refresh(root: Path, venv: Path, exactly: tuple[int, int] | None) -> None:
    """Brings the environment up to date; the caller holds the lock."""
    facts = probe(venv)
    reason = why_not_current(root, venv, facts)
    rebuild = why_rebuild(venv, facts, exactly) if reason is not None or exactly is not None else None
    if reason is None and rebuild is None:
        return
    check_tools()
    started = time.monotonic()
    (venv / "set-up.json").unlink(missing_ok=True)
    if rebuild is not None:
        again = f"making .venv anew, {rebuild}" if venv.exists() else "making .venv"
        say(f"{again}: Python {sys.version.split()[0]}, then about 100 packages (2 to 5 minutes, 2 GB)")
        make_venv(venv)
    else:
        say(f"refreshing .venv: {reason}")
        if "pip" in (facts or {})["missing"]:
            subprocess.run(
                [venv / "bin/python", "-m", "ensurepip"], capture_output=True, env=environment(), check=False
            )
    log = venv / "set-up.log"
    install(venv, log)
    facts = probe(venv)
    if facts is None or facts["missing"]:
        raise SetupError(f"{venv} is still incomplete after the install, see {log}")
    if lacking := why_op_not_ready(venv, facts["op"]):
        say(f"{lacking}: building it, once, about a minute")
    build_op(venv, log)
    write_stamp(root, venv, facts["version"])
    say(f"done in {time.monotonic() - started:.0f} s")


def with_lock(path: Path, body: Callable[[], None]) -> None:
    """One set-up at a time. The kernel releases the lock when its holder dies, so it cannot be left behind."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another make is setting up .venv, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock.fileno(), True)  # by pip and the compiler, should they outlive a killed set-up
        body()


def main() -> int:
    parser = argparse.ArgumentParser(description="Creates or refreshes .venv when that is needed.")
    parser.add_argument("--exactly", action="store_true", help="the environment must have this very Python version")
    exactly = sys.version_info[:2] if parser.parse_args().exactly else None
    venv = ROOT / ".venv"
    try:
        if is_ready(ROOT, venv, exactly):
            return 0  # read without the lock: the stamp is removed before anything is changed and written after
        with_lock(ROOT / ".venv.lock", lambda: refresh(ROOT, venv, exactly))
    except SetupError as error:
        say(str(error))
        return 1
    except OSError as error:
        say(f"cannot set up {venv}: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; the next make goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
