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

        def __call__(self, key, rows):
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
