"""One trial of a sweep over trainings: a run of Ray Train with workers of its own, and what it reports to Ray Tune.

A trainer of Ray Train cannot be given to Ray Tune; the trial is an actor of Tune that runs the very `run_training` of
`jobs.train`, or `run_finetuning` of `jobs.finetune`, in a thread. Every checkpoint of that run brings what was measured
on the averaged model, which Train's controller hands to the trial through an actor. Where a checkpoint is, there can a
trial be stopped, go on after a kill, or be taken over by another one (population based training).
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.train import UserCallback

from mfm_ray.errors import InputError
from mfm_ray.storage import Storage
from mfm_ray.training import checkpoint
from mfm_ray.training.checkpoint import CheckpointError
from mfm_ray.training.checkpoint_store import CHECKPOINTS, Found, newest_checkpoint
from mfm_ray.training.launch import Additions, TrainingError, TrainingResult, run_training
from mfm_ray.training.session import Measure
from mfm_ray.tuning.training_space import set_nested

STEP, FAILURE, LOST, WHOLE, WORKER, TRIAL = "step", "failure", "lost", "whole", "worker", "trial"
FOLDER, INHERITED, STATE = "trainings", "inherited", "trial.json"
_ORIGIN = "origin.json"
_POLL_S = 0.5
_COPIES = 5  # tries to copy a checkpoint while its run goes on and may delete it


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """What all trials share. settings: the plain configuration of the swept job by trial; run: the sweep's folder;
    measure: of the averaged model at each checkpoint; train: the swept job's own training, called as `run_training`;
    mailbox: handle of the `Mailbox` of all trials; reported: by trial, the last step that an earlier call knows of.
    """

    settings: Mapping[int, Mapping[str, Any]]
    run: Storage
    measure: Measure
    train: Callable[..., TrainingResult] = run_training
    mailbox: Any = None
    reported: Mapping[int, int] = field(default_factory=dict)

    def folder(self, index: int) -> Storage:
        return training_folder(self.run, index)


def training_folder(run: Storage, index: int) -> Storage:
    """The folder of one trial's training, laid out as that of `jobs.train`."""
    return run.child(FOLDER, f"{index:05d}")


class TrainingTrial(tune.Trainable):
    """Ray Tune's side of a trial. Its configuration: the trial's number, and the settings that were perturbed."""

    def setup(self, config: dict[str, Any], spec: TrainingSpec) -> None:  # type: ignore[override]
        self._spec, self._index = spec, int(config[TRIAL])
        self._changed = {key: value for key, value in config.items() if key != TRIAL}
        self._attempt: _Attempt | None = None
        self._reported = spec.reported.get(self._index, 0)

    def step(self) -> dict[str, Any]:
        """Waits for the next checkpoint; its figures."""
        if self._attempt is None:
            self._attempt = self._start()
        try:
            report = self._attempt.next_report()
        except TrainingError as error:
            return self._failed(error, lost=not error.would_repeat)
        except InputError as error:  # the driver has checked the settings: it is the cluster or the storage
            return self._failed(error, lost=True)
        self._reported = int(report[STEP])
        return {WORKER: os.getpid(), **report}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """The newest checkpoint of the training, whole, and whose it is."""
        folder = self._spec.folder(self._index)
        found = copy_newest(folder, Path(checkpoint_dir) / CHECKPOINTS)
        Storage(checkpoint_dir).write_json(_ORIGIN, {TRIAL: self._index, STEP: found.state.step})

    def load_checkpoint(self, place: Any) -> None:
        """A trial that was paused goes on where it stands; what another one saved takes the place of all that."""
        origin = Storage(place).read_json(_ORIGIN)
        if origin[TRIAL] != self._index:
            folder = self._spec.folder(self._index)
            note = {"from": origin[TRIAL], STEP: origin[STEP], "changed": self._changed}
            inherit(folder, Path(place) / CHECKPOINTS, note)
            self._reported = int(origin[STEP])

    def _start(self) -> _Attempt:
        folder = self._spec.folder(self._index)
        settings = with_changes(self._spec.settings[self._index], {**self._changed, **changes_of(folder)})
        return _Attempt(settings, folder, self._spec, self._reported)

    def _failed(self, error: Exception, *, lost: bool) -> dict[str, Any]:
        return {WORKER: os.getpid(), STEP: self._reported, FAILURE: str(error), LOST: lost, "done": True}


class _Attempt:
    """A training that goes on in a thread of its own, until its end or that of this process."""

    def __init__(self, settings: Mapping[str, Any], folder: Storage, spec: TrainingSpec, reported: int) -> None:
        self._mailbox, self._address = spec.mailbox, uuid.uuid4().hex
        self._reports: list[dict[str, Any]] = []
        self._last: dict[str, Any] = {}
        self._result: TrainingResult | None = None
        self._error: Exception | None = None
        self._max_steps = int(settings["max_steps"])
        self._unsaid = _figures_of_newest(folder, after=reported)
        additions = Additions(
            measure=spec.measure,
            start_from=folder.child(INHERITED) if folder.is_dir(INHERITED) else None,
            callbacks=[TellTrial(self._mailbox, self._address)],
            shows_progress=False,
        )
        named = {"resume": True, "log": _say_nothing, "additions": additions}
        self._thread = threading.Thread(
            target=self._train, args=(spec.train, settings, folder), kwargs=named, daemon=True
        )
        self._thread.start()

    def _train(self, train: Callable[..., TrainingResult], *arguments: Any, **named: Any) -> None:
        try:
            self._result = train(*arguments, **named)
        except Exception as error:  # raised again in the trial's own thread
            self._error = error

    def next_report(self) -> dict[str, Any]:
        """The figures of the next checkpoint; those of the last one come when the training has ended."""
        self._last, self._unsaid = self._unsaid or self._wait(), None
        if self._last[STEP] >= self._max_steps:
            self._thread.join()
        if self._thread.is_alive() or self._error is not None or self._look():
            return self._last
        return {**self._last, WHOLE: True, "done": True}

    def _wait(self) -> dict[str, Any]:
        while True:
            was_alive = self._thread.is_alive()
            if self._look():
                return self._reports.pop(0)
            if was_alive:
                time.sleep(_POLL_S)
                continue
            if self._error is not None:
                raise self._error
            assert self._result is not None
            return {**self._last, **self._result.metrics}

    def _look(self) -> bool:
        """Whether there are reports that were not handed on."""
        self._reports += ray.get(self._mailbox.take.remote(self._address))
        return bool(self._reports)


@ray.remote(num_cpus=0)
class Mailbox:
    """Reports of trainings on the way to their trials, one for the whole sweep."""

    def __init__(self) -> None:
        self._reports: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def put(self, address: str, report: dict[str, Any]) -> None:
        self._reports[address].append(report)

    def take(self, address: str) -> list[dict[str, Any]]:
        """All that came since the last call, in its order."""
        return self._reports.pop(address, [])


class TellTrial(UserCallback):
    """Hands the figures of every checkpoint to the trial; called in Ray Train's controller."""

    def __init__(self, mailbox: Any, address: str) -> None:
        self._mailbox, self._address = mailbox, address

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        # waited for, so that a report is there when the training has ended
        ray.get(self._mailbox.put.remote(self._address, metrics[0]))


def with_changes(settings: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with perturbed keys in them."""
    whole = copy.deepcopy(dict(settings))
    for key, value in changed.items():
        set_nested(whole, key, value, f"space.{key}")
    return whole


def copy_newest(run: Storage, target: Path) -> Found:
    """Copy the newest checkpoint of a training that goes on meanwhile. CheckpointError when there is none."""
    for attempt in range(_COPIES):
        found = newest_checkpoint(run)
        if found is None:
            break
        shutil.rmtree(target, ignore_errors=True)
        try:
            found.storage.download_dir("", target)
            return Found(Storage(target), checkpoint.read_state(Storage(target)))
        except (CheckpointError, FileNotFoundError, OSError):
            if attempt == _COPIES - 1:
                raise
    raise CheckpointError(f"{run.uri_of(CHECKPOINTS)}: holds no checkpoint yet")


def inherit(folder: Storage, found: Path, note: Mapping[str, Any]) -> None:
    """Let a training go on from another one's checkpoint: its own are gone, its history stays."""
    with tempfile.TemporaryDirectory(prefix="mfm-ray-inherit-") as scratch:
        staged = Path(scratch) / INHERITED
        shutil.copytree(found, staged)
        folder.upload_dir(staged, INHERITED, marker=checkpoint.manifest_name(0))
    exploits = [*_state_of(folder).get("exploits", []), dict(note)]
    folder.write_json(STATE, {"exploits": exploits})
    folder.delete(CHECKPOINTS)


def exploits_of(folder: Storage) -> list[dict[str, Any]]:
    """What a trial took over from others: trial and step it came from, and the settings from then on."""
    return list(_state_of(folder).get("exploits", []))


def changes_of(folder: Storage) -> dict[str, Any]:
    """The settings that a trial has now beside those of its point."""
    exploits = exploits_of(folder)
    return dict(exploits[-1]["changed"]) if exploits else {}


def _state_of(folder: Storage) -> dict[str, Any]:
    return folder.read_json(STATE) if folder.is_file(STATE) else {}


def _figures_of_newest(folder: Storage, *, after: int) -> dict[str, Any] | None:
    """The figures that a killed driver has not heard of, None when it has heard of the newest checkpoint."""
    found = newest_checkpoint(folder)
    return {**found.state.figures, STEP: found.state.step} if found is not None and found.state.step > after else None


def _say_nothing(line: str) -> None:
    """Progress is told by the sweep, a trial at a time."""
