"""Small images as PNG bytes and as `<img>` elements that a browser enlarges without blurring."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import torch
from matplotlib import image as matplotlib_image
from torch import Tensor


def pixels(image: Tensor, *, visible: Tensor | None = None) -> np.ndarray:
    """An image (C, H, W) in [0, 1] with 1 or 3 channels as (H, W, 4) bytes; transparent where `visible` is 0."""
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image of shape {tuple(image.shape)}: expected (1 or 3, height, width)")
    colour = image.detach().cpu().float().clamp(0, 1).expand(3, *image.shape[1:])
    alpha = torch.ones_like(colour[:1]) if visible is None else visible[:1].float()
    return (torch.cat([colour, alpha]).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def png(array: np.ndarray) -> bytes:
    """PNG of bytes (H, W, 4)."""
    buffer = io.BytesIO()
    matplotlib_image.imsave(buffer, array, format="png", metadata={"Software": "mfm-ray"})
    return buffer.getvalue()


def grid(images: Tensor, *, columns: int | None = None, gap: int = 1, zoom: int = 1) -> np.ndarray:
    """Images (N, C, H, W) in rows as (H', W', 4) bytes, each pixel `zoom` wide, transparent gaps between them."""
    count, _, height, width = images.shape
    columns = columns or max(1, math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    tall, wide = height * zoom + gap, width * zoom + gap
    canvas = np.zeros((rows * tall - gap, columns * wide - gap, 4), dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = tall * (index // columns), wide * (index % columns)
        enlarged = np.kron(pixels(image), np.ones((zoom, zoom, 1), dtype=np.uint8))
        canvas[top : top + height * zoom, left : left + width * zoom] = enlarged
    return canvas


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
