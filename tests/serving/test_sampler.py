"""The sampler's own side, without a cluster: rewards of equal wishes, failures by name, and its health."""

import asyncio
import threading
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from mfm_ray.engine import EngineClosedError
from mfm_ray.networks.computation import AutocastFlowMap
from mfm_ray.networks.replay import ReplayedFlowMap
from mfm_ray.rewards import RewardError, WeightedSum
from serve.generation import Failed, Finished, Preview, Progress, Refused
from serve.remote_reward import RemoteReward, RewardDownError
from serve.sampler import LoadedModel, RequestRewards, Sampler, _failure, _Run
from serve.schema import GenerationRequest
from serve.settings import RewardSettings, SamplerSettings

COLOCATED = [RewardSettings(name=name, placement="colocated") for name in ("symmetry", "brightness")]
BOTH = [{"name": "symmetry"}, {"name": "brightness", "weight": 0.5}]


@pytest.fixture
def generation(resolver):
    def make(rewards=BOTH, **fields):
        request = {"seed": 1, "steering": {"rewards": rewards, "num_steps": 6}, **fields}
        return resolver.generation(GenerationRequest.model_validate(request))

    return make


def test_equal_wishes_are_one_object_so_that_the_engine_scores_them_together(card, generation):
    rewards = RequestRewards([card], COLOCATED, {})
    assert rewards.total(generation()) is rewards.total(generation(seed=2))
    assert isinstance(rewards.total(generation()), WeightedSum)
    single = generation([{"name": "symmetry"}])
    assert rewards.total(single).name == "symmetry"
    assert rewards.total(single) is rewards.of(generation())["symmetry"]
    weighted = generation([{"name": "symmetry", "weight": 2.0}])
    assert isinstance(rewards.total(weighted), WeightedSum)


def test_rewards_with_a_handle_are_remote_and_two_of_a_kind_have_their_own_names(card, generation):
    rewards = RequestRewards([card], [RewardSettings(name="symmetry")], {"symmetry": object()})
    parts = rewards.of(generation([{"name": "symmetry"}, {"name": "symmetry", "params": {"scale": 0.2}}]))
    assert list(parts) == ["symmetry", "symmetry_2"]
    assert all(isinstance(part, RemoteReward) and part.name == title for title, part in parts.items())


@pytest.mark.parametrize(
    ("error", "kind", "reward"),
    [
        (RewardDownError("symmetry", "is down"), "reward_down", "symmetry"),
        (RewardError("reward symmetry: returned NaN"), "reward_failed", "symmetry"),
        (ValueError("reward symmetry: returned NaN or infinity"), "reward_failed", "symmetry"),
        (RewardError("reward weighted_sum: returned NaN"), "reward_failed", None),
        (ValueError("dynamics=ode: expected sde"), "invalid", None),
        (EngineClosedError("the engine was closed"), "lost", None),
        (RuntimeError("secret"), "internal", None),
    ],
)
def test_a_failure_says_whose_it_is(error, kind, reward):
    failed = _failure(error, ["symmetry"])
    assert (failed.kind, failed.reward) == (kind, reward)
    assert "secret" not in failed.message


@pytest.fixture
def sampler(card):
    sampler = Sampler([card], SamplerSettings(device="cpu"), COLOCATED, {}, max_rows_waiting=100)
    yield sampler
    for model in list(sampler._live):
        model.engine.close()


def test_a_dead_engine_fails_the_health_check(sampler):
    sampler.check_health()
    assert asyncio.run(sampler.ready())
    assert sampler.record_autoscaling_stats() == {"rows": 0.0, "calls": 0.0}
    next(iter(sampler._live)).engine.failure = RuntimeError("gone")
    with pytest.raises(RuntimeError, match="engine of tiny is dead"):
        sampler.check_health()
    assert not asyncio.run(sampler.ready())


def test_the_network_is_computed_as_the_operator_set_it(card, generation):
    settings = SamplerSettings(device="cpu", precision="bf16", execution="graphs")
    sampler = Sampler([card], settings, COLOCATED, {}, max_rows_waiting=100)
    try:
        flow_map = next(iter(sampler._live)).engine.flow_map
        assert isinstance(flow_map, ReplayedFlowMap)
        assert isinstance(flow_map._inner, AutocastFlowMap)
        assert isinstance(collect(sampler, generation())[-1], Finished)
    finally:
        for model in list(sampler._live):
            model.engine.close()
    for wrong in ({"precision": "fp16"}, {"execution": "fast"}):
        with pytest.raises(ValueError, match="Input should be"):
            SamplerSettings(**wrong)


def collect(sampler, generation, *, snapshot=None, every_s=60.0):
    async def run():
        model: LoadedModel = next(iter(sampler._live))
        loop = asyncio.get_running_loop()
        run = await asyncio.to_thread(_Run, loop, model, generation, sampler._rewards, snapshot, every_s)
        return [event async for event in run.events()]

    return asyncio.run(run())


def test_a_request_resumed_from_a_snapshot_ends_in_the_same_image(sampler, generation):
    wish = generation(n=2, stream=True, partial_images=2)
    wish = replace(wish, num_steps=40)
    whole = collect(sampler, wish, every_s=1e-6)
    snapshots = [event for event in whole if isinstance(event, Progress)]
    assert [event.number for event in whole if isinstance(event, Preview)] == [0, 1]
    assert snapshots
    for progress in (snapshots[0], snapshots[-1]):
        resumed = collect(sampler, wish, snapshot=progress.snapshot)[-1]
        assert isinstance(resumed, Finished)
        assert torch.equal(torch.tensor(resumed.images), torch.tensor(whole[-1].images))
        assert resumed.nfe == whole[-1].nfe


def test_a_reward_that_fails_in_the_engine_is_an_event_that_names_it(sampler, generation):
    wish = generation([{"name": "symmetry"}, {"name": "brightness", "params": {"scale": 1e-30}}])
    failed = collect(sampler, wish)[-1]
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.reward) == ("reward_failed", "brightness")


def generated(sampler, generation, *arguments):
    """All events of `Sampler.generate`, without Serve's multiplexing."""

    async def only_model(model_id):
        return next(iter(sampler._live))

    async def run():
        sampler._models = only_model
        return [event async for event in sampler.generate(generation, *arguments)]

    return asyncio.run(run())


def test_what_another_replica_has_accepted_is_not_refused(sampler, generation):
    sampler._rows_arriving = 10**6
    assert [type(event) for event in generated(sampler, generation())] == [Refused]
    assert isinstance(generated(sampler, generation(), None, True)[-1], Finished)


def test_no_image_is_made_half_by_one_checkpoint_and_half_by_another(sampler, generation):
    wish = generation()
    assert isinstance(generated(sampler, wish, b"no snapshot")[-1], Failed)
    of_another = replace(wish, source="a/checkpoint/that/is/being/replaced")
    made, whole = (generated(sampler, *asked)[-1] for asked in ((of_another, b"no snapshot"), (wish,)))
    assert torch.equal(torch.tensor(made.images), torch.tensor(whole.images))


class HangingHandle:
    """A deployment that takes calls and answers none until it is let go; then each is lost."""

    def __init__(self):
        self.asked, self.let_go = threading.Event(), threading.Event()

    def options(self, **_):
        return self

    def remote(self, *arguments):
        self.asked.set()
        return self

    def result(self, timeout_s):
        assert self.let_go.wait(60)
        raise TimeoutError

    def cancel(self):
        pass


def test_requests_go_on_and_end_while_the_reward_of_others_hangs(card, generation):
    handle = HangingHandle()
    rewards = [RewardSettings(name="symmetry", transport="serve", attempts=1), COLOCATED[1]]
    settings = SamplerSettings(device="cpu", slow_reward_s=0.05)
    sampler = Sampler([card], settings, rewards, {"symmetry": handle}, max_rows_waiting=100)
    ended = Future()
    stuck = threading.Thread(target=lambda: ended.set_result(collect(sampler, generation())), daemon=True)
    stuck.start()
    assert handle.asked.wait(30)
    for _ in range(2):
        assert isinstance(collect(sampler, generation([{"name": "brightness"}]))[-1], Finished)
    assert not ended.done()
    handle.let_go.set()
    (failed,) = ended.result(60)
    assert (failed.kind, failed.reward) == ("reward_down", "symmetry")
    for model in list(sampler._live):
        model.engine.close()
