"""Clip numbers, and which clips of a set of latents stay when the manifest has changed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ardiff.data.clip_index import (
    CLIPS_PER_READ,
    CurrentVideos,
    clip_numbers,
    reading_bounds,
    split_numbers,
    stored_clips,
)
from ardiff.data.manifest import VideoRecord

CAT = VideoRecord("cat.mp4", 1, "h264", 50, 38, 8.0, 12, 1, "cats", "train", "ok", "", etag="e")
APE = replace(CAT, uri="ape.mp4", label=0, class_name="apes")


def test_numbers_hold_video_start_and_mirror() -> None:
    numbers = clip_numbers(5, [0, 8, 2**31 - 1], mirrored=True)
    assert np.all(np.diff(numbers) > 0)
    videos, starts, mirrored = split_numbers(numbers)
    assert set(videos.tolist()) == {5}
    assert starts.tolist() == [0, 0, 8, 8, 2**31 - 1, 2**31 - 1]
    assert mirrored.tolist() == [0, 1] * 3
    assert split_numbers(clip_numbers(5, [3], mirrored=False))[2].tolist() == [0]


def test_a_reading_has_clips_of_one_video() -> None:
    lengths = [CLIPS_PER_READ + 1, 1, 3]
    numbers = np.concatenate([clip_numbers(i, list(range(n)), mirrored=False) for i, n in enumerate(lengths)])
    bounds = reading_bounds(numbers).tolist()
    assert bounds == [0, CLIPS_PER_READ, CLIPS_PER_READ + 1, CLIPS_PER_READ + 2, CLIPS_PER_READ + 5]


def file(name: str, *clips: tuple[str, str, int, int, bool]) -> dict[str, Any]:
    """The columns of a file with these clips: uri, etag, label, start, mirrored."""
    names = ("uri", "etag", "label", "start", "mirrored")
    return {"file": name, **{n: list(values) for n, values in zip(names, zip(*clips, strict=True), strict=True)}}


def test_outdated_and_repeated_clips_do_not_stay() -> None:
    current = CurrentVideos.of([APE, CAT], ["apes", "cats"])
    first = file("a", ("cat.mp4", "e", 1, 0, False), ("cat.mp4", "old", 1, 8, False), ("ape.mp4", "e", 0, 0, True))
    second = file("b", ("ape.mp4", "e", 0, 0, True), ("gone.mp4", "x", 1, 4, False))
    numbers, stays = stored_clips([first, second], [APE, CAT], current)
    assert {name: stay.tolist() for name, stay in stays.items()} == {"a": [True, False, True], "b": [False, True]}
    videos, starts, mirrored = (column.tolist() for column in split_numbers(numbers))
    assert list(zip(videos, starts, mirrored, strict=True)) == [(0, 0, 1), (1, 0, 0), (2, 4, 0)]
    assert stored_clips([], [APE], current)[0].size == 0


@pytest.mark.parametrize(
    ("now", "stays"),
    [
        (CAT, True),
        (replace(CAT, etag="f"), False),
        (replace(CAT, filters="deinterlace"), False),
        (replace(CAT, label=0), False),
        (replace(CAT, split="test"), False),
        (replace(CAT, status="skipped"), False),
    ],
)
def test_a_clip_stays_if_content_label_and_split_are_those_of_the_manifest(now: VideoRecord, stays: bool) -> None:
    assert CurrentVideos.of([APE, now], ["apes", "cats"]).agrees("cat.mp4", "e", 1) is stays


def test_a_clip_of_a_video_that_is_gone_stays_if_its_class_has_the_same_number() -> None:
    for before, stays in ((["apes", "cats"], True), (["bats", "cats"], True), (["apes", "dogs"], False), ([], False)):
        assert CurrentVideos.of([APE, CAT], before).agrees("gone.mp4", "e", 1) is stays
