"""Rewards of samples and of posterior draws, checked and counted."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mfm_ray.padding import padded_call
from mfm_ray.steering.method import SteeringContext
from mfm_ray.steering.reward_gradient import evaluate


class Reward(Protocol):
    """From decoded samples in data units (N, *event) to (N,) float32; higher is better."""

    def __call__(self, samples: Tensor) -> Tensor: ...


def draw_and_score(
    reward: Reward,
    x_t: Tensor,
    t: Tensor,
    num_draws: int,
    context: SteeringContext,
    *,
    first_draw: int = 0,
    clamp: bool = False,
) -> tuple[Tensor, Tensor]:
    """Posterior draws (B, K, *event) in model space and their rewards (B, K) float32, counted.

    first_draw: number of the first draw; draws 0 to 7 are those of 0 to 3 and 4 to 7. clamp: rewards see samples within
    the data's range, where no gradient is wanted.

    Raises ValueError when the reward returns the wrong shape or a value that is not finite.
    """
    draws = context.flow_map.posterior_draws(
        x_t,
        t,
        num_draws=num_draws,
        first_draw=first_draw,
        generator=context.noise,
        label=context.label,
        cfg_scale=context.cfg_scale,
    )
    context.calls.draw += draws.shape[0] * num_draws
    rewards = score_states(reward, draws.flatten(0, 1), context, clamp=clamp)
    return draws, rewards.unflatten(0, draws.shape[:2])


def score_states(reward: Reward, x1: Tensor, context: SteeringContext, *, clamp: bool = False) -> Tensor:
    """Rewards (N,) of clean states (N, *event) in model space, counted and checked."""
    space = context.flow_map.space
    samples = space.to_data_units(x1)
    rewards = score(reward, space.clamp(samples) if clamp else samples)
    context.calls.reward += rewards.numel()
    return rewards


def score(reward: Reward, samples: Tensor) -> Tensor:
    """Rewards (N,) float32 of samples (N, *event) in data units, checked.

    Raises ValueError naming the reward for a wrong shape, NaN or infinity: a reward that fails is never a zero.
    """
    name = name_of(reward)

    def checked(padded: Tensor) -> Tensor:
        rewards = evaluate(reward, padded)
        if rewards.shape != padded.shape[:1]:
            raise ValueError(f"reward {name}: returned shape {tuple(rewards.shape)} for {padded.shape[0]} samples")
        return rewards.float()

    rewards = padded_call(checked, samples)  # rewards are networks too
    if not bool(torch.isfinite(rewards.detach()).all()):
        raise ValueError(f"reward {name}: returned NaN or infinity for a batch of {samples.shape[0]} samples")
    return rewards


def name_of(reward: Reward) -> str:
    return getattr(reward, "name", type(reward).__name__)
