import os
from pathlib import Path

import pytest

from ardiff.data import storage
from ardiff.errors import DataError


@pytest.fixture
def _s3_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    # setenv first, so that monkeypatch removes what open_filesystem sets.
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "")
    monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION")


def test_write_makes_folders_replaces_and_leaves_no_draft(tmp_path: Path) -> None:
    place = storage.join(str(tmp_path), "a", "b.bin")
    assert not storage.exists(place)
    storage.write_bytes(place, b"one")
    storage.write_bytes(place, b"two")
    assert storage.read_bytes(place) == b"two"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.bin"]


def test_failed_write_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match="Cannot write"):
        storage.write_bytes(str(tmp_path / "taken"), b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_missing_places_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read .* Check the path and its permissions\."):
        storage.read_bytes(str(tmp_path / "no"))
    with pytest.raises(DataError, match="There is no folder"):
        storage.list_files(str(tmp_path / "no"))
    with pytest.raises(DataError, match="There is no folder"):
        storage.upload_folder(tmp_path / "no", str(tmp_path / "to"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="There is nothing"):
        storage.download_folder(str(tmp_path / "empty"), tmp_path / "to")


@pytest.mark.parametrize("part", ["..", "a/../../b", "/etc/passwd", "a\\b", "a\0b"])
def test_join_refuses_names_that_lead_out(part: str) -> None:
    with pytest.raises(DataError, match="is not a name below"):
        storage.join("root", part)


def test_join() -> None:
    assert storage.join("s3://bucket/a/", "b", "c/d..e") == "s3://bucket/a/b/c/d..e"
    assert storage.join("/", "a") == "/a"
    assert storage.join("a") == "a"
    with pytest.raises(DataError, match="is empty"):
        storage.join("", "a")


def test_list_files_is_recursive_sorted_filtered_and_keeps_the_style(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.mp4", "a/z.MP4", "a/x.txt", ".hidden.mp4", ".cache/y.mp4", "a b%20#c.mp4"):
        storage.write_bytes(str(tmp_path / "in" / name), b"")
    monkeypatch.chdir(tmp_path)
    expected = ["a b%20#c.mp4", "a/z.MP4", "b.mp4"]
    assert storage.list_files("in", (".mp4",)) == [f"in/{n}" for n in expected]
    assert storage.list_files(f"{tmp_path}/in/", (".mp4",)) == [f"{tmp_path}/in/{n}" for n in expected]
    uris = storage.list_files(f"file://{tmp_path}/in", (".mp4",))
    assert uris == [f"file://{tmp_path}/in/{n}" for n in expected]
    assert all(storage.read_bytes(uri) == b"" for uri in uris)
    assert "in/a/x.txt" in storage.list_files("in")


def test_folders_are_copied_whole(tmp_path: Path) -> None:
    for name in ("a.txt", "b/c.txt"):
        storage.write_bytes(str(tmp_path / "from" / name), name.encode())
    storage.upload_folder(tmp_path / "from", str(tmp_path / "there"))
    storage.download_folder(str(tmp_path / "there"), tmp_path / "back")
    assert (tmp_path / "back" / "a.txt").read_text() == "a.txt"
    assert (tmp_path / "back" / "b" / "c.txt").read_text() == "b/c.txt"


def test_download_refuses_keys_that_lead_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "list_files", lambda uri: [f"{uri}/../outside"])
    with pytest.raises(DataError, match="is not a name below"):
        storage.download_folder(str(tmp_path / "from"), tmp_path / "to")


def test_is_remote() -> None:
    assert storage.is_remote("s3://b/k")
    assert not storage.is_remote("/a/b:c")


@pytest.mark.usefixtures("_s3_environment")
@pytest.mark.parametrize("key", ["a/b.mp4", "a b", "a#b", "a?b", "a%20b", "100%.mp4", "é", "x:y@[z]+&="])
def test_s3_keys_are_literal(key: str) -> None:
    assert storage.open_filesystem(f"s3://bucket/{key}")[1] == f"bucket/{key}"


@pytest.mark.usefixtures("_s3_environment")
def test_opening_s3_sets_the_checksum_default_only_if_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    storage.open_filesystem("s3://bucket/a")
    assert os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] == "when_required"
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    storage.open_filesystem("s3://bucket/a")
    assert os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] == "when_supported"


def test_unknown_scheme_is_a_data_error() -> None:
    with pytest.raises(DataError, match="Cannot open"):
        storage.open_filesystem("nonsense://a/b")


def test_size_is_that_of_the_file_and_only_files_have_one(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/folder/file.bin", b"12345")
    assert storage.size(f"{tmp_path}/folder/file.bin") == 5
    for nothing in (f"{tmp_path}/folder", f"{tmp_path}/missing"):
        with pytest.raises(DataError, match="no file"):
            storage.size(nothing)
