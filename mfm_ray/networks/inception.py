"""The Inception network of FID: TensorFlow's of 2015-12-05, in the parameter layout of torch-fidelity's port.

Not torchvision's Inception v3: it has 1,008 logits, leaves padding out of its averages, takes the maximum in its last
pooling branch, and resizes as TensorFlow 1 did. Figures are only comparable with this one. Weights:
`pt_inception-2015-12-05-6726825d.pth` (pytorch-fid's and torch-fidelity's file, under either of its names).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfm_ray.errors import InputError
from mfm_ray.hub import is_hub, local_folder

SIDE, NUM_FEATURES, NUM_SPATIAL = 299, 2048, 2023
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
_NAMES = (WEIGHTS, f"weights-{WEIGHTS.removeprefix('pt_')}")
_SPATIAL_CHANNELS = 7  # 7 x 17 x 17 numbers: about as many as there are pooled features
_SHOWN = 3


class FidInception(nn.Module):
    """From pixels to pooled features (N, 2048), and to the spatial ones of sFID (N, 2023).

    Always in eval mode, float32, frozen. Pixels are (N, 3, H, W) uint8: what a picture is once it is a file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        self.Mixed_5b = _BlockA(192, 32)
        self.Mixed_5c = _BlockA(256, 64)
        self.Mixed_5d = _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(768, 128)
        self.Mixed_6c = _BlockC(768, 160)
        self.Mixed_6d = _BlockC(768, 160)
        self.Mixed_6e = _BlockC(768, 192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b = _BlockE(1280, _average)
        self.Mixed_7c = _BlockE(2048, partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1))
        self.fc = nn.Linear(NUM_FEATURES, 1008)  # unused here; the file holds it
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> FidInception:
        """Never leaves eval mode."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pooled features (N, 2048) of pixels (N, 3, H, W) uint8. ValueError for anything else."""
        return self.both(pixels)[0]

    def both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (N, 2048), and (N, 2023) the first seven maps of `mixed_6/conv`, pixel by pixel as in ADM."""
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels: {tuple(pixels.shape)} {pixels.dtype}, expected (N, 3, H, W) uint8")
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            x = (resize_like_tensorflow(pixels.float(), SIDE) - 128) / 128
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, stride=2)))
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(functional.max_pool2d(x, 3, stride=2))))
            x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
            spatial = self.Mixed_6d.branch1x1(x)[:, :_SPATIAL_CHANNELS]
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))))
            return x.mean((2, 3)), spatial.permute(0, 2, 3, 1).flatten(1)


def load_inception(source: str | Path, *, key: str = "inception") -> FidInception:
    """The network with the weights of a file, of a folder that holds it, or of `hf://owner/name`.

    Read without unpickling anything but tensors. InputError naming the file for what is missing, damaged, or does not
    fit tensor by tensor.
    """
    file = _file(source, key)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{key}={file} cannot be read as weights: {reason}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise InputError(f"{key}={file}: expected tensors by name, as in {WEIGHTS}")
    network = FidInception()
    wanted = network.state_dict()
    # files written before batch norm counted its batches are without the counters, which nothing reads
    given = {name: torch.zeros((), dtype=torch.int64) for name in wanted if name.endswith("num_batches_tracked")}
    given |= found
    for what, names in (("missing", wanted.keys() - given.keys()), ("unexpected", given.keys() - wanted.keys())):
        if names:
            raise InputError(f"{key}={file}: {what} tensors: {', '.join(sorted(names)[:_SHOWN])}")
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape:
            shapes = f"{list(given[name].shape)}, expected {list(tensor.shape)}"
            raise InputError(f"{key}={file}: {name} has shape {shapes}")
        if not bool(torch.isfinite(given[name]).all()):
            raise InputError(f"{key}={file}: {name} holds NaN or infinity")
    network.load_state_dict(given)
    return network


def resize_like_tensorflow(images: Tensor, side: int) -> Tensor:
    """Bilinear resizing of (N, C, H, W) to (N, C, side, side) as in TensorFlow 1: no half-pixel shift, no antialiasing.

    Output pixel i reads at i * size / side, so that pictures move by half a pixel against torch's own rule.
    """
    upper, lower, down = _neighbours(images.shape[2], side, images)
    left, right, across = _neighbours(images.shape[3], side, images)
    rows = images[:, :, upper], images[:, :, lower]
    top, bottom = (row[..., left] + (row[..., right] - row[..., left]) * across for row in rows)
    return top + (bottom - top) * down.unsqueeze(1)


def _neighbours(size: int, side: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each output place the two input places around it, and how far it is towards the second."""
    places = torch.arange(side, dtype=like.dtype, device=like.device) * torch.tensor(size / side, dtype=torch.float32)
    first = places.long()
    return first, (first + 1).clamp_max(size - 1), places - first


def _file(source: str | Path, key: str) -> Path:
    path = Path(source)
    if not is_hub(source) and path.is_file():
        return path
    folder = local_folder(source, key=key, files=_NAMES)
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{key}={source}: holds no {' and no '.join(_NAMES)}")


def _average(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _Convolution(nn.Module):
    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)), inplace=True)


_Wide = partial(_Convolution, kernel=(1, 7), padding=(0, 3))
_Tall = partial(_Convolution, kernel=(7, 1), padding=(3, 0))


class _BlockA(nn.Module):
    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(channels, 64, 1)
        self.branch5x5_1 = _Convolution(channels, 48, 1)
        self.branch5x5_2 = _Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, padding=1)
        self.branch_pool = _Convolution(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class _BlockB(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = _Convolution(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, functional.max_pool2d(x, 3, stride=2)], 1)


class _BlockC(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(channels, 192, 1)
        self.branch7x7_1 = _Convolution(channels, inner, 1)
        self.branch7x7_2 = _Wide(inner, inner)
        self.branch7x7_3 = _Tall(inner, 192)
        self.branch7x7dbl_1 = _Convolution(channels, inner, 1)
        self.branch7x7dbl_2 = _Tall(inner, inner)
        self.branch7x7dbl_3 = _Wide(inner, inner)
        self.branch7x7dbl_4 = _Tall(inner, inner)
        self.branch7x7dbl_5 = _Wide(inner, 192)
        self.branch_pool = _Convolution(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class _BlockD(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Convolution(channels, 192, 1)
        self.branch3x3_2 = _Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Convolution(channels, 192, 1)
        self.branch7x7x3_2 = _Wide(192, 192)
        self.branch7x7x3_3 = _Tall(192, 192)
        self.branch7x7x3_4 = _Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, functional.max_pool2d(x, 3, stride=2)], 1)


class _BlockE(nn.Module):
    """pool: of the last branch, an average in the first of the two blocks and a maximum in the second."""

    def __init__(self, channels: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(channels, 320, 1)
        self.branch3x3_1 = _Convolution(channels, 384, 1)
        self.branch3x3_2a = _Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Convolution(channels, 448, 1)
        self.branch3x3dbl_2 = _Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Convolution(channels, 192, 1)
        self._pool = pool

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(self._pool(x)),
            ],
            1,
        )
