"""Files on a real S3 server: names, sizes, rights; and retries with a server that fails for a while."""

import http.server
import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from botocore.exceptions import ClientError
from broken_videos import encode
from s3_server import S3Server, environment

from ardiff.data import retries, s3, storage
from ardiff.data.config import STORAGE_VARIABLE, StorageConfig
from ardiff.data.decode import decode_clip, decode_frames
from ardiff.data.probe import probe
from ardiff.data.retries import is_transient
from ardiff.errors import ConfigError, DataError, StorageError


def test_names_are_literal(s3_bucket: str) -> None:
    names = ["a b", "a#b", "a?b", "a%20b", "100%.mp4", "é", "x:y@[z]+&=", "deep/er/file"]
    for name in names:
        storage.write_bytes(f"{s3_bucket}/in/{name}", name.encode())
    assert storage.list_files(f"{s3_bucket}/in") == [f"{s3_bucket}/in/{name}" for name in sorted(names)]
    assert [storage.read_bytes(f"{s3_bucket}/in/{name}").decode() for name in names] == names
    assert storage.list_files(f"{s3_bucket}/in/deep/") == [f"{s3_bucket}/in/deep/er/file"]
    assert storage.size(f"{s3_bucket}/in/a?b") == 3
    with pytest.raises(DataError, match="There is no folder"):
        storage.list_files(f"{s3_bucket}/i")  # the beginning of a name is no folder


def test_etags_follow_the_content(s3_bucket: str, tmp_path: Path) -> None:
    for root in (s3_bucket, str(tmp_path)):
        etags: list[str] = []
        for content in (b"one", b"two", b"three"):
            if etags and root == str(tmp_path):
                _await_tick(tmp_path / "x" / "file")
            storage.write_bytes(f"{root}/x/file", content)
            [found] = storage.list_objects(f"{root}/x")
            assert (found.uri, found.size) == (f"{root}/x/file", len(content))
            etags.append(found.etag)
        assert len(set(etags)) == 3


def _await_tick(file: Path) -> None:
    """Waits until what is written gets another time than ``file``: kernels count in milliseconds."""
    other = file.with_name("tick")
    while other.write_bytes(b"") or other.stat().st_mtime_ns <= file.stat().st_mtime_ns:
        pass
    other.unlink()


def test_folders_go_there_and_back(s3_bucket: str, tmp_path: Path) -> None:
    for name in ("a.txt", "b/c.txt"):
        storage.write_bytes(str(tmp_path / "from" / name), name.encode())
    storage.upload_folder(tmp_path / "from", f"{s3_bucket}/there")
    storage.download_folder(f"{s3_bucket}/there", tmp_path / "back")
    assert (tmp_path / "back" / "b" / "c.txt").read_text() == "b/c.txt"
    storage.delete_file(f"{s3_bucket}/there/a.txt")
    assert not storage.exists(f"{s3_bucket}/there/a.txt")
    assert storage.exists(f"{s3_bucket}/there")
    storage.delete_folder(f"{s3_bucket}/there")
    assert not storage.exists(f"{s3_bucket}/there")


def test_large_files_are_uploaded_in_parts_and_read_by_ranges(s3_bucket: str, s3_server: S3Server) -> None:
    data = np.random.default_rng(0).bytes(20 * 2**20)
    storage.write_bytes(f"{s3_bucket}/large", data)
    assert storage.read_bytes(f"{s3_bucket}/large") == data
    head = s3_server.client().head_object(Bucket=s3_bucket.removeprefix("s3://"), Key="large")
    assert head["ETag"].strip('"').endswith("-3")  # parts of 8 MiB
    assert storage.read_range(f"{s3_bucket}/large", 5, 7) == data[5:12]
    reader = storage.RangeReader(f"{s3_bucket}/large", len(data))
    reader.seek(-10, 2)
    assert reader.read(100) == data[-10:]
    assert reader.read(1) == b""


def test_a_clip_of_a_long_video_is_decoded_from_a_part_of_it(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(frames=600, height=192, width=256, crf=1, movflags="faststart", preset="ultrafast")
    storage.write_bytes(f"{s3_bucket}/long.mp4", data)
    read: list[int] = []
    original = storage.read_range

    def counted(uri: str, start: int, length: int) -> bytes:
        read.append(length)
        return original(uri, start, length)

    monkeypatch.setattr(storage, "read_range", counted)
    timing = probe(data).timing
    wanted = list(range(300, 304))
    frames = decode_frames(storage.RangeReader(f"{s3_bucket}/long.mp4", len(data)), wanted, None, timing)
    assert np.array_equal(np.stack([frames[i] for i in wanted]), decode_clip(data, 300, 4))
    assert sum(read) < len(data) / 2
    assert len(read) <= 8


def test_a_wrong_secret_is_refused_at_once_and_in_one_sentence(s3_server: S3Server) -> None:
    place = f"s3://{s3_server.make_bucket()}/file"
    with environment(s3_server.environment(secret="wrong")):
        for act in (
            lambda: storage.read_bytes(place),
            lambda: storage.write_bytes(place, b""),
            lambda: storage.list_files(place),
            lambda: storage.exists(place),
        ):
            with pytest.raises(StorageError, match=r"Check the bucket, the credentials and AWS_ENDPOINT_URL\.") as info:
                act()
            assert "\n" not in str(info.value)
            assert (info.value.attempts, info.value.transient) == (1, False)


def test_reading_needs_the_rights_to_get_and_list_only(s3_server: S3Server) -> None:
    bucket = f"s3://{s3_server.make_bucket()}"
    with environment(s3_server.environment()):
        storage.write_bytes(f"{bucket}/data/file", b"content")
    s3_server.grant_reading(bucket.removeprefix("s3://"))
    with environment(s3_server.environment("reader")):
        assert storage.list_files(f"{bucket}/data") == [f"{bucket}/data/file"]
        assert storage.read_bytes(f"{bucket}/data/file") == b"content"
        assert storage.read_range(f"{bucket}/data/file", 1, 3) == b"ont"
        assert storage.size(f"{bucket}/data/file") == 7
        with pytest.raises(StorageError, match="AccessDenied"):
            storage.write_bytes(f"{bucket}/data/other", b"")


@pytest.mark.slow
def test_more_than_a_thousand_keys_are_listed(s3_server: S3Server, s3_bucket: str) -> None:
    client, bucket = s3_server.client(), s3_bucket.removeprefix("s3://")
    names = [f"many/{i:04d}" for i in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: client.put_object(Bucket=bucket, Key=name, Body=b"x"), names))
    assert storage.list_files(f"{s3_bucket}/many") == [f"{s3_bucket}/{name}" for name in names]


class Public(http.server.BaseHTTPRequestHandler):
    """A server with one public object. It fails some requests first, and records all others."""

    requests: list[tuple[str, str | None]] = []  # noqa: RUF012 - shared by the requests of a test
    failures = 0

    def do_GET(self) -> None:
        if Public.failures:
            Public.failures -= 1
            self.send_error(503)
            return
        self.requests.append((self.path, self.headers.get("Authorization")))
        self.send_response(200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"content")

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def public() -> Iterator[str]:
    Public.requests.clear()
    Public.failures = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Public)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def reader(public: str) -> Iterator[None]:
    """The variables of a process that reads from the public server."""
    with environment({"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": public}):
        yield


@pytest.mark.usefixtures("reader")
def test_a_retrying_file_system_retries_in_another_process_too() -> None:
    filesystem, path = storage.open_filesystem("s3://bucket/file", retry=True)
    copy = pickle.loads(pickle.dumps(filesystem))  # noqa: S301
    Public.failures = s3.SDK_ATTEMPTS + 1
    assert copy.open_input_stream(path).read() == b"content"
    assert Public.failures == 0


@pytest.mark.usefixtures("reader")
def test_reading_waits_for_a_server_that_fails() -> None:
    s3.configure(StorageConfig(retry_seconds=90.0))
    Public.failures = s3.SDK_ATTEMPTS + 1
    assert storage.read_bytes("s3://bucket/file") == b"content"
    assert Public.failures == 0
    s3.configure(StorageConfig(retry_seconds=4.0))
    Public.failures = 1000
    with pytest.raises(StorageError, match=r"tried \d+ times") as info:
        storage.read_bytes("s3://bucket/file")
    assert info.value.transient
    assert info.value.attempts > 1
    copy = pickle.loads(pickle.dumps(info.value))  # noqa: S301 - as it comes from a worker
    assert (str(copy), copy.attempts, copy.transient) == (str(info.value), info.value.attempts, True)


@pytest.mark.usefixtures("reader")
def test_a_server_that_cannot_be_reached_is_a_transient_error() -> None:
    with environment({**os.environ, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}):
        s3.configure(StorageConfig(retry_seconds=0.0))
        with pytest.raises(StorageError) as info:
            storage.read_bytes("s3://bucket/file")
    assert info.value.transient


@pytest.mark.parametrize("anonymous", [True, False])
def test_settings_reach_the_client(public: str, anonymous: bool) -> None:
    with environment({"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}):
        s3.configure(StorageConfig(endpoint=public, region="eu-west-1", anonymous=anonymous))
        assert storage.read_bytes("s3://bucket/a b") == b"content"
    [(path, authorization)] = Public.requests
    assert path == "/bucket/a%20b"
    assert authorization is None if anonymous else "/eu-west-1/s3/" in str(authorization)


def test_virtual_hosts_are_asked_for_the_bucket(public: str) -> None:
    with environment({"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}):
        s3.configure(StorageConfig(endpoint=public.replace("127.0.0.1", "localhost"), path_style=False))
        client = s3.client()
        assert client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "k"}).startswith(
            "http://bucket.localhost:"
        )


def test_the_profile_holds_the_credentials(public: str, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = labkey\naws_secret_access_key = x\n")
    with environment({"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials")}):
        s3.configure(StorageConfig(endpoint=public, region="us-east-1", profile="lab"))
        storage.read_bytes("s3://bucket/file")
    assert "Credential=labkey/" in str(Public.requests[0][1])


def test_settings_travel_as_environment_and_without_secrets() -> None:
    config = StorageConfig(endpoint="http://host:1", region="r", retry_seconds=7.0, timeout=3.0)
    with environment({"AWS_SECRET_ACCESS_KEY": "hidden"}):
        assert s3.current() == StorageConfig()
        assert StorageConfig().environment() == {}
        s3.configure(config)
        assert s3.current() == config
        assert s3.endpoint() == "http://host:1"
        assert "hidden" not in str(config.environment())


@pytest.mark.parametrize(
    "wrong", [{"endpoint": "host:9000"}, {"endpoint": "http://host/bucket"}, {"timeout": 0}, {"retry_seconds": -1}]
)
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises((ValueError, ConfigError)):
        StorageConfig(**wrong)  # type: ignore[arg-type]


def answer(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (answer("SlowDown", 503), True),
        (answer("InternalError", 500), True),
        (answer("TooManyRequests", 429), True),
        (answer("RequestTimeout", 400), True),
        (answer("NoSuchKey", 404), False),
        (answer("AccessDenied", 403), False),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject operation"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation"), True),
        (OSError("AWS Error ACCESS_DENIED during HeadObject operation"), False),
        (OSError(116, "Stale file handle"), True),
        (FileNotFoundError(2, "No such file or directory"), False),
        (ValueError("anything else"), False),
    ],
)
def test_transient_errors(error: Exception, transient: bool) -> None:
    assert is_transient(error) == transient


def test_pauses_grow_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append)

    def refuse(path: Path) -> None:
        raise OSError(104, "reset")

    monkeypatch.setattr(retries, "time", clock)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setenv(STORAGE_VARIABLE, '{"retry_seconds": 100}')
    with pytest.raises(StorageError, match=r"reset \(tried \d+ times\)"):
        storage.read_bytes("/anywhere")
    assert all(0.25 * 2**i <= pause <= 0.5 * 2**i for i, pause in enumerate(pauses[:5]))
    assert max(pauses) <= 15
    assert 80 < sum(pauses) <= 100
