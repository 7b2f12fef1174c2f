"""The folder of one run, `<storage>/<name>`: who may use it, and the files that describe the run.

A run marks its folder with `run.json` before it starts, so that a killed run is known for what it is, and ends with
`result.json`. A folder is only ever emptied when it is marked as a run of the same job.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

from mfm_ray.config import JobConfig
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage

MARKER = "run.json"
RESULT = "result.json"
ERROR_LOG = "error.log"
# What Ray's job supervisor gives to the driver of `ray job submit` and to no other process.
SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_NAME = re.compile(r"\w[\w.+=@-]{0,199}")


@dataclass(frozen=True, kw_only=True)
class Occupant:
    """What stands in a run's folder: its files, whose run it is, and how that ended."""

    files: frozenset[str]
    job: str | None
    status: str | None

    @property
    def is_free(self) -> bool:
        """Nothing is there but, perhaps, what an earlier call with a mistake left."""
        return not self.files or (self.status == "invalid" and self.files <= {MARKER, RESULT, ERROR_LOG})


class RunFolder:
    """The folder of the run that `config` describes.

    Raises:
        InputError: name or storage cannot be used as they are.
    """

    def __init__(self, job: str, config: JobConfig) -> None:
        if not _NAME.fullmatch(config.name):
            raise InputError(
                f"name={config.name}: expected letters, digits and . _ + = @ -, beginning with a letter or digit"
            )
        is_relative = "://" not in config.storage and not os.path.isabs(os.path.expanduser(config.storage))
        if is_relative and is_submitted():
            raise InputError(
                f"storage={config.storage}: a submitted job's working directory is temporary; "
                "expected an absolute path or a URI"
            )
        self.job = job
        self.name = config.name
        self.storage = Storage(config.storage).child(config.name)

    def occupant(self) -> Occupant:
        if not self.storage.exists():
            return Occupant(files=frozenset(), job=None, status=None)
        if not self.storage.is_dir():
            raise InputError(f"name={self.name}: {self.storage.uri} is a file; choose another name")
        files = frozenset(self.storage.listdir())
        marker, result = (self._read(name) if name in files else {} for name in (MARKER, RESULT))
        return Occupant(files=files, job=result.get("job", marker.get("job")), status=result.get("status"))

    def claim(self, *, resume: bool, overwrite: bool) -> Occupant:
        """Refuses a folder that this run may not use; changes nothing."""
        found = self.occupant()
        where = f"name={self.name}: {self.storage.uri}"
        if found.is_free:
            return found
        if found.job is None:
            raise InputError(f"{where} is not empty and holds no run; choose another name")
        if found.job != self.job:
            raise InputError(f"{where} holds a run of jobs.{found.job}; choose another name")
        if not (resume or overwrite):
            raise InputError(f"{where} exists; choose another name, resume=true or overwrite=true")
        return found

    def begin(self, marker: dict[str, Any], *, clear: bool) -> None:
        """Makes the folder ready: proves that it can be written, removes the old run if asked, and marks it.

        Raises:
            UnusableStorageError: the folder cannot be written.
        """
        self.storage.check_writable()
        if clear:
            self.storage.delete()
        self.storage.delete(ERROR_LOG)
        self.storage.write_json(MARKER, marker)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            value = self.storage.read_json(name)
        except InputError:
            return {}
        return value if isinstance(value, dict) else {}


def is_submitted() -> bool:
    """Whether this process is the driver of a job that `ray job submit` started."""
    return "job_submission_id" in os.environ.get(SUBMITTED_JOB, "")
