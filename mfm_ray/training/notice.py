"""Notice that a worker will be taken away: a checkpoint first, then it may go.

Two ways bring it. Ray's own: a node is drained (a spot instance is reclaimed, `ray drain-node`), which Ray Train tells
all workers. And SIGTERM to a worker's process, which Ray would answer by ending it within a poll.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from enum import IntEnum
from types import FrameType
from typing import Any

import torch
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

_ASK_EVERY_S = 2.0
_told_to_end = threading.Event()


class Urgency(IntEnum):
    """NONE: go on. DRAINED: checkpoint now, and go on until the node is gone. ENDED: checkpoint now, then leave."""

    NONE = 0
    DRAINED = 1
    ENDED = 2


class WorkerEnded(RuntimeError):
    """A worker was told to end by SIGTERM; its state is in a checkpoint."""


class SigtermIsNotice(WorkerGroupCallback):
    """Makes SIGTERM to a worker a notice. Ray Train runs it on its controller, where alone the main threads of workers
    can be reached: the training itself runs beside them, and only a main thread may set a handler.
    """

    def after_worker_group_start(self, worker_group: Any) -> None:
        worker_group.execute(_handle_sigterm)


def _handle_sigterm() -> None:
    _told_to_end.clear()
    signal.signal(signal.SIGTERM, _note_sigterm)


def _note_sigterm(number: int, frame: FrameType | None) -> None:
    if _told_to_end.is_set():
        os._exit(1)  # told twice
    _told_to_end.set()


class NoticeBoard:
    """Whether any worker of the group has notice: all learn it in the same step, asked about every two seconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began, self._steps, self._ask_in = time.monotonic(), 0, 1
        self._heard = Urgency.NONE

    def news(self) -> Urgency:
        """What is new since the last call. Called after every step; collective in those in which all are asked."""
        self._steps += 1
        self._ask_in -= 1
        if self._ask_in > 0:
            return Urgency.NONE
        seconds_a_step = (time.monotonic() - self._began) / self._steps
        wait = max(1, int(_ASK_EVERY_S / max(seconds_a_step, 1e-6)))
        self._began, self._steps = time.monotonic(), 0
        answer = torch.tensor([int(own_notice()), wait], dtype=torch.int64, device=self._device)
        torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MAX)
        urgency, self._ask_in = Urgency(int(answer[0])), int(answer[1])
        if urgency <= self._heard:
            return Urgency.NONE
        self._heard = urgency
        return urgency


def own_notice() -> Urgency:
    """What this worker has been told."""
    if _told_to_end.is_set():
        return Urgency.ENDED
    from ray.train.v2._internal.execution import context

    if context._train_context is None:  # not a worker of Ray Train's: no node is drained under it
        return Urgency.NONE
    # not ray.train.get_preemption_info(): that is a barrier through an actor, and the group agrees by itself here
    return Urgency.DRAINED if context.get_train_context().preemption_context.preemption_info else Urgency.NONE
