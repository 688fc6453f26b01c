"""Files on Azure Blob Storage: Azurite, Microsoft's emulator, read by PyArrow's file system."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from broken_videos import encode
from ports import free_ports
from tar_files import tar_of

from ardiff.data import azure, s3, storage
from ardiff.data.clips import read_clip
from ardiff.data.config import StorageConfig
from ardiff.data.decode import decode_clip
from ardiff.data.discovery import probe_record
from ardiff.data.sources import discover
from ardiff.data.tables import to_parquet
from ardiff.data.video_tables import write_group
from ardiff.errors import DataError, StorageError

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parents[2] / ".azurite/node_modules/.bin/azurite-blob"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The key in Azurite's documentation."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the server."""
    if not PROGRAM.exists():
        pytest.skip("Azurite is not installed: run `make azure-server`, which needs npm")
    port = free_ports()
    command = [str(PROGRAM), "--inMemoryPersistence", "--blobPort", str(port), "--skipApiVersionCheck"]
    folder = tmp_path_factory.mktemp("azurite")
    process = subprocess.Popen([*command, "--disableTelemetry"], stdout=subprocess.PIPE, text=True, cwd=folder)
    assert process.stdout is not None
    assert any("successfully listens" in line for line in process.stdout)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


@pytest.fixture
def container(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in ((azure.ENDPOINT, server), (azure.ACCOUNT, ACCOUNT), (azure.KEY, KEY)):
        monkeypatch.setenv(name, value)
    s3.configure(StorageConfig(retry_seconds=0))
    azure.filesystem().create_dir("videos")
    return "az://videos"


def test_videos_are_listed_probed_and_read(container: str) -> None:
    names = ("cats/a b.mp4", "cats/c#d%20.mp4", "dogs/é.mp4")
    videos = {name: encode(frames=6, crf=20 + i) for i, name in enumerate(names)}
    for name, data in videos.items():
        storage.write_bytes(f"{container}/in/{name}", data)
    found = discover(f"{container}/in", f"{container}/out", "folders", 0.3).records
    assert {r.uri: (r.size, r.class_name) for r in found} == {
        f"{container}/in/{name}": (len(data), name.partition("/")[0]) for name, data in videos.items()
    }
    assert all(int(r.etag, 16) for r in found)
    for record in (probe_record(r, 25.0) for r in found):
        data = videos[record.uri.removeprefix(f"{container}/in/")]
        assert (record.status, record.num_frames) == ("ok", 6)
        np.testing.assert_array_equal(read_clip(record, 1, 3, 2, None), decode_clip(data, 1, 3, 2))
        reader = storage.RangeReader(record.uri, record.size)
        reader.seek(-10, 2)
        assert reader.read() == data[-10:]
    storage.write_bytes(f"{container}/list.txt", b"in/dogs/\xc3\xa9.mp4\ngone.mp4\n")
    listed, gone = discover(f"{container}/list.txt", "/nowhere", "folders", 0.3).records
    assert listed.etag == next(r.etag for r in found if r.uri == listed.uri)
    assert (gone.error, gone.reason) == ("unreadable", "there is no such file")


def test_tars_and_tables_are_read(container: str, tmp_path: Path) -> None:
    data = encode(frames=4)
    storage.write_bytes(f"{container}/s.tar", tar_of({"a.mp4": data}))
    [record] = discover(f"{container}/s.tar", "/nowhere", "folders", 0.3).records
    assert storage.read_bytes(record.uri) == data
    storage.write_bytes(f"{container}/t.parquet", to_parquet(pa.table({"video": [data]})))
    [table] = discover(f"{container}/t.parquet", f"{tmp_path}", "folders", 0.3).tables
    [video] = write_group(table, 0, f"{tmp_path}").videos
    assert Path(table.folder(f"{tmp_path}"), video.name).read_bytes() == data


def test_errors_name_the_cause(container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="There is no folder az://videos/gone"):
        storage.list_objects(f"{container}/gone")
    with pytest.raises(StorageError, match=r"Cannot read az://videos/gone\.mp4: Path does not exist") as missing:
        storage.read_bytes(f"{container}/gone.mp4")
    assert not missing.value.transient
    monkeypatch.setenv(azure.KEY, "AAAA" + KEY[4:])
    with pytest.raises(StorageError, match=r"\[AuthorizationFailure\] 403 .* Check the container, AZURE_") as denied:
        storage.read_bytes(f"{container}/list.txt")
    assert not denied.value.transient
    assert "\n" not in str(denied.value)
    monkeypatch.setenv(azure.ENDPOINT, f"http://127.0.0.1:{free_ports()}")
    with pytest.raises(StorageError, match="Could not connect to server") as down:
        storage.list_objects(container)
    assert down.value.transient
