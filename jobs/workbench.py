"""A model that is loaded once, and the steering methods, rewards and judges that configurations build on it."""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from mfm_ray.config import SampleConfig
from mfm_ray.errors import InputError
from mfm_ray.latent_models import OWN_DECODING, Decoding, require_pictures
from mfm_ray.storage import Storage


class Workbench:
    """A model directory in memory; what else it holds (classifier, held-out data) is read when first asked for."""

    def __init__(self, model: str | None, decoding: Decoding = OWN_DECODING) -> None:
        from mfm_ray.pretrained import load_flow_map

        if model is None:
            raise InputError("model=null: expected a model directory")
        self.model = Storage(model)
        self.flow_map = load_flow_map(self.model, autoencoder=decoding)
        self._heldout: dict[str | None, Any] = {}

    @cached_property
    def classifier(self) -> Any:
        """The class judge beside the model. InputError when there is none."""
        from mfm_ray.pretrained import load_classifier

        return load_classifier(self.model)

    @property
    def has_classifier(self) -> bool:
        from mfm_ray.pretrained import CLASSIFIER_WEIGHTS

        return self.model.is_file(CLASSIFIER_WEIGHTS)

    def build(self, config: SampleConfig) -> tuple[Any, dict[str, Any]]:
        """Steering method (None: unsteered) and judges by name."""
        from mfm_ray.building import build_steering

        reward = self.reward(config.reward, seed=config.seed)
        if reward is not None and config.steering.get("name") == "none":
            raise InputError(f"reward={config.reward['name']}: steering=none takes no reward; choose a steering")
        return build_steering(config.steering, reward), self.judges(config.judges, seed=config.seed)

    def reward(self, reward: Mapping[str, Any], *, seed: int) -> Any:
        """The reward of a configuration, None for none. InputError where it would look at latents."""
        from mfm_ray.building import build_reward

        built = build_reward(reward, **self._sources(seed))
        if built is not None:
            require_pictures(self.flow_map.space, key="reward", value=reward["name"], model=self.model)
        return built

    def judges(self, judges: Sequence[Any], *, seed: int) -> dict[str, Any]:
        """The judges of a configuration by name. InputError where they would look at latents."""
        from mfm_ray.building import build_judges

        built = build_judges(judges, **self._sources(seed))
        if built:
            require_pictures(self.flow_map.space, key="judges", value=", ".join(built), model=self.model)
        return built

    def check(self, config: SampleConfig) -> None:
        """Label and guidance scale are ones that the model has."""
        self.check_cfg_scale(config.cfg_scale)
        if config.label is not None and not config.label < self.flow_map.num_classes:
            allowed = (
                f"0 to {self.flow_map.num_classes - 1}"
                if self.flow_map.num_classes
                else "null: this model has no classes"
            )
            raise InputError(f"label={config.label}: expected {allowed}")

    def check_cfg_scale(self, cfg_scale: float | None) -> None:
        """InputError for a guidance scale that the model was not trained with."""
        if cfg_scale is not None and cfg_scale not in self.flow_map.cfg_scales:
            known = ", ".join(map(str, self.flow_map.cfg_scales)) or "null alone: this model has none"
            raise InputError(f"cfg_scale={cfg_scale}: expected one of {known}")

    def _sources(self, seed: int) -> dict[str, Any]:
        return {"load_classifier": lambda: self.classifier, "load_heldout": self._load_heldout, "seed": seed}

    def heldout_split(self, place: str | None, *, key: str) -> Any:
        """The held-out `Split` of prepared data, or (None) of the bundled data that the model was trained on.

        key: what an InputError names as the place to say where the data are.
        """
        if place not in self._heldout:
            self._heldout[place] = _heldout(self.model, place, key)
        return self._heldout[place]

    def compared_with(self, data_path: str | None) -> Any:
        """The held-out data (`mfm_ray.tuning.heldout.HeldOut`) that samples of the model are compared with.

        Through the classifier's features where one stands beside the model. InputError when there are none.
        """
        from mfm_ray.metrics import classifier_features
        from mfm_ray.tuning.heldout import HeldOut

        split = self.heldout_split(data_path, key="data_path")
        shape = tuple(self.flow_map.space.sample_shape)
        if tuple(split.data.shape[1:]) != shape:
            raise InputError(
                f"data_path={data_path}: data of shape {tuple(split.data.shape[1:])}; expected that of the model's "
                f"samples, {shape}"
            )
        features = partial(classifier_features, self.classifier) if self.has_classifier else None
        return HeldOut(split.data, split.labels, features)

    def _load_heldout(self, place: str | None) -> Any:
        return self.heldout_split(place, key="reward.data").data


def _heldout(model: Storage, place: str | None, key: str) -> Any:
    from jobs.prepare_data import make_dataset
    from mfm_ray.data.shards import load_split
    from mfm_ray.pretrained import read_model_config

    if place is not None:
        return load_split(place, "heldout")
    name = read_model_config(model)["data"]["name"]
    try:
        return make_dataset(name).splits["heldout"]
    except InputError as error:
        raise InputError(f"{key}=null: {name} is not bundled; expected a folder of prepared data") from error
