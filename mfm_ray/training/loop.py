"""The training loop: what Ray Train runs in each worker, the same on one CPU and on many GPUs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch

from mfm_ray.storage import Storage
from mfm_ray.training.agreement import agree
from mfm_ray.training.checkpoint import CheckpointError
from mfm_ray.training.checkpoint_store import CHECKPOINTS, Found, complete_checkpoints, passed_over
from mfm_ray.training.heartbeat import CHECKPOINT, DATA, END, SAMPLE, STEP, Heartbeat, beat_every
from mfm_ray.training.metrics_log import TrainingDiverged
from mfm_ray.training.notice import NoticeBoard, Urgency, WorkerEnded, own_notice
from mfm_ray.training.recorder import Recorder
from mfm_ray.training.session import Plan, Training, set_up
from mfm_ray.training.snapshot import read_checkpoint
from mfm_ray.training.target_feed import TargetsError


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train to the end, or report an error that another attempt would meet again.

    Such an error is raised on all ranks alike, so returning it ends the group at once; anything else is raised, and
    Ray Train restarts the group from its last checkpoint.
    """
    try:
        return {"metrics": train(settings["plan"])}
    except (CheckpointError, TrainingDiverged, TargetsError) as error:
        return {"error": error}


def train(plan: Plan) -> dict[str, float]:
    """The run of one worker; the last figures, which all ranks share."""
    every_s = beat_every(float(plan.config["faults"]["hang_timeout_s"]), torch.distributed.get_world_size())
    with Heartbeat(plan.monitor, every_s) as heartbeat:
        training = set_up(plan)
        training.heartbeat = heartbeat
        start = restore(training)
        heartbeat.begin(start)
        with closing(training.feed), Recorder(training, start) as recorder:
            run_steps(training, recorder, start)
    return recorder.figures


def run_steps(training: Training, recorder: Recorder, start: int) -> None:
    """Every step from `start` to the end, and what is due after each. Collective."""
    config = training.config
    heartbeat, board = training.heartbeat, NoticeBoard(training.engine.device)
    deadline = Deadline(config.max_seconds, already=training.seconds_before, device=training.engine.device)
    for step in range(start, config.max_steps):
        training_step(training, step)
        recorder.check()
        done = step + 1
        last = done == config.max_steps or deadline.reached(done)
        notice = board.news()
        if training.work.evaluate_every and (last or done % training.work.evaluate_every == 0):
            recorder.evaluate(done)
        if last:
            heartbeat.at(END, done)  # what is left may wait for an evaluation
        if last or notice or any(done % every == 0 for every in recorder.line_every):
            last = recorder.record(done, last=last) or last
        sample = config.sample_every > 0 and (last or done % config.sample_every == 0)
        save = last or notice or done % config.checkpoint_every == 0
        if sample:
            heartbeat.at(SAMPLE, done)
            recorder.draw_samples(done)
        if save:
            heartbeat.at(CHECKPOINT, done)
            recorder.save_checkpoint(done)
        if notice is Urgency.ENDED and not last:
            recorder.finish()
        if notice is Urgency.ENDED and not last and own_notice() is Urgency.ENDED:
            raise WorkerEnded(f"told to end in step {done} (SIGTERM); its checkpoint is written")
        if last:
            break
    recorder.finish()


def training_step(training: Training, step: int) -> None:
    """One optimiser step: this worker's micro-batches, the update, the moving average."""
    engine, figures, began = training.engine, [], time.perf_counter()
    training.heartbeat.at(DATA, step)
    batches = training.feed.take(step)
    training.heartbeat.at(STEP, step)
    training.data_seconds += time.perf_counter() - began
    for micro_batch, weight in zip(batches, training.split.weights(training.rank), strict=True):
        loss, noted = engine.forward(*micro_batch, step)
        engine.backward(loss * weight)
        engine.step(training.learning_rate(step))
        figures.append(noted)
    training.ema.update()
    training.note(step, torch.stack(figures))


def restore(training: Training) -> int:
    """Go on from the run's newest good checkpoint, else from that of another run where the plan names one.

    The steps that are done. A damaged checkpoint is named and the one before taken; CheckpointError when all are.
    Collective.
    """
    found = _choices(training)
    damage: CheckpointError | None = None
    while (folder := _told_by_first(training, found)) is not None:
        try:
            done = read_checkpoint(training, folder)
        except CheckpointError as error:
            damage = damage or error
            training.say(passed_over(error))
        else:
            if damage is not None:
                training.say(f"going on from step {done}")
            return done
    if damage is not None:
        raise damage
    return 0 if training.plan.start_from is None else read_checkpoint(training, training.plan.start_from)


def _choices(training: Training) -> Iterator[Found]:
    """Rank 0 looks, and what it finds is what all take."""
    return complete_checkpoints(training.plan.run, training.say) if training.rank == 0 else iter(())


def _told_by_first(training: Training, found: Iterator[Found]) -> Storage | None:
    """Rank 0's next choice, None when it has no more. CheckpointError on all ranks when it met only damage."""
    choice = agree(lambda: next(found, None))
    told = [None if choice is None else choice.storage.name]
    torch.distributed.broadcast_object_list(told, src=0, device=training.engine.device)
    return None if told[0] is None else training.plan.run.child(CHECKPOINTS, told[0])


class Deadline:
    """Whether the time for training is up: rank 0's clock decides for all, asked about once a second."""

    def __init__(self, max_seconds: float | None, *, already: float, device: torch.device) -> None:
        self._max_seconds = max_seconds
        self._already = already
        self._device = device
        self._started = time.monotonic()
        self._steps = 0
        self._ask_again_in = 1

    def reached(self, step: int) -> bool:
        """Called after every step. Collective in the steps in which rank 0 is asked."""
        self._steps += 1
        self._ask_again_in -= 1
        if self._max_seconds is None or self._ask_again_in > 0:
            return False
        spent = time.monotonic() - self._started
        left = self._max_seconds - self._already - spent
        wait = max(1, int(self._steps / max(spent, 1e-6) * min(1.0, left / 2)))
        answer = torch.tensor([left <= 0, wait], dtype=torch.int64, device=self._device)
        torch.distributed.broadcast(answer, src=0)
        over, self._ask_again_in = bool(answer[0]), int(answer[1])
        return over
