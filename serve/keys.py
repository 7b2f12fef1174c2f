"""Who may ask: keys compared in constant time, or, without any key, this machine alone."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mfm_ray.errors import InputError

from .errors import ApiError

VARIABLE = "MFM_RAY_API_KEYS"
OPEN = f"no keys are set ({VARIABLE}, or keys_file): only clients on this machine are answered"


@dataclass(frozen=True)
class Keys:
    """SHA-256 of each accepted key, so that a dump of this process holds none of them."""

    digests: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, keys: list[str]) -> Keys:
        return cls(tuple(_digest(key.strip()) for key in keys if key.strip()))

    @classmethod
    def load(cls, keys_file: str | None = None, environment: Mapping[str, str] = os.environ) -> Keys:
        """Keys of the environment variable (comma separated) and of a file (one a line, # for remarks)."""
        keys = environment.get(VARIABLE, "").split(",")
        if keys_file is not None:
            keys += _lines(keys_file)
        loaded = cls.of(keys)
        if keys_file is not None and not loaded.digests:
            raise InputError(f"keys_file={keys_file}: holds no key")
        return loaded

    def __bool__(self) -> bool:
        return bool(self.digests)

    def admit(self, authorization: str | None, client: str | None) -> str:
        """A fingerprint of the caller's key, by which requests are kept fair. ApiError 401 for anybody else."""
        if not self:
            if is_loopback(client):
                return ""
            raise _refused(f"this server answers other machines only when it has keys; {OPEN}")
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _refused("no key; expected the header Authorization: Bearer KEY")
        digest = _digest(key.strip())
        # every key is compared, so that the time taken says nothing about which one is near
        matches = sum(hmac.compare_digest(digest, known) for known in self.digests)
        if not matches:
            raise _refused("wrong key; expected one that this server was given")
        return digest.hex()[:16]


def is_loopback(client: str | None) -> bool:
    """Whether an address is of this machine; unix sockets have none and are."""
    if not client:
        return False
    try:
        return ipaddress.ip_address(client.partition("%")[0]).is_loopback
    except ValueError:
        return client == "localhost"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _lines(path: str) -> list[str]:
    try:
        return [line.partition("#")[0] for line in Path(path).read_text().splitlines()]
    except OSError as error:
        raise InputError(f"keys_file={path}: cannot be read: {error.strerror}") from error


def _refused(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", retry=False)
