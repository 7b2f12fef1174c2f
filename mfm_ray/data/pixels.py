"""Image files as pixels: shorter side resized, centre cropped, every mode and kind of damage dealt with explicitly.

    resize:  shorter side -> image_size, the other one -> floor(image_size * long / short)
    crop:    the central image_size x image_size, offset round((side - image_size) / 2)

That is torchvision's `transforms.Resize(image_size)` and `CenterCrop` on PIL images, as in the official code that made
the paper's latents: bilinear with antialias, which is the default here for that reason.
No file is fatal: whatever cannot be used raises `DamagedImage` with the reason in one line. Too little memory is no
damage: MemoryError is left as it is.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

from mfm_ray.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is opened at all: PIL knows formats that start other programs. JPEG includes a camera's MPO, which has no opener
of its own: naming it here is a KeyError for whatever is no JPEG."""
MOST_PIXELS = 89_478_485
"""PIL's own threshold for a decompression bomb; also the most that an image may have after its resize."""


class DamagedImage(ValueError):
    """An image that cannot be used; the message is the reason, one line."""


def check_pillow() -> None:
    """InputError where Pillow is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise InputError("data=images needs Pillow: pip install 'mfm_ray[rewards]'") from error


def read_pixels(content: bytes, image_size: int, *, interpolation: str = "bilinear") -> np.ndarray:
    """The central square of an encoded image, (image_size, image_size, 3) uint8 RGB.

    EXIF orientation is applied. Transparent parts become white, grey and palette images RGB, CMYK is converted, 16 bits
    are brought to 8 by their high byte, of an animation the first frame is taken. `DamagedImage` for all else.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not content:
        raise DamagedImage("empty file")
    Image.init()  # PIL knows the most common formats alone before it
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            width, height = opened.size
            _check_size(width, height, image_size)
            ImageOps.exif_transpose(opened, in_place=True)  # a copy of every picture less
            return _square(_rgb(opened), image_size, Image.Resampling[interpolation.upper()])
    except DamagedImage:
        raise
    except UnidentifiedImageError as error:
        raise DamagedImage("not an image of a known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DamagedImage(f"decompression bomb: more than {MOST_PIXELS:,} pixels") from error
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError) as error:
        raise DamagedImage(f"damaged: {_one_line(error)}") from error  # what PIL's readers raise for broken files
    except (struct.error, zlib.error, OverflowError, AttributeError, ZeroDivisionError) as error:
        raise DamagedImage(f"damaged: {_one_line(error)}") from error


def _check_size(width: int, height: int, image_size: int) -> None:
    if width < 1 or height < 1:
        raise DamagedImage(f"{width} x {height} pixels")
    if width * height > MOST_PIXELS:
        raise DamagedImage(f"decompression bomb: {width} x {height} is more than {MOST_PIXELS:,} pixels")
    if image_size**2 * (max(width, height) / min(width, height)) > MOST_PIXELS:
        raise DamagedImage(f"{width} x {height} pixels: too long and narrow to be brought to {image_size}")


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):
        return _eight_bits(np.asarray(image)).convert("RGB")
    if image.mode == "F":
        raise DamagedImage("floating-point pixels, whose range is not known")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(values: np.ndarray) -> Image.Image:
    """Grey levels of 16 bits as 8; a 32-bit image must hold no more than 16 bits."""
    from PIL import Image

    if values.min() < 0 or values.max() > 0xFFFF:
        raise DamagedImage("grey levels beyond 16 bits, whose range is not known")
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def _square(image: Image.Image, size: int, resampling: Image.Resampling) -> np.ndarray:
    width, height = image.size
    if width <= height:
        wide, high = size, int(size * height / width)
    else:
        wide, high = int(size * width / height), size
    if (wide, high) != (width, height):
        image = image.resize((wide, high), resampling)
    left, top = round((wide - size) / 2.0), round((high - size) / 2.0)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
