"""Which files are one video, and of what class and split, for every layout that docs/data.md shows."""

import json

import pytest

from ardiff.data.layouts import arrange, numbered, says_splits, split_by_lists, videos_of
from ardiff.data.storage import StoredFile
from ardiff.errors import DataError


def files(*names: str) -> list[StoredFile]:
    return [StoredFile(f"s3://b/data/{name}", 10, f"etag of {name}") for name in names]


def test_folders_of_pictures_are_videos_with_an_etag_of_all_of_them() -> None:
    listed = files("a.mp4", "x/2.png", "x/10.png", "x/notes.txt", "y/clip/1.jpg", "loose.jpg")
    found = videos_of("s3://b/data/", listed)
    assert [(v.uri, v.size) for v in found] == [
        ("s3://b/data/a.mp4", 10),
        ("s3://b/data/x/", 20),
        ("s3://b/data/y/clip/", 10),
    ]
    changed = [StoredFile(f.uri, f.size, "new") if f.uri.endswith("10.png") else f for f in listed]
    assert [a.etag == b.etag for a, b in zip(found, videos_of("s3://b/data", changed), strict=True)] == [
        True,
        False,
        True,
    ]
    assert videos_of("s3://b/data", listed[::-1]) == found


def test_pictures_beside_videos_are_no_video() -> None:
    listed = files("cats/a.mp4", "cats/a.jpg", "dogs/b/1.png", "dogs/poster.png", "sets/x/c.mp4", "sets/cover.jpg")
    names = [v.uri.removeprefix("s3://b/data/") for v in videos_of("s3://b/data", listed)]
    assert names == ["cats/a.mp4", "dogs/", "dogs/b/", "sets/x/c.mp4"]


def test_ucf101() -> None:
    names = ["UCF-101/Dive/v_Dive_g07_c01.avi", "UCF-101/Archery/v_Archery_g08_c02.avi", "UCF-101/readme.avi"]
    assert arrange("ucf101", names, {}, 0.5) == [("Dive", 1, "test"), ("Archery", 0, "train"), None]
    assert arrange("ucf101", ["Dive/v_Dive_g25_c01.avi"], {}, 0.5) == [("Dive", 0, "train")]


def test_sky_and_taichi() -> None:
    names = ["sky_train/abc/abc_1/", "sky_test/def/def_1/", "sky_extra/x/"]
    assert arrange("sky", names, {}, 0.5) == [("sky", 0, "train"), ("sky", 0, "test"), None]
    names = ["train/id#0.mp4/", "test/id#1.mp4"]
    assert arrange("taichi", names, {}, 0.5) == [("taichi", 0, "train"), ("taichi", 0, "test")]


def test_faceforensics() -> None:
    folder = "original_sequences/youtube/c23/videos"
    lists = {
        f"splits/{name}.json": json.dumps(pairs).encode()
        for name, pairs in (("train", [["001", "870"]]), ("val", [["003", "004"]]), ("test", [["005", "006"]]))
    }
    names = [f"{folder}/{n}.mp4" for n in ("001", "004", "005", "999")] + ["manipulated_sequences/x/c23/videos/1_2.mp4"]
    assert arrange("faceforensics", names, lists, 0.5) == [
        ("faceforensics", 0, "train"),
        ("faceforensics", 0, "test"),
        ("faceforensics", 0, "test"),
        None,
        None,
    ]
    assert arrange("faceforensics", ["train/001/", "val/2.mp4"], {}, 0.5) == [
        ("faceforensics", 0, "train"),
        ("faceforensics", 0, "test"),
    ]
    assert [says_splits("faceforensics", n) for n in ("splits/val.json", "a/splits/test.json", "val.json")] == [
        True,
        True,
        False,
    ]
    assert not says_splits("ucf101", "splits/val.json")
    with pytest.raises(DataError, match="not a list of pairs"):
        arrange("faceforensics", names, {"splits/train.json": b"{"}, 0.5)


def test_folders() -> None:
    assert arrange("folders", ["train/b/1.mp4", "test/a/x/"], {}, 0.5) == [("b", 1, "train"), ("a", 0, "test")]


@pytest.mark.parametrize("recipe", ["ucf101", "sky", "taichi", "faceforensics"])
def test_another_layout_is_refused_and_the_right_one_shown(recipe: str) -> None:
    with pytest.raises(DataError, match=rf"recipe={recipe} expects, .*; the first is stuff/1.mp4"):
        arrange(recipe, ["stuff/1.mp4"], {}, 0.5)  # type: ignore[arg-type]


def test_lists() -> None:
    names = ["UCF-101/Dive/a b.avi", "UCF-101/Dive/c.avi", "UCF-101/Run/d.avi", "frames/e/"]
    train = b"Dive/a b.avi 3\nframes/e\nRun/gone.avi 7\n"
    assert split_by_lists(names, train, b"UCF-101/Dive/c.avi\r\n\r\n") == (
        ["train", "test", None, "train"],
        ["Run/gone.avi 7"],
    )
    with pytest.raises(DataError, match="both"):
        split_by_lists(names, b"Dive/c.avi", b"c.avi")
    with pytest.raises(DataError, match="No video stands on the test list"):
        split_by_lists(names, b"Dive/c.avi", b"nothing.avi")
    with pytest.raises(DataError, match=r"'x\.avi' of the train list names 2 videos, as a/x\.avi and b/x"):
        split_by_lists(["a/x.avi", "b/x.avi"], b"x.avi", b"a/x.avi")
    assert split_by_lists(["x.avi", "b/x.avi"], b"x.avi", b"b/x.avi") == (["train", "test"], [])


def test_classes_are_counted_as_they_occur() -> None:
    assert numbered([("b", "train"), None, ("d", "test"), ("b", "test")]) == [
        ("b", 0, "train"),
        None,
        ("d", 1, "test"),
        ("b", 0, "test"),
    ]
