"""Many requests, one network call a step: rows in, rows out, no cluster in it (`serve/` wraps it).

engine.py steps all images in flight; rendezvous.py lets steering methods run side by side, and merging.py makes one
call of what they ask for; schedule.py says whose turn it is; job.py and snapshot.py: what goes in and what is kept.
"""

from mfm_ray.engine.engine import Engine, EngineClosedError, Pass, Ticket
from mfm_ray.engine.job import Finished, Job
from mfm_ray.engine.snapshot import Snapshot

__all__ = ["Engine", "EngineClosedError", "Finished", "Job", "Pass", "Snapshot", "Ticket"]
