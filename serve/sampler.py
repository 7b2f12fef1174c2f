"""The sampler: an engine behind a deployment. Requests come in, events go out; all stepping is the library's."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ray import serve

from mfm_ray.building import build_steering
from mfm_ray.engine import Engine, EngineClosedError, Job, Snapshot, Ticket
from mfm_ray.engine import Finished as Samples
from mfm_ray.networks.computation import computed
from mfm_ray.pretrained import load_flow_map
from mfm_ray.rewards import RewardError
from mfm_ray.steering import Reward, Steering, Unguided, score

from .autoscaling import CALLS, ROWS, with_policy
from .direct import DirectPath
from .errors import first_line
from .generation import Accepted, Event, Failed, Finished, Generation, Preview, Progress, Refused, RewardChoice
from .metrics import PassRecorder, SamplerMetrics
from .models import ModelCard
from .remote_reward import Line, RemoteReward, RewardDownError, SmallestPart, SumOfParts
from .resolve import rows_of
from .reward import BuiltRewards, canonical
from .settings import RewardSettings, SamplerSettings

log = logging.getLogger(__name__)

_JOBS = ("jobs_running", "jobs_waiting")
_AFTER_DEADLINE_S = 1.0
_COMBINED = {"sum": SumOfParts, "minimum": SmallestPart}
"""As `generation.COMBINED`, remote parts being asked at the same time."""
_OUTCOMES = ThreadPoolExecutor(1024, thread_name_prefix="outcome")
"""Apart from asyncio's few threads: outcomes are scored, and a reward that hangs must not hold back the others."""


class RequestRewards:
    """The rewards of requests, in deployments or in this process; one object for equal wishes, so that the engine sees
    that they are equal."""

    def __init__(
        self,
        cards: Sequence[ModelCard],
        rewards: Sequence[RewardSettings],
        handles: Mapping[str, Any],
        *,
        capacity: int = 256,
    ) -> None:
        self._settings = {reward.name: reward for reward in rewards}
        self._lines = {name: _line_to(handle, self._settings[name]) for name, handle in handles.items()}
        weights = {reward.name: reward.weights for reward in rewards}
        self._built = BuiltRewards(cards, capacity=capacity, weights=weights)
        self._parts: OrderedDict[Any, Reward] = OrderedDict()
        self._capacity, self._lock = capacity, threading.RLock()

    def of(self, generation: Generation) -> dict[str, Reward]:
        """The request's rewards by title. InputError for parameters that do not fit together."""
        return {choice.title: self.part(generation.model, choice) for choice in generation.rewards}

    def part(self, model: str, choice: RewardChoice) -> Reward:
        params = canonical(choice.params)
        key = (model, choice.name, choice.title, params)
        return self._kept(key, lambda: self._part(model, choice, params))

    def colocated(self, model: str, name: str, params: str) -> Reward:
        with self._lock:
            return self._built.get(model, name, params)

    def total(self, generation: Generation) -> Reward:
        """All together as the request says, or the only reward when its weight is 1."""
        parts = self.of(generation)
        weights = [choice.weight for choice in generation.rewards]
        if len(parts) == 1 and weights == [1.0]:
            return next(iter(parts.values()))
        key = (generation.combine, tuple(id(part) for part in parts.values()), tuple(weights))
        return self._kept(key, lambda: _COMBINED[generation.combine](rewards=list(parts.values()), weights=weights))

    def _part(self, model: str, choice: RewardChoice, params: str) -> Reward:
        if choice.name in self._lines:
            return RemoteReward(self._lines[choice.name], name=choice.title, model=model, params=params)
        return _Titled(self._built.get(model, choice.name, params), choice.title)

    def _kept(self, key: Any, make: Any) -> Reward:
        with self._lock:  # a reward is loaded once, however many requests begin with it
            if key not in self._parts:
                self._parts[key] = make()
                while len(self._parts) > self._capacity:
                    self._parts.popitem(last=False)
            self._parts.move_to_end(key)
            return self._parts[key]


def _line_to(handle: Any, reward: RewardSettings) -> Line:
    direct = None
    if reward.transport == "direct":
        direct = DirectPath(handle, name=reward.name, timeout_s=reward.timeout_s)
    return Line(handle, name=reward.name, timeout_s=reward.timeout_s, attempts=reward.attempts, direct=direct)


class _Titled:
    """A reward under the name that it has in its request."""

    def __init__(self, reward: Reward, name: str) -> None:
        self.reward, self.name = reward, name
        self.composes_gradients = getattr(reward, "composes_gradients", False)

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        return self.reward(samples)


class LoadedModel:
    """A checkpoint in memory and its engine, which ends when nobody holds this any more."""

    def __init__(self, card: ModelCard, settings: SamplerSettings, recorder: PassRecorder) -> None:
        decoding = replace(card.decoding, at_once=settings.decode_at_once)
        flow_map = computed(
            load_flow_map(card.source, autoencoder=decoding).to(_device(settings)),
            precision=settings.precision,
            execution=settings.execution,
        )
        watch = functools.partial(recorder.note, card.id)
        self.card = card
        self.engine = Engine(
            flow_map,
            max_rows=settings.max_rows,
            waves=settings.waves,
            patience_s=settings.slow_reward_s,
            watch=watch,
        ).start()
        self._end = weakref.finalize(self, _close_elsewhere, self.engine)


def _close_elsewhere(engine: Engine) -> None:
    """Ends an engine without waiting for its threads: this may run in any thread, also in one of them."""
    threading.Thread(target=engine.close, name="close-engine", daemon=True).start()


class Sampler:
    """Requests as streams of events: `Accepted`, `Progress`, `Preview`; last `Finished`, `Failed` or `Refused`."""

    def __init__(
        self,
        cards: Sequence[ModelCard],
        settings: SamplerSettings,
        rewards: Sequence[RewardSettings],
        handles: Mapping[str, Any],
        max_rows_waiting: int,
    ) -> None:
        # 300,000 objects of Ray and torch that stay: going through them would stop a step for a tenth of a second. Not
        # what is loaded later: a frozen cycle would keep a model that has left.
        gc.freeze()
        self._cards = {card.id: card for card in cards}
        self._settings, self._max_rows_waiting = settings, max_rows_waiting
        self._rows_arriving = 0  # of requests that are on their way into an engine
        self._metrics = SamplerMetrics()
        self._recorder = PassRecorder(self._metrics)
        self._rewards = RequestRewards(cards, rewards, handles)
        self._live: weakref.WeakSet[LoadedModel] = weakref.WeakSet()
        # the first model is loaded before the replica counts as ready, the others when they are asked for
        self._preloaded: dict[str, LoadedModel] = {cards[0].id: self._load(cards[0].id)}
        self._models = self._multiplexed(settings.models_in_memory)

    async def generate(
        self, generation: Generation, snapshot: bytes | None = None, accepted: bool = False
    ) -> AsyncIterator[Event]:
        """Events of a request. snapshot: where another replica left it; accepted: one has taken it, so it is not
        refused, however long the queue."""
        model = await self._models(generation.model)
        rows = rows_of(generation)
        if not accepted and self._rows_behind(model) + rows > max(self._max_rows_waiting, rows):
            yield Refused(f"{self._max_rows_waiting} rows are waiting already")
            return
        if generation.source != self._cards[generation.model].source:
            snapshot = None  # of a checkpoint that is being replaced: no image is made half by one, half by another
        self._rows_arriving += rows
        try:
            loop, every_s = asyncio.get_running_loop(), self._settings.snapshot_every_s
            run = await asyncio.to_thread(_Run, loop, model, generation, self._rewards, snapshot, every_s)
        except (ValueError, EngineClosedError) as error:
            yield _failure(error, [])
            return
        finally:
            self._rows_arriving -= rows
        # the endpoint keeps the deadline; should it die, nobody else would end what it asked for
        assert generation.deadline_s is not None
        late = loop.call_later(generation.deadline_s + _AFTER_DEADLINE_S, run.ticket.cancel)
        try:
            yield Accepted()
            async for event in run.events():
                yield event
        finally:
            late.cancel()
            run.ticket.cancel()  # of no effect on what is done; a client that went away frees its rows

    async def score(self, name: str, model: str, params: str, images: np.ndarray) -> np.ndarray:
        """(N,) of images, by a reward that lives in this process."""
        reward = self._rewards.colocated(model, name, params)
        return (await asyncio.to_thread(_scored, reward, torch.tensor(images).clamp(0, 1))).numpy()

    async def ready(self) -> bool:
        return all(model.engine.healthy for model in list(self._live))

    def check_health(self) -> None:
        """Raises once an engine is dead, so that Serve starts another replica and nothing hangs."""
        for model in list(self._live):
            if not model.engine.healthy:
                raise RuntimeError(f"the engine of {model.card.id} is dead: {model.engine.failure!r}")
        self._report()

    def load(self) -> dict[str, int]:
        """Rows of a step and requests, running and waiting, of all engines together."""
        loads = [model.engine.load() for model in list(self._live)]
        return {key: sum(load[key] for load in loads) for key in ("rows_running", "rows_waiting", *_JOBS)}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The true load, which requests of different sizes are not; read by `autoscaling.LoadPolicy`."""
        self._report()
        load = self.load()
        return {
            ROWS: float(load["rows_waiting"] + load["rows_running"]),
            CALLS: float(load["jobs_waiting"] + load["jobs_running"]),
        }

    def _report(self) -> None:
        for model in list(self._live):
            load, tags = model.engine.load(), {"model": model.card.id}
            self._metrics.requests_running.set(load["jobs_running"], tags=tags)
            self._metrics.requests_waiting.set(load["jobs_waiting"], tags=tags)

    def _rows_behind(self, model: LoadedModel) -> int:
        """Rows that the next pass has no place for. Fair turns let every request begin at once, so those that have not
        begun would not say how long the queue is."""
        load = model.engine.load()
        rows = self._rows_arriving + load["rows_running"] + load["rows_waiting"]
        return max(0, rows - self._settings.max_rows)

    def _multiplexed(self, capacity: int) -> Any:
        """Models by id, at most `capacity` of them in memory; Serve sends requests to replicas that have theirs."""

        @serve.multiplexed(max_num_models_per_replica=capacity)
        async def fetch(model_id: str) -> LoadedModel:
            if model_id in self._preloaded:
                return self._preloaded.pop(model_id)
            return await asyncio.to_thread(self._load, model_id)

        return fetch

    def _load(self, model_id: str) -> LoadedModel:
        model = LoadedModel(self._cards[model_id], self._settings, self._recorder)
        self._live.add(model)
        return model


class _Run:
    """One request in the engine. Made in a thread, since rewards may have to be loaded first."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        model: LoadedModel,
        generation: Generation,
        rewards: RequestRewards,
        snapshot: bytes | None,
        every_s: float,
    ) -> None:
        self.generation, self.model = generation, model
        self.rewards = rewards.of(generation)
        self._loop, self._changed, self._step = loop, asyncio.Event(), 0
        self._previews = _preview_steps(generation)
        self._began, self._first_step, self._steps_done = time.monotonic(), 0.0, 0.0
        self._every_s, self._next_snapshot = every_s, self._began + every_s
        job = Job(
            steering=_steering(generation, rewards),
            num_images=generation.num_images,
            num_steps=generation.num_steps,
            dynamics=generation.dynamics,
            seed=generation.seed,
            label=generation.label,
            cfg_scale=generation.cfg_scale,
            key=generation.key,
        )
        restored = None if snapshot is None else Snapshot.from_bytes(snapshot)
        self.ticket: Ticket = model.engine.submit(job, snapshot=restored, on_step=self._on_step)
        self.ticket.future.add_done_callback(lambda _: self._wake())

    async def events(self) -> AsyncIterator[Event]:
        """What happens until the end, the end included."""
        while not self.ticket.future.done():
            await self._changed.wait()
            self._changed.clear()
            step = self._step
            while self._previews and step >= self._previews[0]:
                self._previews.pop(0)
                images = await asyncio.to_thread(self.ticket.preview)
                number = self.generation.previews - len(self._previews) - 1
                yield Preview(number, images.cpu().numpy(), min(step, self.generation.num_steps))
            if time.monotonic() >= self._next_snapshot:
                yield Progress(step, await asyncio.to_thread(lambda: self.ticket.snapshot().to_bytes()))
                self._next_snapshot = time.monotonic() + self._every_s
        yield await self._loop.run_in_executor(_OUTCOMES, self._outcome)

    def _outcome(self) -> Event:
        """The end of a request, with each reward's own value where there are several."""
        try:
            samples: Samples = self.ticket.future.result()
            total = None if samples.rewards is None else samples.rewards.cpu().numpy()
            parts = self._parts(samples.images, total)
        except Exception as error:
            return _failure(error, list(self.rewards))
        timing = {
            "first_step_s": self._first_step - self._began,
            "steps_s": self._steps_done - self._first_step,
            "scoring_s": time.monotonic() - self._steps_done,
        }
        trace = samples.trace if "trace" in self.generation.include else {}
        traced = {name: values.cpu().numpy() for name, values in trace.items()}
        return Finished(
            samples.images.cpu().numpy(), total, parts, samples.nfe, samples.calls, trace=traced, timing=timing
        )

    def _parts(self, images: torch.Tensor, total: np.ndarray | None) -> dict[str, np.ndarray]:
        """Each reward's own value; a single one of weight 1 is known already."""
        if total is not None and [choice.weight for choice in self.generation.rewards] == [1.0]:
            return {next(iter(self.rewards)): total}
        return {title: _scored(reward, images).numpy() for title, reward in self.rewards.items()}

    def _on_step(self, done: int, of: int) -> None:
        """Called in the engine's thread; most steps are of interest to nobody."""
        self._step, self._steps_done = done, time.monotonic()
        self._first_step = self._first_step or self._steps_done
        preview_due = bool(self._previews) and done >= self._previews[0]
        if preview_due or time.monotonic() >= self._next_snapshot:
            self._wake()

    def _wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed.set)


def _preview_steps(generation: Generation) -> list[int]:
    """Steps after which a preview is due, evenly between the first and the last."""
    count, steps = generation.previews, generation.num_steps
    return [max(1, steps * (number + 1) // (count + 1)) for number in range(count)]


def _steering(generation: Generation, rewards: RequestRewards) -> Steering:
    if not generation.rewards:
        return Unguided()
    steering = build_steering({"name": generation.method, **generation.arguments}, rewards.total(generation))
    assert steering is not None, generation.method
    return steering


def _failure(error: Exception, titles: Sequence[str]) -> Failed:
    """Whose fault it was that a request failed: a reward's by its title, the request's own, or nobody's yet."""
    line = first_line(error)
    blamed = line.removeprefix("reward ").partition(":")[0] if line.startswith("reward ") else None
    reward = blamed if blamed in titles else None
    if isinstance(error, RewardDownError):
        return Failed("reward_down", line, reward)
    if isinstance(error, RewardError) or blamed is not None:
        return Failed("reward_failed", line, reward)
    if isinstance(error, EngineClosedError):
        return Failed("lost", line)
    if isinstance(error, ValueError):
        return Failed("invalid", line)
    log.error("a request failed", exc_info=error)
    return Failed("internal", "internal error of the sampler")


@torch.no_grad()
def _scored(reward: Reward, images: torch.Tensor) -> torch.Tensor:
    return score(reward, images).cpu()


def _device(settings: SamplerSettings) -> str:
    return settings.device or ("cuda" if torch.cuda.is_available() else "cpu")


def sampler_deployment(
    cards: Sequence[ModelCard],
    settings: SamplerSettings,
    rewards: Sequence[RewardSettings],
    handles: Mapping[str, serve.Application],
    *,
    max_rows_waiting: int,
) -> serve.Application:
    """The deployment `sampler`. It takes every request at once, since the engine is the queue."""
    options = {"name": "sampler", "max_ongoing_requests": 1024, **with_policy(settings.options(), settings.target_rows)}
    return serve.deployment(**options)(Sampler).bind(
        list(cards), settings, list(rewards), dict(handles), max_rows_waiting
    )
