"""Rewards that an application of Ray Serve in the same cluster answers, for the workers of a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mfm_ray.config import FinetuneConfig
from mfm_ray.errors import InputError
from mfm_ray.latent_models import Decoding, settled
from mfm_ray.settings import nearest

_PIXELS = 2**24
"""Of an image among the parameters; there is none in a configuration."""
_TIMEOUT_S, _ATTEMPTS = 60.0, 5


@dataclass(frozen=True)
class ServedReward:
    """A reward of a configuration whose parts are asked of deployments `reward_<name>`. Made on a worker by calling it.

    app: of Ray Serve; model: the id of the served model; source: the model directory that is tuned; seed: of the run;
    decoding: how pictures are made of its latents.
    """

    app: str
    model: str
    source: str
    reward: Mapping[str, Any]
    seed: int
    decoding: Decoding

    @classmethod
    def of(cls, config: FinetuneConfig) -> ServedReward:
        """InputError for parameters that the served rewards do not take."""
        from mfm_ray.pretrained import model_place
        from serve.models import read_models

        assert config.reward_app is not None
        assert config.model is not None
        decoding = settled(model_place(config.model), Decoding.of(config))
        (own_id,) = read_models(config.model, decoding)
        model = config.reward_model or own_id
        served = cls(config.reward_app, model, config.model, config.reward, config.seed, decoding)
        served.names()
        return served

    def names(self) -> list[str]:
        """Rewards that are asked. InputError for parameters that they do not take."""
        asked: list[str] = []

        def note(name: str, title: str, params: str) -> _Nothing:
            asked.append(name)
            return _Nothing(title)

        self._build(note)
        return asked

    def require_running(self) -> None:
        """InputError unless the application runs here, has these rewards, and they answer for this model."""
        import torch
        from ray import serve

        applications = serve.status().applications
        if self.app not in applications:
            raise InputError(
                f"reward_app={self.app}: does not run in this cluster; running are "
                f"{', '.join(sorted(applications)) or 'none'}"
            )
        deployments = applications[self.app].deployments
        served = sorted(name.removeprefix("reward_") for name in deployments if name.startswith("reward_"))
        for name in self.names():
            if name not in served:
                close = nearest(name, served)
                hint = f"; did you mean {close}?" if close else ""
                raise InputError(
                    f"reward={name}: reward_app={self.app} serves {', '.join(served) or 'no rewards'}{hint}"
                )
        probe = torch.zeros(4, *self._event_shape())
        try:
            self._asking(direct=False)(probe)
        except Exception as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"reward_app={self.app}: asked for model {self.model} it said: {line}") from error

    def __call__(self) -> Any:
        """The reward, on the process that will ask: over connections of its own, which that process keeps."""
        return self._asking(direct=True)

    def _asking(self, *, direct: bool) -> Any:
        from ray import serve

        from serve.remote_reward import Line, RemoteReward

        lines: dict[str, Line] = {}

        def ask(name: str, title: str, params: str) -> Any:
            if name not in lines:
                handle = serve.get_deployment_handle(f"reward_{name}", app_name=self.app)
                lines[name] = _line_to(handle, name, direct=direct)
            return RemoteReward(lines[name], name=title, model=self.model, params=params)

        return self._build(ask)

    def _build(self, ask: Any) -> Any:
        """The reward with `ask(name, title, parameters)` for each of its parts."""
        from mfm_ray.building import build_reward
        from serve.catalogue import KINDS, network_arguments, resolve_params
        from serve.models import read_models
        from serve.reward import canonical

        (card,) = read_models(self.source, self.decoding).values()

        def elsewhere(name: str, title: str, params: Mapping[str, Any], place: str) -> Any:
            if name not in KINDS:
                raise InputError(f"{place}.name={name}: is not served; expected one of {', '.join(KINDS)}")
            network = network_arguments(name, {})
            for key, default in network.items():
                if params.get(key, default) != default:
                    raise InputError(f"{place}.{key}={params[key]}: a served {name} has the weights of its deployment")
            given = {
                key: value
                for key, value in params.items()
                if key not in network and not (key == "data" and value is None)
            }
            if name == "masked_observation" and self.seed != 0:
                raise InputError(f"seed={self.seed}: a served {name} sees through the noise of seed 0; expected seed=0")
            resolved = resolve_params(name, card, given, place=place, max_pixels=_PIXELS)
            return ask(name, title, canonical(resolved))

        def nothing(*_: Any) -> Any:
            raise AssertionError("every reward with a classifier or an image is served")

        return build_reward(
            self.reward, load_classifier=nothing, load_heldout=nothing, seed=self.seed, elsewhere=elsewhere
        )

    def _event_shape(self) -> tuple[int, ...]:
        from serve.models import read_models

        (card,) = read_models(self.source, self.decoding).values()
        return card.sample_shape


def _line_to(handle: Any, name: str, *, direct: bool) -> Any:
    """Calls that let those of samplers pass. direct: where replicas can be reached so, through Serve where not."""
    from serve.direct import DirectPath
    from serve.remote_reward import Line

    path = DirectPath(handle, name=name, timeout_s=_TIMEOUT_S, background=True) if direct else None
    return Line(handle, name=name, timeout_s=_TIMEOUT_S, attempts=_ATTEMPTS, direct=path, background=True)


class _Nothing:
    """Stands for a reward while a configuration is looked through."""

    def __init__(self, name: str) -> None:
        self.name = name
