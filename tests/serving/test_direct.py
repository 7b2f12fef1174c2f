"""The direct way to a reward's replica: equal numbers, strict frames, and the handle for whatever goes wrong."""

import asyncio
import json
import logging
import socket
import struct
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
import ray
import torch

from mfm_ray.rewards import RewardError
from mfm_ray.steering.reward_gradient import evaluate
from serve import direct, listener, remote_reward
from serve.batching import Backlog
from serve.catalogue import RewardSource, defaults
from serve.direct import DirectPath, RefusedError, UnreachableError
from serve.listener import Listener
from serve.remote_reward import Line, RemoteReward, RewardDownError
from serve.reward import RewardServer, canonical
from serve.settings import RewardSettings
from serve.wire import CALL, GREETING, MAGIC, VERSION, Address, Connection, FrameError, Kind, connect

HERE = "127.0.0.1"
SAMPLES = np.arange(6, dtype=np.float32).reshape(2, 3)


OPENED = []


@pytest.fixture(autouse=True)
def _no_pauses_and_all_is_closed(monkeypatch):
    monkeypatch.setattr(remote_reward, "_PAUSE_S", 0.0)
    monkeypatch.setattr(direct, "_RETRY_S", 0.0)
    monkeypatch.setattr(listener, "_LAST_ANSWERS_S", 20.0)
    yield
    while OPENED:
        OPENED.pop().close()


class Replicas:
    """A handle that tells addresses and counts what is asked through it; it answers twice what a listener would."""

    def __init__(self, *listeners):
        self.listeners, self.calls = list(listeners), 0

    def broadcast(self, method, caller):
        assert method == "address"
        return self

    def results(self, timeout_s, return_exceptions):
        return [ConnectionError("a replica that does not answer"), *(one.address for one in self.listeners)]

    def options(self, **_):
        return self

    def remote(self, model, params, samples):
        self.calls += 1
        return self

    def result(self, timeout_s):
        return (2 * SAMPLES,)

    def path(self, timeout_s=20.0):
        path = DirectPath(self, name="test", timeout_s=timeout_s)
        OPENED.append(path)
        path.refresh()
        return path

    def line(self, timeout_s=20.0, attempts=3):
        path = self.path(timeout_s)
        return Line(self, name="test", timeout_s=timeout_s, attempts=attempts, direct=path)


class Gate:
    """What a listener asks: answers once it is open."""

    def __init__(self, *, is_open=True):
        self.open, self.asked, self.load = threading.Event(), threading.Event(), 0
        self.count = 0
        if is_open:
            self.open.set()

    def __call__(self, method, model, params, samples, background):
        self.count += 1
        self.background = background
        self.asked.set()
        future = Future()

        def answer():
            assert self.open.wait(30)
            if method == "refuse":
                future.set_exception(ValueError("not these\nmore"))
            else:
                future.set_result((samples.copy(),))

        threading.Thread(target=answer, daemon=True).start()
        return future

    def listen(self):
        OPENED.append(Listener(HERE, self, load=lambda: self.load, name="test"))
        return OPENED[-1]


@pytest.mark.parametrize("name", ["symmetry", "masked_observation", "class_probability"])
def test_values_and_gradients_equal_the_local_ones_to_the_bit(card, name):
    server = RewardServer([card], RewardSettings(name=name))
    address = asyncio.run(server.address(ray.util.get_node_ip_address()))
    assert address.host == HERE  # a sampler on this node needs no port on the network
    assert address == asyncio.run(server.address(ray.util.get_node_ip_address()))
    handle = Replicas(server._listeners[HERE])
    line = Line(handle, name=name, timeout_s=30, attempts=1, direct=handle.path())
    params = defaults(name, card)
    far = RemoteReward(line, name=name, model=card.id, params=canonical(params))
    local = RewardSource(card).build(name, params)
    samples = torch.rand(7, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(far(samples), local(samples))
    weight, gradients = torch.randn(7), []
    for reward in (local, far):
        x = samples.clone().requires_grad_()
        gradients.append(torch.autograd.grad((weight * evaluate(reward, x)).sum(), x)[0])
    assert torch.equal(*gradients)
    assert handle.calls == 0
    rows, calls = server.record_autoscaling_stats().values()
    assert 0 < calls < 1  # a mean over time, in which mostly nothing ran
    assert rows == pytest.approx(7 * calls)
    OPENED.extend(server._listeners.values())


def test_what_the_reward_refuses_is_its_error_and_not_repeated():
    gate = Gate()
    handle = Replicas(gate.listen())
    with pytest.raises(RewardError, match="^reward test: not these$"):
        handle.line().call("refuse", "m", "{}", SAMPLES)
    assert (gate.count, handle.calls) == (1, 0)


def test_large_arrays_arrive_whole_however_they_are_cut():
    samples = np.random.default_rng(0).standard_normal((16, 3, 256, 256), dtype=np.float32)
    handle = Replicas(Gate().listen())
    assert np.array_equal(handle.path().call("value", "m", "{}", samples)[0], samples)


def test_connections_are_kept_and_not_shared_by_calls_at_the_same_time(monkeypatch):
    made = []
    monkeypatch.setattr(direct, "connect", lambda *args, **kwargs: made.append(1) or connect(*args, **kwargs))
    gate = Gate()
    path = Replicas(gate.listen()).path()
    for _ in range(3):
        assert np.array_equal(path.call("value", "m", "{}", SAMPLES)[0], SAMPLES)
    assert len(made) == 1
    gate.open.clear()
    answers = [Future() for _ in range(3)]
    for number, answer in enumerate(answers):
        target = lambda n=number, a=answer: a.set_result(path.call("value", "m", "{}", SAMPLES + n)[0])  # noqa: E731
        threading.Thread(target=target, daemon=True).start()
    while gate.count < 6:
        time.sleep(0.01)
    gate.open.set()
    for number, answer in enumerate(answers):
        assert np.array_equal(answer.result(30), SAMPLES + number)
    assert len(made) == 3


def test_the_less_loaded_replica_is_asked_and_new_ones_are_found():
    busy, free = Gate(), Gate()
    busy.load = 1000
    handle = Replicas(busy.listen())
    path = handle.path()
    path.call("value", "m", "{}", SAMPLES)  # now its load is known
    handle.listeners.append(free.listen())
    path.refresh()
    for _ in range(4):
        path.call("value", "m", "{}", SAMPLES)
    assert (busy.count, free.count) == (1, 4)


def test_a_replica_that_dies_in_the_middle_of_a_call_is_replaced_by_the_handle():
    gate = Gate(is_open=False)
    own = gate.listen()
    handle = Replicas(own)
    line = handle.line()
    answer = Future()
    threading.Thread(target=lambda: answer.set_result(line.call("value", "m", "{}", SAMPLES)), daemon=True).start()
    assert gate.asked.wait(30)
    handle.listeners.clear()
    for connection in own._open:
        connection._socket.shutdown(socket.SHUT_RDWR)
    assert np.array_equal(answer.result(30)[0], 2 * SAMPLES)
    assert handle.calls == 1
    line.call("value", "m", "{}", SAMPLES)
    handle.listeners.append(own)
    line._direct.refresh()
    line.call("value", "m", "{}", SAMPLES)
    assert (gate.count, handle.calls) == (1, 3)  # for a while it is not asked, though it tells its address
    gate.open.set()


def test_replicas_stay_known_while_serve_does_not_answer():
    gate = Gate()
    handle = Replicas(gate.listen())
    path = handle.path()
    handle.broadcast = None
    path.refresh()
    path.call("value", "m", "{}", SAMPLES)
    assert gate.count == 1


def test_a_replica_that_ends_answers_what_has_arrived_and_the_handle_the_rest():
    gate = Gate(is_open=False)
    own = gate.listen()
    handle = Replicas(own)
    line = handle.line()
    answer = Future()
    threading.Thread(target=lambda: answer.set_result(line.call("value", "m", "{}", SAMPLES)), daemon=True).start()
    assert gate.asked.wait(30)
    closing = threading.Thread(target=own.close, daemon=True)
    closing.start()
    gate.open.set()
    assert np.array_equal(answer.result(30)[0], SAMPLES)
    closing.join(30)
    assert not closing.is_alive()
    assert np.array_equal(line.call("value", "m", "{}", SAMPLES)[0], 2 * SAMPLES)
    assert (gate.count, handle.calls) == (1, 1)
    with pytest.raises(OSError, match="refused|reset"):
        connect(own.address, within_s=5)


def test_a_replica_that_does_not_answer_in_time_is_an_attempt_and_the_last_one_names_the_reward():
    gate = Gate(is_open=False)
    handle = Replicas(gate.listen())
    assert np.array_equal(handle.line(timeout_s=0.1).call("value", "m", "{}", SAMPLES)[0], 2 * SAMPLES)
    with pytest.raises(RewardDownError, match="reward test: is down, 1 calls failed"):
        handle.line(timeout_s=0.1, attempts=1).call("value", "m", "{}", SAMPLES)
    assert handle.calls == 1
    gate.open.set()


def test_without_replicas_or_for_more_than_a_frame_the_handle_is_asked(monkeypatch):
    handle = Replicas()
    assert np.array_equal(handle.line().call("value", "m", "{}", SAMPLES)[0], 2 * SAMPLES)
    gate = Gate()
    handle = Replicas(gate.listen())
    monkeypatch.setattr(direct, "CALL", type(CALL)(meta=CALL.meta, data=8))
    assert np.array_equal(handle.line().call("value", "m", "{}", SAMPLES)[0], 2 * SAMPLES)
    assert gate.count == 0


def test_a_caller_without_the_key_is_not_heard(caplog):
    gate = Gate()
    own = gate.listen()
    with caplog.at_level(logging.WARNING):
        handle = Replicas(own)
        own.address, right = Address(own.address.host, own.address.port, b"wrong"), own.address
        path = handle.path()
        own.address = right
        with pytest.raises(UnreachableError):
            path.call("value", "m", "{}", SAMPLES)
    assert gate.count == 0
    assert ["does not know the key" in record.getMessage() for record in caplog.records] == [True]
    assert right.key.hex() not in repr(right)


def closed_after(peer, data):
    """Whether the other side closes, without an answer, once it has read the data."""
    peer.settimeout(30)
    try:
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        return peer.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:  # closed with bytes that it had not read
        return True


def header(*, magic=MAGIC, version=VERSION, kind=Kind.REQUEST, meta=0, data=0):
    return struct.pack("<4sBBHIQ", magic, version, kind, 0, meta, data)


def frame(described, data=b"", **changes):
    text = json.dumps(described).encode()
    return header(meta=len(text), data=len(data), **changes) + text + data


GOOD = {"method": "value", "model": "m", "params": "{}", "shapes": [[2, 3]]}
DAMAGED = {
    "nonsense": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "does not begin like a frame"),
    "version": (header(version=9), "version 9, expected 1"),
    "kind": (header(kind=Kind.ANSWER), "kind 4, expected REQUEST"),
    "json too large": (header(meta=CALL.meta + 1), "at most"),
    "arrays too large": (header(data=2**62), "at most"),
    "no json": (header(meta=4) + b"\xff{{{", "without JSON"),
    "no object": (frame([1]), "no object"),
    "no shapes": (frame({**GOOD, "shapes": None}, bytes(24)), "without shapes"),
    "negative": (frame({**GOOD, "shapes": [[-2, -3]]}, bytes(24)), "without shapes"),
    "fractions": (frame({**GOOD, "shapes": [[2.0, 3]]}, bytes(24)), "without shapes"),
    "other size": (frame({**GOOD, "shapes": [[2, 4]]}, bytes(24)), "24 bytes, shapes say 32"),
    "huge shape": (frame({**GOOD, "shapes": [[2**40, 2**40]]}, bytes(24)), "24 bytes, shapes say"),
    "no method": (frame({**GOOD, "method": 3}, bytes(24)), "without method"),
    "no samples": (frame({**GOOD, "shapes": []}), "without method"),
    "half a frame": (frame(GOOD, bytes(24))[:-1], "middle of a frame"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_frame_ends_its_connection_with_one_line_and_no_other(what, caplog):
    data, says = DAMAGED[what]
    gate = Gate()
    own = gate.listen()
    path = Replicas(own).path()
    path.call("value", "m", "{}", SAMPLES)
    peer = connect(own.address, within_s=5)
    with caplog.at_level(logging.WARNING):
        assert closed_after(peer._socket, data)
    peer.close()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert says in lines[0]
    path.call("value", "m", "{}", SAMPLES)
    assert gate.count == 2


def test_before_the_key_is_proved_only_a_few_bytes_are_read():
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    connection = object.__new__(Connection)
    connection._socket = ours
    theirs.sendall(header(kind=Kind.PROOF, meta=GREETING.meta + 1))
    with pytest.raises(FrameError, match="at most 256 \\+ 0 are read"):
        connection.receive(Kind.PROOF, limits=GREETING, within_s=5)
    theirs.sendall(header(kind=Kind.REQUEST))
    with pytest.raises(FrameError, match="expected PROOF"):
        connection.receive(Kind.PROOF, limits=GREETING, within_s=5)
    ours.close()
    theirs.close()


def test_unknown_methods_are_refused(card):
    server = RewardServer([card], RewardSettings(name="symmetry"))
    asyncio.run(server.address(ray.util.get_node_ip_address()))
    path = Replicas(server._listeners[HERE]).path()
    for method in ("score", "__del__"):
        with pytest.raises(RefusedError, match="expected one of value, value_and_gradient"):
            path.call(method, card.id, "{}", SAMPLES)
    OPENED.extend(server._listeners.values())


def test_the_backlog_is_a_mean_over_the_time_since_it_was_last_asked_for():
    now = [0.0]
    backlog = Backlog(clock=lambda: now[0])
    backlog.begin(8)
    now[0] = 1.0
    backlog.begin(4)
    now[0] = 2.0
    backlog.end(8)
    backlog.end(4)
    now[0] = 4.0
    assert backlog.means() == ((8 + 12) / 4, (1 + 2) / 4)
    assert (backlog.rows, backlog.calls) == (0, 0)
    now[0] = 5.0
    assert backlog.means() == (0.0, 0.0)


@pytest.mark.parametrize("background", [False, True])
def test_a_line_in_the_background_says_so_directly_and_through_the_handle(background):
    gate = Gate()
    handle = Replicas(gate.listen())
    given = []
    handle.remote = lambda *arguments: given.append(arguments[3:]) or handle
    path = DirectPath(handle, name="test", timeout_s=20, background=background)
    OPENED.append(path)
    line = Line(handle, name="test", timeout_s=20, attempts=1, direct=path, background=background)
    path.refresh()
    line.call("value", "m", "{}", SAMPLES)
    assert gate.background is background
    handle.listeners.clear()
    path.refresh()
    line.call("value", "m", "{}", SAMPLES)
    assert given == [(True,) if background else ()]


def test_a_request_whose_background_is_no_truth_value_closes_its_connection():
    gate = Gate()
    connection = connect(gate.listen().address, within_s=5)
    OPENED.append(connection)
    meta = {"method": "value", "model": "m", "params": "{}", "background": "yes"}
    connection.send(Kind.REQUEST, meta, [SAMPLES], within_s=5)
    assert connection.receive(Kind.ANSWER, limits=CALL, within_s=20) is None
    assert gate.count == 0
