"""protocol=imagenet_steering: images of one class steered towards rewards, by every method, against Best-of-N."""
# ruff: noqa: RUF009 (`setting` only wraps dataclasses.field, it makes no shared default)

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mfm_ray.errors import InputError
from mfm_ray.metrics import Mean, eight_bit, mean_with_interval
from mfm_ray.presets import PRESETS
from mfm_ray.protocols.imagenet import LargeMaterial, LargeProtocol, batches, figures_parquet
from mfm_ray.protocols.pieces import Piece, Pieces, Progress, made_here, moved, plan
from mfm_ray.rewards import WeightedSum
from mfm_ray.samplers import Samples, sample
from mfm_ray.settings import setting
from mfm_ray.steering import DPS, GradientFreeGuidance, GradientGuidance, Reward, Search, Steering

POOL = "pool"
FAMILIES = {"mfm_g": "MFM-G", "mfm_gf": "MFM-GF", "dps": "DPS", "search": "MFM-Search"}
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class ImagenetSteeringProtocol(LargeProtocol):
    """Settings of the evaluation; the defaults stand in conf/protocol/imagenet_steering.yaml."""

    rewards: list[Any] = setting("each steered towards, the others held out: {name: ..., prompt: ...}, as judges are")
    multipliers: list[float] = setting("lambda: the reward's factor in gradient, gradient-free and DPS", above=0)
    label: int | None = setting("class of all images; null: none", minimum=0)
    num_images: int = setting("images of each method, and groups of Best-of-N", minimum=2)
    num_steps: int = setting("outer steps", minimum=1)
    preset: str | None = setting(
        "recipe of grid, dynamics and gradients; null: the library's own", choices=tuple(PRESETS)
    )
    gradient_draws: list[int] = setting("posterior draws a step of MFM-G", minimum=1)
    gradient_free_draws: list[int] = setting("posterior draws a step of MFM-GF", minimum=1)
    dps: bool = setting("measure DPS as well")
    search_particles: list[int] = setting("particles of MFM-Search", minimum=1)
    search_draws: int = setting("posterior draws of each of them", minimum=1)
    best_of: list[int] = setting("N of Best-of-N, of one pool of unsteered samples", minimum=1)
    pool_size: int = setting("unsteered samples; at least num_images times the largest N makes all groups", minimum=2)

    def check(self) -> None:
        """InputError naming the first combination of settings that cannot work."""
        if not self.rewards:
            raise InputError("protocol.rewards=[]: expected at least one")
        for key in ("multipliers", "gradient_draws", "gradient_free_draws", "search_particles", "best_of"):
            values = getattr(self, key)
            if len(set(values)) != len(values):
                raise InputError(f"protocol.{key}={values}: expected different ones")
        if not self.multipliers and (self.gradient_draws or self.gradient_free_draws or self.dps):
            raise InputError("protocol.multipliers=[]: expected at least one, for gradient, gradient-free and DPS")
        if max(self.best_of, default=1) * 2 > self.pool_size:
            raise InputError(
                f"protocol.pool_size={self.pool_size}: expected at least twice the largest of best_of={self.best_of}"
            )


@dataclass(frozen=True)
class Arm:
    """A method towards a reward. num_draws, particles and multiplier: where the method has them.

    drawn_at: the multiplier that its images are made at, another one than its own where it changes nothing.
    """

    reward: str
    family: str
    num_draws: int = 1
    particles: int = 1
    multiplier: float = 1.0
    drawn_at: float = 1.0

    @property
    def key(self) -> str:
        if self.family == "search":
            return f"search_m{self.particles}"
        return f"{self.family}{'' if self.family == 'dps' else f'_n{self.num_draws}'}_l{self.multiplier:g}"

    @property
    def label(self) -> str:
        if self.family == "search":
            return f"MFM-Search, {self.particles} particle{'s' if self.particles > 1 else ''}"
        draws = "" if self.family == "dps" else f", {self.num_draws} draw{'s' if self.num_draws > 1 else ''}"
        return f"{FAMILIES[self.family]}{draws}, λ = {self.multiplier:g}"

    @property
    def part(self) -> str:
        return f"{self.reward}_{replace(self, multiplier=self.drawn_at).key}"

    def steering(self, reward: Reward, protocol: ImagenetSteeringProtocol) -> Steering:
        """The reward's factor tilts the law; a search compares rewards alone, and needs none."""
        if self.family == "search":
            return Search(reward, num_particles=self.particles, num_draws=protocol.search_draws)
        weighted = WeightedSum(rewards=[reward], weights=[self.drawn_at], name=self.reward)
        if self.family == "mfm_g":
            return GradientGuidance(weighted, num_draws=self.num_draws)
        if self.family == "mfm_gf":
            return GradientFreeGuidance(weighted, num_draws=self.num_draws)
        return DPS(weighted)


def arms(protocol: ImagenetSteeringProtocol, rewards: tuple[str, ...]) -> list[Arm]:
    """All that are measured.

    One draw of MFM-GF has weight 1 whatever the multiplier; a rescaled gradient loses it but for the draws' weights.
    """
    rescales = protocol.preset is not None and PRESETS[protocol.preset].rescale
    families = {"mfm_g": protocol.gradient_draws, "mfm_gf": protocol.gradient_free_draws, "dps": [1] * protocol.dps}
    found = []
    for reward in rewards:
        for multiplier in protocol.multipliers:
            for family, draws in families.items():
                for n in draws:
                    is_same = n == 1 and (rescales or family == "mfm_gf")
                    drawn_at = protocol.multipliers[0] if is_same else multiplier
                    found.append(Arm(reward, family, num_draws=n, multiplier=multiplier, drawn_at=drawn_at))
        found += [Arm(reward, "search", particles=m) for m in protocol.search_particles]
    return found


@dataclass(frozen=True)
class SteeringMaker:
    """Images of an arm, or unsteered ones, scored by every reward."""

    protocol: ImagenetSteeringProtocol
    material: LargeMaterial
    seed: int

    def move(self, device: str) -> None:
        moved(device, self.material.flow_map, *(self.material.rewards or {}).values())

    def make(self, piece: Piece, progress: Progress) -> dict[str, Tensor]:
        protocol, rewards = self.protocol, self.material.rewards or {}
        arm = next((arm for arm in arms(protocol, tuple(rewards)) if arm.part == piece.part), None)
        steering = None if arm is None else arm.steering(rewards[arm.reward], protocol)
        scores: dict[str, list[Tensor]] = {name: [] for name in rewards}
        images, nfe = [], 0.0
        for first, count in batches(piece.first, piece.count, protocol.batch_size):
            drawn = self._sampled(steering, first, count)
            nfe = drawn.nfe
            for name, values in drawn.judges.items():
                scores[name].append(values.cpu())
            if drawn.images.dim() == 4 and first < _SHOWN:
                images.append(eight_bit(drawn.images[: _SHOWN - first]).cpu())
            progress(first + count - piece.first)
        made = {f"reward.{name}": torch.cat(values) for name, values in scores.items()}
        made |= {"images": torch.cat(images)} if images else {}
        return {**made, "nfe": torch.tensor([nfe], dtype=torch.float64)}

    def _sampled(self, steering: Steering | None, first: int, count: int) -> Samples:
        protocol = self.protocol
        return sample(
            self.material.flow_map,
            num_samples=count,
            first_image=first,
            steering=steering,
            num_steps=protocol.num_steps,
            preset=protocol.preset,
            # the library's own presets choose the SDE where it does better; the unsteered pool is the ODE's, as paper's
            dynamics="ode" if steering is None else None,
            judges=self.material.rewards,
            seed=self.seed,
            label=protocol.label,
            cfg_scale=protocol.cfg_scale,
            batch_size=protocol.batch_size,
        )


@dataclass(frozen=True)
class SteeredScore:
    """What a method reached. reward: it was steered towards, None for the pool; means of each reward by name."""

    reward: str | None
    key: str
    label: str
    family: str
    nfe: float
    means: dict[str, Mean]
    images: Tensor


@dataclass(frozen=True)
class SteeringEvaluation:
    """All that the report shows. unsteered: the pool itself; scores: steered methods and Best-of-N of each reward."""

    protocol: ImagenetSteeringProtocol
    rewards: tuple[str, ...]
    unsteered: SteeredScore
    scores: tuple[SteeredScore, ...]
    seconds: dict[str, float] = field(default_factory=dict)

    def of(self, reward: str) -> list[SteeredScore]:
        return [score for score in self.scores if score.reward == reward]

    def metrics(self) -> dict[str, float]:
        """Flat names to numbers: `rewards.hpsv2.mfm_g_n1_l1`, its `.half_width`, `.nfe`, and `.held_out.<name>`."""
        named: dict[str, float] = {}
        for reward in self.rewards:
            named[f"rewards.{reward}.unsteered"] = self.unsteered.means[reward].value
            for found in self.of(reward):
                base = f"rewards.{reward}.{found.key}"
                named[base] = found.means[reward].value
                named[f"{base}.half_width"] = found.means[reward].half_width
                named[f"{base}.nfe"] = found.nfe
                for other, mean in found.means.items():
                    if other != reward:
                        named[f"{base}.held_out.{other}"] = mean.value
        return named


def planned(protocol: ImagenetSteeringProtocol, rewards: tuple[str, ...]) -> list[Piece]:
    pieces = plan(POOL, protocol.pool_size, protocol.piece_size)
    for part in dict.fromkeys(arm.part for arm in arms(protocol, rewards)):
        pieces += plan(part, protocol.num_images, protocol.piece_size)
    return pieces


def check_imagenet_steering(protocol: ImagenetSteeringProtocol, material: LargeMaterial) -> None:
    """InputError where protocol and model do not fit."""
    classes = material.flow_map.num_classes
    if protocol.label is not None and protocol.label >= classes:
        allowed = f"0 to {classes - 1}" if classes else "null: this model has no classes"
        raise InputError(f"protocol.label={protocol.label}: expected {allowed}")


def evaluate_imagenet_steering(
    protocol: ImagenetSteeringProtocol,
    material: LargeMaterial,
    *,
    seed: int = 0,
    log: Callable[[str], None] = print,
    pieces: Pieces = made_here,
) -> SteeringEvaluation:
    """Draws by every method, and groups of the pool."""
    check_imagenet_steering(protocol, material)
    names = tuple(material.rewards or {})
    began, todo = time.monotonic(), planned(protocol, names)
    found: dict[str, list[dict[str, Tensor]]] = {}
    for piece, made in zip(todo, pieces(SteeringMaker(protocol, material, seed), todo), strict=True):
        found.setdefault(piece.part, []).append(made)
    pool, scores = _Made.of(found[POOL], names), []
    for reward in names:
        scores += list(_best_of(protocol, reward, pool))
        for arm in (arm for arm in arms(protocol, names) if arm.reward == reward):
            made_of = _Made.of(found[arm.part], names)
            means = {name: mean_with_interval(values) for name, values in made_of.rewards.items()}
            scores.append(SteeredScore(reward, arm.key, arm.label, arm.family, made_of.nfe, means, made_of.images))
    unsteered = {name: mean_with_interval(values) for name, values in pool.rewards.items()}
    return SteeringEvaluation(
        protocol=protocol,
        rewards=names,
        unsteered=SteeredScore(None, "unsteered", "Unsteered", "unsteered", pool.nfe, unsteered, pool.images),
        scores=tuple(scores),
        seconds={"images": time.monotonic() - began},
    )


@dataclass(frozen=True)
class _Made:
    rewards: dict[str, Tensor]
    nfe: float
    images: Tensor

    @classmethod
    def of(cls, parts: list[dict[str, Tensor]], names: tuple[str, ...]) -> _Made:
        images = [part["images"] for part in parts if "images" in part]
        return cls(
            {name: torch.cat([part[f"reward.{name}"] for part in parts]).double() for name in names},
            float(parts[0]["nfe"]),
            torch.cat(images)[:_SHOWN] if images else torch.zeros(0),
        )


def _best_of(protocol: ImagenetSteeringProtocol, reward: str, pool: _Made) -> Iterator[SteeredScore]:
    """Best of disjoint groups of the pool, at most `num_images` of them; their winners by every reward."""
    scores = pool.rewards[reward]
    for n in protocol.best_of:
        groups = min(protocol.num_images, len(scores) // n)
        best = scores[: groups * n].reshape(groups, n).argmax(1) + n * torch.arange(groups)
        means = {name: mean_with_interval(values[best]) for name, values in pool.rewards.items()}
        label = f"Best-of-{n:,}"
        yield SteeredScore(reward, f"best_of_{n}", label, "best_of_n", n * (pool.nfe + 1), means, torch.zeros(0))


def imagenet_steering_parquet(evaluation: SteeringEvaluation) -> bytes:
    rows: list[dict[str, object]] = []
    for found in (evaluation.unsteered, *evaluation.scores):
        for name, mean in found.means.items():
            rows.append(
                {
                    "section": "steering",
                    "reward": found.reward,
                    "method": found.key,
                    "nfe": found.nfe,
                    "quantity": name,
                    "value": mean.value,
                    "half_width": mean.half_width,
                    "count": mean.count,
                }
            )
    return figures_parquet(rows)
