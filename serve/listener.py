"""The replica's end of the direct way: calls of a reward over TCP, answered by the same `Batcher` as Serve's own.

Serve starts, scales, checks and ends the replica, and tells callers where it listens; it does not see these calls.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from .errors import first_line
from .wire import CALL, KEY_BYTES, Address, Connection, Frame, FrameError, Kind, challenge

log = logging.getLogger(__name__)

_MOST_CONNECTIONS = 1024
_SEND_S = 30.0
_LAST_ANSWERS_S = 5.0

Ask = Callable[[str, str, str, np.ndarray, bool], "Future[tuple[np.ndarray, ...]]"]
"""method, model, canonical parameters, samples and whether in the background, to the answer's arrays. ValueError for an
unknown method."""


class Listener:
    """Answers calls on a port of `host`, each connection in a thread of its own, which mostly waits.

    load: what callers are told beside each answer, so that they can choose the least loaded replica.
    """

    def __init__(self, host: str, ask: Ask, *, load: Callable[[], int], name: str) -> None:
        self._ask, self._load, self._name = ask, load, name
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family, backlog=128)
        self.address = Address(host, self._socket.getsockname()[1], secrets.token_bytes(KEY_BYTES))
        self._open: dict[Connection, threading.Thread] = {}
        self._changed, self._closed = threading.Lock(), False
        threading.Thread(target=self._accept, name=f"listener-{name}", daemon=True).start()

    def close(self) -> None:
        """Takes no more connections and requests; returns once those that have arrived are answered, or after 5 s."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            remaining = dict(self._open)
        _shut(self._socket)
        for connection in remaining:
            try:
                connection.no_more_requests()
            except OSError:
                log.debug("reward %s: a peer was gone already", self._name)
        end = time.monotonic() + _LAST_ANSWERS_S
        for thread in remaining.values():
            thread.join(max(0.0, end - time.monotonic()))

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self._socket.accept()
            except OSError:
                if not self._closed:
                    log.exception("reward %s: no longer listens", self._name)
                return
            connection = Connection(sock)
            thread = threading.Thread(target=self._serve, args=(connection, peer), name="direct", daemon=True)
            with self._changed:
                taken = not self._closed and len(self._open) < _MOST_CONNECTIONS
                if taken:
                    self._open[connection] = thread
            if taken:
                thread.start()
            else:
                connection.close()

    def _serve(self, connection: Connection, peer: Any) -> None:
        try:
            if not challenge(connection, self.address.key):
                raise FrameError("it does not know the key")
            while (frame := connection.receive(Kind.REQUEST, limits=CALL, within_s=None)) is not None:
                self._answer(connection, frame)
        except OSError as error:  # FrameError among them: a peer that is wrong, slow or gone concerns nobody else
            log.warning("reward %s: the connection of %s was closed: %s", self._name, peer[0], error)
        finally:
            connection.close()
            with self._changed:
                del self._open[connection]

    def _answer(self, connection: Connection, frame: Frame) -> None:
        named = [value for value in map(frame.meta.get, ("method", "model", "params")) if isinstance(value, str)]
        background = frame.meta.get("background", False)
        if len(named) != 3 or type(background) is not bool or len(frame.arrays) != 1 or frame.arrays[0].ndim < 2:
            raise FrameError("a request without method, model, params and samples")
        method, model, params = named
        try:
            results = self._ask(method, model, params, frame.arrays[0], background).result()
        except Exception as error:  # the caller's to judge
            connection.send(Kind.REFUSAL, {"message": first_line(error)}, within_s=_SEND_S)
        else:
            connection.send(Kind.ANSWER, {"load": self._load()}, results, within_s=_SEND_S)


def _shut(listening: socket.socket) -> None:
    try:
        listening.shutdown(socket.SHUT_RDWR)  # wakes whoever waits in accept, which close alone does not
    finally:
        listening.close()
