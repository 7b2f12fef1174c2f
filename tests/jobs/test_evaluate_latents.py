"""The protocols of ImageNet's scale on a model of latents: distances and rewards see the decoder's pictures."""

import pytest
import torch

from jobs.evaluation import evaluator
from jobs.large_evaluation import deciding_settings
from mfm_ray.config import load_config
from mfm_ray.data.datasets import Dataset, Split
from mfm_ray.data.shards import write_shards
from mfm_ray.data_space import DataSpace
from mfm_ray.pretrained import read_model_config
from mfm_ray.protocols import build_protocol
from mfm_ray.protocols.imagenet_fid import REFERENCE, FidMaker
from mfm_ray.protocols.pieces import Piece
from mfm_ray.storage import Storage

SETS = ("protocol.features=raw", "protocol.kid_subsets=3", "protocol.batch_size=8", "protocol.piece_size=12")


@pytest.fixture(scope="module")
def model(latent_model):
    return Storage(latent_model.model)


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    """Posteriors of latents, their means and deviations."""
    described = read_model_config(model)["data"]
    space, names = DataSpace.from_config(described), tuple(described["class_names"])
    generator = torch.Generator().manual_seed(0)
    splits = {
        name: Split(torch.rand(24, 8, 4, 4, generator=generator), torch.arange(24) % 3) for name in ("train", "heldout")
    }
    place = Storage(tmp_path_factory.mktemp("latents") / "data")
    write_shards(place, Dataset(described["name"], space, splits, names, row_form="mean_std"))
    return place


def loaded(model, data, name, *words):
    protocol = build_protocol(load_config("evaluate", [f"protocol={name}", *words]).protocol)
    return protocol, evaluator(name).load(protocol, model, data, 0)


def evaluated(name, protocol, material):
    return evaluator(name).evaluate(protocol, material, seed=0, log=lambda line: None)


def test_distances_are_of_pictures(model, data):
    protocol, material = loaded(model, data, "imagenet_fid", *SETS, "protocol.nfe=[1,2]", "protocol.num_samples=20")
    piece = Piece(part=REFERENCE, index=0, of=1, first=0, count=24)
    made = FidMaker(protocol, material, 0).make(piece, lambda done: None)
    space = material.flow_map.space
    wanted = space.clamp(space.to_data_units(material.rows.states)).flatten(1)
    assert wanted.shape == (24, 3 * 8 * 8)
    torch.testing.assert_close(made["features"], wanted)
    evaluation = evaluated("imagenet_fid", protocol, material)
    assert evaluation.measured[0].images.shape == (8, 3, 8, 8)
    assert evaluation.measured[0].frechet > evaluation.floor > 0


def test_pieces_depend_on_the_autoencoder(model, data):
    protocol, material = loaded(model, data, "imagenet_fid", *SETS)
    settings = deciding_settings(protocol, model, data, material, 0)
    assert len(settings["autoencoder"]) == 64


def test_posterior_draws_values_and_steering_see_pictures(model, data):
    words = (*SETS, "protocol.times=[0.0,0.3]", "protocol.num_contexts=12", "protocol.map_steps=[1]")
    posterior = evaluated("imagenet_posterior", *loaded(model, data, "imagenet_posterior", *words))
    assert all(found.images.shape[1:] == (3, 8, 8) for found in posterior.measured)
    words = (
        "protocol.rewards=[brightness]",
        "protocol.label=null",
        "protocol.times=[0.3]",
        "protocol.num_contexts=4",
        "protocol.num_draws=4",
        "protocol.truth_draws=4",
        "protocol.truth_steps=2",
        "protocol.map_steps=[1]",
        "protocol.glass_steps=[1]",
        "protocol.cfg_scale=null",
    )
    values = evaluated("imagenet_values", *loaded(model, data, "imagenet_values", *words))
    assert bool(values.studies[0].truth.value.isfinite().all())
    words = (
        "protocol.rewards=[brightness]",
        "protocol.label=1",
        "protocol.num_images=2",
        "protocol.num_steps=2",
        "protocol.pool_size=4",
        "protocol.best_of=[1,2]",
        "protocol.gradient_draws=[1]",
        "protocol.gradient_free_draws=[2]",
        "protocol.search_particles=[2]",
        "protocol.multipliers=[1.0]",
        "protocol.cfg_scale=null",
    )
    steering = evaluated("imagenet_steering", *loaded(model, None, "imagenet_steering", *words))
    assert steering.unsteered.images.shape == (4, 3, 8, 8)
    assert {found.key for found in steering.of("brightness")} >= {"mfm_g_n1_l1", "dps_l1", "search_m2", "best_of_2"}
