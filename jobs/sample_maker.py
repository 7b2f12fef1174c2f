"""Makes the shards of a sampling job one after the other, and says how far the job is."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.sample_shards import Record, Shard, make_record, picture_of, samples_parquet
from mfm_ray.config import SampleConfig
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage

Log = Callable[[str], None]
Keep = Callable[[Shard, Record], None]
_LINE_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class ShardMaker:
    """Flow map and steering with all that a shard needs beside its number; travels to the workers.

    device: "cpu" or "cuda", where `move` brings the flow map and the reward.
    """

    flow_map: Any
    steering: Any
    judges: Mapping[str, Any]
    config: SampleConfig
    settings: Mapping[str, Any]
    run: Storage
    device: str

    def move(self) -> None:
        reward: Any = getattr(self.steering, "reward", None)
        for module in (self.flow_map, reward, *self.judges.values()):
            if hasattr(module, "to"):
                module.to(self.device)

    def make(self, shard: Shard, progress: Callable[[int], None]) -> Record:
        """Draws the images, writes file, picture and, last, record. InputError for what the sampler refuses.

        progress: called with the images of this shard that are done.
        """
        config = self.config
        drawn = draw_samples(
            self.flow_map,
            self.steering,
            self.judges,
            config,
            first_image=shard.first_image,
            count=shard.count,
            progress=progress,
        )
        content = samples_parquet(drawn, label=config.label, seed=config.seed, first_image=shard.first_image)
        self.run.write_bytes(shard.file, content)
        if shard.picture is not None and self.flow_map.space.makes_images:
            self.run.write_bytes(shard.picture, picture_of(drawn.images))
        record = make_record(shard, content, drawn, settings=self.settings, device=self.device)
        if shard.record is not None:
            self.run.write_json(shard.record, asdict(record))
        return record


def draw_samples(
    flow_map: Any,
    steering: Any,
    judges: Mapping[str, Any],
    config: SampleConfig,
    *,
    first_image: int,
    count: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Any:
    """`Samples` of the images first_image, first_image + 1, ... of a job. InputError for what the sampler refuses."""
    from mfm_ray.samplers import sample

    try:
        return sample(
            flow_map,
            num_samples=count,
            first_image=first_image,
            steering=steering,
            num_steps=config.num_steps,
            dynamics=config.dynamics,
            order=config.order,
            max_nfe=config.max_nfe,
            judges=judges,
            seed=config.seed,
            label=config.label,
            cfg_scale=config.cfg_scale,
            preset=config.preset,
            batch_size=config.batch_size,
            progress=lambda done, _: progress(done),
        )
    except ValueError as error:  # what `sample` raises for arguments and rewards that cannot be used
        raise InputError(str(error)) from error


class Progress:
    """A line every ten seconds: images done, images a second and time left over all workers."""

    def __init__(self, log: Log, *, before: int, total: int) -> None:
        self._log, self._before, self._total = log, before, total
        self.made = 0  # images of finished shards of this call
        self.began = self._spoke = time.monotonic()

    def restart(self) -> None:
        """The clock begins when there is somebody to work."""
        self.began = self._spoke = time.monotonic()

    @property
    def images_per_second(self) -> float:
        """Of the finished shards of this call."""
        return self.made / max(time.monotonic() - self.began, 1e-9)

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._spoke >= _LINE_EVERY_S

    def tell(self, unfinished: int, workers: int) -> None:
        """unfinished: images done of shards that are being made."""
        self._spoke = time.monotonic()
        made, seconds = self.made + unfinished, self._spoke - self.began
        done = self._before + made
        if done >= self._total:
            return
        left = f"{_duration(seconds * (self._total - done) / made)} left" if made else "no image is done yet"
        rate = f"{made / seconds:,.1f} images/s" if made else f"{seconds:.0f} s"
        who = f", {workers} worker{'s' if workers != 1 else ''}" if workers else ""
        self._log(f"{done:,} of {self._total:,} images, {rate}{who}, {left}")


def make_here(maker: ShardMaker, shards: Sequence[Shard], keep: Keep, progress: Progress) -> None:
    """The shards one after the other in this process, with all its threads; each goes to `keep` when it is written."""

    def tell(done: int) -> None:
        if progress.is_due:
            progress.tell(done, 0)

    maker.move()
    progress.restart()
    for shard in shards:
        keep(shard, maker.make(shard, tell))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
