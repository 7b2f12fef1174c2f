"""DeepSpeed's CPU communication op: built at set-up, checked by the driver, loaded by workers without a compiler.

DeepSpeed on a CPU talks between processes of one machine through `deepspeed_shm_comm`, a small C++ extension that it
compiles by itself the first time a process group is made: a minute of g++ in the middle of somebody's run, under a lock
file that outlives a killed builder and then stops every later run for ever. Here the op is built once

    python -m mfm_ray.training.comm_op          # what `make setup` runs

into `$TORCH_EXTENSIONS_DIR`, by default `torch_extensions/` in the Python environment itself: the environment is what
the binary belongs to (its torch, its headers), it is found from any shell and by any Ray worker of that environment,
and two checkouts do not rebuild each other's op. A stamp beside it, written last, says what it was built for.

    check_comm_op()   on the driver, before resources are taken: a `CommOpError` of one line when a run could not use it
    load_comm_op()    in each worker, before DeepSpeed starts: hands DeepSpeed the finished binary, so that no run ever
                      waits for a lock, needs ninja, or compiles

Only CPU training needs it (DeepSpeed on CUDA goes through NCCL).
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import platform
import shutil
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path
from types import ModuleType

OP_NAME = "deepspeed_shm_comm"
BUILD_COMMAND = "python -m mfm_ray.training.comm_op"


class CommOpError(RuntimeError):
    """The CPU communication op is missing, stale or locked; the message is one line that says what to do."""


def op_directory() -> Path:
    """Where torch's extension builder keeps the op: `<extensions>/deepspeed_shm_comm`."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(sys.prefix, "torch_extensions")
    return Path(root) / OP_NAME


def check_comm_op() -> None:
    """Raises `CommOpError` unless the op is built for this environment and no dead builder left its lock behind."""
    lock = op_directory() / "lock"
    builders = lock_holders(lock) if lock.exists() else []
    if lock.exists() and not builders:
        raise CommOpError(
            f"stale build lock {lock}: no process holds it, and DeepSpeed would wait for it without end; "
            f"run `make setup` (or remove the file: rm '{lock}')"
        )
    if (reason := _why_not_ready()) is not None:
        if builders:
            reason += f"; process {builders[0]} is building it now (lock {lock}), wait for it"
        raise CommOpError(
            f"DeepSpeed's CPU communication op is {reason}; run `make setup` (or `{BUILD_COMMAND}`) on this machine"
        )


def load_comm_op() -> ModuleType:
    """Loads the finished op and registers it with DeepSpeed, whose own loader would go through ninja and the lock.

    Raises `CommOpError` when the op is not built for this environment.
    """
    if (reason := _why_not_ready()) is not None:
        raise CommOpError(
            f"DeepSpeed's CPU communication op on node {platform.node()} is {reason}; "
            f"run `make setup` (or `{BUILD_COMMAND}`) there"
        )
    import torch  # noqa: F401  the extension links against torch's libraries, which this puts in the process
    from deepspeed.ops.op_builder.builder import OpBuilder

    if OP_NAME not in OpBuilder._loaded_ops:
        spec = importlib.util.spec_from_file_location(OP_NAME, op_directory() / f"{OP_NAME}.so")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        OpBuilder._loaded_ops[OP_NAME] = module
    return OpBuilder._loaded_ops[OP_NAME]


def build_comm_op(*, timeout_s: float = 600.0) -> Path:
    """Builds the op (about a minute of g++) unless it is ready, and returns its directory.

    A lock left by a killed builder is removed and named on stdout; one that a live process holds is waited for.

    Raises `CommOpError` when a compiler is missing, the build fails, or another build does not end in `timeout_s`.
    """
    directory = op_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory.parent / f"{OP_NAME}.setup-lock", "w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)  # two set-ups; the kernel releases this one when its holder dies
            _clear_lock(directory / "lock", timeout_s)
            if _why_not_ready() is not None:
                _compile(directory)
                _write_stamp(directory)
    except OSError as error:
        raise CommOpError(f"cannot build DeepSpeed's CPU communication op in {directory}: {error}") from error
    return directory


def lock_holders(lock: Path) -> list[int]:
    """Ids of the processes that have the lock file open: torch's builder keeps it open for as long as it builds."""
    holders = []
    target = os.path.realpath(lock)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.path.realpath(fd) == target for fd in (process / "fd").iterdir()):
                holders.append(int(process.name))
        except OSError:  # ended meanwhile, or another user's: that user builds in an environment of their own
            continue
    return holders


def _why_not_ready() -> str | None:
    """None when the finished op fits this environment, else what is wrong with it in a few words."""
    directory = op_directory()
    try:
        stamp = json.loads((directory / "built.json").read_text())
    except (OSError, ValueError):
        return f"not built ({directory})"
    if not (directory / f"{OP_NAME}.so").is_file():
        return f"not built ({directory})"
    wanted = _fingerprint()
    changed = [key for key in wanted if stamp.get(key) != wanted[key]]
    return f"built for another {', '.join(changed)} ({directory})" if changed else None


def _fingerprint() -> dict[str, str]:
    """What the binary depends on. Any of it changed would make DeepSpeed compile again in the middle of a run."""
    return {
        "python": f"{platform.python_implementation()} {sysconfig.get_config_var('SOABI')}",
        "torch": metadata.version("torch"),
        "deepspeed": metadata.version("deepspeed"),
        "machine": platform.machine(),
    }


def _clear_lock(lock: Path, timeout_s: float) -> None:
    """Waits for a live builder, removes the lock of a dead one."""
    deadline = time.monotonic() + timeout_s
    while lock.exists() and (builders := lock_holders(lock)):
        if time.monotonic() > deadline:
            raise CommOpError(
                f"process {builders[0]} has held the build lock {lock} for more than {timeout_s:.0f} s; "
                "end it, then run `make setup` again"
            )
        time.sleep(1.0)
    if lock.exists():
        print(f"removing the stale build lock {lock}: no process holds it", flush=True)  # noqa: T201
        lock.unlink(missing_ok=True)


def _compile(directory: Path) -> None:
    wanted = os.environ.get("CXX") or "c++"
    if (compiler := next((name for name in (wanted, "g++") if shutil.which(name)), None)) is None:
        raise CommOpError(f"no C++ compiler ({wanted}) to build DeepSpeed's CPU communication op: install g++")
    # built in place, since ninja's files hold absolute paths; without its stamp a half-made one counts as not built
    shutil.rmtree(directory, ignore_errors=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(directory.parent)
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["CXX"] = compiler
    # an environment that is not activated has its ninja beside its python
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    try:
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        ShareMemCommBuilder().load()
    except (RuntimeError, ImportError) as error:
        lines = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
        raise CommOpError(f"building DeepSpeed's CPU communication op failed: {lines[0].strip()}") from error


def _write_stamp(directory: Path) -> None:
    partial = directory / "built.json.part"
    partial.write_text(json.dumps(_fingerprint(), indent=1) + "\n")
    os.replace(partial, directory / "built.json")


def main() -> int:
    try:
        directory = build_comm_op()
    except CommOpError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    print(f"DeepSpeed's CPU communication op is ready in {directory}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
