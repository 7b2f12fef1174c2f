"""protocol=imagenet_posterior: do posterior draws of noised data, one for each datum, look like data?

A draw x_1 ~ p(x_1 | x_t) of x_t = t x'_1 + (1 - t) x_0 with x'_1 of the data follows the law of the data, whatever t:
so the draws are compared with the data that the states were made of, or with rollouts from the same states.
"""
# ruff: noqa: RUF009 (`setting` only wraps dataclasses.field, it makes no shared default)

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfm_ray.errors import InputError
from mfm_ray.metrics import eight_bit
from mfm_ray.protocols.draw_parts import ROLLOUTS, PosteriorDraws, part_of
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
    require_rows,
)
from mfm_ray.protocols.pieces import Piece, Pieces, Progress, made_here, moved, plan
from mfm_ray.protocols.values import Estimator
from mfm_ray.settings import setting

PAIRS, AGAINST_ROLLOUTS = "pairs", "rollouts"


@dataclass(frozen=True, kw_only=True)
class ImagenetPosteriorProtocol(SetsProtocol):
    """Settings of the evaluation; the defaults stand in conf/protocol/imagenet_posterior.yaml."""

    times: list[float] = setting("times of the noised data", minimum=0, below=1)
    num_contexts: int = setting("noised data at each time, each with one draw", minimum=4)
    map_steps: list[int] = setting("inner steps of the meta flow map, each measured", minimum=1)
    glass_steps: list[int] = setting("Euler steps of the GLASS ODE, each measured where the time is above 0", minimum=1)
    against: str = setting(
        "what draws are compared with: the data behind the states, or rollouts from them",
        choices=(PAIRS, AGAINST_ROLLOUTS),
    )
    rollout_steps: int = setting("steps of a rollout of the memoryless SDE", minimum=1)

    def check(self) -> None:
        """InputError naming the first combination of settings that cannot work."""
        self.check_features()
        for key in ("times", "map_steps", "glass_steps"):
            values = getattr(self, key)
            if len(set(values)) != len(values) or (key != "glass_steps" and not values):
                raise InputError(f"protocol.{key}={values}: expected at least one, all different")
        if self.against == AGAINST_ROLLOUTS and 0.0 in self.times:
            raise InputError(f"protocol.times={self.times}: no rollout starts at 0; expected above 0, or against=pairs")
        if self.num_contexts <= self.neighbours:
            raise InputError(f"protocol.num_contexts={self.num_contexts}: expected more than neighbours")

    def estimators(self, t: float) -> list[Estimator]:
        """GLASS needs what x_t tells, so it has none at t = 0."""
        glass = [Estimator("glass", steps) for steps in self.glass_steps] if t > 0 else []
        return [*(Estimator("mfm", steps) for steps in self.map_steps), *glass]


@dataclass(frozen=True)
class PosteriorMaker:
    """Features of one draw for each state, and of the clean data."""

    protocol: ImagenetPosteriorProtocol
    material: LargeMaterial
    seed: int

    def move(self, device: str) -> None:
        moved(device, self.material.flow_map, self.material.features)

    @torch.no_grad()
    def make(self, piece: Piece, progress: Progress) -> dict[str, Tensor]:
        assert self.material.features is not None and self.material.rows is not None
        flow_map = self.material.flow_map
        features, images = [], []
        for first, count in batches(piece.first, piece.count, self.protocol.batch_size):
            clean = self.material.rows.part(first, count).to(device_of(flow_map))
            is_data = piece.part == PAIRS
            states = clean.states if is_data else self._draws.of(piece.part, clean, first=first).squeeze(1)
            samples = flow_map.space.clamp(flow_map.space.to_data_units(states))
            features.append(self.material.features(samples).cpu())
            if first == 0 and samples.dim() == 4:
                images.append(eight_bit(samples[:20]).cpu())
            progress(first + count - piece.first)
        return {"features": torch.cat(features), **({"images": torch.cat(images)} if images else {})}

    @property
    def _draws(self) -> PosteriorDraws:
        return PosteriorDraws(
            flow_map=self.material.flow_map,
            times=self.protocol.times,
            estimators=self.protocol.estimators,
            rollout_steps=self.protocol.rollout_steps,
            cfg_scale=self.protocol.cfg_scale,
            seed=self.seed,
        )


@dataclass(frozen=True)
class PosteriorEvaluation:
    """All that the report shows. floors: by time, of what draws are compared with; pairs: some of the clean data."""

    protocol: ImagenetPosteriorProtocol
    measured: tuple[SetDistance, ...]
    floors: dict[float, float]
    pairs: Tensor
    seconds: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Flat names to numbers: `posterior.t0.2.mfm_1.fid`, ..."""
        named = {f"posterior.t{t:g}.floor": floor for t, floor in self.floors.items()}
        for found in self.measured:
            named |= found.metrics(f"posterior.t{found.time:g}")
        return named


def planned(protocol: ImagenetPosteriorProtocol) -> list[Piece]:
    parts = [PAIRS]
    for t in protocol.times:
        parts += [part_of(t, estimator.key) for estimator in protocol.estimators(t)]
        parts += [part_of(t, ROLLOUTS)] if protocol.against == AGAINST_ROLLOUTS else []
    return [piece for part in parts for piece in plan(part, protocol.num_contexts, protocol.piece_size)]


def check_imagenet_posterior(protocol: ImagenetPosteriorProtocol, material: LargeMaterial) -> None:
    """InputError where protocol, model and data do not fit."""
    check_space(material.flow_map, protocol.features)
    require_rows(material.rows, protocol.num_contexts, "num_contexts")


def evaluate_imagenet_posterior(
    protocol: ImagenetPosteriorProtocol,
    material: LargeMaterial,
    *,
    seed: int = 0,
    log: Callable[[str], None] = print,
    pieces: Pieces = made_here,
) -> PosteriorEvaluation:
    """Draws, looks, compares."""
    check_imagenet_posterior(protocol, material)
    began, todo = time.monotonic(), planned(protocol)
    features: dict[str, list[Tensor]] = {}
    shown: dict[str, Tensor] = {}
    for piece, made in zip(todo, pieces(PosteriorMaker(protocol, material, seed), todo), strict=True):
        features.setdefault(piece.part, []).append(made["features"])
        if "images" in made:
            shown[piece.part] = made["images"]
    drawn = time.monotonic()
    log("  distances of draws")
    measured, floors, none = [], {}, torch.zeros(0)
    for t in protocol.times:
        against = PAIRS if protocol.against == PAIRS else part_of(t, ROLLOUTS)
        reference = ReferenceSet.of(torch.cat(features[against]))
        if reference.floor is not None:
            floors[t] = reference.floor
        for estimator in protocol.estimators(t):
            part = part_of(t, estimator.key)
            found = compare(
                protocol,
                features[part],
                reference,
                key=estimator.key,
                label=estimator.label,
                nfe=estimator.steps,
                time=t,
                images=shown.get(part, none),
                seed=seed,
            )
            measured.append(found)
    return PosteriorEvaluation(
        protocol=protocol,
        measured=tuple(measured),
        floors=floors,
        pairs=shown.get(PAIRS, none),
        seconds={"draws and features": drawn - began, "distances": time.monotonic() - drawn},
    )


def imagenet_posterior_parquet(evaluation: PosteriorEvaluation) -> bytes:
    return figures_parquet(list(distance_rows("posterior", evaluation.measured)))
