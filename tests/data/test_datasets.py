import gzip
import struct

import numpy as np
import pytest
import torch

from mfm_ray.data.datasets import GMM_MEANS, digits, gmm, mnist
from mfm_ray.errors import InputError


def idx(array, *, magic=None):
    magic = {3: 0x803, 1: 0x801}[array.ndim] if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()


def images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 28, 28))


def labels(count):
    return np.arange(count) % 10


@pytest.fixture
def folder(tmp_path):
    """A small but whole MNIST test split."""
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images(20))))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels(20))))
    return tmp_path


def refusal(folder):
    with pytest.raises(InputError) as caught:
        mnist(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_are_all_there_and_stratified():
    dataset = digits()
    train, heldout = dataset.splits["train"], dataset.splits["heldout"]
    assert len(train) + len(heldout) == 1797
    assert 190 <= len(heldout) <= 210
    assert train.data.shape[1:] == heldout.data.shape[1:] == dataset.space.event_shape == (1, 8, 8)
    assert train.data.min() == 0
    assert train.data.max() == 1
    assert heldout.labels.bincount().min() >= 19
    assert dataset.num_classes == 10


def test_digits_split_is_the_same_every_time_and_disjoint():
    first, second = digits(), digits()
    assert torch.equal(first.splits["heldout"].data, second.splits["heldout"].data)
    train = {row.numpy().tobytes() for row in first.splits["train"].data}
    assert not train & {row.numpy().tobytes() for row in first.splits["heldout"].data}


def test_gmm_has_the_stated_moments():
    data = gmm(rows=60_000, heldout_rows=100, seed=1).splits["train"].data
    centres = torch.tensor(GMM_MEANS)
    nearest = torch.cdist(data, centres).argmin(1)
    for component, centre in enumerate(centres):
        own = data[nearest == component]
        assert abs(len(own) / len(data) - 1 / 3) < 0.01
        assert (own.mean(0) - centre).abs().max() < 0.03
        assert (own.T.cov() - 0.5 * torch.eye(2)).abs().max() < 0.03


def test_gmm_is_a_function_of_its_seed():
    once, again, other = (gmm(rows=10, heldout_rows=5, seed=seed).splits for seed in (0, 0, 1))
    assert torch.equal(once["train"].data, again["train"].data)
    assert not torch.equal(once["train"].data, other["train"].data)
    assert len(once["heldout"]) == 5
    assert (once["train"].labels == -1).all()
    with pytest.raises(InputError, match="rows=0"):
        gmm(rows=0)


def test_mnist_test_split_alone_is_cut_at_nine_tenths(folder):
    splits = mnist(folder).splits
    assert len(splits["train"]) == 18
    assert splits["heldout"].labels.tolist() == [8, 9]
    np.testing.assert_allclose(splits["train"].data[0, 0].numpy() * 255, images(20)[0], atol=1e-4)


def test_mnist_with_both_splits_keeps_them(folder):
    (folder / "train-images.idx3-ubyte").write_bytes(idx(images(30)))
    (folder / "train-labels.idx1-ubyte").write_bytes(idx(labels(30)))
    splits = mnist(f"file://{folder}").splits
    assert len(splits["train"]) == 30
    assert len(splits["heldout"]) == 20


def test_plain_and_gzipped_files_hold_the_same(folder, tmp_path_factory):
    plain = tmp_path_factory.mktemp("plain")
    for path in folder.iterdir():
        (plain / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    assert torch.equal(mnist(plain).splits["train"].data, mnist(folder).splits["train"].data)


def test_missing_empty_and_foreign_folders(tmp_path):
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")
    assert "is empty" in refusal(tmp_path)
    (tmp_path / "holiday.jpg").write_bytes(b"jpg")
    assert "holds no MNIST file" in refusal(tmp_path)
    assert "holiday.jpg is not a folder" in refusal(tmp_path / "holiday.jpg")


@pytest.mark.parametrize("part", ["images-idx3", "labels-idx1"])
def test_a_missing_partner_is_named(folder, part):
    (folder / f"t10k-{part}-ubyte.gz").unlink()
    assert f"t10k-{part}-ubyte (or .gz) is missing" in refusal(folder)


@pytest.mark.parametrize("keep", [2, 5, 12, 200, -1])
def test_truncated_gzip_is_named(folder, keep):
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(folder)
    assert path.name in message
    assert "truncated" in message


def test_damaged_gzip_is_named(folder):
    path = folder / "t10k-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert f"{path.name} is " in refusal(folder)


def test_a_file_that_only_claims_to_be_gzipped_is_named(folder):
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(b"<html>404</html>")
    assert "t10k-images-idx3-ubyte.gz is not gzipped" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\x00\x00\x08", "truncated: 3 bytes"),
        (idx(images(20))[:-1], "truncated: 15679 bytes of data, its header says 15680"),
        (idx(images(20)) + b"\x00", "1 bytes more than its header says"),
        (idx(images(20), magic=0x0D03), "magic number 0x00000d03, expected 0x00000803"),
        (idx(labels(9_000)), "magic number 0x00000801, expected 0x00000803"),
        (idx(images(0)), r"holds no data: dimensions \[0, 28, 28\]"),
        (idx(np.zeros((20, 8, 8))), r"images of \(8, 8\) pixels, expected \(28, 28\)"),
        (idx(images(19)), "holds 19 images but t10k-labels-idx1-ubyte.gz 20 labels"),
        (struct.pack(">4I", 0x803, 2**31, 2**31, 2**31), "truncated: 0 bytes of data"),
    ],
)
def test_damaged_image_files_are_named_with_the_reason(folder, content, reason):
    (folder / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(InputError, match=rf"t10k-images-idx3-ubyte .*{reason}"):
        mnist(folder)


def test_labels_beyond_nine_are_named_with_their_row(folder):
    wrong = labels(20)
    wrong[7] = 11
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(wrong))
    assert "t10k-labels-idx1-ubyte row 7: label 11" in refusal(folder)


def test_too_few_images_to_hold_any_out(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images(9)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels(9)))
    assert "holds 9 images, expected at least 10" in refusal(tmp_path)
