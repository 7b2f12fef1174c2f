"""Rewards in closed form: no downloads, exact gradients. Likelihood residuals up to the normalising constant."""

import torch
from torch import Tensor

from mfm_ray.errors import InputError
from mfm_ray.rewards.reward import DifferentiableReward, finite_tensor, require_positive

_FLIPPED_DIMENSION = {"horizontal": -1, "vertical": -2}
_HALVES = ("upper", "lower", "left", "right")


class MaskedObservation(DifferentiableReward):
    """Log-likelihood of seeing some entries through Gaussian noise (inpainting):

        r(x) = -|| mask * (x - observed) ||^2 / (2 noise^2).

    observed: (*event) in data units. mask: (*event) of 0 and 1, 1 where observed. noise: standard deviation of one
    entry in data units, above 0.
    """

    observed: Tensor
    mask: Tensor

    def __init__(self, *, observed: Tensor, mask: Tensor, noise: float, name: str = "masked") -> None:
        observed, mask = finite_tensor(observed, name="observed"), finite_tensor(mask, name="mask")
        super().__init__(name=name, event_shape=tuple(observed.shape))
        require_positive(noise=noise)
        if mask.shape != observed.shape:
            raise InputError(f"mask: shape {tuple(mask.shape)}, expected that of observed, {tuple(observed.shape)}")
        if not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any()):
            raise InputError("mask: expected entries 0 and 1 only, with at least one 1")
        self.register_buffer("observed", observed)
        self.register_buffer("mask", mask)
        self.noise = noise

    def log_weight(self, samples: Tensor) -> Tensor:
        residual = self.mask.to(samples) * (samples - self.observed.to(samples))
        return -residual.flatten(1).square().sum(1) / (2 * self.noise**2)


class TargetBrightness(DifferentiableReward):
    """Mean over all entries of a sample, wanted near a target: r(x) = -(mean(x) - target)^2 / (2 scale^2).

    target: mean in data units (images: 0 black to 1 white). scale: standard deviation around it, above 0.
    """

    def __init__(self, *, target: float, scale: float, name: str = "brightness") -> None:
        super().__init__(name=name)
        require_positive(scale=scale)
        self.target, self.scale = float(finite_tensor(target, name="target")), scale

    def log_weight(self, samples: Tensor) -> Tensor:
        return -(samples.flatten(1).mean(1) - self.target).square() / (2 * self.scale**2)


class Symmetry(DifferentiableReward):
    """Mirror symmetry of images: each pair of mirrored pixels differs by Gaussian noise of deviation `scale`,

        r(x) = - sum over pairs (a - b)^2 / (2 scale^2) = -|| x - flip(x) ||^2 / (4 scale^2),

    where the second form counts every pair twice, hence the 4. Pixels on the axis are their own mirror image.

    scale: in data units, above 0. axis: "horizontal" mirrors left and right, "vertical" top and bottom.
    """

    def __init__(self, *, scale: float, axis: str = "horizontal", name: str = "symmetry") -> None:
        super().__init__(name=name)
        require_positive(scale=scale)
        if axis not in _FLIPPED_DIMENSION:
            raise InputError(f"axis={axis!r}: expected one of {', '.join(_FLIPPED_DIMENSION)}")
        self.scale, self.axis = scale, axis

    def log_weight(self, samples: Tensor) -> Tensor:
        if samples.dim() != 4:
            raise InputError(f"reward {self.name}: samples of shape {tuple(samples.shape)}, expected (N, C, H, W)")
        residual = samples - samples.flip(_FLIPPED_DIMENSION[self.axis])
        return -residual.flatten(1).square().sum(1) / (4 * self.scale**2)


class LinearGaussian(DifferentiableReward):
    """Log-likelihood of one noisy linear measurement: r(x) = -(direction . x - observation)^2 / (2 noise^2).

    direction: (*event), not all 0. observation: a number. noise: its standard deviation, above 0. With a Gaussian
    mixture prior the tilted law is a mixture again (`networks/gaussian.py`).
    """

    direction: Tensor

    def __init__(self, *, direction: Tensor, observation: float, noise: float, name: str = "linear_gaussian") -> None:
        direction = finite_tensor(direction, name="direction")
        super().__init__(name=name, event_shape=tuple(direction.shape))
        require_positive(noise=noise)
        if direction.dim() == 0 or not bool(direction.any()):
            raise InputError("direction: expected the shape of one sample, with at least one entry that is not 0")
        self.register_buffer("direction", direction)
        self.observation, self.noise = float(finite_tensor(observation, name="observation")), noise

    def log_weight(self, samples: Tensor) -> Tensor:
        # elementwise product and sum: unlike a matrix product it gives a row the same bits in every batch
        projection = (samples * self.direction.to(samples)).flatten(1).sum(1)
        return -(projection - self.observation).square() / (2 * self.noise**2)


def half_mask(event_shape: tuple[int, ...], half: str = "upper") -> Tensor:
    """Mask (C, H, W) that is 1 on one half of the image; of an odd number of lines the middle one is 0."""
    if half not in _HALVES:
        raise InputError(f"half={half!r}: expected one of {', '.join(_HALVES)}")
    if len(event_shape) != 3:
        raise InputError(f"event_shape={tuple(event_shape)}: expected an image's (channels, height, width)")
    mask = torch.zeros(event_shape)
    dim = 1 if half in ("upper", "lower") else 2
    size, count = event_shape[dim], event_shape[dim] // 2
    mask.narrow(dim, 0 if half in ("upper", "left") else size - count, count).fill_(1.0)
    return mask
