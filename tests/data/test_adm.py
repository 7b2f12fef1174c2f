"""ADM's .npz batches: numpy reads what we write, we read what numpy writes, and damage is refused by its name."""

import zipfile

import numpy as np
import pytest
import torch

from mfm_ray.data.adm import AdmBatch, write_adm_batch
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)


def moments(dim=6):
    rows = np.random.default_rng(1).normal(size=(40, dim))
    return {"mu": rows.mean(0), "sigma": np.cov(rows.T), "mu_s": rows.mean(0)[:2], "sigma_s": np.cov(rows.T)[:2, :2]}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_parts_of_what_numpy_writes(tmp_path, pixels, save):
    save(tmp_path / "ref.npz", arr_0=pixels, **moments())
    batch = AdmBatch(str(tmp_path / "ref.npz"))
    batch.verify()
    assert (batch.num_images, batch.image_shape, batch.has_moments) == (7, (3, 5, 4), True)
    parts = torch.cat([batch.images(0, 3), batch.images(3, 4)])
    assert torch.equal((parts * 255).round().to(torch.uint8), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    found = batch.moments()
    assert found.count is None
    np.testing.assert_array_equal(found.mean.numpy(), moments()["mu"])
    np.testing.assert_array_equal(found.covariance.numpy(), moments()["sigma"])


def test_a_uri_and_float32_moments(tmp_path, pixels):
    np.savez(tmp_path / "ref.npz", **{name: values.astype(np.float32) for name, values in moments().items()})
    batch = AdmBatch(f"file://{tmp_path}/ref.npz")
    assert batch.num_images == 0 and batch.moments().mean.dtype == torch.float64
    with pytest.raises(InputError, match="moments alone"):
        batch.image_shape  # noqa: B018


def test_numpy_reads_what_we_write(tmp_path, pixels):
    rows = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    write_adm_batch(Storage(tmp_path), "ours.npz", rows.split(3), count=7)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], pixels)
    assert torch.equal(AdmBatch(str(tmp_path / "ours.npz")).images(2, 5) * 255, rows[2:].float())


def test_grey_pictures_get_three_channels_and_the_count_holds(tmp_path):
    grey = torch.arange(18, dtype=torch.uint8).reshape(2, 1, 3, 3)
    write_adm_batch(Storage(tmp_path), "grey.npz", [grey], count=2)
    assert torch.equal(AdmBatch(str(tmp_path / "grey.npz")).images(0, 2) * 255, grey.expand(-1, 3, -1, -1).float())
    with pytest.raises(ValueError, match="2 pictures, 3 were announced"):
        write_adm_batch(Storage(tmp_path), "few.npz", [grey], count=3)


def test_a_flipped_bit_is_found_by_its_array(tmp_path):
    pixels = np.random.default_rng(2).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "ref.npz", arr_0=pixels, **moments())
    content = bytearray((tmp_path / "ref.npz").read_bytes())
    place = bytes(content).index(pixels.tobytes()) + 100_000
    content[place] ^= 1
    (tmp_path / "ref.npz").write_bytes(content)
    with pytest.raises(InputError, match="arr_0 is damaged"):
        AdmBatch(str(tmp_path / "ref.npz")).verify()


def test_a_truncated_file_is_refused(tmp_path, pixels):
    np.savez(tmp_path / "ref.npz", arr_0=pixels)
    content = (tmp_path / "ref.npz").read_bytes()
    (tmp_path / "ref.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="no whole .npz file"):
        AdmBatch(str(tmp_path / "ref.npz"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.array([{"a": 1}], dtype=object)}, "arr_0 holds pickled Python objects"),
        ({"arr_1": np.zeros(3)}, "neither arr_0 nor mu and sigma"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "expected uint8"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)[..., :2]}, "expected uint8"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 2))}, "expected numbers .D,., .D, D."),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "mu": np.zeros(3)}, "mu without its sigma"),
    ],
)
def test_what_is_no_batch_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(InputError, match=message):
        AdmBatch(str(tmp_path / "ref.npz"))


def test_headers_that_lie_are_refused(tmp_path, pixels):
    np.save(tmp_path / "a.npy", pixels)
    content = (tmp_path / "a.npy").read_bytes()
    for damaged, message in ((content[:-5], "bytes long"), (b"hello" * 40, "no readable header")):
        with zipfile.ZipFile(tmp_path / "ref.npz", "w") as archive:
            archive.writestr("arr_0.npy", damaged)
        with pytest.raises(InputError, match=message):
            AdmBatch(str(tmp_path / "ref.npz"))


def test_nan_moments_and_a_missing_file_are_refused(tmp_path):
    broken = moments()
    broken["mu"][0] = np.nan
    np.savez(tmp_path / "ref.npz", **broken)
    with pytest.raises(InputError, match="mu holds NaN"):
        AdmBatch(str(tmp_path / "ref.npz")).moments()
    with pytest.raises(InputError, match="reference=.*none.npz does not exist"):
        AdmBatch(str(tmp_path / "none.npz"))
