"""The engine: whatever is in flight together, every image is the one that `mfm.sample` makes alone."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mfm_ray as mfm
from mfm_ray.data_space import DataSpace
from mfm_ray.engine import Engine, EngineClosedError, Job, Pass, Snapshot
from mfm_ray.engine.job import JobInFlight
from mfm_ray.engine.rendezvous import Phase, Rendezvous
from mfm_ray.engine.schedule import Schedule
from mfm_ray.engine.waves import Waves
from mfm_ray.errors import InputError
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.residual_mlp import ResidualMLPFlowMap
from mfm_ray.rewards import WeightedSum
from mfm_ray.steering import (
    DPS,
    SMC,
    AutoDraws,
    BestOfN,
    GradientFreeGuidance,
    GradientGuidance,
    PosteriorResampling,
    Search,
    Steering,
    Unguided,
)

TIMEOUT = 60


def network() -> FlowMap:
    """A class-conditional, guided image network with random weights in every layer."""
    torch.manual_seed(0)
    flow_map = ResidualMLPFlowMap(
        space=DataSpace(kind="image", event_shape=(1, 8, 8)),
        width=128,
        num_blocks=2,
        num_classes=10,
        mean=torch.randn(64) * 0.3,
        variances=torch.linspace(1, 0.0, 64),
        basis=torch.linalg.qr(torch.randn(64, 64))[0],
    )
    for layer in (flow_map.network.project, *(block.contract for block in flow_map.network.blocks)):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return flow_map.eval().requires_grad_(False)


NETWORK = network()


def brightness(pixels: Tensor) -> Tensor:
    return -20 * (pixels.mean((1, 2, 3)) - 0.7) ** 2 + pixels[:, 0, 0, 0]


def corner(pixels: Tensor) -> Tensor:
    return -10 * (pixels[:, 0, :3, :3] - 0.4).square().mean((1, 2))


BOTH = WeightedSum(rewards=[brightness, corner], weights=[1.0, 0.3])
METHODS: dict[str, Steering] = {
    "none": Unguided(),
    "gradient": GradientGuidance(brightness, num_draws=3),
    "gradient_other_reward": GradientGuidance(BOTH, num_draws=5),
    "gradient_in_parts": GradientGuidance(brightness, num_draws=4, draws_at_once=2),
    "gradient_auto": GradientGuidance(corner, num_draws=AutoDraws(effective=2.5, first=2, most=8)),
    "gradient_free": GradientFreeGuidance(brightness, num_draws=5),
    "dps": DPS(brightness),
    "resampling": PosteriorResampling(corner, num_draws=6),
    "search": Search(brightness, num_particles=3, num_draws=2),
    "tds": SMC(brightness, num_particles=4, resample_threshold=0.9),
    "feynman_kac": SMC(corner, num_particles=3, potential="feynman_kac", num_draws=2),
    "best_of_n": BestOfN(brightness, num_particles=3),
}


def job(name: str, **changes: object) -> Job:
    dynamics = "sde" if METHODS[name].default_dynamics == "sde" else "ode"
    return replace(Job(METHODS[name], num_images=2, num_steps=4, dynamics=dynamics, seed=7), **changes)


def alone(asked: Job) -> mfm.samplers.Samples:
    return mfm.sample(
        NETWORK,
        num_samples=asked.num_images,
        steering=asked.steering,
        num_steps=asked.num_steps,
        dynamics=asked.dynamics,
        seed=asked.seed,
        label=asked.label,
        cfg_scale=asked.cfg_scale,
    )


def assert_equal_to_the_bit(finished: object, asked: Job) -> None:
    expected = alone(asked)
    assert torch.equal(finished.images, expected.images), asked
    assert finished.nfe == expected.nfe
    assert finished.calls == expected.calls
    assert (finished.rewards is None) == (expected.rewards is None)
    if expected.rewards is not None:
        assert torch.equal(finished.rewards, expected.rewards)
    assert finished.trace.keys() == expected.trace.keys()
    for name, values in expected.trace.items():
        assert torch.equal(finished.trace[name], values), name


@pytest.fixture
def engine():
    engine = Engine(NETWORK, max_rows=64, waves=2).start()
    yield engine
    engine.close()


@pytest.mark.parametrize("waves", [1, 2])
@pytest.mark.parametrize("max_rows", [5, 4096])
def test_all_methods_at_once_give_each_the_images_it_would_have_alone(waves, max_rows):
    asked = [
        job(name, num_images=1 + number % 3, num_steps=2 + number % 4, seed=number, label=number % 2 * 3 or None)
        for number, name in enumerate([*METHODS, *METHODS])
    ]
    engine = Engine(NETWORK, max_rows=max_rows, waves=waves).start()
    tickets = [engine.submit(one) for one in asked]
    for one, ticket in zip(asked, tickets, strict=True):
        assert_equal_to_the_bit(ticket.future.result(TIMEOUT), one)
    assert engine.healthy
    engine.close()
    assert not engine.healthy


def test_what_methods_ask_for_together_is_one_call_of_the_network():
    """Six jobs with different methods, draws and rewards: their pass takes as many network calls as one of them."""
    counts = []
    inner = NETWORK.velocity

    class Counting(ResidualMLPFlowMap):
        def __init__(self) -> None:
            FlowMap.__init__(self, NETWORK.space, num_classes=10)

        def velocity(self, *args: Tensor, **kwargs: object) -> Tensor:
            counts.append(len(args[0]))
            return inner(*args, **kwargs)

        def posterior_spread(self, t: Tensor) -> Tensor:
            return NETWORK.posterior_spread(t)

    engine = Engine(Counting(), max_rows=4096, waves=1)
    asked = [job("gradient", num_steps=1, seed=k) for k in range(4)]
    asked += [job("gradient_other_reward", num_steps=1), job("dps", num_steps=1)]
    tickets = [engine.submit(one) for one in asked]
    engine.start()
    for ticket in tickets:
        ticket.future.result(TIMEOUT)
    engine.close()
    # drifts of the five, then their draws with the drift of DPS: 8 + 2 rows, then 8 * 3 + 2 * 5 + 2
    assert counts == [12, 36]


@pytest.mark.parametrize("name", METHODS)
def test_a_job_goes_on_from_a_snapshot_in_another_engine_to_the_same_images(name):
    asked, kept = job(name, num_steps=6), []
    first = Engine(NETWORK, max_rows=3, waves=1)
    ticket = first.submit(asked, on_step=lambda done, total: kept.append(ticket.snapshot()) if done == 3 else None)
    first.start()
    ticket.future.result(TIMEOUT)
    first.close()
    snapshot = Snapshot.from_bytes(kept[0].to_bytes())
    assert min(snapshot.steps) == 3
    second = Engine(NETWORK, waves=1).start()
    assert_equal_to_the_bit(second.submit(asked, snapshot=snapshot).future.result(TIMEOUT), asked)
    second.close()


def test_damaged_and_foreign_snapshots_are_refused(engine):
    good = Snapshot.of(JobInFlight(job("gradient"), NETWORK.event_shape, torch.device("cpu")))
    for data in (b"", b"nonsense", good.to_bytes()[:-5]):
        with pytest.raises(InputError, match="snapshot: damaged"):
            Snapshot.from_bytes(data)
    with pytest.raises(InputError, match="snapshot: of 2 images at step 0, the job has 3"):
        engine.submit(job("gradient", num_images=3), snapshot=good)
    with pytest.raises(InputError, match="snapshot: a state of shape"):
        engine.submit(job("search"), snapshot=good)


def test_a_reward_that_fails_fails_its_own_job_only(engine):
    def broken(pixels: Tensor) -> Tensor:
        return pixels.mean((1, 2, 3)) * float("nan")

    def wrong_shape(pixels: Tensor) -> Tensor:
        return pixels.mean((1, 2, 3)).unsqueeze(1)

    def raising(pixels: Tensor) -> Tensor:
        raise OSError("no such machine")

    good = engine.submit(job("gradient", num_steps=12))
    for reward, kind, words in (
        (broken, ValueError, "broken|function"),
        (wrong_shape, ValueError, "returned shape"),
        (raising, OSError, "no such machine"),
    ):
        bad = engine.submit(job("gradient", steering=GradientGuidance(reward, num_draws=2)))
        with pytest.raises(kind, match=words):
            bad.future.result(TIMEOUT)
    assert_equal_to_the_bit(good.future.result(TIMEOUT), job("gradient", num_steps=12))
    assert engine.healthy
    assert engine.load() == {"rows_running": 0, "rows_waiting": 0, "jobs_running": 0, "jobs_waiting": 0}


class Outside:
    """A reward outside of this process, which answers once it is let go."""

    def __init__(self, name: str, inner: Callable[[Tensor], Tensor] = corner) -> None:
        self.name, self.waits_on, self._inner = name, frozenset({name}), inner
        self.answers = threading.Event()

    def __call__(self, pixels: Tensor) -> Tensor:
        assert self.answers.wait(TIMEOUT)
        return self._inner(pixels)


@pytest.mark.parametrize("waves", [None, 1])
def test_a_reward_that_hangs_holds_back_only_the_requests_that_use_it(waves):
    """Asked for in one pass; once the reward answers again its images are those it would have had alone."""
    hangs, answers = Outside("hangs"), Outside("answers")
    answers.answers.set()
    both = WeightedSum(rewards=[hangs, answers], weights=[1.0, 2.0])
    stuck = [
        job("gradient", steering=GradientGuidance(reward, num_draws=2), num_steps=3, seed=seed)
        for seed, reward in enumerate((hangs, both))
    ]
    moving = [
        job("gradient", steering=GradientGuidance(answers, num_draws=2), num_steps=6),
        job("gradient_free", num_steps=6),
        job("none", num_steps=6),
    ]
    engine = Engine(NETWORK, waves=waves, patience_s=0.05)
    tickets = [engine.submit(one) for one in [*stuck, *moving]]
    engine.start()
    for ticket, one in zip(tickets[len(stuck) :], moving, strict=True):
        assert_equal_to_the_bit(ticket.future.result(TIMEOUT), one)
    assert not any(ticket.future.done() for ticket in tickets[: len(stuck)])
    late = engine.submit(moving[0])  # by now the slow ones are apart
    assert_equal_to_the_bit(late.future.result(TIMEOUT), moving[0])
    hangs.answers.set()
    for ticket, one in zip(tickets, stuck, strict=False):
        assert_equal_to_the_bit(ticket.future.result(TIMEOUT), one)
    again = engine.submit(stuck[0])
    assert_equal_to_the_bit(again.future.result(TIMEOUT), stuck[0])
    assert engine.healthy
    engine.close()


def test_with_a_second_wave_that_comes_and_goes_images_are_the_same():
    def slow(pixels: Tensor) -> Tensor:
        time.sleep(0.02)  # far more than this network takes
        return corner(pixels)

    outside = Outside("slow", slow)
    outside.answers.set()
    asked = [
        job("gradient", steering=GradientGuidance(reward, num_draws=2), num_images=3, num_steps=steps)
        for reward, steps in ((outside, 6), (brightness, 30))
    ]
    engine = Engine(NETWORK).start()
    tickets = [engine.submit(one) for one in asked]
    for ticket, one in zip(tickets, asked, strict=True):
        assert_equal_to_the_bit(ticket.future.result(TIMEOUT), one)
    engine.close()


def test_a_slow_reward_that_fails_in_the_end_fails_its_own_requests():
    def down(pixels: Tensor) -> Tensor:
        raise OSError("nobody answered")

    hangs = Outside("hangs", down)
    engine = Engine(NETWORK, waves=1, patience_s=0.05).start()
    bad = engine.submit(job("gradient", steering=GradientGuidance(hangs, num_draws=2)))
    good = engine.submit(job("gradient"))
    assert_equal_to_the_bit(good.future.result(TIMEOUT), job("gradient"))
    hangs.answers.set()
    with pytest.raises(OSError, match="nobody answered"):
        bad.future.result(TIMEOUT)
    engine.close()


def test_a_second_wave_begins_where_rewards_take_half_as_long_as_the_network():
    waves = Waves(None)
    assert (waves.now, waves.most) == (1, 2)
    for network_s, rewards_s, expected in ((1.0, 0.1, 1), (1.0, 3.0, 2), (1.0, 1.0, 2), (30.0, 0.0, 1)):
        waves.took(network_s, rewards_s)
        assert waves.now == expected
    assert (Waves(3).now, Waves(3).most) == (3, 3)


def test_a_reward_that_fails_on_one_request_s_samples_spares_the_requests_it_is_shared_with():
    def picky(pixels: Tensor) -> Tensor:
        if len(pixels) > 8:
            raise ValueError("too many at once")
        return pixels.mean((1, 2, 3))

    engine = Engine(NETWORK, waves=1)
    small = [engine.submit(job("resampling", steering=PosteriorResampling(picky, num_draws=4), seed=k)) for k in (1, 2)]
    large = engine.submit(job("resampling", steering=PosteriorResampling(picky, num_draws=5)))
    engine.start()
    with pytest.raises(ValueError, match="too many at once"):
        large.future.result(TIMEOUT)
    for ticket in small:  # of one lane: together they are too many as well
        with pytest.raises(ValueError, match="too many at once"):
            ticket.future.result(TIMEOUT)
    engine.close()


def test_a_network_that_fails_ends_its_jobs_with_the_reason_and_not_the_engine(engine):
    with pytest.raises(Exception, match="label|index|out of"):
        engine.submit(job("gradient", label=1000)).future.result(TIMEOUT)
    assert_equal_to_the_bit(engine.submit(job("gradient")).future.result(TIMEOUT), job("gradient"))


def test_a_dead_engine_says_so_and_lets_nobody_wait():
    def watch(_: Pass) -> None:
        raise RuntimeError("the watcher broke")

    engine = Engine(NETWORK, waves=1, watch=watch)
    ticket = engine.submit(job("gradient"))
    engine.start()
    with pytest.raises(EngineClosedError, match="the watcher broke"):
        ticket.future.result(TIMEOUT)
    assert not engine.healthy
    with pytest.raises(EngineClosedError, match="the watcher broke"):
        engine.submit(job("gradient"))
    engine.close()


def test_closing_ends_what_is_in_flight():
    engine = Engine(NETWORK, waves=2).start()
    ticket = engine.submit(job("gradient", num_steps=100_000))
    engine.close()
    with pytest.raises(EngineClosedError, match="closed"):
        ticket.future.result(TIMEOUT)


def test_cancelling_frees_the_place_at_the_next_step(engine):
    begun = threading.Event()
    ticket = engine.submit(job("gradient", num_steps=100_000), on_step=lambda done, total: begun.set())
    assert begun.wait(TIMEOUT)
    ticket.cancel()
    with pytest.raises(CancelledError):
        ticket.future.result(TIMEOUT)
    assert engine.load()["jobs_running"] == 0
    assert_equal_to_the_bit(engine.submit(job("dps")).future.result(TIMEOUT), job("dps"))


def test_previews_are_posterior_draws_and_end_at_the_image(engine):
    seen = []
    asked = job("gradient", num_steps=5)
    ticket = engine.submit(asked, on_step=lambda done, total: seen.append((done, total, ticket.preview())))
    finished = ticket.future.result(TIMEOUT)
    by_step = {done: preview for done, _, preview in seen}
    assert by_step[5].shape == (2, 1, 8, 8)
    assert torch.equal(by_step[5], finished.images)
    assert all(bool(((preview >= 0) & (preview <= 1)).all()) for preview in by_step.values())
    assert not torch.equal(by_step[1], finished.images)


def test_passes_are_told_with_what_they_cost():
    passes = []
    engine = Engine(NETWORK, waves=1, watch=passes.append)
    ticket = engine.submit(job("gradient", num_steps=3))
    engine.start()
    finished = ticket.future.result(TIMEOUT)
    engine.close()
    assert sum(one.calls.total() for one in passes) == finished.nfe * 2
    assert all(one.rows == 6 and one.images == 2 and one.seconds > 0 for one in passes)
    assert all(1 / 3 <= one.effective_share <= 1 for one in passes)


def in_flight(key: str, rows: int = 1, images: int = 1, steps: int = 10) -> JobInFlight:
    method = GradientGuidance(brightness, num_draws=rows)
    asked = Job(method, num_images=images, num_steps=steps, dynamics="sde", seed=0, key=key)
    return JobInFlight(asked, NETWORK.event_shape, torch.device("cpu"))


def step(schedule: Schedule, max_rows: int) -> list[JobInFlight]:
    taken = schedule.take(max_rows)
    for _, image in taken:
        image.busy = False
    return [job for job, _ in taken]


def test_keys_share_evenly_however_many_requests_each_has():
    schedule = Schedule()
    crowd, single = [in_flight("crowd") for _ in range(9)], in_flight("single", images=2)
    for one in [*crowd, single]:
        schedule.add(one)
    served = [job for _ in range(30) for job in step(schedule, max_rows=4)]
    assert served.count(single) == 60  # both of its images at every pass: half of the rows
    counts = [served.count(one) for one in crowd]
    assert sum(counts) == 60
    assert max(counts) - min(counts) <= 1


def test_large_requests_are_not_starved_by_a_stream_of_small_ones():
    schedule, large = Schedule(), in_flight("a", rows=50)
    schedule.add(large)
    turns = 0
    for _ in range(60):
        small = [in_flight("a", rows=10) for _ in range(5)]
        for one in small:
            schedule.add(one)
        turns += step(schedule, max_rows=50).count(large)
        for one in small:
            schedule.remove(one)
    assert turns >= 15


def test_a_newcomer_does_not_wait_until_it_has_caught_up():
    schedule, old = Schedule(), in_flight("old")
    schedule.add(old)
    for _ in range(1000):
        step(schedule, max_rows=1)
    new = in_flight("new")
    schedule.add(new)
    served = [job for _ in range(10) for job in step(schedule, max_rows=1)]
    assert served.count(new) == served.count(old) == 5


def test_an_image_larger_than_the_budget_goes_alone():
    schedule = Schedule()
    for one in (in_flight("a", rows=100), in_flight("b", rows=1)):
        schedule.add(one)
    assert [len(schedule.take(10)), len(schedule.take(10))] == [1, 1]


def test_lanes_meet_at_the_later_phase_and_a_lane_s_failure_is_its_own():
    rounds = []

    def handler(calls):
        rounds.append((calls[0].phase, len(calls)))
        for call in calls:
            call.result = call.payload

    lanes = Rendezvous(dict.fromkeys(Phase, handler))

    def both() -> int:
        return lanes.call(Phase.DRIFT, 1) + lanes.call(Phase.DRAW, 2)

    def late() -> int:
        return lanes.call(Phase.DRAW, 3)

    def failing() -> int:
        raise KeyError("mine")

    results = lanes.run([both, late, failing, both])
    assert (results[0], results[1], results[3]) == (3, 3, 3)
    assert isinstance(results[2], KeyError)
    assert rounds == [(Phase.DRIFT, 2), (Phase.DRAW, 3)]
    lanes.close()
