"""Samplers: from noise to samples over a flow map and a steering method.

Every network call sees a multiple of four rows, because CPU matrix kernels treat one to three rows differently; with
keyed noise the sample of a row is then the same to the bit whatever else is in the batch (CPU, float32).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mfm_ray.dynamics import DYNAMICS, Dynamics, TimeGrid
from mfm_ray.flow_map import FlowMap, require_at_least_one
from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.noise import KeyedNoise, Stream
from mfm_ray.steering import (
    BestOfN,
    CallCounter,
    GradientGuidance,
    Guidance,
    GuidedDrift,
    Reward,
    SteeringContext,
    Unguided,
    score,
)

ROW_MULTIPLE = 4
"""Rows of every network call are padded to a multiple of this (measured: enough for bit-equal rows on CPU)."""


@dataclass(frozen=True)
class Preset:
    """A recipe: outer steps and times, dynamics, and whether gradient guidance is rescaled to the norm of the drift.

    dynamics None: the SDE where a drift is steered, which forgets what a bad early estimate did to the state and so
    comes closer to the tilted law at equal calls (docs/steering.md); the ODE elsewhere, whose samples are cleaner.
    """

    num_steps: int = 50
    grid: TimeGrid = field(default_factory=TimeGrid)
    dynamics: str | None = None
    rescale: bool = False

    def dynamics_for(self, steering: Guidance | BestOfN | None) -> str:
        return self.dynamics or ("sde" if isinstance(steering, Guidance) else "ode")

    def apply(self, steering: Guidance | BestOfN | None) -> Guidance | BestOfN | None:
        if self.rescale and isinstance(steering, GradientGuidance):
            return replace(steering, renormalise="rescale", trust_region=None)
        return steering


PRESETS = {
    # The paper's cap of (1 - t) / t at 25 changes nothing here: it is one factor a row, which rescaling divides out.
    "paper": Preset(num_steps=250, grid=TimeGrid(start=0.01, power=1.0), dynamics="ode", rescale=True),
}


@dataclass(frozen=True)
class Samples:
    """Samples of a call, one a request.

    images: (num_samples, *event) in data units, clamped; rewards: (num_samples,) float32 of those images, None when
    unsteered; nfe: network and reward calls for each image, a backward pass counting as one more; calls: the same by
    kind; trace: value, standard_error, effective_sample_size, guidance_ratio, each (num_steps, num_samples), empty
    when unsteered; particles: (num_samples, P, *event) and particle_rewards (num_samples, P) when asked for.
    """

    images: Tensor
    rewards: Tensor | None
    nfe: float
    calls: dict[str, float]
    trace: dict[str, Tensor] = field(default_factory=dict)
    particles: Tensor | None = None
    particle_rewards: Tensor | None = None


@dataclass(frozen=True)
class Trajectory:
    """End states (B, *event) of a batch in model space and the trace of its steps."""

    x1: Tensor
    trace: dict[str, list[Tensor]]


Progress = Callable[[int, int], None]


def sample(
    flow_map: FlowMap,
    *,
    num_samples: int,
    steering: Guidance | BestOfN | None = None,
    num_steps: int | None = None,
    dynamics: str | None = None,
    seed: int = 0,
    label: int | Tensor | None = None,
    cfg_scale: float | None = None,
    preset: str | None = None,
    grid: TimeGrid | None = None,
    batch_size: int = 256,
    keep_particles: bool = False,
    first_image: int = 0,
    progress: Progress | None = None,
) -> Samples:
    """Samples of the model, steered or not.

    All noise is keyed by (seed, image, step, particle, draw): image i does not depend on num_samples or batch_size.

    Args:
        steering: a guidance, BestOfN, or None.
        num_steps: outer steps K (50 unless the preset says otherwise); grid: outer times (default `TimeGrid()`).
        dynamics: "ode" or "sde"; None: what the preset says, or "sde" with a guidance and "ode" without.
        preset: a name in `PRESETS`: its steps and grid where none are given here, its treatment of gradient guidance.
        label: one class for all, (num_samples,) classes, or None.
        batch_size: rows (images x particles) in flight; memory, not results, depends on it.
        keep_particles: return all particles and their rewards.
        first_image: number of the first image, so that a large job can be cut into calls.
        progress: called with (images done, num_samples).

    Raises ValueError naming the argument, its value and what is allowed.
    """
    require_at_least_one(num_samples=num_samples, batch_size=batch_size)
    if dynamics is not None and dynamics not in DYNAMICS:
        raise ValueError(f"dynamics={dynamics!r}: expected one of {', '.join(DYNAMICS)}")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: expected one of {', '.join(PRESETS)}, or none")
    recipe = Preset() if preset is None else PRESETS[preset]
    steering = recipe.apply(steering)
    times = (grid or recipe.grid).times(recipe.num_steps if num_steps is None else num_steps)
    labels = _labels(flow_map, label, num_samples)
    particles = steering.num_particles if isinstance(steering, BestOfN) else 1
    process = DYNAMICS[dynamics or recipe.dynamics_for(steering)]()
    outer = OuterSampler(flow_map, process, times, cfg_scale)
    calls, device = CallCounter(), _device(flow_map)
    parts = []
    images_at_once = max(1, batch_size // particles)
    for begin in range(0, num_samples, images_at_once):
        count = min(images_at_once, num_samples - begin)
        noise = KeyedNoise.for_images(seed, count, first=first_image + begin, device=device).spread(particles)
        chunk_labels = None if labels is None else labels[begin : begin + count]
        part = _sample_images(outer, steering, noise, chunk_labels, calls, batch_size)
        parts.append(part if keep_particles else replace(part, particles=None, particle_rewards=None))
        if progress is not None:
            progress(begin + count, num_samples)
    return _join(parts, calls, num_samples)


@dataclass(frozen=True)
class OuterSampler:
    """The loop over outer times for a batch of rows."""

    flow_map: FlowMap
    dynamics: Dynamics
    times: list[float]
    cfg_scale: float | None = None

    def run(self, guidance: Guidance, noise: KeyedNoise, label: Tensor | None, calls: CallCounter) -> Trajectory:
        """Integrate rows from x_{t_0} ~ N(0, Id), noise (rows,); the drift is never evaluated at t = 1."""
        trace: dict[str, list[Tensor]] = {}
        x = noise.fold_in(Stream.START).normal(*self.flow_map.event_shape)
        for step, (now, then) in enumerate(zip(self.times[:-1], self.times[1:], strict=True)):
            at_step = noise.fold_in(step)
            t, t_next = torch.full_like(x.flatten(1)[:, 0], now), torch.full_like(x.flatten(1)[:, 0], then)
            context = SteeringContext(self.flow_map, at_step, calls, label, self.cfg_scale)
            with torch.no_grad():
                velocity = self.flow_map.drift(x, t, label=label, cfg_scale=self.cfg_scale)
                calls.drift += x.shape[0]
                guided = guidance.guide(x, t, velocity, context)
                x = self.dynamics.step(x, t, t_next, velocity, guided.correction, at_step)
            _record(trace, guided, velocity)
        return Trajectory(x1=x, trace=trace)


def _sample_images(
    outer: OuterSampler,
    steering: Guidance | BestOfN | None,
    noise: KeyedNoise,
    labels: Tensor | None,
    calls: CallCounter,
    batch_size: int,
) -> Samples:
    """A chunk of images, noise (images, particles); counts are left to `calls`."""
    num_images, num_particles = noise.keys.shape
    guidance = steering if isinstance(steering, Guidance) else Unguided()
    keys, row_labels = noise.flatten(), None if labels is None else labels.repeat_interleave(num_particles)
    rows = keys.keys.shape[0]
    parts = []
    for begin in range(0, rows, batch_size):
        part = slice(begin, min(begin + batch_size, rows))
        part_labels = None if row_labels is None else row_labels[part]
        parts.append(run_padded(outer, guidance, keys[part], part_labels, calls))
    x1 = torch.cat([part.x1 for part in parts])
    space = outer.flow_map.space
    images = space.clamp(space.to_data_units(x1)).unflatten(0, (num_images, num_particles))
    trace = {key: torch.cat([torch.stack(part.trace[key]) for part in parts], dim=1) for key in parts[0].trace}
    reward = getattr(steering, "reward", None)
    if reward is None:
        return Samples(images=images[:, 0], rewards=None, nfe=0, calls={}, trace=trace, particles=images)
    with torch.no_grad():
        rewards = _score_padded(reward, images.flatten(0, 1)).unflatten(0, (num_images, num_particles))
    if isinstance(steering, BestOfN):
        calls.reward += rewards.numel()
    best = rewards.argmax(dim=1)
    index = torch.arange(num_images, device=best.device)
    return Samples(
        images=images[index, best],
        rewards=rewards[index, best],
        nfe=0,
        calls={},
        trace=trace,
        particles=images,
        particle_rewards=rewards,
    )


def run_padded(
    outer: OuterSampler, guidance: Guidance, noise: KeyedNoise, label: Tensor | None, calls: CallCounter
) -> Trajectory:
    """`OuterSampler.run` with rows padded to a multiple of `ROW_MULTIPLE`; padding is neither returned nor counted."""
    rows = noise.keys.shape[0]
    missing = -rows % ROW_MULTIPLE
    if missing == 0:
        return outer.run(guidance, noise, label, calls)
    index = _padded_index(rows, noise.keys.device)
    scratch = CallCounter()
    padded = outer.run(guidance, noise[index], None if label is None else label[index], scratch)
    for kind, count in vars(scratch).items():
        setattr(calls, kind, getattr(calls, kind) + count * rows // (rows + missing))
    return Trajectory(padded.x1[:rows], {key: [row[:rows] for row in rows_] for key, rows_ in padded.trace.items()})


def _score_padded(reward: Reward, samples: Tensor) -> Tensor:
    """`score` on a multiple of `ROW_MULTIPLE` rows: rewards are networks too."""
    return score(reward, samples[_padded_index(samples.shape[0], samples.device)])[: samples.shape[0]]


def _padded_index(rows: int, device: torch.device) -> Tensor:
    """0 .. rows - 1, and row 0 again up to a multiple of `ROW_MULTIPLE`."""
    index = torch.arange(rows + -rows % ROW_MULTIPLE, device=device)
    return torch.where(index < rows, index, 0)


def refine(
    flow_map: FlowMap,
    *,
    num_samples: int,
    num_steps: int,
    seed: int = 0,
    label: int | Tensor | None = None,
    cfg_scale: float | None = None,
    batch_size: int = 1024,
) -> Tensor:
    """K-step refinement (the paper's Algorithm 1): draw x_1 ~ p(x_1 | x_t), re-noise it to the next time, repeat.

    Grid 0 = t_0 < ... < t_K = 1, uniform; num_steps network calls an image. Marginals are preserved exactly by an exact
    map, for any number of steps. Returns (num_samples, *event) in data units, clamped. One step is the flow map itself.
    """
    require_at_least_one(num_samples=num_samples, num_steps=num_steps, batch_size=batch_size)
    labels = _labels(flow_map, label, num_samples)
    parts = []
    for begin in range(0, num_samples, batch_size):
        count = min(batch_size, num_samples - begin)
        noise = KeyedNoise.for_images(seed, count, first=begin, device=_device(flow_map))
        index = _padded_index(count, noise.keys.device)
        chunk_labels = None if labels is None else labels[begin : begin + count][index]
        parts.append(_refine_rows(flow_map, noise[index], num_steps, chunk_labels, cfg_scale)[:count])
    return flow_map.space.clamp(flow_map.space.to_data_units(torch.cat(parts)))


@torch.no_grad()
def _refine_rows(
    flow_map: FlowMap, noise: KeyedNoise, num_steps: int, label: Tensor | None, cfg_scale: float | None
) -> Tensor:
    x = noise.fold_in(Stream.START).normal(*flow_map.event_shape)
    for step in range(num_steps):
        at_step = noise.fold_in(step)
        t, later = (torch.full_like(x.flatten(1)[:, 0], edge / num_steps) for edge in (step, step + 1))
        draws = flow_map.posterior_draws(x, t, num_draws=1, generator=at_step, label=label, cfg_scale=cfg_scale)
        fresh = at_step.fold_in(Stream.RENOISE).normal(*flow_map.event_shape)
        x = LinearInterpolant().sample(fresh, draws.squeeze(1), later).x_t
    return x


@torch.no_grad()
def diagonal_posterior_draws(
    flow_map: FlowMap,
    x_t: Tensor,
    t: Tensor,
    *,
    num_draws: int,
    generator: KeyedNoise,
    num_steps: int = 16,
    label: Tensor | None = None,
    cfg_scale: float | None = None,
) -> Tensor:
    """Posterior draws by the midpoint rule along the inner velocity v_{s,s}, (B, num_draws, *event).

    The many-call reference that one-step draws are measured against, two calls a step; shares their inner noise at an
    equal generator. Second order: on digits 8 steps are as close to the limit as 64 steps of Euler's rule, a fifth to
    a third of what two sets of 1,024 of its draws differ by.
    """
    x = generator.fold_in(Stream.DRAW).spread(num_draws).normal(*flow_map.event_shape).to(x_t).flatten(0, 1)
    times, states = t.repeat_interleave(num_draws), x_t.repeat_interleave(num_draws, dim=0)
    labels = None if label is None else label.repeat_interleave(num_draws)

    def velocity(x: Tensor, time: float) -> Tensor:
        s = torch.full_like(times, time)
        return flow_map.velocity(x, s, s, t=times, x_t=states, label=labels, cfg_scale=cfg_scale)

    h = 1 / num_steps
    for step in range(num_steps):
        middle = x + h / 2 * velocity(x, step * h)
        x = x + h * velocity(middle, (step + 0.5) * h)
    return x.unflatten(0, (x_t.shape[0], num_draws))


def _labels(flow_map: FlowMap, label: int | Tensor | None, num_samples: int) -> Tensor | None:
    if label is None:
        return None
    if flow_map.num_classes == 0:
        raise ValueError(f"label={label}: this model has no classes; leave it out")
    labels = torch.as_tensor(label, dtype=torch.int64, device=_device(flow_map))
    if labels.shape not in ((), (num_samples,)):
        raise ValueError(f"label of shape {tuple(labels.shape)}: expected one class, or one for each of {num_samples}")
    if bool(((labels < 0) | (labels >= flow_map.num_classes)).any()):
        raise ValueError(f"label={label}: expected an integer from 0 to {flow_map.num_classes - 1}")
    return labels.expand(num_samples)


def _record(trace: dict[str, list[Tensor]], guided: GuidedDrift, velocity: Tensor) -> None:
    if guided.value is None:
        return
    ratio = guided.correction.flatten(1).norm(dim=1) / velocity.flatten(1).norm(dim=1).clamp_min(1e-12)
    trace.setdefault("value", []).append(guided.value.value)
    trace.setdefault("standard_error", []).append(guided.value.standard_error)
    trace.setdefault("effective_sample_size", []).append(guided.value.effective_sample_size)
    trace.setdefault("guidance_ratio", []).append(ratio)


def _join(parts: list[Samples], calls: CallCounter, num_samples: int) -> Samples:
    return Samples(
        images=torch.cat([part.images for part in parts]),
        rewards=_cat([part.rewards for part in parts]),
        nfe=calls.total() / num_samples,
        calls={kind: count / num_samples for kind, count in vars(calls).items()},
        trace={key: torch.cat([part.trace[key] for part in parts], dim=1) for key in parts[0].trace},
        particles=_cat([part.particles for part in parts]),
        particle_rewards=_cat([part.particle_rewards for part in parts]),
    )


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _device(flow_map: FlowMap) -> torch.device:
    parameter = next(flow_map.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
