"""What sweeps over trainings must know of the job that makes them, `jobs.train` or `jobs.finetune`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from jobs.contract import JobRun
from mfm_ray.config import TrainingConfig

Config = TypeVar("Config", bound=TrainingConfig)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What all trials need before the first one runs.

    own: keys of every trial in the place of those that its row tells; measure: of the averaged model at each
    checkpoint; train: the job's training; judge: the classifier that is saved beside the models that stay, or None.
    """

    own: Mapping[str, Any]
    measure: Any
    train: Callable[..., Any]
    judge: Any = field(default=None)


class SweptTraining(ABC, Generic[Config]):
    """One job of trainings. root: class of the configuration of one trial."""

    root: type[TrainingConfig]

    @abstractmethod
    def sweepable(self) -> Any:
        """What may differ from trial to trial (`mfm_ray.tuning.training_space.Sweepable`)."""

    @abstractmethod
    def common(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The keys that all trials share, from those of the sweep's configuration."""

    @abstractmethod
    def check(self, config: Config, trials: Sequence[Any]) -> None:
        """InputError unless every trial could be trained. Takes no resource."""

    @abstractmethod
    def figures(self, config: Config) -> Mapping[str, str]:
        """Figures that trials can be judged by, with "min" or "max"."""

    @abstractmethod
    def decisive(self, config: Config) -> dict[str, Any]:
        """What decides trials beside the words of the configuration: hashes of what these name."""

    @abstractmethod
    def prepare(self, run: JobRun, trials: Sequence[Any]) -> Prepared:
        """Data, measurement and judge. InputError for what only the prepared data show of the trials."""
