"""Images in data units as PNG in base64, and back."""

from __future__ import annotations

import base64
import binascii
import io
import warnings

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

_MODES = {1: "L", 3: "RGB"}


def encode_png(image: Tensor) -> str:
    """An image (C, H, W) in [0, 1] of 1 or 3 channels as base64 of a PNG of 8 bits."""
    levels = (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decode_png(text: str, *, event_shape: tuple[int, ...], max_pixels: int) -> Tensor:
    """The image (C, H, W) in [0, 1] of base64 of a PNG. ValueError saying what is wrong with it.

    Nothing is decoded before its size is known to be the one expected.
    """
    channels, height, width = event_shape
    text = text.partition(",")[2] if text.startswith("data:image/png;base64,") else text
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("no base64; expected a PNG in base64") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=["PNG"])
            if picture.width * picture.height > max_pixels:
                raise ValueError(f"{picture.width}x{picture.height} pixels; expected at most {max_pixels} in all")
            if (picture.width, picture.height) != (width, height):
                raise ValueError(f"{picture.width}x{picture.height} pixels; expected {width}x{height}")
            array = np.asarray(picture.convert(_MODES[channels]))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError("no PNG, or a damaged one; expected a PNG in base64") from error
    return (
        torch.from_numpy(array.reshape(height, width, channels).astype(np.float32) / 255).permute(2, 0, 1).contiguous()
    )


def decode_mask(text: str, *, event_shape: tuple[int, ...], max_pixels: int) -> Tensor:
    """The mask (C, H, W) that is 1 where a picture, of the image's size, is white. ValueError as `decode_png` has it,
    and for a picture without a white pixel."""
    picture = decode_png(text, event_shape=(1, *event_shape[1:]), max_pixels=max_pixels)
    mask = (picture > 0.5).float()
    if not bool(mask.any()):
        raise ValueError("no pixel is white; expected the pixels that are seen in white, at least one")
    return mask.expand(event_shape).contiguous()
