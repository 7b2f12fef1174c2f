"""What the protocols of ImageNet's scale have in common: settings, material, labels, noisy states, distances of sets.

They measure any model whose samples are pictures (or coordinates), latents with a decoder among them, at any size; what
they are named after is where the paper measured them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mfm_ray.data.adm import AdmBatch
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.flow_map import FlowMap
from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.metrics import (
    FeatureExtractor,
    FeatureStatistics,
    Mean,
    kernel_inception_distance,
    precision_recall,
)
from mfm_ray.noise import KeyedNoise, Stream
from mfm_ray.settings import setting
from mfm_ray.steering import Reward

FEATURES = ("inception", "classifier", "raw")
_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class LargeProtocol:
    """Settings that every protocol made in pieces has."""

    name: str = setting("the protocol")
    cfg_scale: float | None = setting("classifier-free guidance; null: none")
    batch_size: int = setting("rows of one network call", minimum=1)
    piece_size: int = setting("items of a piece, which is made and resumed as a whole", minimum=1)


@dataclass(frozen=True, kw_only=True)
class SetsProtocol(LargeProtocol):
    """Settings of a comparison of sets of samples by features."""

    features: str = setting(
        "what distances look at: FID's Inception, the model's classifier, or the numbers", choices=FEATURES
    )
    inception: str | None = setting("weights of FID's Inception: file, folder or hf://owner/name; features=inception")
    kid_subsets: int = setting("random subsets of KID", minimum=2)
    kid_subset_size: int = setting("rows of each", minimum=2)
    neighbours: int = setting("k of precision and recall", minimum=1)
    manifold_rows: int = setting("rows of either set for precision and recall, the first ones", minimum=2)

    def check_features(self) -> None:
        if (self.features == "inception") != (self.inception is not None):
            raise InputError(
                f"protocol.inception={self.inception or 'null'}: expected the weights of FID's Inception with "
                f"features=inception, and null otherwise (features={self.features})"
            )


@dataclass(frozen=True)
class CleanRows:
    """Clean samples as states (N, *event) in model space, with labels (N,), the null class where there is none."""

    states: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.states)

    def part(self, first: int, count: int) -> CleanRows:
        of = slice(first, first + count)
        return CleanRows(self.states[of], None if self.labels is None else self.labels[of])

    def to(self, device: torch.device) -> CleanRows:
        return CleanRows(self.states.to(device), None if self.labels is None else self.labels.to(device))


@dataclass(frozen=True)
class LargeMaterial:
    """What is measured, and with what.

    rows: held-out data, None where a protocol needs none. reference: pictures to compare with, None for the rows.
    rewards: by name.
    """

    flow_map: FlowMap
    features: FeatureExtractor | None = None
    rows: CleanRows | None = None
    reference: AdmBatch | None = None
    rewards: Mapping[str, Reward] | None = None


def device_of(flow_map: FlowMap) -> torch.device:
    return next((parameter.device for parameter in flow_map.parameters()), torch.device("cpu"))


def uniform_labels(flow_map: FlowMap, seed: int, first: int, count: int, *, device: torch.device) -> Tensor | None:
    """Classes drawn uniformly, those of images `first` on, (count,) int64; None for a model without classes."""
    if not flow_map.num_classes:
        return None
    keys = KeyedNoise.for_images(seed, count, first=first, device=device).fold_in(Stream.LABEL)
    return (keys.uniform().double() * flow_map.num_classes).long().clamp_max(flow_map.num_classes - 1)


def states_of(rows: Tensor, space: DataSpace) -> Tensor:
    """Rows in the data's own units (latents of an autoencoder among them) as states in model space."""
    return DataSpace(space.kind, space.event_shape, space.scale).to_model_space(rows)


def noisy_states(clean: Tensor, time: float, keys: KeyedNoise) -> Tensor:
    """x_t = t x_1 + (1 - t) x_0 of clean states (B, *event), noise by the keys (B,)."""
    x0 = keys.fold_in(Stream.OUTER).normal(*clean.shape[1:]).to(clean)
    return LinearInterpolant().sample(x0, clean, torch.full_like(clean.flatten(1)[:, 0], time)).x_t


def batches(first: int, count: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, count) of parts of at most `size`."""
    for begin in range(first, first + count, size):
        yield begin, min(size, first + count - begin)


@dataclass(frozen=True)
class SetDistance:
    """How far a set of samples is from a reference.

    key names its metrics; nfe: network calls of a sample; time: of the states they were drawn from, None for samples of
    the model. count: samples; kid as in `kernel_inception_distance`; precision and recall None where the reference
    has no pictures. frechet is FID where the features are Inception's.
    """

    key: str
    label: str
    nfe: int
    time: float | None
    count: int
    frechet: float
    kid: Mean | None
    precision: float | None
    recall: float | None
    images: Tensor

    def metrics(self, base: str) -> dict[str, float]:
        named = {"fid": self.frechet, "samples": float(self.count)}
        if self.kid is not None:
            named |= {"kid": self.kid.value, "kid_half_width": self.kid.half_width}
        if self.precision is not None and self.recall is not None:
            named |= {"precision": self.precision, "recall": self.recall}
        return {f"{base}.{self.key}.{name}": value for name, value in named.items()}


@dataclass(frozen=True)
class ReferenceSet:
    """What samples are compared with: moments, and features (M, D) where its pictures are at hand.

    floor: half of the Fréchet distance between its two halves. The distance of two sets of a law falls as 1 / N, so
    that this is about what two sets of M each differ by.
    """

    moments: FeatureStatistics
    features: Tensor | None

    @classmethod
    def of(cls, features: Tensor) -> ReferenceSet:
        return cls(FeatureStatistics.of(features), features)

    @property
    def floor(self) -> float | None:
        if self.features is None or len(self.features) < 4:
            return None
        first, second = self.features.chunk(2)
        return FeatureStatistics.of(first).frechet_distance(FeatureStatistics.of(second)) / 2


def merged(parts: Sequence[Tensor]) -> FeatureStatistics:
    """Moments of features that come in parts, merged in their order."""
    first, *others = (FeatureStatistics.of(part) for part in _of_two_or_more(parts))
    for other in others:
        first = first.merge(other)
    return first


def _of_two_or_more(parts: Sequence[Tensor]) -> list[Tensor]:
    """The same rows with no part of a single one, which has no covariance."""
    joined = list(parts)
    if len(joined) > 1 and len(joined[-1]) < 2:
        joined[-2:] = [torch.cat(joined[-2:])]
    return joined


def compare(
    protocol: SetsProtocol,
    parts: Sequence[Tensor],
    reference: ReferenceSet,
    *,
    key: str,
    label: str,
    nfe: int,
    time: float | None,
    images: Tensor,
    seed: int,
) -> SetDistance:
    """All distances of features (in parts, (n, D) each) from a reference."""
    features, kid, manifold = torch.cat(list(parts)), None, None
    if reference.features is not None:
        generator = torch.Generator().manual_seed(seed)
        kid = kernel_inception_distance(
            features,
            reference.features,
            generator=generator,
            subsets=protocol.kid_subsets,
            subset_size=protocol.kid_subset_size,
        )
        cut = [rows[: protocol.manifold_rows] for rows in (features, reference.features)]
        manifold = precision_recall(*cut, neighbours=protocol.neighbours)
    return SetDistance(
        key=key,
        label=label,
        nfe=nfe,
        time=time,
        count=len(features),
        frechet=merged(parts).frechet_distance(reference.moments),
        kid=kid,
        precision=None if manifold is None else manifold.precision,
        recall=None if manifold is None else manifold.recall,
        images=images[:_SHOWN],
    )


def check_space(flow_map: FlowMap, features: str) -> None:
    """InputError where features of pictures are asked of a model that makes none."""
    if features != "raw" and flow_map.space.data_range is None:
        raise InputError(
            f"protocol.features={features}: the model's samples are {flow_map.space.kind} of shape "
            f"{list(flow_map.event_shape)}, no pictures; expected raw, or an autoencoder beside the model"
        )


def require_rows(rows: CleanRows | None, count: int, key: str) -> CleanRows:
    """The rows, where there are as many as `key` asks for."""
    assert rows is not None, "protocols that need data are given them"
    if count > len(rows):
        raise InputError(f"protocol.{key}={count}: expected at most the {len(rows)} held-out rows")
    return rows


SCHEMA = pa.schema(
    [
        pa.field("section", pa.string(), nullable=False),
        pa.field("reward", pa.string()),
        pa.field("method", pa.string(), nullable=False),
        pa.field("nfe", pa.float64()),
        pa.field("x", pa.float64()),  # what the value stands over: time, step
        pa.field("quantity", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("half_width", pa.float64()),  # of the 95 percent interval
        pa.field("count", pa.int64()),
    ]
)


def figures_parquet(rows: Sequence[Mapping[str, object]]) -> bytes:
    """The bytes of a Parquet file with `SCHEMA`."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def distance_rows(section: str, measured: Sequence[SetDistance]) -> Iterator[dict[str, object]]:
    """Rows of `SCHEMA`."""
    for found in measured:
        of = {"section": section, "method": found.key, "nfe": found.nfe, "x": found.time, "count": found.count}
        yield {**of, "quantity": "fid", "value": found.frechet}
        if found.kid is not None:
            yield {**of, "quantity": "kid", "value": found.kid.value, "half_width": found.kid.half_width}
        for quantity in ("precision", "recall"):
            value = getattr(found, quantity)
            if value is not None:
                yield {**of, "quantity": quantity, "value": value}
