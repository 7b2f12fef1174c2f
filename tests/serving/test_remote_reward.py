"""A reward behind a handle: the same numbers as in this process, and what becomes of its failures."""

import asyncio
import threading

import numpy as np
import pytest
import ray.exceptions
import torch

from mfm_ray.rewards import RewardError, WeightedSum
from mfm_ray.steering.reward_gradient import evaluate
from serve import remote_reward
from serve.catalogue import RewardSource, defaults
from serve.remote_reward import Line, RemoteReward, RewardDownError, SumOfParts
from serve.reward import RewardServer, canonical
from serve.settings import RewardSettings


class FakeHandle:
    """Calls a server in this process; the first `failures` calls raise the error."""

    def __init__(self, server=None, *, error=None, failures=0):
        self.server, self.error, self.failures, self.calls, self.method = server, error, failures, 0, None

    def options(self, *, method_name, _by_reference):
        self.method = method_name
        return self

    def remote(self, *arguments):
        self.calls += 1
        if self.calls <= self.failures:
            return FakeResponse(error=self.error)
        return FakeResponse(result=asyncio.run(getattr(self.server, self.method)(*arguments)))


class FakeResponse:
    def __init__(self, result=None, error=None):
        self._result, self._error, self.cancelled = result, error, False

    def result(self, timeout_s):
        if self._error is not None:
            raise self._error
        return self._result

    def cancel(self):
        self.cancelled = True


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(remote_reward, "_PAUSE_S", 0.0)


def remote(card, name, *, handle=None, attempts=3):
    server = RewardServer([card], RewardSettings(name=name))
    line = Line(handle or FakeHandle(server), name=name, timeout_s=5, attempts=attempts)
    return RemoteReward(line, name=name, model=card.id, params=canonical(defaults(name, card)))


@pytest.mark.parametrize("name", ["symmetry", "brightness", "masked_observation", "class_probability", "class_mixture"])
def test_values_and_gradients_equal_the_local_ones_to_the_bit(card, name):
    torch.manual_seed(0)
    local, far = RewardSource(card).build(name, defaults(name, card)), remote(card, name)
    samples = torch.rand(8, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(far(samples), local(samples))
    weight = torch.randn(8)
    gradients = []
    for reward in (local, far):
        x = samples.clone().requires_grad_()
        gradients.append(torch.autograd.grad((weight * evaluate(reward, x)).sum(), x)[0])
    assert torch.equal(*gradients)


def test_a_sum_of_remote_and_local_rewards_equals_a_local_sum(card):
    source, x = RewardSource(card), torch.rand(4, 1, 8, 8)
    local = [source.build(name, defaults(name, card)) for name in ("symmetry", "brightness")]
    results = []
    for first in (local[0], remote(card, "symmetry")):
        inner = x.clone().requires_grad_()
        values = WeightedSum(rewards=[first, local[1]], weights=[0.7, -1.3])(inner)
        results.append((values.detach(), torch.autograd.grad(values.logsumexp(0), inner)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_remote_parts_of_a_sum_are_asked_at_the_same_time(card):
    """Each answers only once the other is being asked too."""
    meet = threading.Barrier(2, timeout=30)

    class Meeting(FakeHandle):
        def remote(self, *arguments):
            meet.wait()
            return super().remote(*arguments)

    names, source = ("symmetry", "brightness"), RewardSource(card)
    far = [remote(card, name, handle=Meeting(RewardServer([card], RewardSettings(name=name)))) for name in names]
    local = [source.build(name, defaults(name, card)) for name in names]
    x, results = torch.rand(4, 1, 8, 8), []
    for total in (WeightedSum(rewards=local, weights=[0.7, -1.3]), SumOfParts(rewards=far, weights=[0.7, -1.3])):
        inner = x.clone().requires_grad_()
        values = total(inner)
        with torch.no_grad():
            assert torch.equal(total(x), values)
        results.append((values.detach(), torch.autograd.grad(values.logsumexp(0), inner)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert SumOfParts(rewards=far).waits_on == set(names)


@pytest.mark.parametrize("error", [ray.exceptions.ActorDiedError(), ray.exceptions.GetTimeoutError(), TimeoutError()])
def test_a_call_that_was_lost_is_repeated(card, error):
    server = RewardServer([card], RewardSettings(name="symmetry"))
    handle = FakeHandle(server, error=error, failures=2)
    samples = torch.rand(4, 1, 8, 8)
    assert torch.equal(remote(card, "symmetry", handle=handle)(samples), remote(card, "symmetry")(samples))
    assert handle.calls == 3


def test_a_reward_that_stays_down_is_named_and_not_asked_again_at_once(card):
    handle = FakeHandle(error=ray.exceptions.ActorDiedError(), failures=100)
    reward = remote(card, "symmetry", handle=handle, attempts=2)
    for _ in range(2):
        with pytest.raises(RewardDownError, match="reward symmetry: is down"):
            reward(torch.rand(4, 1, 8, 8))
    assert handle.calls == 2


def test_what_the_reward_itself_refuses_is_not_repeated(card):
    cause = ValueError("reward symmetry: samples of shape (1,)\nmore")
    error = ray.exceptions.RayTaskError("value", "Traceback ...", cause)
    handle = FakeHandle(error=error, failures=100)
    with pytest.raises(RewardError, match="^reward symmetry: samples of shape"):
        remote(card, "symmetry", handle=handle)(torch.rand(4, 1, 8, 8))
    assert handle.calls == 1


def test_a_server_keeps_no_more_rewards_than_it_may(card):
    server = RewardServer([card], RewardSettings(name="brightness", rewards_in_memory=2))
    samples = np.zeros((4, 1, 8, 8), np.float32)
    for target in (0.1, 0.2, 0.3, 0.1):
        params = canonical({**defaults("brightness", card), "target": target})
        values = asyncio.run(server.value(card.id, params, samples))
        np.testing.assert_allclose(values, -(target**2) / (2 * 0.01**2), rtol=1e-5)
    assert len(server._rewards._built) == 2
    server.check_health()


def test_scores_that_are_no_numbers_name_the_reward(card):
    server = RewardServer([card], RewardSettings(name="brightness"))
    params = canonical({**defaults("brightness", card), "scale": 1e-30})
    with pytest.raises(ValueError, match="reward brightness"):
        asyncio.run(server.score(card.id, params, np.zeros((1, 1, 8, 8), np.float32)))
