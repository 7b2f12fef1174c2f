"""protocol=imagenet_values: protocol=values at any size: rewards of any kind, classes, guidance, work in pieces."""
# ruff: noqa: RUF009 (`setting` only wraps dataclasses.field, it makes no shared default)

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfm_ray.errors import InputError
from mfm_ray.protocols.draw_parts import ROLLOUTS, PosteriorDraws, part_of
from mfm_ray.protocols.imagenet import (
    CleanRows,
    LargeMaterial,
    LargeProtocol,
    batches,
    device_of,
    require_rows,
)
from mfm_ray.protocols.pieces import Piece, Pieces, Progress, made_here, moved, plan
from mfm_ray.protocols.values import Estimator, ValuesEvaluation, value_study
from mfm_ray.settings import setting
from mfm_ray.steering import score
from mfm_ray.values import estimate_value


@dataclass(frozen=True, kw_only=True)
class ImagenetValuesProtocol(LargeProtocol):
    """Settings of the evaluation; the defaults stand in conf/protocol/imagenet_values.yaml."""

    rewards: list[Any] = setting("whose value is estimated: {name: ..., weight: ...}, as judges are written")
    label: int | None = setting("class of the noised data; null: all of them, each with its own", minimum=0)
    times: list[float] = setting("times of the noised held-out data", above=0, below=1)
    num_contexts: int = setting("noised held-out data at each time", minimum=4)
    num_draws: int = setting("posterior draws of each cheap estimate", minimum=2)
    map_steps: list[int] = setting("inner steps of the meta flow map, each compared", minimum=1)
    glass_steps: list[int] = setting("Euler steps of the GLASS ODE, each compared", minimum=1)
    truth_draws: int = setting("rollouts of the SDE for each context", minimum=4)
    truth_steps: int = setting("steps of each rollout", minimum=1)

    def check(self) -> None:
        """InputError naming the first combination of settings that cannot work."""
        for key in ("rewards", "times", "map_steps"):
            if not getattr(self, key):
                raise InputError(f"protocol.{key}=[]: expected at least one")
        for key in ("times", "map_steps", "glass_steps"):
            values = getattr(self, key)
            if len(set(values)) != len(values):
                raise InputError(f"protocol.{key}={values}: expected different ones")

    @property
    def estimators(self) -> list[Estimator]:
        return [
            Estimator(family, steps)
            for family, lengths in (("mfm", self.map_steps), ("glass", self.glass_steps))
            for steps in sorted(lengths)
        ]


@dataclass(frozen=True)
class ValuesMaker:
    """Rewards of posterior draws, (contexts, draws) by the reward's name."""

    protocol: ImagenetValuesProtocol
    material: LargeMaterial
    seed: int

    def move(self, device: str) -> None:
        moved(device, self.material.flow_map, *(self.material.rewards or {}).values())

    @torch.no_grad()
    def make(self, piece: Piece, progress: Progress) -> dict[str, Tensor]:
        rows = contexts_of(self.protocol, self.material)
        flow_map, rewards = self.material.flow_map, self.material.rewards or {}
        source = PosteriorDraws(
            flow_map=flow_map,
            times=self.protocol.times,
            estimators=lambda t: self.protocol.estimators,
            rollout_steps=self.protocol.truth_steps,
            cfg_scale=self.protocol.cfg_scale,
            seed=self.seed,
        )
        found: dict[str, list[Tensor]] = {name: [] for name in rewards}
        total = self.protocol.truth_draws if piece.part.endswith(f"_{ROLLOUTS}") else self.protocol.num_draws
        at_once = max(1, self.protocol.batch_size // total)
        for first, count in batches(piece.first, piece.count, at_once):
            clean = rows.part(first, count).to(device_of(flow_map))
            parts: dict[str, list[Tensor]] = {name: [] for name in rewards}
            for first_draw, draws in batches(0, total, self.protocol.batch_size):
                states = source.of(piece.part, clean, first=first, num_draws=draws, first_draw=first_draw)
                samples = flow_map.space.to_data_units(states)
                for name, reward in rewards.items():
                    scores = score(reward, samples.flatten(0, 1)).unflatten(0, samples.shape[:2])
                    parts[name].append(scores.cpu())
            for name, scored in parts.items():
                found[name].append(torch.cat(scored, dim=1))
            progress(first + count - piece.first)
        return {name: torch.cat(scored) for name, scored in found.items()}


def contexts_of(protocol: ImagenetValuesProtocol, material: LargeMaterial) -> CleanRows:
    """The first rows of the class that is asked for."""
    rows = material.rows
    assert rows is not None
    if protocol.label is None:
        return rows.part(0, protocol.num_contexts)
    if rows.labels is None or protocol.label >= material.flow_map.num_classes:
        raise InputError(f"protocol.label={protocol.label}: expected a class of the model, or null")
    chosen = (rows.labels == protocol.label).nonzero().squeeze(1)[: protocol.num_contexts]
    return CleanRows(rows.states[chosen], rows.labels[chosen])


def planned(protocol: ImagenetValuesProtocol) -> list[Piece]:
    parts = [
        part_of(t, source) for t in protocol.times for source in (ROLLOUTS, *(each.key for each in protocol.estimators))
    ]
    return [piece for part in parts for piece in plan(part, protocol.num_contexts, protocol.piece_size)]


def check_imagenet_values(protocol: ImagenetValuesProtocol, material: LargeMaterial) -> None:
    """InputError where protocol, model and data do not fit."""
    require_rows(material.rows, protocol.num_contexts, "num_contexts")
    found = len(contexts_of(protocol, material))
    if found < protocol.num_contexts:
        raise InputError(
            f"protocol.num_contexts={protocol.num_contexts}: class {protocol.label} has {found} held-out rows"
        )


def evaluate_imagenet_values(
    protocol: ImagenetValuesProtocol,
    material: LargeMaterial,
    *,
    seed: int = 0,
    log: Callable[[str], None] = print,
    pieces: Pieces = made_here,
) -> ValuesEvaluation:
    """Estimates by every source at every time, and how they agree with the rollouts'."""
    check_imagenet_values(protocol, material)
    began, todo = time.monotonic(), planned(protocol)
    rewards: dict[str, dict[str, list[Tensor]]] = {}
    for piece, made in zip(todo, pieces(ValuesMaker(protocol, material, seed), todo), strict=True):
        for name, scores in made.items():
            rewards.setdefault(name, {}).setdefault(piece.part, []).append(scores)
    studies = []
    for name in material.rewards or {}:
        of = {part: torch.cat(parts) for part, parts in rewards[name].items()}
        for t in protocol.times:
            cheap = {each: estimate_value(of[part_of(t, each.key)]) for each in protocol.estimators}
            studies.append(value_study(name, t, of[part_of(t, ROLLOUTS)], cheap, None, protocol.num_draws))
    return ValuesEvaluation(
        protocol=protocol,
        rewards=tuple(material.rewards or {}),
        studies=tuple(studies),
        truth_calls=protocol.truth_draws * protocol.truth_steps,
        seconds={"draws and rewards": time.monotonic() - began},
    )
