"""Rows that hold the posterior of an autoencoder instead of one sample: every reading draws afresh."""

from torch import Tensor

from mfm_ray.data_space import DataSpace
from mfm_ray.noise import Noise, Stream

ROW_FORMS = ("sample", "mean_std", "mean_log_variance")
_LOG_VARIANCES = (-30.0, 20.0)  # what the autoencoders' own code limits them to


def check_row_form(form: str, space: DataSpace) -> None:
    """ValueError for a form that does not exist, and for posteriors of data that no autoencoder made."""
    if form not in ROW_FORMS:
        raise ValueError(f"row_form={form!r}: expected one of {', '.join(ROW_FORMS)}")
    if form != "sample" and space.kind != "latent":
        raise ValueError(f"row_form={form!r}: kind={space.kind!r} has no posterior, expected 'sample'")


def row_shape(event_shape: tuple[int, ...], form: str) -> tuple[int, ...]:
    """Shape of a stored row: that of a sample, or with twice the channels, first the means."""
    return event_shape if form == "sample" else (2 * event_shape[0], *event_shape[1:])


def mean_and_std(rows: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Stored posteriors (B, 2C, H, W) as means and standard deviations, (B, C, H, W) each, in data units."""
    mean, spread = rows.chunk(2, dim=1)
    return mean, (spread.clamp(*_LOG_VARIANCES) * 0.5).exp() if form == "mean_log_variance" else spread


def draw(rows: Tensor, form: str, noise: Noise) -> Tensor:
    """Samples (B, *event) in data units of stored rows; the one of row i depends on noise row i alone.

    The law of a data set is that of mean + std * noise: with one fixed noise for each row a model would learn
    the noise as well.
    """
    if form == "sample":
        return rows
    mean, std = mean_and_std(rows, form)
    return mean + std * noise.fold_in(Stream.LATENT).normal(*mean.shape[1:])
