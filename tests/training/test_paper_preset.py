"""What `preset=paper` of jobs.finetune does: the loss of arXiv 2601.14430 as its code has it, guidance and all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfm_ray.config import FinetuneConfig, load_config, to_dict
from mfm_ray.data_space import DataSpace
from mfm_ray.finetuning import Anchors, DriftTargets, Tilt, build_method
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks import build_network
from mfm_ray.noise import KeyedNoise
from mfm_ray.pretrained import save_model
from mfm_ray.storage import Storage
from mfm_ray.training.finetuning import Finetuning, FinetuningWork
from mfm_ray.training.session import Plan

ROWS, SCALE, MULTIPLIER = 48, 2.5, 3.0
UNGUIDED, GUIDED = 0, 1
"""Rows of the table of guidance scales: that of w = 1, which None asks for, and that of 2.5."""


def reward(x1: Tensor) -> Tensor:
    return torch.sin(x1).sum(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with random weights that knows the guidance scale of the paper."""
    folder, space = tmp_path_factory.mktemp("guided") / "model", DataSpace("coordinates", (2,))
    torch.manual_seed(0)
    described = {"name": "residual_mlp", "width": 16, "num_blocks": 1, "cfg_scales": [SCALE]}
    network = build_network(described, space=space, num_classes=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    names = ["a", "b", "c"]
    save_model(
        folder, network, config={"data": {"name": "points", **space.config(), "num_classes": 3, "class_names": names}}
    )
    return folder


def work_of(model: Path, *words: str) -> tuple[FinetuneConfig, FinetuningWork]:
    """What a worker of this command line holds."""
    given = [
        f"model={model}",
        "reward=brightness",  # names a reward; the task brings its own
        "preset=paper",
        f"cfg_scale={SCALE}",
        f"reward_multiplier={MULTIPLIER}",
        "precision=fp32",
    ]
    config = load_config("finetune", [*given, *words])
    assert isinstance(config, FinetuneConfig)
    task = Finetuning(base=Storage(model), base_sha256="0", make_reward=lambda: reward)
    plan = Plan(config=to_dict(config), data=None, run=Storage(model), model={}, cuda=False, task=task)
    return config, task.begin(plan, config, torch.device("cpu"))


def anchors() -> Anchors:
    generator = torch.Generator().manual_seed(1)
    x1, label = torch.randn(ROWS, 2, generator=generator), torch.arange(ROWS) % 3
    return Anchors(x1, label, MULTIPLIER * reward(x1).double())


def noise(step: int = 0) -> KeyedNoise:
    return KeyedNoise.for_rows(0, torch.arange(ROWS)).fold_in(step)


def targets_of(config: FinetuneConfig, work: FinetuningWork, step: int = 0) -> DriftTargets:
    return build_method(config.method).targets(work._tilt, anchors(), noise(step))


def official_gradient(base: FlowMap, tuned: FlowMap, made: DriftTargets, label: Tensor) -> list[Tensor]:
    """Of |b_ft - sg(b_b - (E - 1)(b_ft - b_b) + (sigma^2 / 2) grad_x E)|^2, sigma^2 = 200, with the drifts at w = 1 and
    the draws at w = 2.5."""
    pulled = Tilt(base, reward, MULTIPLIER, SCALE).draws(
        made.x_t, made.t, label, noise(), num_draws=1, coefficients=torch.ones_like
    )
    weight = pulled.rewards.exp().float()  # (B, 1)
    assert pulled.gradient is not None
    slope_of_exp = weight * pulled.gradient.float()
    b_b = base.drift(made.x_t, made.t, label=label)
    b_ft = tuned.drift(made.x_t, made.t, label=label)
    target = (b_b - (weight - 1) * (b_ft - b_b) + 100 * slope_of_exp).detach()
    (b_ft - target).square().mean().backward()
    return [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in tuned.parameters()]


def test_a_step_has_the_gradient_of_the_papers_loss_its_drifts_without_and_its_draws_with_guidance(model: Path) -> None:
    config, work = work_of(model)
    made = targets_of(config, work)
    with torch.no_grad():  # off the frozen network, so that every term of the loss counts
        for parameter in work.flow_map.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    label = anchors().label
    assert label is not None
    expected = official_gradient(work._base, work.flow_map, made, label)
    work.flow_map.zero_grad()
    loss, _ = work.module(made, anchors().reward, 0)
    loss.backward()
    actual = [torch.zeros_like(each) if each.grad is None else each.grad for each in work.flow_map.parameters()]
    size = torch.cat([each.flatten() for each in expected]).abs().max()
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=float(1e-5 * size))


@pytest.mark.parametrize(("guided", "trained"), [("false", UNGUIDED), ("true", GUIDED)])
def test_the_row_of_the_guidance_that_is_sampled_with_is_trained_only_where_drifts_are_guided(
    model: Path, guided: str, trained: int
) -> None:
    config, work = work_of(model, f"guided_drifts={guided}")
    table = work.flow_map.embed_guidance.weight
    before = table.detach().clone()
    optimizer = torch.optim.RAdam(work.flow_map.parameters(), lr=config.optimizer.learning_rate)
    for step in range(8):
        loss, _ = work.module(targets_of(config, work, step), anchors().reward, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(table[1 - trained], before[1 - trained])
    assert not torch.equal(table[trained], before[trained])


def test_the_mismatch_is_another_target_and_kept_by_checkpoints_and_words(model: Path) -> None:
    by_guidance = {}
    for guided in ("false", "true"):
        config, work = work_of(model, f"guided_drifts={guided}")
        by_guidance[guided] = targets_of(config, work)
    paper, ours = by_guidance["false"], by_guidance["true"]
    assert torch.equal(paper.weight, ours.weight)  # the same draws
    base, label = work._base, anchors().label
    scales = [base.drift(paper.x_t, paper.t, label=label, cfg_scale=scale) for scale in (None, SCALE)]
    assert float((scales[0] - scales[1]).abs().max()) > 1e-3
    torch.testing.assert_close(paper.target - ours.target, scales[0] - scales[1], rtol=1e-3, atol=1e-4)
