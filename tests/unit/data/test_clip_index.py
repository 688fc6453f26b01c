"""Which clips of a set of latents may stay when the manifest has changed."""

from dataclasses import replace

import pytest

from ardiff.data.clip_index import CurrentVideos
from ardiff.data.manifest import VideoRecord

CAT = VideoRecord("cat.mp4", 1, "h264", 50, 38, 8.0, 12, 1, "cats", "train", "ok", "", etag="e")
APE = replace(CAT, uri="ape.mp4", label=0, class_name="apes")


@pytest.mark.parametrize(
    ("now", "stays"),
    [
        (CAT, True),
        (replace(CAT, etag="f"), False),
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
