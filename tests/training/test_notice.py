"""Notice that a worker will be taken away, as the whole group learns it. Real workers: tests/jobs/test_faults.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mfm_ray.training import notice
from mfm_ray.training.notice import NoticeBoard, Urgency, own_notice


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_news_are_told_once_and_worse_news_again(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Urgency.NONE
    monkeypatch.setattr(notice, "own_notice", lambda: told)
    monkeypatch.setattr(notice, "_ASK_EVERY_S", 0.0)  # in every step
    board = NoticeBoard(torch.device("cpu"))
    heard = []
    for told in (Urgency.NONE, Urgency.DRAINED, Urgency.DRAINED, Urgency.ENDED, Urgency.ENDED):  # noqa: B007
        heard.append(board.news())
    assert heard == [Urgency.NONE, Urgency.DRAINED, Urgency.NONE, Urgency.ENDED, Urgency.NONE]


def test_the_group_is_asked_now_and_then_only(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(notice, "own_notice", lambda: asked.append(1) or Urgency.NONE)
    board = NoticeBoard(torch.device("cpu"))
    for _ in range(200):  # far less than two seconds
        board.news()
    assert 1 <= len(asked) <= 3


def test_sigterm_becomes_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        notice._handle_sigterm()
        os.kill(os.getpid(), signal.SIGTERM)
        assert own_notice() is Urgency.ENDED
    finally:
        notice._told_to_end.clear()
        signal.signal(signal.SIGTERM, before)
