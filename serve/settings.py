"""What an operator sets: the arguments of `build_app`, all with defaults but the model.

On a command line lists are written with commas (`rewards=symmetry,brightness`); in config.yaml they are lists.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(Settings):
    """The largest of everything that a request can make large."""

    body_bytes: PositiveInt = Field(default=8 * 2**20, description="body of any request")
    body_s: PositiveFloat = Field(default=30.0, description="seconds until all of a body has come")
    prompt_chars: PositiveInt = Field(default=4096, description="prompt")
    images: PositiveInt = Field(default=16, description="n")
    particles: PositiveInt = Field(default=1024, description="steering.num_particles")
    draws: PositiveInt = Field(default=256, description="steering.num_draws")
    steps: PositiveInt = Field(default=1000, description="steering.num_steps")
    rewards: PositiveInt = Field(default=8, description="length of steering.rewards")
    row_steps: PositiveInt = Field(default=1_000_000, description="n x particles x draws x steps")
    scored_images: PositiveInt = Field(default=64, description="images of one scoring request")
    image_pixels: PositiveInt = Field(default=2**20, description="pixels of one image sent in")
    deadline_s: PositiveFloat = Field(
        default=600.0, description="steering.deadline_s, and the deadline when none is given"
    )
    requests: PositiveInt = Field(default=256, description="requests that one ingress replica holds; more get 429")
    rows_waiting: PositiveInt = Field(
        default=16384, description="rows beyond those of the next pass in one sampler replica; more get 429"
    )


class Replicas(Settings):
    """Resources and scaling of one deployment, in Ray Serve's own words. Either num_replicas or autoscaling_config."""

    num_replicas: PositiveInt | None = None
    autoscaling_config: dict[str, Any] | None = None
    ray_actor_options: dict[str, Any] = Field(default_factory=lambda: {"num_cpus": 1})
    health_check_period_s: PositiveFloat = 5.0
    health_check_timeout_s: PositiveFloat = 15.0
    graceful_shutdown_timeout_s: PositiveFloat = 60.0

    def options(self) -> dict[str, Any]:
        """Arguments of a deployment's `.options`."""
        given = self.model_dump(include=set(Replicas.model_fields), exclude_none=True)
        return given if self.num_replicas or self.autoscaling_config else {**given, "num_replicas": 1}


class SamplerSettings(Replicas):
    max_rows: PositiveInt = Field(default=1024, description="rows of one network call")
    waves: PositiveInt | None = Field(
        default=None,
        description="batches in flight, so that sampler and rewards overlap; null: 1, and 2 while rewards take long",
    )
    decode_at_once: PositiveInt = Field(
        default=4, description="pictures that are in the autoencoder of a model of latents at a time, on a GPU"
    )
    slow_reward_s: PositiveFloat = Field(
        default=0.5, description="seconds after which a step waits for a reward apart from requests that do not use it"
    )
    snapshot_every_s: PositiveFloat = Field(
        default=1.0, description="seconds between snapshots of a request, from which it goes on when its sampler dies"
    )
    models_in_memory: PositiveInt = Field(default=2, description="checkpoints that one replica holds")
    target_rows: PositiveInt = Field(
        default=256, description="rows, waiting and running, that one replica is meant to have"
    )
    device: str | None = Field(default=None, description="torch device; null: cuda when there is one")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="arithmetic of the network")
    execution: Literal["eager", "compiled", "graphs"] = Field(
        default="eager",
        description="how the network is computed: eager, compiled by torch.compile, or graphs (CUDA graphs of calls "
        "that need no gradient; on a CPU as eager)",
    )


class RewardSettings(Replicas):
    """A reward. placement: in a deployment of its own, or inside the sampler's replicas (cheap rewards)."""

    name: str
    ray_actor_options: dict[str, Any] = Field(default_factory=lambda: {"num_cpus": 0.5})
    placement: Literal["deployment", "colocated"] = "deployment"
    timeout_s: PositiveFloat = Field(
        default=10.0, description="seconds for one call, after which it is repeated elsewhere"
    )
    attempts: PositiveInt = Field(default=3, description="calls, the first included, before the reward counts as down")
    transport: Literal["direct", "serve"] = Field(
        default="direct",
        description="direct: samplers call replicas over TCP connections of their own; serve: through Serve's handle",
    )
    target_rows: PositiveInt = Field(
        default=256, description="rows, waiting and running, that one replica is meant to have"
    )
    max_batch_rows: PositiveInt = Field(default=512, description="rows of one evaluation, merged over callers")
    patience_s: NonNegativeFloat = Field(
        default=1.0,
        description="a call of training lets those of samplers pass that come within so many seconds after it",
    )
    weights: dict[str, Any] = Field(
        default_factory=dict,
        description="of a reward with a published network: source, tokenizer, head, rows_per_call; left out: as in "
        "conf/reward",
    )
    rewards_in_memory: PositiveInt = Field(default=64, description="rewards kept built, one for each set of parameters")


class AppSettings(Settings):
    """Arguments of `build_app`.

    model: one model directory (or URI), a list of them, or {id: directory}. rewards: names or `RewardSettings`; null
    serves every reward that the model allows. presets: `presets.yaml` of a sweep (path or URI) for all models, or
    {id: file}; null: built-in ones. autoencoder: of models of latents, a folder or hf://owner/name; auto: their own.
    """

    model: dict[str, str] | list[str] | str
    rewards: list[RewardSettings] | None = None
    presets: dict[str, str] | str | None = None
    autoencoder: str = "auto"
    check_autoencoder: bool = Field(
        default=True, description="refuse an autoencoder that a model's latents were not made with"
    )
    keys_file: str | None = None
    limits: Limits = Limits()
    sampler: SamplerSettings = SamplerSettings()
    ingress: Replicas = Replicas(ray_actor_options={"num_cpus": 0.5})
    access_log: bool = Field(default=False, description="one line of JSON for each request in the endpoint's log")
    heartbeat_s: PositiveFloat = Field(
        default=10.0, description="a stream with nothing to say for so many seconds sends a comment"
    )
    resume_attempts: PositiveInt = Field(
        default=5, description="how often a request whose sampler died is resumed without a step of progress in between"
    )

    @field_validator("rewards", mode="before")
    @classmethod
    def _named_rewards(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, list):
            return [{"name": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("model", mode="before")
    @classmethod
    def _listed_models(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) and "," in value else value
