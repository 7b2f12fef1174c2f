"""From images of any size to what an image encoder sees: resized, cropped or padded, normalised; all differentiable.

The resize is `torch.nn.functional.interpolate(mode="bicubic", antialias=True)`, which torchvision's resize of a tensor
calls. A processor that resizes a PIL image rounds to 8 bits after each of its two passes and clips overshoot there;
values here stay what they are. Sizes and offsets are rounded as torchvision rounds them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mfm_ray.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def three_channels(images: Tensor, *, name: str) -> Tensor:
    """(N, 3, H, W) of (N, 3, H, W), or of grey images (N, 1, H, W), whose channel is repeated. InputError otherwise."""
    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise InputError(f"reward {name}: samples of shape {tuple(images.shape)}, expected (N, 1 or 3, H, W)")
    return images.expand(-1, 3, -1, -1)


def normalised(pixels: Tensor) -> Tensor:
    """(pixels - mean) / std of CLIP, channel by channel; pixels (N, 3, H, W) in [0, 1]."""
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def filled_square(images: Tensor, size: int) -> Tensor:
    """The shorter side brought to `size`, the middle cropped: (N, C, size, size).

    Sizes as torchvision's Resize(size), offsets as its CenterCrop(size).
    """
    height, width = images.shape[-2:]
    short, long = min(height, width), max(height, width)
    other = int(size * long / short)
    new_height, new_width = (size, other) if height <= width else (other, size)
    resized = _resized(images, new_height, new_width)
    top, left = (round((side - size) / 2.0) for side in (new_height, new_width))
    return resized[..., top : top + size, left : left + size]


def padded_square(images: Tensor, size: int) -> Tensor:
    """The longer side brought to `size`, black to either side of the shorter one: (N, C, size, size).

    Sizes and offsets as HPSv2's ResizeMaxSize; a longer side that has `size` already is padded as well.
    """
    height, width = images.shape[-2:]
    scale = size / float(max(height, width))
    new_height, new_width = (max(1, round(side * scale)) for side in (height, width))
    above, before = (size - new_height) // 2, (size - new_width) // 2
    padding = (before, size - new_width - before, above, size - new_height - above)
    return functional.pad(_resized(images, new_height, new_width), padding)


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    if tuple(images.shape[-2:]) == (height, width):
        return images
    # a view with repeated channels has strides that some kernels compute other bits for
    return functional.interpolate(
        images.contiguous(memory_format=torch.contiguous_format), size=(height, width), mode="bicubic", antialias=True
    )
