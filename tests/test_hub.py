"""`hf://owner/name`: read from the hub's own cache without a network, refused in one line where that cannot be."""

import json
from pathlib import Path

import pytest
import torch

from mfm_ray import hub
from mfm_ray.errors import InputError
from mfm_ray.pretrained import load_classifier, load_flow_map, model_place, save_model
from tests.networks import dit_reference as reference

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FACTS = {"num_heads": 2, "encoder_depth": 2}
ADDRESS = "hf://owner/name"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache of one repository `owner/name`, as snapshot_download lays it out; the folder of its files."""
    import huggingface_hub.constants as constants

    folder = tmp_path / "hub" / "models--owner--name"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # read from the environment when the library is imported, which another test may have done already
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def put(snapshot: Path, name: str, write) -> Path:
    """A file of the repository: a link to a blob, as the cache has it."""
    blob = snapshot.parent.parent / "blobs" / f"blob-{name}"
    write(blob)
    (snapshot / name).symlink_to(blob)
    return snapshot / name


def weights():
    return reference.random_weights(width=32, depth=3)


def put_weights(snapshot: Path, name: str) -> None:
    put(snapshot, name, lambda blob: torch.save(weights(), blob))


def test_local_folders_are_themselves(tmp_path):
    assert hub.local_folder(tmp_path, key="model") == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"model=.*/file is not a folder, expected a local folder or hf://owner/name"):
        hub.local_folder(tmp_path / "file", key="model")
    with pytest.raises(InputError, match="autoencoder=.*nowhere does not exist"):
        hub.local_folder(tmp_path / "nowhere", key="autoencoder")


@pytest.mark.parametrize(
    "address", ["hf://", "hf://owner", "hf://owner/", "hf:///name", "hf://a/b/c", "hf://a/b@", "hf://a b/c"]
)
def test_malformed_addresses_are_named(address):
    assert hub.is_hub(address)
    with pytest.raises(InputError, match="expected hf://owner/name or hf://owner/name@revision") as caught:
        hub.local_folder(address, key="model")
    assert str(caught.value).startswith(f"model={address}: ")


def test_a_repository_that_is_not_in_the_cache_is_named_offline(cache):
    for address in ("hf://owner/other", "hf://owner/name@v2"):
        with pytest.raises(InputError) as caught:
            hub.local_folder(address, key="model")
        message = str(caught.value)
        assert message.startswith(f"model={address}: HF_HUB_OFFLINE is set, and the local cache has no whole copy")
        assert "a local folder works as well: model=/path" in message
        assert "\n" not in message


def test_an_unreachable_hub_is_told_apart_from_a_missing_copy(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*arguments, **keywords):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(InputError, match="the hub cannot be reached from here, and the local cache has no whole copy"):
        hub.local_folder(ADDRESS, key="model")


@pytest.mark.parametrize("address", [ADDRESS, f"{ADDRESS}@main", f"{ADDRESS}@{COMMIT}"])
def test_a_repository_with_one_weights_file_is_that_file(cache, address):
    put_weights(cache, "mfm-xl2.pt")
    put(cache, "config.json", lambda blob: blob.write_text(json.dumps({"architectures": ["SiT"]})))
    put(cache, "README.md", lambda blob: blob.write_text("card"))
    flow_map = load_flow_map(address, **FACTS)
    assert all(torch.equal(flow_map.state_dict()[name], tensor) for name, tensor in weights().items())


def test_a_repository_that_is_a_model_directory_is_read_as_one(cache, tmp_path):
    put_weights(cache, "mfm.pt")
    flow_map = load_flow_map(ADDRESS, **FACTS)
    (cache / "mfm.pt").unlink()
    described = {"name": "imagenet", **flow_map.space.config(), "num_classes": 5, "class_names": []}
    save_model(tmp_path / "model", flow_map, config={"data": described})
    for file in (tmp_path / "model").iterdir():
        put(cache, file.name, lambda blob, file=file: blob.write_bytes(file.read_bytes()))
    with pytest.raises(InputError, match="comes without a classifier"):
        load_classifier(ADDRESS)
    again = load_flow_map(ADDRESS)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in flow_map.state_dict().items())


def test_repositories_without_weights_or_with_several_are_named(cache):
    put(cache, "README.md", lambda blob: blob.write_text("card"))
    with pytest.raises(InputError, match="holds no weights file, expected a model directory or one file .pt"):
        load_flow_map(ADDRESS)
    put_weights(cache, "a.pt")
    put_weights(cache, "b.pt")
    with pytest.raises(InputError, match=r"holds 2 weights files \(a.pt, b.pt\)"):
        model_place(ADDRESS)


def test_damage_in_a_downloaded_file_names_the_file(cache):
    put(cache, "mfm.pt", lambda blob: blob.write_bytes(b"<html>not found</html>"))
    with pytest.raises(InputError, match="mfm.pt: truncated or no file of torch.save"):
        load_flow_map(ADDRESS, **FACTS)
