"""Trials of a finished sweep, read back: the words of the swept job by a preset's name or a row's number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mfm_ray.errors import InputError
from mfm_ray.settings import nearest
from mfm_ray.storage import Storage


def words_of_trial(place: str, trial: str) -> list[str]:
    """`words_of_trial("runs/sweep_methods/presets.yaml", "low")`; rows: `words_of_trial(".../results.parquet", "12")`.

    InputError naming what is missing and, for a name, the nearest one.
    """
    folder, _, file = place.rpartition("/")
    ending = file.rpartition(".")[2]
    if ending not in _READERS:
        raise InputError(f"preset={place}#{trial}: expected FILE#trial with a sweep's presets.yaml or results.parquet")
    try:
        content = Storage(folder or ".").read_bytes(file)
    except FileNotFoundError as error:
        raise InputError(f"preset={place}#{trial}: there is no such file") from error
    try:
        trials = _READERS[ending](content)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"preset={place}: cannot be read as the {ending} file of a sweep") from error
    if trial not in trials:
        close = nearest(trial, trials)
        hint = f"; did you mean {close}?" if close else ""
        raise InputError(f"preset={place}#{trial}: expected one of {_some(list(trials))}{hint}")
    return trials[trial]


def _presets(content: bytes) -> dict[str, list[str]]:
    import yaml

    try:
        found = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ValueError("no YAML") from error
    return {name: list(map(str, preset["words"])) for name, preset in found.items()}


def _rows(content: bytes) -> dict[str, list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(content), columns=["trial", "words"])
    return {str(row["trial"]): row["words"] for row in table.to_pylist()}


_READERS: dict[str, Callable[[bytes], dict[str, Any]]] = {"yaml": _presets, "parquet": _rows}


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[:most])}, ... {names[-1]}"
