"""In what one kind of training differs from another; engine, loop, checkpoints and records are the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mfm_ray.flow_map import FlowMap
from mfm_ray.training.throughput import Cost
from mfm_ray.training.zero import BatchSplit, ZeroEngine

if TYPE_CHECKING:
    from mfm_ray.training.session import Plan


class Data(Protocol):
    """What a worker's micro-batches are made of. sha256: of the data, or of what stands for it."""

    sha256: str


class Feed(Protocol):
    """The micro-batches of one step after another.

    `state` is of the steps that were taken; this worker's rows of the global batch lie along dimension 1 of each
    tensor.
    """

    def take(self, step: int) -> Sequence[tuple[Any, ...]]: ...

    def again(self, step: int) -> Sequence[tuple[Any, ...]] | None:
        """The micro-batches of a step that was taken not long ago; None where they are gone."""

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...

    def close(self) -> None: ...


class Work(ABC):
    """What one worker trains.

    flow_map: trained, averaged and kept in checkpoints. module: what the engine shards and calls with (*micro-batch,
    step); it holds the flow map and returns the loss and detached figures: `columns`, then the flat `bucket_sums` of
    the errors of `terms`.
    """

    flow_map: FlowMap
    module: nn.Module
    terms: Sequence[Cost]
    columns: Sequence[str]
    evaluate_every: int = 0
    """Steps between evaluations by the plan's evaluator; 0: none."""
    stop_on_hacking: bool = False

    @abstractmethod
    def data(self, split: BatchSplit, *, rank: int, device: torch.device) -> Any:
        """This worker's way through the data, a `Data`."""

    @abstractmethod
    def feed(self, data: Any, engine: ZeroEngine, split: BatchSplit, *, rank: int) -> Feed: ...

    @abstractmethod
    def model(self, weights: Mapping[str, Tensor], device: torch.device) -> FlowMap:
        """The flow map that is sampled, with these weights of `flow_map`, in eval mode."""

    @abstractmethod
    def pictures(self, weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Samples (N, *sample_shape) in data units by title, of the flow map with these weights; none of latents that
        nothing decodes."""

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """The figures of a line from the means of its columns."""
        return means


class Task(Protocol):
    """A kind of training: travels in the plan and is begun on every worker. config_type: a `TrainingConfig`."""

    config_type: ClassVar[type[Any]]

    def begin(self, plan: Plan, config: Any, device: torch.device) -> Work: ...
