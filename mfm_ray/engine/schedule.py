"""Whose turn it is: work is shared evenly between keys, and between the jobs of a key."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mfm_ray.engine.job import ImageInFlight, JobInFlight


class Schedule:
    """Start-time fair queueing (Goyal et al. 1996): whoever was served the fewest rows goes next.

    A newcomer begins where the least served of the others stands, so that it neither waits for them to be overtaken nor
    overtakes them for long: nobody starves.
    """

    def __init__(self) -> None:
        self.jobs: list[JobInFlight] = []
        self._served: dict[str, float] = {}

    def add(self, job: JobInFlight) -> None:
        key = job.job.key
        if not any(other.job.key == key for other in self.jobs):
            active = [self._served[other.job.key] for other in self.jobs]
            self._served[key] = min(active, default=0.0)
        job.served = min((other.served for other in self.jobs if other.job.key == key), default=0.0)
        self.jobs.append(job)

    def remove(self, job: JobInFlight) -> None:
        self.jobs.remove(job)
        if not any(other.job.key == job.job.key for other in self.jobs):
            del self._served[job.job.key]

    def take(
        self, max_rows: int, among: Callable[[JobInFlight], bool] = lambda job: True
    ) -> list[tuple[JobInFlight, ImageInFlight]]:
        """Images for one pass, marked busy: as many as fit into max_rows, one at least where any is ready.

        among: whether a job may be taken now.
        """
        ready = {id(job): job.ready() if among(job) else [] for job in self.jobs}
        taken: list[tuple[JobInFlight, ImageInFlight]] = []
        rows = 0
        while (job := self._next(ready)) is not None:
            if taken and rows + job.job.rows > max_rows:
                ready[id(job)] = []  # too large for what is left; a smaller one may fit
                continue
            image = ready[id(job)].pop(0)
            image.busy = job.begun = True
            rows += job.job.rows
            job.served += job.job.rows
            self._served[job.job.key] += job.job.rows
            taken.append((job, image))
        return taken

    def _next(self, ready: dict[int, list[ImageInFlight]]) -> JobInFlight | None:
        candidates = [job for job in self.jobs if ready[id(job)]]
        return min(candidates, key=lambda job: (self._served[job.job.key], job.served), default=None)

    def rows(self, *, begun: bool) -> int:
        """Rows of a step of all jobs that have, or have not, begun."""
        return sum(job.job.rows * job.job.num_images for job in self._which(begun))

    def count(self, *, begun: bool) -> int:
        return len(self._which(begun))

    def _which(self, begun: bool) -> Sequence[JobInFlight]:
        return [job for job in self.jobs if job.begun == begun]
