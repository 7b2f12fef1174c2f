import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mfm_ray.data import (
    Dataset,
    Split,
    data_moments,
    digits,
    gmm,
    load_moments,
    load_split,
    read_manifest,
    verify_shards,
    write_shards,
)
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage


def small(num_rows=25):
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(num_rows, 1, 2, 3, generator=generator)
    labels = torch.arange(num_rows) % 3
    return Dataset(
        name="small",
        space=DataSpace(kind="image", event_shape=(1, 2, 3)),
        splits={"train": Split(data[:-5], labels[:-5]), "heldout": Split(data[-5:], labels[-5:])},
        class_names=("a", "b", "c"),
    )


@pytest.fixture
def prepared(tmp_path):
    write_shards(tmp_path / "data", small(), rows_per_file=8)
    return tmp_path / "data"


def refusal(path):
    with pytest.raises(InputError) as caught:
        verify_shards(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def replace_shard(path, table, split="train", index=0):
    """A shard that somebody wrote with another tool, and a manifest that vouches for it."""
    name = sorted(file.name for file in path.glob(f"{split}-*.parquet"))[index]
    pq.write_table(table, path / name)
    digest = hashlib.sha256((path / name).read_bytes()).hexdigest()
    edit_manifest(path, lambda m: m["splits"][split]["files"][index].update(sha256=digest))
    return name


def tensor_table(data, labels):
    return pa.table({"data": pa.FixedShapeTensorArray.from_numpy_ndarray(data.numpy()), "label": labels.numpy()})


@pytest.mark.parametrize("make", [small, digits, lambda: gmm(rows=50, heldout_rows=7)])
def test_round_trip_is_bit_exact(tmp_path, make):
    dataset = make()
    manifest = write_shards(tmp_path / "data", dataset, rows_per_file=20)
    assert manifest == verify_shards(tmp_path / "data")
    assert (manifest.name, manifest.space, manifest.class_names) == (
        dataset.name,
        dataset.space,
        dataset.class_names,
    )
    for name, split in dataset.splits.items():
        loaded = load_split(tmp_path / "data", name)
        assert loaded.data.dtype == torch.float32
        assert torch.equal(loaded.data, split.data)
        assert torch.equal(loaded.labels, split.labels)
        assert manifest.rows(name) == len(split)


def test_round_trip_through_another_filesystem():
    storage = Storage("mock://bucket/data")
    write_shards(storage, small())
    assert torch.equal(load_split(storage, "heldout").data, small().splits["heldout"].data)


def test_any_parquet_reader_understands_the_shards(prepared):
    assert sorted(path.name for path in prepared.iterdir()) == [
        "heldout-00000-of-00001.parquet",
        "manifest.json",
        "moments.safetensors",
        "train-00000-of-00003.parquet",
        "train-00001-of-00003.parquet",
        "train-00002-of-00003.parquet",
    ]
    table = pq.read_table(prepared / "train-00002-of-00003.parquet")
    assert table.schema.field("data").type == pa.fixed_shape_tensor(pa.float32(), (1, 2, 3))
    assert table.num_rows == 4


def test_the_same_data_has_the_same_manifest_and_other_data_another(tmp_path, prepared):
    again = write_shards(tmp_path / "again", small(), rows_per_file=8)
    other = write_shards(tmp_path / "other", small(26), rows_per_file=8)
    assert again.sha256 == read_manifest(prepared).sha256 != other.sha256


def test_description_is_what_a_model_remembers_of_its_data(prepared):
    assert read_manifest(prepared).description() == {
        "name": "small",
        "kind": "image",
        "event_shape": [1, 2, 3],
        "range": [0.0, 1.0],
        "num_classes": 3,
        "class_names": ["a", "b", "c"],
    }


def test_moments_rebuild_the_covariance_in_model_space(prepared):
    moments = load_moments(prepared)
    x = small().splits["train"].data.double().flatten(1) * 2 - 1
    covariance = moments.eigenvectors @ moments.eigenvalues.diag() @ moments.eigenvectors.T
    torch.testing.assert_close(covariance, x.T.cov(correction=0))
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.eigenvectors.T @ moments.eigenvectors, torch.eye(6).double())
    assert (moments.eigenvalues.diff() <= 0).all()
    assert set(moments.preconditioning()) == {"mean", "variances", "basis"}


def test_moments_of_constant_directions_are_zero_not_negative():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0.25
    moments = data_moments(x)
    assert moments.eigenvalues[-1] == 0
    assert moments.eigenvectors.abs()[2, -1] == 1
    with pytest.raises(InputError, match="at least 2 rows"):
        data_moments(x[:1])


def test_preparing_again_replaces_everything(prepared):
    write_shards(prepared, small(12))
    assert verify_shards(prepared).rows("train") == 7
    assert len(list(prepared.glob("*.parquet"))) == 2


def test_an_interrupted_prepare_keeps_the_old_data(prepared, monkeypatch):
    before = read_manifest(prepared).sha256
    monkeypatch.setattr("mfm_ray.data.shards._write_moments", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_shards(prepared, small(12))
    assert verify_shards(prepared).sha256 == before
    assert [path.name for path in prepared.parent.iterdir()] == ["data"]


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="something other than prepared data"):
        write_shards(tmp_path, small())
    with pytest.raises(InputError, match=r"thesis\.tex holds something other"):
        write_shards(tmp_path / "thesis.tex", small())
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.data[3].fill_(float("nan")), "train row 3: NaN or infinity"),
        (lambda s: s.data[4, 0, 1, 1].fill_(float("inf")), "train row 4: NaN or infinity"),
        (lambda s: s.data[5, 0, 0, 0].fill_(1.5), r"train row 5: pixel outside \[0, 1\]"),
        (lambda s: s.labels[6].fill_(3), "train row 6: label 3, expected -1 to 2"),
    ],
)
def test_bad_values_are_refused_by_row_before_anything_is_written(tmp_path, change, reason):
    dataset = small()
    change(dataset.splits["train"])
    with pytest.raises(InputError, match=f"small {reason}"):
        write_shards(tmp_path / "data", dataset)
    assert not (tmp_path / "data").exists()


def test_shapes_that_disagree_and_empty_splits_are_refused(tmp_path):
    dataset = small()
    odd = Dataset("odd", dataset.space, {"train": Split(torch.rand(4, 1, 3, 2), torch.zeros(4).long())}, ("a",))
    with pytest.raises(InputError, match=r"odd train: data of shape \[4, 1, 3, 2\]"):
        write_shards(tmp_path / "data", odd)
    none = Split(torch.rand(0, 1, 2, 3), torch.zeros(0).long())
    with pytest.raises(InputError, match="none train has no rows"):
        write_shards(tmp_path / "data", Dataset("none", dataset.space, {"train": none}, ("a",)))


def test_missing_folder_manifest_split_and_shard_are_named(tmp_path, prepared):
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")
    assert f"{tmp_path}/manifest.json is missing" in refusal(tmp_path)
    with pytest.raises(InputError, match="split=test: small has train, heldout"):
        load_split(prepared, "test")
    (prepared / "train-00001-of-00003.parquet").unlink()
    assert "train-00001-of-00003.parquet is missing" in refusal(prepared)


def test_missing_moments_are_named(prepared):
    (prepared / "moments.safetensors").unlink()
    assert "moments.safetensors is missing" in refusal(prepared)


@pytest.mark.parametrize("name", ["train-00000-of-00003.parquet", "moments.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_altered_files_are_named(prepared, name, damage):
    content = bytearray((prepared / name).read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"flip": content, "truncate": content[:-10], "empty": b""}[damage]
    (prepared / name).write_bytes(damaged)
    assert f"{name} was altered" in refusal(prepared)


def test_swapped_shards_are_named(prepared):
    first, second = (prepared / f"train-0000{i}-of-00003.parquet" for i in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert "train-00000-of-00003.parquet was altered" in refusal(prepared)


def test_foreign_shards_are_named(prepared):
    (prepared / "train-00003-of-00004.parquet").write_bytes(b"from another run")
    assert "train-00003-of-00004.parquet is a foreign file" in refusal(prepared)


def test_remains_of_a_killed_write_are_no_foreign_files(prepared):
    (prepared / ".train-00000-of-00003.parquet.tmp-12ab").write_bytes(b"half")
    verify_shards(prepared)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\x01", '"manifest"'])
def test_a_manifest_that_is_not_one_is_named(prepared, text):
    (prepared / "manifest.json").write_text(text)
    assert "manifest.json" in refusal(prepared)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_schema_versions_are_named(prepared, version):
    edit_manifest(prepared, lambda m: m.update(schema_version=version))
    assert f"schema_version {version}, expected 1: prepare the data again" in refusal(prepared)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.pop("splits"), "no 'splits'"),
        (lambda m: m.pop("name"), "no 'name'"),
        (lambda m: m["splits"].pop("train"), "no train split"),
        (lambda m: m.update(splits=[1]), "not a valid manifest"),
        (lambda m: m.update(kind="audio"), "kind='audio'"),
        (lambda m: m.update(event_shape="abc"), "not a valid manifest"),
        (lambda m: m.update(num_classes=4), "num_classes=4 but 3 class_names"),
        (lambda m: m["splits"]["train"].update(rows=21), "train says 21 rows, its files 20"),
        (lambda m: m["splits"]["train"]["files"][0].update(name="../../etc/passwd"), "wrong name"),
        (lambda m: m["splits"]["train"]["files"][0].update(sha256="abc"), "wrong name, hash"),
        (lambda m: m["splits"]["train"]["files"][0].pop("sha256"), "no 'sha256'"),
    ],
)
def test_manifests_that_contradict_themselves_are_named(prepared, change, reason):
    edit_manifest(prepared, change)
    message = refusal(prepared)
    assert "manifest.json" in message
    assert reason in message


def test_nan_in_a_shard_is_named_with_its_row(prepared):
    split = small().splits["train"]
    data = split.data[:8].clone()
    data[5, 0, 1, 2] = float("nan")
    name = replace_shard(prepared, tensor_table(data, split.labels[:8]))
    assert f"{name} row 5: NaN or infinity" in refusal(prepared)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"pixels": [1.0] * 8}),
        tensor_table(torch.rand(8, 1, 3, 2), torch.zeros(8).long()),
        tensor_table(torch.rand(8, 1, 2, 3).double(), torch.zeros(8).long()),
        tensor_table(torch.rand(8, 1, 2, 3), torch.zeros(8).int()),
    ],
)
def test_shards_of_another_schema_are_named(prepared, table):
    name = replace_shard(prepared, table)
    message = refusal(prepared)
    assert f"{name} has columns" in message
    assert "expected data: extension<arrow.fixed_shape_tensor" in message


def test_other_row_counts_and_empty_cells_are_named(prepared):
    name = replace_shard(prepared, tensor_table(torch.rand(7, 1, 2, 3), torch.zeros(7).long()))
    assert f"{name} has 7 rows" in refusal(prepared)
    whole = tensor_table(torch.rand(8, 1, 2, 3), torch.zeros(8).long())
    holes = whole.set_column(1, "label", pa.array([0] * 7 + [None], pa.int64()))
    replace_shard(prepared, holes)
    assert "empty cells" in refusal(prepared)


def test_a_file_that_is_no_parquet_is_named_even_when_vouched_for(prepared):
    name = "train-00000-of-00003.parquet"
    (prepared / name).write_bytes(b"PAR1 but not really")
    digest = hashlib.sha256((prepared / name).read_bytes()).hexdigest()
    edit_manifest(prepared, lambda m: m["splits"]["train"]["files"][0].update(sha256=digest))
    assert f"{name} is not a Parquet file" in refusal(prepared)


def test_moments_of_other_data_are_named(prepared, tmp_path):
    write_shards(tmp_path / "gmm", gmm(rows=10, heldout_rows=3))
    content = (tmp_path / "gmm" / "moments.safetensors").read_bytes()
    (prepared / "moments.safetensors").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit_manifest(prepared, lambda m: m["moments"].update(sha256=digest))
    assert "moments.safetensors is not of data with event_shape=(1, 2, 3)" in refusal(prepared)
