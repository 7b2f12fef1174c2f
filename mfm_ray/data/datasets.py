"""Where data comes from: bundled digits, a Gaussian mixture, MNIST's IDX files. All in data units."""

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage

GMM_MEANS = ((-3.0, -3.0), (0.0, 0.0), (3.0, 3.0))
GMM_VARIANCE = 0.5
_DIGIT_NAMES = tuple(str(digit) for digit in range(10))
# One image in nine of each class is held out: about 200 of the 1,797.
_DIGITS_HELDOUT_EVERY = 9
_GZIP_MAGIC = b"\x1f\x8b"
_IDX_MAGIC = {3: 0x00000803, 1: 0x00000801}  # unsigned bytes in 3 dimensions (images), in 1 (labels)


@dataclass(frozen=True)
class Split:
    """data: (N, *row) float32 in data units, a row being a sample or a posterior. labels: (N,) int64, -1 for none."""

    data: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.data.shape[0]


@dataclass(frozen=True)
class Dataset:
    """A named data set with its splits (`train`, `heldout`) and, when it has labels, their names.

    row_form: what a row of a split is: "sample", (*event); or an autoencoder's posterior, its mean and its spread
    concatenated along the channels, (2C, H, W): "mean_std" or "mean_log_variance" (latents.py).
    """

    name: str
    space: DataSpace
    splits: Mapping[str, Split]
    class_names: tuple[str, ...] = ()
    row_form: str = "sample"

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 for data without."""
        return len(self.class_names)


def digits() -> Dataset:
    """scikit-learn's bundled 1,797 handwritten digits, (1, 8, 8), grey levels 0..16 divided by 16.

    Held out: of each class every ninth image in scikit-learn's order (about 200 rows, the same ones always).
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = torch.from_numpy(bundle.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(bundle.target).long()
    position = torch.stack([(labels == label).cumsum(0) for label in labels.unique()])[
        labels, torch.arange(len(labels))
    ]
    heldout = position % _DIGITS_HELDOUT_EVERY == 0
    return Dataset(
        name="digits",
        space=DataSpace(kind="image", event_shape=(1, 8, 8)),
        splits={
            "train": Split(images[~heldout], labels[~heldout]),
            "heldout": Split(images[heldout], labels[heldout]),
        },
        class_names=_DIGIT_NAMES,
    )


def gmm(*, rows: int = 65_536, heldout_rows: int = 8_192, seed: int = 0) -> Dataset:
    """Exact samples of the mixture of three equal Gaussians at (-3,-3), (0,0), (3,3), covariance 0.5 I; no labels."""
    for name, value in {"rows": rows, "heldout_rows": heldout_rows}.items():
        if value < 2:
            raise InputError(f"{name}={value}: expected an integer of at least 2")
    generator = torch.Generator().manual_seed(seed)
    count = rows + heldout_rows
    component = torch.randint(len(GMM_MEANS), (count,), generator=generator)
    noise = torch.randn(count, 2, generator=generator)
    data = torch.tensor(GMM_MEANS)[component] + math.sqrt(GMM_VARIANCE) * noise
    labels = torch.full((count,), -1)
    return Dataset(
        name="gmm",
        space=DataSpace(kind="coordinates", event_shape=(2,)),
        splits={"train": Split(data[:rows], labels[:rows]), "heldout": Split(data[rows:], labels[rows:])},
    )


def mnist(source: str | Path | Storage) -> Dataset:
    """MNIST from a folder with its IDX files, gzipped or plain: (1, 28, 28), bytes divided by 255.

    With both of MNIST's splits, `train-*` is train and `t10k-*` heldout. With one, its first nine tenths are train
    and the rest heldout (of `t10k-*`: rows 0..8999 and 9000..9999).

    InputError naming the file for whatever is missing, truncated, or of another kind or shape.
    """
    folder = Storage(source)
    if not folder.exists():
        raise InputError(f"source={folder} does not exist, expected a folder with MNIST's IDX files")
    if not folder.is_dir():
        raise InputError(f"source={folder} is not a folder, expected one with MNIST's IDX files")
    names = folder.listdir()
    if not names:
        raise InputError(f"source={folder} is empty, expected MNIST's IDX files (train-images-idx3-ubyte.gz, ...)")
    found = {part: _read_mnist(folder, names, part) for part in ("train", "t10k") if _has_part(names, part)}
    if not found:
        raise InputError(
            f"source={folder} holds no MNIST file, expected train-images-idx3-ubyte or t10k-images-idx3-ubyte (.gz)"
        )
    return Dataset(
        name="mnist",
        space=DataSpace(kind="image", event_shape=(1, 28, 28)),
        splits=_two_splits(list(found.values()), folder),
        class_names=_DIGIT_NAMES,
    )


def _two_splits(parts: list[Split], folder: Storage) -> dict[str, Split]:
    if len(parts) == 2:
        return {"train": parts[0], "heldout": parts[1]}
    data, labels = parts[0].data, parts[0].labels
    cut = len(data) - len(data) // 10
    if cut == len(data):
        raise InputError(f"source={folder} holds {len(data)} images, expected at least 10")
    return {"train": Split(data[:cut], labels[:cut]), "heldout": Split(data[cut:], labels[cut:])}


def _has_part(names: list[str], part: str) -> bool:
    return any(name.startswith((f"{part}-images", f"{part}-labels")) for name in names)


def _read_mnist(folder: Storage, names: list[str], part: str) -> Split:
    images_file = _find_idx(folder, names, f"{part}-images", "idx3")
    labels_file = _find_idx(folder, names, f"{part}-labels", "idx1")
    images = read_idx(folder, images_file, num_dims=3)
    labels = read_idx(folder, labels_file, num_dims=1)
    if images.shape[1:] != (28, 28):
        raise InputError(f"{folder.uri_of(images_file)} holds images of {images.shape[1:]} pixels, expected (28, 28)")
    if len(images) != len(labels):
        raise InputError(
            f"{folder.uri_of(images_file)} holds {len(images)} images but {labels_file} {len(labels)} labels"
        )
    if labels.max() > 9:
        row = int(labels.argmax())
        raise InputError(f"{folder.uri_of(labels_file)} row {row}: label {labels[row]}, expected 0 to 9")
    pixels = torch.from_numpy(images).float().div(255).unsqueeze(1)
    return Split(pixels, torch.from_numpy(labels).long())


def _find_idx(folder: Storage, names: list[str], stem: str, kind: str) -> str:
    """The file as MNIST's mirrors spell it (`-idx3-ubyte` or `.idx3-ubyte`), plain before gzipped."""
    spellings = [f"{stem}{joint}{kind}-ubyte{suffix}" for suffix in ("", ".gz") for joint in ("-", ".")]
    for name in spellings:
        if name in names:
            return name
    raise InputError(f"{folder.uri_of(spellings[0])} (or .gz) is missing")


def read_idx(folder: Storage, name: str, *, num_dims: int) -> np.ndarray:
    """Unsigned bytes of an IDX file, gzipped or plain, as an array of `num_dims` dimensions; all of it checked."""
    where, content = folder.uri_of(name), folder.read_bytes(name)
    if content.startswith(_GZIP_MAGIC):
        content = _gunzip(content, where)
    elif name.endswith(".gz"):
        raise InputError(f"{where} is not gzipped although its name says so")
    header = 4 + 4 * num_dims
    if len(content) < header:
        raise InputError(f"{where} is truncated: {len(content)} bytes, an IDX header has {header}")
    magic, *shape = struct.unpack(f">{1 + num_dims}I", content[:header])
    if magic != _IDX_MAGIC[num_dims]:
        raise InputError(
            f"{where} is no IDX file of {num_dims}-dimensional bytes: "
            f"magic number {magic:#010x}, expected {_IDX_MAGIC[num_dims]:#010x}"
        )
    size = math.prod(shape)
    if len(content) - header < size:
        raise InputError(f"{where} is truncated: {len(content) - header} bytes of data, its header says {size}")
    if len(content) - header > size:
        raise InputError(f"{where} has {len(content) - header - size} bytes more than its header says")
    if size == 0:
        raise InputError(f"{where} holds no data: dimensions {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy()


def _gunzip(content: bytes, where: str) -> bytes:
    try:
        return gzip.decompress(content)
    except EOFError as error:
        raise InputError(f"{where} is truncated: the gzip stream ends early") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{where} is damaged: {error}") from error
