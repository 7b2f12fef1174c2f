"""The objectives by name: which conditions they add up, with which velocities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mfm_ray.errors import InputError, refuse_unknown_arguments, require
from mfm_ray.flow_map import FlowMap
from mfm_ray.objectives.conditions import (
    DiagonalTerm,
    EulerianTerm,
    IntervalTerm,
    LagrangianTerm,
    SemigroupTerm,
    Tangent,
)
from mfm_ray.objectives.objective import Objective, WeightedTerm
from mfm_ray.objectives.states import ConditioningTimes, IntervalTimes, Labels
from mfm_ray.objectives.teachers import TEACHERS, ModelGuidedTeacher, Teacher
from mfm_ray.objectives.velocities import DataVelocity, SelfVelocity, TeacherVelocity, VelocitySource
from mfm_ray.objectives.weighting import build_weighting


@dataclass(frozen=True)
class Parts:
    """What a consistency condition is made from."""

    tangent: Tangent
    times: IntervalTimes
    teacher: Teacher | None

    def teacher_velocity(self) -> VelocitySource:
        require(
            self.teacher is not None, "objective.teacher", None, "a model directory, for its velocity is the target"
        )
        assert self.teacher is not None
        return TeacherVelocity(self.teacher)

    def lagrangian(self, velocity: VelocitySource) -> IntervalTerm:
        return LagrangianTerm(velocity, tangent=self.tangent, times=self.times)

    def eulerian(self, velocity: VelocitySource) -> IntervalTerm:
        return EulerianTerm(velocity, tangent=self.tangent, times=self.times)


OBJECTIVES: dict[str, Callable[[Parts], IntervalTerm]] = {
    "semigroup": lambda parts: SemigroupTerm(parts.times),
    "lagrangian": lambda parts: parts.lagrangian(SelfVelocity()),
    "lagrangian_teacher": lambda parts: parts.lagrangian(parts.teacher_velocity()),
    "eulerian": lambda parts: parts.eulerian(SelfVelocity()),
    "eulerian_teacher": lambda parts: parts.eulerian(parts.teacher_velocity()),
    "mean_flow": lambda parts: parts.eulerian(DataVelocity()),
}
"""The consistency condition that each objective adds to the diagonal one."""

_DEFAULT_SCALES = {"semigroup": 5.0}
_DIAGONALS = ("data", "teacher")


def named_objective(
    name: str,
    *,
    teacher: FlowMap | None = None,
    teacher_guidance: str = "none",
    teacher_trained_scale: float = 2.5,
    diagonal: str = "data",
    diagonal_weighting: Mapping[str, Any] | str | None = None,
    consistency_weighting: Mapping[str, Any] | str | None = None,
    consistency_scale: float | None = None,
    label_dropout: float = 0.5,
    guidance_base_rate: float = 0.0,
    time_power: float = 1.0,
    time_zero_rate: float = 0.1,
    max_time: float = 0.999,
    time_warmup_steps: int = 0,
    interval_warmup_steps: int = 0,
    interval_anneal_steps: int = 0,
    interval_end_rate: float = 0.0,
    tangent: str = "auto",
) -> Objective:
    """Diagonal matching plus the consistency condition of that name (`OBJECTIVES`): trains a meta flow map.

    teacher: a flow map whose marginal velocity is distilled, required by *_teacher and by diagonal="teacher".
    teacher_guidance: how it answers for a label at a guidance scale: "none" as it is, "plain" classifier-free guidance
    of a conditional teacher, "model" for one trained with model guidance at `teacher_trained_scale`.
    diagonal_weighting, consistency_weighting: a name of `WEIGHTINGS` or {"name": ..., **arguments}; variance when None.
    consistency_scale: factor of the consistency term; None: 5 for semigroup, which on digits makes one-step draws
    sharper than 1 does, and 1 for the conditions with derivatives, which larger factors make unstable.
    label_dropout, guidance_base_rate as in `Labels`; time_power, time_zero_rate, max_time, time_warmup_steps as in
    `ConditioningTimes`; interval_* as in `IntervalTimes`; tangent as in `Tangent`.

    Raises ValueError naming the argument, its value and what is allowed.
    """
    require(name in OBJECTIVES, "objective.name", name, f"one of {', '.join(sorted(OBJECTIVES))}")
    require(diagonal in _DIAGONALS, "objective.diagonal", diagonal, f"one of {', '.join(_DIAGONALS)}")
    scale = _DEFAULT_SCALES.get(name, 1.0) if consistency_scale is None else consistency_scale
    require(scale > 0, "consistency_scale", scale, "a number above 0")
    parts = Parts(
        tangent=Tangent(tangent),
        times=IntervalTimes(
            warmup_steps=interval_warmup_steps, anneal_steps=interval_anneal_steps, end_rate=interval_end_rate
        ),
        teacher=None if teacher is None else build_teacher(teacher, teacher_guidance, teacher_trained_scale),
    )
    default = {"name": "variance"}
    diagonal_term = WeightedTerm(
        DiagonalTerm(parts.teacher_velocity() if diagonal == "teacher" else DataVelocity()),
        build_weighting(diagonal_weighting or default, group="objective.diagonal_weighting"),
    )
    consistency_term = WeightedTerm(
        OBJECTIVES[name](parts),
        build_weighting(consistency_weighting or default, group="objective.consistency_weighting"),
        scale=scale,
    )
    return Objective(
        [diagonal_term, consistency_term],
        times=ConditioningTimes(
            power=time_power, zero_rate=time_zero_rate, max_time=max_time, warmup_steps=time_warmup_steps
        ),
        labels=Labels(dropout=label_dropout, base_rate=guidance_base_rate),
    )


def build_teacher(flow_map: FlowMap, guidance: str, trained_scale: float) -> Teacher:
    require(guidance in TEACHERS, "objective.teacher_guidance", guidance, f"one of {', '.join(TEACHERS)}")
    if guidance == "model":
        return ModelGuidedTeacher(flow_map, trained_scale=trained_scale)
    return TEACHERS[guidance](flow_map)


def needs_teacher(objective: Mapping[str, Any]) -> bool:
    """Whether the objective that a mapping describes distils a teacher."""
    return str(objective.get("name", "")).endswith("_teacher") or objective.get("diagonal") == "teacher"


def build_objective(objective: Mapping[str, Any], *, teacher: FlowMap | None = None) -> Objective:
    """The objective that a mapping {"name": ..., **arguments} describes; `teacher` in place of the path it names.

    Raises ValueError for an unknown name and for arguments that `named_objective` refuses, naming both.
    """
    arguments = dict(objective)
    name = arguments.pop("name", None)
    path = arguments.pop("teacher", None)
    if path is not None and not needs_teacher(objective):
        raise InputError(
            f"objective.teacher={path}: objective={name} with diagonal=data has no use for it, expected null"
        )
    refuse_unknown_arguments(arguments, named_objective, group="objective", supplied=("name", "teacher"))
    try:
        return named_objective(name, teacher=teacher, **arguments)
    except TypeError as error:
        raise InputError(f"objective={dict(objective)}: {error}") from error
