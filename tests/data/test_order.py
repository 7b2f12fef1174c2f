import pytest
import torch

from mfm_ray.data.batch import read_batch
from mfm_ray.data.datasets import Split
from mfm_ray.data.order import SampleOrder
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError


def sequence(order, num_steps, world_size=1):
    parts = [order.rows(step, rank, world_size) for step in range(num_steps) for rank in range(world_size)]
    return torch.cat(parts)


@pytest.mark.parametrize(("num_rows", "batch"), [(10, 4), (10, 10), (7, 12), (3, 20), (1, 2), (100, 1)])
def test_every_epoch_is_a_permutation_and_no_row_is_dropped(num_rows, batch):
    order = SampleOrder(num_rows=num_rows, seed=3, global_batch_size=batch)
    rows = sequence(order, 5 * num_rows)
    for epoch in rows[: len(rows) // num_rows * num_rows].split(num_rows):
        assert torch.equal(epoch.sort().values, torch.arange(num_rows))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_the_union_over_workers_does_not_depend_on_their_number(world_size):
    order = SampleOrder(num_rows=31, seed=0, global_batch_size=12)
    assert torch.equal(sequence(order, 10, world_size), sequence(order, 10))
    positions = [order.positions(rank, world_size) for rank in range(world_size)]
    assert [row for part in positions for row in part] == list(range(12))


def test_a_fresh_order_resumes_at_any_step():
    order = SampleOrder(num_rows=13, seed=1, global_batch_size=5)
    batches = [order.rows(step, 0, 5) for step in range(40)]
    for step in (39, 17, 2, 0):
        resumed = SampleOrder(num_rows=13, seed=1, global_batch_size=5)
        assert torch.equal(resumed.rows(step, 0, 5), batches[step])


def test_resume_far_ahead_costs_no_more_than_one_epoch():
    order = SampleOrder(num_rows=50, seed=0, global_batch_size=64)
    assert order.rows(10**9).shape == (64,)
    assert order.epoch(10**9) == 64 * 10**9 // 50


def test_epochs_and_seeds_have_their_own_permutations():
    def permutation(seed, epoch):
        return tuple(SampleOrder(num_rows=20, seed=seed, global_batch_size=20).rows(epoch).tolist())

    assert len({permutation(seed, epoch) for seed in (0, 1, -1, 2**40) for epoch in range(5)}) == 20


def test_the_permutation_is_the_same_on_every_machine_and_forever():
    order = SampleOrder(num_rows=8, seed=0, global_batch_size=8)
    assert order.rows(0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert order.rows(1).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]


def test_rows_are_shuffled_uniformly():
    """Mean position of each row over 400 epochs: within 5 standard errors of the middle."""
    num_rows, epochs = 11, 400
    order = SampleOrder(num_rows=num_rows, seed=5, global_batch_size=num_rows)
    position = torch.stack([order.rows(epoch).argsort().double() for epoch in range(epochs)])
    error = ((num_rows**2 - 1) / 12 / epochs) ** 0.5
    assert (position.mean(0) - (num_rows - 1) / 2).abs().max() < 5 * error


def test_parts_of_workers_that_do_not_divide_the_batch_differ_by_a_row_at_most():
    order = SampleOrder(num_rows=10, seed=0, global_batch_size=8)
    parts = [order.rows(3, rank, 3) for rank in range(3)]
    assert sorted(map(len, parts)) == [2, 3, 3]
    assert torch.equal(torch.cat(parts), order.rows(3))
    with pytest.raises(ValueError, match="rank=2"):
        order.rows(0, 2, 2)


@pytest.mark.parametrize("field", ["num_rows", "global_batch_size"])
def test_sizes_below_one_are_refused_by_name(field):
    with pytest.raises(InputError, match=f"{field}=0"):
        SampleOrder(**{"num_rows": 4, "seed": 0, "global_batch_size": 4, field: 0})


def test_batches_carry_model_space_data_labels_and_positions():
    split = Split(torch.linspace(0, 1, 6).reshape(6, 1, 1, 1), torch.arange(6))
    order = SampleOrder(num_rows=6, seed=0, global_batch_size=4)
    space = DataSpace(kind="image", event_shape=(1, 1, 1))
    batch = read_batch(split, space, order, 1, rank=1, world_size=2)
    assert torch.equal(batch.label, order.rows(1, 1, 2))
    torch.testing.assert_close(batch.data.flatten(), batch.label / 5 * 2 - 1)
    assert batch.rows.tolist() == [2, 3]
    pieces = list(batch.to("cpu").split([1, 1]))
    assert [len(piece) for piece in pieces] == [1, 1]
    assert torch.equal(torch.cat([piece.data for piece in pieces]), batch.data)
    assert [int(piece.rows) for piece in pieces] == [2, 3]


def test_data_without_labels_gives_none():
    split = Split(torch.randn(4, 2), torch.full((4,), -1))
    order = SampleOrder(num_rows=4, seed=0, global_batch_size=2)
    batch = read_batch(split, DataSpace(kind="coordinates", event_shape=(2,)), order, 0)
    assert batch.label is None
    assert next(batch.split([1, 1])).label is None
