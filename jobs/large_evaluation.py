"""What the protocols that are made in pieces need: model, rewards, features, data, reference, and what decides them."""

import hashlib
from dataclasses import asdict
from typing import Any

from jobs.contract import JobRun
from jobs.evaluation_pieces import read_piece, shard_of
from jobs.sample_shards import model_checksum
from jobs.workbench import Workbench
from mfm_ray.config import EvaluateConfig, filled_reward, load_config
from mfm_ray.errors import InputError
from mfm_ray.protocols import PiecesProtocol
from mfm_ray.storage import Storage

# Change figures that are taken of the pieces, not the pieces.
_AFTERWARDS = ("batch_size", "kid_subsets", "kid_subset_size", "neighbours", "manifold_rows", "best_of")


def load_fid(protocol: Any, model: Storage, data: Storage | None, seed: int) -> Any:
    from mfm_ray.data.adm import AdmBatch
    from mfm_ray.protocols.imagenet import LargeMaterial
    from mfm_ray.protocols.imagenet_fid import check_imagenet_fid

    bench = Workbench(model.uri)
    bench.check_cfg_scale(protocol.cfg_scale)
    batch = None if protocol.reference is None else AdmBatch(protocol.reference, key="protocol.reference")
    if batch is not None:
        batch.verify()
    rows = clean_rows(bench, data, seed) if batch is None else None
    material = LargeMaterial(bench.flow_map, feature_extractor(protocol, bench), rows, batch)
    check_imagenet_fid(protocol, material)
    return material


def load_posterior(protocol: Any, model: Storage, data: Storage | None, seed: int) -> Any:
    from mfm_ray.protocols.imagenet import LargeMaterial
    from mfm_ray.protocols.imagenet_posterior import check_imagenet_posterior

    bench = Workbench(model.uri)
    bench.check_cfg_scale(protocol.cfg_scale)
    material = LargeMaterial(bench.flow_map, feature_extractor(protocol, bench), clean_rows(bench, data, seed))
    check_imagenet_posterior(protocol, material)
    return material


def load_values(protocol: Any, model: Storage, data: Storage | None, seed: int) -> Any:
    from mfm_ray.protocols.imagenet import LargeMaterial
    from mfm_ray.protocols.imagenet_values import check_imagenet_values

    bench = Workbench(model.uri)
    bench.check_cfg_scale(protocol.cfg_scale)
    given = [filled_reward(reward) for reward in protocol.rewards]
    names = list(bench.judges(given, seed=seed))  # told apart where two are of a kind
    rewards = {name: bench.reward(reward, seed=seed) for name, reward in zip(names, given, strict=True)}
    material = LargeMaterial(bench.flow_map, rows=clean_rows(bench, data, seed), rewards=rewards)
    check_imagenet_values(protocol, material)
    return material


def load_steering(protocol: Any, model: Storage, data: Storage | None, seed: int) -> Any:
    from mfm_ray.protocols.imagenet import LargeMaterial
    from mfm_ray.protocols.imagenet_steering import check_imagenet_steering

    if data is not None:
        raise InputError(f"data_path={data}: protocol={protocol.name} looks at no data; expected null")
    bench = Workbench(model.uri)
    bench.check_cfg_scale(protocol.cfg_scale)
    rewards = bench.judges([filled_reward(reward) for reward in protocol.rewards], seed=seed)
    material = LargeMaterial(bench.flow_map, rewards=rewards)
    check_imagenet_steering(protocol, material)
    return material


def feature_extractor(protocol: Any, bench: Workbench) -> Any:
    """What distances look at."""
    from mfm_ray.metrics import ClassifierFeatures, InceptionFeatures, RawFeatures

    if protocol.features == "inception":
        from mfm_ray.networks.inception import load_inception

        return InceptionFeatures(load_inception(protocol.inception, key="protocol.inception"))
    return ClassifierFeatures(bench.classifier) if protocol.features == "classifier" else RawFeatures()


def clean_rows(bench: Workbench, data: Storage | None, seed: int) -> Any:
    """The held-out data as states, one sample of each posterior where rows are posteriors."""
    from mfm_ray.data.latents import draw
    from mfm_ray.data.shards import read_manifest
    from mfm_ray.noise import KeyedNoise
    from mfm_ray.protocols.imagenet import CleanRows, states_of

    split = bench.heldout_split(None if data is None else data.uri, key="data_path")
    form = "sample" if data is None else read_manifest(data).row_form
    rows = draw(split.data, form, KeyedNoise.for_images(seed, len(split)))
    flow_map = bench.flow_map
    if tuple(rows.shape[1:]) != tuple(flow_map.event_shape):
        raise InputError(
            f"data_path={data.uri if data else 'null'}: data of shape {tuple(rows.shape[1:])}; expected the model's "
            f"{tuple(flow_map.event_shape)}"
        )
    labels = None
    if flow_map.num_classes:
        labels = split.labels.masked_fill(split.labels < 0, flow_map.num_classes)
        if int(labels.max()) > flow_map.num_classes:
            raise InputError(
                f"data_path: labels up to {int(labels.max())}; expected the model's {flow_map.num_classes} classes"
            )
    return CleanRows(states_of(rows, flow_map.space), labels)


def deciding_settings(
    protocol: PiecesProtocol, model: Storage, data: Storage | None, material: Any, seed: int
) -> dict[str, Any]:
    """Everything that the pieces depend on."""
    from mfm_ray.data.shards import read_manifest
    from mfm_ray.latent_models import Decoding, autoencoder_checksum

    settings: dict[str, Any] = {key: value for key, value in asdict(protocol).items() if key not in _AFTERWARDS}
    settings |= {"model": model_checksum(model), "seed": seed}
    settings["data"] = None if data is None else read_manifest(data).sha256
    autoencoder = autoencoder_checksum(model, Decoding())
    if autoencoder is not None:
        settings["autoencoder"] = autoencoder
    if material.reference is not None:
        settings["reference"] = material.reference.fingerprint
    if settings.get("inception") is not None:
        settings["inception"] = _weights_checksum(material.features)
    return settings


def _weights_checksum(features: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(features.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def adm_batches(run: JobRun, evaluation: Any) -> dict[str, str]:
    """The samples of an evaluation that kept them, as .npz files for ADM's evaluator, by artifact."""
    from mfm_ray.data.adm import write_adm_batch
    from mfm_ray.protocols.imagenet_fid import part_of
    from mfm_ray.protocols.pieces import plan

    protocol, artifacts = evaluation.protocol, {}
    if not protocol.save_images:
        return {}
    for nfe in protocol.nfe:
        pieces = plan(part_of(nfe), protocol.num_samples, protocol.piece_size)
        parts = (read_piece(run.storage, shard_of(index, piece))["images"] for index, piece in enumerate(pieces))
        name = f"samples_{part_of(nfe)}.npz"
        write_adm_batch(run.storage, name, parts, count=protocol.num_samples)
        artifacts[name.removesuffix(".npz")] = run.storage.uri_of(name)
    return artifacts


def check_scaling(config: EvaluateConfig) -> None:
    """InputError for workers of a protocol that has none."""
    if config.scaling != load_config("evaluate").scaling:  # type: ignore[attr-defined]
        name = config.protocol.get("name")
        raise InputError(f"scaling: protocol={name} is measured by one process; expected none of its keys")
