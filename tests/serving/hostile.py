"""Requests that nobody means well with: what is sent, and the answers that are allowed."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

GENERATIONS = "/v1/images/generations"
SCORE = "/v1/rewards/symmetry/score"
REFUSED = (400,)


@dataclass(frozen=True)
class Attack:
    """A request, and the statuses that answer it. content None: no body."""

    name: str
    path: str = GENERATIONS
    method: str = "POST"
    content: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    expected: tuple[int, ...] = REFUSED


def steering(text: str) -> bytes:
    """A request with so much text as its steering."""
    return b'{"steering": ' + text.encode() + b"}"


def reward(params: str, name: str = "symmetry") -> bytes:
    return steering(f'{{"num_steps": 2, "rewards": [{{"name": "{name}", "params": {params}}}]}}')


def attacks(body_bytes: int) -> list[Attack]:
    """All that can be said in one well-formed HTTP request."""
    return [*_numbers(), *_shapes(), *_encodings(body_bytes), *_pictures(), *_paths(), *_headers(), *_methods()]


def _numbers() -> Iterator[Attack]:
    huge = "1" + "0" * 400  # beyond every float
    for value in (
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        huge,
        f"-{huge}",
        "9" * 5000,
        "-1",
        "1e308",
        "true",
    ):
        for key in ("n", "seed", "class_label", "cfg_scale", "partial_images"):
            yield Attack(f"{key}={value[:12]}", content=f'{{"{key}": {value}}}'.encode())
        for key in ("num_draws", "num_particles", "num_steps", "max_nfe", "deadline_s", "guidance_scale"):
            if (key, value) != ("guidance_scale", "1e308"):
                text = f'{{"{key}": {value}, "rewards": [{{"name": "symmetry"}}], "method": "search"}}'
                expected = (200, 400) if (key, value) == ("max_nfe", huge) else REFUSED
                yield Attack(f"steering.{key}={value[:12]}", content=steering(text), expected=expected)
        for key in ("scale", "threshold"):
            allowed = (
                (200,)
                if (key == "threshold" and value in ("-1", "1e308")) or (key, value) == ("scale", "1e308")
                else ()
            )
            yield Attack(
                f"params.{key}={value[:12]}", content=reward(f'{{"{key}": {value}}}'), expected=(400, 503, *allowed)
            )
        yield Attack(f"row={value[:12]}", content=reward(f'{{"row": {value}}}', "masked_observation"))
        yield Attack(f"weights={value[:12]}", content=reward(f'{{"weights": [{value}]}}', "class_mixture"))
        weight = f'{{"num_steps": 2, "rewards": [{{"name": "symmetry", "weight": {value}}}]}}'
        may_be = (200, 503) if value in ("-1", "1e308") else ()
        yield Attack(f"weight={value[:12]}", content=steering(weight), expected=(400, *may_be))
        yield Attack(
            f"estimator={value[:12]}",
            content=steering(f'{{"estimator": {value}, "rewards": [{{"name": "symmetry"}}]}}'),
        )


def _shapes() -> Iterator[Attack]:
    for depth in (50, 900, 3000, 200_000):
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            inner = opening * depth + ("1" if opening != "[" else "") + closing * depth
            yield Attack(f"{depth} x {opening}", content=inner.encode())
            yield Attack(f"n: {depth} x {opening}", content=b'{"n": ' + inner.encode() + b"}")
            yield Attack(f"params: {depth} x {opening}", content=reward('{"scale": ' + inner + "}"))
            yield Attack(f"unclosed: {depth} x {opening}", content=(opening * depth).encode())
            yield Attack(f"extra: {depth} x {opening}", content=steering('{"estimator": ' + inner + "}"))
    for text in ("", " ", "null", "[]", "3", '"x"', "{", '{"n": 1,}', '{"n": 1}{"n": 1}', "{'n': 1}", "\x00", "{\x00}"):
        yield Attack(f"body {text!r}", content=text.encode())
    for key, value in {"model": 3, "prompt": [], "size": {}, "stream": "yes", "include": "trace", "user": 1}.items():
        yield Attack(f"{key} is a {type(value).__name__}", content=json.dumps({key: value}).encode())
    many = [{"name": "symmetry"}] * 5000
    yield Attack("5000 rewards", content=json.dumps({"steering": {"rewards": many}}).encode())
    yield Attack("nothing but fields", content=json.dumps({f"f{i}": i for i in range(400_000)}).encode())
    yield Attack("100000 fields", content=json.dumps({f"f{i}": i for i in range(100_000)}).encode())
    yield Attack("long prompt", content=json.dumps({"prompt": "3" * 1_000_000}).encode())
    yield Attack("long name", content=reward("{}", "s" * 500_000), expected=(404,))
    yield Attack("long choice", content=reward('{"axis": "' + "horizontal" * 200_000 + '"}'))
    yield Attack("long key", content=reward('{"%s": 1}' % ("k" * 500_000)))
    yield Attack("long field", content=b'{"%s": 1}' % (b"k" * 500_000))
    yield Attack("long model", content=json.dumps({"model": "m" * 500_000}).encode(), expected=(404,))
    yield Attack(
        "much to do", content=steering('{"rewards": [{"name": "symmetry"}], "num_draws": 256, "num_steps": 999999}')
    )
    yield Attack("1000 includes", content=json.dumps({"include": ["trace"] * 999 + ["x"]}).encode())


def _encodings(body_bytes: int) -> Iterator[Attack]:
    text = '{"prompt": "é"}'
    for encoding in ("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-7"):
        yield Attack(f"body in {encoding}", content=text.encode(encoding))
    yield Attack("byte order mark", content=b"\xef\xbb\xbf" + text.encode())
    for escape in (r"\ud800", r"\udfff\ud800", r"\u0000", r"\u202e", r"\uffff"):
        yield Attack(f"prompt {escape}", content=b'{"prompt": "%s"}' % escape.encode())
        yield Attack(f"field {escape}", content=b'{"%s": 1}' % escape.encode())
        yield Attack(f"model {escape}", content=b'{"model": "%s"}' % escape.encode(), expected=(404,))
        yield Attack(f"size {escape}", content=b'{"size": "%s"}' % escape.encode())
        yield Attack(f"reward {escape}", content=reward("{}", escape), expected=(404,))
        yield Attack(f"parameter {escape}", content=reward(f'{{"{escape}": 1}}'))
        yield Attack(f"axis {escape}", content=reward(f'{{"axis": "{escape}"}}'))
        yield Attack(f"argument {escape}", content=steering(f'{{"{escape}": 1}}'))
        yield Attack(
            f"estimator {escape}", content=steering(f'{{"estimator": "{escape}", "rewards": [{{"name": "symmetry"}}]}}')
        )
        yield Attack(f"image {escape}", SCORE, content=b'{"images": ["%s"]}' % escape.encode())
    yield Attack("a bomb in gzip", content=gzip.compress(b"0" * 50_000_000), headers={"content-encoding": "gzip"})
    yield Attack("too large", content=b" " * (body_bytes + 1), expected=(413,))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int = 8, height: int = 8, *, data: bytes | None = None, before: bytes = b"", depth: int = 8, colour: int = 0
) -> bytes:
    """A PNG, or what only begins like one."""
    pixels = zlib.compress(b"\x00" * (height * (width + 1))) if data is None else data
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _pictures() -> Iterator[Attack]:
    bomb = zlib.compress(b"\x00" * 100_000_000)
    pictures = {
        "size bomb": png(65535, 65535, data=zlib.compress(b"")),
        "size of 2^31": png(2**31 - 1, 2**31 - 1, data=b""),
        "no size": png(0, 0, data=b""),
        "one row too wide": png(9, 8),
        "more data than pixels": png(data=bomb),
        "a text bomb": png(before=chunk(b"zTXt", b"k\x00\x00" + bomb)),
        "a profile bomb": png(before=chunk(b"iCCP", b"p\x00\x00" + bomb)),
        "an international text bomb": png(before=chunk(b"iTXt", b"k\x00\x01\x00\x00\x00" + bomb)),
        "no deflate": png(data=b"\xff" * 50),
        "cut short": png()[:40],
        "odd depth": png(depth=3),
        "odd colour": png(colour=9),
        "a jpeg": b"\xff\xd8\xff\xe0" + b"\x00" * 100,
        "an svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "empty": b"",
    }
    passing = {"more data than pixels", "a text bomb", "a profile bomb", "an international text bomb"}
    for name, content in pictures.items():
        text = base64.b64encode(content).decode()
        expected = (200, 400) if name in passing else REFUSED
        yield Attack(f"score {name}", SCORE, content=json.dumps({"images": [text]}).encode(), expected=expected)
        for key in ("observed", "mask"):
            given = json.dumps({"observed": base64.b64encode(png()).decode(), key: text})
            yield Attack(f"{key} {name}", content=reward(given, "masked_observation"), expected=expected)
    whole = png()
    for place in range(len(whole)):
        broken = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        body = {"images": [base64.b64encode(broken).decode()]}
        yield Attack(f"byte {place} turned", SCORE, content=json.dumps(body).encode(), expected=(200, 400))
    for text in ("data:image/png;base64,", "http://127.0.0.1:1/x.png", "file:///etc/passwd", "=" * 1000, "A" * 999_999):
        yield Attack(f"image {text[:20]}", SCORE, content=json.dumps({"images": [text]}).encode())
    yield Attack("no images", SCORE, content=b'{"images": []}')
    yield Attack("10000 images", SCORE, content=json.dumps({"images": ["A"] * 10_000}).encode())


def _paths() -> Iterator[Attack]:
    for path in (
        "/v1/models/..%2f..%2f..%2fetc%2fpasswd",
        "/v1/models/%2e%2e%2f%2e%2e",
        "/v1/models/%00",
        "/v1/models/%ff%fe",
        "/v1/models/" + "m" * 20_000,
        "/playground/..%2f..%2fgate.py",
        "/playground/%2e%2e/%2e%2e/etc/passwd",
        "/playground//etc/passwd",
        "/v1/%75nknown",
        "/.git/config",
        "/.env",
        "/serve/api.py",
        "//evil.example/%2f..",
        "/\\..\\..\\windows",
    ):
        yield Attack(f"path {path[:40]}", path, "GET", expected=(404, 400))
    for row in ("-1", "99999999999999999999999", "1e3", "0x10", "%00", "' OR 1=1"):
        yield Attack(f"row {row}", f"/v1/models/tiny/heldout/{row}", "GET", expected=(400, 404))
    for name in ("..%2fsymmetry", "%00", "os.system", "__class__", "symmetry%0d%0aX: y", "none", "weighted_sum"):
        yield Attack(
            f"score of {name}", f"/v1/rewards/{name}/score", content=b'{"images": ["AAAA"]}', expected=(404, 400)
        )
    for query in ("?n=99", "?" + "a=b&" * 5000, "?%ff=%00", "?__proto__=1"):
        yield Attack(f"query {query[:12]}", "/v1/models" + query, "GET", expected=(200, 400, 414))


def _headers() -> Iterator[Attack]:
    small = b'{"steering": {"num_steps": 1}}'
    for name, value in {
        "x-request-id": "x" * 10_000,
        "x-REQUEST-id": "a b;c\tσ".encode().decode("latin-1"),
        "accept": "x/" * 3000,
        "accept-encoding": "gzip;q=nan",
        "cookie": "a=" + "b" * 6000,
        "host": "evil.example",
        "origin": "null",
        "forwarded": "for=127.0.0.1",
        "x-forwarded-for": "127.0.0.1",
        "range": "bytes=0-0,1-1,2-2",
        "expect": "200-maybe",
        "serve_multiplexed_model_id": "../../other",
        "x-http-method-override": "DELETE",
        "traceparent": "00-zz-zz-01",
    }.items():
        yield Attack(f"header {name}", content=small, headers={name: value}, expected=(200, 400, 417, 431))
    for value in ("", "k" * 100_000, "k" * 2000, "\xff\xfe", "a b"):
        yield Attack(
            f"idempotency-key of {len(value)}",
            content=small,
            headers={"idempotency-key": value},
            expected=(200, 400, 431),
        )
    for value in (
        "text/plain",
        "application/json/x",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "",
    ):
        yield Attack(f"content-type {value}", content=small, headers={"content-type": value})
    for value in ("application/json; charset=utf-16", "application/json; charset=nonsense", "application/json;;;"):
        yield Attack(f"content-type {value}", content=small, headers={"content-type": value}, expected=(200, 400))


def _methods() -> Iterator[Attack]:
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "GET", "HEAD", "PROPFIND", "X" * 50):
        yield Attack(f"{method[:9]} generations", method=method, expected=(405, 400))
    for path in ("/v1/models", "/healthz", "/", "/v1/methods"):
        yield Attack(f"POST {path}", path, content=b"{}", expected=(405,))


NO_HTTP = [
    b"\x00" * 2000,
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET " + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 5000 + b"\r\n",
    b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nx-request-id: a\r\n b\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]
"""What is no HTTP, or nearly."""
ANSWER_S = 60.0


def raw(port: int, content: bytes) -> bytes:
    """What the server says to bytes; nothing where it hangs up, or waits for more."""
    with socket.create_connection(("127.0.0.1", port), timeout=1) as line:
        try:
            line.sendall(content)
            return line.recv(65536)
        except (ConnectionError, TimeoutError):
            return b""


def slow_body(port: int, key: str) -> bytes:
    """Headers, a part of the body, and nothing more; what the server says in the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as line:
        line.sendall(_head(100, key) + b'{"n": 1')
        return line.recv(65536)


def goes_away(port: int, key: str, body: dict[str, Any], after_s: float) -> None:
    """A request whose client hangs up."""
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as line:
        line.sendall(_head(len(content), key) + content)
        time.sleep(after_s)


def _head(length: int, key: str) -> bytes:
    return (
        f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()
