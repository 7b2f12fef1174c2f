"""Mean and principal axes of a data set: what the networks' Gaussian preconditioning matches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_ray.errors import InputError


@dataclass(frozen=True)
class Moments:
    """First two moments in model space, float64: covariance = eigenvectors diag(eigenvalues) eigenvectors^T.

    mean: (D,). eigenvalues: (D,), descending, >= 0 (0 along directions in which the data never varies).
    eigenvectors: (D, D), orthogonal, columns are principal directions.
    """

    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def preconditioning(self) -> dict[str, Tensor]:
        """The moments under the names that `networks.build_network(moments=...)` takes."""
        return {"mean": self.mean, "variances": self.eigenvalues, "basis": self.eigenvectors}


def data_moments(x_flat: Tensor, *, noise_variances: Tensor | None = None) -> Moments:
    """Moments of the rows of x_flat (N, D), in float64, with the 1/N covariance.

    noise_variances: (D,), mean variances of independent noise that every reading of a row adds, 0 when omitted.
    The sign of each eigenvector, which the equation leaves open, is fixed: its largest entry is positive.
    """
    if x_flat.dim() != 2 or x_flat.shape[0] < 2:
        raise InputError(f"moments need at least 2 rows (N, D), got a tensor of shape {list(x_flat.shape)}")
    x = x_flat.double()
    mean = x.mean(dim=0)
    centred = x - mean
    covariance = centred.T @ centred / len(x)
    if noise_variances is not None:
        covariance.diagonal().add_(noise_variances)
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    eigenvalues, eigenvectors = eigenvalues.flip(0).clamp_min(0.0), eigenvectors.flip(1)
    largest = eigenvectors.gather(0, eigenvectors.abs().argmax(dim=0, keepdim=True))
    return Moments(mean=mean, eigenvalues=eigenvalues, eigenvectors=(eigenvectors * largest.sign()).contiguous())
