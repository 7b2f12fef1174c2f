"""FID's Inception against torch-fidelity's own class (inception_reference.py), and strict reading of its weights."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from mfm_ray.errors import InputError
from mfm_ray.networks.inception import WEIGHTS, FidInception, load_inception, resize_like_tensorflow

HERE = Path(__file__).parent
REFERENCE = json.loads((HERE / "inception_reference.json").read_text())


def reference_module():
    spec = importlib.util.spec_from_file_location("inception_reference", HERE / "inception_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made():
    return reference_module()


@pytest.fixture(scope="module")
def tensors(made):
    return made.weights({name: tuple(shape) for name, shape in REFERENCE["shapes"].items()})


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception")
    torch.save(tensors, path / WEIGHTS)
    return path


@pytest.fixture(scope="module")
def network(folder):
    return load_inception(folder)


def test_names_and_shapes_are_those_of_torch_fidelity():
    ours = {name: list(tensor.shape) for name, tensor in FidInception().state_dict().items()}
    assert ours == REFERENCE["shapes"]


@pytest.mark.parametrize("size", sorted(REFERENCE["sizes"]))
def test_features_equal_those_of_torch_fidelity(network, made, size):
    wanted = REFERENCE["sizes"][size]
    features, spatial = network.both(made.pictures(tuple(map(int, size.split("x")))))
    assert features.shape == (2, 2048) and spatial.shape == (2, 2023)
    close = {"rtol": 2e-4, "atol": 2e-4}
    torch.testing.assert_close(features[:, : made.SHOWN], torch.tensor(wanted["features"]), **close)
    torch.testing.assert_close(features.double().norm(dim=1), torch.tensor(wanted["norms"]).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(spatial[:, : made.SHOWN], torch.tensor(wanted["spatial"]), **close)
    norms = torch.tensor(wanted["spatial_norms"]).double()
    torch.testing.assert_close(spatial.double().norm(dim=1), norms, rtol=1e-5, atol=0)


def test_resizing_reads_at_multiples_of_the_scale():
    """Of a ramp the output is the place that is read, up to the last pixel."""
    ramp = torch.arange(5.0).expand(1, 1, 5, 5)
    wanted = (torch.arange(20) * (5 / 20)).clamp_max(4)
    torch.testing.assert_close(resize_like_tensorflow(ramp, 20)[0, 0, 3], wanted)
    torch.testing.assert_close(resize_like_tensorflow(ramp.transpose(2, 3), 20)[0, 0, :, 7], wanted)


def test_it_is_always_in_eval_mode_and_takes_bytes_alone(network):
    assert not network.train().training
    with pytest.raises(ValueError, match="expected .N, 3, H, W. uint8"):
        network(torch.zeros(1, 3, 8, 8))


def damaged(tensors, what):
    changed = dict(tensors)
    if what == "missing tensors: fc.bias":
        del changed["fc.bias"]
    elif what == "unexpected tensors: more":
        changed["more"] = torch.zeros(1)
    elif what == "fc.bias has shape":
        changed["fc.bias"] = torch.zeros(1000)
    else:
        changed["fc.bias"] = torch.full((1008,), torch.nan)
    return changed


@pytest.mark.parametrize(
    "what",
    ["missing tensors: fc.bias", "unexpected tensors: more", "fc.bias has shape", "fc.bias holds NaN or infinity"],
)
def test_weights_that_do_not_fit_are_refused_by_name(tensors, tmp_path, what):
    torch.save(damaged(tensors, what), tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=what):
        load_inception(tmp_path / WEIGHTS)


def test_a_truncated_file_and_a_pickle_are_refused(folder, tmp_path):
    content = (folder / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_inception(tmp_path)
    torch.save({"a": Path("x")}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_inception(tmp_path)


def test_a_place_without_the_file_says_what_is_looked_for(tmp_path):
    with pytest.raises(InputError, match=WEIGHTS):
        load_inception(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_inception(tmp_path / "none")


def test_weights_of_before_the_counters_of_batch_norm_are_read(tensors, tmp_path):
    torch.save({name: x for name, x in tensors.items() if not name.endswith("tracked")}, tmp_path / WEIGHTS)
    assert torch.equal(load_inception(tmp_path).fc.bias, tensors["fc.bias"])
