"""Training objectives: what a flow map must satisfy, where that is checked, and how errors are weighted.

A condition (`Term`, conditions.py) compares the network with a stop-gradient target, whose instantaneous velocity comes
from a `VelocitySource` (velocities.py), at states sampled from the data (states.py). An `Objective` adds terms, weights
them per sample (weighting.py) and reduces nothing: the mean over the batch is taken once, by the trainer.
"""

from mfm_ray.objectives.building import OBJECTIVES, build_objective, named_objective, needs_teacher
from mfm_ray.objectives.conditions import (
    DiagonalTerm,
    EulerianTerm,
    LagrangianTerm,
    Residual,
    SemigroupTerm,
    Tangent,
    Term,
)
from mfm_ray.objectives.objective import Examples, Losses, Objective, WeightedTerm, target_variance
from mfm_ray.objectives.states import ConditioningTimes, IntervalTimes, Labels, TrainingStates
from mfm_ray.objectives.teachers import ModelGuidedTeacher, PlainTeacher, Teacher, UnguidedTeacher
from mfm_ray.objectives.velocities import DataVelocity, SelfVelocity, TeacherVelocity, VelocitySource
from mfm_ray.objectives.weighting import (
    WEIGHTINGS,
    AdaptiveWeighting,
    LearnedWeighting,
    LogWeighting,
    VarianceWeighting,
    Weighting,
)

__all__ = [
    "OBJECTIVES",
    "WEIGHTINGS",
    "AdaptiveWeighting",
    "ConditioningTimes",
    "DataVelocity",
    "DiagonalTerm",
    "EulerianTerm",
    "Examples",
    "IntervalTimes",
    "Labels",
    "LagrangianTerm",
    "LearnedWeighting",
    "LogWeighting",
    "Losses",
    "ModelGuidedTeacher",
    "Objective",
    "PlainTeacher",
    "Residual",
    "SelfVelocity",
    "SemigroupTerm",
    "Tangent",
    "Teacher",
    "TeacherVelocity",
    "Term",
    "TrainingStates",
    "UnguidedTeacher",
    "VarianceWeighting",
    "VelocitySource",
    "WeightedTerm",
    "Weighting",
    "build_objective",
    "named_objective",
    "needs_teacher",
    "target_variance",
]
