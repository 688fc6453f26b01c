"""Files on Google Cloud Storage: a server that speaks its JSON protocol, read by PyArrow's file system."""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from broken_videos import encode
from ports import free_ports
from tar_files import tar_of

from ardiff.data import gcs, s3, storage
from ardiff.data.clips import read_clip
from ardiff.data.config import StorageConfig
from ardiff.data.decode import decode_clip
from ardiff.data.discovery import probe_record
from ardiff.data.sources import discover
from ardiff.errors import DataError, StorageError

SERVER = """
import sys, threading
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="videos").start()
print("started", flush=True)
threading.Event().wait()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of the server. It runs in a process of its own: PyArrow holds this one while it waits."""
    port = free_ports()
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(gcs.EMULATOR, server)
    s3.configure(StorageConfig(anonymous=True, retry_seconds=0))
    return "gs://videos"


def test_videos_are_listed_probed_and_read(bucket: str) -> None:
    videos = {
        name: encode(frames=6, crf=20 + i) for i, name in enumerate(("cats/a b.mp4", "cats/c#d%20.mp4", "dogs/é.mp4"))
    }
    for name, data in videos.items():
        storage.write_bytes(f"{bucket}/in/{name}", data)
    found = discover(f"{bucket}/in", f"{bucket}/out", "folders", 0.3).records
    assert {r.uri: (r.size, r.class_name) for r in found} == {
        f"{bucket}/in/{name}": (len(data), name.partition("/")[0]) for name, data in videos.items()
    }
    assert all(r.etag for r in found)
    for record in (probe_record(r, 25.0) for r in found):
        data = videos[record.uri.removeprefix(f"{bucket}/in/")]
        assert (record.status, record.num_frames) == ("ok", 6)
        np.testing.assert_array_equal(read_clip(record, 1, 3, 2, None), decode_clip(data, 1, 3, 2))
        reader = storage.RangeReader(record.uri, record.size)
        reader.seek(-10, 2)
        assert reader.read() == data[-10:]
    storage.write_bytes(f"{bucket}/list.txt", b"in/dogs/\xc3\xa9.mp4\ngone.mp4\n")
    listed, gone = discover(f"{bucket}/list.txt", "/nowhere", "folders", 0.3).records
    assert listed.etag == next(r.etag for r in found if r.uri == listed.uri)
    assert (gone.error, gone.reason) == ("unreadable", "there is no such file")


def test_tars_are_read_in_place(bucket: str) -> None:
    data = encode(frames=4)
    storage.write_bytes(f"{bucket}/s.tar", tar_of({"a.mp4": data}))
    [record] = discover(f"{bucket}/s.tar", "/nowhere", "folders", 0.3).records
    assert storage.read_bytes(record.uri) == data
    assert probe_record(record, 25.0).num_frames == 4


def test_errors_name_the_cause(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="There is no folder gs://videos/gone"):
        storage.list_objects(f"{bucket}/gone")
    with pytest.raises(StorageError, match=r"404.* Check the bucket and GOOGLE_APPLICATION_CREDENTIALS") as missing:
        storage.read_bytes(f"{bucket}/gone.mp4")
    assert not missing.value.transient
    monkeypatch.setattr(gcs, "_SDK_SECONDS", 0.5)
    port = free_ports()
    monkeypatch.setenv(gcs.EMULATOR, f"http://127.0.0.1:{port}")
    with pytest.raises(StorageError, match="Could not connect to server") as down:
        storage.read_bytes(f"{bucket}/a.mp4")
    assert down.value.transient
    assert "error_info" not in str(down.value)
