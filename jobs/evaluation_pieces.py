"""Pieces of an evaluation as files of its run, made here or by Ray workers; what is there already is not made again.

pieces/nfe_1/part-00003-of-00050.safetensors    features and what else the protocol keeps of items 3000 to 3999
pieces/nfe_1/_part-00003-of-00050.json          its record, written after it
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jobs.cluster import ray_cluster
from jobs.contract import JobRun
from jobs.sample import own_device
from jobs.sample_maker import Progress, make_here
from jobs.sample_pool import choose_workers, make_on_ray
from jobs.sample_shards import Record, Shard, checksum, finished_records, refuse_other_device, sha256
from mfm_ray.protocols.pieces import Maker, Piece, on_cpu
from mfm_ray.storage import Storage

FOLDER = "pieces"


def shard_of(index: int, piece: Piece) -> Shard:
    """The file of the index-th of all pieces."""
    file = f"{FOLDER}/{piece.part}/part-{piece.index:05d}-of-{piece.of:05d}.safetensors"
    return Shard(index=index, file=file, first_image=piece.first, count=piece.count)


@dataclass(frozen=True, kw_only=True)
class PieceShardMaker:
    """Writes pieces as shards; travels to the workers. pieces: by file; settings: hash of what decides them."""

    maker: Maker
    pieces: Mapping[str, Piece]
    settings: str
    run: Storage
    device: str

    def move(self) -> None:
        self.maker.move(self.device)

    def make(self, shard: Shard, progress: Any) -> Record:
        """Makes the piece, writes its file and, last, its record."""
        import safetensors.torch

        content = safetensors.torch.save(on_cpu(self.maker.make(self.pieces[shard.file], progress)))
        self.run.write_bytes(shard.file, content)
        record = Record(
            file=shard.file,
            first_image=shard.first_image,
            count=shard.count,
            rows=shard.count,
            sha256=sha256(content),
            nfe=0.0,
            reward=None,
            reward_std=None,
            settings=self.settings,
            device=self.device,
        )
        assert shard.record is not None
        self.run.write_json(shard.record, asdict(record))
        return record


@dataclass(frozen=True, kw_only=True)
class StoredPieces:
    """`mfm_ray.protocols.pieces.Pieces` of a run. settings: what decides the pieces' content."""

    run: JobRun
    settings: Mapping[str, Any]

    def __call__(self, maker: Maker, pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
        """Makes what is missing, then reads all back in order."""
        shards = [shard_of(index, piece) for index, piece in enumerate(pieces)]
        named = {shard.file: piece for shard, piece in zip(shards, pieces, strict=True)}
        records = finished_records(self.run.storage, shards, self.settings) if self.run.config.resume else {}
        missing = [shard for shard in shards if shard.index not in records]
        if self.run.config.resume:
            self.run.log(f"{len(shards) - len(missing)} of {len(shards)} pieces are there already")
        if missing:
            made_by = PieceShardMaker(
                maker=maker,
                pieces=named,
                settings=checksum(self.settings),
                run=self.run.storage,
                device="cpu",
            )
            self._make(made_by, missing, list(records.values()), total=sum(piece.count for piece in pieces))
        return (read_piece(self.run.storage, shard) for shard in shards)

    def _make(self, maker: PieceShardMaker, missing: list[Shard], there: list[Record], *, total: int) -> None:
        config, log = self.run.config, self.run.log
        progress = Progress(log, before=sum(record.rows for record in there), total=total)

        def keep(shard: Shard, record: Record) -> None:
            progress.made += record.rows

        if config.scaling.num_workers == 0 or (config.scaling.num_workers is None and len(missing) == 1):
            maker = replace(maker, device=own_device(config))
            refuse_other_device(there, maker.device, where=self.run.storage.uri)
            make_here(maker, missing, keep, progress)
            return
        with ray_cluster(log):
            workers = choose_workers(config.scaling, len(missing))
            maker = replace(maker, device=workers.device)
            refuse_other_device(there, maker.device, where=self.run.storage.uri)
            make_on_ray(maker, missing, keep, progress, workers=workers, log=log)


def read_piece(run: Storage, shard: Shard) -> dict[str, Any]:
    """The tensors of a finished piece by name."""
    import safetensors.torch

    return safetensors.torch.load(run.read_bytes(shard.file))
