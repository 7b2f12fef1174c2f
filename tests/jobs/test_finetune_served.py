"""Rewards of a running Serve application in the place of the workers' own: the same losses, and early refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import serve

from jobs import served_reward
from jobs.contract import JobRun
from jobs.finetune import LocalReward, body, check
from jobs.served_reward import ServedReward
from jobs.served_reward import _line_to as line_to
from jobs.workbench import Workbench
from mfm_ray.config import FinetuneConfig, load_config
from mfm_ray.errors import InputError
from mfm_ray.steering.reward_gradient import evaluate
from mfm_ray.storage import Storage
from serve.direct import UnreachableError
from serve.models import read_models
from serve.remote_reward import Line
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


def test_workers_ask_replicas_directly_and_through_serve_where_that_fails_to_the_same_bit(
    rewards: str, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny_models, f"reward_app={rewards}")
    torch.manual_seed(0)
    samples, weight = torch.rand(7, 1, 8, 8), torch.randn(7)
    lines: list[Line] = []
    monkeypatch.setattr(served_reward, "_line_to", lambda *of, **how: lines.append(line_to(*of, **how)) or lines[-1])
    ways: dict[str, Any] = {"local": LocalReward(Workbench(config.model).reward(config.reward, seed=config.seed))()}
    ways |= {name: ServedReward.of(config)() for name in ("direct", "fallback")}
    directly, fallback = lines
    assert directly._direct is not None
    directly._direct.refresh()
    directly._handle = None  # nothing else can answer
    monkeypatch.setattr(fallback, "_direct", Unreachable())
    results = {}
    for name, reward in ways.items():
        x = samples.clone().requires_grad_()
        values = evaluate(reward, x)
        results[name] = values.detach(), *torch.autograd.grad((weight * values).sum(), x), reward(samples)
    for name in ("direct", "fallback"):
        assert all(torch.equal(own, local) for own, local in zip(results[name], results["local"], strict=True)), name
    directly._direct.close()


class Unreachable:
    """No replica can be reached directly."""

    def call(self, *_: Any) -> Any:
        raise UnreachableError("no replica is known")


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
