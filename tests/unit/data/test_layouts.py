"""Which files are one video, and its class and split in every dataset layout of docs/data.md."""

import json

import pytest

from ardiff.data.discovery import group_files
from ardiff.data.layouts import LAYOUTS, LayoutName, assign, is_split_file, split_by_lists, with_labels
from ardiff.data.storage import StoredFile
from ardiff.errors import DataError


def files(*names: str) -> list[StoredFile]:
    return [StoredFile(f"s3://b/data/{name}", 10, f"etag of {name}") for name in names]


def test_folders_of_pictures_are_videos_with_an_etag_of_all_of_them() -> None:
    listed = files("a.mp4", "x/2.png", "x/10.png", "x/notes.txt", "y/clip/1.jpg", "loose.jpg")
    found = group_files("s3://b/data/", listed)
    assert [(v.uri, v.size) for v in found] == [
        ("s3://b/data/a.mp4", 10),
        ("s3://b/data/x/", 20),
        ("s3://b/data/y/clip/", 10),
    ]
    changed = [StoredFile(f.uri, f.size, "new") if f.uri.endswith("10.png") else f for f in listed]
    assert [a.etag == b.etag for a, b in zip(found, group_files("s3://b/data", changed), strict=True)] == [
        True,
        False,
        True,
    ]
    assert group_files("s3://b/data", listed[::-1]) == found


def test_pictures_beside_videos_are_no_video() -> None:
    listed = files("cats/a.mp4", "cats/a.jpg", "dogs/b/1.png", "dogs/poster.png", "sets/x/c.mp4", "sets/cover.jpg")
    names = [v.uri.removeprefix("s3://b/data/") for v in group_files("s3://b/data", listed)]
    assert names == ["cats/a.mp4", "dogs/", "dogs/b/", "sets/x/c.mp4"]


def test_ucf101() -> None:
    names = ["UCF-101/Dive/v_Dive_g07_c01.avi", "UCF-101/Archery/v_Archery_g08_c02.avi", "UCF-101/readme.avi"]
    assert assign("ucf101", names, {}, 0.5) == [("Dive", 1, "test"), ("Archery", 0, "train"), None]
    assert assign("ucf101", ["Dive/v_Dive_g25_c01.avi"], {}, 0.5) == [("Dive", 0, "train")]


def test_sky_and_taichi() -> None:
    names = ["sky_train/abc/abc_1/", "sky_test/def/def_1/", "sky_extra/x/"]
    assert assign("sky", names, {}, 0.5) == [("sky", 0, "train"), ("sky", 0, "test"), None]
    names = ["train/id#0.mp4/", "test/id#1.mp4"]
    assert assign("taichi", names, {}, 0.5) == [("taichi", 0, "train"), ("taichi", 0, "test")]


def test_faceforensics() -> None:
    folder = "original_sequences/youtube/c23/videos"
    lists = {
        f"splits/{name}.json": json.dumps(pairs).encode()
        for name, pairs in (("train", [["001", "870"]]), ("val", [["003", "004"]]), ("test", [["005", "006"]]))
    }
    names = [f"{folder}/{n}.mp4" for n in ("001", "004", "005", "999")] + ["manipulated_sequences/x/c23/videos/1_2.mp4"]
    assert assign("faceforensics", names, lists, 0.5) == [
        ("faceforensics", 0, "train"),
        ("faceforensics", 0, "test"),
        ("faceforensics", 0, "test"),
        None,
        None,
    ]
    assert assign("faceforensics", ["train/001/", "val/2.mp4"], {}, 0.5) == [
        ("faceforensics", 0, "train"),
        ("faceforensics", 0, "test"),
    ]
    assert [is_split_file("faceforensics", n) for n in ("splits/val.json", "a/splits/test.json", "val.json")] == [
        True,
        True,
        False,
    ]
    assert not is_split_file("ucf101", "splits/val.json")
    with pytest.raises(DataError, match="not a list of pairs"):
        assign("faceforensics", names, {"splits/train.json": b"{"}, 0.5)


def test_folders() -> None:
    assert assign("folders", ["train/b/1.mp4", "test/a/x/"], {}, 0.5) == [("b", 1, "train"), ("a", 0, "test")]


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"folders"}))
def test_paths_that_do_not_fit_the_layout_are_an_error_that_shows_the_expected_ones(layout: LayoutName) -> None:
    with pytest.raises(DataError, match=rf"layout={layout}, which expects .*The first video is stuff/1.mp4"):
        assign(layout, ["stuff/1.mp4"], {}, 0.5)


def test_lists() -> None:
    names = ["UCF-101/Dive/a b.avi", "UCF-101/Dive/c.avi", "UCF-101/Run/d.avi", "frames/e/"]
    train = b"Dive/a b.avi 3\nframes/e\nRun/gone.avi 7\n"
    assert split_by_lists(names, train, b"UCF-101/Dive/c.avi\r\n\r\n") == (
        ["train", "test", None, "train"],
        ["Run/gone.avi 7"],
    )
    with pytest.raises(DataError, match="both"):
        split_by_lists(names, b"Dive/c.avi", b"c.avi")
    with pytest.raises(DataError, match="No video is on the test list"):
        split_by_lists(names, b"Dive/c.avi", b"nothing.avi")
    with pytest.raises(DataError, match=r"'x\.avi' of the train list matches 2 videos, such as a/x\.avi and b/x"):
        split_by_lists(["a/x.avi", "b/x.avi"], b"x.avi", b"a/x.avi")
    assert split_by_lists(["x.avi", "b/x.avi"], b"x.avi", b"b/x.avi") == (["train", "test"], [])


def test_classes_are_counted_as_they_occur() -> None:
    assert with_labels([("b", "train"), None, ("d", "test"), ("b", "test")]) == [
        ("b", 0, "train"),
        None,
        ("d", 1, "test"),
        ("b", 0, "test"),
    ]


# The layout `folders`


def test_classes_are_first_folders_in_order() -> None:
    found = assign("folders", ["walk/1.mp4", "jump/1.mp4", "jump/deep/2.mp4"], {}, 0.5)
    assert [(name, label) for name, label, _ in found] == [("walk", 1), ("jump", 0), ("jump", 0)]


def test_one_class_without_folders() -> None:
    assert [x[:2] for x in assign("folders", ["1.mp4", "2.mp4"], {}, 0.5)] == [("video", 0)] * 2
    assert assign("folders", [], {}, 0.5) == []


def test_split_folders_are_no_classes() -> None:
    paths = ["train/jump/1.mp4", "Test/walk/1.mp4", "val/jump/2.mp4"]
    assert assign("folders", paths, {}, 0.0) == [("jump", 0, "train"), ("walk", 1, "test"), ("jump", 0, "test")]
    assert assign("folders", ["train/1.mp4", "validation/2.mp4"], {}, 0.0) == [
        ("video", 0, "train"),
        ("video", 0, "test"),
    ]


@pytest.mark.parametrize(
    ("paths", "odd"),
    [
        (["train/run/1.mp4", "test/run/2.mp4", "extras/x.mp4"], "extras/x.mp4 lies beside the train and test folders"),
        (["run/1.mp4", "jump/2.mp4", "intro.mp4"], "intro.mp4 lies in no class folder, but run/1.mp4 does"),
        (["train/run/1.mp4", "train/x.mp4", "val/run/2.mp4"], "train/x.mp4 lies in no class folder, but train/run"),
    ],
)
def test_a_stray_file_is_named(paths: list[str], odd: str) -> None:
    with pytest.raises(DataError, match=odd):
        assign("folders", paths, {}, 0.5)


def test_a_class_may_be_called_train() -> None:
    assert [x[0] for x in assign("folders", ["train/1.mp4", "bus/1.mp4"], {}, 0.5)] == ["train", "bus"]


def test_hashed_split_depends_on_the_path_alone() -> None:
    paths = [f"c/{i}.mp4" for i in range(2000)]
    splits = {path: split for path, (_, _, split) in zip(paths, assign("folders", paths, {}, 0.1), strict=True)}
    assert 150 < sum(split == "test" for split in splits.values()) < 250
    some = paths[1000:10:-7]
    assert [x[2] for x in assign("folders", some, {}, 0.1)] == [splits[path] for path in some]
