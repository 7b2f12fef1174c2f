"""protocol=imagenet_fid: FID, KID, precision and recall of samples by few steps of the map, classes drawn uniformly."""
# ruff: noqa: RUF009 (`setting` only wraps dataclasses.field, it makes no shared default)

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfm_ray.errors import InputError
from mfm_ray.metrics import FeatureStatistics, eight_bit
from mfm_ray.protocols.imagenet import (
    LargeMaterial,
    ReferenceSet,
    SetDistance,
    SetsProtocol,
    batches,
    check_space,
    compare,
    device_of,
    distance_rows,
    figures_parquet,
    merged,
    uniform_labels,
)
from mfm_ray.protocols.pieces import Piece, Pieces, Progress, made_here, moved, plan
from mfm_ray.samplers import refine
from mfm_ray.settings import setting

REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True)
class ImagenetFidProtocol(SetsProtocol):
    """Settings of the evaluation; the defaults stand in conf/protocol/imagenet_fid.yaml."""

    reference: str | None = setting("ADM's .npz batch that samples are compared with; null: the held-out data")
    nfe: list[int] = setting("network calls of a sample, each measured: steps of the kernel sampler", minimum=1)
    num_samples: int = setting("samples at each", minimum=4)
    save_images: bool = setting("keep the samples, as .npz batches that ADM's evaluator reads")

    def check(self) -> None:
        """InputError naming the first combination of settings that cannot work."""
        self.check_features()
        if not self.nfe or len(set(self.nfe)) != len(self.nfe):
            raise InputError(f"protocol.nfe={self.nfe}: expected at least one number, all different")


@dataclass(frozen=True)
class FidMaker:
    """Features of samples and of the reference's pictures."""

    protocol: ImagenetFidProtocol
    material: LargeMaterial
    seed: int

    def move(self, device: str) -> None:
        moved(device, self.material.flow_map, self.material.features)

    @torch.no_grad()
    def make(self, piece: Piece, progress: Progress) -> dict[str, Tensor]:
        assert self.material.features is not None
        features, images = [], []
        for first, count in batches(piece.first, piece.count, self.protocol.batch_size):
            samples = self._reference(first, count) if piece.part == REFERENCE else self._samples(piece, first, count)
            features.append(self.material.features(samples).cpu())
            if self.protocol.save_images and piece.part != REFERENCE:
                images.append(eight_bit(samples).cpu())
            elif first == 0 and samples.dim() == 4:
                images.append(eight_bit(samples[:20]).cpu())
            progress(first + count - piece.first)
        kept = {"images": torch.cat(images)} if images else {}
        return {"features": torch.cat(features), **kept}

    def _samples(self, piece: Piece, first: int, count: int) -> Tensor:
        flow_map = self.material.flow_map
        return refine(
            flow_map,
            num_samples=count,
            num_steps=nfe_of(piece.part),
            seed=self.seed,
            label=uniform_labels(flow_map, self.seed, first, count, device=device_of(flow_map)),
            cfg_scale=self.protocol.cfg_scale,
            batch_size=self.protocol.batch_size,
            first_image=first,
        )

    def _reference(self, first: int, count: int) -> Tensor:
        flow_map, batch, rows = self.material.flow_map, self.material.reference, self.material.rows
        if batch is not None:
            return batch.images(first, count).to(device_of(flow_map))
        assert rows is not None
        space = flow_map.space
        return space.clamp(space.to_data_units(rows.part(first, count).to(device_of(flow_map)).states))


@dataclass(frozen=True)
class FidEvaluation:
    """All that the report shows. reference_count: pictures behind KID, precision and recall, 0 for moments alone."""

    protocol: ImagenetFidProtocol
    measured: tuple[SetDistance, ...]
    floor: float | None
    reference_count: int
    reference_images: Tensor
    seconds: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Flat names to numbers: `nfe_1.fid`, ..."""
        named = {} if self.floor is None else {"fid.floor": self.floor}
        for found in self.measured:
            named |= found.metrics("fid")
        return named


def part_of(nfe: int) -> str:
    return f"nfe_{nfe}"


def nfe_of(part: str) -> int:
    return int(part.removeprefix("nfe_"))


def planned(protocol: ImagenetFidProtocol, material: LargeMaterial) -> list[Piece]:
    """Samples first: the reference's features are known soon enough."""
    pieces = [piece for nfe in protocol.nfe for piece in plan(part_of(nfe), protocol.num_samples, protocol.piece_size)]
    return [*pieces, *plan(REFERENCE, _reference_rows(material), protocol.piece_size)]


def check_imagenet_fid(protocol: ImagenetFidProtocol, material: LargeMaterial) -> None:
    """InputError where protocol, model and reference do not fit."""
    check_space(material.flow_map, protocol.features)
    batch, rows = material.reference, _reference_rows(material)
    shown = protocol.reference or "held-out data"
    if batch is not None and not rows and protocol.features != "inception":
        raise InputError(
            f"protocol.reference={shown} holds moments of Inception's features alone; expected features=inception"
        )
    if batch is None or rows:
        wanted = tuple(material.flow_map.space.to_data_units(_one_state(material)).shape[1:])
        found = wanted if batch is None else batch.image_shape
        # Inception resizes; without it a difference is one of size
        if protocol.features != "inception" and found != wanted:
            raise InputError(f"protocol.reference={shown}: pictures {found}, expected the model's {wanted}")
        if rows < max(4, protocol.neighbours + 1):
            raise InputError(f"protocol.reference={shown}: {rows} pictures, expected more")
    if protocol.save_images and material.flow_map.space.data_range is None:
        raise InputError("protocol.save_images=true: the model makes no pictures; expected false")


def evaluate_imagenet_fid(
    protocol: ImagenetFidProtocol,
    material: LargeMaterial,
    *,
    seed: int = 0,
    log: Callable[[str], None] = print,
    pieces: Pieces = made_here,
) -> FidEvaluation:
    """Draws, looks, compares."""
    check_imagenet_fid(protocol, material)
    began, todo = time.monotonic(), planned(protocol, material)
    features: dict[str, list[Tensor]] = {}
    shown: dict[str, Tensor] = {}
    for piece, made in zip(todo, pieces(FidMaker(protocol, material, seed), todo), strict=True):
        features.setdefault(piece.part, []).append(made["features"])
        if piece.first == 0 and "images" in made:
            shown[piece.part] = made["images"][:20]
    drawn = time.monotonic()
    log(f"  distances of {len(protocol.nfe)} sets")
    reference = _reference_set(protocol, material, features)
    none = torch.zeros(0)
    measured = tuple(
        compare(
            protocol,
            features[part_of(nfe)],
            reference,
            key=part_of(nfe),
            label=f"{nfe} call{'s' if nfe > 1 else ''}",
            nfe=nfe,
            time=None,
            images=shown.get(part_of(nfe), none),
            seed=seed,
        )
        for nfe in protocol.nfe
    )
    return FidEvaluation(
        protocol=protocol,
        measured=measured,
        floor=reference.floor,
        reference_count=_reference_rows(material),
        reference_images=shown.get(REFERENCE, none),
        seconds={"samples and features": drawn - began, "distances": time.monotonic() - drawn},
    )


def imagenet_fid_parquet(evaluation: FidEvaluation) -> bytes:
    return figures_parquet(list(distance_rows("fid", evaluation.measured)))


def _one_state(material: LargeMaterial) -> Tensor:
    return torch.zeros(1, *material.flow_map.event_shape, device=device_of(material.flow_map))


def _reference_rows(material: LargeMaterial) -> int:
    if material.reference is not None:
        return material.reference.num_images
    assert material.rows is not None
    return len(material.rows)


def _reference_set(
    protocol: ImagenetFidProtocol, material: LargeMaterial, features: dict[str, list[Tensor]]
) -> ReferenceSet:
    """The file's own moments where it has some and they are of these features, else those of its pictures."""
    parts = features.get(REFERENCE, [])
    rows = torch.cat(parts) if parts else None
    batch = material.reference
    if batch is not None and batch.has_moments and protocol.features == "inception":
        return ReferenceSet(batch.moments(), rows)
    moments: FeatureStatistics = merged(parts)
    return ReferenceSet(moments, rows)
