"""Batch arithmetic, ZeRO settings, schedule: pure functions, no process group."""

import math

import pytest
import torch

from mfm_ray.training.zero import LearningRate, build_optimizer, split_batch, zero_config


def test_the_parts_of_all_workers_and_micro_steps_are_the_global_batch_in_order() -> None:
    split = split_batch(24, num_workers=3, micro_batch_size=4)
    assert (split.micro_batch_size, split.accumulation, split.sizes(1)) == (4, 2, [4, 4])
    assert [split.rows_of(rank) for rank in range(3)] == [range(8), range(8, 16), range(16, 24)]
    assert split.weights(2) == [1.0, 1.0]


@pytest.mark.parametrize(("rows", "workers", "micro"), [(16, 3, None), (16, 3, 2), (23, 5, 3), (7, 7, None)])
def test_uneven_shares_differ_by_a_row_and_their_weighted_means_are_the_mean_of_all_rows(
    rows: int, workers: int, micro: int | None
) -> None:
    split = split_batch(rows, num_workers=workers, micro_batch_size=micro, even=False)
    values = torch.randn(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total, seen = 0.0, []
    for rank in range(workers):
        sizes = split.sizes(rank)
        assert sum(sizes) == len(split.rows_of(rank))
        assert len(sizes) == split.accumulation
        assert 0 < min(sizes) <= max(sizes) <= (micro or rows)
        parts = values[split.rows_of(rank).start : split.rows_of(rank).stop].split(sizes)
        means = [weight * float(part.mean()) for weight, part in zip(split.weights(rank), parts, strict=True)]
        total += sum(means) / len(means)
        seen += split.rows_of(rank)
    assert seen == list(range(rows))
    assert math.isclose(total / workers, float(values.mean()), rel_tol=1e-12)


def test_a_micro_step_without_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"micro_batch_size=1: with 3 workers, global_batch_size=8 .* larger"):
        split_batch(8, num_workers=3, micro_batch_size=1, even=False)
    with pytest.raises(ValueError, match="global_batch_size=2"):
        split_batch(2, num_workers=3, micro_batch_size=None, even=False)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"global_batch_size": 10, "num_workers": 3, "micro_batch_size": None}, "global_batch_size=10.*num_workers=3"),
        ({"global_batch_size": 12, "num_workers": 2, "micro_batch_size": 4}, "micro_batch_size=4.*6 samples"),
        ({"global_batch_size": 12, "num_workers": 2, "micro_batch_size": 12}, "micro_batch_size=12"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_numbers(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_batch(sizes.pop("global_batch_size"), **sizes)


def test_zero_config_states_the_batch_that_deepspeed_checks() -> None:
    split = split_batch(48, num_workers=2, micro_batch_size=8)
    config = zero_config(stage=2, offload=False, split=split, gradient_clipping=1.5, num_parameters=99, cuda=False)
    assert config["train_batch_size"] == 48
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 2 == 48
    assert config["gradient_clipping"] == 1.5
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["reduce_bucket_size"] == 99


def test_only_stage_3_turns_off_the_linear_layer_without_forward_derivative() -> None:
    split = split_batch(4, num_workers=1, micro_batch_size=None)
    for stage in range(4):
        config = zero_config(
            stage=stage, offload=False, split=split, gradient_clipping=0.0, num_parameters=99, cuda=True
        )
        assert config["zero_optimization"].get("memory_efficient_linear", True) is (stage != 3)


@pytest.mark.parametrize(
    ("stage", "offload", "message"), [(4, False, "zero.stage=4"), (0, True, "zero.offload=true needs")]
)
def test_impossible_sharding_is_refused(stage: int, offload: bool, message: str) -> None:
    split = split_batch(4, num_workers=1, micro_batch_size=None)
    with pytest.raises(ValueError, match=message):
        zero_config(stage=stage, offload=offload, split=split, gradient_clipping=0.0, num_parameters=99, cuda=False)


def test_learning_rate_rises_linearly_and_falls_as_half_a_cosine_to_zero() -> None:
    rate = LearningRate(peak=2.0, warmup_steps=4, schedule="cosine", max_steps=12)
    assert [rate(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate(4) == 2.0
    assert math.isclose(rate(8), 1.0)
    assert math.isclose(rate(12), 0.0, abs_tol=1e-12)
    assert LearningRate(peak=2.0, warmup_steps=0, schedule="constant", max_steps=12)(11) == 2.0


def test_an_unknown_optimiser_is_refused_by_name() -> None:
    settings = {"name": "sgdd", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    with pytest.raises(ValueError, match=r"optimizer.name='sgdd'.*radam"):
        build_optimizer(torch.nn.Linear(2, 2), settings)
