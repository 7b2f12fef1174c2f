"""Frames of the direct way from a sampler to a reward's replica: a header, JSON, float32 arrays. Never a pickle.

    magic "MFMW" | version u8 | kind u8 | 0 u16 | bytes of JSON u32 | bytes of arrays u64      (little-endian, 20 bytes)
    JSON: {"shapes": [[N, C, H, W], ...], ...}
    arrays: float32, little-endian, in the order of `shapes`

Lengths are compared with their limits, and shapes with lengths, before memory is taken for them. Until a peer has
proved that it knows the replica's key, frames of a few bytes are all that is read from it.
"""

from __future__ import annotations

import hmac
import json
import math
import secrets
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

MAGIC, VERSION = b"MFMW", 1
_HEADER = struct.Struct("<4sBBHIQ")
_FLOAT = np.dtype("<f4")
_MOST_ARRAYS, _MOST_AXES = 4, 8
KEY_BYTES = 32
_PROOF_BYTES = 64  # of a SHA-256 in hexadecimal
GREETING_S = 5.0
"""Seconds within which a peer must have proved itself."""


class Kind(IntEnum):
    CHALLENGE = 1
    PROOF = 2
    REQUEST = 3
    ANSWER = 4
    REFUSAL = 5


@dataclass(frozen=True)
class Limits:
    """The most bytes of a frame's JSON and of its arrays."""

    meta: int
    data: int


GREETING = Limits(meta=256, data=0)
CALL = Limits(meta=2**24, data=2**30)


class FrameError(ConnectionError):
    """What came is no frame, not the expected one, or larger than allowed: nothing after it can be trusted."""


@dataclass(frozen=True)
class Address:
    """Where a replica listens, and what a caller must know to be heard there."""

    host: str
    port: int
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class Frame:
    kind: Kind
    meta: Mapping[str, Any]
    arrays: tuple[np.ndarray, ...] = ()


class Connection:
    """Frames over a TCP connection. One thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = sock

    def send(self, kind: Kind, meta: Mapping[str, Any], arrays: Sequence[np.ndarray] = (), *, within_s: float) -> None:
        """FrameError for what no peer would take; TimeoutError, OSError."""
        parts = [np.ascontiguousarray(array, dtype=_FLOAT) for array in arrays]
        described = json.dumps({**meta, "shapes": [part.shape for part in parts]}).encode()
        size = sum(part.nbytes for part in parts)
        if len(described) > CALL.meta or size > CALL.data:
            raise FrameError(f"a call of {len(described)} + {size} bytes is larger than {CALL.meta} + {CALL.data}")
        header = _HEADER.pack(MAGIC, VERSION, kind, 0, len(described), size)
        self._send_all([header + described, *(part.reshape(-1).view(np.uint8) for part in parts)], _by(within_s))

    def receive(self, *kinds: Kind, limits: Limits, within_s: float | None) -> Frame | None:
        """The next frame, of one of the kinds; None where the peer closed the connection instead of beginning one.

        within_s: None waits for ever. FrameError, TimeoutError, OSError.
        """
        deadline = _by(within_s)
        header = self._read(_HEADER.size, deadline, may_end=True)
        if header is None:
            return None
        kind, meta_bytes, data_bytes = _checked_header(header, kinds, limits)
        meta = _parsed(self._read(meta_bytes, deadline))
        shapes = _checked_shapes(meta.pop("shapes", None), data_bytes)
        return Frame(kind, meta, _arrays(self._read(data_bytes, deadline), shapes))

    def no_more_requests(self) -> None:
        """What has arrived is still read and answered; then `receive` returns None."""
        self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        self._socket.close()

    def _send_all(self, parts: list[Any], deadline: float | None) -> None:
        pending = [memoryview(part) for part in parts if len(part)]
        while pending:
            self._socket.settimeout(_left(deadline))
            sent = self._socket.sendmsg(pending)
            while pending and sent >= len(pending[0]):
                sent -= len(pending.pop(0))
            if sent:
                pending[0] = pending[0][sent:]

    def _read(self, size: int, deadline: float | None, *, may_end: bool = False) -> Any:
        buffer = np.empty(size, np.uint8)
        rest = memoryview(buffer)  # type: ignore[arg-type]
        while rest:
            self._socket.settimeout(_left(deadline))
            count = self._socket.recv_into(rest)
            if not count:
                if may_end and len(rest) == size:
                    return None
                raise ConnectionError("the connection ended in the middle of a frame")
            rest = rest[count:]
        return buffer


def challenge(connection: Connection, key: bytes) -> bool:
    """The replica's side of the greeting: whether the peer has proved that it knows the key."""
    nonce = secrets.token_hex(KEY_BYTES)
    connection.send(Kind.CHALLENGE, {"nonce": nonce}, within_s=GREETING_S)
    answer = connection.receive(Kind.PROOF, limits=GREETING, within_s=GREETING_S)
    return answer is not None and hmac.compare_digest(_proof(key, nonce), str(answer.meta.get("proof")).encode())


def connect(address: Address, *, within_s: float) -> Connection:
    """The caller's side: a connection on which requests are answered. OSError."""
    connection = Connection(socket.create_connection((address.host, address.port), timeout=within_s))
    try:
        asked = connection.receive(Kind.CHALLENGE, limits=GREETING, within_s=within_s)
        if asked is None:
            raise ConnectionError("the connection ended in the greeting")
        proof = _proof(address.key, str(asked.meta.get("nonce"))).decode()
        connection.send(Kind.PROOF, {"proof": proof}, within_s=within_s)
    except BaseException:
        connection.close()
        raise
    return connection


def _proof(key: bytes, nonce: str) -> bytes:
    return hmac.new(key, nonce.encode(), "sha256").hexdigest().encode()


def _checked_header(header: Any, kinds: Sequence[Kind], limits: Limits) -> tuple[Kind, int, int]:
    magic, version, kind, _, meta, data = _HEADER.unpack(header)
    if magic != MAGIC:
        raise FrameError("what came does not begin like a frame")
    if version != VERSION:
        raise FrameError(f"a frame of version {version}, expected {VERSION}")
    if kind not in kinds:
        raise FrameError(f"a frame of kind {kind}, expected {' or '.join(known.name for known in kinds)}")
    if meta > limits.meta or data > limits.data:
        raise FrameError(f"a frame of {meta} + {data} bytes, at most {limits.meta} + {limits.data} are read")
    return Kind(kind), meta, data


def _parsed(text: Any) -> dict[str, Any]:
    try:
        meta = json.loads(text.tobytes())
    except ValueError as error:
        raise FrameError(f"a frame without JSON: {error}") from error
    if not isinstance(meta, dict):
        raise FrameError("a frame whose JSON is no object")
    return meta


def _checked_shapes(shapes: Any, data_bytes: int) -> list[tuple[int, ...]]:
    if not (isinstance(shapes, list) and len(shapes) <= _MOST_ARRAYS and all(map(_is_shape, shapes))):
        raise FrameError("a frame without shapes of its arrays")
    if sum(map(math.prod, shapes)) * _FLOAT.itemsize != data_bytes:
        raise FrameError(f"a frame of {data_bytes} bytes, shapes say {sum(map(math.prod, shapes)) * _FLOAT.itemsize}")
    return [tuple(shape) for shape in shapes]


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) <= _MOST_AXES and all(type(n) is int and n >= 0 for n in shape)


def _arrays(data: Any, shapes: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, ...]:
    edges = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    parts = np.split(data.view(_FLOAT), edges) if shapes else []
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))


def _by(within_s: float | None) -> float | None:
    return None if within_s is None else time.monotonic() + within_s


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left
