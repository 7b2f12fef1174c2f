"""Stored posteriors: fresh, keyed noise at every reading, moments of what is drawn, refusals by name."""

import json

import pytest
import torch

from mfm_ray.data import Dataset, Split, load_moments, load_split, read_manifest, verify_shards, write_shards
from mfm_ray.data.latents import draw, mean_and_std, row_shape
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.noise import KeyedNoise

SPACE = DataSpace(kind="latent", event_shape=(2, 1, 3), scale=0.5)


def posteriors(num_rows=400, row_form="mean_std"):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(num_rows, 2, 1, 3, generator=generator) * 3 + 1
    std = torch.rand(num_rows, 2, 1, 3, generator=generator) + 0.1
    spread = 2 * std.log() if row_form == "mean_log_variance" else std
    rows = torch.cat([mean, spread], dim=1)
    return Dataset("posteriors", SPACE, {"train": Split(rows, torch.full((num_rows,), -1))}, row_form=row_form)


def noise_of(rows, step):
    return KeyedNoise.for_rows(7, torch.arange(rows)).fold_in(step)


@pytest.mark.parametrize("row_form", ["mean_std", "mean_log_variance"])
def test_a_drawn_latent_has_the_stored_mean_and_spread(row_form):
    """4,000 draws of one row: mean and standard deviation within five standard errors."""
    row = posteriors(1, row_form).splits["train"].data
    mean, std = mean_and_std(row, row_form)
    drawn = draw(row.expand(4000, -1, -1, -1), row_form, noise_of(4000, 0))
    assert drawn.shape == (4000, 2, 1, 3)
    assert ((drawn.mean(0) - mean[0]).abs() < 5 * std[0] / 4000**0.5).all()
    assert ((drawn.std(0) / std[0] - 1).abs() < 5 / 8000**0.5).all()


def test_both_forms_of_the_same_posterior_draw_the_same():
    a, b = (posteriors(20, form).splits["train"].data for form in ("mean_std", "mean_log_variance"))
    torch.testing.assert_close(
        draw(a, "mean_std", noise_of(20, 3)), draw(b, "mean_log_variance", noise_of(20, 3)), rtol=1e-5, atol=1e-5
    )


def test_draws_are_fresh_at_every_step_and_the_same_for_the_same_key():
    rows = posteriors(20).splits["train"].data
    first, again, later = (draw(rows, "mean_std", noise_of(20, step)) for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not (first == later).any()
    part = draw(rows[5:9], "mean_std", KeyedNoise(noise_of(20, 0).keys[5:9]))
    assert torch.equal(part, first[5:9])


def test_samples_are_read_as_they_are():
    x = torch.randn(4, 2, 1, 3)
    assert draw(x, "sample", noise_of(4, 0)) is x


def test_a_log_variance_beyond_what_autoencoders_allow_is_limited():
    row = torch.cat([torch.zeros(1, 2, 1, 3), torch.full((1, 2, 1, 3), 200.0)], dim=1)
    assert mean_and_std(row, "mean_log_variance")[1].isfinite().all()


def test_moments_are_those_of_the_drawn_latents_in_model_space(tmp_path):
    """Means and covariance of 200 draws of each of 400 rows; 2 percent of the variances."""
    dataset = posteriors()
    write_shards(tmp_path / "data", dataset)
    moments = load_moments(tmp_path / "data")
    rows = dataset.splits["train"].data.repeat(200, 1, 1, 1)
    drawn = SPACE.to_model_space(draw(rows, "mean_std", noise_of(len(rows), 0))).flatten(1).double()
    torch.testing.assert_close(moments.mean, drawn.mean(0), rtol=0, atol=0.01)
    covariance = moments.eigenvectors @ moments.eigenvalues.diag() @ moments.eigenvectors.T
    scale = covariance.diagonal().mean()
    assert (covariance - drawn.T.cov(correction=0)).abs().max() < 0.02 * scale


@pytest.mark.parametrize("row_form", ["mean_std", "mean_log_variance"])
def test_the_manifest_says_what_the_rows_are(tmp_path, row_form):
    dataset = posteriors(30, row_form)
    manifest = write_shards(tmp_path / "data", dataset, rows_per_file=8)
    assert manifest == verify_shards(tmp_path / "data")
    assert (manifest.row_form, manifest.row_shape, manifest.space) == (row_form, (4, 1, 3), SPACE)
    assert torch.equal(load_split(tmp_path / "data", "train").data, dataset.splits["train"].data)
    assert manifest.description()["scale"] == 0.5
    assert row_shape((4, 32, 32), row_form) == (8, 32, 32)


def edit(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_form": "moments"}, "manifest.json is not a valid manifest: row_form='moments': expected one of sample"),
        ({"row_form": "sample"}, r"train-00000-of-00001.parquet has columns .*shape=\[4,1,3\].* expected .*\[2,1,3\]"),
        ({"event_shape": [4, 1, 3]}, r"train-00000-of-00001.parquet has columns .*expected .*shape=\[8,1,3\]"),
        ({"scale": -1}, "manifest.json is not a valid manifest: scale=-1"),
        ({"kind": "image", "scale": 1}, "row_form='mean_std': kind='image' has no posterior"),
    ],
)
def test_a_manifest_that_does_not_fit_the_rows_is_named_in_one_line(tmp_path, changes, message):
    write_shards(tmp_path / "data", posteriors(20))
    edit(tmp_path / "data", **changes)
    with pytest.raises(InputError, match=message) as caught:
        verify_shards(tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_a_negative_standard_deviation_is_refused_by_row(tmp_path):
    dataset = posteriors(20)
    dataset.splits["train"].data[6, 3] = -0.5
    with pytest.raises(InputError, match=r"posteriors train row 6: negative standard deviation"):
        write_shards(tmp_path / "data", dataset)


def test_altered_rows_are_refused_by_their_hash(tmp_path):
    write_shards(tmp_path / "data", posteriors(20))
    file = next((tmp_path / "data").glob("*.parquet"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file.name} was altered"):
        verify_shards(tmp_path / "data")


def test_only_latents_have_posteriors(tmp_path):
    images = Dataset("x", DataSpace("image", (1, 2, 2)), posteriors(4).splits, row_form="mean_std")
    with pytest.raises(ValueError, match="row_form='mean_std': kind='image'"):
        write_shards(tmp_path / "data", images)
    assert not (tmp_path / "data").exists()


def test_data_of_samples_does_not_mention_a_form(tmp_path):
    latents = Dataset("z", SPACE, {"train": Split(torch.randn(8, 2, 1, 3), torch.full((8,), -1))})
    write_shards(tmp_path / "data", latents)
    assert "row_form" not in json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert read_manifest(tmp_path / "data").row_form == "sample"
