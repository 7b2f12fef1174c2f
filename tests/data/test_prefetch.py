"""A thread that works ahead: the same items in the same order, never more than allowed, errors where they belong."""

import threading
import time
import traceback

import pytest

from mfm_ray.data.prefetch import Prefetcher


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_items_come_in_order_and_any_step_can_be_asked_for():
    prefetcher = Prefetcher(lambda step: step * step, end=20)
    assert [prefetcher.take(step) for step in (*range(5), *range(3, 20), 7, 8)] == [
        step * step for step in (*range(5), *range(3, 20), 7, 8)
    ]
    prefetcher.close()
    assert threads() == []


@pytest.mark.parametrize("ahead", [1, 2])
def test_at_most_so_many_items_are_made_ahead(ahead):
    made = []
    prefetcher = Prefetcher(lambda step: made.append(step), end=100, ahead=ahead)
    for step in (0, 1, 2):
        prefetcher.take(step)
        wait_until(lambda step=step: len(made) == step + 1 + ahead)
        time.sleep(0.02)
        assert made == list(range(step + 1 + ahead))
    prefetcher.close()


def test_the_work_is_done_before_it_is_asked_for():
    prefetcher = Prefetcher(lambda step: threading.current_thread().name, end=10)
    assert prefetcher.take(0) == "prefetch"
    prefetcher.close()


def test_nothing_is_made_past_the_end_and_the_thread_ends_there():
    made = []
    prefetcher = Prefetcher(made.append, end=3)
    for step in range(3):
        prefetcher.take(step)
    wait_until(lambda: threads() == [])
    assert made == [0, 1, 2]
    prefetcher.take(3)  # a step beyond is made when it is really asked for
    prefetcher.close()


def broken_reader(step):
    if step == 3:
        raise OSError("shard 7 is gone")
    return step


def test_an_error_surfaces_in_its_own_step_with_the_traceback_of_the_thread():
    prefetcher = Prefetcher(broken_reader, end=10)
    assert [prefetcher.take(step) for step in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="shard 7 is gone") as caught:
        prefetcher.take(3)
    assert "broken_reader" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert threads() == []


def test_closing_ends_the_thread_wherever_it_is():
    entered, leave = threading.Event(), threading.Event()

    def slow(step):
        entered.set()
        leave.wait()
        return step

    prefetcher = Prefetcher(slow, end=10)
    taker = threading.Thread(target=prefetcher.take, args=(0,))
    taker.start()
    assert entered.wait(5)
    leave.set()
    taker.join()
    prefetcher.close()
    prefetcher.close()
    assert threads() == []
    full = Prefetcher(lambda step: step, end=10)
    full.take(0)
    time.sleep(0.02)  # the thread now waits for room
    full.close()
    assert threads() == []
