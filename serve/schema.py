"""Bodies of requests: the OpenAI Images API where it fits, and our own fields. Types only; bounds that an operator
sets and what a model allows are looked at in `resolve`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_SEED = 2**31 - 1
MOST_FIELDS, MOST_REWARDS, MOST_IMAGES = 100, 1000, 10_000
"""Beyond which nothing is looked at; what an operator allows is less (`settings.Limits`)."""


class Body(BaseModel):
    """Strict: a text is no number, true is no number, NaN is none either, and nothing unknown is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, given: Any) -> Any:
        """Each unknown field would be reported: a million of them would hold up everybody else."""
        if isinstance(given, dict) and len(given) > MOST_FIELDS:
            raise PydanticCustomError("too_many_fields", f"{len(given)} fields; expected at most {MOST_FIELDS}")
        return given


class RewardRequest(Body):
    name: str
    weight: float = 1.0
    params: dict[str, Any] = Field(default_factory=dict)


class SteeringRequest(Body):
    """Further arguments of a method pass as they are: its constructor is their schema, `resolve` knows their names."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    method: Literal["gradient", "gradient_free", "dps", "resampling", "search", "smc", "best_of_n", "none"] | None = (
        None
    )
    rewards: list[RewardRequest] = Field(default_factory=list, max_length=MOST_REWARDS)
    combine: Literal["sum", "minimum"] = Field(
        default="sum", description="of several rewards: their weighted sum, or the smallest of the weighted ones"
    )
    guidance_scale: float | None = None
    num_draws: int | Literal["auto"] | None = None
    num_particles: int | None = Field(default=None, description="particles of one image; for best_of_n: N")
    num_steps: int | None = Field(default=None, ge=1)
    dynamics: Literal["ode", "sde"] | None = None
    renormalise: Literal["none", "rescale", "clip"] | None = None
    trust_region: float | Literal["auto"] | None = "auto"
    resampling: Literal["max_overall", "max_per_particle"] | None = Field(default=None, description="of search")
    transition: Literal["stochastic", "deterministic"] | None = Field(default=None, description="of search")
    potential: Literal["tds", "feynman_kac", "value"] | None = Field(default=None, description="of smc")
    resample_threshold: float | None = Field(default=None, ge=0, le=1, description="of smc")
    max_nfe: int | None = Field(default=None, ge=1, description="network and reward calls an image, never exceeded")
    deadline_s: float | None = Field(default=None, gt=0, description="seconds; 504 when they have passed")
    on_reward_failure: Literal["fail", "drop"] = "fail"


class GenerationRequest(Body):
    model: str | None = None
    prompt: str = ""
    class_label: int | None = Field(default=None, ge=0)
    cfg_scale: float | None = None
    n: int | None = Field(default=1, ge=1)
    size: str | None = "auto"
    quality: Literal["auto", "low", "medium", "high"] | None = "auto"
    response_format: Literal["b64_json"] | None = "b64_json"
    output_format: Literal["png"] | None = "png"
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="random when left out; returned")
    stream: bool | None = False
    partial_images: int | None = Field(default=0, ge=0, le=3)
    user: str | None = None
    include: list[Literal["trace", "timing"]] = Field(
        default_factory=list,
        max_length=MOST_FIELDS,
        description="what the answer has beside the images: trace, the value estimate of each step; "
        "timing, where the seconds went",
    )
    steering: SteeringRequest | None = None


class ScoreRequest(Body):
    images: list[str] = Field(min_length=1, max_length=MOST_IMAGES, description="PNG in base64")
    prompt: str = ""
    model: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)
