"""Fine-tuning in one process: the loop that a notebook and the protocols run. On a cluster it is `jobs.finetune`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfm_ray.errors import require
from mfm_ray.finetuning.chain import TiltedChains
from mfm_ray.finetuning.start import steered_samples
from mfm_ray.finetuning.targets import Anchors, DivergedError, DriftTargets, TuningMethod, regression_loss
from mfm_ray.finetuning.tilt import Tilt
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.tuned import TunedFlowMap
from mfm_ray.noise import KeyedNoise, Stream
from mfm_ray.steering import CallCounter, Reward


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a drift is tuned. max_calls: network and reward calls in rows, forward and backward, after which it ends: the
    budget in which methods are compared; max_seconds: the same on the clock, None for none. label_dropout: share of the
    rows that are tuned without their class. chains, restart: of the anchors (`TiltedChains`);
    start_steps, start_draws: of the steered samples that chains begin at, 0 steps: at data.
    """

    max_calls: int
    max_seconds: float | None = None
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    gradient_clipping: float = 1.0
    ema_decay: float = 0.998
    label_dropout: float = 0.5
    chains: int = 8
    restart: float = 0.02
    start_steps: int = 25
    start_draws: int = 4

    def __post_init__(self) -> None:
        require(self.max_calls >= 1, "max_calls", self.max_calls, "a number of at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "an integer of at least 1")
        require(0 <= self.label_dropout <= 1, "label_dropout", self.label_dropout, "a number in [0, 1]")


@dataclass(frozen=True)
class Progress:
    """A step of tuning: what is used up, and its figures. spent: share of the budget, in [0, 1]."""

    step: int
    seconds: float
    calls: int
    spent: float
    loss: float
    reward: float
    anchor_reward: float
    effective_share: float
    weight_share: float


@dataclass(frozen=True)
class TuningResult:
    """The tuned flow map (averaged weights), and what each step reported."""

    flow_map: TunedFlowMap
    history: list[Progress] = field(repr=False)


class Tuner:
    """Tunes a copy of `tilt.flow_map`'s drift with the data (N, *event) in model space and labels (N,) or None.

    A function of `seed` and the machine's arithmetic. DivergedError when the tuned drift runs away; ValueError naming
    the reward for values that are not finite.
    """

    def __init__(
        self, tilt: Tilt, method: TuningMethod, recipe: Recipe, *, data: Tensor, labels: Tensor | None, seed: int
    ) -> None:
        self.calls = CallCounter()
        self._tilt = tilt.counted(self.calls).with_normaliser(data[:4096])
        self._method, self._recipe, self._seed = method, recipe, seed
        self._data, self._labels = data, labels
        self._network = copy.deepcopy(tilt.flow_map).requires_grad_(True)
        self._average = copy.deepcopy(self._network).requires_grad_(False)
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=recipe.learning_rate)
        self._chains = TiltedChains(
            rows=recipe.batch_size, event_shape=tuple(data.shape[1:]), chains=recipe.chains, restart=recipe.restart
        )
        self._own_calls = 0
        if not method.anchors_are_data and recipe.start_steps:
            self._data, self._labels = self._steered_start()

    def run(self, *, on_step: Callable[[Progress], None] | None = None) -> TuningResult:
        """Until the budget is spent, but one step at least. on_step: told of every step."""
        began, step, history = time.monotonic(), 0, list[Progress]()
        while not history or self._spent(began) < 1:
            progress = self._step(step, began)
            history.append(progress)
            if on_step is not None:
                on_step(progress)
            step += 1
        return TuningResult(TunedFlowMap(self._tilt.flow_map, self._average), history)

    def _step(self, step: int, began: float) -> Progress:
        noise = KeyedNoise.for_rows(self._seed, torch.arange(self._recipe.batch_size)).fold_in(step)
        anchors = self._anchors(noise, step)
        targets = self._method.targets(self._tilt, anchors, noise, drift=self._drift)
        if not self._method.anchors_are_data:
            self._chains.advance(targets, step)
        loss = self._descend(targets, step, began)
        weight = targets.weight
        return Progress(
            step=step,
            seconds=time.monotonic() - began,
            calls=self._total_calls(),
            spent=min(1.0, self._spent(began)),
            loss=loss,
            reward=float(targets.reward.mean()),
            anchor_reward=float(anchors.reward.mean()),
            effective_share=float(targets.effective_share.mean()),
            weight_share=float(weight.sum() ** 2 / weight.square().sum().clamp_min(1e-30) / len(weight)),
        )

    def _anchors(self, noise: KeyedNoise, step: int) -> Anchors:
        data, label = self._drawn_rows(noise)
        if self._method.anchors_are_data:
            reward = torch.zeros(len(data)) if self._method.on_policy else self._tilt.rewards(data)
            return Anchors(data, label, reward)
        return self._chains.anchors(self._tilt, data, label, noise, step)

    def _steered_start(self) -> tuple[Tensor, Tensor | None]:
        """Samples that follow the tilted law already, about, one for each chain; and the labels they were given."""
        recipe, count = self._recipe, self._recipe.batch_size * self._recipe.chains
        label = self._drawn_rows(KeyedNoise.for_rows(self._seed, torch.arange(count)).fold_in(Stream.START))[1]
        samples = steered_samples(
            self._tilt,
            label,
            count=count,
            num_steps=recipe.start_steps,
            num_draws=recipe.start_draws,
            seed=self._seed,
        )
        return samples, label

    def _drawn_rows(self, noise: KeyedNoise) -> tuple[Tensor, Tensor | None]:
        """Rows of the data, and their labels, some replaced by the null class."""
        index = (noise.fold_in(Stream.LATENT).uniform().double() * len(self._data)).long()
        if self._labels is None or not self._tilt.flow_map.num_classes:
            return self._data[index], None
        dropped = noise.fold_in(Stream.LABEL).uniform() < self._recipe.label_dropout
        null = torch.full_like(index, self._tilt.flow_map.num_classes)
        return self._data[index], torch.where(dropped, null, self._labels[index])

    def _descend(self, targets: DriftTargets, step: int, began: float) -> float:
        recipe = self._recipe
        rate = recipe.learning_rate * min(1.0, (step + 1) / max(1, recipe.warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * min(1.0, self._spent(began))))
        prediction = self._network.drift(
            targets.x_t, targets.t, label=targets.label, cfg_scale=self._tilt.drift_cfg_scale
        )
        loss = regression_loss(prediction, targets).mean()
        self._own_calls += 2 * len(targets)
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._network.parameters(), recipe.gradient_clipping)
        self._optimizer.step()
        with torch.no_grad():
            decay = min(recipe.ema_decay, (step + 1) / (step + 10))
            for averaged, current in zip(self._average.parameters(), self._network.parameters(), strict=True):
                averaged.lerp_(current, 1 - decay)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DivergedError(f"the loss of step {step} is {value}")
        return value

    @torch.no_grad()
    def _drift(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        self._own_calls += len(x_t)
        return self._network.drift(x_t, t, label=label, cfg_scale=self._tilt.drift_cfg_scale)

    def _total_calls(self) -> int:
        return self.calls.total() + self._own_calls

    def _spent(self, began: float) -> float:
        spent = self._total_calls() / self._recipe.max_calls
        if self._recipe.max_seconds is not None:
            spent = max(spent, (time.monotonic() - began) / self._recipe.max_seconds)
        return spent


def tune(
    flow_map: FlowMap,
    reward: Reward,
    *,
    data: Tensor,
    method: TuningMethod,
    recipe: Recipe,
    reward_multiplier: float = 1.0,
    labels: Tensor | None = None,
    cfg_scale: float | None = None,
    seed: int = 0,
    on_step: Callable[[Progress], None] | None = None,
) -> TuningResult:
    """A flow map whose drift samples p(x_1) exp(reward_multiplier * reward(x_1)) / Z, from one of p.

    data: samples (N, *event) in model space, of p or of anything else with its support; labels: (N,) or None.
    """
    tilt = Tilt(flow_map.eval().requires_grad_(False), reward, reward_multiplier, cfg_scale)
    return Tuner(tilt, method, recipe, data=data, labels=labels, seed=seed).run(on_step=on_step)
