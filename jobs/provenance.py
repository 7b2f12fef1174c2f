"""What made a result: versions of the packages and the commit of the tree, without importing any of them."""

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import mfm_ray

_TREE = Path(mfm_ray.__file__).resolve().parent.parent


def versions() -> dict[str, str | None]:
    """Versions by name; None for a package that is not installed here."""
    named = {name: _version(name) for name in ("torch", "ray", "deepspeed")}
    return {"python": platform.python_version(), **named, "mfm_ray": _version("mfm_ray") or _version_of_tree()}


def git_commit() -> str | None:
    """The commit that is checked out, None outside a repository (an archive, a submitted job)."""
    if not (_TREE / ".git").exists():
        return None
    command = ["git", "-C", str(_TREE), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_of_tree() -> str | None:
    """From pyproject.toml, where the tree itself travelled as a job's working directory."""
    project = _TREE / "pyproject.toml"
    found = re.search(r'^version = "(.+)"', project.read_text(), re.MULTILINE) if project.is_file() else None
    return found[1] if found else None
