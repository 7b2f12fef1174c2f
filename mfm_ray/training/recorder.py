"""What leaves a worker while it trains: metrics, progress, sample grids, checkpoints."""

from __future__ import annotations

import math
import time

import ray.train
import torch
from torch import Tensor

from mfm_ray.flow_map import FlowMap
from mfm_ray.training.background import Background
from mfm_ray.training.checkpoint_store import CHECKPOINTS, Retention, folder_name, next_number
from mfm_ray.training.device_peaks import memory_peak
from mfm_ray.training.diverged import with_batches
from mfm_ray.training.evaluation import Evaluations, hacked
from mfm_ray.training.metrics_log import MetricsLog, TrainingDiverged
from mfm_ray.training.progress import ProgressState
from mfm_ray.training.sample_grid import write_sample_grid
from mfm_ray.training.session import Measure, Training
from mfm_ray.training.snapshot import Snapshot, SnapshotMaker
from mfm_ray.training.trackers import open_trackers


class Recorder:
    """What leaves the worker: metrics, progress, sample grids, checkpoints. Its methods are collective.

    written: step of the newest checkpoint of which this worker's part is complete.

    A context: leaving it closes the log and the trackers, which learn whether the run failed.
    """

    def __init__(self, training: Training, start: int) -> None:
        self._training = training
        self._log = self._open_log(start) if training.rank == 0 else None
        self._trackers = open_trackers(training.config, training.plan.run) if training.rank == 0 else []
        evaluates = training.rank == 0 and training.plan.evaluator is not None
        self._evaluations = Evaluations(training.plan.evaluator, start=start) if evaluates else None
        if self._evaluations is not None and start == 0:
            self._evaluations.submit(0, None)
        self._background, self._snapshots = Background("checkpoint"), SnapshotMaker(training)
        config = training.config
        self._retention = Retention(
            training.plan.run,
            newest=config.checkpoints_to_keep,
            best=config.best_checkpoints_to_keep,
            score=config.checkpoint_score,
            order=config.checkpoint_score_order,
        )
        self._number = self._first_number()
        self.written = start
        self._last_step = start
        self._interval_began = time.monotonic()
        self.figures: dict[str, float] = {"step": start, "seconds": training.seconds}

    def _open_log(self, start: int) -> MetricsLog:
        run = self._training.plan.run
        return self._training.patience.insist("the metrics", lambda: MetricsLog(run, resume_step=start))

    def _first_number(self) -> int:
        """The number of this attempt's first checkpoint, which rank 0 looks up for all. Collective."""
        training = self._training
        number = next_number(training.plan.run) if training.rank == 0 else 0
        answer = torch.tensor([number], dtype=torch.int64, device=training.engine.device)
        torch.distributed.broadcast(answer, src=0)
        return int(answer[0])

    @property
    def line_every(self) -> list[int]:
        """Steps after whose multiples there is a line of history: also before whatever leaves the worker."""
        config = self._training.config
        return [every for every in (config.log_every, config.checkpoint_every, config.sample_every) if every]

    def record(self, done: int, *, last: bool) -> bool:
        """Average the figures since the last call; write a line of history. Whether an evaluation ends the run."""
        training = self._training
        means = training.work.derived(self._means()) | training.buckets.flush()
        interval = time.monotonic() - self._interval_began
        numbers = {
            **means,
            "learning_rate": training.learning_rate(done - 1),
            **training.throughput.rates(range(self._last_step, done), interval),
            "data_seconds": training.data_seconds,
            "compute_seconds": max(0.0, interval - training.data_seconds),
            "memory_peak_bytes": memory_peak(training.engine.device),
            "seconds": training.seconds,
        }
        training.data_seconds = 0.0
        *earlier, newest = self._evaluated(last) or [{}]
        numbers |= newest
        self.figures = {"step": done, **numbers}
        for line in (*earlier, numbers):
            if self._log is not None and (refusal := self._log.write(done, line)) is not None:
                training.heartbeat.say(f"the metrics of step {done} are kept back: {refusal}")
            for tracker in self._trackers:
                tracker.log(done, line)
        if self._log is not None:
            self._tell_progress(done, numbers)
        self._begin_interval(done)
        return self._is_hacked()

    def _means(self) -> dict[str, float]:
        """The figures of the steps since the last line. TrainingDiverged, with the batch saved that did it."""
        try:
            return self._training.window.flush()
        except TrainingDiverged as error:
            raise with_batches(self._training, error) from None

    def evaluate(self, done: int) -> None:
        """Hand the averaged weights to the evaluator, which takes its time."""
        weights = self._averaged_weights()
        if self._evaluations is not None:
            self._evaluations.submit(done, weights)

    def _evaluated(self, last: bool) -> list[dict[str, float]]:
        """What evaluations have found since the last line; at the end those that are not done yet are waited for."""
        return [] if self._evaluations is None else self._evaluations.collect(wait=last)

    def _is_hacked(self) -> bool:
        """Whether rank 0 sees the reward hacked; all are told."""
        training = self._training
        if not training.work.stop_on_hacking:
            return False
        seen = self._evaluations is not None and hacked(self._evaluations.history) is not None
        answer = torch.tensor([seen], dtype=torch.int64, device=training.engine.device)
        torch.distributed.broadcast(answer, src=0)
        self.figures["evaluation.hacked"] = float(answer[0])
        return bool(answer[0])

    def draw_samples(self, done: int) -> None:
        """A picture of samples of the averaged model; rank 0 draws, all take part in gathering the weights."""
        training, weights = self._training, self._averaged_weights()
        if training.rank == 0:
            samples = training.work.pictures(weights, training.engine.device)
            if samples:
                training.patience.insist("the samples", lambda: write_sample_grid(training.plan.run, done, samples))
        self._begin_interval(done)

    def _averaged_weights(self) -> dict[str, Tensor]:
        """The averaged model on rank 0, nothing on the others, which take part in gathering it."""
        training, weights = self._training, {}
        for name, tensor in training.ema.full_tensors(training.flow_map):
            if training.rank == 0:
                weights[name] = tensor.to("cpu", copy=True)
        return weights

    def save_checkpoint(self, done: int) -> None:
        """Keep where the run stands, with what the plan measures on the averaged model. TrainingDiverged as there.

        The state is copied here and written by a thread while training goes on; at most one is under way, and what goes
        wrong is raised by the next step.
        """
        if self._training.plan.measure is not None:
            self.figures = self.figures | self._measured(self._training.plan.measure, done)
        if self._retention.best:
            self._retention.score_of(self.figures)
        self._background.wait()
        snapshot = self._snapshots.take(done, self.figures)
        number, self._number = self._number, self._number + 1
        if self._log is not None:
            self._training.patience.insist("the metrics", self._log.flush)
        self._background.start(lambda: self._put_away(snapshot, number, done))
        if self._training.plan.reports:
            self._report(done)
        self._begin_interval(done)

    def check(self) -> None:
        """Raise what went wrong while a checkpoint was written."""
        self._background.check()

    def complete(self) -> None:
        """Return when the last checkpoint is whole, all workers' parts of it. Collective."""
        self._background.wait()
        torch.distributed.barrier()

    def finish(self) -> None:
        """Wait for the last checkpoint, and remove what need not stay. Collective."""
        self.complete()
        if self._training.rank == 0:
            self._retention.prune(before=self._number)

    def _put_away(self, snapshot: Snapshot, number: int, done: int) -> None:
        """Runs in the thread. Storage may be away for a while."""
        run, patience = self._training.plan.run, self._training.patience
        if self._log is not None:
            patience.insist("earlier checkpoints", lambda: self._retention.prune(before=number))
            patience.insist("the metrics", self._log.upload)
        folder = run.child(CHECKPOINTS, folder_name(number, done))
        patience.insist(f"the checkpoint of step {done}", lambda: snapshot.write(folder))
        self._training.heartbeat.checkpoint = self.written = done

    def _report(self, done: int) -> None:
        """Tell Ray Train's callbacks, who may look for the checkpoint at once. Collective."""
        self._background.wait()
        ray.train.report({**self.figures, "step": done})

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._background.settle()  # a checkpoint that is under way is good whatever ended the run after it
        if self._log is not None:
            self._close_log(self._log, failed=kind is not None)
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)

    def _close_log(self, log: MetricsLog, *, failed: bool) -> None:
        if not failed:
            self._training.patience.insist("the metrics", log.close)
            return
        try:
            log.close()
        except OSError as error:  # what failed first is what the run ends with
            self._training.heartbeat.say(f"the metrics of the last steps are lost: {error}")

    def _averaged_model(self) -> FlowMap | None:
        """The averaged model on rank 0's device, None on the others, which take part in gathering it. Collective."""
        training, weights = self._training, self._averaged_weights()
        return training.work.model(weights, training.engine.device) if training.rank == 0 else None

    def _measured(self, measure: Measure, done: int) -> dict[str, float]:
        """What rank 0 measures, on all ranks; its seconds are none of training. Collective.

        Raises TrainingDiverged, on every rank alike, naming a figure that is not finite.
        """
        began = time.monotonic()
        model = self._averaged_model()
        found: list[dict[str, float]] = [measure(model) if model is not None else {}]
        torch.distributed.broadcast_object_list(found, src=0)
        for name, value in found[0].items():
            if not math.isfinite(value):
                raise TrainingDiverged(f"step {done}: {name} of the averaged model is {value}")
        self._training.seconds_before -= time.monotonic() - began
        return found[0]

    def _tell_progress(self, done: int, numbers: dict[str, float]) -> None:
        if self._training.plan.progress is not None:
            state = ProgressState(
                step=done,
                max_steps=self._training.config.max_steps,
                loss=numbers["loss"],
                images_per_second=numbers["images_per_second"],
                steps_per_second=numbers["steps_per_second"],
            )
            self._training.plan.progress.tell.remote(state)

    def _begin_interval(self, done: int) -> None:
        self._last_step, self._interval_began = done, time.monotonic()
