"""Folders of models, autoencoders and rewards: local ones, or `hf://owner/name` of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from mfm_ray.errors import InputError

SCHEME = "hf://"
_ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")


def is_hub(source: str | Path) -> bool:
    """Whether the source is on the hub, `hf://owner/name` or `hf://owner/name@revision`."""
    return str(source).startswith(SCHEME)


def local_folder(source: str | Path, *, key: str, files: Sequence[str] | None = None) -> Path:
    """The folder itself, or the hub's in the local cache, downloaded where it is not there yet.

    source: a folder, or `hf://owner/name[@revision]` (a branch, a tag or a commit). key: what the user calls it, for
    errors. files: patterns of what is needed of a hub's folder; None for all of it.

    InputError for a folder that does not exist, a malformed address, a repository that does not exist or is closed,
    and a machine that cannot reach the hub and has no copy.
    """
    if is_hub(source):
        return _from_hub(str(source), key, files)
    folder = Path(source)
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{key}={source} {found}, expected a local folder or hf://owner/name")
    return folder


def _from_hub(source: str, key: str, files: Sequence[str] | None) -> Path:
    address = _ADDRESS.fullmatch(source)
    if address is None:
        raise InputError(f"{key}={source}: expected hf://owner/name or hf://owner/name@revision")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise InputError(f"{key}={source}: needs huggingface_hub, pip install 'mfm_ray[rewards]'") from error
    repo, revision = address["repo"], address["revision"]
    patterns = None if files is None else list(files)
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except RevisionNotFoundError as error:
        raise InputError(f"{key}={source}: the repository has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{key}={source}: no such repository, or it needs a token (HF_TOKEN)") from error
    except LocalEntryNotFoundError as error:
        raise InputError(f"{key}={source}: {_unreachable()}; a local folder works as well: {key}=/path") from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise InputError(f"{key}={source}: download failed: {reason}") from error


def _unreachable() -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached from here"
    return f"{why}, and the local cache has no whole copy"
