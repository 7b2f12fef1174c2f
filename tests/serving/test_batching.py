"""Dynamic batching of reward calls."""

import threading

import numpy as np
import pytest

from serve.batching import Batcher


@pytest.fixture
def gate():
    """An evaluation that waits until it is let go, and what it was called with."""

    class Gate:
        def __init__(self):
            self.open, self.seen = threading.Event(), []

        def __call__(self, key, rows, labels):
            self.open.wait(30)
            self.seen.append((key, len(rows)))
            if (rows < 0).any():
                raise ValueError("negative")
            return rows.sum(1), rows * 2

    return Gate()


def rows(count, value=1.0):
    return np.full((count, 3), value, np.float32)


def test_what_piles_up_is_one_evaluation_for_each_key_and_everybody_gets_their_rows(gate):
    batcher = Batcher(gate, max_rows=100, name="test")
    first = batcher.submit("a", rows(1))
    while batcher.waiting_rows:  # until the thread has taken the first
        pass
    later = [batcher.submit(key, rows(2, value)) for key, value in (("a", 1), ("b", 2), ("a", 3))]
    gate.open.set()
    sums = [future.result(30)[0].tolist() for future in (first, *later)]
    assert sums == [[3], [3, 3], [6, 6], [9, 9]]
    assert gate.seen == [("a", 1), ("a", 4), ("b", 2)]
    batcher.close()


def test_a_batch_keeps_its_size(gate):
    batcher = Batcher(gate, max_rows=4, name="test")
    futures = [batcher.submit("a", rows(3)) for _ in range(3)] + [batcher.submit("a", rows(9))]
    gate.open.set()
    for future in futures:
        future.result(30)
    assert [count for _, count in gate.seen] == [3, 3, 3, 9]
    batcher.close()


def test_one_callers_samples_are_not_anothers_error(gate):
    batcher = Batcher(gate, max_rows=100, name="test")
    first = batcher.submit("a", rows(1))
    while batcher.waiting_rows:
        pass
    good, bad = batcher.submit("a", rows(2)), batcher.submit("a", rows(2, -1))
    gate.open.set()
    assert first.result(30)[0].tolist() == [3]
    assert good.result(30)[0].tolist() == [3, 3]
    with pytest.raises(ValueError, match="negative"):
        bad.result(30)
    assert batcher.healthy
    batcher.close()


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def order(gate, submitted, *, patience_s, max_rows=100):
    """Keys and rows in the order of their evaluation; submitted: (time, key, background), 2 rows each."""
    clock = Clock()
    batcher = Batcher(gate, max_rows=max_rows, name="test", patience_s=patience_s, clock=clock)
    futures = [batcher.submit("running", rows(1))]
    while batcher.waiting_rows:
        pass
    for clock.now, key, background in submitted:
        futures.append(batcher.submit(key, rows(2), background=background))
    gate.open.set()
    for future in futures:
        future.result(30)
    batcher.close()
    return gate.seen[1:]


def test_calls_in_the_background_let_pass_what_comes_soon_after_them_and_nothing_later(gate):
    training, sampler = True, False
    submitted = [(0.0, "t", training), (0.5, "a", sampler), (0.9, "b", sampler), (1.5, "c", sampler)]
    assert [key for key, _ in order(gate, submitted, patience_s=1.0)] == ["a", "b", "t", "c"]


def test_no_stream_of_samplers_however_dense_keeps_a_training_waiting(gate):
    submitted = [(0.0, "t", True), *((0.01 * number, f"s{number}", False) for number in range(1, 500))]
    keys = [key for key, _ in order(gate, submitted, patience_s=1.0)]
    assert keys.index("t") == 99  # after those of the second that it lets pass


def test_calls_in_the_background_keep_their_own_order_and_share_evaluations_with_each_other_alone(gate):
    submitted = [(0.0, "x", True), (0.1, "x", True), (0.2, "x", False), (0.3, "x", False), (0.4, "y", True)]
    assert order(gate, submitted, patience_s=10.0) == [("x", 4), ("x", 4), ("y", 2)]


def test_without_patience_calls_are_answered_as_they_come(gate):
    submitted = [(0.0, "t", True), (0.5, "a", False)]
    assert [key for key, _ in order(gate, submitted, patience_s=0.0)] == ["t", "a"]
