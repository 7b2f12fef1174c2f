"""Rewards of a running Serve application in the place of the workers' own: the same losses, and early refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from jobs.contract import JobRun
from jobs.finetune import body, check
from mfm_ray.config import FinetuneConfig, load_config
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage
from serve.models import read_models
from serve.reward import reward_deployment
from serve.settings import RewardSettings

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

APP = "rewards-of-the-tests"
PARTS = "[{name: symmetry, weight: 0.5}, {name: symmetry, axis: vertical}]"


@pytest.fixture(scope="module")
def rewards(ray_session: None, tiny_models: dict[str, str]) -> Iterator[str]:
    cards = list(read_models({"tiny": tiny_models["tiny"]}).values())
    small: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0.1}, "graceful_shutdown_timeout_s": 2}
    serve.start(proxy_location="Disabled")
    settings = RewardSettings.model_validate({"name": "symmetry", **small})
    serve.run(reward_deployment(cards, settings), name=APP, route_prefix=None)
    yield APP
    serve.shutdown()


def configured(tiny_models: dict[str, str], *words: str) -> FinetuneConfig:
    config = load_config(
        "finetune",
        [
            f"model={tiny_models['tiny']}",
            "reward=weighted_sum",
            f"reward.parts={PARTS}",
            "reward.weight=0.1",
            "global_batch_size=16",
            "method.num_draws=4",
            "max_steps=6",
            "log_every=1",
            "checkpoint_every=6",
            "sample_every=0",
            *words,
        ],
    )
    assert isinstance(config, FinetuneConfig)
    return config


def losses(config: FinetuneConfig, run: Path) -> list[dict[str, float]]:
    body(JobRun(config=config, storage=Storage(run), log=print))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    same = ("step", "loss", "reward", "reward.anchors", "weights.mean", "gradient_norm")
    return [{name: line[name] for name in same} for line in lines]


def test_a_served_reward_gives_the_losses_of_a_local_one_to_the_bit(
    rewards: str, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    served = configured(tiny_models, f"reward_app={rewards}")
    check(served)
    assert losses(served, tmp_path / "served") == losses(configured(tiny_models), tmp_path / "local")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reward_app=mfm"], f"reward_app=mfm: does not run in this cluster; running are {APP}"),
        (["reward_app=" + APP, "reward=brightness"], f"reward=brightness: reward_app={APP} serves symmetry"),
        (["reward_app=" + APP, "reward_model=huge"], f"reward_app={APP}: asked for model huge it said: "),
    ],
)
def test_what_is_not_served_is_refused_before_a_worker_starts(
    rewards: str, tiny_models: dict[str, str], tmp_path: Path, words: list[str], message: str
) -> None:
    keep = [word for word in words if word.startswith("reward=")]
    config = load_config("finetune", [f"model={tiny_models['tiny']}", *(keep or ["reward=symmetry"]), *words])
    with pytest.raises(InputError) as caught:
        body(JobRun(config=config, storage=Storage(tmp_path / "run"), log=print))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
