"""The sampler's end of the direct way: which replicas of a reward there are, and calls to them.

Addresses come through Serve's handle, from every replica that runs. Whatever goes wrong here is not repeated here: the
caller asks through the handle instead, which waits, wakes and repeats.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import Any

import numpy as np
import ray

from .wire import CALL, Address, Connection, Kind, connect

log = logging.getLogger(__name__)

_REFRESH_S = 5.0
"""So long are addresses believed while calls go on; replicas that are new are used after it at the latest."""
_RETRY_S = 0.5
_SHUN_S = 30.0
"""So long a replica is not called directly after a connection to it broke or a call to it timed out."""
_CONNECT_S = 1.0


class UnreachableError(ConnectionError):
    """No replica is known, or the connection to it broke; the call may be repeated."""


class RefusedError(RuntimeError):
    """The reward itself refused, in one line; the call would be refused again."""


class _Replica:
    """Connections to one replica that wait for their next call, and how loaded it is."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.idle: list[Connection] = []
        self.rows_asked, self.load_told, self.gone = 0, 0, False

    @property
    def load(self) -> int:
        return self.rows_asked + self.load_told


class DirectPath:
    """Calls of one reward to the less loaded of two of its replicas, over connections that are kept.

    handle: of the reward's deployment. timeout_s: of one call. background: calls let those of samplers pass.
    """

    def __init__(self, handle: Any, *, name: str, timeout_s: float, background: bool = False) -> None:
        self.name, self._handle, self._timeout_s, self._background = name, handle, timeout_s, background
        self._replicas: dict[Address, _Replica] = {}
        self._shunned: dict[Address, float] = {}
        self._lock = threading.Lock()
        self._refreshing, self._refresh_at = False, 0.0

    def call(self, method: str, model: str, params: str, samples: np.ndarray) -> tuple[np.ndarray, ...]:
        """The arrays of the answer. UnreachableError, TimeoutError, RefusedError."""
        if samples.nbytes > CALL.data or len(params) > CALL.meta // 2:
            raise UnreachableError("the call is too large for one frame")
        replica = self._choose(len(samples))
        try:
            return self._call(replica, method, model, params, samples)
        except (TimeoutError, UnreachableError):
            self._leave(replica)
            raise
        finally:
            with self._lock:
                replica.rows_asked -= len(samples)

    def refresh(self) -> None:
        """Asks all replicas that run where they listen."""
        try:
            told = self._handle.broadcast("address", ray.util.get_node_ip_address()).results(
                timeout_s=_REFRESH_S, return_exceptions=True
            )
        except Exception as error:  # no replica runs, or Serve does not answer: calls will find out which
            log.debug("reward %s: no addresses: %r", self.name, error)
            told = list(self._replicas)
        with self._lock:
            now = time.monotonic()
            self._shunned = {address: until for address, until in self._shunned.items() if until > now}
            addresses = {one for one in told if isinstance(one, Address)} - self._shunned.keys()
            gone = [self._replicas.pop(known) for known in list(self._replicas) if known not in addresses]
            for address in addresses - self._replicas.keys():
                self._replicas[address] = _Replica(address)
            self._refreshing = False
            self._refresh_at = now + (_REFRESH_S if self._replicas else _RETRY_S)
        for replica in gone:
            self._close(replica)

    def close(self) -> None:
        """Closes what no call uses; replicas are asked for their addresses again at the next call."""
        with self._lock:
            known, self._replicas, self._refresh_at = self._replicas, {}, 0.0
        for replica in known.values():
            self._close(replica)

    def _choose(self, rows: int) -> _Replica:
        with self._lock:
            if not self._refreshing and time.monotonic() >= self._refresh_at:
                self._refreshing = True
                threading.Thread(target=self.refresh, name=f"addresses-{self.name}", daemon=True).start()
            known = list(self._replicas.values())
            if not known:
                raise UnreachableError("no replica is known")
            chosen = min(random.sample(known, min(2, len(known))), key=lambda replica: replica.load)
            chosen.rows_asked += rows
            return chosen

    def _call(
        self, replica: _Replica, method: str, model: str, params: str, samples: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        deadline = time.monotonic() + self._timeout_s
        try:
            connection = self._connection(replica)
        except OSError as error:
            raise UnreachableError(f"{replica.address.host}:{replica.address.port}: {error}") from error
        try:
            asked = {"method": method, "model": model, "params": params, "background": self._background}
            connection.send(Kind.REQUEST, asked, [samples], within_s=self._timeout_s)
            answer = connection.receive(
                Kind.ANSWER, Kind.REFUSAL, limits=CALL, within_s=max(0.0, deadline - time.monotonic())
            )
        except BaseException as error:
            connection.close()  # an answer that comes late must not be taken for the next one
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise UnreachableError(f"{replica.address.host}:{replica.address.port}: {error}") from error
            raise
        if answer is None:
            connection.close()
            raise UnreachableError(f"{replica.address.host}:{replica.address.port}: closed the connection")
        self._keep(replica, connection)
        if answer.kind is Kind.REFUSAL:
            raise RefusedError(str(answer.meta.get("message")))
        replica.load_told = int(answer.meta.get("load", 0))
        return answer.arrays

    def _connection(self, replica: _Replica) -> Connection:
        with self._lock:
            if replica.idle:
                return replica.idle.pop()
        return connect(replica.address, within_s=min(_CONNECT_S, self._timeout_s))

    def _keep(self, replica: _Replica, connection: Connection) -> None:
        with self._lock:
            if not replica.gone:
                replica.idle.append(connection)
                return
        connection.close()

    def _leave(self, replica: _Replica) -> None:
        """Not called for a while, however often it tells its address."""
        with self._lock:
            self._shunned[replica.address] = time.monotonic() + _SHUN_S
            if self._replicas.get(replica.address) is replica:
                del self._replicas[replica.address]
                self._refresh_at = min(self._refresh_at, time.monotonic() + _RETRY_S)
        self._close(replica)

    def _close(self, replica: _Replica) -> None:
        with self._lock:
            replica.gone = True
            idle, replica.idle = replica.idle, []
        for connection in idle:
            connection.close()
