"""Typed settings: frozen dataclasses whose fields state what is allowed, built from plain nested dicts.

A field made by `setting(...)` carries one line of help and its bounds; `from_dict` builds the dataclass and
refuses whatever does not fit with one line that names key, value and what is allowed. Values live in the YAML
files of `mfm_ray/conf`, not here, so a field has no default and a missing key is an error.
"""

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mfm_ray.errors import InputError

Settings = TypeVar("Settings")
_LONGEST_NAME = 200
"""Beyond which nobody meant a name; comparing a megabyte of text would take seconds."""


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What a setting may be beyond its type. `above` and `below` are open bounds, `length` that of a list."""

    doc: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] | None = None
    length: int | None = None

    def admits(self, value: Any) -> bool:
        if isinstance(value, list | dict):
            items = value if isinstance(value, list) else list(value.values())
            return self.length in (None, len(items)) and all(self.admits(item) for item in items)
        if self.choices is not None and value not in self.choices:
            return False
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def bounds(self) -> str:
        named = (
            ("of at least", self.minimum),
            ("above", self.above),
            ("of at most", self.maximum),
            ("below", self.below),
        )
        return " and ".join(f"{word} {bound}" for word, bound in named if bound is not None)


def setting(doc: str, **bounds: Any) -> Any:
    """A required dataclass field with help and bounds (the arguments of `Allowed`)."""
    return dataclasses.field(metadata={"allowed": Allowed(doc=doc, **bounds)})


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name most like `word`, or None where nothing is alike.

    A dotted name is also found by its last part, so that `stage` finds `zero.stage`.
    """
    names, word = list(names), word[:_LONGEST_NAME]
    by_last = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
    last = word.rsplit(".", 1)[-1]
    if word not in names and last in by_last:
        return by_last[last]
    for close, cutoff, table in ((word, 0.6, {name: name for name in names}), (last, 0.7, by_last)):
        if found := difflib.get_close_matches(close, table, n=1, cutoff=cutoff):
            return table[found[0]]
    return None


def from_dict(cls: type[Settings], values: Mapping[str, Any], *, prefix: str = "") -> Settings:
    """Builds the settings dataclass `cls` from a plain nested dict.

    Raises:
        InputError: a key is unknown or missing, a value has the wrong type or is out of bounds; one line.
    """
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise unknown_key(f"{prefix}{key}", [f"{prefix}{name}" for name in known])
    built = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        key = f"{prefix}{field.name}"
        if field.name not in values:
            raise InputError(f"{key}: missing; expected {expected(hints[field.name], field.metadata['allowed'])}")
        built[field.name] = _convert(values[field.name], hints[field.name], field.metadata["allowed"], key)
    return cls(**built)


def unknown_key(key: str, known: Iterable[str]) -> InputError:
    """The error for a key that nothing reads, with the nearest one that something does."""
    known = sorted(set(known))
    close = nearest(key, known)
    depth = min((name.count(".") for name in known), default=0)
    outermost = [name for name in known if name.count(".") == depth]
    hint = f"did you mean {close}?" if close else f"known keys are {', '.join(outermost)}"
    return InputError(f"{key}: unknown key; {hint}")


def expected(hint: Any, allowed: Allowed) -> str:
    """What a setting may be, in words: `one of fp32, bf16`, `a whole number of at least 1, or null`."""
    text = " or ".join(_kind(member) for member in _members(hint) if member is not type(None))
    if allowed.choices is not None:
        text = f"one of {', '.join(map(str, allowed.choices))}"
    elif allowed.bounds():
        text = f"{text} {allowed.bounds()}"
    if allowed.length is not None:
        text = text.replace("a list [...] of", f"a list [...] of {allowed.length}")
    return f"{text}, or null" if type(None) in _members(hint) else text


def leaves(cls: type, *, prefix: str = "") -> dict[str, tuple[Any, Allowed]]:
    """Type and bounds of every setting below `cls`, by dotted key, in the order of the class."""
    hints = typing.get_type_hints(cls)
    found: dict[str, tuple[Any, Allowed]] = {}
    for field in dataclasses.fields(cls):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= leaves(typing.cast(type, hint), prefix=f"{key}.")
        else:
            found[key] = (hint, field.metadata["allowed"])
    return found


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _kind(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is list:
        return f"a list [...] of {_kind(typing.get_args(hint)[0]).removeprefix('a ')}s"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a group of keys"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[hint]


def _convert(value: Any, hint: Any, allowed: Allowed, key: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(typing.cast(type, hint), value, prefix=f"{key}.")
    for member in _members(hint):
        fits, converted = _fit(value, member)
        if fits and (converted is None or allowed.admits(converted)):
            return converted
    close = nearest(str(value), map(str, allowed.choices)) if allowed.choices else None
    hint_text = f"; did you mean {close}?" if close else ""
    finite = "" if _is_finite(value) else ", all its numbers finite"
    raise InputError(f"{key}={shown(value)}: expected {expected(hint, allowed)}{finite}{hint_text}")


def _is_finite(value: Any) -> bool:
    """Whether no list or group holds NaN or an infinity; a number by itself is refused by what its bounds say."""
    if isinstance(value, float):
        return True
    waiting = [value]
    while waiting:  # not by recursion: a request may be as deep as it likes
        item = waiting.pop()
        if isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif isinstance(item, float) and not math.isfinite(item):
            return False
    return True


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether `value` is of the type, and the value as that type; a whole number is a number, true is not."""
    origin = typing.get_origin(hint)
    if hint is type(None):
        return value is None, None
    if origin is list and isinstance(value, list | tuple):
        fitted = [_fit(item, typing.get_args(hint)[0]) for item in value]
        return all(fits for fits, _ in fitted), [item for _, item in fitted]
    if origin is dict and isinstance(value, Mapping):
        fitted = [_fit(item, typing.get_args(hint)[1]) for item in value.values()]
        return all(fits for fits, _ in fitted), dict(zip(value, (item for _, item in fitted), strict=True))
    if hint is Any:
        return True, value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return (True, float(value)) if abs(value) <= sys.float_info.max else (False, value)
    if hint in (int, float, str, bool):
        return type(value) is hint, value
    return False, value


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    words = {None: "null", True: "true", False: "false"}
    is_word = value is None or isinstance(value, bool)
    return words[value] if is_word else str(value).replace("\n", "\\n")
