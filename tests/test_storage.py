import json
import pickle
import resource
import subprocess
import sys
from contextlib import contextmanager

import fsspec
import pytest
from pyarrow import fs

from mfm_ray.errors import InputError, StorageError, UnusableStorageError
from mfm_ray.storage import Storage


@pytest.fixture(params=["path", "file_uri", "subtree", "mock", "object_store"])
def storage(request, tmp_path):
    """The same contract on every kind of filesystem; `object_store` is one that cannot rename folders."""
    if request.param == "path":
        return Storage(tmp_path / "runs")
    if request.param == "file_uri":
        return Storage(f"file://{tmp_path}/runs")
    if request.param == "subtree":
        return Storage("runs", filesystem=fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))
    if request.param == "mock":
        return Storage("mock://bucket/runs")
    handler = fs.FSSpecHandler(fsspec.filesystem("memory", skip_instance_cache=True))
    return Storage(f"/{tmp_path.name}/runs", filesystem=fs.PyFileSystem(handler))


@pytest.fixture
def folder(tmp_path):
    local = tmp_path / "local"
    (local / "sub").mkdir(parents=True)
    (local / "manifest.json").write_text("{}")
    (local / "sub" / "a.bin").write_bytes(b"a" * 1000)
    return local


@contextmanager
def full_disk():
    """No file may grow beyond 8 KiB: the operating system's own error in the middle of a write.

    Not a fixture: pytest writes to its own log between a test and the end of its fixtures.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names_in(path):
    return sorted(entry.name for entry in path.iterdir())


def test_files_round_trip(storage):
    assert not storage.exists()
    storage.write_bytes("a/b.bin", b"\x00\x01")
    storage.write_bytes("a/b.bin", b"new")
    storage.write_json("c.json", {"x": [1, None, "ü"]})
    assert storage.read_bytes("a/b.bin") == b"new"
    assert storage.read_json("c.json") == {"x": [1, None, "ü"]}
    assert storage.child("a").read_bytes("b.bin") == b"new"
    assert storage.listdir() == ["a", "c.json"]
    assert storage.is_dir("a")
    assert storage.is_file("c.json")
    assert not storage.is_file("a")


@pytest.mark.parametrize("name", ["a.gz", "a.bz2", "a.zst"])
def test_bytes_are_never_compressed_or_unpacked_by_their_name(storage, name, tmp_path):
    storage.write_bytes(name, b"plain")
    assert storage.read_bytes(name) == b"plain"
    storage.upload_dir(storage.download_dir("", tmp_path / "back"), "copy")
    assert storage.read_bytes(f"copy/{name}") == b"plain"


def test_delete_takes_files_and_folders_and_is_content_with_nothing(storage):
    storage.write_bytes("a/b.bin", b"1")
    storage.write_bytes("c.bin", b"1")
    storage.delete("a")
    storage.delete("c.bin")
    storage.delete("never")
    assert not storage.exists("a/b.bin")
    assert not storage.exists("c.bin")


def test_folders_round_trip_and_replace_what_was_there(storage, folder, tmp_path):
    storage.write_bytes("data/stale.bin", b"old")
    storage.upload_dir(folder, "data", marker="manifest.json")
    assert storage.listdir("data") == ["manifest.json", "sub"]
    back = storage.download_dir("data", tmp_path / "back")
    assert (back / "sub" / "a.bin").read_bytes() == b"a" * 1000
    assert storage.listdir() == ["data"]


def test_replace_dir_swaps_a_filled_folder_in(storage):
    storage.write_bytes("data/old.bin", b"old")
    with storage.replace_dir("data") as staging:
        (staging / "new.bin").write_bytes(b"new")
        assert storage.listdir("data") == ["old.bin"]
    assert storage.listdir("data") == ["new.bin"]


def test_replace_dir_keeps_the_old_folder_when_the_block_raises(storage):
    storage.write_bytes("data/old.bin", b"old")
    with pytest.raises(ZeroDivisionError), storage.replace_dir("data") as staging:
        (staging / "new.bin").write_bytes(bytes(1 // 0))
    assert storage.listdir("data") == ["old.bin"]
    assert storage.listdir() == ["data"]


def test_missing_files_are_named(storage):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        storage.read_json("nothing.json")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        storage.listdir("nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        storage.download_dir("nowhere", "/tmp/never")


def test_reading_below_a_file_is_a_missing_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"file/config\.json does not exist"):
        Storage(tmp_path / "file").read_json("config.json")


def test_invalid_json_is_refused_by_name(storage):
    storage.write_bytes("result.json", b'{"a": ')
    with pytest.raises(InputError, match=r"result\.json is not valid JSON"):
        storage.read_json("result.json")
    storage.write_bytes("result.json", b"\xff\xfe\xff")
    with pytest.raises(InputError, match=r"result\.json is not valid JSON"):
        storage.read_json("result.json")


def test_json_with_nan_is_refused_before_anything_is_written(storage):
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.write_json("a.json", {"loss": float("nan")})
    assert not storage.exists("a.json")


@pytest.mark.parametrize("rel", ["../up", "a/../../up", "/etc/passwd", "."])
def test_paths_cannot_leave_the_folder(storage, rel):
    with pytest.raises(ValueError, match="not a path below"):
        storage.write_bytes(rel, b"")


def test_check_writable_leaves_nothing_behind(storage):
    storage.check_writable()
    assert storage.listdir() == []


def test_relative_and_home_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Storage("runs/x").uri == str(tmp_path / "runs/x")
    assert Storage("~/x/").local_path == tmp_path / "x"
    assert Storage("runs").child("a", "b").uri == str(tmp_path / "runs/a/b")
    assert Storage("runs").name == "runs"


def test_file_uris_are_local_paths_and_other_uris_keep_their_form():
    assert Storage("file:///tmp/with%20space/").uri == "/tmp/with space"
    remote = Storage("mock://bucket/runs/")
    assert remote.uri == "mock://bucket/runs"
    assert remote.child("a").uri == "mock://bucket/runs/a"
    assert remote.local_path is None


def test_a_query_stays_at_the_end_of_the_uri():
    remote = Storage("mock://bucket/runs?region=here")
    assert remote.child("a").uri_of("b.json") == "mock://bucket/runs/a/b.json?region=here"


@pytest.mark.parametrize("location", ["", "  ", "nosuch://bucket/x", "file:///a b"])
def test_locations_that_cannot_be_understood_are_one_line(location):
    with pytest.raises(InputError) as caught:
        Storage(location)
    assert "\n" not in str(caught.value)


def test_storage_travels_to_another_process(tmp_path):
    storage = pickle.loads(pickle.dumps(Storage(tmp_path)))
    storage.write_bytes("a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_an_unwritable_location_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    storage = Storage(tmp_path / "file" / "runs")
    with pytest.raises(UnusableStorageError, match="file/runs cannot be written") as caught:
        storage.check_writable()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)
    with pytest.raises(StorageError, match=r"cannot write .*file/runs/a\.json"):
        storage.write_json("a.json", {})


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UnusableStorageError, match="runs cannot be written"):
        Storage(tmp_path / "runs").check_writable()


def test_a_full_disk_keeps_the_old_file_and_leaves_no_remains(tmp_path):
    storage = Storage(tmp_path)
    storage.write_bytes("metrics.jsonl", b"good")
    with full_disk(), pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl: File too large"):
        storage.write_bytes("metrics.jsonl", bytes(100_000))
    assert names_in(tmp_path) == ["metrics.jsonl"]
    assert storage.read_bytes("metrics.jsonl") == b"good"
    for location in (storage, storage.child("new")):
        with full_disk(), pytest.raises(UnusableStorageError, match="File too large"):
            location.check_writable()
    assert names_in(tmp_path) == ["metrics.jsonl"]


def test_a_full_disk_during_an_upload_keeps_the_old_folder(tmp_path, folder):
    storage = Storage(tmp_path / "runs")
    storage.upload_dir(folder, "model")
    refusal = rf"cannot write {tmp_path}/runs/model/big\.bin: File too large"
    with full_disk(), pytest.raises(StorageError, match=refusal), storage.replace_dir("model") as staging:
        Storage(staging).write_bytes("big.bin", bytes(100_000))
    assert storage.listdir("model") == ["manifest.json", "sub"]
    assert names_in(tmp_path / "runs") == ["model"]


def test_an_interrupted_write_is_invisible_to_readers(tmp_path):
    storage = Storage(tmp_path)
    storage.write_bytes("good", b"1")
    (tmp_path / ".good.tmp-0123").write_bytes(b"remains of a killed process")
    assert storage.listdir() == ["good"]


def test_on_object_stores_the_marker_is_written_last(folder):
    written = []

    class Recording(fs.FSSpecHandler):
        def move(self, src, dest):
            written.append(dest.rsplit("/", 1)[1])
            super().move(src, dest)

    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    storage = Storage("/order", filesystem=fs.PyFileSystem(Recording(memory)))
    (folder / "z.bin").write_bytes(b"z")
    storage.upload_dir(folder, "data", marker="manifest.json")
    assert written == ["a.bin", "z.bin", "manifest.json"]


def test_results_are_plain_json(tmp_path):
    Storage(tmp_path).write_json("r.json", {"a": 1.5})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1.5}


def test_a_killed_process_leaves_the_old_folder(tmp_path):
    storage = Storage(tmp_path)
    storage.write_bytes("model/good", b"good")
    code = f"""
import os
from mfm_ray.storage import Storage
with Storage({str(tmp_path)!r}).replace_dir("model") as folder:
    (folder / "half").write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert storage.listdir() == ["model"]
    assert storage.listdir("model") == ["good"]
    with storage.replace_dir("model") as folder:
        (folder / "whole").write_bytes(b"whole")
    assert storage.listdir("model") == ["whole"]
