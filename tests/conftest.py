"""Shared fixtures, and the environment that every test runs in: set here at the top, before anything imports ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ.update(
    RAY_AUTH_MODE="disabled",  # else ray.init() writes a token to HOME, which changes the user's later `ray start`
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_USE_DATASOURCE_V2="0",  # V1 reads small Parquet files in 0.2 s instead of 10
    RAY_TRAIN_ENABLE_PRINT_PATCH="0",
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH="serve.edge:middlewares",  # as `make serve` has it
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="10",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",  # what newer versions of Ray do; without it they warn
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    # as an activated environment has it: programs beside this python (ninja, ray) are found
    PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
)
if not os.environ.get("DS_ACCELERATOR"):
    os.environ["DS_ACCELERATOR"] = "cpu"
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_SUBMISSION_ID"):
    os.environ.pop(name, None)  # tests never join a cluster that somebody else started


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what uses the shared cluster, and skips `gpu` tests where there is none."""
    for item in items:
        if "ray_session" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray cluster for all tests that ask for it: 8 logical CPUs whatever the machine has."""
    import ray

    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=300 * 2**20,
    )
    yield
    ray.shutdown()


@dataclass(frozen=True)
class FinishedJob:
    """What `python -m jobs.NAME ...` left: exit code, output, and the result.json that its RESULT line names."""

    code: int
    stdout: str
    stderr: str
    result_path: str | None
    result: dict[str, Any] | None

    @property
    def metrics(self) -> dict[str, float]:
        assert self.result is not None, self.describe()
        return self.result["metrics"]

    @property
    def artifacts(self) -> dict[str, str]:
        assert self.result is not None, self.describe()
        return self.result["artifacts"]

    def describe(self) -> str:
        """Everything a failed assertion should show: `assert job.code == 0, job.describe()`."""
        return f"exit code {self.code}\n--- stdout\n{self.stdout[-4000:]}\n--- stderr\n{self.stderr[-4000:]}"


@pytest.fixture
def run_job(tmp_path: Path) -> Callable[..., FinishedJob]:
    """`run_job("train", "experiment=digits", ...)`: a job in a process of its own, in an empty working directory."""

    def run(
        name: str, *words: str, timeout: float = 240.0, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> FinishedJob:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        return _finish([sys.executable, "-m", f"jobs.{name}", *words], cwd or tmp_path, environment, timeout)

    return run


def _finish(command: Sequence[str], cwd: Path, env: dict[str, str], timeout: float) -> FinishedJob:
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # a job ends what it started when it is asked to
        try:
            stdout, stderr = process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
        pytest.fail(f"{' '.join(command)} took more than {timeout} s\n{stdout[-4000:]}\n{stderr[-4000:]}")
    lines = stdout.splitlines()
    path = lines[-1].removeprefix("RESULT ") if lines and lines[-1].startswith("RESULT ") else None
    result = json.loads(Path(path).read_text()) if path is not None and "://" not in path else None
    return FinishedJob(process.returncode, stdout, stderr, path, result)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two untrained models of digits by name, with a classifier beside each."""
    folder = tmp_path_factory.mktemp("models")
    return {name: _save_tiny_model(folder / name, seed=seed) for seed, name in enumerate(("tiny", "other"))}


def _save_tiny_model(path: Path, *, seed: int) -> str:
    import torch

    from mfm_ray.data.datasets import digits
    from mfm_ray.data.moments import data_moments
    from mfm_ray.networks import build_network
    from mfm_ray.networks.classifier import DigitClassifier
    from mfm_ray.pretrained import save_model

    data = digits()
    train = data.splits["train"].data.flatten(1).double()
    moments = data_moments(data.space.to_model_space(train)).preconditioning()
    torch.manual_seed(seed)
    network = {"name": "residual_mlp", "width": 16, "num_blocks": 1}
    flow_map = build_network(network, space=data.space, num_classes=10, moments=moments)
    described = {"name": "digits", **data.space.config(), "num_classes": 10, "class_names": list(data.class_names)}
    judge = DigitClassifier(num_classes=10, event_shape=(1, 8, 8))
    save_model(path, flow_map, config={"data": described, "training": {}}, classifier=judge)
    return str(path)


@dataclass(frozen=True)
class LatentModel:
    """A model of latents (4, 4, 4), untrained, and the autoencoder that makes pictures (3, 8, 8) of them."""

    model: str
    autoencoder: str


@pytest.fixture(scope="session")
def latent_model(tmp_path_factory: pytest.TempPathFactory) -> LatentModel:
    """Of the true classes and file layouts, small and random."""
    folder = tmp_path_factory.mktemp("latents")
    save_tiny_autoencoder(folder / "vae")
    return LatentModel(save_latent_model(folder / "pictures", autoencoder=folder / "vae"), str(folder / "vae"))


def save_tiny_autoencoder(folder: Path, *, seed: int = 0) -> None:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=8,
    ).save_pretrained(folder)


def save_latent_model(path: Path, *, autoencoder: Path) -> str:
    """A model directory that names the autoencoder, with its fingerprint."""
    import torch

    from mfm_ray.autoencoder import load_autoencoder
    from mfm_ray.data_space import DataSpace
    from mfm_ray.networks import build_network
    from mfm_ray.pretrained import save_model

    known = load_autoencoder(autoencoder)
    space = DataSpace(kind="latent", event_shape=known.latent_shape(8), scale=known.scale)
    torch.manual_seed(0)
    network = {"name": "dit", "hidden_size": 16, "depth": 2, "encoder_depth": 1, "num_heads": 2, "patch_size": 2}
    flow_map = build_network(network, space=space, num_classes=3)
    for parameter in flow_map.parameters():  # a map that starts at zero would test little
        parameter.data += 0.05 * torch.randn_like(parameter)
    described = {"name": "pictures", **space.config(), "num_classes": 3, "class_names": ["a", "b", "c"]}
    described["autoencoder"] = {"source": str(autoencoder), "fingerprint": known.fingerprint(), "image_size": 8}
    save_model(path, flow_map, config={"data": described, "training": {}})
    return str(path)
