"""Samplers: from noise to samples over a flow map and a steering method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from mfm_ray.data_space import DataSpace
from mfm_ray.dynamics import DYNAMICS, AdaptedGrid, Dynamics, Grid, Renoising, TimeGrid
from mfm_ray.errors import require
from mfm_ray.flow_map import FlowMap, require_at_least_one
from mfm_ray.noise import KeyedNoise, Noise, Stream
from mfm_ray.padding import PaddedFlowMap
from mfm_ray.presets import PRESETS, Preset
from mfm_ray.steering import CallCounter, Particles, Reward, Steering, SteeringContext, Unguided, score
from mfm_ray.steering.budget import within_budget


@dataclass(frozen=True)
class Samples:
    """Samples of a call, one a request.

    images: (num_samples, *sample_shape) in data units, clamped: pictures where a decoder makes them of latents;
    rewards: (num_samples,) float32 of those images, None when unsteered; judges: the same by name for rewards that
    were never optimised; nfe: network and reward calls for each image, a backward pass counting as one more; calls:
    the same by kind; trace: value, standard_error, effective_sample_size, guidance_ratio and what else the method
    tells, each (num_steps, num_samples), empty when unsteered. When asked for: particles (num_samples, P,
    *sample_shape), particle_rewards (num_samples, P), and particle_log_weights (num_samples, P) of a method that
    weighs them. states: (num_samples, *event) in model space, what the images were made of, in the data's range.
    """

    images: Tensor
    rewards: Tensor | None
    nfe: float
    calls: dict[str, float]
    trace: dict[str, Tensor] = field(default_factory=dict)
    judges: dict[str, Tensor] = field(default_factory=dict)
    particles: Tensor | None = None
    particle_rewards: Tensor | None = None
    particle_log_weights: Tensor | None = None
    states: Tensor | None = None


Progress = Callable[[int, int], None]


def sample(
    flow_map: FlowMap,
    *,
    num_samples: int,
    steering: Steering | None = None,
    num_steps: int | None = None,
    dynamics: str | None = None,
    seed: int = 0,
    label: int | Tensor | None = None,
    cfg_scale: float | None = None,
    preset: str | None = None,
    grid: Grid | None = None,
    order: int = 1,
    max_nfe: int | None = None,
    judges: Mapping[str, Reward] | None = None,
    batch_size: int = 256,
    keep_particles: bool = False,
    first_image: int = 0,
    progress: Progress | None = None,
) -> Samples:
    """Samples of the model, steered or not.

    All noise is keyed by (seed, image, step, particle, draw): image i does not depend on num_samples or batch_size.

    Args:
        steering: a method, or None.
        num_steps: outer steps K (50 unless the preset says otherwise); grid: outer times (default `TimeGrid()`).
        dynamics: "ode" or "sde"; None: what the preset says, or what the method does best with.
        preset: a name in `PRESETS`: its steps and grid where none are given here, its treatment of gradient guidance.
        order: 2 takes steps of second order in the drift, at no further call (`dynamics.extrapolate`).
        max_nfe: calls an image that are never exceeded; the method is cut to fit before it starts (`within_budget`).
        judges: rewards by name that score the images and are not optimised; not counted.
        label: one class for all, (num_samples,) classes, the null class num_classes among them, or None.
        batch_size: rows (images x particles) in flight; memory, not results, depends on it. Particles of one image
            that interact (search, SMC) stay together.
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
    require(order in (1, 2), "order", order, "1 or 2")
    recipe = Preset() if preset is None else PRESETS[preset]
    method, steps = recipe.apply(steering or Unguided()), recipe.num_steps if num_steps is None else num_steps
    require_at_least_one(num_steps=steps)
    if max_nfe is not None:
        method, steps = within_budget(method, steps, max_nfe)
    outer = OuterSampler(
        PaddedFlowMap(flow_map),
        DYNAMICS[dynamics or recipe.dynamics_for(method)](),
        (grid or recipe.grid_for(method)).times(steps),
        cfg_scale,
        second_order=order == 2,
    )
    labels = _labels(flow_map, label, num_samples)
    calls, device = CallCounter(), _device(flow_map)
    parts = []
    images_at_once = max(1, batch_size // method.num_particles)
    for begin in range(0, num_samples, images_at_once):
        count = min(images_at_once, num_samples - begin)
        noise = KeyedNoise.for_images(seed, count, first=first_image + begin, device=device)
        chunk_labels = None if labels is None else labels[begin : begin + count]
        part = _sample_images(outer, method, noise, chunk_labels, calls, batch_size)
        parts.append(part if keep_particles else _without_particles(part))
        if progress is not None:
            progress(begin + count, num_samples)
    samples = _join(parts, calls, num_samples)
    return replace(samples, judges={name: _score(judge, samples.images) for name, judge in (judges or {}).items()})


@dataclass(frozen=True)
class OuterSampler:
    """The loop over outer times for a batch of images."""

    flow_map: FlowMap
    dynamics: Dynamics
    times: list[float]
    cfg_scale: float | None = None
    second_order: bool = False

    def run(
        self, method: Steering, noise: KeyedNoise, label: Tensor | None, calls: CallCounter
    ) -> tuple[Particles, dict[str, Tensor]]:
        """Particles (I, P, *event) moved from x_{t_0} ~ N(0, Id) to t = 1, and the trace (num_steps, I) by name.

        noise (I, P), one key a particle; label (I,) or None. The drift is never evaluated at t = 1.
        """
        rows, particles = noise.flatten(), starting_particles(noise, self.flow_map.event_shape)
        labels = None if label is None else label.repeat_interleave(noise.keys.shape[1])
        trace: dict[str, list[Tensor]] = {}
        for step, (now, then) in enumerate(zip(self.times[:-1], self.times[1:], strict=True)):
            t, t_next = (torch.full(rows.keys.shape, time, device=rows.keys.device) for time in (now, then))
            context = SteeringContext(
                self.flow_map, rows.fold_in(step), calls, labels, self.cfg_scale, self.dynamics, self.second_order
            )
            with torch.no_grad():
                advanced = method.advance(particles, t, t_next, context)
            particles = advanced.particles
            for name, values in advanced.diagnostics.items():
                trace.setdefault(name, []).append(values)
        return particles, {name: torch.stack(values) for name, values in trace.items()}


def starting_particles(noise: KeyedNoise, event_shape: tuple[int, ...]) -> Particles:
    """x_{t_0} ~ N(0, Id) for keys (I, P), all of equal weight."""
    x = noise.flatten().fold_in(Stream.START).normal(*event_shape).unflatten(0, noise.keys.shape)
    return Particles(x, torch.zeros(noise.keys.shape, dtype=torch.float64, device=x.device))


def _sample_images(
    outer: OuterSampler,
    method: Steering,
    noise: KeyedNoise,
    labels: Tensor | None,
    calls: CallCounter,
    batch_size: int,
) -> Samples:
    """A chunk of images, noise (images,); counts are left to `calls`."""
    particles, trace = _run_particles(outer, method, noise.spread(method.num_particles), labels, calls, batch_size)
    return finished_samples(method, particles, trace, outer.flow_map.space, noise, calls)


def finished_samples(
    method: Steering,
    particles: Particles,
    trace: dict[str, Tensor],
    space: DataSpace,
    noise: KeyedNoise,
    calls: CallCounter,
) -> Samples:
    """Images of particles at t = 1, scored, one chosen for each key (images,); counts are left to `calls`."""
    images, states = space.clamp(space.to_data_units(particles.x)), space.in_range(particles.x)
    if method.scored_by is None:
        return Samples(
            images=images[:, 0], rewards=None, nfe=0, calls={}, trace=trace, particles=images, states=states[:, 0]
        )
    rewards = _score(method.scored_by, images.flatten(0, 1)).unflatten(0, images.shape[:2])
    if method.cost().at_end:
        calls.reward += rewards.numel()
    chosen = method.choose(particles, rewards, noise)
    index = torch.arange(len(chosen), device=chosen.device)
    return Samples(
        images=images[index, chosen],
        rewards=rewards[index, chosen],
        nfe=0,
        calls={},
        trace=trace,
        particles=images,
        particle_rewards=rewards,
        particle_log_weights=method.final_log_weights(particles, rewards),
        states=states[index, chosen],
    )


def _run_particles(
    outer: OuterSampler,
    method: Steering,
    noise: KeyedNoise,
    labels: Tensor | None,
    calls: CallCounter,
    batch_size: int,
) -> tuple[Particles, dict[str, Tensor]]:
    """All particles of the images; those that do not interact are run as images of their own, `batch_size` at once."""
    num_images, num_particles = noise.keys.shape
    if method.interacting or num_particles == 1:
        return outer.run(method, noise, labels, calls)
    keys = KeyedNoise(noise.keys.reshape(-1, 1))
    rows = None if labels is None else labels.repeat_interleave(num_particles)
    parts = [
        outer.run(method, keys[part], None if rows is None else rows[part], calls)[0].x
        for part in _slices(len(keys.keys), batch_size)
    ]
    x = torch.cat(parts).reshape(num_images, num_particles, *outer.flow_map.event_shape)
    return Particles(x, torch.zeros(noise.keys.shape, dtype=torch.float64, device=x.device)), {}


def adapt_grid(
    flow_map: FlowMap,
    steering: Steering | None = None,
    *,
    num_images: int = 16,
    num_steps: int = 100,
    seed: int = 0,
    label: int | None = None,
    cfg_scale: float | None = None,
    dynamics: str | None = None,
) -> AdaptedGrid:
    """A grid whose steps change the clean estimate by equal amounts, measured on a pilot run of `num_images` images.

    The change of a step is the root mean square, over images, of how far the (steered) clean sample that the states
    move towards went since the step before. Once for a model and a reward; the same grid then serves every image, so
    that images stay independent of each other.
    """
    require_at_least_one(num_images=num_images, num_steps=num_steps)
    method, times = steering or Unguided(), TimeGrid().times(num_steps)
    recorder = _Recorder(DYNAMICS[dynamics or method.default_dynamics]())
    outer = OuterSampler(PaddedFlowMap(flow_map), recorder, times, cfg_scale)
    noise = KeyedNoise.for_images(seed, num_images, device=_device(flow_map)).spread(method.num_particles)
    outer.run(method, noise, _labels(flow_map, label, num_images), CallCounter())
    moves = [float((b - a).square().flatten(1).sum(1).mean().sqrt()) for a, b in pairwise(recorder.clean)]
    return AdaptedGrid(times, [moves[0], *moves])


class _Recorder(Dynamics):
    """Another dynamics, and the clean samples that it was told."""

    def __init__(self, inner: Dynamics) -> None:
        self.inner, self.random, self.clean = inner, inner.random, list[Tensor]()

    def step(self, x: Tensor, clean: Tensor, t: Tensor, t_next: Tensor, noise: Noise) -> Tensor:
        self.clean.append(clean)
        return self.inner.step(x, clean, t, t_next, noise)


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
    map, for any number of steps. Returns (num_samples, *sample_shape) in data units, clamped. One step is the flow map
    itself.
    """
    require_at_least_one(num_samples=num_samples, num_steps=num_steps, batch_size=batch_size)
    labels = _labels(flow_map, label, num_samples)
    parts = []
    for begin in range(0, num_samples, batch_size):
        count = min(batch_size, num_samples - begin)
        noise = KeyedNoise.for_images(seed, count, first=begin, device=_device(flow_map))
        chunk_labels = None if labels is None else labels[begin : begin + count]
        parts.append(_refine_rows(PaddedFlowMap(flow_map), noise, num_steps, chunk_labels, cfg_scale))
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
        x = Renoising().step(x, draws.squeeze(1), t, later, at_step)
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
    highest = flow_map.num_classes - (0 if labels.ndim else 1)  # the null class, for rows beside others
    if bool(((labels < 0) | (labels > highest)).any()):
        raise ValueError(f"label={label}: expected an integer from 0 to {highest}")
    return labels.expand(num_samples)


def _score(reward: Reward, samples: Tensor) -> Tensor:
    with torch.no_grad():
        return score(reward, samples)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]


def _without_particles(part: Samples) -> Samples:
    return replace(part, particles=None, particle_rewards=None, particle_log_weights=None)


def _join(parts: list[Samples], calls: CallCounter, num_samples: int) -> Samples:
    return Samples(
        images=torch.cat([part.images for part in parts]),
        rewards=_cat([part.rewards for part in parts]),
        nfe=calls.total() / num_samples,
        calls={kind: count / num_samples for kind, count in vars(calls).items()},
        trace={key: torch.cat([part.trace[key] for part in parts], dim=1) for key in parts[0].trace},
        particles=_cat([part.particles for part in parts]),
        particle_rewards=_cat([part.particle_rewards for part in parts]),
        particle_log_weights=_cat([part.particle_log_weights for part in parts]),
        states=_cat([part.states for part in parts]),
    )


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _device(flow_map: FlowMap) -> torch.device:
    parameter = next(flow_map.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
