"""Counting what steering costs, where the calls happen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CallCounter:
    """Network and reward calls, in rows. A backward pass counts as one call of its kind."""

    drift: int = 0
    drift_backward: int = 0
    draw: int = 0
    draw_backward: int = 0
    reward: int = 0
    reward_backward: int = 0

    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Cost:
    """Calls an image that a method makes, known before it starts: at every step, and once at the end."""

    per_step: int
    at_end: int = 0

    def total(self, num_steps: int) -> int:
        return self.per_step * num_steps + self.at_end

    def steps_within(self, max_nfe: int) -> int:
        """The most steps that stay within max_nfe calls; 0 or less when not even one does."""
        return (max_nfe - self.at_end) // self.per_step
