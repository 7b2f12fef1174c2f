"""The Ray cluster of a job: the one it was submitted to, the one that is named or running here, or its own."""

import contextlib
import logging
import os
import signal
import socket
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator

from jobs.run_folder import is_submitted
from jobs.stopping import Stopped

# Workers, their controller and one spare each for validation and data must fit on a laptop with two cores, so the
# CPUs of a local cluster are logical: places, not cores.
MIN_LOGICAL_CPUS = 8


@contextlib.contextmanager
def ray_cluster(log: Callable[[str], None]) -> Iterator[None]:
    """A connection to Ray while the block runs; what was started here is stopped at its end.

    Inside a submitted job, or with RAY_ADDRESS set, that cluster is joined; so is one that `ray start` has running
    on this machine. Otherwise a local one is started, never shared with other programs.

    Raises:
        ConnectionError: the cluster that was named does not answer.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = _address_to_join()
    with _own_sigterm_handler():
        if address is None:
            num_cpus = max(MIN_LOGICAL_CPUS, os.cpu_count() or 1)
            log(f"starting a local Ray with {num_cpus} logical CPUs")
            _prepare_environment()
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            log(f"joining the Ray cluster at {address}")
            _join(address)
    try:
        yield
    except Stopped:
        raise  # there is no time for a shutdown: the contract ends this process and all below it
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()


def joins_a_cluster() -> bool:
    """Whether `ray_cluster` would join one that outlives this process, instead of starting its own."""
    import ray

    return ray.is_initialized() or _address_to_join() is not None


def num_gpus() -> float:
    """GPUs of the cluster that is joined."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0.0))


def _address_to_join() -> str | None:
    named = os.environ.get("RAY_ADDRESS")
    if named == "local":
        return None
    if named or is_submitted():
        return named or "auto"
    from ray._private.services import find_bootstrap_address

    running = find_bootstrap_address(None)  # written by `ray start`, not by a program's own local Ray
    return running if running and _answers(running) else None


def _answers(address: str) -> bool:
    """Whether anything listens there: the note that `ray start` leaves outlives a cluster that was killed."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2.0).close()
    except (OSError, ValueError):
        return False
    return True


def _join(address: str) -> None:
    import ray

    try:
        # without address=, so that Ray uses the token of its own accord where it finds one
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConnectionError(
            f"no answer from the Ray cluster at {address}; with token authentication RAY_AUTH_MODE=token must be set"
        ) from error


def _prepare_environment() -> None:
    """What the workers of a local cluster inherit: the tools of this environment (ninja), and quiet."""
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for folder in sys.path:
        if folder and os.path.isfile(os.path.join(folder, "jobs", "contract.py")):
            _prepend("PYTHONPATH", folder)


def _prepend(variable: str, folder: str) -> None:
    present = os.environ.get(variable, "")
    if folder not in present.split(os.pathsep):
        os.environ[variable] = os.pathsep.join(part for part in (folder, present) if part)


@contextlib.contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Keeps the job's handler: ray.init replaces it by one that exits without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
