"""What the endpoint keeps of a request, and what it does with it when replicas die."""

import asyncio

import numpy as np
import pytest
import ray.exceptions

from serve.backend import ServeBackend
from serve.errors import ApiError
from serve.generation import Accepted, Failed, Finished, Preview, Progress, Refused
from serve.schema import GenerationRequest

IMAGES = np.zeros((1, 1, 8, 8), np.float32)
DONE = Finished(IMAGES, None, {}, 1.0, {})
DIES = ray.exceptions.ActorDiedError()


class FakeSampler:
    """A handle whose calls yield one script after the other; an error in a script is raised."""

    def __init__(self, *scripts):
        self.scripts, self.asked, self.taken_before = list(scripts), [], []
        self.generate = self

    def options(self, **_):
        return self

    def remote(self, generation, snapshot, accepted):
        self.asked.append((generation, snapshot))
        self.taken_before.append(accepted)
        return Stream(self.scripts.pop(0))


class Stream:
    def __init__(self, script):
        self.script = list(script)

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.script:
            raise StopAsyncIteration
        event = self.script.pop(0)
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self):
        pass


def run(sampler, generation, *, resume_attempts=2):
    async def collect():
        backend = ServeBackend(sampler, {}, resume_attempts=resume_attempts)
        return [event async for event in backend.generate(generation)]

    return asyncio.run(collect())


@pytest.fixture
def generation(resolver):
    rewards = [{"name": "symmetry"}, {"name": "brightness"}]
    return resolver.generation(GenerationRequest.model_validate({"seed": 1, "steering": {"rewards": rewards}}))


def test_a_request_goes_on_from_its_last_snapshot_and_the_client_sees_everything_once(generation):
    first = [Accepted(), Preview(0, IMAGES), Progress(5, b"five"), Progress(10, b"ten"), DIES]
    second = [Accepted(), Preview(0, IMAGES), Preview(1, IMAGES), DONE]
    sampler = FakeSampler(first, second)
    events = run(sampler, generation)
    assert [type(event) for event in events] == [Accepted, Preview, Preview, Finished]
    assert [snapshot for _, snapshot in sampler.asked] == [None, b"ten"]
    assert sampler.taken_before == [False, True]  # what was accepted is never refused by the next replica


@pytest.mark.parametrize("end", [[], [Failed("lost", "the engine was closed")], [DIES]])
def test_a_stream_that_breaks_off_is_a_lost_sampler(generation, end):
    sampler = FakeSampler([Accepted(), *end], [Accepted(), DONE])
    assert len(run(sampler, generation)) == 2


def test_losses_without_progress_are_bounded_and_progress_counts_anew(generation):
    lost = [Accepted(), DIES]
    with pytest.raises(ApiError) as refused:
        run(FakeSampler(*[lost] * 10), generation, resume_attempts=2)
    assert refused.value.status == 503
    assert refused.value.retry
    moving = [Accepted(), Progress(5, b"five"), DIES]
    assert run(FakeSampler(*[moving] * 10, [DONE]), generation, resume_attempts=2)


@pytest.mark.parametrize(
    ("event", "status", "code"),
    [
        (Refused("16384 rows are waiting already"), 429, "queue_full"),
        (Failed("invalid", "dynamics=ode: expected sde"), 400, "invalid_value"),
        (Failed("reward_down", "reward symmetry: is down", "symmetry"), 503, "reward_down"),
        (Failed("reward_failed", "reward symmetry: returned NaN", "symmetry"), 503, "reward_failed"),
        (Failed("internal", "internal error of the sampler"), 503, "sampler_failed"),
    ],
)
def test_every_end_has_its_status(generation, event, status, code):
    with pytest.raises(ApiError) as refused:
        run(FakeSampler([Accepted(), event]), generation)
    assert (refused.value.status, refused.value.code) == (status, code)


def test_a_reward_that_may_be_dropped_is_left_out_and_named(generation):
    from dataclasses import replace

    tolerant = replace(generation, on_reward_failure="drop")
    down = Failed("reward_down", "reward symmetry: is down", "symmetry")
    sampler = FakeSampler([Accepted(), Progress(5, b"five"), down], [Accepted(), DONE])
    events = run(sampler, tolerant)
    assert events[-1].dropped == ("symmetry",)
    again, snapshot = sampler.asked[1]
    assert [choice.title for choice in again.rewards] == ["brightness"]
    assert snapshot is None
    also = Failed("reward_failed", "reward brightness: returned NaN", "brightness")
    events = run(FakeSampler([down], [also], [DONE]), tolerant)
    assert events[-1].dropped == ("symmetry", "brightness")
