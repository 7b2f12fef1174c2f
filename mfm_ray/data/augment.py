"""Random affine jitter of training images: small data sets are memorised without it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_ray.noise import Noise, Stream


@dataclass(frozen=True)
class AffineJitter:
    """Turns, scales and moves images a little; what is learned is the law of jittered images.

    With 1,600 digits an unjittered model soon draws its training set again, and the reward gradient through its
    posterior draws gets worse with every further step; docs/networks.md has the figures.

    rate: share of the images that are changed, in [0, 1]. rotation: largest angle, radians. scale: largest relative
    change of size. shift: largest move, in widths of the image. All but rate are uniform around no change.
    """

    rate: float
    rotation: float
    scale: float
    shift: float

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Images (B, C, H, W) in data units, black where nothing was; image i depends on noise row i alone."""
        if self.rate == 0:
            return images
        angle, size, right, down = (
            (2 * noise.fold_in(Stream.AUGMENT).fold_in(i).uniform() - 1) * reach
            for i, reach in enumerate((self.rotation, self.scale, 2 * self.shift, 2 * self.shift), start=1)
        )
        cos, sin = (1 + size) * torch.cos(angle), (1 + size) * torch.sin(angle)
        transform = torch.stack([torch.stack([cos, -sin, right], -1), torch.stack([sin, cos, down], -1)], -2)
        grid = torch.nn.functional.affine_grid(transform, list(images.shape), align_corners=False)
        moved = torch.nn.functional.grid_sample(images, grid, align_corners=False)
        changed = noise.fold_in(Stream.AUGMENT).fold_in(5).uniform() < self.rate
        return torch.where(changed.reshape(-1, 1, 1, 1), moved, images)
