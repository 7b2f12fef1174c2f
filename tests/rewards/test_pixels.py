"""What an image encoder sees: sizes, offsets and bars against cases made by hand, and the processors' own pictures."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from mfm_ray.errors import InputError
from mfm_ray.rewards.pixels import CLIP_MEAN, CLIP_STD, filled_square, normalised, padded_square, three_channels


def bicubic(images, height, width):
    return functional.interpolate(images, size=(height, width), mode="bicubic", antialias=True)


@pytest.mark.parametrize(
    ("height", "width", "resized", "top", "left"),
    [
        (448, 448, (224, 224), 0, 0),
        (256, 512, (224, 448), 0, 112),
        (512, 256, (448, 224), 112, 0),
        (300, 200, (336, 224), 56, 0),
        (200, 301, (224, 337), 0, 56),  # 337.12 is cut to 337; 56.5 is rounded to the even 56
        (200, 303, (224, 339), 0, 58),  # 57.5 to the even 58
        (64, 64, (224, 224), 0, 0),
        (8, 16, (224, 448), 0, 112),
    ],
)
def test_the_middle_of_the_image_after_its_short_side_has_the_size(height, width, resized, top, left):
    images = torch.rand(2, 3, height, width)
    expected = bicubic(images, *resized)[..., top : top + 224, left : left + 224]
    assert torch.equal(filled_square(images, 224), expected)


@pytest.mark.parametrize(
    ("height", "width", "resized", "above", "before"),
    [
        (448, 448, (224, 224), 0, 0),
        (256, 512, (112, 224), 56, 0),
        (512, 256, (224, 112), 0, 56),
        (100, 223, (100, 224), 62, 0),  # 100.448 is rounded to 100
        (301, 200, (224, 149), 0, 37),  # 75 columns of bars: 37 before, 38 after
        (8, 4, (224, 112), 0, 56),
        (224, 100, (224, 100), 0, 62),  # nothing to resize, bars all the same
        (1000, 1, (224, 1), 0, 111),
    ],
)
def test_the_whole_image_between_black_bars(height, width, resized, above, before):
    images = torch.rand(2, 3, height, width) + 0.1
    expected = torch.zeros(2, 3, 224, 224)
    inner = images if (height, width) == resized else bicubic(images, *resized)
    expected[..., above : above + resized[0], before : before + resized[1]] = inner
    assert torch.equal(padded_square(images, 224), expected)


def test_bars_are_black_before_normalisation():
    bars = normalised(padded_square(torch.ones(1, 3, 10, 20), 224))[0, :, 0, 0]
    torch.testing.assert_close(bars, -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD))


def test_an_image_of_the_size_is_not_touched():
    image = torch.rand(1, 3, 224, 224)
    assert torch.equal(filled_square(image, 224), image)
    assert torch.equal(padded_square(image, 224), image)


def test_grey_images_become_grey_in_three_channels_and_other_shapes_are_refused():
    grey = torch.rand(2, 1, 5, 7)
    assert torch.equal(three_channels(grey, name="r"), torch.cat([grey, grey, grey], dim=1))
    for shape in ((2, 2, 5, 5), (2, 4, 5, 5), (3, 5, 5), (2, 3, 0, 5)):
        with pytest.raises(InputError, match=r"^reward r: samples of shape .*, expected \(N, 1 or 3, H, W\)$"):
            three_channels(torch.rand(shape), name="r")


@pytest.mark.parametrize("prepare", [filled_square, padded_square])
@pytest.mark.parametrize("shape", [(2, 3, 9, 13), (1, 3, 40, 21)])
def test_gradients_by_finite_differences_also_outside_of_the_range(prepare, shape):
    images = (torch.rand(shape, dtype=torch.float64) * 2 - 0.5).requires_grad_()
    torch.autograd.gradcheck(lambda inner: normalised(prepare(inner, 16)), images, fast_mode=True)


@pytest.mark.parametrize("size", [(256, 256), (300, 231), (64, 64), (8, 8), (50, 40)])
def test_the_picture_of_transformers_processor_differs_by_its_rounding_to_eight_bits_alone(size):
    """CLIPImageProcessor resizes a PIL image: 8 bits after each pass, overshoot clipped. Away from that it is ours,

    where the margins to crop are even: of an odd one it cuts the smaller half before, torchvision the even number.
    """
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    height, width = size
    # between 0.2 and 0.8, so that sharpening never leaves the range and nothing is clipped
    y, x = torch.linspace(0, 1, height).view(-1, 1), torch.linspace(0, 1, width).view(1, -1)
    waves = torch.stack([torch.sin(6 * k * x + 4 * y) * 0.3 + 0.5 for k in (1, 2, 3)])
    picture = (waves * 255).round().byte()
    processor = CLIPImageProcessorPil()
    theirs = processor(Image.fromarray(np.asarray(picture.permute(1, 2, 0))), return_tensors="pt")["pixel_values"]
    ours = normalised(filled_square(picture[None].float() / 255, 224))
    worst = ((theirs - ours) * torch.tensor(CLIP_STD).view(3, 1, 1)).abs().max()
    assert worst <= 1.5 / 255  # half a step after each of two passes, and as much again where the two add up
