"""Image files as pixels, and sources of images: what is read, what is damage, and what is this machine's fault."""

from __future__ import annotations

import csv
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mfm_ray.data.image_sources import ImageIndex, ImageReader, index_images, open_source
from mfm_ray.data.pixels import DamagedImage, read_pixels
from mfm_ray.errors import InputError, StorageError
from mfm_ray.storage import Storage


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def plain(value: int, *, form: str = "JPEG") -> bytes:
    """A square of one grey level, which the reader must give back."""
    return encoded(Image.new("RGB", (8, 8), (value,) * 3), form)


def left_red() -> Image.Image:
    """8 x 4 pixels, the left half red, the right one blue."""
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4, 0], pixels[:, 4:, 2] = 255, 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("L", (4, 4), 200), (200, 200, 200)),
        (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGB", (4, 4), (1, 2, 3)).quantize(4), (1, 2, 3)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 0xAB12, np.uint16)), (0xAB, 0xAB, 0xAB)),
    ],
    ids=["grey", "grey-transparent", "transparent", "opaque", "palette", "bits", "16-bit"],
)
def test_every_mode_becomes_rgb(image: Image.Image, colour: tuple[int, int, int]) -> None:
    pixels = read_pixels(encoded(image), 4)
    assert pixels.shape == (4, 4, 3) and pixels.dtype == np.uint8
    assert (pixels == np.array(colour, np.uint8)).all()


def test_cmyk_becomes_rgb() -> None:
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    assert (read_pixels(encoded(ink, "TIFF"), 8) == np.array([255, 0, 0])).all()


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    pixels = read_pixels(encoded(left_red(), exif=exif), 4)
    assert (pixels[:, :2] == np.array([0, 0, 255])).all() and (pixels[:, 2:] == np.array([255, 0, 0])).all()


def test_the_centre_is_cropped_and_the_shorter_side_resized() -> None:
    columns = np.repeat(np.arange(10, dtype=np.uint8)[None, :, None] * 20, 4, axis=0).repeat(3, axis=2)
    pixels = read_pixels(encoded(Image.fromarray(columns)), 4)  # 10 x 4 to 4 x 4: columns 3 to 6
    assert pixels[0, :, 0].tolist() == [60, 80, 100, 120]
    halved = read_pixels(encoded(Image.fromarray(columns.repeat(2, axis=0).repeat(2, axis=1))), 4)
    # antialias: a triangle of width 2 over pixels of 2 and 2: 1/8 3/8 3/8 1/8 keeps a ramp where it is
    assert halved[0, :, 0].tolist() == [60, 80, 100, 120]


def bomb() -> bytes:
    """Some hundred bytes that claim 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"once upon a time", "not an image of a known format"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:400], "damaged: "),
        (encoded(Image.effect_noise((64, 64), 50), "PNG")[:400], "damaged: "),
        (bomb(), "decompression bomb: more than 89,478,485 pixels"),
        (encoded(Image.new("L", (9000, 1))), "too long and narrow"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point pixels"),
    ],
    ids=["empty", "text", "cut-jpeg", "cut-png", "bomb", "narrow", "float"],
)
def test_damage_is_named_in_one_line(content: bytes, reason: str) -> None:
    with pytest.raises(DamagedImage, match=reason) as damage:
        read_pixels(content, 256)
    assert "\n" not in str(damage.value)


def test_too_little_memory_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "crop", full)
    with pytest.raises(MemoryError):
        read_pixels(plain(7), 8)


def write_folder(place: Path) -> str:
    for number, name in enumerate(("b/1.jpg", "a/0.JPEG", "b/noending")):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(plain(10 * number))
    (place / "b/notes.txt").write_text("no image")
    return str(place)


def write_flat(place: Path) -> str:
    for number in range(3):
        (place / f"{number}.png").write_bytes(plain(10 * number, form="PNG"))
    return str(place)


def write_parquet(place: Path, *, name: str = "train-0.parquet") -> str:
    table = pa.table({"jpg": [plain(10 * number) for number in range(5)], "label": [0, 2, 1, None, 0]})
    pq.write_table(table, place / name, row_group_size=2)
    return str(place)


def write_hugging_face(place: Path) -> str:
    """As `datasets` writes an Image and a ClassLabel."""
    cells = [{"bytes": plain(10 * number), "path": None} for number in range(3)]
    features = {"info": {"features": {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": cells, "label": [2, 0, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), place / "0.parquet")
    return str(place)


def write_tar(place: Path, *, name: str = "0.tar") -> str:
    members = {
        "x/0.jpg": plain(0),
        "x/0.cls": b"3",
        "x/1.cls": b"1",
        "x/1.jpg": plain(10),
        "x/2.jpg": plain(20),
        "x/2.json": b'{"label": 2}',
    }
    with tarfile.open(place / name, "w") as archive:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(place)


def read_all(source: str, **options: Any) -> tuple[ImageIndex, list[int]]:
    """The index, and the grey level of each image."""
    place, only = open_source(source)
    index = index_images(place, only=only, **options)
    reader = ImageReader(place, index.kind, index.column)
    levels = [int(read_pixels(reader.read(entry), 8)[0, 0, 0]) for entry in index.images.to_pylist()]
    reader.close()
    return index, levels


@pytest.mark.parametrize(
    ("write", "kind", "keys", "labels", "names", "levels"),
    [
        (write_folder, "folder", ["a/0.JPEG", "b/1.jpg", "b/noending"], [0, 1, 1], ("a", "b"), [10, 0, 20]),
        (write_flat, "folder", ["0.png", "1.png", "2.png"], [-1] * 3, (), [0, 10, 20]),
        (
            write_parquet,
            "parquet",
            [f"train-0.parquet#{row}" for row in range(5)],
            [0, 2, 1, -1, 0],
            ("0", "1", "2"),
            [0, 10, 20, 30, 40],
        ),
        (
            write_hugging_face,
            "parquet",
            [f"0.parquet#{row}" for row in range(3)],
            [2, 0, 1],
            ("cat", "dog", "eel"),
            [0, 10, 20],
        ),
        (
            write_tar,
            "webdataset",
            [f"0.tar/x/{row}.jpg" for row in range(3)],
            [3, 1, 2],
            ("0", "1", "2", "3"),
            [0, 10, 20],
        ),
    ],
    ids=["folder", "flat", "parquet", "hugging-face", "webdataset"],
)
def test_each_kind_of_source_gives_every_image_once_with_its_label(
    tmp_path: Path,
    write: Callable[[Path], str],
    kind: str,
    keys: list[str],
    labels: list[int],
    names: tuple[str, ...],
    levels: list[int],
) -> None:
    index, found = read_all(write(tmp_path))
    assert index.kind == kind
    assert index.images["key"].to_pylist() == keys
    assert index.images["label"].to_pylist() == labels
    assert index.class_names == names
    assert found == levels


def test_labels_of_a_file_replace_those_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    source = write_folder(tmp_path / "images")
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "label"], ["a/0.JPEG", "x"], ["b/1.jpg", "y"], ["b/noending", "x"]])
    index, _ = read_all(source, labels=str(tmp_path / "labels.csv"))
    assert index.images["label"].to_pylist() == [0, 1, 0] and index.class_names == ("x", "y")
    (tmp_path / "labels.csv").write_text("file_name,label\na/0.JPEG,x\n")
    with pytest.raises(InputError, match=r"labels=.*: 2 images are not in it, such as b/1.jpg"):
        read_all(source, labels=str(tmp_path / "labels.csv"))


def test_one_file_and_a_pattern_are_sources(tmp_path: Path) -> None:
    for name in ("train-0.parquet", "train-1.parquet", "test-0.parquet"):
        write_parquet(tmp_path, name=name)
    write_tar(tmp_path)
    index, _ = read_all(f"{tmp_path}/train-*.parquet")
    assert len(index) == 10 and set(index.images["file"].to_pylist()) == {"train-0.parquet", "train-1.parquet"}
    assert read_all(f"{tmp_path}/0.tar")[1] == [0, 10, 20]
    with pytest.raises(InputError, match="holds parquet and webdataset files"):
        read_all(str(tmp_path))
    with pytest.raises(InputError, match=r"holds no file valid-\*.parquet"):
        read_all(f"{tmp_path}/valid-*.parquet")


@pytest.mark.parametrize(("write", "kind"), [(write_parquet, "parquet"), (write_tar, "webdataset")])
def test_files_without_an_ending_are_known_by_their_first_bytes(
    tmp_path: Path, write: Callable[..., str], kind: str
) -> None:
    write(tmp_path, name="part0")
    assert read_all(str(tmp_path))[0].kind == kind


def problems(source: str) -> dict[str, str]:
    place, only = open_source(source)
    index = index_images(place, only=only)
    reader, found = ImageReader(place, index.kind, index.column), {}
    for entry in index.images.to_pylist():
        try:
            reader.read(entry)
        except DamagedImage as damage:
            found[entry["key"]] = str(damage)
    reader.close()
    return found


def test_what_a_cut_tar_still_holds_is_used_and_the_rest_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path)
    whole = (tmp_path / "0.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar") as archive:
        cut = archive.getmember("x/2.jpg").offset_data + 100
    (tmp_path / "0.tar").write_bytes(whole[:cut])
    found = problems(str(tmp_path))
    assert list(found) == ["0.tar/x/2.jpg", "0.tar/"]
    assert found["0.tar/x/2.jpg"].startswith("truncated: 100 of ")
    assert found["0.tar/"].startswith("the rest of the tar cannot be read: ")


def test_a_damaged_row_group_costs_its_own_images_alone(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    path = tmp_path / "train-0.parquet"
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content, start = bytearray(path.read_bytes()), chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    found = problems(str(tmp_path))
    assert list(found) == ["train-0.parquet#2", "train-0.parquet#3"]
    path.write_bytes(content[:-20])
    (tmp_path / "train-1.parquet").write_bytes(b"PAR1 but nothing else PAR1")
    write_parquet(tmp_path, name="train-2.parquet")
    assert list(problems(str(tmp_path))) == ["train-0.parquet", "train-1.parquet"]


def test_what_a_machine_cannot_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a missing mount would leave images out for good."""
    place, _ = open_source(write_flat(tmp_path))
    index = index_images(place)
    reader = ImageReader(place, index.kind, index.column)
    (tmp_path / "1.png").unlink()
    with pytest.raises(StorageError, match=r"1.png was listed, but \S+ does not see it"):
        reader.read(index.images.to_pylist()[1])

    def broken(self: Storage, rel: str) -> bytes:
        raise StorageError(f"cannot read {self.uri_of(rel)}: Input/output error")

    monkeypatch.setattr(Storage, "read_bytes", broken)
    with pytest.raises(StorageError, match="0.png: Input/output error"):
        reader.read(index.images.to_pylist()[0])


@pytest.mark.parametrize("write", [write_parquet, write_tar])
def test_an_input_output_error_within_a_file_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], str]
) -> None:
    place, _ = open_source(write(tmp_path))
    index, opened = index_images(place), Storage.open_for_parts

    class Failing:
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

        def read(self, size: int | None = None) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(Storage, "open_for_parts", lambda self, rel: Failing(opened(self, rel)))
    with pytest.raises(StorageError, match=r"cannot read .*: .*Input/output error"):
        ImageReader(place, index.kind, index.column).read(index.images.to_pylist()[0])
    with pytest.raises(StorageError, match=r"cannot read .*: .*Input/output error"):
        index_images(place)
